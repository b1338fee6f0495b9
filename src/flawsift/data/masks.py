"""Mask files to defect pixels: whatever wrote them, by one rule."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from flawsift.data import tiff
from flawsift.data.decoding import deep_of
from flawsift.errors import InputError, one_line
from flawsift.paths import file_and_page, show

LOSSY = ("JPEG", "MPO", "WEBP")  # formats that smear: what is nearly black in them is black


def read_mask(files: Sequence[Path], orientation: int = 1) -> NDArray[np.bool_]:
    """(H, W), True where one of the files shows a defect.

    A file is read as an image is: the content decides, EXIF orientation is applied. Of a page of a TIFF, the path ends
    in "#page=2". Any value of any colour channel that is not zero is defect: 0 and 1, 0 and 255, or numbers of kinds of
    defects alike. In JPEG files, values above half of the largest are. Where no pixel is zero and values differ, the
    smallest is the background. Transparent pixels are no defect, and where opacity alone says where it is, it does.

    Args:
        files: One or several of one image, of one size.
        orientation: EXIF's, from 1 to 8, by which the files are turned in addition.

    Raises:
        InputError: A file cannot be read, or sizes differ.
    """
    masks = [_read(path) for path in files]
    if len({mask.shape for mask in masks}) > 1:
        sizes = ", ".join(f"{show(p.name)} {m.shape[1]} x {m.shape[0]}" for p, m in zip(files, masks, strict=True))
        raise InputError(f"The masks of one image in {show(files[0].parent)} have different sizes: {sizes}.")
    return tiff.turned(np.logical_or.reduce(masks), orientation)


def _read(path: Path) -> NDArray[np.bool_]:
    file, page = file_and_page(path.parent, path.name)
    try:
        data = file.read_bytes()
        deep = deep_of(data, page) if data else None
        if deep is not None:
            return _defect(_strength(deep.values), deep.opacity, is_lossy=False)
        with Image.open(io.BytesIO(data)) as opened:
            if page:
                opened.seek(page)
            is_lossy, image = opened.format in LOSSY, ImageOps.exif_transpose(opened)
    except tiff.UNREADABLE as error:
        raise InputError(f"The mask {show(path)} cannot be read: {one_line(error)}. Check the file.") from error
    opacity = None
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        rgba = image.convert("RGBA")
        image, opacity = rgba.convert("RGB"), np.asarray(rgba.getchannel("A"))
    elif image.mode == "P":
        image = image.convert("RGB")  # a number that stands for a colour of a palette says nothing by itself
    elif image.mode == "CMYK":
        image = image.convert("RGB")
    return _defect(_strength(np.asarray(image)), opacity, is_lossy=is_lossy)


def _strength(values: NDArray[Any]) -> NDArray[Any]:
    """(H, W), the largest channel of what is no black."""
    flat = values if values.ndim == 2 else values.max(axis=2)
    return np.nan_to_num(np.abs(flat.astype(np.float64)) if flat.dtype.kind == "f" else flat)


def _defect(strength: NDArray[Any], opacity: NDArray[Any] | None, *, is_lossy: bool) -> NDArray[np.bool_]:
    visible = np.ones(strength.shape, np.bool_)
    if opacity is not None and opacity.min() < opacity.max():
        visible = opacity > 0
        seen = strength[visible]
        if seen.min() == seen.max():  # of one colour: opacity alone says where the defect is
            return visible
    least = strength.max() / 2 if is_lossy else strength[visible].min()
    return visible & (strength > (least if is_lossy or least < strength.max() else 0))
