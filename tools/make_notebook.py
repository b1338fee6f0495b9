"""The tutorial as a notebook: `python tools/make_notebook.py` writes docs/tutorial.ipynb from docs/tutorial.md.

The page is the only source. Text becomes text, a block of Python a cell, a block of commands a cell of `!` lines.
Blocks that the page marks as not run, such as what installs or waits for a person, stay text. Links lead to the files
of the repository, and nothing of a run is kept.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, NOTEBOOK = ROOT / "docs" / "tutorial.md", ROOT / "docs" / "tutorial.ipynb"
# a remark just above a block says what is done with it: "not run: WHY", or "the tests draw 30 for 200 and 8 for 20"
BLOCK = re.compile(r"(?:<!-- ([^\n]*) -->\n)?```(sh|bash|python)\n(.*?)```", re.DOTALL)
NOT_RUN = "not run: "


def cells(text: str) -> list[tuple[str, str]]:
    """("markdown" or "code", source) of each cell of a page."""
    made: list[tuple[str, str]] = []
    prose, end = "", 0
    for block in BLOCK.finditer(text):
        remark, language, code = block.groups("")
        prose += text[end : block.start()]
        end = block.end()
        if remark.startswith(NOT_RUN):
            prose += f"```{language}\n{code}```"
            continue
        made += [("markdown", prose), ("code", code if language == "python" else commands(code))]
        prose = ""
    made.append(("markdown", prose + text[end:]))
    return [(kind, source.strip("\n")) for kind, source in made if source.strip()]


def commands(code: str) -> str:
    """Lines of a shell as lines that a notebook hands to one."""
    return "".join(f"!{line}\n" if line.strip() else "\n" for line in code.replace("\\\n", " ").splitlines())


def notebook(text: str) -> dict[str, Any]:
    """A page as the content of a notebook, format 4.5, without outputs."""
    made: list[dict[str, Any]] = []
    for n, (kind, source) in enumerate(cells(text)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{n}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        made.append(cell | {"source": source.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def written(text: str) -> str:
    """A page as the text of a notebook file."""
    return json.dumps(notebook(text), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(written(PAGE.read_text("utf-8")), "utf-8")
