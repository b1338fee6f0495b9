"""A split of images into training and test, and its manifest: names and content digests, no labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from flawsift.damage import DAMAGE, parse_json
from flawsift.data.decoding import UnreadableImage
from flawsift.data.images import ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.errors import InputError, SplitError
from flawsift.files import write_json
from flawsift.paths import name_some, show
from flawsift.types import Ids

Definition = Literal["share", "additive", "official"]

FORMAT = "flawsift-split"
VERSION = 1


@dataclass(frozen=True, eq=False)
class Split:
    """Which images train and which test. It holds no labels; `alpha_reached` says how many, not which.

    Attributes:
        train_ids: (T,) global ids, ascending.
        test_ids: (U,) global ids, ascending; the same for every alpha.
        alpha: Contamination asked for: the share n_a / (n_a + n_c), or, if additive, the ratio n_a / n_c.
        alpha_reached: Share of anomalies among the training images, n_a / (n_a + n_c) for either definition.
        alpha_groups: Share of training groups that have an anomaly in training; `alpha_reached` without groups.
        definition: How `alpha` counts; "official" as the publisher of the split counted.
        overlap: Whether training anomalies stay in the test set.
        seed: The seed of all draws.
    """

    train_ids: Ids
    test_ids: Ids
    alpha: float
    alpha_reached: float
    alpha_groups: float
    definition: Definition
    overlap: bool
    seed: int

    @property
    def n_train(self) -> int:
        """Number of training images, T."""
        return len(self.train_ids)

    def oracle_clean_ids(self, truth: GroundTruth) -> Ids:
        """The training ids less the anomalies: what a perfect screening would keep.

        Args:
            truth: Labels of at least the training images.

        Raises:
            InputError: A training image has no label.
        """
        clean: Ids = self.train_ids[truth.select(self.train_ids).labels == 0]
        return clean

    def to_manifest(self, images: ImageSet) -> dict[str, Any]:
        """The split as JSON-ready data that names each image by its relative path and the SHA-256 of its content.

        Args:
            images: The set that the ids belong to.

        Raises:
            InputError: An id is not in `images`, or a file cannot be read.
        """
        used = images.select(np.union1d(self.train_ids, self.test_ids))
        files = {int(i): [n, used.source.digest(int(i))] for i, n in zip(used.ids, used.names, strict=True)}
        return {
            "format": FORMAT,
            "version": VERSION,
            "alpha": self.alpha,
            "alpha_reached": self.alpha_reached,
            "alpha_groups": self.alpha_groups,
            "definition": self.definition,
            "overlap": self.overlap,
            "seed": self.seed,
            "train": [files[i] for i in self.train_ids.tolist()],
            "test": [files[i] for i in self.test_ids.tolist()],
        }

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], images: ImageSet) -> Self:
        """The split on a set that holds the same files, wherever its folder lies and whatever its ids are.

        Args:
            manifest: What `to_manifest` gave.
            images: The set to find the files in, by their relative paths.

        Raises:
            InputError: This is no manifest of a split, or of a newer version.
            SplitError: A file is missing or its content is another one.
        """
        train, test = _files(manifest, "train"), _files(manifest, "test")
        by_name = _check_files({**train, **test}, images)
        try:
            return cls(
                train_ids=np.array(sorted(by_name[n] for n in train), np.int64),
                test_ids=np.array(sorted(by_name[n] for n in test), np.int64),
                alpha=float(manifest["alpha"]),
                alpha_reached=float(manifest["alpha_reached"]),
                alpha_groups=float(manifest["alpha_groups"]),
                definition=_definition(manifest["definition"]),
                overlap=bool(manifest["overlap"]),
                seed=int(manifest["seed"]),
            )
        except DAMAGE as error:
            raise InputError(f"The manifest of a split is damaged: {type(error).__name__} {error}.") from error

    def save(self, path: str | Path, images: ImageSet) -> None:
        """Write the manifest as JSON, in one step.

        Args:
            path: The file.
            images: The set that the ids belong to.

        Raises:
            InputError: An id is not in `images`, or a file cannot be read.
            OutputError: The file cannot be written.
        """
        write_json(Path(path), self.to_manifest(images))

    @classmethod
    def load(cls, path: str | Path, images: ImageSet) -> Self:
        """Read a manifest; see `from_manifest`.

        Args:
            path: The file.
            images: The set to find the files in.

        Raises:
            InputError: The file cannot be read or is no manifest of a split.
            SplitError: An image is missing or its content is another one.
        """
        try:
            manifest = parse_json(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"The split '{show(path)}' cannot be read: {error}") from error
        return cls.from_manifest(manifest, images)


def _definition(value: object) -> Definition:
    for known in get_args(Definition):
        if value == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"unknown definition '{value}'")


def _files(manifest: Mapping[str, Any], side: str) -> dict[str, str]:
    """{name: digest} of one side of a manifest."""
    if not isinstance(manifest, Mapping) or manifest.get("format") != FORMAT:
        raise InputError(f"This is no manifest of a split: its format is not '{FORMAT}'.")
    if manifest.get("version") != VERSION:
        raise InputError(f"The manifest has version {manifest.get('version')}; this flawsift reads {VERSION}.")
    try:
        return {str(name): str(digest) for name, digest in manifest[side]}
    except DAMAGE as error:
        raise InputError(f"The manifest of a split is damaged: no list of [name, sha256] under '{side}'.") from error


def _check_files(files: Mapping[str, str], images: ImageSet) -> dict[str, int]:
    """{name: id in `images`}, once each file is there and unchanged."""
    by_name = {n: int(i) for n, i in zip(images.names, images.ids, strict=True)}
    missing = [n for n in files if n not in by_name]
    if missing:
        raise SplitError(
            f"{len(missing)} of {len(files)} images of the split are not in this set: {name_some(missing)}. "
            "Load the folder that the split was made from."
        )
    changed = [n for n, digest in files.items() if _digest(images, by_name[n]) != digest]
    if changed:
        raise SplitError(
            f"{len(changed)} of {len(files)} images have changed since the split was made: {name_some(changed)}. "
            "Restore them or make a new split."
        )
    return by_name


def _digest(images: ImageSet, id_: int) -> str:
    try:
        return images.source.digest(id_)
    except UnreadableImage:  # gone or locked: not the content that it was
        return ""
