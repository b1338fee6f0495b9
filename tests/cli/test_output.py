"""What commands write while they work: a sign of life at once, their stages, and nothing with --quiet."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from flawsift.cli.main import app

TINY = ["--backbone", "tiny", "--size", "64"]

# Each command with as much as it needs to begin its work; nothing of it is there.
COMMANDS = {
    "screen": "parts --out o",
    "fit": "parts --out o",
    "predict": "model parts",
    "drift": "model monday",
    "evaluate": "model parts --out o",
    "calibrate": "model parts",
    "export-model": "model --out o",
    "watch": "model parts --out o",
    "serve": "model",
    "review": "model --no-browser",
    "export": "model --to csv --out o",
    "diagnose": "parts --out o",
    "demo": "--out o",
    "detectors": "",
    "benchmark": "grid.toml --out o",
    "benchmark-report": "rows --out o",
    "cache list": "",
    "cache verify": "",
    "cache clear": "",
}
# What takes long to import is not to be had, so that whatever is written was written before it.
WITHOUT = """
import contextlib, io, json, sys
for name in ("torch", "numpy", "scipy", "PIL", "timm", "openvino", "onnxruntime", "jinja2"):
    sys.modules[name] = None
from flawsift.cli.main import main
written = {}
for line in sys.argv[1:]:
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.suppress(SystemExit, ImportError):
        main(line.split())
    written[line] = err.getvalue()
print(json.dumps(written))
"""


def written(lines: list[str], folder: Path) -> dict[str, str]:
    """{command: what it wrote to stderr before it needed something large}."""
    command = [sys.executable, "-c", WITHOUT, *lines]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_all_commands_are_here() -> None:
    group: Any = typer.main.get_command(app)
    names = {name for name in group.commands if name != "cache"}
    assert set(COMMANDS) == names | {f"cache {name}" for name in group.commands["cache"].commands}


def test_a_command_gives_a_sign_before_it_imports_anything_large(tmp_path: Path) -> None:
    lines = [f"{name} {rest}".strip() for name, rest in COMMANDS.items()]
    silent = {line: err for line, err in written(lines, tmp_path).items() if not err.startswith(" 0:00 Starting\n")}
    assert not silent


def test_with_quiet_only_errors_are_written(tmp_path: Path) -> None:
    lines = [f"{name} {rest} --quiet" for name, rest in COMMANDS.items()]
    for line, err in written(lines, tmp_path).items():
        assert err.startswith("flawsift: error: ") or not err, line
        assert "No such option" not in err, line


@pytest.fixture
def copied(easy_folder: Path, tmp_path: Path) -> Path:
    """Images of which two are the same, which is warned of."""
    (tmp_path / "parts").mkdir()
    for number in (*range(20, 30), 45, 46):
        shutil.copy(easy_folder / f"part-{number}.png", tmp_path / "parts")
    shutil.copy(easy_folder / "part-20.png", tmp_path / "parts" / "copy.png")
    return tmp_path


def test_a_pipe_gets_a_line_for_each_stage_and_the_same_result(cli: Any, copied: Path) -> None:
    fit = ["fit", copied / "parts", "--out", copied / "m", *TINY, "--cache", copied / "c"]
    code, _, err = cli(*fit)
    assert code == 0, err
    lines = err.splitlines()
    (warning,) = (line.removeprefix("flawsift: ") for line in lines if line.startswith("flawsift: "))
    assert [line[6:] for line in lines if not line.startswith("flawsift: ")] == [
        "Starting",
        "Finding images",
        "Loading the network",
        "Checking images",
        "Reading images (13)",
        "Looking at images (12)",
        "Learning from images",
        "Comparing images (13)",
        "Counting probable defects",
        "Training the detector",
        "Setting the threshold",
        "Writing results",
    ]
    results = []
    for more in ([], ["--quiet"]):
        code, out, err = cli("predict", copied / "m", copied / "parts", "--json", *more)
        assert code == 0, err
        assert (err == "") == bool(more)
        results.append(out)
    assert results[0] == results[1]
    code, out, err = cli(*fit, "--quiet", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["log"] == [warning], "a program still learns of it"
    code, out, err = cli(*fit, "--quiet")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "Warnings not shown: 1. Leave out --quiet, or see `log` of --json."


def test_the_stages_of_using_a_model(cli: Any, easy_folder: Path, copied: Path) -> None:
    fit = ["fit", copied / "parts", "--out", copied / "m", *TINY, "--no-screen", "--detector", "padim"]
    assert cli(*fit, "--set", "n_features=20")[0] == 0
    for kind, numbers in (("good", range(6)), ("bad", (47, 48, 49))):
        (copied / "labelled" / kind).mkdir(parents=True)
        for number in numbers:
            shutil.copy(easy_folder / f"part-{number:02d}.png", copied / "labelled" / kind)
    begin, end = ["Starting", "Loading the model", "Finding images"], ["Writing results"]
    expected = {
        "predict": [*begin, "Scoring images (9)", *end],
        "evaluate": [*begin, "Scoring images (9)", "Measuring", *end],
        "calibrate": [*begin, "Reading images", "Scoring images (9)", *end],
    }
    for name, stages in expected.items():
        code, _, err = cli(name, copied / "m", copied / "labelled", "--out", copied / name)
        assert code == 0, err
        assert [line[6:] for line in err.splitlines()] == stages
