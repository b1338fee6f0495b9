"""Fully unsupervised visual anomaly detection: an unlabelled folder in; suspects, a purified set and a detector out.

    screening = flawsift.screen("parts")                    # who is probably defective
    model = flawsift.fit("parts", out="model")              # rank, then train and set a threshold
    predictions = flawsift.load_model("model").predict("new_parts")

Names are imported on first use, so that `import flawsift` and the command line's help stay fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flawsift.data.contamination import contaminate as contaminate
    from flawsift.data.images import ImageSet as ImageSet
    from flawsift.data.inputs import as_images as as_images
    from flawsift.data.truth import GroundTruth as GroundTruth
    from flawsift.detectors.base import Detector as Detector
    from flawsift.detectors.registry import make_detector as make_detector
    from flawsift.errors import FlawsiftError as FlawsiftError
    from flawsift.features.backbones import Backbone as Backbone
    from flawsift.features.backbones import load_backbone as load_backbone
    from flawsift.features.extraction import attach as attach
    from flawsift.features.store import FeatureStore as FeatureStore
    from flawsift.models.model import Model as Model
    from flawsift.models.model import evaluate as evaluate
    from flawsift.models.model import load_model as load_model
    from flawsift.models.model import predict as predict
    from flawsift.pipeline import FitResult as FitResult
    from flawsift.pipeline import fit as fit
    from flawsift.pipeline import screen as screen
    from flawsift.screening.options import PRESETS as PRESETS
    from flawsift.screening.options import ScreenOptions as ScreenOptions
    from flawsift.screening.result import Screening as Screening
    from flawsift.screening.storage import load_screening as load_screening

_EXPORTS = {
    "PRESETS": "screening.options",
    "Backbone": "features.backbones",
    "Detector": "detectors.base",
    "FeatureStore": "features.store",
    "FitResult": "pipeline",
    "FlawsiftError": "errors",
    "GroundTruth": "data.truth",
    "ImageSet": "data.images",
    "Model": "models.model",
    "ScreenOptions": "screening.options",
    "Screening": "screening.result",
    "as_images": "data.inputs",
    "attach": "features.extraction",
    "contaminate": "data.contamination",
    "evaluate": "models.model",
    "fit": "pipeline",
    "load_backbone": "features.backbones",
    "load_model": "models.model",
    "load_screening": "screening.storage",
    "make_detector": "detectors.registry",
    "predict": "models.model",
    "screen": "pipeline",
}
__all__ = ["__version__"]
__all__ += list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'flawsift' has no attribute '{name}'")
    return getattr(importlib.import_module(f"flawsift.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
