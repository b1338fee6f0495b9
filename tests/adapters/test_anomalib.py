"""Models of anomalib as detectors, and its files by our metrics."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import flawsift
from flawsift.datasets import Dataset
from flawsift.detectors.base import Detector
from flawsift.detectors.registry import load_detector, make_detector
from flawsift.errors import ModelError, ParameterError, TrainingError
from flawsift.testing import CHECKS, SIZE, tiny_backbone, with_features

pytest.importorskip("anomalib", reason="anomalib is not installed: pip install 'flawsift[anomalib]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # what Lightning and anomalib warn of is theirs

# first, as it is quiet about what the others import
from flawsift.adapters.anomalib import evaluate_file  # noqa: E402, I001
from anomalib import models  # noqa: E402
from anomalib.data import ImageBatch, ImageItem  # noqa: E402
from lightning.pytorch import Trainer  # noqa: E402

# random weights, as no test downloads any
PATCHCORE: dict[str, Any] = {
    "arguments": {
        "backbone": "resnet18",
        "layers": ["layer2"],
        "pre_trained": False,
        "coreset_sampling_ratio": 0.02,
    }
}
PADIM: dict[str, Any] = {"arguments": {"backbone": "resnet18", "pre_trained": False, "n_features": 30}}


def of(model: str, **changes: Any) -> Detector:
    return make_detector(f"anomalib:{model}", layers=("stride8",), **changes)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_common_checks(check: Callable[[Detector], None]) -> None:
    check(of("Patchcore", **PATCHCORE))


def test_a_trained_network_learns_survives_and_is_seeded(easy: Dataset, tmp_path: Path) -> None:
    detector = of("Ganomaly", epochs=1, seed=1)  # a network without maps
    data = with_features(easy.images.select(range(17)), detector)  # 17: a last batch of one would be refused
    fitted = detector.fit(data)
    said = fitted.predict(data)
    fitted.save(tmp_path)
    assert (load_detector(tmp_path).predict(data).scores == said.scores).all()
    assert (of("Ganomaly", epochs=1, seed=1).fit(data).predict(data).scores == said.scores).all()
    assert (of("Ganomaly", epochs=1, seed=2).fit(data).predict(data).scores != said.scores).all()
    assert said.maps is not None
    np.testing.assert_allclose(said.maps[0], said.scores[0], rtol=1e-5)


def test_both_stages_and_a_model_folder(easy: Dataset, tmp_path: Path) -> None:
    options = flawsift.ScreenOptions(screener="own", n_subsets=3)
    made = flawsift.fit(easy.images, of("Padim", **PADIM), tiny_backbone(), options=options, out=tmp_path / "model")
    assert made.screening is not None
    assert made.screening.submodels is not None
    assert made.screening.options.screener == "anomalib"
    loaded = flawsift.load_model(tmp_path / "model")
    assert (loaded.predict(easy.images).scores == made.model.predict(easy.images).scores).all()


def test_what_anomalib_refuses_is_told(easy: Dataset) -> None:
    with pytest.raises(ParameterError, match="Did you mean 'Padim'"):
        of("Padin")
    wrong = of("Padim", arguments={"colour": "red"})
    with pytest.raises(ParameterError, match="anomalib cannot make Padim"):
        wrong.fit(with_features(easy.images.select(range(4)), wrong))
    few = of("Dfkde", arguments={"pre_trained": False})
    with pytest.raises(TrainingError, match="Dfkde of anomalib cannot learn 2 images"):
        few.fit(with_features(easy.images.select(range(2)), few))
    assert not few.fitted


def test_a_checkpoint_is_measured_by_its_own_scores(easy: Dataset, tmp_path: Path) -> None:
    plain = models.Padim(
        pre_processor=models.Padim.configure_pre_processor((SIZE, SIZE)), visualizer=False, **PADIM["arguments"]
    )
    pixels = easy.images.select(range(30)).pixels(SIZE).float() / 255
    items = [ImageItem(image=image, gt_label=torch.tensor(False)) for image in pixels]
    loader: Any = torch.utils.data.DataLoader(cast(Any, items), batch_size=8, collate_fn=ImageBatch.collate)
    trainer = Trainer(**{**plain.trainer_arguments, "accelerator": "cpu"}, logger=False, default_root_dir=tmp_path)
    trainer.fit(plain, train_dataloaders=loader)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    metrics, predictions = evaluate_file(tmp_path / "model.ckpt", easy.images, easy.truth, model="padim", size=SIZE)
    plain.eval()
    with torch.inference_mode():
        expected = plain.model(plain.pre_processor(easy.images.pixels(SIZE).float() / 255)).pred_score.ravel()
    np.testing.assert_allclose(predictions.scores, expected.numpy(), rtol=1e-4)
    assert metrics["image_auroc"] > 0.9
    assert metrics["pixel_auroc"] is not None
    with pytest.raises(ParameterError, match="give its class"):
        evaluate_file(tmp_path / "model.ckpt", easy.images, easy.truth)


class Evil:
    """What a pickle may do when it is loaded."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt"])
def test_nothing_is_unpickled(name: str, easy: Dataset, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "model": Evil()}, tmp_path / name)
    with pytest.raises(ModelError, match="ONNX or OpenVINO"):
        evaluate_file(tmp_path / name, easy.images, easy.truth, model="Padim")


def test_an_exported_file_is_measured(easy: Dataset, tmp_path: Path) -> None:
    """A made-up export, whose answer is known: the brightest value, and the mean of the channels."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("ReduceMax", ["input"], ["pred_score"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("ReduceMean", ["input"], ["anomaly_map"], axes=[1], keepdims=1),
    ]
    shape = [1, 3, 32, 32]
    outputs = [("pred_score", [1]), ("anomaly_map", [1, 1, 32, 32])]
    graph = helper.make_graph(
        nodes,
        "made-up",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in outputs],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(made, str(tmp_path / "model.onnx"))
    metrics, predictions = evaluate_file(tmp_path / "model.onnx", easy.images, easy.truth)
    pixels = easy.images.pixels(32).float() / 255
    np.testing.assert_allclose(predictions.scores, pixels.amax((1, 2, 3)).numpy(), rtol=1e-6)
    assert metrics["n_anomalous"] == 10
    assert metrics["false_alarms_per_100"] is None
    (tmp_path / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="cannot be loaded"):
        evaluate_file(tmp_path / "model.onnx", easy.images, easy.truth)
