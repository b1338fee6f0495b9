"""Common checks that every detector passes, public, so that a detector of your own can be checked too.

    import pytest
    from flawsift.testing import CHECKS

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_detector(check):
        check(MyDetector())

Each check takes an unfitted detector that reads layers of the `tiny` backbone and raises AssertionError with what is
wrong. Random weights carry no claim on accuracy: only defects that nobody could miss are asked for.
"""

import functools
import json
import pickle
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flawsift import pipeline
from flawsift.data.images import ImageSet
from flawsift.datasets import Dataset
from flawsift.datasets.synthetic import synthetic
from flawsift.detectors.base import Detector
from flawsift.detectors.registry import load_detector
from flawsift.errors import NotFittedError
from flawsift.features.backbones import Backbone, load_backbone
from flawsift.features.extraction import attach
from flawsift.features.store import FeatureStore
from flawsift.metrics.ranking import image_auroc
from flawsift.screening.options import OWN, ScreenOptions
from flawsift.screening.stage1 import screen

SIZE = 64  # pixels: large enough for three strides, small enough for milliseconds
TOLERANCE = 1e-4  # of a score, where only rounding may differ
EASY_AUROC = 0.85  # on defects of 60 grey levels and more; a detector that works reaches 1


@functools.cache
def tiny_backbone() -> Backbone:
    """The test backbone: three strides, random weights, milliseconds."""
    return load_backbone("tiny", size=SIZE, runtime="torch")


@functools.cache
def easy_set(n_normal: int = 40, n_anomalous: int = 10, seed: int = 0) -> Dataset:
    """Synthetic images; ids 0.. normal, then defective."""
    return synthetic(n_normal, n_anomalous, size=SIZE, seed=seed)


def with_features(images: ImageSet, detector: Detector) -> ImageSet:
    """A set with the features that a detector reads, in memory."""
    return attach(images, tiny_backbone(), detector.layers, views=detector.views)[0]


def _train(detector: Detector, n: int = 24) -> ImageSet:
    data = easy_set()
    return with_features(data.images.select(_normal(data)[:n]), detector)


def _test(detector: Detector) -> tuple[ImageSet, npt.NDArray[np.int8]]:
    data = easy_set()
    ids = np.concatenate([_normal(data)[24:], data.truth.ids[data.truth.labels == 1]])
    return with_features(data.images.select(ids), detector), data.truth.select(ids).labels


def _normal(data: Dataset) -> npt.NDArray[np.int64]:
    ids: npt.NDArray[np.int64] = data.truth.ids[data.truth.labels == 0]
    return ids


def _close(a: npt.NDArray[Any], b: npt.NDArray[Any], what: str) -> None:
    scale = max(float(np.abs(b).max(initial=0)), 1e-12)
    worst = float(np.abs(a - b).max(initial=0))
    assert worst <= TOLERANCE * scale, f"{what}: scores differ by {worst:.3g} at a scale of {scale:.3g}"


def check_parameters_survive_json(detector: Detector) -> None:
    """Fields are the constructor's parameters, and JSON can hold them."""
    params = json.loads(json.dumps(detector.params()))
    assert type(detector)(**params).params() == detector.params()
    assert type(detector)().params(), "default-constructible"


def check_unfitted_refuses(detector: Detector) -> None:
    """`predict` and `save` before `fit` say so; a clone is unfitted."""
    data = _train(detector, 4)
    fitted = detector.clone().fit(data)
    assert fitted.fitted
    assert not detector.fitted, "clone shares state with its original"
    for unfitted in (detector, fitted.clone()):
        uses: tuple[Callable[[], object], ...] = (partial(unfitted.predict, data), partial(unfitted.save, Path()))
        for use in uses:
            try:
                use()
            except NotFittedError:
                continue
            raise AssertionError("an unfitted detector predicted or saved")


def check_output_contract(detector: Detector) -> None:
    """float32, finite, ids echoed in order; without maps the same scores."""
    test, _ = _test(detector)
    shuffled = test.select(test.ids[::-1])
    fitted = detector.clone().fit(_train(detector))
    found = fitted.predict(shuffled)
    assert found.ids.tolist() == shuffled.ids.tolist()
    assert found.scores.dtype == np.float32
    assert found.scores.shape == (len(test),)
    assert found.maps is not None
    assert found.maps.dtype == np.float32
    assert found.maps.shape == (len(test), SIZE, SIZE)
    assert np.isfinite(found.scores).all()
    assert np.isfinite(found.maps).all()
    bare = fitted.predict(shuffled, maps=False)
    assert bare.maps is None
    assert (bare.scores == found.scores).all(), "maps=False changes scores"
    assert len(fitted.predict(test.select([])).scores) == 0


def check_same_seed_same_scores(detector: Detector) -> None:
    """Fitting twice gives the same bits, and leaves the global generators alone."""
    train, (test, _) = _train(detector), _test(detector)
    with _global_state_untouched():
        first = detector.clone().fit(train).predict(test, maps=False).scores
    second = detector.clone().fit(train).predict(test, maps=False).scores
    assert (first == second).all(), "two fits with one seed differ"


def check_refit_forgets(detector: Detector) -> None:
    """A fit after another fit equals a fresh fit."""
    train, (test, _) = _train(detector), _test(detector)
    once = detector.clone().fit(train)
    twice = detector.clone().fit(test).fit(train)
    assert (once.predict(test, maps=False).scores == twice.predict(test, maps=False).scores).all()


def check_scores_are_independent(detector: Detector) -> None:
    """Batch size, order and the company of other images do not change a score."""
    test, _ = _test(detector)
    fitted = detector.clone().fit(_train(detector))
    together = fitted.predict(test, maps=False).scores
    alone = np.concatenate([fitted.predict(test.select([i]), maps=False).scores for i in test.ids])
    _close(alone, together, "one by one")
    _close(fitted.predict(test, maps=False, batch_size=5).scores, together, "batches of 5")
    backwards = fitted.predict(test.select(test.ids[::-1]), maps=False).scores[::-1]
    _close(backwards, together, "reversed")


def check_state_survives(detector: Detector) -> None:
    """Saving, loading and pickling keep every score; the state is on the CPU and names no path."""
    test, _ = _test(detector)
    fitted = detector.clone().fit(_train(detector))
    expected = fitted.predict(test, maps=False).scores
    with tempfile.TemporaryDirectory() as folder:
        fitted.save(Path(folder))
        text = (Path(folder) / "detector.json").read_text()
        assert folder not in text
        assert str(Path.home()) not in text
        loaded = load_detector(folder) if _registered(detector) else None
    if loaded is not None:
        assert (loaded.predict(test, maps=False).scores == expected).all(), "save and load change a score"
    again: Detector = pickle.loads(pickle.dumps(fitted))  # our own bytes, in memory: what worker processes exchange
    assert (again.predict(test, maps=False).scores == expected).all(), "pickling changes a score"
    for name, value in vars(fitted).items():
        assert not isinstance(value, Tensor) or value.device.type == "cpu", f"{name} is not on the CPU"


def check_each_image_passes_the_backbone_once(detector: Detector) -> None:
    """Stage 1 and stage 2 together extract every image once, and never touch the frozen weights."""
    backbone = tiny_backbone()
    counted: list[int] = []
    extract = backbone.extract

    def counting(pixels: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        counted.append(len(pixels))
        return extract(pixels, layers)

    images = easy_set().images.select(_normal(easy_set())[:20])
    options = ScreenOptions(screener=OWN, rank_by="submodels", n_subsets=3)
    backbone.extract = counting  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            pipeline.fit(images, detector.clone(), backbone, options=options, store=FeatureStore(Path(folder)))
    finally:
        del backbone.extract
    passes = 20 * (1 + len(detector.views))
    assert sum(counted) == passes, f"20 images passed the backbone {sum(counted)} times instead of {passes}"
    assert backbone.parameters_digest() == backbone.weights_digest, "the frozen backbone was trained"


def check_reads_only_what_it_declares(detector: Detector) -> None:
    """Only the declared layers are read, and pixels only with `reads_pixels`."""
    asked: set[str] = set()
    train = _train(detector)

    class Watching:
        size = SIZE
        key = "watching"

        def read(self, images: ImageSet, layers: Sequence[str]) -> dict[str, Tensor]:
            asked.update(layers)
            assert train.reader is not None
            return train.reader.read(images, layers)

    watched = replace(train, reader=Watching())
    if not detector.reads_pixels:
        watched = replace(watched, source=_NoPixels(train.source))
    detector.clone().fit(watched).predict(watched)
    assert asked <= set(detector.layers), f"reads {asked}, declares {set(detector.layers)}"


def check_easy_defects_are_found(detector: Detector) -> None:
    """Defects that nobody could miss rank above good images, and the map is highest on them."""
    data = easy_set()
    test, labels = _test(detector)
    found = detector.clone().fit(_train(detector)).predict(test)
    assert found.maps is not None
    auroc = image_auroc(found.scores, labels)
    assert auroc >= EASY_AUROC, f"image AUROC {auroc:.3f} on easy defects"
    inside = []
    for id_, grid in zip(found.ids[labels == 1], found.maps[labels == 1], strict=True):
        mask = data.truth.mask(int(id_), (SIZE, SIZE))
        assert mask is not None
        inside.append(grid[mask].mean() > grid[~mask].mean())
    assert np.mean(inside) >= 0.8, "maps are not higher on defects"


def check_noise_is_anomalous(detector: Detector) -> None:
    """Pure noise scores above the median good image."""
    noise = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    fitted = detector.clone().fit(_train(detector))
    strange = fitted.predict(with_features(ImageSet.from_arrays(list(noise)), detector), maps=False).scores
    test, labels = _test(detector)
    good = fitted.predict(test, maps=False).scores[labels == 0]
    assert (strange > np.median(good)).all()


def check_screening_lowers_contamination(detector: Detector) -> None:
    """Of a set with a fifth of easy defects, stage 1 keeps a purer one."""
    data = easy_set()
    mixed = with_features(data.images, detector)
    result = screen(mixed, detector, ScreenOptions(rank_by="submodels", n_subsets=4, keep=0.6))
    before, after = data.truth.contamination, data.truth.select(result.kept).contamination
    assert after < before, f"contamination {before:.2f} before, {after:.2f} after screening"


def check_odd_sets(detector: Detector) -> None:
    """One image, two identical ones, constant and non-square ones: a finite result or a clear ValueError."""
    grey = np.full((SIZE, SIZE, 3), 128, np.uint8)
    wide = np.random.default_rng(1).integers(0, 256, (20, 90, 3), dtype=np.uint8)
    for name, arrays in {
        "one": [wide],
        "two identical": [wide, wide],
        "constant": [grey, grey, grey],
        "non-square": [wide, wide.transpose(1, 0, 2), wide[:, :50]],
    }.items():
        data = with_features(ImageSet.from_arrays(arrays), detector)
        try:
            found = detector.clone().fit(data).predict(data)
        except ValueError:
            continue
        assert np.isfinite(found.scores).all(), f"{name}: a score is not finite"
        assert np.isfinite(found.maps).all() if found.maps is not None else False, f"{name}: a map is not finite"


class _NoPixels:
    """A source that fails the check when pixels are read."""

    def __init__(self, source: Any) -> None:
        self._source = source

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        ids: npt.NDArray[np.int64] = self._source.ids
        return ids

    def name(self, id_: int) -> str:
        return f"{id_}"

    def digest(self, id_: int) -> str:
        raise AssertionError(f"the content of image {id_} was read, but reads_pixels is False")

    value_range = None

    def within(self, value_range: object) -> "_NoPixels":
        return self

    def size(self, id_: int) -> Any:
        return self.image(id_)

    def deep(self, id_: int) -> Any:
        return self.image(id_)

    def image(self, id_: int) -> Any:
        raise AssertionError(f"pixels of image {id_} were read, but reads_pixels is False")


def _registered(detector: Detector) -> bool:
    from flawsift.detectors.registry import DETECTORS

    return detector.name in DETECTORS


@contextmanager
def _global_state_untouched() -> Iterator[None]:
    before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state())  # noqa: NPY002 - only compared
    yield
    after = (random.getstate(), str(np.random.get_state()), torch.get_rng_state())  # noqa: NPY002
    assert before[0] == after[0], "random's global generator was used"
    assert before[1] == after[1], "numpy's global generator was used"
    assert torch.equal(before[2], after[2]), "torch's global generator was used"


CHECKS: tuple[Callable[[Detector], None], ...] = (
    check_parameters_survive_json,
    check_unfitted_refuses,
    check_output_contract,
    check_same_seed_same_scores,
    check_refit_forgets,
    check_scores_are_independent,
    check_state_survives,
    check_each_image_passes_the_backbone_once,
    check_reads_only_what_it_declares,
    check_easy_defects_are_found,
    check_noise_is_anomalous,
    check_screening_lowers_contamination,
    check_odd_sets,
)
