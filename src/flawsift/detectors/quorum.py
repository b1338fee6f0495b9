"""Quorum: a patch is normal when several other images have one like it."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, islice
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from flawsift.data.frames import with_lowest
from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.parts.groups import GroupNeighbors
from flawsift.detectors.parts.maps import embed_batch
from flawsift.detectors.parts.positions import PlacedGroups, are_edges, check_grid, is_tiling, windows
from flawsift.detectors.parts.training import UNWATCHED, Watch
from flawsift.detectors.protocols import Evidence, HeldOut
from flawsift.errors import InputError, NotFittedError
from flawsift.features.devices import resolve_device
from flawsift.progress import Progress, silent
from flawsift.types import Ids, as_shape

AUTO: Literal["auto"] = "auto"
FEWEST, MOST = 2, 16  # groups that are asked for by "auto": one alone is no quorum, more than 16 gained on no set
GROWTH = 1.08  # what more groups may do to the score of an ordinary image, see `n_groups`
N_ASKED = 100  # images that this is told by: their median moves by less than a hundredth
SHARP = 0.25  # of the places, the highest: they hold the defects, and cost as much again as the scores
N_SCALED = 20  # images by which single patches are brought on the scale of scores
STAYS = ("k_", "scale_", "drawn_", "grid_", "size_")  # of what was learned, when images come and go
N_SHOWN = 3  # groups whose nearest patch is named as evidence


@dataclass(kw_only=True, eq=False)
class Quorum(Detector):
    """Mean distance of a patch to its nearest patch in each of the k nearest groups of images.

    With d(q, g) the distance from a patch q to the nearest patch of a group g (of an image, where there are no groups),
    s(q) is the mean of the k smallest d(q, g), and an image scores as its worst patch. All patches of all images are
    kept: a bank that is thinned over images forgets how many images have a patch like this one, and a defect that is in
    it once explains every other of its kind. Here k groups must have one like it.

    The score of a training image leaves its own group out, and so is drawn as the score of a new image is: the ranking
    of stage 1, the threshold and the detector are one computation (`held_out`), and no sub-model is trained.

    k is chosen from the images. The more groups are asked, the more images with the same defect it takes to hide it;
    but where good parts vary, only few groups have what is rare and good. So k is the largest for which the held-out
    score of the median image is at most 8 % above that for k = 1. That image is a good one as long as most are, so k
    hardly moves with the contamination: 2 to 4 for screws at any angle, 7 to 16 for textures and parts in a fixture.

    Where scores are high, the map is of single patches instead of means of four: it shows where a defect ends.

    Cost: 2 P^2 N C flops per image scored, for P patches of C channels and N images in the bank: 8 GFLOP for 256, 152
        and 400. Memory: 4 P N C bytes with bfloat16, 62 MB there, 6 with float32; 2 are saved.
    Contamination: Resisted while fewer than k groups share a defect. Nothing need be left out.
    Differs from the paper: There is none. Relatives: PatchCore (embedding, distance to a bank), InReaCh (channels that
        span many images) and MuSc (mean distance to the nearest 30 % of the images of a test set).
    Reference: Roth et al., CVPR 2022, arXiv 2106.08265; McIntosh & Albu, ICCV 2023; Li et al., ICLR 2024, arXiv
        2401.16753.

    Attributes:
        n_groups: k; "auto" as above, between 2 and 16.
        max_images: Most images in the bank, drawn by whole groups; None for all. A score needs k near groups, not all.
        tiles_by_position: "EDGE:OVERLAP" in pixels of the network's input, for cameras that stand still: patches are
            compared only with those of the same tile of other images (`flawsift.detectors.parts.positions`). What is
            ordinary elsewhere is then no excuse, and the search is shorter. None compares them with those anywhere.
        precision: "float32" for products of that precision on every machine; "auto" takes bfloat16 where that is
            quicker, which moves distances by about 0.2 %.
    """

    name: ClassVar[str] = "quorum"
    leaves_out_patches: ClassVar[bool] = True
    resists_defects: ClassVar[bool] = True
    patch_rejection: ClassVar[float] = 2.0  # for other detectors of stage 2, as PatchCore's
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}, "exact": {"precision": "float32"}}

    n_groups: int | Literal["auto"] = AUTO
    max_images: int | None = 1000
    tiles_by_position: str | None = None
    precision: Literal["auto", "float32"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = type(self.n_groups) is int and self.n_groups >= 1
        self._require("n_groups", self.n_groups == AUTO or counts, "be 'auto' or a whole number of at least 1")
        self._require("max_images", self.max_images is None or self.max_images >= 1, "be at least 1, or None")
        self._require("tiles_by_position", is_tiling(self.tiles_by_position), "be such as '512:256', or None")
        self._require("precision", self.precision in ("auto", "float32"), "be 'auto' or 'float32'")

    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        """See `Detector.fit`."""
        self._forget()
        target, n_given = resolve_device(device), len(data)
        data = self._drawn(data)
        self.drawn_ = len(data) < n_given
        patches, usable = [], []
        for batch in data.batches(self.layers):
            embedding = self._embed(batch)
            accepted = batch.accepted(*embedding.shape[2:])
            patches.append(_rows(embedding).half())
            usable.append(torch.ones(patches[-1].shape[:2]).bool() if accepted is None else accepted.flatten(1))
            if self.tiles_by_position is not None:
                self.grid_, self.size_ = list(embedding.shape[2:]), list(as_shape(batch.size))
        learned = torch.cat(usable).any(1) if usable else torch.zeros(0).bool()
        if not learned.any():
            raise InputError("Quorum.fit needs at least one image with a patch to learn from, got none.")
        if not all(part.isfinite().all() for part in patches):
            raise InputError("Quorum.fit got features that are not numbers, or beyond the range of float16.")
        self.memory_bank_ = torch.cat(patches)[learned]  # (N, P, C) float16, as features are stored
        self.usable_ = torch.cat(usable)[learned]  # (N, P), False where a patch was rejected
        self.ids_ = torch.from_numpy(data.ids)[learned]  # (N,)
        self.groups_ = list(compress(data.group_names, learned))  # (N,)
        some = data.select(data.ids[:: max(1, len(data) // N_SCALED)])
        asked = self._asked() if self.n_groups == AUTO else []

        def tell(done: int) -> None:
            watch.progress("learning", done, len(asked) + len(some))

        self.k_ = self._choose_k(target, tell) if self.n_groups == AUTO else int(self.n_groups)
        self.scale_ = self._find_scale(some, target, lambda n: tell(len(asked) + n))  # of single patches to scores
        return self

    def merged(self, other: Self) -> Self:
        """The model of all images of both, which must be different ones; k and the scale of maps are this one's."""
        if shared := set(self.ids_.tolist()) & set(other.ids_.tolist()):
            raise InputError(f"{len(shared)} images are in both models, such as number {min(shared)}.")
        mine, its = self.state(), other.state()
        both = {name: torch.cat([mine[name], its[name]]) for name in ("memory_bank_", "usable_", "ids_")}
        return self.with_state({**both, "groups_": self.groups_ + other.groups_, **self._learned()})

    def without(self, data: ImageSet, *, device: str = "auto") -> Self:
        """The model of the bank less these images, with the k that a fit of the others would choose.

        Scores are those of such a fit where the bank was not drawn (`n_drawn`); the scale of maps stays.
        """
        stays = ~torch.isin(self.ids_, torch.from_numpy(data.ids))
        if not stays.any():
            raise InputError("No image is left to learn from.")
        mine = self.state()
        rest = {name: mine[name][stays] for name in ("memory_bank_", "usable_", "ids_")}
        left = self.with_state({**rest, "groups_": list(compress(self.groups_, stays)), **self._learned()})
        if self.n_groups == AUTO and not stays.all():
            left.k_ = left._choose_k(resolve_device(device), lambda _: None)
        return left

    def held_out(self, data: ImageSet, *, device: str = "auto", progress: Progress = silent) -> HeldOut:
        """Scores, maps and evidence of images, each without its own group: of a training set, in one pass.

        Scores are those of a model of the other images with the same k.

        Raises:
            InputError: There is no image, or the bank holds no other group than that of an image.
            NotFittedError: It is not fitted.
        """
        if not self.fitted:
            raise NotFittedError("This Quorum is not fitted yet; call fit(images) first.")
        if not len(data):
            raise InputError("There is no image to score.")
        search = self._search(resolve_device(device))
        grids, scores, places, worst, patches, groups = [], [], [], [], [], []
        with torch.inference_mode():
            for batch, own, grid in self._without_own(search, data):
                place = grid.flatten(1).argmax(1)
                scores.append(self._image_scores(grid))
                grids.append(batch.over_image(grid))
                places.append(place)
                worst.append(place if batch.frame is None else batch.frame.place_over_image(place, *grid.shape[1:]))
                patches.append(_rows(self._embed(batch))[torch.arange(len(place)), place])
                groups.append(own)
                progress("held out", sum(map(len, groups)), len(data))
            maps = torch.cat(grids)
            if not maps.isfinite().all():
                raise InputError("Quorum compares images of different groups, and there is only one group.")
            at = torch.cat(places)
            near = search.nearest_patches(torch.cat(patches), at, min(N_SHOWN, search.n_groups), torch.cat(groups))
        distances, images, image_places = (part.cpu().numpy() for part in near)
        sizes = Counter(self.groups_)
        evidence = Evidence(
            grid=(maps.shape[1], maps.shape[2]),
            places=torch.cat(worst).numpy(),
            images=np.where(images >= 0, self.ids_.numpy()[images], -1),
            image_places=self._over_images(data, images, image_places, grid.shape[1:]),
            distances=distances,
            n_others=np.array([len(self.ids_) - sizes[group] for group in data.group_names]),
        )
        return HeldOut(torch.cat(scores).double().numpy(), maps, evidence)

    def held_out_scores(self, data: ImageSet, *, device: str = "auto") -> npt.NDArray[np.float64]:
        """(N,) scores of training images, each without its own group."""
        return self.held_out(data, device=device).scores

    def _maps(self, batch: Batch, device: str) -> Tensor:
        return self._score_batch(batch, device)[0]

    def _score_roughly(self, batch: Batch, device: str) -> tuple[Tensor, Tensor]:
        grids = batch.only_counted(self._to_grid(self._search(device), self._embed(batch)))
        return grids * self.scale_, self._image_scores(grids)

    def _score_batch(self, batch: Batch, device: str) -> tuple[Tensor, Tensor]:
        search = self._search(device)
        grids = batch.only_counted(self._to_grid(search, self._embed(batch)))
        maps = self._sharpened(search, embed_batch(batch, self.layers), grids)
        return counted_as(batch, maps, *grids.shape[1:]) * self.scale_, self._image_scores(grids)

    def _map_medians(self, maps: Tensor) -> Tensor:
        return super()._map_medians(maps) / self.scale_  # held-out maps are means of four patches, not scaled

    def _sharpened(self, search: PlacedGroups, fine: Tensor, grids: Tensor, own: Tensor | None = None) -> Tensor:
        """(B, H, W) maps on the grid of (B, C, H, W): of single patches where (B, h, w) scores are high, else those.

        Patches that are not averaged show where a defect ends. They score somewhat higher than means of four.
        """
        height, width = fine.shape[2:]
        low = grids.flatten(1).quantile(1 - SHARP, dim=1)[:, None, None]
        rows, columns = (torch.arange(n) // 2 for n in (height, width))
        maps = grids[:, rows][:, :, columns]
        high = maps >= low
        image, row, column = high.nonzero(as_tuple=True)
        out, places = None if own is None else own[image], row // 2 * grids.shape[2] + column // 2
        maps[high] = _mean_of(search.query(fine.permute(0, 2, 3, 1)[high], places, self.k_, out)).cpu()
        return maps

    def _to_grid(self, search: PlacedGroups, embedding: Tensor, own: Tensor | None = None) -> Tensor:
        """(B, h, w) scores s(q) of a (B, C, h, w) embedding, on the CPU; own (B,) are numbers of groups left out."""
        b, _, h, w = embedding.shape
        if self.tiles_by_position is not None:
            check_grid(self.grid_, (h, w))
        out, places = None if own is None else own.repeat_interleave(h * w), torch.arange(h * w).repeat(b)
        return _mean_of(search.query(_rows(embedding).flatten(0, 1), places, self.k_, out)).view(b, h, w).cpu()

    def _without_own(self, search: PlacedGroups, data: ImageSet) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Each batch, its groups' (B,) numbers, -1 for those not in the bank, and (B, h, w) scores without them."""
        numbers, names = self._numbers, iter(data.group_names)
        for batch in data.batches(self.layers):
            own = torch.tensor([numbers.get(name, -1) for name in islice(names, len(batch))])
            yield batch, own, batch.only_counted(self._to_grid(search, self._embed(batch), own))

    def _over_images(self, data: ImageSet, images: Ids, places: Ids, grid: Sequence[int]) -> Ids:
        """Places of patches in the network's input, of (N, n) images of the bank, as places over these images.

        Where there is no image, both are -1 and stay so.
        """
        there = images >= 0
        if data.reader is None or not (data.contents or data.poses) or not there.any():
            return places
        frame = data.frame_of(self.ids_[images[there]].tolist(), data.reader.size)
        over = places.copy()
        over[there] = frame.place_over_image(torch.from_numpy(places[there]), *grid).numpy()
        return over

    def _asked(self) -> list[int]:
        """Positions in the bank of the images that k is chosen by."""
        n = len(self.ids_)
        return torch.linspace(0, n - 1, min(N_ASKED, n)).long().tolist()

    def _choose_k(self, device: str, tell: Callable[[int], None]) -> int:
        """The largest number of groups that leaves the score of the median image within `GROWTH`.

        `tell` is called with the number of images that were asked.
        """
        search = self._search(device)
        numbers = self._group_numbers()
        curves: list[Tensor] = []
        for i in self._asked():
            tell(len(curves))
            places = self.usable_[i].nonzero()[:, 0]
            near = search.query(self.memory_bank_[i][places], places, MOST, numbers[i].repeat(len(places))).cpu()
            curves.append((near.cumsum(1) / torch.arange(1, MOST + 1)).amax(0))  # (MOST,) score for each k
        median = torch.stack(curves).quantile(0.5, dim=0)
        fits = median <= GROWTH * median[0]
        return max(FEWEST, int(fits.nonzero()[-1]) + 1 if fits.any() else 0)

    def _find_scale(self, some: ImageSet, device: str, tell: Callable[[int], None]) -> float:
        """The median of how much lower an image scores than the highest of its single patches, own group left out."""
        search, ratios = self._search(device), list[Tensor]()
        with torch.inference_mode():
            tell(0)
            for batch, own, grids in self._without_own(search, some):
                maps = self._sharpened(search, embed_batch(batch, self.layers), grids, own)
                ratios.append(self._image_scores(grids) / self._image_scores(maps))
                tell(sum(map(len, ratios)))
        usable = torch.cat(ratios)
        usable = usable[usable.isfinite() & (usable > 0)]
        return float(usable.median()) if len(usable) else 1.0

    def _learned(self) -> dict[str, Any]:
        """What stays when images come and go."""
        return {name: value for name, value in self.state().items() if name in STAYS}

    def _unlike_learned(self) -> list[str]:
        learned = vars(self).get
        k, scale, names = learned("k_"), learned("scale_"), learned("groups_")
        right = {
            "k_": type(k) is int and k >= 1,
            "scale_": type(scale) is float and 0 < scale < math.inf,
            "drawn_": type(learned("drawn_")) is bool,
            "groups_": isinstance(names, list)
            and len(names) == len(learned("ids_", ()))
            and all(type(n) is str for n in names),
        }
        if self.tiles_by_position is not None:
            right |= {name: are_edges(learned(name)) for name in ("grid_", "size_")}
        return [name for name, holds in right.items() if not holds]

    @property
    def n_drawn(self) -> int | None:
        """See `Detector.n_drawn`."""
        return len(self.ids_) if self.drawn_ else None

    @property
    def _numbers(self) -> dict[str, int]:
        """{group: its number}."""
        return {group: number for number, group in enumerate(dict.fromkeys(self.groups_))}

    def _group_numbers(self) -> Tensor:
        """(N,) number of the group of each image of the bank."""
        numbers = self._numbers
        return torch.tensor([numbers[group] for group in self.groups_])

    def _search(self, device: str) -> PlacedGroups:
        cut, exact = self.tiles_by_position, self.precision == "float32"

        def among(places: Tensor | slice) -> GroupNeighbors:
            usable = self.usable_[:, places]
            some = None if usable.all() else usable
            bank, groups = self.memory_bank_[:, places], self._group_numbers()
            return GroupNeighbors(bank, groups, usable=some, device=device, exact=exact)

        def make() -> PlacedGroups:
            return PlacedGroups(None if cut is None else windows(cut, as_shape(self.size_), self.grid_), among)

        return self._cached("search", device, make)

    def _drawn(self, data: ImageSet) -> ImageSet:
        """As many groups as `max_images` has room for, two at least."""
        if self.max_images is None or len(data) <= self.max_images:
            return data
        members = list(data.members.values())
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(members), generator=generator).tolist()
        totals = np.cumsum([len(members[g]) for g in order])
        n_drawn = max(FEWEST, int((totals <= self.max_images).sum()))
        return data.select(data.ids[sorted(position for g in order[:n_drawn] for position in members[g])])

    def _embed(self, batch: Batch) -> Tensor:
        """(B, C, h, w): PatchCore's embedding, averaged over 2 x 2 patches."""
        embedding = embed_batch(batch, self.layers)
        return F.avg_pool2d(embedding, 2, ceil_mode=True)  # at an odd border fewer than four


def counted_as(batch: Batch, maps: Tensor, h: int, w: int) -> Tensor:
    """(B, H, W) maps where only that counts whose four patches count together, on the (h, w) grid of scores."""
    counted = None if batch.frame is None else batch.frame.counted(h, w)
    if counted is None:
        return maps
    rows, columns = (torch.arange(n) // 2 for n in maps.shape[1:])
    return with_lowest(maps, counted[:, rows][:, :, columns])


def _rows(embedding: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h w, C)."""
    return embedding.flatten(2).transpose(1, 2)


def _mean_of(distances: Tensor) -> Tensor:
    """(Q,) means of the finite ones of (Q, k) ascending distances; inf where there is none."""
    finite = distances.isfinite()
    return torch.where(finite[:, 0], distances.where(finite, 0).sum(1) / finite.sum(1).clamp_min(1), torch.inf)
