"""The feature store: frozen features on disk, so that each image passes the backbone once for any number of detectors.

Below one root folder:

    <space>/                     one per backbone key, number type and format version
      space.json                 what the key stands for
      <shard>/                   up to 64 images, written to a temporary folder and renamed when complete
        index.json               content digests of the images, per layer its shape and SHA-256
        <layer>.npy              (n, C, h, w), opened as a read-only memory map

An image is found by the SHA-256 of its file's content, so renamed, moved, copied or added images cost nothing or only
themselves, and a killed run repeats at most one shard.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flawsift.errors import ParameterError
from flawsift.features.backbones import Backbone
from flawsift.files import ensure_folder, new_folder, write_json

FORMAT = 1  # of the folder layout above; a change makes old entries invisible
STALE_SECONDS = 24 * 3600  # temporary folders of dead runs older than this are swept
DTYPES: Mapping[str, npt.DTypeLike] = {"float16": np.float16, "float32": np.float32}

Arrays = dict[str, npt.NDArray[Any]]


def default_root() -> Path:
    """`$FLAWSIFT_CACHE`, else `$XDG_CACHE_HOME/flawsift`, else `~/.cache/flawsift`."""
    if named := os.environ.get("FLAWSIFT_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flawsift"


@dataclass(frozen=True)
class Entry:
    """Where one image's features lie."""

    shard: Path
    row: int


@dataclass(eq=False)
class FeatureStore:
    """Frozen features on disk, found by image content.

    Attributes:
        root: The store's folder; made when first written.
        dtype: "float16" halves disk and memory traffic at a relative error of 5e-4; "float32" is exact.
    """

    root: Path = field(default_factory=default_root)
    dtype: str = "float16"

    def __post_init__(self) -> None:
        self.root = Path(self.root)
        if self.dtype not in DTYPES:
            raise ParameterError(f"FeatureStore.dtype must be one of {sorted(DTYPES)}, got '{self.dtype}'.")

    def space(self, backbone: Backbone) -> Path:
        """The folder of a backbone's features."""
        return self.root / f"{backbone.key}-{self.dtype}-v{FORMAT}"

    def index(self, space: Path) -> dict[str, dict[str, Entry]]:
        """{layer: {content digest: entry}} of one backbone's features; damaged shards are passed over."""
        entries_of: dict[str, dict[str, Entry]] = {}
        for path in sorted(space.glob("*/index.json")):
            try:
                content = json.loads(path.read_text())
                for layer, row_of in itertools.product(content["layers"], [content["digests"]]):
                    entries = entries_of.setdefault(layer, {})
                    entries.update((digest, Entry(path.parent, row)) for row, digest in enumerate(row_of))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # `verify` names it; here its images are simply computed again
        return entries_of

    def write(self, backbone: Backbone, digests: Sequence[str], arrays: Arrays) -> Path:
        """Add one shard: {layer: (n, C, h, w)} for n images.

        Raises:
            OutputError: The store cannot be written; no half-written shard is left.
        """
        space = self.space(backbone)
        if not (space / "space.json").exists():
            ensure_folder(space)
            write_json(space / "space.json", {"backbone": backbone.spec, "key": backbone.key, "dtype": self.dtype})
        name = hashlib.sha256(json.dumps([list(digests), sorted(arrays)]).encode()).hexdigest()[:16]
        with new_folder(space / name) as folder:
            layers = {}
            for layer, array in arrays.items():
                np.save(folder / f"{layer}.npy", array, allow_pickle=False)
                layers[layer] = {"shape": list(array.shape[1:]), "sha256": _file_digest(folder / f"{layer}.npy")}
            (folder / "index.json").write_text(json.dumps({"digests": list(digests), "layers": layers}))
        return space / name

    def sweep(self) -> None:
        """Remove temporary folders that dead runs left behind more than a day ago."""
        for left in itertools.chain(self.root.glob("*/.*.tmp"), self.root.glob("*/.*.old")):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)

    def summary(self) -> list[dict[str, Any]]:
        """One row per backbone: key, images, layers, shards, bytes."""
        rows = []
        for space in sorted(p for p in self.root.glob("*") if (p / "space.json").exists()):
            index = self.index(space)
            files = list(space.glob("*/*.npy"))
            digests = set().union(*(entries.keys() for entries in index.values())) if index else set()
            rows.append(
                {
                    "key": space.name,
                    "images": len(digests),
                    "layers": sorted(index),
                    "shards": len({f.parent for f in files}),
                    "bytes": sum(f.stat().st_size for f in files),
                }
            )
        return rows

    def verify(self, *, repair: bool = False) -> list[str]:
        """Recompute every shard's SHA-256.

        Args:
            repair: Remove the damaged shards, so that the next run computes their images again.

        Returns:
            One line per damaged shard: its path and what is wrong.
        """
        problems = []
        for folder in sorted(p for p in self.root.glob("*/*") if p.is_dir() and not p.name.startswith(".")):
            if problem := _shard_problem(folder):
                problems.append(f"{folder}: {problem}")
                if repair:
                    shutil.rmtree(folder, ignore_errors=True)
        return problems

    def clear(self) -> int:
        """Remove every space of this store, and nothing else in its folder. Returns the bytes freed."""
        freed = 0
        for space in [p for p in self.root.glob("*") if (p / "space.json").exists()]:
            freed += sum(f.stat().st_size for f in space.rglob("*") if f.is_file())
            shutil.rmtree(space, ignore_errors=True)
        return freed


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shard_problem(folder: Path) -> str | None:
    try:
        content = json.loads((folder / "index.json").read_text())
        for layer, expected in content["layers"].items():
            if _file_digest(folder / f"{layer}.npy") != expected["sha256"]:
                return f"{layer}.npy does not match its SHA-256"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be read: {error}"
    return None
