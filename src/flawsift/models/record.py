"""model.json: what is told of a model, read and checked without its networks."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flawsift.damage import DAMAGE, json_object
from flawsift.errors import ModelError
from flawsift.files import DamagedPart, Parts, content_digest
from flawsift.models.calibration import DEFAULT_RATE, Calibration

FORMAT = 1  # of the model folder
JSON = "model.json"
LABELLED = "labelled"  # in the record of a training: which labelled images the threshold comes from
THRESHOLD_KEYS = ("false_alarm_rate", LABELLED)  # of that record: what a later threshold changes


def load_calibration(folder: str | Path) -> tuple[Calibration, float, str]:
    """Calibration of a model, the false-alarm rate that it was fitted with, and its `Model.id`, without its networks.

    Raises:
        ModelError: The folder is missing, damaged or newer than this version.
    """
    with told_damage(Path(folder)):
        content = content_of(Path(folder))
        rate = float(content["training"].get("false_alarm_rate", DEFAULT_RATE))
        return calibration_of(content), rate, model_id(content["training"])


def calibration_of(content: Mapping[str, Any]) -> Calibration:
    """That of model.json, with its rate tried; a score that is no number would put every image below it."""
    calibration = Calibration.from_json(content["calibration"])
    if not np.isfinite(calibration.scores).all():
        raise ValueError("a score of its calibration is no number")
    calibration.threshold(float(content["training"].get("false_alarm_rate", DEFAULT_RATE)))
    return calibration


def content_of(folder: Path) -> dict[str, Any]:
    content = json_object(Parts.of(folder).read(JSON))
    if not isinstance(content["format"], int):
        raise TypeError("it holds no table with a format")
    if content["format"] > FORMAT:
        raise ModelError(f"'{folder}' was written by flawsift {content['flawsift']}; update flawsift to read it.")
    return content


@contextmanager
def told_damage(folder: Path) -> Iterator[None]:
    """What goes wrong with model.json, as an error that a user understands."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"'{folder}' is not a model folder: {error.strerror} ({error.filename}). "
            "Give the folder that `flawsift fit` wrote."
        ) from error
    except DamagedPart as error:
        raise ModelError(f"'{folder}' is damaged: {error}. Take a copy of it, or fit the model again.") from error
    except DAMAGE as error:
        raise ModelError(f"'{folder}' holds a damaged model.json: {error!r}. Fit the model again.") from error


def fit_record(training: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of a training, less what a later threshold changes, as it is after a save."""
    record: dict[str, Any] = json.loads(json.dumps(dict(training)))
    return {key: value for key, value in record.items() if key not in THRESHOLD_KEYS}


def model_id(training: Mapping[str, Any]) -> str:
    """`Model.id` by what is told of its training."""
    return content_digest(json.dumps(fit_record(training), sort_keys=True).encode())[:12]
