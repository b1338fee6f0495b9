"""The feature store: frozen features on disk, so that each image passes the backbone once for any number of detectors.

Below one root folder:

    <space>/                     one per backbone key, number type and format version
      space.json                 what the key stands for
      <shard>/                   up to 64 images, written to a temporary folder and renamed when it is on the disk
        index.json               content digests of the images, per layer its shape and SHA-256
        <layer>.npy              (n, C, h, w)

An image is found by the SHA-256 of its file's content, so renamed, moved, copied or added images cost nothing or only
themselves, and a killed run repeats at most one shard. A shard is called by the SHA-256 of what its index lists, and a
layer is compared with its SHA-256 before a process first uses it (1.2 GB/s; 1000 images of the default layers are
0.14 GB): what does not fit is removed and computed again.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from flawsift.damage import DAMAGE, json_object
from flawsift.errors import InputError, ParameterError
from flawsift.features.backbones import Backbone
from flawsift.files import ensure_folder, new_folder, sweep, write_json

log = logging.getLogger("flawsift")

FORMAT = 1  # of the folder layout above; a change makes old entries invisible
SPACE = re.compile(r"(?P<key>.+)-(?P<dtype>float16|float32)-v\d+")
SHARD_NAME = re.compile(r"[0-9a-f]{16}")
# What says something about the machine or the user's rights, and nothing about the file: never taken for damage.
NOT_DAMAGE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM}
DTYPES: Mapping[str, npt.DTypeLike] = {"float16": np.float16, "float32": np.float32}

Arrays = dict[str, npt.NDArray[Any]]


def default_root() -> Path:
    """`$FLAWSIFT_CACHE`, else `$XDG_CACHE_HOME/flawsift`, else `~/.cache/flawsift`.

    Raises:
        InputError: Neither is set, and this user has no home.
    """
    if named := os.environ.get("FLAWSIFT_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flawsift"
    except RuntimeError as error:  # a container runs as a user that is in no list
        raise InputError(
            "There is no home folder for the feature cache. Name a folder with FLAWSIFT_CACHE or --cache."
        ) from error


@dataclass(frozen=True)
class Entry:
    """Where one image's features lie."""

    shard: Path
    row: int


class ArrayHeader:
    """What an .npy file says of its array, and where the numbers begin.

    Attributes:
        shape: Of the array.
        dtype: Of its numbers.
        offset: Of the first number, in bytes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ValueError(f"version {version} of the npy format")
        self.shape, by_columns, self.dtype = readers[version](file)
        self.offset = file.tell()
        if by_columns:
            raise ValueError("numbers in the order of columns")


@dataclass(frozen=True)
class _Shard:
    """What a shard's index says.

    Attributes:
        folder: Where it lies.
        digests: Content digests of its images, a row each.
        layers: {layer: (shape of one image's features, SHA-256 of the layer's file)}.
    """

    folder: Path
    digests: list[str]
    layers: dict[str, tuple[tuple[int, ...], str]]

    @classmethod
    def read(cls, folder: Path) -> "_Shard":
        """The index of a shard.

        Raises:
            _Damaged: It is missing, cannot be read, or is not what was written.
        """
        with _damage_of("index.json"):
            content = json_object((folder / "index.json").read_bytes())
            digests, layers = content["digests"], content["layers"]
            told = {name: (tuple(layer["shape"]), str(layer["sha256"])) for name, layer in layers.items()}
            if _shard_name(digests, layers) != folder.name:
                raise ValueError("it lists other images or layers than were written")
            return cls(folder, digests, told)

    def check(self, layer: str, *, anew: bool = False) -> None:
        """Compare a layer's file with the index; once per process and file, unless `anew`.

        Raises:
            _Damaged: It is missing, cannot be read, or is not what was written.
        """
        path, (shape, sha256) = self.folder / f"{layer}.npy", self.layers[layer]
        with _damage_of(path.name), path.open("rb") as file:
            state = os.fstat(file.fileno())
            known = (str(path), sha256, state.st_ino, state.st_size, state.st_mtime_ns)
            if known in _checked and not anew:
                return
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise ValueError("it does not match its SHA-256")
            file.seek(0)
            header, space = ArrayHeader(file), SPACE.fullmatch(self.folder.parent.name)
            dtype = np.dtype(space["dtype"]) if space else header.dtype
            if (header.shape, header.dtype) != ((len(self.digests), *shape), dtype):
                raise ValueError(f"it holds {header.dtype} numbers of the shape {header.shape}")
            _checked.add(known)


_checked: set[tuple[str, str, int, int, int]] = set()  # files that this process has compared with their SHA-256


class _Damaged(Exception):
    """A file of a shard is not what was written."""


@contextlib.contextmanager
def _damage_of(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NOT_DAMAGE:
            raise InputError(f"Cached features '{error.filename}' cannot be read: {error.strerror}.") from error
        raise _Damaged(f"{name} cannot be read: {error.strerror}") from error
    except DAMAGE as error:
        raise _Damaged(f"{name} is damaged: {error}") from error


def _shard_name(digests: Sequence[str], layers: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([list(digests), sorted(layers)]).encode()).hexdigest()[:16]


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

    def index(self, space: Path, layers: Sequence[str], digests: Container[str]) -> dict[str, dict[str, Entry]]:
        """Where the features of some images lie, all of them checked; damaged shards are removed, and told of.

        Args:
            space: Of one backbone.
            layers: Exact names.
            digests: Content digests of the images.

        Returns:
            {layer: {content digest: entry}} of what is there.

        Raises:
            InputError: The store cannot be read, for a reason that is not damage, such as too many open files.
        """
        damaged: dict[Path, str] = {}
        shards: list[_Shard] = []
        folders = _shard_folders(space)
        for folder in folders:
            try:
                shards.append(_Shard.read(folder))
            except _Damaged as error:
                damaged[folder] = str(error)
        entries_of: dict[str, dict[str, Entry]] = {layer: {} for layer in layers}
        for shard in shards:
            wanted = {digest: Entry(shard.folder, r) for r, digest in enumerate(shard.digests) if digest in digests}
            there = [layer for layer in layers if layer in shard.layers] if wanted else []
            try:
                for layer in there:
                    shard.check(layer)
            except _Damaged as error:
                damaged[shard.folder] = str(error)
                continue
            for layer in there:
                entries_of[layer] |= wanted
        for folder in damaged:
            shutil.rmtree(folder, ignore_errors=True)  # where that is forbidden it is passed over all the same
        if damaged:
            folder, problem = next(iter(damaged.items()))
            log.warning(
                "%d of the %d shards of the feature cache were damaged, such as '%s' (%s). They were removed; their "
                "images are computed again.",
                len(damaged),
                len(folders),
                folder,
                problem,
            )
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
        path = space / _shard_name(digests, arrays)
        with new_folder(path, keep=True) as folder:  # damaged ones are removed before: it is another run's, and whole
            layers = {}
            for layer, array in arrays.items():
                np.save(folder / f"{layer}.npy", array, allow_pickle=False)
                layers[layer] = {"shape": list(array.shape[1:]), "sha256": _file_digest(folder / f"{layer}.npy")}
            (folder / "index.json").write_text(json.dumps({"digests": list(digests), "layers": layers}), "utf-8")
        return path

    def sweep(self) -> None:
        """Remove temporary folders that dead runs left behind more than a day ago."""
        for space in self._spaces():
            for pattern in (".*.tmp", ".*.old"):  # names of earlier versions among them; the folder is the store's own
                sweep(space, pattern)

    def summary(self) -> list[dict[str, Any]]:
        """One row per backbone: key, images, layers, shards, bytes."""
        rows = []
        for space in self._spaces():
            shards = []
            for folder in _shard_folders(space):
                with contextlib.suppress(_Damaged):  # `verify` names it
                    shards.append(_Shard.read(folder))
            rows.append(
                {
                    "key": space.name,
                    "images": len({digest for shard in shards for digest in shard.digests}),
                    "layers": sorted({layer for shard in shards for layer in shard.layers}),
                    "shards": len(shards),
                    "bytes": sum(f.stat().st_size for f in space.glob("*/*.npy")),
                }
            )
        return rows

    def verify(self, *, repair: bool = False) -> list[str]:
        """Compare every file of every shard with what was written.

        Args:
            repair: Remove the damaged shards, so that the next run computes their images again.

        Returns:
            One line per damaged shard or space: its path and what is wrong.
        """
        problems = []
        for space in self._spaces():
            if problem := self._space_problem(space):
                problems.append(f"{space}: {problem}")
                if repair:
                    told = SPACE.fullmatch(space.name)
                    write_json(space / "space.json", told.groupdict() if told else {})
            for folder in _shard_folders(space):
                try:
                    shard = _Shard.read(folder)
                    for layer in shard.layers:
                        shard.check(layer, anew=True)
                except (_Damaged, InputError) as error:
                    problems.append(f"{folder}: {error}")
                    if repair and isinstance(error, _Damaged):
                        shutil.rmtree(folder, ignore_errors=True)
        return problems

    def clear(self) -> int:
        """Remove every space of this store, and nothing else in its folder. Returns the bytes freed."""
        freed = 0
        for space in self._spaces():
            freed += sum(f.stat().st_size for f in space.rglob("*") if f.is_file())
            shutil.rmtree(space, ignore_errors=True)
        return freed

    def _spaces(self) -> list[Path]:
        """Folders of backbones; others that someone keeps beside them are not the store's."""
        return [path for path in sorted(self.root.glob("*")) if SPACE.fullmatch(path.name) and path.is_dir()]

    def _space_problem(self, space: Path) -> str | None:
        told = SPACE.fullmatch(space.name)
        try:
            with _damage_of("space.json"):
                content = json_object((space / "space.json").read_bytes())
                if told is None or (content["key"], content["dtype"]) != (told["key"], told["dtype"]):
                    raise ValueError("it is of another space")
        except (_Damaged, InputError) as error:
            return str(error)
        return None


def _shard_folders(space: Path) -> list[Path]:
    return [path for path in sorted(space.glob("*")) if SHARD_NAME.fullmatch(path.name) and path.is_dir()]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
