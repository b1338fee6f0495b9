"""The example grid runs as it is printed, without a download."""

from pathlib import Path

import pytest

from flawsift.benchmark.config import read_config
from flawsift.benchmark.grid import plan
from flawsift.benchmark.report import write_benchmark_report
from flawsift.benchmark.runner import run

pytest.importorskip("pydantic")
EXAMPLE = Path(__file__).parents[2] / "benchmarks" / "example.toml"
pytestmark = pytest.mark.skipif(not EXAMPLE.is_file(), reason="benchmarks are not in the source distribution")


@pytest.mark.real
def test_the_example_runs_and_has_a_report(tmp_path: Path) -> None:
    config = read_config(EXAMPLE)
    rows = run(config, tmp_path / "results")
    assert len(rows) == len(plan(config)) * len(config.presets) == 12
    assert not any(row.get("error") for row in rows)
    found = {(row["detector"], row["alpha"], row["preset"]): float(row["image_auroc"]) for row in rows}
    assert found["Quorum", "0.2", "default"] > 0.8
    written = write_benchmark_report(tmp_path / "results", tmp_path / "report", config=config)
    assert "PatchCore" in written["Markdown"].read_text("utf-8")
