"""Detectors by name: ours, and those of other libraries."""

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load

from flawsift.damage import DAMAGE, json_object
from flawsift.detectors.base import Detector
from flawsift.detectors.parts.state import check, nested
from flawsift.errors import ModelError, ParameterError, unknown_name
from flawsift.files import content_digest

# registry name -> (module, class); imported on first use, so that naming the detectors costs nothing
DETECTORS: Mapping[str, tuple[str, str]] = {
    "cflow": ("flawsift.detectors.cflow", "CFlow"),
    "destseg": ("flawsift.detectors.destseg", "DeSTSeg"),
    "dinomaly": ("flawsift.detectors.dinomaly", "Dinomaly"),
    "funad": ("flawsift.detectors.funad", "FUNAD"),
    "inreach": ("flawsift.detectors.inreach", "InReaCh"),
    "padim": ("flawsift.detectors.padim", "PaDiM"),
    "patchcore": ("flawsift.detectors.patchcore", "PatchCore"),
    "quorum": ("flawsift.detectors.quorum", "Quorum"),
    "rd": ("flawsift.detectors.rd", "RD"),
    "simplenet": ("flawsift.detectors.simplenet", "SimpleNet"),
    "softpatch": ("flawsift.detectors.softpatch", "SoftPatch"),
    "uniad": ("flawsift.detectors.uniad", "UniAD"),
}
ADAPTERS: Mapping[str, tuple[str, str]] = {  # of another library, whose model is a parameter: "pyod:IForest"
    "anomalib": ("flawsift.adapters.anomalib", "Anomalib"),
    "pyod": ("flawsift.adapters.pyod", "PyOD"),
}


def detector_class(name: str) -> type[Detector]:
    """The class behind a registry name, in upper or lower case.

    Raises:
        ParameterError: There is none; the closest name is suggested.
    """
    known, key = {**DETECTORS, **ADAPTERS}, name.partition(":")[0].lower()
    if key not in known:
        raise ParameterError(unknown_name("detector", name, known))
    module, attribute = known[key]
    cls: type[Detector] = getattr(importlib.import_module(module), attribute)
    return cls


def make_detector(name: str, preset: str | None = None, **params: Any) -> Detector:
    """An unfitted detector by registry name.

    Args:
        name: Such as "patchcore"; case does not matter. "pyod:IForest" is a model of PyOD, see `flawsift.adapters`.
        preset: "default", or another of the class, such as "paper" for the published constants.
        params: Hyper-parameters, above those of the preset.

    Raises:
        ParameterError: Unknown detector, preset or parameter, or a value out of range.
    """
    cls, model = detector_class(name), name.partition(":")[2]
    params = {**params, "model": model} if model else params
    if preset is not None and preset not in cls.presets:
        raise ParameterError(unknown_name(f"preset of {name}", preset, cls.presets))
    known = {f.name for f in dataclasses.fields(cls)}
    for key in params:
        if key not in known:
            raise ParameterError(unknown_name(f"parameter of {cls.__name__}", key, known))
    return cls(**{**(cls.presets[preset] if preset else {}), **params})


def load_detector(folder: str | Path, like: Detector | None = None, *, digest: str | None = None) -> Detector:
    """Read what `Detector.save` wrote.

    Args:
        folder: The folder.
        like: An unfitted detector of the same class and parameters, for classes that are not registered; else the
            detector is made by its registry name.
        digest: What `Detector.save` returned, where it is known.

    Raises:
        ModelError: The folder is missing or damaged, holds another detector than `digest` says or another
            `state_format`, or names an unknown detector.
    """
    folder = Path(folder)
    try:
        told = (folder / "detector.json").read_bytes()
        if digest is not None and content_digest(told) != digest:
            raise ModelError(f"'{folder}' holds parts of two models, or a damaged detector.json. Fit the model again.")
        content = json_object(told)
        detector = like if like else make_detector(content["name"], **content["params"])
        if content.get("state_format", 1) != detector.state_format:
            raise ModelError(f"'{folder}' was written by another version of flawsift; fit the model again.")
        tensors = (folder / content["file"]).read_bytes()
        if content_digest(tensors) != content["sha256"]:
            raise ModelError(f"'{folder / content['file']}' does not match detector.json. Fit the model again.")
        by_name = load(tensors)
        check(by_name, content.get("tensors"))  # of earlier versions, only that they are numbers
        state = {**content["state"], **nested(by_name)}
        try:
            return detector.with_state(state)
        except ModelError as error:
            raise ModelError(f"'{folder / 'detector.json'}': {error}") from error
    except (OSError, *DAMAGE, SafetensorError) as error:
        raise ModelError(f"'{folder}' is not a readable detector folder: {error}.") from error
