"""Finds unfinished text in what git tracks: `python tools/check_text.py [FILE ...]`; `make lint` runs it.

Docstrings and comments of Python files, and the prose of Markdown files, are read paragraph by paragraph:

    placeholder    a word that stands for text still to be written; looked for in every text file, code included
    broken off     a line that ends early although the sentence goes on; a docstring's paragraph without a full stop
    unbalanced     a bracket or backtick without its partner
    doubled word   the same word twice in a row
    reference      the name of a module or object of flawsift, or the path of a file, that does not exist

Each finding is one line, "file:line: what"; the exit code is 1 if there is any.
"""

import ast
import functools
import io
import itertools
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".py", ".md", ".toml", ".yaml", ".html", ".css", ".js", ".svg", ".txt"}
NAMES = {"Makefile", "Dockerfile", ".ci/run", ".gitignore", ".dockerignore"}  # text files without one of these suffixes
# Measured rows are data; this script and its test hold samples of what it looks for.
UNREAD = ("benchmarks/results/", "tools/check_text.py", "tests/test_text.py")

PLACEHOLDER = re.compile(r"\b(?:TTT|XXX|TODO|FIXME|TBD)\b|\blorem\b|\?\?\?")
EARLY = 80  # lines are up to 120 long: one that ends before this, where its next word would have fitted, was cut
CODE = re.compile(r"``.*?``|`[^`]*`|<[^<>]*>", re.DOTALL)  # what is quoted follows no rule of prose; nor do HTML tags
DOUBLED = re.compile(r"\b([A-Za-z]{2,})[ \n]\1\b(?!\^)", re.IGNORECASE)  # `delta delta^T` is a product
OBJECT = re.compile(r"`(flawsift(?:\.\w+)+)(?:\([^`]*\))?`")
FILE = re.compile(r"\b(?:src|tests|docs|examples|benchmarks|tools)/[a-z0-9_./-]+\.(?:py|md|toml|html|css|js|json)\b")
TEST = re.compile(r"\b(tests/[a-z0-9_./-]+\.py)::(\w+)")
ITEM = re.compile(r"[-*] |\d+\. |[|#]|>>> ")  # items, table rows, headings and doctests begin a paragraph of their own
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


class Paragraph(NamedTuple):
    """Lines that belong together: where they begin, as they stand in the file, and their text alone."""

    first: int
    raw: list[str]
    text: list[str]
    ends: bool  # with a full stop, as docstrings do


def paragraphs(first: int, base: int, raw: list[str], text: list[str], ends: bool = False) -> Iterator[Paragraph]:
    """Splits a docstring, a block of comment lines or a document; indented examples and doctests are left out.

    Args:
        first: Number of the first line.
        base: Indentation of the whole; four more after a blank line are an example.
        raw: The lines as they stand in the file.
        text: The same without the marks of comments and docstrings, with their indentation.
        ends: Whether each paragraph should end with a full stop.
    """
    start, skip = 0, False
    for i, line in enumerate([*text, ""]):
        words = line.strip()
        if words and start < i and not ITEM.match(words):
            continue
        if start < i and not skip:
            yield Paragraph(first + start, raw[start:i], [part.strip() for part in text[start:i]], ends)
        after_blank = i == 0 or not text[i - 1].strip()
        indent = len(line) - len(line.lstrip()) if i else base
        if not words:
            skip = False
        elif words.startswith(">>>"):
            skip = True  # until the next blank line: what is printed follows
        elif after_blank:
            skip = indent >= base + 4
        start = i if words else i + 1


def python_paragraphs(source: str) -> Iterator[Paragraph]:
    """Those of the docstrings and comments of a Python file."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | FUNCTIONS) and ast.get_docstring(node) is not None:
            first, last = node.body[0].lineno, node.body[0].end_lineno or 0
            raw = lines[first - 1 : last]
            text = [re.sub(r'^(\s*)[rR]?"""|"""$', r"\1", line) for line in raw]
            yield from paragraphs(first, node.body[0].col_offset, raw, text, ends=True)
    block: list[tuple[int, int, str]] = []  # line, column, text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        (line, column), alone = token.start, token.line.lstrip().startswith("#")
        if block and not (alone and block[-1][:2] == (line - 1, column)):
            yield from _comment(block, lines)
            block = []
        block.append((line, column, token.string.lstrip("#!")))
    yield from _comment(block, lines)


def _comment(block: list[tuple[int, int, str]], lines: list[str]) -> Iterator[Paragraph]:
    if block and not block[0][2].strip().startswith(("noqa", "type: ", "pragma:", "fmt: ")):
        yield from paragraphs(block[0][0], 1, [lines[n - 1] for n, _, _ in block], [text for _, _, text in block])


def markdown_paragraphs(source: str) -> Iterator[Paragraph]:
    """Those of a document, less its code and the tables that `benchmarks/render.py` writes."""
    hidden = re.compile(r"^```.*?^```|<!-- rows:.*?<!-- /rows -->|<!--.*?-->", re.DOTALL | re.MULTILINE)
    lines = hidden.sub(lambda found: re.sub(r"[^\n]+", "", found[0]), source).splitlines()
    yield from paragraphs(1, 0, lines, lines)


def prose_problems(paragraph: Paragraph) -> Iterator[tuple[int, str]]:
    """(line, what) of each line that breaks off, unbalanced mark and doubled word."""
    first, raw, text, ends = paragraph
    for i, (line, following) in enumerate(itertools.pairwise(text)):
        early = len(f"{raw[i].rstrip()} {following.split()[0]}") < EARLY
        if early and "  " not in line and line[-1] not in ".:;!?|" and following[0].islower():
            yield first + i, f"broken off: '{line[-30:]}' and then '{following[:30]}'"
    if ends and not re.search(r"[.:?!|]$|https?://\S+$", text[-1]) and "  " not in text[-1]:
        yield first + len(text) - 1, f"broken off: '{text[-1][-30:]}' without a full stop"
    whole = "\n".join(text)
    prose = CODE.sub(lambda found: "`" + "\n" * found[0].count("\n") + "`", whole)
    if prose.count("`") % 2:
        yield first, "unbalanced: a backtick"
    if (found := _unbalanced(re.sub(r"^\w\)", "", prose))) is not None:  # less the mark of an item, "a)"
        yield first, f"unbalanced: '{found}'"
    for found_word in DOUBLED.finditer(prose):
        yield first + prose[: found_word.start()].count("\n"), f"doubled word: '{found_word[1]} {found_word[1]}'"


def _unbalanced(text: str) -> str | None:
    """The first bracket without a partner; "(0, 1]" is an interval, so the two kinds may meet."""
    opened: list[str] = []
    for sign in text:
        if sign in "([":
            opened.append(sign)
        elif sign in ")]":
            if not opened:
                return sign
            opened.pop()
    return opened[-1] if opened else None


def reference_problems(paragraph: Paragraph, root: Path = ROOT) -> Iterator[tuple[int, str]]:
    """(line, what) of each object and file that is named and does not exist."""
    for i, line in enumerate(paragraph.text):
        for name in OBJECT.findall(line):
            if not object_exists(name, root):
                yield paragraph.first + i, f"reference: there is no {name}"
        for name in FILE.findall(line):
            if not (root / name).exists():
                yield paragraph.first + i, f"reference: there is no file {name}"
        for path, test in TEST.findall(line):
            if (root / path).exists() and test not in members(root / path):
                yield paragraph.first + i, f"reference: there is no {test} in {path}"


def object_exists(name: str, root: Path = ROOT) -> bool:
    """Whether a dotted name is a module below src/, or an object or a class's member defined or imported there."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        place = root.joinpath("src", *parts[:n])
        for module in (place.with_suffix(".py"), place / "__init__.py"):
            if module.exists():
                return n == len(parts) or ".".join(parts[n:]) in members(module)
    return False


@functools.cache
def members(path: Path) -> frozenset[str]:
    """Names that a module defines or imports, and "Class.member" of its classes."""
    return frozenset(_defined(ast.parse(path.read_text("utf-8")).body))


def _defined(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, FUNCTIONS):
            yield node.name
        elif isinstance(node, ast.ClassDef):
            yield node.name
            yield from (f"{node.name}.{member}" for member in _defined(node.body))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.If | ast.Try):
            yield from _defined(node.body)
        else:
            yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def check(name: str, text: str, root: Path = ROOT) -> list[str]:
    """Findings in a file's text, in the order of its lines."""
    found = [
        (n, f"placeholder: '{hit[0]}'")
        for n, line in enumerate(text.splitlines(), 1)
        if (hit := PLACEHOLDER.search(line))
    ]
    kinds = {".py": python_paragraphs, ".md": markdown_paragraphs}
    if split := kinds.get(Path(name).suffix):
        for paragraph in split(text):
            found += [*prose_problems(paragraph), *reference_problems(paragraph, root)]
    return [f"{name}:{line}: {what}" for line, what in sorted(set(found))]


def texts() -> list[str]:
    """Text files of the project: what git tracks, and what is new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(n for n in set(listed) if Path(n).suffix in SUFFIXES or n in NAMES)


def main() -> None:
    """Check the files that are named, or all."""
    names = sys.argv[1:] or texts()
    there = [n for n in names if not n.startswith(UNREAD) and (ROOT / n).exists()]
    found = [line for name in there for line in check(name, (ROOT / name).read_text("utf-8"))]
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
