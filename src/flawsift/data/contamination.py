"""Seeded contamination protocols: which images train, which test, and how many anomalies hide in training.

One order of steps makes rows of a benchmark comparable:

1. The test set is drawn first. It depends on the seed and the test sizes only, so it is the same for every `alpha`,
   `n_train`, `definition` and `overlap`.
2. Every remaining image may train. With `overlap` the anomalies of the *test* set may train instead: then a training
   anomaly is always one that is also tested, the recurring identical defect of SoftPatch's protocol.
3. Normal images and anomalies are each put in a random order that depends on the seed only; training takes the first
   of each. So the anomalies at alpha 0.1 are among those at 0.2, and the normals at 0.2 among those at 0.1.

Groups (views of one object, exposures of one part) are drawn whole: no group has images on both sides, and every image
of a test group is tested. The training side may leave images of its groups unused, hence the number of training images
and `alpha` are met exactly, also with groups; only the test sizes may be off, by at most half a group (more if most
groups are mixed). The orders of step 3 run through group after group, so that at most one group per class is cut. A
group with normal and defective images goes to one side like any other. Overlap is the stated exception: anomalies of
test groups train.

The default test sizes leave room for alpha 0 to 0.4 where anomalies are not rare. Reached with them, for every seed
tried:

    set             test normal + anomalous    largest n_train (the default)
    magnetic tile   286 + 196, by group        490
    ELPV            452 + 358                  892
    cookies          14 +  16                   31

Sources: FUIAD of Real-IAD (definition "share": anomalies replace normals, training size constant), Wang et al., CVPR
2024; SoftPatch, Xi et al., NeurIPS 2022, and FUN-AD, Im et al., WACV 2025 ("additive": n_a = int(r n_c)).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from flawsift.data.decoding import UnreadableImage
from flawsift.data.images import ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.errors import InputError, ParameterError, SplitError
from flawsift.files import content_digest, write_json
from flawsift.paths import name_some, show
from flawsift.types import Ids

Definition = Literal["share", "additive", "official"]

MAX_ALPHA = 0.4  # the largest alpha of FUIAD; the default n_train leaves room for it
FORMAT = "flawsift-split"
VERSION = 1
# 0.29 * 100 is 28.999999999999996: without this the floor of a ratio would lose an image to the binary number
_ROUNDING = 1e-9

_TEST, _NORMAL, _ANOMALOUS = range(3)  # random streams of one seed


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
        files = {
            int(i): [n, content_digest(used.source.read(int(i)))] for i, n in zip(used.ids, used.names, strict=True)
        }
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
        except (KeyError, TypeError, ValueError) as error:
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
            manifest = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"The split '{show(path)}' cannot be read: {error}") from error
        return cls.from_manifest(manifest, images)


def contaminate(
    truth: GroundTruth,
    *,
    alpha: float,
    n_train: int | None = None,
    test_normal: int | float = 0.3,
    test_anomalous: int | float = 0.5,
    official_test: npt.ArrayLike | None = None,
    overlap: bool = False,
    definition: Definition = "share",
    groups: Mapping[int, str] | None = None,
    seed: int,
) -> Split:
    """Draw a contaminated training set and a test set; the module says in which order, and what that guarantees.

    Args:
        truth: Labels of the images to divide.
        alpha: With "share" the share of anomalies among the training images, in [0, 1); with "additive" their number
            by that of the normal training images, 0 or larger.
        n_train: Number of training images, the same for every alpha ("share" only). By default the largest that is
            possible for all alpha up to 0.4; it does not depend on alpha up to there.
        test_normal: Normal test images: a whole number counts them, a fraction is a share of all normal images.
        test_anomalous: Anomalous test images, likewise.
        official_test: Ids of an official test set. The test set then has exactly its normal images (and with groups
            the other images of their groups), and `test_normal` is not read.
        overlap: Draw the training anomalies from those of the test set, where they also stay. Otherwise training and
            test are disjoint.
        definition: "share" (training size constant, anomalies replace normal images; their number is rounded) or
            "additive" (all normal images train, anomalies come on top; their number is rounded down).
        groups: {global id: group name} as in `ImageSet.groups`; an id that is not in it is a group of its own.
        seed: Seeds all draws.

    Returns:
        The split, with the contamination that was reached.

    Raises:
        ParameterError: A parameter is out of its range.
        InputError: `official_test` has an id that `truth` has not.
        SplitError: There are too few images; says how many are needed and available.
    """
    _check(alpha, n_train, definition, seed)
    ids = np.sort(truth.ids)  # an order of its own, so that the order of `truth` changes nothing
    anomalous = truth.select(ids).labels == 1
    unit = _units(ids, groups or {})
    fixed = None if official_test is None else np.isin(ids, truth.select(official_test).ids) & ~anomalous
    n_normal = _count("test_normal", test_normal, ~anomalous) if fixed is None else int(fixed.sum())
    goal = np.array([n_normal, _count("test_anomalous", test_anomalous, anomalous)])
    in_test = _draw_test(unit, anomalous, goal, fixed, _stream(seed, _TEST))
    normals = _ordered(np.flatnonzero(~in_test & ~anomalous), unit, _stream(seed, _NORMAL))
    anomalies = _ordered(np.flatnonzero((in_test == overlap) & anomalous), unit, _stream(seed, _ANOMALOUS))
    n_c, n_a = _sizes(alpha, n_train, definition, len(normals), len(anomalies))
    train = np.sort(np.concatenate([normals[:n_c], anomalies[:n_a]]))
    return Split(
        train_ids=ids[train],
        test_ids=ids[in_test],
        alpha=float(alpha),
        alpha_reached=n_a / (n_c + n_a),
        alpha_groups=len(np.unique(unit[anomalies[:n_a]])) / len(np.unique(unit[train])),
        definition=definition,
        overlap=bool(overlap),
        seed=int(seed),
    )


def official(
    truth: GroundTruth,
    train_ids: npt.ArrayLike,
    test_ids: npt.ArrayLike,
    *,
    alpha: float = 0.0,
    groups: Mapping[int, str] | None = None,
) -> Split:
    """The split that a set was published with, checked, and its contamination by images and by groups.

    Args:
        truth: Labels of both sides.
        train_ids: (T,) training images.
        test_ids: (U,) test images.
        alpha: What its publisher calls its contamination. FUIAD counts all views of defective objects, so
            `alpha_reached` is smaller: a defect is not seen in every view.
        groups: {global id: group name} as in `ImageSet.groups`.

    Raises:
        SplitError: A side is empty, or an image or a group is on both.
        InputError: An image has no label.
    """
    train, test = (np.unique(np.asarray(ids, np.int64)) for ids in (train_ids, test_ids))
    if not len(train) or not len(test):
        raise SplitError(f"This set has no official split: {len(train)} training and {len(test)} test images.")
    unit = dict(zip(truth.ids.tolist(), _units(truth.ids, groups or {}).tolist(), strict=True))
    sides = [{unit[i] for i in truth.select(ids).ids.tolist()} for ids in (train, test)]
    if both := sides[0] & sides[1]:
        raise SplitError(f"{len(both)} images or groups of images are on both sides of the official split.")
    anomalous = truth.select(train).labels == 1
    return Split(
        train_ids=train,
        test_ids=test,
        alpha=float(alpha),
        alpha_reached=float(anomalous.mean()),
        alpha_groups=len({unit[i] for i in train[anomalous].tolist()}) / len(sides[0]),
        definition="official",
        overlap=False,
        seed=0,
    )


def _check(alpha: float, n_train: int | None, definition: str, seed: int) -> None:
    if definition not in ("share", "additive"):
        raise ParameterError(f"contaminate.definition must be 'share' or 'additive', got '{definition}'.")
    if definition == "share" and not 0 <= alpha < 1:
        raise ParameterError(f"contaminate.alpha must be in [0, 1) for definition 'share', got {alpha}.")
    if definition == "additive" and not 0 <= alpha < math.inf:
        raise ParameterError(f"contaminate.alpha must be 0 or larger and finite, got {alpha}.")
    if definition == "additive" and n_train is not None:
        raise ParameterError("contaminate.n_train must be None for definition 'additive': all normal images train.")
    if n_train is not None and n_train < 1:
        raise ParameterError(f"contaminate.n_train must be at least 1, got {n_train}.")
    if seed < 0:
        raise ParameterError(f"contaminate.seed must be 0 or larger, got {seed}.")


def _definition(value: object) -> Definition:
    for known in get_args(Definition):
        if value == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"unknown definition '{value}'")


def _stream(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, stream]))


def _units(ids: Ids, groups: Mapping[int, str]) -> Ids:
    """(N,) number of each image's group, counted by first appearance, so that names of groups change nothing."""
    number: dict[str | int, int] = {}
    return np.array([number.setdefault(groups.get(i, i), len(number)) for i in ids.tolist()], dtype=np.int64)


def _count(name: str, size: int | float, available: npt.NDArray[np.bool_]) -> int:
    """A test size as a number of images."""
    total = int(available.sum())
    if isinstance(size, (int, np.integer)) and not isinstance(size, bool):
        if size < 0:
            raise ParameterError(f"contaminate.{name} must be 0 or larger, got {size}.")
        if size > total:
            kind = name.removeprefix("test_")
            raise SplitError(f"{size} {kind} test images are asked for, {total} are available. Lower {name}.")
        return int(size)
    if not 0 <= size <= 1:
        raise ParameterError(f"contaminate.{name} must be a whole number or a share in [0, 1], got {size}.")
    return math.floor(size * total + 0.5)


def _draw_test(
    unit: Ids,
    anomalous: npt.NDArray[np.bool_],
    goal: Ids,
    fixed: npt.NDArray[np.bool_] | None,
    stream: np.random.Generator,
) -> npt.NDArray[np.bool_]:
    """(N,) whether an image is tested; `fixed` images are, then groups in random order.

    The first round takes each group that fits into what is missing, the second one each that brings the sizes closer.
    A group of s images of one class is left after that only if its class is at most s / 2 short, and is taken over the
    mark only by less than s / 2: so both sizes are at most half a group off, and exact without groups.
    """
    n_units = int(unit.max(initial=-1)) + 1
    counts = np.stack([np.bincount(unit[anomalous == c], minlength=n_units) for c in (False, True)], axis=1)
    taken = np.zeros(n_units, np.bool_)
    open_ = np.ones(n_units, np.bool_)
    if fixed is not None:
        taken[unit[fixed]] = True
        open_ = counts[:, 0] == 0  # no further normal image: the official test set says which
    missing = goal - counts[taken].sum(axis=0)
    order = [u for u in stream.permutation(n_units) if open_[u] and not taken[u]]
    for may_overshoot in (False, True):
        for u in order:
            closer = np.abs(missing - counts[u]).sum() < np.abs(missing).sum()
            if not taken[u] and (closer if may_overshoot else (counts[u] <= missing).all()):
                taken[u] = True
                missing = missing - counts[u]
    return taken[unit]


def _ordered(positions: Ids, unit: Ids, stream: np.random.Generator) -> Ids:
    """The positions in random order, group after group."""
    rank = stream.permutation(int(unit.max(initial=-1)) + 1)
    return positions[np.argsort(rank[unit[positions]], kind="stable")]


def _sizes(
    alpha: float, n_train: int | None, definition: Definition, n_normal: int, n_anomalous: int
) -> tuple[int, int]:
    """Numbers of normal and of anomalous training images; `n_normal` and `n_anomalous` are available."""
    if definition == "additive":
        n_c, n_a = n_normal, math.floor(alpha * n_normal + _ROUNDING)
    else:
        room = math.floor(n_anomalous / max(alpha, MAX_ALPHA) + _ROUNDING) if n_anomalous else n_normal
        total = n_train if n_train is not None else min(n_normal, room)
        n_a = math.floor(alpha * total + 0.5)
        n_c = total - n_a
    if n_c > n_normal or n_a > n_anomalous or n_c + n_a == 0:
        raise SplitError(
            f"A training set of {n_c + n_a} images at alpha {alpha} ({definition}) needs {n_c} normal and {n_a} "
            f"anomalous images; {n_normal} and {n_anomalous} are available besides the test set. Lower alpha, n_train "
            "or the test sizes, or allow overlap."
        )
    return n_c, n_a


def _files(manifest: Mapping[str, Any], side: str) -> dict[str, str]:
    """{name: digest} of one side of a manifest."""
    if not isinstance(manifest, Mapping) or manifest.get("format") != FORMAT:
        raise InputError(f"This is no manifest of a split: its format is not '{FORMAT}'.")
    if manifest.get("version") != VERSION:
        raise InputError(f"The manifest has version {manifest.get('version')}; this flawsift reads {VERSION}.")
    try:
        return {str(name): str(digest) for name, digest in manifest[side]}
    except (KeyError, TypeError, ValueError) as error:
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
        return content_digest(images.source.read(id_))
    except UnreadableImage:  # gone or locked: not the content that it was
        return ""
