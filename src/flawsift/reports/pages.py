"""What all pages share: templates whose values are escaped, pictures in the page, colours, numbers, tables."""

import base64
import functools
import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from PIL import Image

from flawsift.paths import show
from flawsift.reports.overlays import colours

REPORT = "report.html"
THUMB = 320  # pixels of a picture's long edge: sharp at half a phone's width
JPEG_QUALITY = 85
MAX_UNREADABLE = 200  # rows; the tables beside a page have all


@functools.cache
def template(name: str, room: str = "reports") -> Template:
    """A template of `flawsift.<room>`, which may use those of the reports; every value put into it is escaped."""
    loader = ChoiceLoader([PackageLoader(f"flawsift.{r}", "templates") for r in dict.fromkeys((room, "reports"))])
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return env.get_template(name)


def data_uri(image: Image.Image, *, subsampling: int = -1) -> str:
    """A picture as JPEG in a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=subsampling)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def css_ramp() -> str:
    """The heatmap's colours as stops of a CSS gradient."""
    stops = colours(np.linspace(0, 1, 9)).tolist()
    return ", ".join(f"rgba({r}, {g}, {b}, {a / 255:.2f})" for r, g, b, a in stops)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted name, text)."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            yield show(name), show(", ".join(map(str, value)))
        else:
            yield show(name), "none" if value is None else show(str(value))


def unreadable_files(reasons: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """What a page says of files that could not be read, from (name, reason) of each."""
    rows = [(show(name), show(reason)) for name, reason in reasons]
    return {"unreadable": rows[:MAX_UNREADABLE], "n_unreadable": len(rows)}


def number(value: float) -> str:
    """Four significant digits, no negative zero."""
    return f"{value + 0.0:.4g}" if abs(value) > 1e-12 else "0"


def plural(n: int, noun: str) -> str:
    """A noun for n things."""
    return noun if n == 1 else f"{noun}s"
