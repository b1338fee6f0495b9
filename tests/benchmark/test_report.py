"""Tables, curves and prices say what the rows say."""

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flawsift import files
from flawsift.benchmark import rows as benchmark_rows
from flawsift.benchmark.config import parse_config, read_config
from flawsift.benchmark.curves import kept_curves
from flawsift.benchmark.grid import plan
from flawsift.benchmark.report import examples, failures, prices, write_benchmark_report
from flawsift.benchmark.rows import append_rows, peak_mb, read_rows
from flawsift.benchmark.runner import run
from flawsift.benchmark.tables import (
    Figure,
    Metric,
    TableCell,
    figure,
    latex,
    markdown,
    measured_tables,
    newest,
    quoted_tables,
    ranked,
)
from flawsift.errors import InputError


def row(**changes: Any) -> dict[str, str]:
    base = {
        "commit": "abc",
        "machine": '{"cpu": "A & B", "cores": 2, "gib": 8, "os": "Linux"}',
        "versions": '{"flawsift": "0.1.0"}',
        "data": "tiles",
        "category": "",
        "detector": "PaDiM",
        "method": "padim",
        "alpha": 0.2,
        "protocol": "no_overlap",
        "n_subsets": "",
        "seed": 0,
        "preset": "paper",
        "image_auroc": 0.9,
        "aupro": 0.8,
        "n_train": 100,
        "n_test": 50,
        "alpha_reached": 0.2,
        "kept_normal": 40,
        "kept_anomalous": 5,
        "alone_normal": 32,
        "alone_anomalous": 13,
        "seconds_stage1": 3,
        "seconds_stage2": 1.5,
        "seconds_evaluate": 0.5,
        "model_bytes": 2_500_000,
        "peak_mb": 700,
        "key": "k",
        "error": "",
    }
    return {k: str(v) for k, v in {**base, **changes}.items()}


def test_means_over_categories_first_then_over_seeds() -> None:
    rows = [
        row(category="a", seed=0, image_auroc=0.8),
        row(category="b", seed=0, image_auroc=1.0),
        row(category="a", seed=1, image_auroc=0.6),
        row(category="b", seed=1, image_auroc=0.8),
    ]
    both = figure(rows, Metric("image_auroc"))
    assert both is not None
    assert both.mean == pytest.approx(0.8)
    assert both.sd == pytest.approx(0.1 * 2**0.5)
    assert (both.n_seeds, both.complete) == (2, True)
    assert both.text() == "0.800 ± 0.141"
    part = figure(rows[:3], Metric("image_auroc"))
    assert part is not None
    assert not part.complete  # seed 1 lacks a category: its mean is of others
    assert part.text().endswith("†")
    assert figure([row(aupro="")], Metric("aupro")) is None
    one = figure(rows[:1], Metric("image_auroc"), rows)
    assert one is not None
    assert not one.complete  # others have a second category and a second seed


def test_best_and_second_by_metric_and_ties_share() -> None:
    def cell(auroc: float, aupro: float | None) -> TableCell:
        return TableCell(Figure(auroc, None, 1, True), None if aupro is None else Figure(aupro, None, 1, True))

    cells = ranked([cell(0.9, 0.5), cell(0.8, None), cell(0.9, 0.7), cell(0.7, 0.6)])
    assert [c.first_place for c in cells] == [1, 2, 1, 0]
    assert [c.second_place for c in cells] == [0, 0, 1, 2]
    assert [c.first_place for c in ranked([cell(0.9, 0.5)])] == [0]  # nobody to beat


def test_a_table_of_two_methods_in_markdown_and_latex() -> None:
    rows = [row(), row(seed=1, image_auroc=0.8), row(detector="A_B", method="rd", image_auroc=0.95, aupro=0.7)]
    rows += [row(preset="none", image_auroc=0.5, aupro="")]
    (table,) = measured_tables(rows)
    assert table.title == "Image AUROC / AUPRO, no overlap"
    text = markdown(table)
    # the second method lacks a seed that the first has
    assert "| tiles | 20% | paper | <u>0.850 ± 0.071</u> / **0.800 ± 0.000** | **0.950 †** / <u>0.700 †</u> |" in text
    assert "| tiles | 20% | no screening | 0.500 / - | - |" in text
    text = latex(table)
    assert r"tiles & 20\% & paper & \underline{0.850 $\pm$ 0.071} / \textbf{0.800 $\pm$ 0.000}" in text
    assert r"A\_B" in text
    assert text.count("{") == text.count("}")


def test_hits_have_a_table_where_rows_have_them() -> None:
    old = row(data="before")  # of a version that did not measure them
    rows = [old, row(pixel_ap=0.4, hits_per_100=75), row(detector="B", pixel_ap=0.5, hits_per_100="")]
    measured, located = measured_tables(rows)
    assert "| before | 20% | paper | 0.900 / 0.800 | - |" in markdown(measured)
    assert located.title == "Pixel AP / hits, no overlap"
    assert "| tiles | 20% | paper | <u>0.400</u> / 0.750 | **0.500** / - |" in markdown(located)
    assert "before" not in markdown(located)
    assert len(measured_tables([old])) == 1


def test_marks_of_tables_in_names_are_text() -> None:
    name = r"a|b\c{d}~e^f&g"
    (table,) = measured_tables([row(data=name)])
    assert r"| a\|b\c{d}~e^f&g | 20% |" in markdown(table)
    escaped = r"a|b\textbackslash{}c\{d\}\textasciitilde{}e\textasciicircum{}f\&g & 20\% & paper"
    assert escaped in latex(table)


def test_protocols_and_k_have_tables_of_their_own() -> None:
    rows = [row(), row(protocol="overlap"), row(n_subsets=3)]
    assert [t.title.split(", ", 1)[1] for t in measured_tables(rows)] == ["no overlap", "overlap", "no overlap, k = 3"]


def test_quoted_figures_stand_beside_ours_and_are_not_ranked() -> None:
    rows = [row(data="realiad", protocol="official", detector=d, method=m) for d, m in (("Mine", "rd"), ("X", "padim"))]
    (table,) = measured_tables(rows)
    _, quoted = table.lines
    assert quoted.quoted
    assert quoted.cells[0].first == Figure(0.873, None, 1, True)  # RD at 20 %
    assert quoted.cells[1].second == Figure(0.865, None, 1, True)  # PaDiM
    assert {c.first_place for c in quoted.cells} == {0}
    assert "| realiad | 20% | quoted | 0.873 / 0.949 | 0.801 / 0.865 |" in markdown(table)
    assert not any(line.quoted for line in measured_tables([row(data="realiad")])[0].lines)  # another protocol


def test_the_papers_own_figures_are_shipped() -> None:
    fuiad, mvtec = quoted_tables()
    assert [line.alpha for line in fuiad.lines] == [0.0, 0.1, 0.2, 0.4]
    column = next(i for i, m in enumerate(fuiad.methods) if m.startswith("LLBNAD"))
    figures = [(line.cells[column].first, line.cells[column].second) for line in fuiad.lines]
    assert [(a.mean, p.mean) for a, p in figures if a and p] == [
        (0.934, 0.959),
        (0.915, 0.958),
        (0.898, 0.956),
        (0.87, 0.948),
    ]
    assert len(fuiad.methods) == 9
    assert "not measured here" in fuiad.note
    assert mvtec.lines[0].cells[mvtec.methods.index("SimpleNet")].second is None


def test_the_last_good_row_counts_and_failures_without_one_are_told() -> None:
    rows = [row(image_auroc=0.1), row(error="x", image_auroc=""), row(image_auroc=0.2)]
    rows += [row(seed=1, preset=p, error="No images in 'x'.") for p in ("none", "paper")]
    good, failed = newest(rows)
    assert [r["image_auroc"] for r in good] == ["0.2"]
    assert failures(failed) == [("tiles, PaDiM: No images in 'x'.", 1)]


def test_prices() -> None:
    (price,) = prices([row(), row(preset="none", seconds_stage2=2.5)])
    assert (price.stage1, price.stage2, price.per_image) == ("3.0", "2.0", "10.0")
    assert (price.size, price.memory, price.images) == ("2.5 MB", "700", "100")
    (price,) = prices([row(model_bytes="", seconds_stage1="", seconds_evaluate="")])
    assert (price.size, price.stage1, price.per_image) == ("-", "-", "-")  # not measured


def test_the_page_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    append_rows(tmp_path / "results.csv", [row(), row(alpha=0.4), row(detector=hostile), row(seed=5, error=hostile)])
    written = write_benchmark_report(tmp_path, tmp_path / "r", quoted=True)
    page = written["HTML"].read_text()
    assert hostile not in page
    assert "&lt;script&gt;" in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(set(ids)) == len(ids) > 0, "two drawings share a mark or a frame"
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) == set(ids)
    assert "A &amp; B, 2 cores" in page
    assert "Quoted: Real-IAD" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "have no anomaly maps" in page
    assert written["Markdown"].read_text().count("### ") == 3
    assert "\\begin{table*}" in written["LaTeX"].read_text()


@pytest.mark.parametrize(("system", "mib"), [("linux", 2048), ("darwin", 2), ("win32", 2)])
def test_peak_memory_is_in_mib_on_every_system(monkeypatch: pytest.MonkeyPatch, system: str, mib: float) -> None:
    usage = SimpleNamespace(ru_maxrss=2 * 2**20, peak_wset=2 * 2**20)
    resource = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: usage)
    process = SimpleNamespace(memory_info=lambda: usage)
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setitem(sys.modules, "resource", None if system == "win32" else resource)
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(Process=lambda: process))
    assert peak_mb() == mib


def test_nothing_of_one_system_is_imported_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("resource", "fcntl", "msvcrt"):
        monkeypatch.setitem(sys.modules, name, None)
    for module in (benchmark_rows, files):
        runpy.run_path(str(module.__file__))


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no rows. Run `flawsift benchmark`"):
        write_benchmark_report(tmp_path / "none.csv", tmp_path / "r")


def test_pictures_need_maps_and_the_grid(tmp_path: Path) -> None:
    rows = [row(key="abc")]
    assert "no anomaly maps" in examples(rows, tmp_path, None).problem
    (tmp_path / "abc.npz").touch()
    assert "--config" in examples(rows, tmp_path, None).problem


GRIDS = [("table1.toml", 12 * 3 * 4 * 3), ("table1_quick.toml", 4 * 3 * 2 * 2), ("trim.toml", 2 * 2 * 3 * 3)]


@pytest.mark.parametrize(("name", "n_cells"), GRIDS)
def test_the_grids_of_the_project_can_be_read(name: str, n_cells: int) -> None:
    path = Path(__file__).parents[2] / "benchmarks" / name
    if not path.exists():
        pytest.skip("benchmarks are not in the source distribution")
    assert len(plan(read_config(path))) == n_cells


def test_rows_of_a_run_can_be_reported(tmp_path: Path) -> None:
    config = parse_config(
        {
            "alphas": [0.0, 0.2],
            "seeds": [0],
            "presets": ["paper"],
            "backbone": {"name": "tiny", "size": 64},
            "data": [{"name": "synthetic", "n_normal": 30, "n_anomalous": 20, "size": 64}],
            "detectors": [{"name": "padim", "params": {"n_features": 10}}],
            "examples": 2,
        }
    )
    run(config, tmp_path)
    rows = read_rows(tmp_path / "results.csv")
    shown = examples(rows, tmp_path / "maps", config)
    assert shown.methods == ("padim",)
    assert [len(pictures) for _, pictures in shown.lines] == [3, 3]
    assert all(p.startswith("data:image/jpeg") for _, pictures in shown.lines for p in pictures)
    (curve,) = kept_curves(rows)
    n = int(rows[0]["n_train"])
    assert curve.table[0][1] == f"{100 * int(0.4 * n) / n:.0f}"  # of a clean set, the paper keeps 40 %


@pytest.mark.parametrize("name", ["table1", "table1_quick"])
def test_the_tables_of_the_project_are_those_of_their_rows(name: str) -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / name
    if not folder.exists():
        pytest.skip("benchmarks are not in the source distribution")
    good, _ = newest(read_rows(folder / "results.csv"))
    expected = "\n".join(markdown(table) for table in [*measured_tables(good), *quoted_tables()])
    assert (folder / "table.md").read_text("utf-8") == expected


def test_quoted_figures_are_added_only_where_they_are_asked_for(tmp_path: Path) -> None:
    append_rows(tmp_path / "results.csv", [row(data="realiad", protocol="official", method="rd")])
    own = write_benchmark_report(tmp_path, tmp_path / "own")
    assert all("uoted" not in own[kind].read_text("utf-8") for kind in ("Markdown", "LaTeX"))
    both = write_benchmark_report(tmp_path, tmp_path / "both", quoted=True)["Markdown"].read_text("utf-8")
    assert both.startswith(own["Markdown"].read_text("utf-8"))
    assert "### Quoted: " in both
    assert "Failed cells" not in own["HTML"].read_text("utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n".encode("utf-16"), "'utf-8' codec can't decode"),
        (b'a,b\n"1,2\n', "unexpected end of data"),
        (b"a,b\n\0,2\n", "NUL bytes"),
        (b"a,b\n1,2\n", "no column 'data'"),
    ],
)
def test_a_file_of_no_rows_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "results.csv").write_bytes(content)
    with pytest.raises(InputError, match=f"holds no rows of a benchmark: .*{message}"):
        write_benchmark_report(tmp_path, tmp_path / "report")
    assert (tmp_path / "results.csv").read_bytes() == content
