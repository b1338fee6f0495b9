"""What the commands take, and what they make of it: options and their help, and the objects that they name."""

import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flawsift.errors import ParameterError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from flawsift.data.images import ImageSet
    from flawsift.datasets import Dataset
    from flawsift.detectors.base import Detector
    from flawsift.features.backbones import Backbone
    from flawsift.features.store import FeatureStore
    from flawsift.progress import Progress
    from flawsift.screening.stage1 import ScreenOptions


class Preset(StrEnum):
    """Named options of stage 1."""

    default = "default"
    paper = "paper"


class ConsensusName(StrEnum):
    """See `flawsift.screening.consensus.Consensus`."""

    mean = "mean"
    median = "median"
    trimmed_mean = "trimmed_mean"
    rank_mean = "rank_mean"


class NormalizeName(StrEnum):
    """See `flawsift.screening.consensus.Normalize`."""

    none = "none"
    robust = "robust"
    rank = "rank"


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


Images = Annotated[Path, typer.Argument(help="Folder of images, flat or nested.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.", show_default=False)]
DetectorName = Annotated[str, typer.Option("--detector", help="See `flawsift detectors`.")]
ScreenerName = Annotated[
    str | None, typer.Option("--screener", help="Detector of stage 1; 'own' for --detector. [preset: patchcore]")
]
DetectorPreset = Annotated[
    str, typer.Option("--detector-preset", help="'default', or another of `flawsift detectors`, such as 'paper'.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Detector parameter, such as coreset_ratio=0.1. Repeatable.")
]
BackboneName = Annotated[str, typer.Option("--backbone", help="efficientnet_lite0 (offline) or any timm name.")]
Weights = Annotated[Path | None, typer.Option("--weights", help="Local weights file of the backbone.")]
Size = Annotated[int, typer.Option("--size", help="Edge length in pixels that images are resized to.")]
RuntimeOption = Annotated[Runtime, typer.Option("--runtime", help="What runs the backbone.")]
PresetOption = Annotated[Preset, typer.Option("--preset", help="Options of stage 1, where not given one by one.")]
Subsets = Annotated[int | None, typer.Option("--subsets", help="Disjoint subsets k. [preset: 5]")]
Partitions = Annotated[int | None, typer.Option("--partitions", help="Independent random partitions. [preset: 1]")]
Keep = Annotated[str | None, typer.Option("--keep", help="'auto', or the share to keep such as 0.4. [preset: auto]")]
ConsensusOption = Annotated[ConsensusName | None, typer.Option("--consensus", help="How sub-models vote.")]
NormalizeOption = Annotated[NormalizeName | None, typer.Option("--normalize", help="How they come on one scale.")]
ExcludeOwn = Annotated[
    bool | None, typer.Option("--exclude-own/--include-own", help="Leave out the sub-model that trained on the image.")
]
DivergenceWeight = Annotated[float | None, typer.Option("--divergence-weight", help="Weight of the paper's eq. 2.")]
RejectPatches = Annotated[
    float | None,
    typer.Option("--reject-patches", help="Robust deviations above which a patch is not learned from; 0 rejects none."),
]
Groups = Annotated[
    Path | None, typer.Option("--groups", help="CSV with columns file, group: images that belong together.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
ExecutorOption = Annotated[
    str, typer.Option("--executor", help="Where sub-models run: serial, process:N or ray:ADDRESS[,gpus=0.25].")
]
Cache = Annotated[Path | None, typer.Option("--cache", help="Feature cache. [~/.cache/flawsift or $FLAWSIFT_CACHE]")]
Rate = Annotated[float | None, typer.Option("--false-alarm-rate", help="Share of good parts that may be stopped.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
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


def say(as_json: bool, result: dict[str, Any], lines: Sequence[str]) -> None:
    """Print a result: one JSON object, or lines for people."""
    text = json.dumps(result, ensure_ascii=False, default=str) if as_json else "\n".join(lines)
    typer.echo(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def threshold_lines(threshold: Any) -> list[str]:
    """What is said about a threshold."""
    if threshold is None:
        return ["No threshold: one image gives no held-out scores to calibrate with. Scores are still ranked."]
    text = (
        f"Threshold {threshold.value:.4g}: about {threshold.per_hundred:.2g} false alarms per 100 good parts expected"
    )
    if threshold.limited:
        text += f" ({threshold.n_calibration} images cannot support {100 * threshold.false_alarm_rate:g} per 100)"
    return [text + "."]


def images_in(folder: Path, groups: Path | None) -> "ImageSet":
    """The images of a folder, with groups from a CSV file."""
    from flawsift.data.folders import read_groups
    from flawsift.data.images import ImageSet

    return ImageSet.from_folder(folder, groups=None if groups is None else read_groups(groups))


def tested_images(data: "Dataset") -> "ImageSet":
    """The published test images of a set that has some, else all."""
    return data.images.select(data.test_ids) if len(data.test_ids) else data.images


def detector_of(name: str, preset: str, settings: Sequence[str] | None, seed: int) -> "Detector":
    """The detector of --detector, --detector-preset and --set."""
    from flawsift.detectors.base import make_detector

    params: dict[str, Any] = {"seed": seed}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise ParameterError(f"--set needs name=value, got '{setting}'.")
        try:
            params[key] = json.loads(value)
        except ValueError:
            params[key] = value  # a bare word is a text: coreset=random
    return make_detector(name, preset, **params)


def backbone_of(name: str, weights: Path | None, size: int, runtime: Runtime, device: str) -> "Backbone":
    """The backbone of --backbone, --weights, --size, --runtime and --device."""
    from flawsift.features.backbones import load_backbone

    return load_backbone(name, weights=weights, size=size, runtime=runtime.value, device=device)


def store_of(cache: Path | None) -> "FeatureStore":
    """The feature cache of --cache."""
    from flawsift.features.store import FeatureStore

    return FeatureStore() if cache is None else FeatureStore(cache)


def screen_options(
    preset: Preset,
    subsets: int | None,
    partitions: int | None,
    keep: str | None,
    consensus: ConsensusName | None,
    normalize: NormalizeName | None,
    exclude_own: bool | None,
    divergence_weight: float | None,
    reject_patches: float | None,
) -> "ScreenOptions":
    """The options of stage 1: a preset's, and in their place what is given one by one."""
    from flawsift.screening.stage1 import PRESETS, check_options

    options: dict[str, Any] = dict(PRESETS[preset.value])
    given = {
        "n_subsets": subsets,
        "n_partitions": partitions,
        "keep": _share(keep),
        "consensus": None if consensus is None else consensus.value,
        "normalize": None if normalize is None else normalize.value,
        "exclude_own": exclude_own,
        "divergence_weight": divergence_weight,
        "reject_patches": reject_patches,
    }
    options |= {key: value for key, value in given.items() if value is not None}
    check_options(options)
    return options  # type: ignore[return-value]  # the keys are those of ScreenOptions, checked just above


def _share(keep: str | None) -> float | str | None:
    if keep is None or keep == "auto":
        return keep
    try:
        return float(keep)
    except ValueError:
        raise ParameterError(f"--keep must be 'auto' or a share such as 0.4, got '{keep}'.") from None


def shown_progress() -> "AbstractContextManager[Progress]":
    """A progress bar on stderr when that is a terminal, else silence."""
    from flawsift.progress import as_progress

    return as_progress(sys.stderr.isatty())
