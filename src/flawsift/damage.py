"""What reading a file raises whose content is not what was written, whoever reads it."""

import csv
import json
import zipfile
import zlib
from typing import Any

# Of JSON with values of other kinds, CSV, arrays and archives: texts that are no numbers, keys and rows that are not
# there, numbers too large for an array, brackets within brackets. An archive whose bits have changed may seem
# encrypted, which is a RuntimeError.
DAMAGE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    csv.Error,
    zipfile.BadZipFile,
    zlib.error,
)


def parse_json(content: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: It is none, or nested deeper than Python reads.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("brackets are nested too deeply") from error


def json_object(content: str | bytes) -> dict[str, Any]:
    """The keys and values of a JSON text.

    Raises:
        ValueError: It is none, or holds something else.
    """
    value = parse_json(content)
    if not isinstance(value, dict):
        raise ValueError(f"it must hold keys and values, not {type(value).__name__}")
    return value
