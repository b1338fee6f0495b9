"""What results look like in a notebook: a table with small pictures, and a table of pandas."""

import base64
import html
import importlib
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from flawsift.data.decoding import UnreadableImage
from flawsift.data.images import ImageSet
from flawsift.errors import FlawsiftError
from flawsift.paths import show

if TYPE_CHECKING:
    import pandas as pd

MAX_ROWS = 12  # a screenful
EDGE = 80  # pixels of a picture's long edge: twelve pictures of black and white noise, the worst case, take 90 kB


def rows_html(
    images: ImageSet | None, rows: Iterable[tuple[int, Mapping[str, object]]], *, title: str, total: int
) -> str:
    """An HTML table of results, with a picture in each row; all text is escaped.

    Args:
        images: Where pictures come from. Without it, and of images that cannot be read any more, there are none.
        rows: (global id, {column: value}), all with the same columns; the first twelve are asked for and shown.
        title: What stands above, in one line or several.
        total: How many rows there are in all.
    """
    shown = list(islice(rows, MAX_ROWS))
    pictures = [_picture(images, id_) for id_, _ in shown]
    columns = [*([""] if any(pictures) else []), *(shown[0][1] if shown else [])]
    body = ""
    for picture, (_, values) in zip(pictures, shown, strict=True):
        cells = [*([picture] if any(pictures) else []), *(html.escape(_text(value)) for value in values.values())]
        body += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    more = f"<p>and {total - len(shown)} more</p>" if total > len(shown) else ""
    return (
        f'<div><p style="white-space: pre-line">{html.escape(show(title))}</p>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}</div>"
    )


def data_frame(columns: Mapping[str, Sequence[object]], ids: Sequence[int]) -> "pd.DataFrame":
    """A pandas table with one row per image.

    Args:
        columns: {name: one value per image}.
        ids: (N,) global ids, the index.

    Raises:
        FlawsiftError: pandas is not installed.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ImportError as error:
        raise FlawsiftError("This table needs the package pandas: pip install pandas.") from error
    return pandas.DataFrame(dict(columns), index=pandas.Index(ids, name="id"))


def _picture(images: ImageSet | None, id_: int) -> str:
    """An image as an HTML element; "" where it cannot be had."""
    if images is None:
        return ""
    try:
        picture = images.image(id_)
    except UnreadableImage:
        return ""
    picture.thumbnail((EDGE, EDGE), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode("ascii")}" alt="">'


def _text(value: object) -> str:
    if value is None or (isinstance(value, float | np.floating) and np.isnan(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float | np.floating) else show(str(value))
