"""Contamination protocols: sizes are met, sides stay apart, draws are nested, and manifests find moved files."""

import json
import math
import os
import random
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from flawsift.data.contamination import contaminate
from flawsift.data.images import ImageSet
from flawsift.data.splits import Split
from flawsift.data.truth import GroundTruth
from flawsift.datasets import load, load_elpv, load_magnetic_tile, write_folder
from flawsift.datasets.synthetic import synthetic
from flawsift.errors import InputError, OutputError, ParameterError, SplitError

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
DATA = Path(os.environ.get("FLAWSIFT_DATA") or SHARED_DATA)

FEW = settings(max_examples=40, deadline=None)


def labelled(n_normal: int, n_anomalous: int, *, first: int = 0, step: int = 1) -> GroundTruth:
    """Normal and anomalous images in turns, under ids that are no positions."""
    n = n_normal + n_anomalous
    labels = np.zeros(n, np.int8)
    labels[np.linspace(0, n - 1, n_anomalous).round().astype(int)] = 1
    types = tuple("scratch" if v else "good" for v in labels)
    return GroundTruth(ids=first + step * np.arange(n), labels=labels, defect_types=types, masks={})


def in_groups(truth: GroundTruth, size: int, seed: int = 0) -> dict[int, str]:
    """Groups of up to `size` images, mixed in class like those of the magnetic tiles; some ids have none."""
    order = np.random.default_rng(seed).permutation(truth.ids)
    return {int(i): f"g{k // size}" for k, i in enumerate(order) if k % 11}


def counts(truth: GroundTruth, ids: Any) -> tuple[int, int]:
    """Numbers of normal and of anomalous images among the ids."""
    labels = truth.select(ids).labels
    return int((labels == 0).sum()), int(labels.sum())


def anomalies(truth: GroundTruth, split: Split) -> set[int]:
    return set(split.train_ids.tolist()) - set(split.oracle_clean_ids(truth).tolist())


def units(groups: dict[int, str], ids: Any) -> set[object]:
    return {groups.get(i, i) for i in ids.tolist()}


# ---- sizes -----------------------------------------------------------------------------------------------------------


@FEW
@given(
    alpha=st.floats(0, 0.4),
    n_train=st.integers(1, 40),
    seed=st.integers(0, 99),
    size=st.integers(1, 6),
    o=st.booleans(),
)
def test_share_is_exact_at_constant_size(alpha: float, n_train: int, seed: int, size: int, o: bool) -> None:
    truth = labelled(90, 60, first=1000, step=3)
    split = contaminate(truth, alpha=alpha, n_train=n_train, seed=seed, overlap=o, groups=in_groups(truth, size))
    n_c, n_a = counts(truth, split.train_ids)
    assert split.n_train == n_c + n_a == n_train
    assert abs(n_a - alpha * n_train) <= 0.5
    assert split.alpha_reached == n_a / n_train
    assert len(np.unique(split.train_ids)) == n_train


@FEW
@given(st.integers(5, 60), st.integers(3, 40), st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_test_sizes_are_exact_without_groups(n: int, a: int, normal: float, anomalous: float, seed: int) -> None:
    truth = labelled(n, a)
    assume(n - math.floor(normal * n + 0.5) > 0)
    split = contaminate(
        truth, alpha=0, n_train=1, seed=seed, test_normal=normal, test_anomalous=anomalous, overlap=False
    )
    got = counts(truth, split.test_ids)
    assert abs(got[0] - normal * n) <= 0.5
    assert abs(got[1] - anomalous * a) <= 0.5
    whole = contaminate(truth, alpha=0, n_train=1, seed=seed, test_normal=got[0], test_anomalous=got[1])
    assert np.array_equal(whole.test_ids, split.test_ids)


@FEW
@given(st.integers(0, 99), st.integers(2, 7))
def test_test_sizes_are_at_most_half_a_group_off(seed: int, size: int) -> None:
    truth = labelled(60, 40)
    ranked = {c: np.flatnonzero(truth.labels == c).tolist() for c in (0, 1)}
    groups = {i: f"{c}-{k // size}" for c in (0, 1) for k, i in enumerate(ranked[c])}
    split = contaminate(truth, alpha=0, n_train=10, seed=seed, groups=groups)
    n, a = counts(truth, split.test_ids)
    assert abs(n - 18) <= size / 2
    assert abs(a - 20) <= size / 2


def test_default_size_is_the_same_for_every_alpha_and_the_largest() -> None:
    truth = labelled(100, 60)  # 70 and 30 beside the test set
    splits = [contaminate(truth, alpha=alpha, seed=1) for alpha in (0, 0.1, 0.25, 0.4)]
    assert [s.n_train for s in splits] == [70, 70, 70, 70]
    assert contaminate(truth, alpha=0.5, seed=1).n_train == 60  # beyond 0.4 the anomalies limit it
    scarce = labelled(100, 20)  # 10 anomalies beside the test set: 10 / 0.4
    assert [contaminate(scarce, alpha=alpha, seed=1).n_train for alpha in (0, 0.4)] == [25, 25]
    assert contaminate(labelled(100, 0), alpha=0, seed=1).n_train == 70


@FEW
@given(st.integers(1, 400), st.integers(0, 40), st.integers(0, 9))
@example(100, 29, 0)  # 0.29 * 100 is 28.999999999999996
def test_additive_keeps_all_normals_and_rounds_down(n: int, percent: int, seed: int) -> None:
    expected = math.floor(Fraction(percent, 100) * n)
    truth = labelled(n, 200)
    split = contaminate(truth, alpha=percent / 100, definition="additive", seed=seed, test_normal=0, test_anomalous=0)
    assert counts(truth, split.train_ids) == (n, expected)
    assert split.alpha_reached == expected / (n + expected)


# MVTec AD: normal training images, anomalies, and n_a at 10 % and 20 %; None if there are not as many
MVTEC: dict[str, tuple[int, int, int, int | None]] = {
    "bottle": (209, 63, 20, 41),
    "grid": (264, 57, 26, 52),
    "hazelnut": (391, 70, 39, None),
    "toothbrush": (60, 30, 6, 12),
    "transistor": (213, 40, 21, None),
    "wood": (247, 60, 24, 49),
}


@pytest.mark.parametrize("category", MVTEC)
def test_published_feasibility(category: str) -> None:
    n, a, *expected = MVTEC[category]
    truth = labelled(n, a)
    for ratio, n_a in zip((0.1, 0.2), expected, strict=True):
        options: dict[str, Any] = {"alpha": ratio, "definition": "additive", "test_normal": 0, "seed": 0}
        if n_a is not None:
            split = contaminate(truth, **options, test_anomalous=0)
            assert counts(truth, split.train_ids) == (n, n_a)
            continue
        needed = int(ratio * n)
        for overlap, tested in ((False, 0), (True, a)):  # not even all of them are enough
            with pytest.raises(SplitError, match=f"needs {n} normal and {needed} anomalous images; {n} and {a} are"):
                contaminate(truth, **options, test_anomalous=tested, overlap=overlap)


def test_too_few_images_are_a_split_error() -> None:
    truth = labelled(20, 10)
    with pytest.raises(SplitError, match="needs 30 normal and 0 anomalous images; 14 and 5 are available"):
        contaminate(truth, alpha=0, n_train=30, seed=0)
    with pytest.raises(SplitError, match="needs 6 normal and 6 anomalous images; 14 and 5"):
        contaminate(truth, alpha=0.5, n_train=12, seed=0)
    with pytest.raises(SplitError, match=r"11 anomalous test images are asked for, 10 are available. Lower test_anom"):
        contaminate(truth, alpha=0, test_anomalous=11, seed=0)
    with pytest.raises(SplitError, match="A training set of 0 images"):
        contaminate(truth, alpha=0, test_normal=1.0, seed=0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": 1.0}, r"alpha must be in \[0, 1\)"),
        ({"alpha": float("nan")}, "alpha must be in"),
        ({"alpha": -0.1, "definition": "additive"}, "alpha must be 0 or larger"),
        ({"definition": "ratio"}, "definition must be 'share' or 'additive', got 'ratio'"),
        ({"definition": "additive", "n_train": 5}, "n_train must be None"),
        ({"n_train": 0}, "n_train must be at least 1"),
        ({"seed": -1}, "seed must be 0 or larger"),
        ({"test_normal": -1}, "test_normal must be 0 or larger"),
        ({"test_anomalous": 1.5}, "test_anomalous must be a whole number or a share"),
    ],
)
def test_parameters_are_checked(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ParameterError, match=expected):
        contaminate(labelled(20, 10), **{"alpha": 0.1, "seed": 0, **options})


# ---- sides -----------------------------------------------------------------------------------------------------------


@FEW
@given(st.floats(0, 0.4), st.integers(0, 99), st.integers(1, 6))
def test_without_overlap_no_group_is_on_both_sides_and_test_groups_are_whole(
    alpha: float, seed: int, size: int
) -> None:
    truth = labelled(90, 60, first=7)
    groups = in_groups(truth, size, seed)
    split = contaminate(truth, alpha=alpha, n_train=30, seed=seed, groups=groups)
    assert not set(split.train_ids.tolist()) & set(split.test_ids.tolist())
    tested = units(groups, split.test_ids)
    assert not units(groups, split.train_ids) & tested
    assert set(split.test_ids.tolist()) == {i for i in truth.ids.tolist() if groups.get(i, i) in tested}


@FEW
@given(st.floats(0.1, 0.4), st.integers(0, 99), st.integers(1, 6))
def test_with_overlap_training_anomalies_are_tested_and_normals_are_not(alpha: float, seed: int, size: int) -> None:
    truth = labelled(90, 60)
    groups = in_groups(truth, size)
    split = contaminate(truth, alpha=alpha, n_train=30, seed=seed, groups=groups, overlap=True)
    hidden = anomalies(truth, split)
    assert hidden
    assert hidden == set(split.train_ids.tolist()) & set(split.test_ids.tolist())
    assert not units(groups, split.oracle_clean_ids(truth)) & units(groups, split.test_ids)


@FEW
@given(st.integers(0, 99), st.integers(1, 6), st.booleans())
def test_at_most_one_group_per_class_is_cut(seed: int, size: int, overlap: bool) -> None:
    truth = labelled(90, 60)
    groups = in_groups(truth, size)
    everything = contaminate(truth, alpha=0, n_train=1, seed=seed, groups=groups).test_ids
    split = contaminate(truth, alpha=0.3, n_train=30, seed=seed, groups=groups, overlap=overlap)
    for label in (0, 1):
        side = np.setdiff1d(truth.ids, everything) if label == 0 or not overlap else everything
        of_class = truth.ids[truth.labels == label]
        used = np.intersect1d(split.train_ids, of_class)
        cut = units(groups, used) & units(groups, np.setdiff1d(np.intersect1d(side, of_class), used))
        assert len(cut) <= 1


def test_official_normal_test_images_are_tested_and_no_others() -> None:
    truth = labelled(50, 20)
    official = truth.ids[truth.labels == 0][:12]
    for overlap in (False, True):
        split = contaminate(
            truth, alpha=0.1, definition="additive", official_test=official, test_anomalous=10, overlap=overlap, seed=4
        )
        tested = truth.select(split.test_ids)
        assert np.array_equal(tested.ids[tested.labels == 0], official)
        assert counts(truth, split.test_ids) == (12, 10)
        assert counts(truth, split.train_ids) == (38, 3)
    # groups of one normal image and three anomalies would bring the number of anomalies closer
    normal, anomalous = (truth.ids[truth.labels == c].tolist() for c in (0, 1))
    mixed = {i: f"g{k // n}" for some, n in ((normal[30:36], 1), (anomalous[:18], 3)) for k, i in enumerate(some)}
    split = contaminate(truth, alpha=0, official_test=official, test_anomalous=5, groups=mixed, seed=4)
    assert counts(truth, split.test_ids) == (12, 2)
    with pytest.raises(InputError, match="unknown ids"):
        contaminate(truth, alpha=0, official_test=[999], seed=4)


def test_group_level_contamination() -> None:
    truth = GroundTruth(
        ids=np.arange(12), labels=np.array([0] * 8 + [1] * 4), defect_types=("good",) * 8 + ("dent",) * 4, masks={}
    )
    groups = {0: "a", 1: "a", 2: "b", 3: "b", 4: "c", 5: "c", 6: "d", 7: "d", 8: "e", 9: "e", 10: "d", 11: "d"}
    options: dict[str, Any] = {"test_normal": 0, "test_anomalous": 0, "seed": 0}
    split = contaminate(truth, alpha=4 / 12, n_train=12, groups=groups, **options)
    assert split.alpha_reached == pytest.approx(4 / 12)
    assert split.alpha_groups == pytest.approx(2 / 5)  # d and e of a to e
    assert contaminate(truth, alpha=4 / 12, n_train=12, **options).alpha_groups == pytest.approx(4 / 12)


# ---- draws -----------------------------------------------------------------------------------------------------------


@FEW
@given(st.lists(st.floats(0, 0.4), min_size=2, max_size=2), st.integers(0, 99), st.integers(1, 6), st.booleans())
def test_draws_are_nested(alphas: list[float], seed: int, size: int, overlap: bool) -> None:
    truth = labelled(90, 60)
    options: dict[str, Any] = {"seed": seed, "groups": in_groups(truth, size), "overlap": overlap}
    low, high = (contaminate(truth, alpha=a, n_train=40, **options) for a in sorted(alphas))
    assert anomalies(truth, low) <= anomalies(truth, high)
    assert set(high.oracle_clean_ids(truth).tolist()) <= set(low.oracle_clean_ids(truth).tolist())


@FEW
@given(st.integers(0, 99), st.integers(1, 6))
def test_the_test_set_depends_on_seed_and_test_sizes_only(seed: int, size: int) -> None:
    truth = labelled(90, 60)
    groups = in_groups(truth, size)
    first = contaminate(truth, alpha=0, seed=seed, groups=groups).test_ids
    variants: list[dict[str, Any]] = [
        {"alpha": 0.4},
        {"alpha": 0.2, "n_train": 10},
        {"alpha": 0.2, "overlap": True},
        {"alpha": 0.1, "definition": "additive"},
    ]
    for options in variants:
        assert np.array_equal(contaminate(truth, seed=seed, groups=groups, **options).test_ids, first)
    assert not np.array_equal(contaminate(truth, alpha=0, seed=seed + 1, groups=groups).test_ids, first)


@FEW
@given(st.integers(0, 99), st.integers(1, 6), st.randoms(use_true_random=False))
def test_order_of_labels_and_names_of_groups_change_nothing(seed: int, size: int, shuffler: random.Random) -> None:
    truth = labelled(60, 40)
    groups = in_groups(truth, size)
    order = truth.ids.tolist()
    shuffler.shuffle(order)
    renamed = {i: f"{g[::-1]}!" for i, g in reversed(groups.items())}
    one = contaminate(truth, alpha=0.2, seed=seed, groups=groups)
    two = contaminate(truth.select(order), alpha=0.2, seed=seed, groups=renamed)
    assert np.array_equal(one.train_ids, two.train_ids)
    assert np.array_equal(one.test_ids, two.test_ids)


def test_global_generators_are_untouched() -> None:
    def state() -> str:
        numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
        return repr((random.getstate(), numpy_state, torch.get_rng_state().tolist()))

    with np.printoptions(threshold=10_000):  # repr shortens arrays otherwise
        before = state()
        contaminate(labelled(30, 20), alpha=0.2, seed=0)
        assert state() == before


# ---- manifests -------------------------------------------------------------------------------------------------------


def same(one: Split, two: Split) -> bool:
    a, b = vars(one), vars(two)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(synthetic(20, 10, size=16), tmp_path / "parts")


@settings(max_examples=10, deadline=None)
@given(st.floats(0, 0.4), st.integers(0, 99), st.booleans())
def test_a_manifest_reads_back(alpha: float, seed: int, overlap: bool) -> None:
    data = synthetic(10, 6, size=16)
    split = contaminate(data.truth, alpha=alpha, seed=seed, overlap=overlap)
    manifest = json.loads(json.dumps(split.to_manifest(data.images), allow_nan=False))
    assert same(Split.from_manifest(manifest, data.images), split)


def test_a_saved_split_finds_a_moved_folder_under_other_ids(folder: Path, tmp_path: Path) -> None:
    data = synthetic(20, 10, size=16)
    split = contaminate(data.truth, alpha=0.2, n_train=10, seed=3)
    split.save(tmp_path / "split.json", ImageSet.from_folder(folder))
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["split.json"]
    assert str(tmp_path) not in (tmp_path / "split.json").read_text()
    moved = shutil.move(folder, tmp_path / "elsewhere")
    images = ImageSet.from_folder(moved)
    assert same(Split.load(tmp_path / "split.json", images), split)
    others = ImageSet.from_files(moved, {1000 - 3 * i: name for i, name in enumerate(images.names)})
    read = Split.load(tmp_path / "split.json", others)
    assert read.train_ids.tolist() == sorted(1000 - 3 * i for i in split.train_ids.tolist())
    assert read.test_ids.tolist() == sorted(1000 - 3 * i for i in split.test_ids.tolist())


def test_changed_and_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    split = contaminate(synthetic(20, 10, size=16).truth, alpha=0.2, n_train=10, seed=3)
    images = ImageSet.from_folder(folder)
    manifest = split.to_manifest(images)
    used = [name for name, _ in manifest["test"]]
    for name in used[:7]:
        (folder / name).write_bytes((folder / name).read_bytes() + b"x")
    with pytest.raises(SplitError, match=f"7 of 21 images have changed .*{used[0]}.*{used[4]} and 2 more") as error:
        Split.from_manifest(manifest, images)
    assert used[5] not in str(error.value)
    for name in used[:7]:
        (folder / name).unlink()
    with pytest.raises(SplitError, match="7 of 21 images have changed"):  # listed, yet gone from the disk
        Split.from_manifest(manifest, images)
    with pytest.raises(SplitError, match=f"7 of 21 images of the split are not in this set: {used[0]}"):
        Split.from_manifest(manifest, ImageSet.from_folder(folder))
    unused = sorted(set(images.names) - set(used) - {name for name, _ in manifest["train"]})
    assert unused  # what the split does not use may change
    (folder / unused[0]).unlink()


def test_what_is_no_manifest_is_refused(folder: Path, tmp_path: Path) -> None:
    images = ImageSet.from_folder(folder)
    good = contaminate(synthetic(20, 10, size=16).truth, alpha=0.2, seed=3).to_manifest(images)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"format": "other"}, "no manifest of a split"),
        ({"version": 2}, "version 2; this flawsift reads 1"),
        ({"train": [1, 2]}, "no list of .* under 'train'"),
        ({"alpha": "much"}, "damaged: ValueError"),
        ({"definition": "ratio"}, "damaged"),
    ]
    for change, expected in changes:
        with pytest.raises(InputError, match=expected):
            Split.from_manifest({**good, **change}, images)
    with pytest.raises(InputError, match="no manifest"):
        Split.from_manifest([], images)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="damaged: KeyError 'seed'"):
        Split.from_manifest({k: v for k, v in good.items() if k != "seed"}, images)
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "absent.json"):
        with pytest.raises(InputError, match=f"{name}' cannot be read"):
            Split.load(tmp_path / name, images)
    split = Split.from_manifest(good, images)
    with pytest.raises(OutputError):
        split.save(tmp_path / "no" / "folder.json", images)


# ---- the benchmark's splits ------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "n_train", "largest", "test_sizes"),
    [
        ("magnetic_tile", 450, 490, (286, 196)),
        ("cookie", 25, 31, (14, 16)),
        ("elpv", 400, 892, (452, 358)),
        ("screw", 140, 147, (108, 60)),
        ("piped/PA_BFT01_TL", 30, 31, (13, 24)),
        ("piped/PA_BRG03_TL", 30, 34, (14, 24)),
    ],
)
def test_real_sets_allow_alpha_up_to_forty_percent(
    name: str, n_train: int, largest: int, test_sizes: tuple[int, int]
) -> None:
    if name == "elpv":
        pytest.importorskip("elpv_dataset", exc_type=ImportError)
        data = load_elpv()
    elif not (DATA / name).is_dir():
        pytest.skip("no real data: set FLAWSIFT_DATA")
    else:
        data = load_magnetic_tile(DATA / name) if name == "magnetic_tile" else load(DATA / name)
    for seed in range(3):
        assert contaminate(data.truth, alpha=0.4, seed=seed, groups=data.images.groups).n_train == largest
        for overlap in (False, True):
            for alpha in (0.0, 0.1, 0.2, 0.4):
                split = contaminate(
                    data.truth, alpha=alpha, n_train=n_train, seed=seed, groups=data.images.groups, overlap=overlap
                )
                assert counts(data.truth, split.test_ids) == test_sizes
                assert counts(data.truth, split.train_ids)[1] == math.floor(alpha * n_train + 0.5)
