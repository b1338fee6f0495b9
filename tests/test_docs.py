"""What the documents promise: the quick start runs, the examples run, the tables name real tests."""

import re
import runpy
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.real
def test_the_quick_start_runs_as_printed(
    easy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    found = re.search(r"<!-- quick start.*?-->\n```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    code = found[1]
    assert code.count("\n") <= 15
    for folder, numbers in (("parts", range(20, 50)), ("new_parts", range(38, 48))):  # of the good ones fewer
        (tmp_path / folder).mkdir()
        for number in numbers:
            shutil.copy(easy_folder / f"part-{number}.png", tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "most anomalous: part-4" in printed
    assert "part-45.png" in printed
    assert "DEFECTIVE" in printed


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")  # of numba and scikit-learn
def test_the_snippets_about_adapters_run(easy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for that about a file of anomalib, which tests/adapters has where anomalib is installed."""
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adapters.md").read_text("utf-8"), re.DOTALL)
    mine = [code for code in snippets if "anomalib" not in code]
    assert len(mine) == len(snippets) - 1 == 4
    for folder, numbers in (("parts", range(20, 44)), ("new_parts", range(38, 48))):
        (tmp_path / folder).mkdir()
        for number in numbers:
            shutil.copy(easy_folder / f"part-{number}.png", tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    known: dict[str, object] = {}
    for code in mine:
        exec(compile(code, "docs/adapters.md", "exec"), known)
    assert (tmp_path / "model" / "model.json").is_file()


@pytest.mark.parametrize("example", ["quickstart.py", "own_detector.py"])
def test_examples_run(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
    assert capsys.readouterr().out


def test_the_readme_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert "make demo" in text
    assert "make test" in text


def test_links_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text("utf-8")):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
