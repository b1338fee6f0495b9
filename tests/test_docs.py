"""What the documents promise: their commands and snippets run, the examples run, links lead somewhere."""

import contextlib
import importlib
import importlib.util
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from flawsift.cli.main import app, main
from tests.data.nails import nails
from tools.make_notebook import BLOCK, NOT_RUN, NOTEBOOK, PAGE, written

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/commands.md", "docs/tutorial.md"]
PAGES += sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/how-to/*.md"))
ENDLESS = {"review", "serve", "watch"}  # until somebody stops them, but for `watch --once`


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all pages, which look at the same images."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def material(easy_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the pages call parts, new parts, labelled parts, screws, groups and a region."""
    good, bad = range(20, 40), range(40, 46)
    folders: dict[str, Iterable[int]] = {
        "parts": [*good, *bad],
        "new_parts": [38, 39, *range(40, 48)],
        "more_parts": [*range(10), 48, 49],
    }
    folders |= {"few_parts": [*range(20, 30), 40, 41], "labelled/good": range(10, 20), "labelled/bad": range(46, 50)}
    for folder, numbers in folders.items():
        (tmp_path / folder).mkdir(parents=True)
        for number in numbers:
            shutil.copy(easy_folder / f"part-{number:02d}.png", tmp_path / folder)
    (tmp_path / "screws").mkdir()
    for id_ in (images := nails(16, marked=2)).ids.tolist():
        images.image(id_).save(tmp_path / "screws" / f"{id_:02}.png")
    (tmp_path / "groups.csv").write_text("file,group\npart-20.png,A\npart-21.png,A\npart-22.png,B\n")
    Image.new("L", (64, 64), 255).save(tmp_path / "region.png")
    monkeypatch.setenv("FLAWSIFT_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, code) of the blocks of a page that run."""
    for remark, language, code in BLOCK.findall(text):
        if not remark.startswith(NOT_RUN):
            yield "python" if language == "python" else "sh", smaller(code, remark)


def smaller(code: str, remark: str) -> str:
    """A block with the numbers that its remark gives to the tests."""
    for less, more in re.findall(r"(\d+) for (\d+)", remark):
        code = re.sub(rf"\b{more}\b", less, code)
    return code


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command of a block, without comments."""
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def run_command(words: list[str]) -> str:
    """Run a command of flawsift, or only read its options where it does not end by itself; what it printed."""
    assert words[0] == "flawsift", f"'{shlex.join(words)}' is no command of flawsift: mark its block as not run"
    if words[1] in ENDLESS and "--once" not in words:
        check_options(words)
        return ""
    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main(words[1:])
    assert stop.value.code == 0, f"{shlex.join(words)}\n{err.getvalue()}"
    return out.getvalue()


def check_options(words: list[str]) -> None:
    """An error where a command has no such options or arguments."""
    group = typer.main.get_command(app)
    command = group.commands[words[1]]  # type: ignore[attr-defined]
    command.make_context(words[1], words[2:])


@pytest.mark.real
@pytest.mark.parametrize("page", PAGES)
def test_commands_and_snippets_run_as_printed(page: str, material: Path) -> None:
    """One after the other, in one folder and one interpreter."""
    if page == "docs/tutorial.md":
        pytest.importorskip("elpv_dataset")
    known: dict[str, object] = {}
    n = 0
    for language, code in blocks((ROOT / page).read_text("utf-8")):
        n += 1
        if language == "python":
            exec(compile(code, page, "exec"), known)
        else:
            for words in commands(code):
                run_command(words)
    assert n, f"{page} has nothing to run: take it out of PAGES"


def test_blocks_that_do_not_run_have_commands_and_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for page in [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *ROOT.glob("docs/**/*.md")]:
        text = page.read_text("utf-8")
        for names in re.findall(r"pip install '?flawsift\[([\w,]+)\]", text):
            assert set(names.split(",")) <= set(extras), f"{page.name}: pip install flawsift[{names}]"
        for remark, _, code in BLOCK.findall(text):
            if remark.startswith(NOT_RUN):
                for words in commands(code):
                    if words[0] == "flawsift":
                        check_options(words)


@pytest.mark.real
def test_the_quick_start_finds_the_defects(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    snippet = re.search(r"<!-- quick start.*?-->\n```python\n(.*?)```", text, re.DOTALL)
    assert snippet is not None
    assert snippet[1].count("\n") <= 15
    exec(compile(snippet[1], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "most anomalous: part-4" in printed
    assert "part-45.png" in printed
    assert "DEFECTIVE" in printed


def test_the_notebook_is_that_of_the_tutorial() -> None:
    assert NOTEBOOK.read_text("utf-8") == written(PAGE.read_text("utf-8")), "run python tools/make_notebook.py"


# Lines after `!` run in the kernel instead of a shell, which would import torch anew for each and hide that one fails.
IN_KERNEL = """
def run(line):
    words = shlex.split(line)
    assert words[0] == "flawsift"
    try:
        main(words[1:])
    except SystemExit as stop:
        assert not stop.code, line

import shlex
from flawsift.cli.main import main
get_ipython().system = run
"""


@pytest.mark.real
def test_the_notebook_runs(material: Path) -> None:
    """Cell by cell in a kernel of Jupyter."""
    pytest.importorskip("elpv_dataset")
    pytest.importorskip("ipykernel", reason="needs the extra dev")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    remarks = " ".join(remark for remark, _, _ in BLOCK.findall(PAGE.read_text("utf-8")))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = smaller(cell.source, remarks)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(IN_KERNEL))
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(material))
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "image_auroc" in printed
    assert "Nothing was written." in printed
    assert (material / "results" / "predictions.csv").is_file()


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")  # of numba and scikit-learn
def test_the_snippets_about_adapters_run(material: Path) -> None:
    """But for that about a file of anomalib, which tests/adapters has where anomalib is installed."""
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adapters.md").read_text("utf-8"), re.DOTALL)
    mine = [code for code in snippets if "anomalib" not in code]
    assert len(mine) == len(snippets) - 1 == 4
    known: dict[str, object] = {}
    for code in mine:
        exec(compile(code, "docs/adapters.md", "exec"), known)
    assert (material / "model" / "model.json").is_file()


@pytest.mark.parametrize("example", ["quickstart.py", "own_detector.py"])
def test_examples_run(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
    assert capsys.readouterr().out


def test_the_readme_is_short_and_names_the_two_targets() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert "make demo" in text
    assert "make test" in text
    assert len(text.splitlines()) <= 100
    assert "Commit `" not in text


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def test_links_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", document.read_text("utf-8")):
            if target.startswith("http"):
                continue
            path = document.parent / target if target else document
            assert path.exists(), f"{document.name} links to {target}"
            if anchor:
                assert anchor in anchors(path), f"{document.name} links to {target}#{anchor}"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("site_pages")


@pytest.mark.parametrize(
    ("link", "source", "page", "expected"),
    [
        ("[a](glossary.md#b)", "docs/method.md", "method.md", "[a](glossary.md#b)"),
        ("[a](docs/method.md)", "ARCHITECTURE.md", "development/architecture.md", "[a](../method.md)"),
        ("[a](../../benchmarks/README.md)", "docs/how-to/views.md", "how-to/views.md", "[a](../benchmarks/index.md)"),
        ("[a](../examples/)", "docs/method.md", "method.md", "a"),
        ("[a](missing.md)", "docs/method.md", "method.md", "[a](missing.md)"),
        ("[a](https://example.org/b.md)", "docs/method.md", "method.md", "[a](https://example.org/b.md)"),
        ("![a](docs/heatmap.jpg)", "README.md", "development/readme.md", "![a](../heatmap.jpg)"),
        ("`[a](docs/method.md)`", "ARCHITECTURE.md", "development/architecture.md", "`[a](docs/method.md)`"),
    ],
)
def test_links_of_the_site_lead_to_its_pages(site: Any, link: str, source: str, page: str, expected: str) -> None:
    pages = {"glossary.md", "method.md", "benchmarks/index.md", "heatmap.jpg"}
    assert site.relinked(f"see {link}.", source, page, pages) == f"see {expected}."


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs: make docs")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "reference" / "index.html").read_text("utf-8")
    assert 'id="flawsift.pipeline.fit"' in reference
    loaded = re.findall(r'(?:src|<link rel="stylesheet" href)="(https?://[^"]+)"', reference)
    assert not loaded, "the site loads from elsewhere"
