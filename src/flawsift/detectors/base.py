"""The detector interface: hyper-parameters are the dataclass fields, learned state ends in an underscore.

An author of a detector writes `fit` and `_maps`; `predict`, `clone`, `save` and `load` are written once, here.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, cast, get_args, get_origin

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from torch import Tensor

from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.parts.maps import to_image_grid
from flawsift.detectors.parts.state import flat, holds_tensors, shapes_of
from flawsift.detectors.parts.training import UNWATCHED, Watch
from flawsift.errors import ModelError, NotFittedError, ParameterError
from flawsift.features.devices import resolve_device
from flawsift.files import content_digest, write_bytes, write_json
from flawsift.progress import Progress, silent
from flawsift.types import Ids, Size, as_shape

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Prediction:
    """Scores and maps of some images.

    Attributes:
        ids: (N,) global ids in the order asked.
        scores: (N,) float32, unbounded, higher is more anomalous.
        maps: (N, H, W) float32 over the images, as many cells as the network's input has pixels, or None where not
            asked for.
        map_medians: (N,) float32, what the median patch of each image scores: a defect leaves it low, another product
            does not. None where nobody has looked.
    """

    ids: Ids
    scores: npt.NDArray[np.float32]
    maps: npt.NDArray[np.float32] | None
    map_medians: npt.NDArray[np.float32] | None = None


class Scored(NamedTuple):
    """What one detector says of images, on the patch grid.

    Attributes:
        scores: (N,) float32.
        map_medians: (N,) float32, of the patches of each image.
        grids: (N, h, w) maps over the images; empty where they are not to be kept.
        size: Of the network's input.
    """

    scores: npt.NDArray[np.float32]
    map_medians: npt.NDArray[np.float32]
    grids: Tensor
    size: Size


@dataclass(kw_only=True, eq=False)
class Detector(ABC):
    """Learns normality from unlabelled images. Higher scores are more anomalous.

    A score never depends on which other images are scored. All fields are hyper-parameters and survive JSON; the
    learned state is every attribute whose name ends in an underscore: tensors (on the CPU, of finite numbers),
    {name: tensor}, numbers, texts, lists. Attributes that begin with one are caches (`_cached`): not saved, not
    pickled, forgotten by a new fit.

    Attributes:
        layers: Backbone layers to read: exact names, or aliases such as "stride8".
        seed: Of everything random in `fit`.
    """

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]
    reads_pixels: ClassVar[bool] = False
    # Robust deviations above which a stage 1 by this detector takes a patch out of the training of stage 2, by default;
    # 0, for none, where its maps are poor evidence on single patches.
    patch_rejection: ClassVar[float] = 0.0
    # Whether it leaves out rejected patches when it learns (`Batch.accepted`).
    leaves_out_patches: ClassVar[bool] = False
    # Whether defects in its training set teach it what one is, so that taking them out makes it worse.
    learns_from_defects: ClassVar[bool] = False
    # Whether it is best trained on all that no person removed: to leave out what stage 1 sets aside costs it more.
    resists_defects: ClassVar[bool] = False
    # Raised when names or meanings of the learned state change: older saved states are refused.
    state_format: ClassVar[int] = 1

    layers: Sequence[str] = field(default=("stride8", "stride16"))
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        listed = isinstance(self.layers, list | tuple) and all(isinstance(layer, str) for layer in self.layers)
        self._require("layers", listed, 'be a list of names, such as ["stride8"]')  # a text would fall into letters
        self.layers = tuple(self.layers)  # JSON has lists only
        self._require("layers", bool(self.layers), "name at least one layer")
        self._require("seed", self.seed >= 0, "not be negative")

    @property
    def views(self) -> tuple[str, ...]:
        """Derived views of the training images that `fit` reads beside the images; see `flawsift.data.views`."""
        return ()

    @abstractmethod
    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        """Learn from all images of the set and return self; a former fit is forgotten.

        Args:
            data: N images with features attached, of the images and of `views`.
            device: "auto" takes a GPU where there is one.
            watch: Told how far a training is, and where it may keep a checkpoint; closed forms do not need it.

        Raises:
            InputError: The set is empty or has no features attached.
            TrainingError: The training diverged.
        """

    @abstractmethod
    def _maps(self, batch: Batch, device: str) -> Tensor:
        """(B, h, w) anomaly maps on the detector's patch grid, on any device."""

    def _image_scores(self, maps: Tensor) -> Tensor:
        """(B,) image scores from (B, h, w) patch-grid maps: the worst patch."""
        return maps.amax((1, 2))

    def _expected(self, batch: Batch, device: str) -> Tensor | None:
        """(B, C, h, w) the normal features that the model expects in place of each patch; None if it has none.

        Sub-models are compared by it in the divergence of stage 1.
        """
        return None

    def predict(self, data: ImageSet, *, device: str = "auto", maps: bool = True, batch_size: int = 32) -> Prediction:
        """Score and localise.

        Args:
            data: N images with features attached.
            device: "auto" takes a GPU where there is one.
            maps: Also make (N, H, W) maps, in the size of the network's input; over aligned images, of as many pixels.
            batch_size: Images at a time; does not change a score.

        Raises:
            NotFittedError: `fit` was not called.
        """
        (scored,) = score_together([self], data, device, batch_size, keep_grids=maps)
        if not maps:
            return Prediction(data.ids, scored.scores, None, scored.map_medians)
        # in pieces: the image grid is many times larger than the patch grid
        grids, size = scored.grids, scored.size
        starts = range(0, len(grids), batch_size)
        full = [to_image_grid(grids[start : start + batch_size], size, self._map_sigma()) for start in starts]
        stacked = torch.cat(full).numpy() if full else np.empty((0, *as_shape(size)), np.float32)
        return Prediction(data.ids, scored.scores, stacked, scored.map_medians)

    def predict_patch_maps(self, data: ImageSet, *, device: str = "auto") -> tuple[npt.NDArray[np.float32], Tensor]:
        """(N,) scores and (N, h, w) maps on the patch grid, not upsampled: all that stage 1 needs."""
        (scored,) = score_together([self], data, device, 32, keep_grids=True)
        return scored.scores, scored.grids

    def _map_sigma(self) -> float | None:
        """Of the Gaussian on maps, in pixels; None for that of all detectors, which scales with the input's size."""
        return None

    def _score_batch(self, batch: Batch, device: str) -> tuple[Tensor, Tensor]:
        """(B, h, w) patch-grid maps and (B,) image scores."""
        maps = batch.only_counted(self._maps(batch, device))
        return maps, self._image_scores(maps)

    def _score_roughly(self, batch: Batch, device: str) -> tuple[Tensor, Tensor]:
        """`_score_batch` where nobody looks at the maps: the same scores, maps perhaps coarser for less work."""
        return self._score_batch(batch, device)

    def _map_medians(self, maps: Tensor) -> Tensor:
        """(B,) the median of each of (B, h, w) maps, nan aside, on the scale of held-out maps."""
        return maps.flatten(1).nanmedian(1).values

    @property
    def n_drawn(self) -> int | None:
        """How many images it rests on where it drew them from those that it was fitted on; None where on all."""
        return None

    @property
    def fitted(self) -> bool:
        """Whether there is learned state."""
        return bool(self.state())

    def params(self) -> dict[str, Any]:
        """The hyper-parameters, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def clone(self, **changes: Any) -> Self:
        """An unfitted detector with the same hyper-parameters, or with some changed."""
        return dataclasses.replace(self, **changes)

    def state(self) -> dict[str, Any]:
        """The learned state, {attribute: value}; empty before `fit`."""
        return {k: v for k, v in vars(self).items() if k.endswith("_") and not k.startswith("_")}

    def with_state(self, state: Mapping[str, Any]) -> Self:
        """A clone that has learned what `state` of a detector of this class and these hyper-parameters returned.

        Raises:
            ModelError: A name is not one of learned state, so that it would replace something else, or a value is none
                that such a detector learns.
        """
        if wrong := sorted(n for n in state if not n.endswith("_") or n.startswith("_") or hasattr(type(self), n)):
            raise ModelError(f"{type(self).__name__} learns nothing of the name {', '.join(wrong)}. Fit it again.")
        fitted = self.clone()
        vars(fitted).update(state)
        if wrong := fitted._unlike_learned():
            raise ModelError(f"{type(self).__name__} learns no such {', '.join(wrong)}. Fit it again.")
        return fitted

    def _unlike_learned(self) -> list[str]:
        """Names of learned values, other than tensors, that are missing or that no fit leaves."""
        return []

    def save(self, folder: Path) -> str:
        """Write detector.json and a safetensors file into an existing folder; nothing is pickled.

        The state's file is named by its content and detector.json is written last, so a kill leaves the old detector.

        Returns:
            SHA-256 of detector.json.

        Raises:
            NotFittedError: There is nothing to save.
            OutputError: The folder cannot be written.
        """
        if not self.fitted:
            raise NotFittedError(f"This {type(self).__name__} is not fitted yet; call fit(images) first.")
        state = self.state()
        by_name = {k: v.contiguous() for k, v in flat(state).items()}
        tensors = save(by_name)
        digest = content_digest(tensors)
        file = f"state-{digest[:16]}.safetensors"
        write_bytes(folder / file, tensors)
        plain = {k: v for k, v in state.items() if not holds_tensors(v)}
        content = {"name": self.name, "state_format": self.state_format, "params": self.params(), "state": plain}
        content |= {"file": file, "sha256": digest, "tensors": shapes_of(by_name)}
        write_json(folder / "detector.json", content)
        for old in folder.glob("state-*.safetensors"):
            if old.name != file:
                old.unlink(missing_ok=True)
        return content_digest((folder / "detector.json").read_bytes())

    def _cached(self, key: str, device: str, make: Callable[[], T]) -> T:
        """What `make` derives from the learned state for a device: made once, not saved, forgotten by a new fit."""
        cache: dict[tuple[str, str], Any] = vars(self).setdefault("_cache", {})
        if (key, device) not in cache:
            cache[key, device] = make()
        return cast(T, cache[key, device])

    def _forget(self) -> None:
        for key in [*self.state(), *(k for k in vars(self) if k.startswith("_"))]:
            delattr(self, key)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}

    def _check_types(self) -> None:
        """Numbers where numbers belong: parameters come from JSON and the command line too."""
        for f in dataclasses.fields(self):
            plain = [t for t in (get_args(f.type) or (f.type,)) if t in (int, float, str, bool, NoneType)]
            if not plain or get_origin(f.type) not in (None, UnionType):
                continue  # Literals and sequences are checked by their values
            value = getattr(self, f.name)
            fits = type(value) in plain or (float in plain and type(value) is int)
            names = " or ".join("None" if t is NoneType else t.__name__ for t in plain)
            self._require(f.name, fits, f"be of type {names}")
            if float in plain and value is not None:
                self._require(f.name, abs(value) <= torch.finfo(torch.float32).max, "be a number that float32 holds")

    def _require(self, parameter: str, holds: bool, constraint: str) -> None:
        if not holds:
            got = getattr(self, parameter)
            raise ParameterError(f"{type(self).__name__}.{parameter} must {constraint}, got {got!r}.")


def score_together(
    models: Sequence[Detector],
    data: ImageSet,
    device: str,
    batch_size: int,
    *,
    keep_grids: bool,
    progress: Progress = silent,
) -> list[Scored]:
    """Scores by each of some fitted detectors of one kind, in one pass that shares what they derive from a batch.

    `progress` is told of images.

    Raises:
        NotFittedError: One is not fitted.
    """
    for model in models:
        if not model.fitted:
            raise NotFittedError(f"This {type(model).__name__} is not fitted yet; call fit(images) first.")
    target = resolve_device(device)
    size: Size = 0
    scores: list[list[Tensor]] = [[] for _ in models]
    medians: list[list[Tensor]] = [[] for _ in models]
    grids: list[list[Tensor]] = [[] for _ in models]
    with torch.inference_mode():
        for batch in data.batches(models[0].layers, pixels=models[0].reads_pixels, batch_size=batch_size):
            size = batch.map_size
            for m, model in enumerate(models):
                score = model._score_batch if keep_grids else model._score_roughly
                batch_maps, batch_scores = score(batch, target)
                scores[m].append(batch_scores.float().cpu())
                medians[m].append(model._map_medians(batch.counted_or_nan(batch_maps)).float().cpu())
                if keep_grids:
                    grids[m].append(batch.over_image(batch_maps.float().cpu()))
            progress("scored", sum(map(len, scores[0])), len(data))
    return [
        Scored(_joined(s), _joined(middle), torch.cat(g) if g else torch.empty(0, 1, 1), size)
        for s, middle, g in zip(scores, medians, grids, strict=True)
    ]


def _joined(parts: Sequence[Tensor]) -> npt.NDArray[np.float32]:
    """(N,) numbers of all batches."""
    joined: npt.NDArray[np.float32] = torch.cat([torch.empty(0), *parts]).numpy()
    return joined
