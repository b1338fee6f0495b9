"""Changes of files, drawn by a generator: of bytes, of JSON, of tables."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Generator = np.random.Generator
# Values where something else was expected: other types, what overflows, what no number is, what leads out of a folder.
ODD_VALUES: Sequence[Any] = (
    None,
    True,
    0,
    -1,
    1,
    10**40,
    -(10**40),
    2**63,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    0.5,
    "",
    "x",
    "nan",
    "\0",
    "../../x",
    "/etc/passwd",
    "é" * 300,
    "fit",
    "__class__",
    "\ud800",
    [],
    [1],
    [[]],
    {},
    {"a": 1},
    [None] * 3,
)
ODD_CELLS: Sequence[str] = (
    "",
    " ",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "-1",
    "99999999999999999999999999",
    "1.5",
    "keep",
    "yes",
    "no",
    "x",
    "=1+1",
    "'",
    '"',
    "a,b",
    "../../x",
    "/etc/passwd",
    "\0",
    "é",
    "\u202e",
    "\r",
    "0x10",
    "١",
    "٣",
    "1_0",
    "½",
    "²",
    "x" * 5000,
)


def change_bytes(content: bytes, draw: Generator, others: Sequence[bytes] = ()) -> tuple[str, bytes]:
    """What was done, and the changed content of a file.

    Args:
        content: Of the file.
        draw: Decides.
        others: Contents of other files of its kind, which may take its place or its end.
    """
    ways: list[Callable[[], tuple[str, bytes]]] = [
        lambda: ("a bit flipped", _flipped(content, draw, 1)),
        lambda: ("bits flipped", _flipped(content, draw, 1 << int(draw.integers(1, 8)))),
        lambda: ("bits of the head flipped", _flipped(content[:256], draw, 3) + content[256:]),
        lambda: ("cut off", content[: int(draw.integers(0, len(content) + 1))]),
        lambda: ("its last bytes cut off", content[: -int(draw.integers(1, 9))]),
        lambda: ("emptied", b""),
        lambda: ("bytes inserted", _inserted(content, draw)),
        lambda: ("a block zeroed", _zeroed(content, draw)),
        lambda: ("bytes added at its end", content + draw.bytes(int(draw.integers(1, 64)))),
        lambda: ("doubled", content + content),
        lambda: ("replaced by noise", draw.bytes(int(draw.integers(1, 400)))),
        lambda: ("replaced by text", b"not what you look for\n" * int(draw.integers(1, 9))),
    ]
    if others:
        other = others[int(draw.integers(len(others)))]
        at = int(draw.integers(0, min(len(content), len(other)) + 1))
        ways += [lambda: ("replaced by another's", other), lambda: ("ends as another's", content[:at] + other[at:])]
    return ways[int(draw.integers(len(ways)))]()


def _flipped(content: bytes, draw: Generator, n: int) -> bytes:
    changed = bytearray(content)
    for at in draw.integers(0, max(len(changed), 1), n).tolist() if changed else ():
        changed[at] ^= 1 << int(draw.integers(8))
    return bytes(changed)


def _inserted(content: bytes, draw: Generator) -> bytes:
    at = int(draw.integers(0, len(content) + 1))
    return content[:at] + draw.bytes(int(draw.integers(1, 32))) + content[at:]


def _zeroed(content: bytes, draw: Generator) -> bytes:
    at, n = int(draw.integers(0, len(content) + 1)), int(draw.integers(1, 64))
    return content[:at] + bytes(len(content[at : at + n])) + content[at + n :]


def change_json(content: bytes, draw: Generator) -> tuple[str, bytes]:
    """What was done, and a JSON text with one value, key or item changed, or something that is none."""
    odd = ODD_VALUES[int(draw.integers(len(ODD_VALUES)))]
    if draw.random() < 0.1:
        text = (json.dumps(odd), "[" * 100_000, '{"a":' * 50_000, content.decode("utf-8", "replace") * 2)
        return "replaced by other JSON", text[int(draw.integers(len(text)))].encode("utf-8", "surrogatepass")
    value = json.loads(content)
    places = list(_places(value))
    if not places:
        return "replaced by other JSON", json.dumps(odd).encode()
    parent, key = places[int(draw.integers(len(places)))]
    way = int(draw.integers(5))
    where = str(key)
    if way == 0:
        del parent[key]
        what = f"'{where}' taken out"
    elif way == 1 and isinstance(parent, dict):
        parent[str(odd)] = parent.pop(key)
        what = f"'{where}' renamed to {str(odd)[:20]!r}"
    elif way == 2 and isinstance(parent, list):
        parent.append(odd)
        what = "an item added"
    elif way == 3 and isinstance(parent[key], int | float):
        parent[key] = parent[key] * -1.5
        what = f"'{where}' times -1.5"
    else:
        parent[key] = odd
        what = f"'{where}' set to {str(odd)[:20]!r}"
    return what, json.dumps(value).encode("utf-8", "surrogatepass")


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value; of long lists the first ones."""
    found: list[tuple[Any, Any]] = []
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))[:4]
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], dict | list):
            found += _places(value[key])
    return found


def change_table(content: bytes, draw: Generator) -> tuple[str, bytes]:
    """What was done, and a CSV text with a cell, a row, its header or its encoding changed."""
    rows = list(csv.reader(io.StringIO(content.decode("utf-8"), newline="")))
    row = int(draw.integers(len(rows)))
    column = int(draw.integers(len(rows[row])))
    odd = ODD_CELLS[int(draw.integers(len(ODD_CELLS)))]
    way = int(draw.integers(9))
    what = (
        f"a cell of '{rows[0][column]}' set to {odd[:20]!r}",
        "a row taken out",
        "a row doubled",
        "a column taken out",
        "a cell added",
        "another separator",
        "another encoding",
        "line ends",
        "a name of a column changed",
    )[way]
    if way == 0:
        rows[row or len(rows) - 1][column] = odd
    elif way == 1:
        del rows[row]
    elif way == 2:
        rows.append(rows[row])
    elif way == 3:
        rows = [[cell for at, cell in enumerate(cells) if at != column] for cells in rows]
    elif way == 4:
        rows[row].append(odd)
    elif way == 8:
        rows[0][column] = odd
    text = io.StringIO()
    end = ("\r", "\r\n", "\n\n", "")[int(draw.integers(4))] if way == 7 else "\n"
    csv.writer(text, delimiter=";" if way == 5 else ",", lineterminator=end or "\n").writerows(rows)
    codecs = ("utf-16", "utf-8-sig", "latin-1", "utf-32", "utf-7")
    codec = codecs[int(draw.integers(len(codecs)))] if way == 6 else "utf-8"
    return what, text.getvalue().encode(codec, "replace")
