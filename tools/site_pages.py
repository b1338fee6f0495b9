"""What `mkdocs.yml` needs beside docs: pages of other folders, and links as they lead on the site.

Pages link to files as they lie in the repository, so that they can be read there. On the site a link to a page leads to
the page; one to a file that is no page, such as a folder of code, becomes its text.
"""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# file of the repository: page of the site
PAGES = {
    "benchmarks/README.md": "benchmarks/index.md",
    "ARCHITECTURE.md": "development/architecture.md",
    "CONTRIBUTING.md": "development/contributing.md",
    "CHANGELOG.md": "development/changelog.md",
    "README.md": "index.md",  # the site's start says the same, and more
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]*)(#[^)]*)?\)")
CODE = re.compile(r"^```.*?^```|``.*?``|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of other folders."""
    from mkdocs.structure.files import File  # here: links can be tested without it

    for source, page in PAGES.items():
        if page != "index.md":
            files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links of a page lead to pages."""
    at = page.file.src_uri
    source = next((s for s, p in PAGES.items() if p == at and p != "index.md"), f"docs/{at}")
    return relinked(markdown, source, at, {file.src_uri for file in files})


def relinked(markdown: str, source: str, at: str, pages: set[str]) -> str:
    """The text of a page with its links as they lead on the site.

    Args:
        markdown: The text.
        source: The page's file in the repository.
        at: The page on the site.
        pages: All files of the site.
    """

    def replace(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups()
        if not target or "://" in target:
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        page = PAGES.get(file, os.path.relpath(file, "docs") if file.startswith("docs/") else None)
        if page in pages:
            return f"{mark}[{text}]({posixpath.relpath(page, posixpath.dirname(at) or '.')}{anchor or ''})"
        return match[0] if not (ROOT / file).exists() else text  # a link that leads nowhere is told by MkDocs

    parts, end = [], 0
    for code in CODE.finditer(markdown):  # which may hold what looks like a link
        if not LINK.search(code[0]):
            continue
        parts += [LINK.sub(replace, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(replace, markdown[end:])])
