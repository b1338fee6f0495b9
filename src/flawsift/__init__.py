"""Fully unsupervised visual anomaly detection: an unlabelled folder in; suspects, a purified set and a detector out.

    screening = flawsift.screen("parts")                    # who is probably defective
    model = flawsift.fit("parts", out="model")              # screen, then train on what is kept
    found = flawsift.predict(flawsift.load_model("model"), "new_parts")

Names are imported on first use, so that `import flawsift` and the command line's help stay fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flawsift.backbones import Backbone as Backbone
    from flawsift.backbones import load_backbone as load_backbone
    from flawsift.contamination import contaminate as contaminate
    from flawsift.detector import Detector as Detector
    from flawsift.detector import make_detector as make_detector
    from flawsift.errors import FlawsiftError as FlawsiftError
    from flawsift.features import FeatureStore as FeatureStore
    from flawsift.features import attach as attach
    from flawsift.images import ImageSet as ImageSet
    from flawsift.metrics import GroundTruth as GroundTruth
    from flawsift.models import Model as Model
    from flawsift.models import evaluate as evaluate
    from flawsift.models import load_model as load_model
    from flawsift.models import predict as predict
    from flawsift.pipeline import fit as fit
    from flawsift.pipeline import screen as screen
    from flawsift.screening import PRESETS as PRESETS
    from flawsift.screening import Screening as Screening

_EXPORTS = {
    "PRESETS": "screening",
    "Backbone": "backbones",
    "Detector": "detector",
    "FeatureStore": "features",
    "FlawsiftError": "errors",
    "GroundTruth": "metrics",
    "ImageSet": "images",
    "Model": "models",
    "Screening": "screening",
    "attach": "features",
    "contaminate": "contamination",
    "evaluate": "models",
    "fit": "pipeline",
    "load_backbone": "backbones",
    "load_model": "models",
    "make_detector": "detector",
    "predict": "models",
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
