"""What reading a file raises whose content is not what was written, whoever reads it."""

import csv
import json
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

# Of JSON with values of other kinds, CSV, arrays and archives: texts that are no numbers, keys and rows that are not
# there, numbers too large for an array, brackets within brackets. An archive whose bits have changed may seem
# encrypted, which is a RuntimeError; the head of an array is Python, which numpy reads by tokens.
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
    SyntaxError,
    tokenize.TokenError,
)


def parse_json(content: str | bytes, *, parse_int: Callable[[str], Any] | None = None) -> Any:
    """The value of a JSON text.

    Args:
        content: The text.
        parse_int: Makes a whole number of its digits; None for `int`.

    Raises:
        ValueError: It is none, or nested deeper than Python reads.
    """
    try:
        return json.loads(content, parse_int=parse_int)
    except RecursionError as error:
        raise ValueError("brackets are nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(str(error)) from None  # its own form repeats all of the content


def json_object(content: str | bytes) -> dict[str, Any]:
    """The keys and values of a JSON text.

    Raises:
        ValueError: It is none, or holds something else.
    """
    value = parse_json(content)
    if not isinstance(value, dict):
        raise ValueError(f"it must hold keys and values, not {type(value).__name__}")
    return value
