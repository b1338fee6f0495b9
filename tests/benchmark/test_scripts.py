"""Rows survive their CSV file, tables say what the rows say, and the committed tables are up to date."""

import importlib
import json
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flawsift.data.contamination import contaminate
from flawsift.datasets import CATEGORIES
from flawsift.datasets.folder import DATA_VARIABLE
from flawsift.detectors.registry import make_detector

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmarks are not in the source distribution")

SHARED_DATA = BENCHMARKS.parents[1] / "shared" / "data"
SETS = ("magnetic_tile", "screw", "elpv", "cookie", *(f"piped/{paper}" for paper in CATEGORIES["piped"]))
MACHINE = json.dumps({"cpu": "A CPU", "cores": 2, "gib": 8, "os": "Linux"})


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("_rows")


@pytest.fixture
def render(rows: Any) -> Any:
    return importlib.import_module("render")


@pytest.fixture
def accuracy(rows: Any) -> Any:
    return importlib.import_module("accuracy")


@pytest.fixture
def tables(rows: Any) -> Any:
    return importlib.import_module("_tables")


def cell(seed: int, auroc: float | None, commit: str = "new", arm: str = "default") -> dict[str, Any]:
    where = {"commit": commit, "machine": MACHINE, "data": "elpv", "detector": "patchcore", "alpha": 0.2}
    return {**where, "seed": seed, "arm": arm, "image_auroc": auroc}


def test_rows_round_trip_and_new_columns_come_last(rows: Any, tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.csv"
    rows.append_rows(path, [{"a": 1, "b": None, "c": {"k": 'say "hi", twice\n'}}])
    rows.append_rows(path, [{"d": 0.123456789, "a": 2}])
    first, second = rows.read_rows(path)
    assert path.read_text().splitlines()[0] == "a,b,c,d"
    assert (first["a"], first["b"], json.loads(first["c"]), first["d"]) == ("1", "", {"k": 'say "hi", twice\n'}, "")
    assert (second["a"], second["c"], second["d"]) == ("2", "", "0.123457")


def test_machine_names_no_host(rows: Any) -> None:
    assert set(rows.machine()) == {"cpu", "cores", "gib", "os"}


def test_mean_and_sd_of_the_newest_commit_and_last_row_of_a_seed(rows: Any, tables: Any, tmp_path: Path) -> None:
    old = [cell(s, 0.1, commit="old") for s in (0, 1, 2)]
    rows.append_rows(tmp_path / "accuracy.csv", [*old, cell(0, 0.5), cell(0, 0.7), cell(1, 0.8), cell(2, 0.9)])
    text = tables.accuracy(tmp_path, "patchcore", "image_auroc")
    assert "| elpv | 20% | - | - | 0.800 ± 0.100 | - |" in text
    assert "Commit `new`; A CPU, 2 cores, 8 GiB, Linux; 3 seeds." in text


def test_hits_stand_below_aupro_where_rows_have_them(rows: Any, render: Any, tables: Any, tmp_path: Path) -> None:
    rows.append_rows(tmp_path / "accuracy.csv", [{**cell(0, 0.9, arm="all_data"), "aupro": 0.8}])
    old = render.TABLES["detectors-aupro"](tmp_path)
    assert "0.800" in old
    assert "Hits" not in old
    new = {**cell(0, 0.9, commit="newer", arm="all_data"), "aupro": 0.7, "pixel_ap": 0.25, "hits_per_100": 40.0}
    rows.append_rows(tmp_path / "accuracy.csv", [new])
    text = render.TABLES["detectors-aupro"](tmp_path)
    assert [part in text.partition("Hits")[2] for part in ("0.400", "0.700", "0.250")] == [True, False, False]
    assert text.index("0.700") < text.index("0.250") < text.index("0.400")


def test_rivals_are_compared_on_the_same_sets_and_seeds(rows: Any, tables: Any, tmp_path: Path) -> None:
    values = {"quorum": (0.9, 0.8), "softpatch": (0.7, 0.5), "inreach": (0.9, 0.7), "funad": (0.6, 0.6)}
    for name, aurocs in values.items():
        arm = "default" if name == "quorum" else "all_data"
        mine = [{**cell(seed, v, arm=arm), "detector": name} for seed, v in enumerate(aurocs)]
        if name == "softpatch":
            mine.append({**mine[0], "seed": 2, "image_auroc": 0.1})  # a seed that the others lack
        rows.append_rows(tmp_path / "accuracy.csv", mine)
        rows.append_rows(tmp_path / "confirmation" / "accuracy.csv", [{**m, "seed": m["seed"] + 3} for m in mine[:1]])
    text = tables.rivals(tmp_path, "image_auroc")
    assert "| 0 to 1, 1 set | 20% | **0.850** | 0.600 | 0.800 | 0.600 |" in text
    assert "| 3 to 3, 1 set | 20% | **0.900** | 0.700 | **0.900** | 0.600 |" in text
    assert tables.rivals(tmp_path, "aupro") is None


def test_an_ablation_takes_the_seeds_that_all_variants_have(rows: Any, tables: Any, tmp_path: Path) -> None:
    values = {"all data": 0.7, "some cut": 0.75, "oracle": 0.9}
    early = [{**cell(seed, v + seed / 100), "variant": name} for seed in (0, 1) for name, v in values.items()]
    early[1]["image_auroc"] += 0.1  # of a seed that another variant lacks
    later = [{**cell(seed, 0.8, commit="newer"), "variant": "another cut"} for seed in (1, 2)]
    rows.append_rows(tmp_path / "ablation.csv", [*early, *later])
    text = tables.ablation(tmp_path)
    assert "| some cut | +5.0 | +5.0 | 25% |" in text
    assert "| another cut | +9.0 | +9.0 | 45% |" in text


def test_decisions_are_measured_against_the_oracle(rows: Any, tables: Any, tmp_path: Path) -> None:
    arms = {"all_data": 0.7, "default": 0.75, "decided": 0.78, "oracle_clean": 0.8}
    for seed in (0, 1):
        mine = [{**cell(seed, v, arm=arm), "n_removed": 6 + 2 * seed, "n_decisions": 10} for arm, v in arms.items()]
        rows.append_rows(tmp_path / "decisions.csv", mine)
    rows.append_rows(tmp_path / "decisions.csv", [{**m, "n_decisions": 3, "image_auroc": 0.1} for m in mine])
    text = tables.decisions(tmp_path, "patchcore")
    assert "| elpv | 20% | 7.0 ± 1.4 | 0.700 ± 0.000 | 0.750 ± 0.000 | 0.780 ± 0.000 | 0.800 ± 0.000 |" in text
    assert "| recovery |  |  | 0% | 50% | 80% | 100% |" in text
    assert "| worst contaminated cell, points |  |  | +0.0 | +5.0 | +8.0 | +10.0 |" in text
    assert tables.decisions(tmp_path, "quorum") is None


def test_quorum_is_compared_on_the_sets_and_seeds_that_all_have(rows: Any, tables: Any, tmp_path: Path) -> None:
    aurocs = {"patchcore": (0.7, 0.75, 0.9), "softpatch": (0.8, 0.78, 0.85), "quorum": (0.84, 0.86, 0.9)}
    arms = ("all_data", "default", "oracle_clean")
    for name, values in aurocs.items():
        some = [{**cell(s, v, arm=arm), "detector": name} for s in (0, 1) for arm, v in zip(arms, values, strict=True)]
        rows.append_rows(tmp_path / "accuracy.csv", some)
    rows.append_rows(tmp_path / "accuracy.csv", [cell(2, 0.1, arm=arm) for arm in arms])  # PatchCore alone has it
    rows.append_rows(tmp_path / "accuracy.csv", [{**cell(0, 0.2), "detector": "inreach"}])  # one seed only
    text = tables.quorum(tmp_path, "image_auroc", ["screw", "elpv"])
    shown = "0.700 ± 0.000 | 0.800 ± 0.000 | 0.860 ± 0.000 | 0.900 ± 0.000"
    assert f"| elpv | 20% | {shown} |" in text
    assert "| mean of sets | 20% | 0.700 | 0.800 | 0.860 | 0.900 |" in text
    assert "| worst cell, points to PatchCore |  | +0.0 | +10.0 | +16.0 | +20.0 |" in text
    assert "InReaCh" not in text
    assert tables.quorum(tmp_path, "image_auroc", ["screw"]) is None
    assert "| 1, those that choices were made on | 20% | 0.700 | 0.800 | **0.860** | 0.900 |" in tables.headline(
        tmp_path
    )


def test_sizes_of_the_input_stand_beside_each_other(rows: Any, tables: Any, tmp_path: Path) -> None:
    name = "efficientnet_lite0-0123-{}-openvino-89"
    for size, auroc in ((256, 0.8), (384, 0.9)):
        extra = {"detector": "quorum", "backbone": name.format(size), "aupro": 0.5, "stage1_auroc": 0.7}
        rows.append_rows(tmp_path / "accuracy.csv", [{**cell(s, auroc, arm="default"), **extra} for s in (0, 1)])
    text = tables.sizes(tmp_path, "quorum")
    assert "| elpv | 256 | 20% | 0.800 ± 0.000 | 0.500 ± 0.000 | 0.700 ± 0.000 |" in text
    assert "| elpv | 384 | 20% | 0.900 ± 0.000 | 0.500 ± 0.000 | 0.700 ± 0.000 |" in text
    ranked = tables.ranked(tmp_path, "quorum", ["elpv"])
    assert "| elpv | 0.700 ± 0.000 |" in ranked
    assert "384" not in ranked
    assert tables.sizes(tmp_path, "padim") is None


def test_squeezed_images_stand_beside_those_that_are_fitted_in(rows: Any, tables: Any, tmp_path: Path) -> None:
    name = "efficientnet_lite0-0123-{}-openvino-89"
    for shape, auroc in (("256", 0.8), ("320x208", 0.9), ("384", 0.1)):
        extra = {
            "detector": "quorum",
            "backbone": name.format(shape),
            "aupro": 0.5,
            "hits_per_100": 75.0,
            "pixel_ap": 0.4,
        }
        rows.append_rows(tmp_path / "accuracy.csv", [{**cell(s, auroc, arm="default"), **extra} for s in (0, 1)])
    text = tables.framed(tmp_path, "quorum")
    rest = "0.500 ± 0.000 | 0.400 ± 0.000 | 0.750 ± 0.000 |"
    assert f"| elpv | 20% | squeezed, 256 x 256 | 0.800 ± 0.000 | {rest}" in text
    assert f"| elpv | 20% | fitted in, 320x208 | 0.900 ± 0.000 | {rest}" in text
    assert "384" not in text
    assert tables.framed(tmp_path, "padim") is None


def test_aligned_parts_stand_beside_those_as_they_are(rows: Any, tables: Any, tmp_path: Path) -> None:
    assert tables.aligned(tmp_path) is None
    for position, auroc in (("as they are", 0.8), ("aligned", 0.9)):
        extra = {"position": position, "edge": 256, "aupro": 0.5, "pixel_ap": 0.4}
        rows.append_rows(tmp_path / "align.csv", [{**cell(s, auroc, arm="all_data"), **extra} for s in (0, 1)])
    text = tables.aligned(tmp_path)
    for position, auroc in (("as they are", 0.8), ("aligned", 0.9)):
        assert (
            f"| patchcore | 256 x 256 | {position} | 20% | {auroc:.3f} ± 0.000 | 0.500 ± 0.000 | 0.400 ± 0.000 |"
            in text
        )


def test_the_cost_of_tiles_by_the_megapixel(rows: Any, render: Any, tmp_path: Path) -> None:
    common = {"commit": "new", "machine": MACHINE, "height": 3072, "width": 4096}
    whole = {**common, "mode": "shrunk to 256", "looked_at": 0.049, "seconds": 0.1, "peak_mb": 1234}
    cut = {**common, "mode": "in tiles", "tiles": "1024:256", "looked_at": 12.58, "seconds": 15.0, "peak_mb": 900}
    cut |= {"cpu_seconds": 25.16, "cpu_per_megapixel": 2.0}
    rows.append_rows(tmp_path / "tiles.csv", [{**cut, "commit": "old", "seconds": 99}, whole, cut])
    text = render.tiles(tmp_path)
    assert "| 4096 x 3072 | in tiles of 1024 that share 256 | 12.58 | 15.00 | 25.16 | 2.00 | 900 |" in text
    assert "| 4096 x 3072 | shrunk to 256 | 0.05 |" in text
    rows.append_rows(tmp_path / "tiles.csv", [{**cut, "tiles": None, "height": 9}])
    assert "| 4096 x 9 | in tiles, of which one holds it |" in render.tiles(tmp_path)
    assert "99" not in text
    assert render.tiles(tmp_path / "none") is None


def test_tiles_are_measured_as_they_are_cut(rows: Any) -> None:
    script = importlib.import_module("tiles")
    shrunk, tiled, piece = (script.child(mode, 160, 1088, 1) for mode in (script.SHRUNK, script.TILED, script.PIECE))
    assert shrunk["looked_at"] == 256 * 38 / 1e6
    assert [one["tiles"] for one in (shrunk, tiled, piece)] == [None, "1024:256", None]
    assert tiled["cpu_per_megapixel"] == pytest.approx(tiled["cpu_seconds"] / tiled["looked_at"])


def test_render_fills_markers_and_keeps_what_has_no_rows(rows: Any, render: Any, tmp_path: Path) -> None:
    rows.append_rows(tmp_path / "accuracy.csv", [cell(0, 0.75)])
    page = "a\n<!-- rows:accuracy -->\nold\n<!-- /rows -->\nb\n<!-- rows:speed -->\nkept\n<!-- /rows -->\n"
    once = render.render(page, tmp_path)
    assert "old" not in once
    assert "| 0.750 |" in once
    assert "\nkept\n" in once
    assert render.render(once, tmp_path) == once


def test_unknown_table_is_told(render: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="Unknown table 'speeed'"):
        render.render("<!-- rows:speeed -->\n<!-- /rows -->", tmp_path)


def test_committed_tables_are_up_to_date(render: Any) -> None:
    assert render.main(["--check"]) == 0, "run: python benchmarks/render.py"


def test_choices_are_made_and_confirmed_on_sets_of_their_own(accuracy: Any) -> None:
    assert sorted((*accuracy.DEVELOPMENT, *accuracy.CONFIRMATION)) == sorted(accuracy.SIZES) == sorted(SETS)


def test_a_set_has_the_name_that_it_is_asked_for_by(
    accuracy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    paper = "piped/PA_BRG01_RL"
    for name in ("cookie", paper):
        for file in ("normal/0", "normal/1", "defect/spot/2", "defect/spot/3", "mask/spot/3"):
            path = tmp_path / name / f"{file}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 3), 255).save(path)
        data = accuracy.load_set(name)
        assert (data.name, data.images.ids.tolist()) == (name, [0, 1, 3])  # less the one without a mask
    assert accuracy.load_set("piped/PA_BFT01_TL") is None
    assert "piped/PA_BFT01_TL is skipped" in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.parametrize("name", SETS)
def test_every_contamination_can_be_drawn_of_every_set(
    accuracy: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "elpv":
        pytest.importorskip("elpv_dataset", exc_type=ImportError)
    monkeypatch.setenv(DATA_VARIABLE, os.environ.get(DATA_VARIABLE) or str(SHARED_DATA))
    data = accuracy.load_set(name)
    if data is None:
        pytest.skip("no real data: set FLAWSIFT_DATA")
    for seed in range(6):
        draw = partial(contaminate, data.truth, seed=seed, groups=data.images.groups, **accuracy.SIZES[name])
        splits = [draw(alpha=alpha) for alpha in accuracy.ALPHAS]
        assert len({split.n_train for split in splits}) == 1
        for split in splits:
            assert split.alpha_reached == pytest.approx(split.alpha, abs=0.5 / split.n_train)
            tested = data.truth.select(split.test_ids).labels
            assert 0 < tested.mean() < 1


@pytest.mark.parametrize("name", ["dinomaly", "rd"])
def test_batched_training_takes_the_steps_of_single_ones(rows: Any, name: str) -> None:
    training = importlib.import_module("training")
    params: dict[str, Any] = {"n_blocks": 2, "width": 8, "dropout": 0.0} if name == "dinomaly" else {}
    shapes = [(3, 4), (4, 2)] if name == "dinomaly" else [(3, 8), (4, 4), (5, 2)]
    make = training.network_of(make_detector(name, **params), [channels for channels, _ in shapes])
    together, in_turn = training.trainings(make, shapes, n_models=2, batch=3)
    losses = [(together(), in_turn()) for _ in range(3)]
    for batched, single in losses:
        torch.testing.assert_close(batched, single, rtol=1e-3, atol=1e-4)
    assert (losses[-1][0] != losses[0][0]).all(), "the steps change nothing"


NUMBERS = ("alpha", "seed", "image_auroc", "peak_mb", "seconds_stage1", "stage1_auroc", "alpha_hat")


def test_committed_rows_have_numbers_where_tables_read_them(rows: Any) -> None:
    for path in sorted((BENCHMARKS / "results").rglob("*.csv")):
        for row in rows.read_rows(path):
            bad = [name for name in NUMBERS if row.get(name) and not re.fullmatch(r"-?[\d.]+(e-?\d+)?", row[name])]
            assert not bad, f"{path.name}: {bad} of {row}"


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("[!_]*.py")))
def test_every_script_starts(
    rows: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main()
    assert not stop.value.code
    assert capsys.readouterr().out.startswith(f"usage: {name}.py")
