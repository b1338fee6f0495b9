"""Images by global id: where pixels come from, and nothing about what they mean.

`ImageSet` is the one type that detectors, screening and the feature cache speak. It is an ordered view on
unlabelled images, addressed by global ids only: ids survive every selection, positions never leave a function.
Labels live in `flawsift.data.truth.GroundTruth` and cannot reach `fit`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flawsift.data.alignment import Alignment, Pose
from flawsift.data.decoding import check_array, to_pixels
from flawsift.data.folders import EXTENSIONS, groups_by_id, scan_folder, tell_animations, with_pages
from flawsift.data.frames import Frame, Region
from flawsift.data.listing import parts_among
from flawsift.data.sources import ArraySource as ArraySource
from flawsift.data.sources import FileSource as FileSource
from flawsift.data.sources import MixedSource as MixedSource
from flawsift.data.sources import Source as Source
from flawsift.data.values import ValueRange
from flawsift.data.views import check_view, derive
from flawsift.errors import InputError
from flawsift.paths import MAX_NAMED, name_some, show
from flawsift.types import Ids, Shape, Size, as_shape


@dataclass(frozen=True)
class Batch:
    """What a detector sees of some images.

    Attributes:
        ids: (B,) global ids.
        features: {layer: (B, C, h, w)} float32, keyed by the layer names that were asked for.
        pixels: (B, 3, H, W) float32 in [0, 1], only when asked for.
        size: Of the network input in pixels.
        memo: What detectors derive from the features, so that sub-models on one batch derive it once.
        rejected: (B, h, w) bool on some patch grid over the images, True where a patch is not to be learned from; None
            for nowhere.
        frame: How the images lie in the network's input; None where each takes all of it, and all of it counts.
    """

    ids: Ids
    features: Mapping[str, Tensor]
    pixels: Tensor | None
    size: Size
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)
    rejected: Tensor | None = None
    frame: Frame | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def accepted(self, h: int, w: int) -> Tensor | None:
        """(B, h, w) bool, True where a patch of this grid may be learned from; None when all may.

        A coarse patch that touches a rejected fine one is rejected, and so is what does not count (`frame`).
        """
        counted = None if self.frame is None else self.frame.counted(h, w)
        if self.rejected is None:
            return None if counted is None else counted.expand(len(self), h, w)
        if self.frame is not None and self.frame.turns is not None:
            free = ~self.frame.marks_turned(self.rejected, h, w)
            return free if counted is None else free & counted
        marked = self.rejected[:, None].float()
        if h >= marked.shape[2]:
            free = F.interpolate(marked, (h, w), mode="nearest")[:, 0] == 0
        else:
            free = F.adaptive_max_pool2d(marked, (h, w))[:, 0] == 0
        if self.frame is None:
            return free
        free = ~self.frame.from_image(~free)
        return free if counted is None else free & counted

    def only_counted(self, maps: Tensor) -> Tensor:
        """(B, h, w) maps, what does not count being as low as the lowest that does."""
        return maps if self.frame is None else self.frame.only_counted(maps)

    def counted_or_nan(self, maps: Tensor) -> Tensor:
        """(B, h, w) maps, nan where a patch does not count."""
        counted = None if self.frame is None else self.frame.counted(*maps.shape[1:])
        return maps if counted is None else maps.masked_fill(~counted.to(maps.device), torch.nan)

    @property
    def map_size(self) -> Size:
        """Of maps over the images, in pixels."""
        return self.size if self.frame is None or self.frame.turns is None else self.frame.map_shape

    def over_image(self, maps: Tensor) -> Tensor:
        """(B, h, w) maps over the network's input as maps over the images."""
        return maps if self.frame is None else self.frame.over_image(maps)


class FeatureReader(Protocol):
    """What `flawsift.features.extraction` attaches to an `ImageSet`: frozen features by id."""

    @property
    def size(self) -> Size: ...
    @property
    def key(self) -> str: ...
    def read(self, images: "ImageSet", layers: Sequence[str]) -> dict[str, Tensor]: ...


@dataclass(frozen=True, eq=False)
class ImageSet:
    """An ordered view on unlabelled images, addressed by global ids only.

    Attributes:
        ids: (N,) global ids in the order of the view.
        source: Where pixels come from.
        groups: {global id: group name} for images that belong together (views of one object, exposures of one
            part). An id that is not in it, or in a group without a name, is a group of its own.
        reader: Frozen features, attached by `flawsift.attach`; None for pixels only.
        derived: Name of the derived view that pixels and features are of; "" for the images themselves.
        rejected: {global id: (h, w) bool}, True where a patch is not to be learned from (`without_patches`).
        contents: {global id: rows and columns of the network's input that the image takes}, of those that do not take
            all; known where features are attached.
        region: The part of each image that counts; None for all.
        alignment: How images are turned and cropped before they are looked at; None leaves them as they are.
        poses: {global id: where the part lies}, of aligned images; known where features are attached.
    """

    ids: Ids
    source: Source
    groups: Mapping[int, str] = field(default_factory=dict)
    reader: FeatureReader | None = None
    derived: str = ""
    rejected: Mapping[int, npt.NDArray[np.bool_]] = field(default_factory=dict)
    contents: Mapping[int, Shape] = field(default_factory=dict)
    region: Region | None = None
    alignment: Alignment | None = None
    poses: Mapping[int, Pose] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, root: str | Path, *, groups: Mapping[str, str] | None = None) -> Self:
        """All images below a folder, nested or flat, ids 0..N-1 in sorted order of their relative paths.

        Links are followed, each real folder once, so loops end. Masks of a data set and heatmaps that flawsift wrote
        are left out, which is logged; see `flawsift.data.listing`.

        Args:
            root: The folder.
            groups: {relative path: group name}.

        Raises:
            InputError: The folder is missing, not a folder, or has no image, or no group is of one of them.
        """
        root = Path(root)
        names = with_pages(root, parts_among(root, scan_folder(root)))
        if not names:
            kinds = ", ".join(sorted(EXTENSIONS))
            raise InputError(f"No images in '{show(root)}'. Looked in all sub-folders for {kinds}.")
        tell_animations(root, names)
        by_id = dict(enumerate(names))
        return cls(np.arange(len(names), dtype=np.int64), FileSource(root, by_id), groups_by_id(by_id, groups or {}))

    @classmethod
    def from_files(cls, root: str | Path, names: Mapping[int, str]) -> Self:
        """The files `root / names[id]` under the ids given."""
        source = FileSource(Path(root), dict(names))
        return cls(source.ids, source)

    @classmethod
    def from_arrays(cls, arrays: Sequence[npt.NDArray[Any]], *, ids: Sequence[int] | None = None) -> Self:
        """Images in memory; they are not copied, so leave them as they are.

        Args:
            arrays: Each (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), as `flawsift.data.decoding.from_array` takes it.
            ids: One distinct id per array; None for 0..N-1.

        Raises:
            InputError: An array has another shape or type, or the ids do not fit.
        """
        ids = range(len(arrays)) if ids is None else ids
        if len(ids) != len(arrays) or len(set(ids)) != len(ids):
            raise InputError(f"ids must be one distinct id per array, got {len(ids)} ids for {len(arrays)} arrays.")
        given = [np.asanyarray(array) for array in arrays]  # a masked array stays one, and is refused
        for position, array in enumerate(given):
            check_array(array, f"Image {position}")
        source = ArraySource({int(i): array for i, array in zip(ids, given, strict=True)})
        return cls(source.ids, source)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        where = f" below '{show(self.source.root)}'" if isinstance(self.source, FileSource) else ""
        notes = [f"features of {self.reader.key}"] if self.reader is not None else []
        notes += [f"derived view '{self.derived}'"] if self.derived else []
        notes += [f"{self.n_groups} groups"] if self.n_groups is not None else []
        listed = f": {name_some(self.names)}" if len(self) else ""
        return f"ImageSet of {len(self)} images{where}{listed}" + (f"\nwith {', '.join(notes)}" if notes else "")

    def select(self, ids: npt.ArrayLike) -> Self:
        """The view of these global ids, in their order.

        Raises:
            InputError: An id is not in this view, or appears twice.
        """
        wanted = np.asarray(ids, dtype=np.int64).reshape(-1)
        missing = wanted[~np.isin(wanted, self.ids)]
        if len(missing):
            raise InputError(f"{len(missing)} ids are not in this set: {missing[:MAX_NAMED].tolist()}.")
        if len(np.unique(wanted)) != len(wanted):
            raise InputError("ids to select must be distinct.")
        return replace(self, ids=wanted)

    def view(self, name: str) -> Self:
        """The same ids under a derived view, such as "rotate:5" (see `data.views`); "" gives the images themselves.

        Raises:
            ParameterError: There is no such view.
        """
        check_view(name)
        return replace(self, derived=name)

    @property
    def value_range(self) -> ValueRange | None:
        """Which values are black and white, of images of more than 8 bits; None where it was not learned or given."""
        return self.source.value_range

    def within(self, value_range: ValueRange | None) -> Self:
        """The same images, those of more than 8 bits read by a range of values; None leaves what they have."""
        if value_range is None or value_range == self.value_range:
            return self
        return replace(self, source=self.source.within(value_range))

    def looked_at(self, region: Region | None) -> Self:
        """The same images, of which only a region counts; None for all of them.

        Raises:
            InputError: They are aligned, so that a fixed region has no meaning.
        """
        if region is not None and self.alignment is not None:
            raise InputError("A region of interest and --align exclude each other: aligned parts have no fixed place.")
        return self if region is self.region else replace(self, region=region)

    def aligned(self, alignment: Alignment | None) -> Self:
        """The same images, turned and cropped so that their parts lie alike; None leaves them as they are.

        Features that are attached of images seen in another way are not theirs, and gone.

        Raises:
            InputError: They have a region of interest.
        """
        if alignment == self.alignment:
            return self
        if self.region is not None:
            raise InputError("A region of interest and --align exclude each other: aligned parts have no fixed place.")
        return replace(self, alignment=alignment, poses={}, contents={}, reader=None)

    @property
    def seen_as(self) -> str:
        """What tells these pixels from those of the images themselves: alignment and derived view; "" for nothing."""
        return " ".join(filter(None, ["" if self.alignment is None else self.alignment.key, self.derived]))

    def without_patches(self, rejected: Mapping[int, npt.NDArray[np.bool_]]) -> Self:
        """The same images, less some patches for detectors that can leave out patches when they learn.

        Args:
            rejected: {global id: (h, w) bool}, all on one grid; images that are not in it keep all their patches.
        """
        return replace(self, rejected=rejected)

    @property
    def names(self) -> list[str]:
        """(N,) relative paths, in the order of the view."""
        return [self.source.name(int(i)) for i in self.ids]

    @property
    def group_names(self) -> list[str]:
        """(N,) group of each image; an image without one is alone in a group that no other id can have."""
        return [self.groups.get(int(i)) or f"\0id:{i}" for i in self.ids]

    @property
    def members(self) -> dict[str, list[int]]:
        """{group: positions of its images in the view}, groups in the order of their first images."""
        positions: dict[str, list[int]] = {}
        for position, group in enumerate(self.group_names):
            positions.setdefault(group, []).append(position)
        return positions

    @property
    def n_groups(self) -> int | None:
        """How many groups there are, an image alone being one too; None where no image has a group."""
        return len(self.members) if any(self.groups.get(i) for i in self.ids.tolist()) else None

    def image(self, id_: int) -> Image.Image:
        """The decoded RGB image in its own size, upright.

        Raises:
            UnreadableImage: It cannot be decoded.
        """
        return self.source.image(int(id_))

    def pixels_of(self, id_: int, size: Size) -> Tensor:
        """One image as (3, H, W) uint8 in a network's input, under the derived view.

        Raises:
            UnreadableImage: It cannot be decoded.
        """
        return derive(to_pixels(self.looked_at_in(self.image(id_), id_), size), self.derived)

    def looked_at_in(self, image: Image.Image, id_: int) -> Image.Image:
        """What is looked at of one of the images: all of it, or its part, turned and cropped."""
        if self.alignment is None:
            return image
        return self.alignment.crop(image, self.poses.get(int(id_)) or self.alignment.pose(image))

    def pixels(self, size: Size) -> Tensor:
        """All images of the set as (N, 3, H, W) uint8 in a network's input, under the derived view."""
        if not len(self):
            return torch.empty(0, 3, *as_shape(size), dtype=torch.uint8)
        return torch.stack([self.pixels_of(int(i), size) for i in self.ids])

    def batches(
        self,
        layers: Sequence[str],
        *,
        pixels: bool = False,
        batch_size: int = 32,
        shuffle: np.random.Generator | None = None,
    ) -> Iterator[Batch]:
        """The set in batches of frozen features, in order unless a generator shuffles it.

        Args:
            layers: Layers to read.
            pixels: Read pixels too.
            batch_size: Images in a batch; the last one may be smaller.
            shuffle: Draws the order.

        Raises:
            InputError: No features are attached.
        """
        if self.reader is None:
            raise InputError("This ImageSet has no features. Attach them first: flawsift.attach(images, backbone).")
        ids = self.ids if shuffle is None else shuffle.permutation(self.ids)
        for start in range(0, len(ids), batch_size):
            part = replace(self, ids=ids[start : start + batch_size])
            size = self.reader.size
            seen = part.pixels(size).float().div_(255) if pixels else None
            features = self.reader.read(part, layers) if layers else {}
            yield Batch(part.ids, features, seen, size, rejected=part._rejected_patches(), frame=part._frame(size))

    @property
    def rejected_share(self) -> float:
        """Share of the patches of the set that are not to be learned from."""
        lost = sum(float(self.rejected[i].mean()) for i in self.ids.tolist() if i in self.rejected)
        return lost / len(self) if len(self) else 0.0

    def _frame(self, size: Size) -> Frame | None:
        """How the images lie in the network's input; a turned view of one has no such frame."""
        if self.derived.startswith("rotate") or (self.region is None and not self.contents and not self.poses):
            return None
        return self.frame_of(self.ids.tolist(), size)

    def frame_of(self, ids: Sequence[int], size: Size) -> Frame:
        """How some images lie in a network's input; of those whose features are not attached, as if they filled it."""
        shape = as_shape(size)
        contents = None
        if any(i in self.contents for i in ids):
            contents = torch.tensor([self.contents.get(i, shape) for i in ids], dtype=torch.float64)
        if (alignment := self.alignment) is None:
            return Frame(shape, contents, self.region)
        poses = [self.poses.get(i) for i in ids]
        crops = [np.eye(2, 3) if pose is None else alignment.to_crop(pose) for pose in poses]
        turns = torch.from_numpy(np.stack(crops)) if crops else None
        return Frame(shape, contents, turns=turns, finer=alignment.finer)

    def _rejected_patches(self) -> Tensor | None:
        masks = [self.rejected.get(int(i)) for i in self.ids]
        shape = next((m.shape for m in masks if m is not None), None)
        if shape is None:
            return None
        return torch.from_numpy(np.stack([np.zeros(shape, bool) if m is None else m for m in masks]))
