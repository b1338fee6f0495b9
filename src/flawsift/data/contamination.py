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
    screws          108 +  60                  147
    papers (PIPED)   13 +  24 to 14 + 24        31 to 34

Sources: FUIAD of Real-IAD (definition "share": anomalies replace normals, training size constant), Wang et al., CVPR
2024; SoftPatch, Xi et al., NeurIPS 2022, and FUN-AD, Im et al., WACV 2025 ("additive": n_a = int(r n_c)).
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from flawsift.data.splits import Definition, Split
from flawsift.data.truth import GroundTruth
from flawsift.errors import ParameterError, SplitError
from flawsift.types import Ids

MAX_ALPHA = 0.4  # the largest alpha of FUIAD; the default n_train leaves room for it
# 0.29 * 100 is 28.999999999999996: without this the floor of a ratio would lose an image to the binary number
_ROUNDING = 1e-9

_TEST, _NORMAL, _ANOMALOUS = range(3)  # random streams of one seed


# long: each parameter is a choice of the protocol, and a benchmark's row names it
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
    in_test = _draw_test(unit, anomalous, (test_normal, test_anomalous), fixed, _stream(seed, _TEST))
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
    sizes: tuple[int | float, int | float],
    fixed: npt.NDArray[np.bool_] | None,
    stream: np.random.Generator,
) -> npt.NDArray[np.bool_]:
    """(N,) whether an image is tested; `fixed` normal images are, then groups in random order up to the sizes.

    The first round takes each group that fits into what is missing, the second one each that brings the sizes closer.
    A group of s images of one class is left after that only if its class is at most s / 2 short, and is taken over the
    mark only by less than s / 2: so both sizes are at most half a group off, and exact without groups.
    """
    n_normal = _count("test_normal", sizes[0], ~anomalous) if fixed is None else int(fixed.sum())
    goal = np.array([n_normal, _count("test_anomalous", sizes[1], anomalous)])
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
