"""The diagnosis of the assumption behind learning from contaminated sets."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flawsift.cli.main import main
from flawsift.data.images import ImageSet
from flawsift.data.truth import GroundTruth
from flawsift.datasets.synthetic import synthetic
from flawsift.errors import InputError
from flawsift.features.readers import MemoryFeatures
from flawsift.reports import diagnostics
from flawsift.reports.diagnostics import diagnose, examine, read_labels, write_diagnosis
from flawsift.reports.pairs import ALL, ANOMALY_ANOMALY, NORMAL_ANOMALY, NORMAL_NORMAL, matching, pair_distances
from tests.reports.material import synthetic_setting

TINY = ["--backbone", "tiny", "--size", "64", "--layer", "stride8"]

# channels, normal, anomalous: true-normal, true-anomaly, false ratio, AUROC, mean distances of the three kinds of pairs
TABLE = [
    (2, 1000, 100, 0.586, 0.268, 0.059, 0.757, 1.77, 2.48, 2.93),
    (8, 1000, 100, 0.411, 0.312, 0.005, 0.941, 3.87, 5.43, 6.37),
    (32, 1000, 100, 0.222, 0.200, 0.000, 0.998, 7.91, 11.13, 12.84),
    (128, 1000, 100, 0.163, 0.264, 0.000, 1.000, 15.95, 22.38, 25.90),
    (768, 1000, 100, 0.133, 0.228, 0.000, 1.000, 39.1, 54.8, 63.5),
    (8, 1000, 1000, 0.402, 0.372, 0.018, 0.832, 3.87, 5.46, 6.31),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"d{row[0]}-{row[2]}")
def test_the_synthetic_setting_gives_the_known_ratios_and_distances(row: tuple[Any, ...]) -> None:
    channels, n_normal, n_anomalous, *expected = row
    found = [examine(*synthetic_setting(channels, n_normal, n_anomalous, seed=s), ks=(1,), seed=s) for s in range(5)]
    matches = [f.matching[0] for f in found]
    ratios = np.mean(np.array([[m.true_normal, m.true_anomaly, m.false] for m in matches], float), 0)
    np.testing.assert_allclose(ratios, expected[:3], atol=0.02)
    assert np.mean([f.nearest_auroc for f in found]) == pytest.approx(expected[3], abs=0.02)
    kinds = (NORMAL_NORMAL, ANOMALY_ANOMALY, NORMAL_ANOMALY)
    means = np.mean([[f.distances[kind].mean() for kind in kinds] for f in found], 0)
    # the table's pairs of anomalies include each with itself, 1 in n_anomalous, at distance 0; those here do not
    np.testing.assert_allclose(means * [1, 1 - 1 / n_anomalous, 1], expected[4:], rtol=0.01)
    assert not any(f.warnings for f in found)


@pytest.mark.parametrize("labelled", [True, False])
def test_anomalies_tighter_than_normals_warn(labelled: bool) -> None:
    vectors, labels = synthetic_setting(128, variance=0.5, seed=0)
    found = examine(vectors, labels if labelled else None)
    text = " ".join(found.warnings)
    assert "a defect that recurs" in text
    assert ("vary less than normal" in text) == labelled
    assert ("the wrong way round" in text) == labelled
    assert set(found.recurrence.twins) >= set(range(1000, 1100))
    if labelled:
        assert found.nearest_auroc == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("channels", [2, 8, 32, 128])
@pytest.mark.parametrize(("n_anomalous", "shift"), [(0, 1.5), (100, 1.5), (100, 0.0)])
def test_without_labels_scattered_anomalies_do_not_warn(channels: int, n_anomalous: int, shift: float) -> None:
    vectors, _ = synthetic_setting(channels, 1000, n_anomalous, shift=shift, seed=1)
    assert not examine(vectors).warnings


def test_an_inversion_in_few_channels_needs_labels() -> None:
    vectors, labels = synthetic_setting(2, variance=0.5, seed=0)
    assert not examine(vectors).warnings
    assert examine(vectors, labels).warnings


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_an_offset_changes_nothing(offset: float) -> None:
    vectors, labels = synthetic_setting(32, variance=0.5, seed=0)
    expected, found = examine(vectors, labels), examine(vectors + offset, labels)
    assert len(found.warnings) == 3
    assert found.recurrence.ordinary == pytest.approx(expected.recurrence.ordinary, rel=1e-3)
    assert found.recurrence.twins == expected.recurrence.twins


def features_of(patches: torch.Tensor) -> ImageSet:
    """A set of N images whose one layer is (N, P, C), on a grid of one row."""
    n = len(patches)
    images = ImageSet.from_arrays([np.zeros((2, 2), np.uint8)] * n)
    grids = patches.transpose(1, 2).unsqueeze(2).numpy()
    return ImageSet(
        images.ids, images.source, {}, MemoryFeatures(32, "t", {("", i): i for i in range(n)}, {"a": grids})
    )


def test_masks_tell_which_patches_are_anomalous() -> None:
    patches = torch.randn(12, 16, 8, generator=torch.Generator().manual_seed(1))
    patches[8:, :4] += 20  # the first quarter of each anomalous image
    mask = np.zeros((1, 16), np.uint8)
    mask[0, :4] = 1
    truth = GroundTruth(
        np.arange(12),
        (np.arange(12) >= 8).astype(np.int8),
        ("good",) * 8 + ("hole",) * 4,
        dict.fromkeys(range(8, 12), mask > 0),
    )
    found = diagnose(features_of(patches), "a", truth=truth)
    assert found.counts["anomalous vectors"] == 16
    assert found.counts["vectors"] == 8 * 16 + 16
    assert found.order[f"{NORMAL_NORMAL} < {NORMAL_ANOMALY}"] == 1
    empty = dict.fromkeys(range(8, 12), mask > 1)
    for masks in ({}, empty):  # the worst of each
        unmasked = GroundTruth(truth.ids, truth.labels, truth.defect_types, masks)
        assert diagnose(features_of(patches), "a", truth=unmasked).counts["anomalous vectors"] == 4
    one = GroundTruth(np.arange(12), (np.arange(12) == 3).astype(np.int8), ("good",) * 12, {})
    with pytest.raises(InputError, match="one class has 1"):
        diagnose(features_of(patches), "a", truth=one)


def test_channels_are_standardised_and_matches_told_with_and_without_the_own_image() -> None:
    patches = torch.randn(12, 16, 8, generator=torch.Generator().manual_seed(1))
    patches[:, 1::2] = patches[:, ::2] + 0.01  # in each image all patches have a near copy
    found = diagnose(features_of(patches), "a")
    assert found.matching[0].matched == 1
    assert found.matching_across[0].matched < 0.9
    scaled = diagnose(features_of(patches * torch.logspace(-3, 3, 8) + 5), "a")
    np.testing.assert_allclose(scaled.distances[ALL], found.distances[ALL], rtol=1e-2)


def test_look_alikes_of_one_image_are_no_twins() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, owners = torch.randn(60, 16, generator=generator), torch.arange(60) // 6
    vectors[:5] = 8 + 0.01 * torch.randn(5, 16, generator=generator)
    assert examine(vectors).recurrence.twins == list(range(5))
    assert examine(vectors, owners=owners).recurrence.twins == []


def test_rare_anomalies_are_drawn_from_a_large_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "MAX_IMAGES", 40)
    patches = torch.randn(400, 4, 8, generator=torch.Generator().manual_seed(1))

    def counts(n_anomalous: int, n_images: int = 400) -> dict[str, int]:
        labels = (np.arange(n_images) < n_anomalous).astype(np.int8)
        types = tuple("hole" if x else "good" for x in labels)
        truth = GroundTruth(np.arange(n_images), labels, types, {})
        return dict(diagnose(features_of(patches[:n_images]), "a", truth=truth).counts)

    for n_anomalous, expected in {3: 3, 30: 4, 100: 10, 300: 30, 398: 38}.items():  # 3 of 400 would be none of 40
        found = counts(n_anomalous)
        assert (found["images"], found["anomalous images"]) == (40, expected)
    assert counts(2, 40)["anomalous images"] == 2


def test_the_seed_draws_and_the_global_generator_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "MAX_IMAGES", 20)
    data = features_of(torch.randn(60, 30, 8, generator=torch.Generator().manual_seed(1)))
    found = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            found.append(diagnose(data, "a").as_json())
            assert torch.equal(before, torch.get_rng_state())
    assert found[0] == found[1]
    assert found[0]["counts"]["images"] == 20
    assert diagnose(data, "a", seed=1).as_json() != found[0]


def test_vectors_that_cannot_be_compared_are_told() -> None:
    vectors, labels = synthetic_setting(4, 20, 5, seed=0)
    for some, owners in ((vectors[:0], None), (vectors[:1], None), (vectors, torch.zeros(25, dtype=torch.int64))):
        with pytest.raises(InputError, match="compares vectors of at least 2 images, got [01]"):
            examine(some, owners=owners)
    with pytest.raises(InputError, match="normal and anomalous"):
        examine(vectors, torch.zeros(25, dtype=torch.bool))
    assert examine(vectors, labels.to(torch.int8)).as_json() == examine(vectors, labels).as_json()
    kinds = pair_distances(vectors, labels.to(torch.int8), n=50)
    assert all((kinds[kind] == values).all() for kind, values in pair_distances(vectors, labels, n=50).items())
    assert matching(vectors, labels.to(torch.int8)) == matching(vectors, labels)


def test_identical_images_are_finite(tmp_path: Path) -> None:
    found = diagnose(features_of(torch.ones(5, 4, 3)), "a")
    assert not found.warnings
    assert (found.distances[ALL] == 0).all()
    page = write_diagnosis(found, tmp_path).read_text()
    assert "nan" not in page


def test_a_page_begins_with_what_was_found_and_what_to_do() -> None:
    found = diagnose(features_of(torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(0))), "a")
    page = diagnostics.diagnosis_page(found)
    assert page.index("No sign that defects recur") < page.index("rank the images and train") < page.index("<main>")
    warned = diagnostics.diagnosis_page(replace(found, warnings=("Alike.",), twins=("a.png",)))
    assert (
        warned.index("Alike.") < warned.index("Defects may look like each other") < warned.index("look at the images")
    )


def test_a_page_names_some_of_many_images_and_tells_how_many_more(tmp_path: Path) -> None:
    found = diagnose(features_of(torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(0))), "a")  # the fewest
    for n, more in ((24, None), (25, 1), (40, 16)):
        page = write_diagnosis(replace(found, twins=[f"{i}.png" for i in range(n)]), tmp_path).read_text()
        assert page.count(".png</bdi>") == 24
        assert ("more in diagnostics.json" in page) == (more is not None)
        assert more is None or f"and {more} more in" in page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 good and 8 defective synthetic parts, with labels.csv beside the folder."""
    root = tmp_path_factory.mktemp("diagnose")
    data = synthetic(24, 8, size=64, seed=0)
    (root / "parts").mkdir()
    for i in data.images.ids.tolist():
        picture: Image.Image = data.images.image(i)
        picture.save(root / "parts" / f"part-{i:02d}.png")
    lines = [f"part-{i:02d}.png,{label}" for i, label in enumerate(data.truth.labels.tolist())]
    (root / "labels.csv").write_text("file,label\n" + "\n".join(lines[:30]) + "\n")
    return root


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["diagnose", *(str(a) for a in arguments)])
    return int(stop.value.code or 0)


@pytest.mark.parametrize("labelled", [True, False])
def test_the_command(labelled: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["--labels", folder / "labels.csv"] if labelled else []
    assert command(folder / "parts", "--out", tmp_path, *TINY, *labels, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "diagnostics.json").read_text())
    assert printed["warnings"] == written["warnings"] == []
    assert printed["counts"]["images"] == (30 if labelled else 32)
    assert printed["counts"]["unlabelled"] == (2 if labelled else 0)
    kinds = {NORMAL_NORMAL, NORMAL_ANOMALY, ANOMALY_ANOMALY} if labelled else {ALL}
    assert set(written["distances"]) == kinds
    edges = np.array(written["histogram"]["edges"])
    for kind in kinds:
        assert (np.diff(edges) * written["histogram"][kind]).sum() == pytest.approx(1)
    assert [m["k"] for m in written["matching"]] == list(diagnostics.KS)
    assert (written["nearest_auroc"] is not None) == labelled
    page = (tmp_path / "diagnose.html").read_text()
    assert page.count("<polyline") == 2 * len(kinds)
    assert all(text not in page for text in ("http://", "https://", "<script"))


def test_a_recurring_defect_in_a_folder_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "parts").mkdir()
    for path in sorted((folder / "parts").iterdir())[:24]:
        picture = Image.open(path).convert("RGB")
        if path.name < "part-06.png":
            picture.paste((255, 0, 255), (16, 24, 40, 48))  # one stain, always the same
        picture.save(tmp_path / "parts" / path.name)
    assert command(tmp_path / "parts", "--out", tmp_path / "out", *TINY) == 0
    assert "a defect that recurs, perhaps" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "diagnostics.json").read_text())
    assert {f"part-{i:02d}.png" for i in range(6)} <= set(found["recurrence"]["twins"])
    assert "part-03.png" in (tmp_path / "out" / "diagnose.html").read_text()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot be read"),
        ("", "is empty"),
        ("file,kind\npart-00.png,1\n", "needs the columns 'file' and 'label', has file, kind"),
        ("file,label\npart-00.png,good\n", "must be 0 or 1, got good"),
        ("file,label\npart-00.png\n", "must be 0 or 1"),
        ("file,label\npart-00.png,1\npart-01.png,0\npart-00.png,0\n", "1 files have two labels in"),
        ("label,file\n1\n0,part-77.png\n0,part-01.png\n", "2 labelled files are not among the images: , part-77"),
        ("file,label\npart-77.png,1\npart-00.png,0\n", "images: part-77.png. Write paths in '"),
        ("file,label\n" + "".join(f"part-{i:02d}.png,0\n" for i in range(9)), "at least 2 normal and 2 anomalous"),
        ("file,label\npart-00.png,0\n", "at least 4 images, got 1"),
    ],
)
def test_bad_labels_are_told(
    content: str | None, text: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.csv"
    if content is not None:
        labels.write_text(content)
    assert command(folder / "parts", "--out", tmp_path / "out", *TINY, "--labels", labels, "--quiet") == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_one_image_and_unknown_layers_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes((folder / "parts" / "part-00.png").read_bytes())
    assert command(tmp_path / "one", "--out", tmp_path / "out", *TINY) == 2
    assert "at least 4 images, got 1" in capsys.readouterr().err
    assert command(folder / "parts", "--out", tmp_path / "out", *TINY, "--layer", "stride9") == 2
    assert "Unknown layer" in capsys.readouterr().err


def test_labels_may_be_given_by_path_column(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("path,label\npart-03.png,1\npart-01.png,0\n")
    truth = read_labels(tmp_path / "l.csv", ImageSet.from_folder(folder / "parts"))
    assert (truth.ids.tolist(), truth.labels.tolist()) == ([3, 1], [1, 0])
    with pytest.raises(InputError, match="cannot be read"):
        read_labels(tmp_path, ImageSet.from_folder(folder / "parts"))
