"""The feature store: content-addressed, resumable, and never half-written."""

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def _edit_index(index: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


def _swap_digests(content: dict[str, Any]) -> None:
    content["digests"][:2] = reversed(content["digests"][:2])


def _resave(path: Path, change: Callable[[Any], Any]) -> None:
    """Another array, with a SHA-256 that fits."""
    np.save(path, change(np.load(path)))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    _edit_index(path.with_name("index.json"), lambda c: c["layers"][path.stem].update(sha256=sha256))


# what is done to a shard, and what `verify` says of it
DAMAGE: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "flipped bits": (lambda shard: _flip(shard / "stage2.npy"), "stage2.npy is damaged: it does not match its SHA-256"),
    "empty layer": (lambda shard: (shard / "stage2.npy").write_bytes(b""), "does not match its SHA-256"),
    "truncated layer": (lambda shard: os.truncate(shard / "stage2.npy", 5000), "does not match its SHA-256"),
    "no layer": (lambda shard: (shard / "stage2.npy").unlink(), "stage2.npy cannot be read: No such file"),
    "no index": (lambda shard: (shard / "index.json").unlink(), "index.json cannot be read: No such file"),
    "empty index": (lambda shard: (shard / "index.json").write_bytes(b""), "index.json is damaged"),
    "truncated index": (lambda shard: os.truncate(shard / "index.json", 100), "index.json is damaged"),
    "index of another kind": (lambda shard: (shard / "index.json").write_text("[3]"), "index.json is damaged"),
    "index of brackets": (lambda shard: (shard / "index.json").write_text("[" * 100_000), "index.json is damaged"),
    "index in another order": (lambda shard: _edit_index(shard / "index.json", _swap_digests), "lists other images"),
    "index without a layer": (
        lambda shard: _edit_index(shard / "index.json", lambda c: c["layers"].pop("stage3")),
        "lists other images or layers",
    ),
    "other numbers": (lambda s: _resave(s / "stage2.npy", lambda x: x.astype(np.float32)), "float32 numbers"),
    "other shape": (lambda s: _resave(s / "stage2.npy", lambda x: x[:, :, ::2]), "of the shape (10, 24, 4, 8)"),
    "fewer images": (lambda s: _resave(s / "stage2.npy", lambda x: x[1:]), "of the shape (9, 24, 8, 8)"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_and_computed_again(
    kind: str,
    tiny: Backbone,
    easy: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(extraction, "SHARD", 10)
    store = FeatureStore(tmp_path)
    first, _ = attach(easy.images, tiny, LAYERS, store=store)
    expected = {layer: read(first, layer).clone() for layer in LAYERS}
    shards = sorted(p.parent for p in tmp_path.rglob("index.json"))
    others = {p: p.stat().st_mtime_ns for shard in shards[1:] for p in shard.iterdir()}
    damage, told = DAMAGE[kind]
    damage(shards[0])
    (problem,) = store.verify()
    assert problem.startswith(f"{shards[0]}: ")
    assert told in problem
    counting = Counting(tiny, monkeypatch)
    again, failed = attach(easy.images, tiny, LAYERS, store=store)
    assert not failed
    for layer in LAYERS:
        assert torch.equal(read(again, layer), expected[layer])
    assert counting.n == 10
    assert caplog.text.count("1 of the 5 shards of the feature cache were damaged") == 1
    assert {p: p.stat().st_mtime_ns for shard in shards[1:] for p in shard.iterdir()} == others, "good ones stay"
    caplog.clear()
    attach(easy.images, tiny, LAYERS, store=store)
    assert (counting.n, caplog.text, store.verify()) == (10, "", [])


@pytest.mark.parametrize("kind", ["flipped bits", "no index", "index in another order"])
def test_repair_removes_damage_and_nothing_else(kind: str, tiny: Backbone, easy: Dataset, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    attach(easy.images.select([1, 2]), tiny, LAYERS, store=store)
    attach(easy.images.select([3]), tiny, LAYERS, store=store)
    (tmp_path / "mine" / "sub").mkdir(parents=True)
    space = store.space(tiny)
    (space / "notes").mkdir()
    shard = max((p.parent for p in space.glob("*/index.json")), key=lambda p: (p / "stage2.npy").stat().st_size)
    DAMAGE[kind][0](shard)
    (space / "space.json").write_text("{")
    problems = store.verify()
    assert [line.split(": ")[0] for line in problems] == [str(space), str(shard)]
    assert store.verify(repair=True) == problems
    assert store.verify() == []
    assert not shard.exists()
    assert (tmp_path / "mine" / "sub").is_dir()
    assert (space / "notes").is_dir()
    assert store.summary()[0]["images"] == 1


def test_too_many_open_files_are_no_damage(
    tiny: Backbone, easy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FeatureStore(tmp_path)
    attach(easy.images, tiny, LAYERS, store=store)
    real = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.suffix == ".npy":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(self))
        return real(self, *args, **kwargs)

    os.utime(next(tmp_path.rglob("stage2.npy")))  # so that it is compared again
    with monkeypatch.context() as inner:
        inner.setattr(Path, "open", refuse)
        with pytest.raises(InputError, match="cannot be read: Too many open files"):
            attach(easy.images, tiny, LAYERS, store=store)
        assert "Too many open files" in store.verify(repair=True)[0]
    counting = Counting(tiny, monkeypatch)
    attach(easy.images, tiny, LAYERS, store=store)
    assert counting.n == 0


def test_a_process_compares_each_file_once(
    tiny: Backbone, easy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, compared = FeatureStore(tmp_path), []
    attach(easy.images, tiny, LAYERS, store=store)
    real = hashlib.file_digest

    def counted(file: Any, kind: str) -> Any:
        compared.append(file.name)
        return real(file, kind)

    monkeypatch.setattr("hashlib.file_digest", counted)
    attach(easy.images, tiny, LAYERS, store=store)
    assert compared == []
    os.utime(next(tmp_path.rglob("stage2.npy")))
    attach(easy.images, tiny, LAYERS, store=store)
    assert len(compared) == 1, "what has changed is compared again"


def test_no_file_stays_open(tiny: Backbone, easy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "SHARD", 1)  # 50 shards
    before = len(os.listdir("/dev/fd"))
    data, _ = attach(easy.images, tiny, LAYERS, store=FeatureStore(tmp_path))
    read(data)
    assert len(os.listdir("/dev/fd")) == before


def test_features_that_vanish_under_a_reader_are_told(tiny: Backbone, easy: Dataset, tmp_path: Path) -> None:
    data, _ = attach(easy.images, tiny, LAYERS, store=FeatureStore(tmp_path))
    path = next(tmp_path.rglob("stage2.npy"))
    read(data)
    os.truncate(path, 5000)
    with pytest.raises(InputError, match="it ends early.*the same command again"):
        read(data)
    path.unlink()
    with pytest.raises(InputError, match="No such file.*the same command again"):
        read(data)


def test_a_disk_that_does_not_give_back_what_was_written(
    tiny: Backbone, easy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FeatureStore.write

    def write(self: FeatureStore, *args: Any) -> Path:
        shard = real(self, *args)
        _flip(shard / "stage2.npy")
        return shard

    monkeypatch.setattr(FeatureStore, "write", write)
    with pytest.raises(OutputError, match="does not give back what was just written.*FLAWSIFT_CACHE"):
        attach(easy.images, tiny, LAYERS, store=FeatureStore(tmp_path))


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
