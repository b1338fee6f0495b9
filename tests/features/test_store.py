"""The feature store: content-addressed, resumable, and never half-written."""

import json
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flawsift.data.images import ImageSet
from flawsift.datasets import Dataset
from flawsift.errors import InputError, OutputError, ParameterError
from flawsift.features import extraction
from flawsift.features.backbones import Backbone
from flawsift.features.extraction import attach, stream
from flawsift.features.store import FeatureStore

LAYERS = ("stride8", "stride16")


class Counting:
    """Counts the images that pass a backbone."""

    def __init__(self, backbone: Backbone, monkeypatch: pytest.MonkeyPatch, *, fail_after: int | None = None) -> None:
        self.n = 0
        real = backbone.extract

        def extract(pixels: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
            if fail_after is not None and self.n >= fail_after:
                raise KeyboardInterrupt
            self.n += len(pixels)
            return real(pixels, layers)

        monkeypatch.setattr(backbone, "extract", extract)


def read(images: ImageSet, layer: str = "stride8") -> Tensor:
    assert images.reader is not None
    return images.reader.read(images, [layer])[layer]


def test_stored_features_are_the_backbones(tiny: Backbone, easy: Dataset, tmp_path: Path) -> None:
    images = easy.images.select([7, 3, 11])
    direct = tiny.extract(images.pixels(tiny.size), LAYERS)
    for dtype, error in (("float16", 1e-3), ("float32", 0.0)):
        data, failed = attach(images, tiny, LAYERS, store=FeatureStore(tmp_path / dtype, dtype))
        assert not failed
        for layer in LAYERS:
            assert (read(data, layer) - direct[layer]).abs().max() <= error * direct[layer].abs().max()
    streamed = next(iter(stream(images, tiny, LAYERS))).data
    stored, _ = attach(images, tiny, LAYERS, store=FeatureStore(tmp_path / "float16"))
    assert torch.equal(read(streamed), read(stored)), "fit and predict must see the same features"


def test_each_content_is_extracted_once(
    tiny: Backbone, easy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(tiny, monkeypatch)
    root, store = tmp_path / "images", FeatureStore(tmp_path / "cache")
    shutil.copytree(easy_folder, root)
    shutil.copy(root / "part-00.png", root / "copy-of-00.png")
    data, _ = attach(ImageSet.from_folder(root), tiny, LAYERS, store=store)
    assert counting.n == 50, "a copy costs nothing"
    assert torch.equal(read(data.select([0])), read(data.select([1]))), "copy-of-00 and part-00"
    attach(ImageSet.from_folder(root), tiny, LAYERS, store=store)
    (root / "part-01.png").rename(root / "renamed.png")
    attach(ImageSet.from_folder(root), tiny, LAYERS[:1], store=store)
    assert counting.n == 50, "a second run, another name and fewer layers cost nothing"
    attach(ImageSet.from_folder(root), tiny, ("stride4",), store=store)
    assert counting.n == 100, "another layer is extracted"


def test_order_follows_the_view(tiny: Backbone, easy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "SHARD", 4)  # several shards
    data, _ = attach(easy.images, tiny, LAYERS, store=FeatureStore(tmp_path))
    ids = np.random.default_rng(0).permutation(easy.images.ids)
    whole = read(data)
    assert torch.equal(read(data.select(ids)), whole[ids])
    assert torch.equal(read(pickle.loads(pickle.dumps(data.select(ids)))), whole[ids])
    batches = list(data.batches(LAYERS, batch_size=7, shuffle=np.random.default_rng(1)))
    assert sorted(i for b in batches for i in b.ids.tolist()) == easy.images.ids.tolist()
    for batch in batches:
        assert torch.equal(batch.features["stride8"], whole[batch.ids])


def test_a_killed_extraction_goes_on(
    tiny: Backbone, easy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "SHARD", 10)
    store = FeatureStore(tmp_path)
    with monkeypatch.context() as inner:
        Counting(tiny, inner, fail_after=30)
        with pytest.raises(KeyboardInterrupt):
            attach(easy.images, tiny, LAYERS, store=store)
    counting = Counting(tiny, monkeypatch)
    attach(easy.images, tiny, LAYERS, store=store)
    assert counting.n == 20


def test_unreadable_images_are_named_and_the_rest_goes_on(tiny: Backbone, easy_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(easy_folder, root)
    (root / "empty.png").touch()
    (root / "text.jpg").write_text("hello")
    (root / "gone.png").symlink_to(root / "nowhere")
    (root / "cut.png").write_bytes((root / "part-00.png").read_bytes()[:200])
    images = ImageSet.from_folder(root)
    for store in (FeatureStore(tmp_path / "cache"), None):
        data, failed = attach(images, tiny, LAYERS, store=store)
        assert len(data) == 50
        reasons = {images.source.name(i): reason for i, reason in failed.items()}
        assert set(reasons) == {"empty.png", "text.jpg", "gone.png", "cut.png"}
        assert "empty file" in reasons["empty.png"]
        assert "not there" in reasons["gone.png"]
    only_bad = images.select([i for i in images.ids if images.source.name(int(i)) == "empty.png"])
    with pytest.raises(InputError, match="None of the 1 images can be read"):
        attach(only_bad, tiny, LAYERS, store=FeatureStore(tmp_path / "cache"))


def test_damage_is_found_and_repaired(tiny: Backbone, easy: Dataset, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    first, _ = attach(easy.images, tiny, LAYERS, store=store)
    expected = read(first).clone()
    assert store.verify() == []
    victim = next(iter(tmp_path.rglob("stage2.npy")))
    data = bytearray(victim.read_bytes())
    data[-3] ^= 0xFF
    victim.write_bytes(bytes(data))
    assert len(store.verify()) == 1
    assert "SHA-256" in store.verify(repair=True)[0]
    again, _ = attach(easy.images, tiny, LAYERS, store=store)
    assert torch.equal(read(again), expected)


def test_summary_and_clear_touch_only_the_store(tiny: Backbone, easy: Dataset, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "keep.txt").write_text("precious")
    attach(easy.images, tiny, LAYERS, store=store)
    (row,) = store.summary()
    assert row["images"] == 50
    assert row["layers"] == ["stage2", "stage3"]
    assert row["bytes"] > 50 * (24 * 8 * 8 + 32 * 4 * 4) * 2
    assert store.clear() > row["bytes"]
    assert store.summary() == []
    assert (tmp_path / "mine" / "keep.txt").read_text() == "precious"


def test_left_over_folders_are_swept_when_old(tiny: Backbone, easy: Dataset, tmp_path: Path) -> None:
    space = FeatureStore(tmp_path).space(tiny)
    for name, age in (("old", 48 * 3600), ("new", 0)):
        left = space / f".{name}.x.tmp"
        left.mkdir(parents=True)
        stamp = left.stat().st_mtime - age
        os.utime(left, (stamp, stamp))
    attach(easy.images.select([0]), tiny, LAYERS, store=FeatureStore(tmp_path))
    assert [p.name for p in space.glob(".*.tmp")] == [".new.x.tmp"]


def test_a_damaged_index_is_passed_over(tiny: Backbone, easy: Dataset, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    attach(easy.images, tiny, LAYERS, store=store)
    for index in tmp_path.rglob("index.json"):
        index.write_text(json.dumps({"digests": 3}))
    data, failed = attach(easy.images, tiny, LAYERS, store=store)
    assert len(data) == 50
    assert not failed


def test_a_store_that_cannot_be_written_is_told(
    tiny: Backbone, easy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="FLAWSIFT_CACHE"):
        attach(easy.images, tiny, LAYERS, store=FeatureStore(tmp_path / "file" / "cache"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("flawsift.files.shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match="MiB free"):
        attach(easy.images, tiny, LAYERS, store=FeatureStore(tmp_path / "full"))
    with pytest.raises(ParameterError, match="FeatureStore.dtype must be one of"):
        FeatureStore(tmp_path, "int8")


def test_values_that_float16_cannot_hold_are_told(
    tiny: Backbone, easy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tiny, "extract", lambda pixels, layers: {x: torch.full((len(pixels), 1, 2, 2), 1e6) for x in layers}
    )
    with pytest.raises(InputError, match="float16 cannot hold"):
        attach(easy.images, tiny, LAYERS, store=FeatureStore(tmp_path))
