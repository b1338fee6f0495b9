"""What a person knows of images: labels and masks of defects. Metrics take it and nothing else does."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flawsift.data.listing import read_regular
from flawsift.errors import InputError
from flawsift.types import Ids


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Labels and defect masks of images, addressed by global ids. The only type that knows labels.

    Args:
        ids: Global ids of the images, (N,), each once.
        labels: 0 for normal and 1 for anomalous, (N,).
        defect_types: Kind of defect of each image, (N,); "good" for normal images.
        masks: The mask of each anomalous image that has one, by id: a file, or an array (H, W). Non-zero is defect.

    Raises:
        InputError: Lengths differ, an id comes twice, a label is neither 0 nor 1, or a mask belongs to no image.
    """

    ids: Ids
    labels: NDArray[np.int8]
    defect_types: tuple[str, ...]
    masks: Mapping[int, Path | NDArray[np.bool_]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", np.asarray(self.ids, dtype=np.int64).reshape(-1))
        object.__setattr__(self, "labels", checked_labels(self.labels))
        sizes = (len(self.ids), len(self.labels), len(self.defect_types))
        if len(set(sizes)) > 1:
            raise InputError("Give one of each per image, got {} ids, {} labels and {} defect types.".format(*sizes))
        known, counts = np.unique(self.ids, return_counts=True)
        refuse(known[counts > 1].tolist(), "ids that come more than once", "Give each image one id.")
        refuse(sorted(set(self.masks) - set(known.tolist())), "masks of no image", "Key the masks by these ids.")

    def __len__(self) -> int:
        """Number of images, N."""
        return len(self.ids)

    @property
    def has_masks(self) -> bool:
        """Whether every anomalous image has a mask (true too when no image is anomalous)."""
        return all(i in self.masks for i in self.ids[self.labels == 1].tolist())

    @property
    def contamination(self) -> float:
        """Share of anomalous images, alpha; InputError if there are no images."""
        if len(self) == 0:
            raise InputError("The contamination of no images is undefined.")
        return float(np.mean(self.labels))

    def select(self, ids: ArrayLike) -> Self:
        """The ground truth of some images, in the order of `ids` (M,).

        Raises:
            InputError: An id is unknown or comes twice.
        """
        wanted = np.asarray(ids, dtype=np.int64).reshape(-1)
        at = self._positions(wanted)
        types = tuple(self.defect_types[i] for i in at)
        masks = {i: self.masks[i] for i in wanted.tolist() if i in self.masks}
        return type(self)(ids=wanted, labels=self.labels[at], defect_types=types, masks=masks)

    def mask(self, image_id: int, shape: tuple[int, int]) -> NDArray[np.bool_] | None:
        """The defect pixels of one image on a grid of `shape` (h, w); None for an anomalous image without a mask.

        A normal image gives all False. Any non-zero value of any colour channel is defect; alpha channels are ignored.
        Down-sizing preserves the maximum: a source pixel falls on the target pixel that holds its centre, and one
        defect pixel makes it defect, so that tiny defects survive. Up-sizing takes the nearest source pixel.

        Raises:
            InputError: The id is unknown, or the mask cannot be read or is not (H, W).
        """
        if self.labels[self._positions(np.array([image_id]))[0]] == 0:
            return np.zeros(shape, dtype=np.bool_)
        source = self.masks.get(image_id)
        if source is None:
            return None
        mask = _read_mask(source) if isinstance(source, Path) else np.asarray(source) != 0
        if mask.ndim != 2 or mask.size == 0:
            raise InputError(f"The mask of image {image_id} has shape {mask.shape}; give (H, W).")
        return _resize_rows(_resize_rows(mask, shape[0]).T, shape[1]).T

    def _positions(self, ids: Ids) -> Ids:
        place = {image_id: at for at, image_id in enumerate(self.ids.tolist())}
        refuse([i for i in ids.tolist() if i not in place], "unknown ids", "Ask for ids of this ground truth.")
        return np.array([place[i] for i in ids.tolist()], dtype=np.int64)


def _read_mask(path: Path) -> NDArray[np.bool_]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read_regular(path))) as image:
            # Opacity is no defect, and a number that stands for a colour of a palette says nothing by itself.
            plain = image.convert("RGB") if image.mode in ("P", "PA", "LA", "RGBA") else image
            values = np.atleast_3d(np.asarray(plain))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for broken PNG files
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise InputError(f"The mask {path} cannot be read: {reason}. Check the file.") from error
    mask: NDArray[np.bool_] = (values != 0).any(axis=2)
    return mask


def _resize_rows(mask: NDArray[np.bool_], size: int) -> NDArray[np.bool_]:
    """The mask (H, W) with `size` rows, by the rule of `GroundTruth.mask`, in integers: rounding could shift a row."""
    rows = len(mask)
    if size > rows:
        return mask[(2 * np.arange(size) + 1) * rows // (2 * size)]
    target = (2 * np.arange(rows) + 1) * size // (2 * rows)  # each target row gets at least one source row
    smaller: NDArray[np.bool_] = np.logical_or.reduceat(mask, np.searchsorted(target, np.arange(size)), axis=0)
    return smaller


def checked_labels(labels: ArrayLike) -> NDArray[np.int8]:
    """(N,) labels, all 0 or 1; InputError if one is neither."""
    array = np.asarray(labels).reshape(-1)
    wrong = np.unique(array[(array != 0) & (array != 1)]).tolist()
    refuse(wrong, "kinds of label that are neither 0 nor 1", "Give 0 for normal and 1 for anomalous.")
    return array.astype(np.int8)


def refuse(offenders: list[Any], what: str, remedy: str) -> None:
    """Raise InputError if there are offenders: how many, what they are, at most five of them, and what to do."""
    if offenders:
        some = ", ".join(map(str, offenders[:5])) + (", ..." if len(offenders) > 5 else "")
        raise InputError(f"There are {len(offenders)} {what}: {some}. {remedy}")
