"""Paths and names as text for people, and back."""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

PAGED = re.compile(r"(.+)#page=([1-9][0-9]*)", re.DOTALL)
MAX_BYTES = 255  # of the name of a file on nearly every system
# names that Windows keeps for devices, whatever ending they have
_DEVICE = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\..*)?", re.IGNORECASE | re.DOTALL
)
_MADE_SAFE = re.compile(r".*~[0-9a-f]{12}", re.DOTALL)
# what ends a line, steers a terminal, turns the direction of what follows, or is no UTF-8
_STEERS = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
MAX_NAMED = 5  # an error names at most this many offenders, and the total


def show(path: str | Path) -> str:
    """A path as printable text: bytes that are not UTF-8 appear as backslash escapes.

    >>> show(os.fsdecode(b"caf\\xe9.png"))
    'caf\\\\udce9.png'
    """
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def printed(text: str) -> str:
    """A text as one line of a terminal, whatever the names of files hold.

    >>> printed("a\\n0 of 5 images are anomalous.\\x1b[31m")
    'a\\\\n0 of 5 images are anomalous.\\\\x1b[31m'
    """
    return _STEERS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def file_and_page(root: Path, name: str) -> tuple[Path, int | None]:
    """The file of a name below `root`, and the page of it, from 0, where the name ends in "#page=2", which is 1.

    A file that is really called so comes first.
    """
    if (paged := PAGED.fullmatch(name)) and not os.path.lexists(root / name):
        return root / paged[1], int(paged[2]) - 1
    return root / name, None


def page_name(file: str, page: int) -> str:
    """The name of a page, from 0, of a file of several pages.

    >>> page_name("two.tif", 1)
    'two.tif#page=2'
    """
    return f"{file}#page={page + 1}"


def find_name(root: Path, shown: str) -> str:
    """The path below `root` that `show` made a text of; the text itself where no such file is there.

    A file whose name really holds a backslash escape comes first.
    """
    if "\\udc" in shown and not os.path.lexists(root / shown):
        raw = re.sub(r"\\udc([89a-f][0-9a-f])", lambda found: chr(0xDC00 + int(found[1], 16)), shown)
        if os.path.lexists(root / raw):
            return raw
    return shown


def safe_name(name: str, ending: str) -> str:
    """The path of a result that belongs to an image: its own and an ending, as far as every system can write it.

    A part that is too long with the ending, ends in dots or spaces, or is the name of a device on Windows gets a digest
    of itself at its end, so that no two are alike; and so does a part that looks as if it had one.

    >>> safe_name("a/b.jpg", ".png"), safe_name("a./NUL.jpg", ".png")
    ('a/b.jpg.png', 'a~5ab640fad553/_NUL.jpg~0a75d94f5d5c.png')
    """
    *folders, file = name.split("/")
    return "/".join([*(_safe_part(folder, "") for folder in folders), _safe_part(file, ending)])


def _safe_part(part: str, ending: str) -> str:
    stem, is_device = part.rstrip(". "), _DEVICE.fullmatch(part)
    is_long = _n_bytes(part) + len(ending) > MAX_BYTES
    if not (is_long or is_device or stem != part or _MADE_SAFE.fullmatch(part)):
        return part + ending
    digest = hashlib.sha256(part.encode("utf-8", "surrogatepass")).hexdigest()[:12]  # as long as _MADE_SAFE says
    end = f"~{digest}{ending}"
    stem = f"_{stem}" if is_device else stem
    while _n_bytes(stem) + len(end) > MAX_BYTES:
        stem = stem[:-1]
    return stem + end


def _n_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def name_some(names: Iterable[str]) -> str:
    """At most five names and how many more there are."""
    listed = [show(n) for n in names]
    rest = len(listed) - MAX_NAMED
    return ", ".join(listed[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")
