"""`make lint` finds unfinished text, and leaves finished text alone."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
pytestmark = pytest.mark.skipif(not TOOLS.is_dir(), reason="tools are not in the source distribution")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("check_text")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with a package, a document and a test."""
    for name, text in {
        "src/flawsift/__init__.py": "if TYPE_CHECKING:\n    from a import fit as fit\n",
        "src/flawsift/room/__init__.py": "",
        "src/flawsift/room/part.py": "LIMIT = 1\nclass Part:\n    size: int = 0\n    async def cut(self): ...\n",
        "docs/method.md": "",
        "tests/room/test_part.py": "def test_it() -> None: ...\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def docstring(text: str) -> str:
    return f'def f() -> None:\n    """First line.\n\n    {text}\n    """\n'


GOOD = {
    "a plain docstring": docstring(
        f"Scores of {'x' * 70} images, higher is more anomalous; see `fit` and\n    its source."
    ),
    "entries of a section": docstring(
        "Args:\n        a: One.\n        b_c: Another that is short.\n        d: The last."
    ),
    "intervals": docstring("Shares lie in (0, 1], others in [0, 1)."),
    "an item": docstring("a) is an item."),
    "a drawing": docstring("Example::\n\n        x = [1, (2\n        go on without an end"),
    "a doctest": docstring(">>> f()\n    ['short', (\n    lower case"),
    "a table": docstring("one    one    two\n    three    three    four"),
    "a product": docstring("The lower half of delta delta^T."),
    "code": docstring("What `a (b` and ``x[0`` are, ``a `b` c`` too."),
    "an address": docstring("From https://example.org/a_b"),
    "a line that ends early before a long word": docstring(f"Words in a line\n    {'x' * 90} end."),
    "comments": "x = 1  # (B, C)\ny = 2  # (B, h,\n       # W) is one shape\nz = 3  # noqa: E501 (\n",
    "two comments": "a = 1  # short\nb = 2  # lower case\n",
    "code with brackets": "x = '(['\n",
}
BAD = {
    docstring("A line that breaks\n    off in the middle."): "4: broken off: 'A line that breaks' and then 'off",
    docstring("A paragraph without an end"): "4: broken off: 'A paragraph without an end' without",
    docstring("First.\n\n    One (two."): "6: unbalanced: '('",
    docstring("One two)."): "4: unbalanced: ')'",
    docstring("One [two."): "4: unbalanced: '['",
    docstring("One `two."): "4: unbalanced: a backtick",
    docstring("It is the\n    The end."): "4: doubled word: 'the the'",
    docstring("Is is it?"): "4: doubled word: 'Is Is'",
    docstring("To be written: TODO."): "4: placeholder: 'TODO'",
    "x = 'TTT'\n": "1: placeholder: 'TTT'",
    "x = 1  # really???\n": "1: placeholder: '???'",
    "# a comment that\n# breaks off\nx = 1\n": "1: broken off",
    "x = 1  # one (two\n": "1: unbalanced: '('",
    'class A:\n    async def f(self) -> None:\n        """The the."""\n': "3: doubled word",
    docstring("See `flawsift.room.other`."): "4: reference: there is no flawsift.room.other",
    docstring("See `flawsift.room.part.Part.weight`."): "4: reference: there is no flawsift.room.part.Part.weight",
    docstring("See docs/methods.md."): "4: reference: there is no file docs/methods.md",
    "# guarded by tests/test_part.py\n": "1: reference: there is no file tests/test_part.py",
    docstring("See `tests/room/test_part.py::test_that`."): "4: reference: there is no test_that in tests/room",
}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_finished_text_is_left_alone(tool: Any, root: Path, text: str) -> None:
    assert tool.check("a.py", text, root) == []


@pytest.mark.parametrize(("text", "finding"), BAD.items(), ids=BAD.values())
def test_unfinished_text_is_found(tool: Any, root: Path, text: str, finding: str) -> None:
    (found,) = tool.check("a.py", text, root)
    assert found.startswith(f"a.py:{finding}")


@pytest.mark.parametrize(
    "name",
    ["room", "room.part", "room.part.LIMIT", "room.part.Part", "room.part.Part.size", "room.part.Part.cut", "fit"],
)
def test_names_and_files_that_exist_are_known(tool: Any, root: Path, name: str) -> None:
    text = docstring(
        f"See `flawsift.{name}`, `flawsift.{name}(x)`, docs/method.md and tests/room/test_part.py::test_it."
    )
    assert tool.check("a.py", text, root) == []
    assert tool.check("a.py", text.replace(name, f"{name}_"), root)


def test_documents_are_read_without_code_and_measured_rows(tool: Any, root: Path) -> None:
    hidden = (
        "```sh\nx (\n```\n\n<!-- rows:a -->\n\nthe the\n\n<!-- /rows -->\n\n<!-- a ( -->\n\n# Heading\n\n- one\n- two\n"
    )
    assert tool.check("a.md", hidden, root) == []
    assert tool.check("a.md", hidden + "\nA line that breaks\noff, and (\n", root) == [
        "a.md:18: broken off: 'A line that breaks' and then 'off, and ('",
        "a.md:18: unbalanced: '('",
    ]
    assert tool.check("a.html", "<p>the the (</p><!-- FIXME -->", root) == ["a.html:1: placeholder: 'FIXME'"]


def test_findings_of_the_files_named_are_printed_and_fail(tmp_path: Path) -> None:
    for text, code in (('"""One."""\n', 0), ('"""One (two."""\n', 1)):
        path = tmp_path / "a.py"
        path.write_text(text)
        command = [sys.executable, str(TOOLS / "check_text.py"), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr == (f"{path}:1: unbalanced: '('\n" if code else "")
