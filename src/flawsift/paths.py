"""Paths and names as text for people, and back."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

MAX_NAMED = 5  # an error names at most this many offenders, and the total


def show(path: str | Path) -> str:
    """A path as printable text: bytes that are not UTF-8 appear as backslash escapes.

    >>> show(os.fsdecode(b"caf\\xe9.png"))
    'caf\\\\udce9.png'
    """
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def find_name(root: Path, shown: str) -> str:
    """The path below `root` that `show` made a text of; the text itself where no such file is there.

    A file whose name really holds a backslash escape comes first.
    """
    if "\\udc" in shown and not os.path.lexists(root / shown):
        raw = re.sub(r"\\udc([89a-f][0-9a-f])", lambda found: chr(0xDC00 + int(found[1], 16)), shown)
        if os.path.lexists(root / raw):
            return raw
    return shown


def name_some(names: Iterable[str]) -> str:
    """At most five names and how many more there are."""
    listed = [show(n) for n in names]
    rest = len(listed) - MAX_NAMED
    return ", ".join(listed[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")
