"""Stage 2 with decisions of a person, in a process of its own (`python -m flawsift.review.refit`).

Progress goes to stdout, one JSON object a line. The process ends when its stdin is closed, so that none is left behind
when whoever started it is killed.
"""

import argparse
import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from flawsift.damage import DAMAGE, json_object
from flawsift.data.roi import read_region
from flawsift.detectors.base import Detector
from flawsift.detectors.registry import make_detector
from flawsift.errors import FlawsiftError, InputError
from flawsift.features.backbones import UNSAID, Backbone, load_backbone
from flawsift.features.store import FeatureStore
from flawsift.files import Parts, write_bytes
from flawsift.models.calibration import DEFAULT_RATE
from flawsift.models.record import JSON, calibration_of, content_of, told_damage
from flawsift.paths import show
from flawsift.pipeline import SCREENING, FitResult, fit
from flawsift.progress import Progress, silent
from flawsift.screening.result import Screening
from flawsift.screening.storage import images_of, load_screening

LEFT_OUT, TAKEN_BACK = "left out, which the screening kept", "taken back, which the screening had set aside"
MAX_NAMES = 100  # of images that moved, in a list on the page


def refit(
    screening: str | Path,
    out: str | Path,
    *,
    decisions: str | Path,
    images: str | Path | None = None,
    cache: str | Path | None = None,
    region: str | Path | None = None,
    progress: Progress = silent,
) -> FitResult:
    """Train on what a screening keeps once a person has decided.

    Detector, backbone and false-alarm rate are those of the model that is replaced; where there is none, detector and
    backbone are those of the screening. Scores of another region of interest are other scores: the images are screened
    anew then, to `out/screening`, with the options of before; decisions and region are copied there.

    Args:
        screening: Its folder.
        out: The model folder.
        decisions: What a person decided.
        images: The images' folder; None takes the one that was screened.
        cache: Feature cache; None takes the default one.
        region: A file as for `flawsift.data.roi.read_region`; where it is not there, the region is the screening's.
        progress: As for `flawsift.pipeline.fit`.

    Raises:
        InputError: The screening, its images or the decisions cannot be used.
        ModelError: The model that is replaced is damaged.
        OutputError: `out` cannot be written.
    """
    stage1, out = load_screening(screening), Path(out)
    detector, backbone, rate = _parts(stage1, out)
    pictures = images_of(stage1, images)
    before = pictures.region
    if region is not None and Path(region).exists():
        pictures = pictures.looked_at(read_region(str(region), pictures))
    is_new = pictures.region != before
    result = fit(
        pictures,
        detector,
        backbone,
        screening=None if is_new else screening,
        options=stage1.options if is_new else None,
        decisions=decisions,
        false_alarm_rate=rate,
        out=out,
        store=FeatureStore(Path(cache)) if cache is not None else FeatureStore(),
        seed=stage1.seed,
        progress=progress,
    )
    if is_new and region is not None:
        for file in (Path(decisions), Path(region)):
            copy = out / SCREENING / file.name
            if not copy.exists():  # else it is this file, or one with decisions of its own
                write_bytes(copy, file.read_bytes())
    return result


def _parts(stage1: Screening, out: Path) -> tuple[Detector, Backbone, float]:
    """Detector, backbone and false-alarm rate of the model to be."""
    if (replaced := _replaced(out)) is not None:
        return replaced
    try:
        return *_made(stage1.provenance["detector"], stage1.provenance["backbone"]["spec"]), DEFAULT_RATE
    except DAMAGE as error:
        raise InputError(f"The screening does not say how it was made: {error!r}. Screen the folder again.") from error


def _replaced(out: Path) -> tuple[Detector, Backbone, float] | None:
    """Those of the model in a folder, unfitted; None where there is no model.

    Raises:
        ModelError: It is damaged: what it was made with is not guessed.
    """
    with told_damage(out):
        parts = Parts.of(out)
        if JSON not in parts:
            return None
        model, detector = content_of(out), json_object(parts.read("detector.json"))
        return *_made(detector, model["backbone"]["spec"]), float(
            model["training"].get("false_alarm_rate", DEFAULT_RATE)
        )


def _made(detector: Mapping[str, Any], spec: Mapping[str, Any]) -> tuple[Detector, Backbone]:
    return make_detector(detector["name"], **detector["params"]), load_backbone(**{**UNSAID, **spec})


@dataclass(frozen=True, eq=False)
class Before:
    """What a refit is compared with.

    Attributes:
        is_kept: {name as shown: whether the screening by itself keeps the image}.
        n_kept: Images that the replaced model counts as good; None where there is none.
        threshold: Of the replaced model, likewise, or where it has none.
    """

    is_kept: Mapping[str, bool]
    n_kept: int | None = None
    threshold: float | None = None

    @classmethod
    def of(cls, screening: Screening, out: Path) -> Self:
        """Of a screening, and of the model in a folder, if there is one that can be read."""
        names = (show(name) for name in screening.names)
        is_kept = dict(zip(names, screening.is_kept.tolist(), strict=True))
        try:
            content = content_of(out)
            training = content["training"]
            made = calibration_of(content).threshold(float(training.get("false_alarm_rate", DEFAULT_RATE)))
            return cls(is_kept, int(training["n_kept"]), None if made is None else made.value)
        except (OSError, *DAMAGE):  # there is none; what is damaged is told by `refit`
            return cls(is_kept)


def summary_of(result: FitResult, out: Path, before: Before) -> dict[str, Any]:
    """What a person wants to know of the new model, and what has changed."""
    training, threshold = result.model.training, result.model.threshold()
    train = result.plan.train
    kept = {show(n) for n, k in zip(train.names, np.isin(train.ids, result.plan.kept).tolist(), strict=True) if k}
    left_out = [name for name, was_kept in before.is_kept.items() if was_kept and name not in kept]
    taken_back = [name for name, was_kept in before.is_kept.items() if not was_kept and name in kept]
    return {
        "n_kept": training["n_kept"],
        "n_images": training["n_images"],
        "threshold": None if threshold is None else threshold.value,
        "promise": None if threshold is None else threshold.promise,
        "before": {"n_kept": before.n_kept, "threshold": before.threshold},
        "moved": [
            {"to": to, "n": len(names), "names": names[:MAX_NAMES]}
            for to, names in ((LEFT_OUT, left_out), (TAKEN_BACK, taken_back))
        ],
        "warning": result.model.calibration.warning,
        "seconds": training["seconds"],
        "out": show(out),
        "report": show(result.report or ""),
        "screened_anew": training["screener"] is not None,
    }


def _say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    try:
        while os.read(0, 1 << 10):  # not of sys.stdin: its lock, held here, would abort the process when it ends
            pass
    except OSError:  # started by hand, without one
        return
    os._exit(3)  # from a thread: nothing is half-written, since all files are written in one step


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one refit, told by arguments."""
    parser = argparse.ArgumentParser(prog="flawsift.review.refit")
    for name in ("screening", "out", "decisions", "images", "cache", "region"):
        parser.add_argument(f"--{name}", type=Path)
    given = vars(parser.parse_args(arguments))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        before = Before.of(load_screening(given["screening"]), given["out"])
        result = refit(**given, progress=lambda stage, done, total: _say(stage=stage, done=done, total=total))
    except (FlawsiftError, OSError, MemoryError) as error:
        _say(error=show(" ".join(str(error).split())) or type(error).__name__)
        return 2
    _say(result=summary_of(result, given["out"], before))
    return 0


if __name__ == "__main__":
    sys.exit(main())
