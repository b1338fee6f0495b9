"""Single patches of images as pictures: what an image was set aside for, and what comes closest to it elsewhere."""

from PIL import Image, ImageDraw

from flawsift.reports.overlays import DARK, LIGHT

EDGE = 96  # pixels of the long edge: sharp at a quarter of a card
PATCHES = 3  # a crop is so many patches wide: a patch means little without what is around it
LEAST = 48  # pixels of the original: fewer show no shape

Box = tuple[float, float, float, float]  # left, upper, right, lower


def patch_box(size: tuple[int, int], grid: tuple[int, int], place: int) -> Box:
    """A patch in pixels of its image: (left, upper, right, lower).

    The network saw the image as a square, so a patch has the shape of the image.

    Args:
        size: Width and height of the image.
        grid: Rows and columns of the patch grid.
        place: The patch, row-major.
    """
    row, column = divmod(place, grid[1])
    width, height = size[0] / grid[1], size[1] / grid[0]
    return column * width, row * height, (column + 1) * width, (row + 1) * height


def crop_box(size: tuple[int, int], grid: tuple[int, int], place: int) -> tuple[int, int, int, int]:
    """What is shown of an image for a patch: a square around it that is moved into the image, and no larger than it.

    Args:
        size: Width and height of the image.
        grid: Rows and columns of the patch grid.
        place: The patch, row-major.

    Returns:
        Left, upper, right, lower in pixels; the whole patch is within.
    """
    left, upper, right, lower = patch_box(size, grid, place)
    side = round(max(LEAST, PATCHES * max(right - left, lower - upper)))
    x0, x1 = _span((left + right) / 2, side, size[0])
    y0, y1 = _span((upper + lower) / 2, side, size[1])
    return x0, y0, x1, y1


def crop(image: Image.Image, grid: tuple[int, int], place: int) -> Image.Image:
    """A patch and what is around it, `EDGE` pixels long, with a line around the patch.

    Args:
        image: The whole image.
        grid: Rows and columns of the patch grid.
        place: The patch, row-major.

    Returns:
        RGB; the aspect ratio of the image is kept.
    """
    box = crop_box(image.size, grid, place)
    scale = EDGE / max(box[2] - box[0], box[3] - box[1])
    size = tuple(max(1, round(scale * (end - start))) for start, end in ((box[0], box[2]), (box[1], box[3])))
    picture = image.convert("RGB").crop(box).resize((size[0], size[1]), Image.Resampling.BICUBIC)
    patch = patch_box(image.size, grid, place)
    x0, y0, x1, y1 = (round(scale * (edge - start)) for edge, start in zip(patch, box[:2] * 2, strict=True))
    draw = ImageDraw.Draw(picture)
    for margin, colour in ((2, DARK), (1, LIGHT)):  # outside the patch, which is what matters
        draw.rectangle((x0 - margin, y0 - margin, x1 + margin - 1, y1 + margin - 1), outline=colour)
    return picture


def _span(middle: float, length: int, limit: int) -> tuple[int, int]:
    """From where to where a length around a middle lies once it is moved within 0 and the limit."""
    length = min(length, limit)
    start = min(max(round(middle - length / 2), 0), limit - length)
    return start, start + length
