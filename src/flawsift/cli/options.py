"""What the commands take, and what they make of it: options and their help, and the objects that they name."""

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

import typer

from flawsift.damage import parse_json
from flawsift.errors import InputError, ParameterError
from flawsift.screening.options import FINAL, FLAG, HELP, PRESETS, ScreenOptions

if TYPE_CHECKING:
    from flawsift.data.images import ImageSet
    from flawsift.datasets import Dataset
    from flawsift.detectors.base import Detector
    from flawsift.features.backbones import Backbone
    from flawsift.features.store import FeatureStore
    from flawsift.models.model import Model
    from flawsift.pipeline import Resources
    from flawsift.progress import Progress


class ExportName(StrEnum):
    """See `flawsift.reports.export.export`."""

    folder = "folder"
    csv = "csv"
    coco = "coco"
    fiftyone = "fiftyone"
    labelstudio = "labelstudio"


class Runtime(StrEnum):
    """See `flawsift.features.backbones.load_backbone`."""

    auto = "auto"
    torch = "torch"
    openvino = "openvino"


Preset = StrEnum("Preset", list(PRESETS))  # type: ignore[misc]  # named options of stage 1

Images = Annotated[
    list[str],
    typer.Argument(help="Folder of images, flat or nested; image files; or a pattern.", show_default=False),
]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.", show_default=False)]
DetectorPreset = Annotated[
    str, typer.Option("--detector-preset", help="'default', or another of `flawsift detectors`, such as 'paper'.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Detector parameter, such as coreset_ratio=0.1. Repeatable.")
]
BackboneName = Annotated[str, typer.Option("--backbone", help="efficientnet_lite0 (offline) or any timm name.")]
Weights = Annotated[Path | None, typer.Option("--weights", help="Local weights file of the backbone.")]
Size = Annotated[
    int | None,
    typer.Option(
        "--size",
        help="Pixels of the longer side that images are brought to, their aspect ratio kept. "
        "[of as many pixels as a square of 384 or 256, more of large images]",
    ),
]
TilesOption = Annotated[
    str | None,
    typer.Option(
        "--tiles",
        metavar="auto|EDGE[:OVERLAP]",
        help="Look at images in full, in tiles of so many pixels; auto cuts only what is larger than 1024. [auto]",
    ),
]
RoiOption = Annotated[
    str | None,
    typer.Option(
        "--roi",
        metavar="FILE|auto",
        help="Look only at a part of each image: white in a mask, inside polygons of a JSON file, or auto for what "
        "stands before a background of one colour.",
    ),
]
AlignOption = Annotated[
    bool,
    typer.Option(
        "--align",
        help="Turn and crop each image so that its part lies as all others do: for parts at any angle before a plain "
        "background.",
    ),
]
RuntimeOption = Annotated[Runtime, typer.Option("--runtime", help="What runs the backbone.")]
PresetOption = Annotated[
    Preset | None, typer.Option("--preset", help="Options of stage 1, where not given one by one. [default]")
]
Groups = Annotated[
    Path | None, typer.Option("--groups", help="CSV with columns file, group: images that belong together.")
]
RangeOption = Annotated[
    tuple[float, float] | None,
    typer.Option(
        "--range",
        metavar="LOW HIGH",
        help="Values of black and white, of images of more than 8 bits. [learned from all images]",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
ExecutorOption = Annotated[
    str, typer.Option("--executor", help="Where sub-models run: serial, process:N or ray:ADDRESS[,gpus=0.25].")
]
Cache = Annotated[Path | None, typer.Option("--cache", help="Feature cache. [~/.cache/flawsift or $FLAWSIFT_CACHE]")]
Rate = Annotated[
    float | None,
    typer.Option("--false-alarm-rate", help="Share of good parts that may be stopped: 0.01 is 1 of 100."),
]
Decisions = Annotated[
    Path | None, typer.Option("--decisions", help="CSV with columns path, decision: keep, remove or unsure.")
]
Reviewed = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of a screening, or of a model.", show_default=False)
]
Root = Annotated[
    Path | None, typer.Option("--images", help="Folder of the images, where it is not the one that was screened.")
]
ModelFolder = Annotated[Path, typer.Argument(help="Folder written by `flawsift fit`.", show_default=False)]


@dataclass(frozen=True)
class DetectorChoice:
    """The detector of --detector, --detector-preset and --set."""

    detector: Annotated[str, typer.Option("--detector", help="See `flawsift detectors`.")] = FINAL
    detector_preset: DetectorPreset = "default"
    settings: Settings = None

    def make(self, seed: int) -> "Detector":
        """The unfitted detector."""
        from flawsift.detectors.registry import make_detector

        params: dict[str, Any] = {"seed": seed}
        for setting in self.settings or ():
            key, equals, value = setting.partition("=")
            if not equals:
                raise ParameterError(f"--set needs name=value, got '{setting}'.")
            try:
                params[key] = parse_json(value, parse_int=_whole_number)
            except ParameterError as error:
                raise ParameterError(f"--set {key}: {error}") from None
            except ValueError:
                params[key] = value  # a bare word is a text: coreset=random
        return make_detector(self.detector, self.detector_preset, **params)


@dataclass(frozen=True)
class BackboneChoice:
    """The backbone of --backbone, --weights, --size, --tiles and --runtime."""

    backbone: BackboneName = "efficientnet_lite0"
    weights: Weights = None
    size: Size = None
    tiles: TilesOption = None
    runtime: RuntimeOption = Runtime.auto

    def load(self, device: str, images: "ImageSet") -> "Backbone":
        """The backbone, of a size that fits the images where none is given."""
        from flawsift.features.backbones import MAX_SIZE, MIN_SIZE, fitting_size, load_backbone, typical_picture
        from flawsift.features.tiling import GRID, tiles_of

        tiles, longer, multiple = tiles_of(self.tiles), self.size, multiple_of(self.backbone)
        if longer is not None and not MIN_SIZE <= longer <= MAX_SIZE:
            raise ParameterError(f"--size must be between {MIN_SIZE} and {MAX_SIZE} pixels, got {longer}.")
        if tiles is not None:
            multiple = math.lcm(multiple, GRID)
            picture = typical_picture(images) or (tiles[0], tiles[0])
            longer = longer or max(picture if images.alignment is None else images.alignment.size(picture))
        return load_backbone(
            self.backbone,
            weights=self.weights,
            size=fitting_size(images, longer, multiple=multiple),
            tiles=tiles,
            runtime=self.runtime.value,
            device=device,
        )


@dataclass(frozen=True)
class Machine:
    """Where it runs, of --seed, --device, --executor and --cache."""

    seed: Seed = 0
    device: Device = "auto"
    executor: ExecutorOption = "serial"
    cache: Cache = None

    def resources(self, progress: "Progress") -> "Resources":
        """What `flawsift.screen` and `flawsift.fit` take of it."""
        from flawsift.executors import make_executor

        executor = make_executor(self.executor)
        return {
            "store": store_of(self.cache),
            "seed": self.seed,
            "device": self.device,
            "executor": executor,
            "progress": progress,
        }


@dataclass(frozen=True)
class ModelChoice:
    """The model of MODEL, --weights and --runtime."""

    model: ModelFolder
    weights: Weights = None
    runtime: RuntimeOption = Runtime.auto

    def load(self) -> "Model":
        """The model."""
        from flawsift.models.model import load_model

        return load_model(self.model, weights=self.weights, runtime=self.runtime.value)


class StageOne:
    """The options of stage 1: those of --preset, and in their place what is given one by one.

    Its fields are made of `ScreenOptions`, where each option is declared with its help.
    """

    preset: str | None

    @property
    def options(self) -> ScreenOptions | None:
        """The options, or None where none was given."""
        given = {f.name: getattr(self, f.name, None) for f in dataclasses.fields(ScreenOptions)}
        changes = {name: value for name, value in given.items() if value is not None}
        if "keep" in changes:
            changes["keep"] = _share(changes["keep"])
        if self.preset is None and not changes:
            return None
        return ScreenOptions.of(str(self.preset or "default"), **changes)


def _stage_one(name: str, *without: str) -> type[StageOne]:
    """`StageOne` with an option for each field of `ScreenOptions`, but for some; None where it is not given."""
    options: list[tuple[str, Any, Any]] = [("preset", PresetOption, field(default=None))]
    for f in dataclasses.fields(ScreenOptions):
        if f.name not in without:
            flag = f.metadata.get(FLAG) or "--" + f.name.replace("_", "-")
            default = "" if f.default is None else f" [preset: {f.default}]".lower()
            shown = typer.Option(flag, help=f.metadata[HELP] + default)
            options.append((f.name, Annotated[_plain(f.type) | None, shown], field(default=None)))
    return dataclasses.make_dataclass(name, options, bases=(StageOne,), frozen=True)


def _plain(kind: Any) -> Any:
    """The type of a field as typer takes it: a share that may be a word too is a text."""
    if get_origin(kind) is Literal:
        return kind
    parts = get_args(kind) if isinstance(kind, UnionType) or get_origin(kind) is not None else (kind,)
    plain = [part for part in parts if part in (str, int, float, bool)]
    return str if len(plain) < len([p for p in parts if p is not type(None)]) else plain[0]


if TYPE_CHECKING:
    ScreeningStage: TypeAlias = StageOne
    FitStage: TypeAlias = StageOne
else:
    ScreeningStage = _stage_one("ScreeningStage", "screener")  # of `screen`, whose detector is --detector
    FitStage = _stage_one("FitStage")


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters of dataclass types become one option per field: typer knows flat parameters only."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, list[str]]] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind = parameter.annotation
        if not dataclasses.is_dataclass(kind):
            parameters.append(parameter)
            continue
        assert isinstance(kind, type)
        hints = get_type_hints(kind, include_extras=True)
        groups[parameter.name] = kind, [f.name for f in dataclasses.fields(kind)]
        for f in dataclasses.fields(kind):
            default = f.default if parameter.default is parameter.empty else getattr(parameter.default, f.name)
            default = parameter.empty if default is dataclasses.MISSING else default
            made = inspect.Parameter(f.name, parameter.KEYWORD_ONLY, default=default, annotation=hints[f.name])
            parameters.append(made)

    @functools.wraps(command)
    def flat(**given: Any) -> None:
        for name, (kind, fields) in groups.items():
            given[name] = kind(**{key: given.pop(key) for key in fields})
        command(**given)

    ordered = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    flat.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    flat.__annotations__ = {p.name: p.annotation for p in parameters}
    return flat


def multiple_of(backbone: str) -> int:
    """What the edges of a network's input are multiples of: transformers name their patch."""
    from flawsift.features.backbones import MULTIPLE

    named = re.search(r"patch(\d+)", backbone)
    patch = int(named[1]) if named else MULTIPLE
    return patch if patch >= MULTIPLE or MULTIPLE % patch else MULTIPLE


def images_in(
    given: Sequence[str],
    groups: Path | None,
    value_range: tuple[float, float] | None = None,
    region: str | None = None,
    align: bool = False,
    *,
    progress: "Progress",
) -> "ImageSet":
    """The images of a folder, of some files or of a pattern, with groups of a file, and how they are looked at."""
    from flawsift.data.alignment import learn
    from flawsift.data.folders import read_groups
    from flawsift.data.inputs import as_images
    from flawsift.data.roi import read_region

    images = given[0] if len(given) == 1 else list(given)
    known = None if groups is None else read_groups(groups)
    found = as_images(images, groups=known, value_range=value_range, progress=progress)
    if region is not None:
        found = found.looked_at(read_region(region, found))
    return found.aligned(learn(found)) if align else found


def tested_images(data: "Dataset") -> "ImageSet":
    """The published test images of a set that has some, else all.

    Raises:
        InputError: Nothing is known about the images.
    """
    from flawsift.datasets.folder import LAYOUTS

    if not len(data.truth):
        raise InputError(f"'{data.name}' has no labels to measure with: it is a folder of images. {LAYOUTS}.")
    return data.images.select(data.test_ids) if len(data.test_ids) else data.images


def store_of(cache: Path | None) -> "FeatureStore":
    """The feature cache of --cache."""
    from flawsift.features.store import FeatureStore

    return FeatureStore() if cache is None else FeatureStore(cache)


def _whole_number(digits: str) -> int:
    """One that arrays can hold; no parameter needs a larger one."""
    number = int(digits)
    if not -(2**63) <= number < 2**63:
        raise ParameterError(f"whole numbers have at most 18 digits, got {digits[:30]}.")
    return number


def _share(keep: str) -> float | str:
    if keep == "auto":
        return keep
    try:
        return float(keep)
    except ValueError:
        raise ParameterError(f"--keep must be 'auto' or a share such as 0.4, got '{keep}'.") from None
