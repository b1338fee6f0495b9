"""Mask files to defect pixels: whatever wrote them, by one rule."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from flawsift.data import tiff
from flawsift.data.decoding import deep_of
from flawsift.data.listing import read_regular
from flawsift.data.unreadable import UnreadableImage
from flawsift.errors import InputError, one_line
from flawsift.paths import file_and_page, show


class MaskFile(NamedTuple):
    """What a mask file says, or several of one image.

    Attributes:
        defect: (H, W), True where the defect is.
        has_black: False where no pixel is zero, so that the smallest value was taken for the background.
    """

    defect: NDArray[np.bool_]
    has_black: bool


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
    return tiff.turned(open_masks(files).defect, orientation)


def open_masks(files: Sequence[Path]) -> MaskFile:
    """As `read_mask`, with how it was understood.

    Raises:
        InputError: As `read_mask`.
    """
    masks = [_read(path) for path in files]
    shapes = [mask.defect.shape for mask in masks]
    if len(set(shapes)) > 1:
        sizes = ", ".join(f"{show(p.name)} {w} x {h}" for p, (h, w) in zip(files, shapes, strict=True))
        raise InputError(f"The masks of one image in {show(files[0].parent)} have different sizes: {sizes}.")
    defect = np.logical_or.reduce([mask.defect for mask in masks])
    return MaskFile(defect, all(mask.has_black for mask in masks))


def _read(path: Path) -> MaskFile:
    file, page = file_and_page(path.parent, path.name)
    try:
        data = read_regular(file)
        if not data:
            raise UnreadableImage("empty file (0 bytes)")
        deep = deep_of(data, page)
        if deep is not None:
            return _defect(_strength(deep.values), deep.opacity, is_lossy=False)
        with Image.open(io.BytesIO(data)) as opened:
            if page:
                opened.seek(page)
            is_lossy, image = opened.format in LOSSY, ImageOps.exif_transpose(opened)
    except tiff.UNREADABLE as error:
        reason = (isinstance(error, OSError) and error.strerror) or one_line(error)
        raise InputError(f"The mask {show(path)} cannot be read: {reason}. Check the file.") from error
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


def _defect(strength: NDArray[Any], opacity: NDArray[Any] | None, *, is_lossy: bool) -> MaskFile:
    visible = np.ones(strength.shape, np.bool_)
    if opacity is not None and opacity.min() < opacity.max():
        visible = opacity > 0
        seen = strength[visible]
        if seen.min() == seen.max():  # of one colour: opacity alone says where the defect is
            return MaskFile(visible, True)
    least, most = strength[visible].min(), strength[visible].max()
    if is_lossy:
        return MaskFile(visible & (strength > most / 2), True)
    has_black = not 0 < least < most
    return MaskFile(visible & (strength > (0 if has_black else least)), has_black)
