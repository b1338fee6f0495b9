"""Models of PyOD behind our interface, and our detectors behind PyOD's.

    flawsift.screen("parts", "pyod:IForest")  # one of PyOD's models on pooled features
    FlawsiftOD(contamination=0.05).fit("parts").labels_  # one of our detectors, as PyOD has them

Both need PyOD. No pickle is ever loaded.
"""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flawsift.adapters.rows import Columns, pooled, seeded
from flawsift.adapters.training import Settings, images_in, train_on_images, train_on_rows
from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.parts.training import UNWATCHED, Watch
from flawsift.errors import InputError, ParameterError, TrainingError, one_line, unknown_name

try:
    from pyod import models
    from pyod.models.base import BaseDetector
    from sklearn.utils.validation import check_array, check_is_fitted
except ImportError as error:
    raise InputError("This needs PyOD 2 or later: pip install 'flawsift[pyod]'.") from error


@dataclass(kw_only=True, eq=False)
class PyOD(Detector):
    """A model of PyOD on pooled features: mean and maximum of each channel, standardised. It scores, and has no maps.

    What is saved are the training rows: PyOD's models can only be pickled, so the model is fitted again on them when it
    is first needed after loading, with the same seed, and is the same then. Each image is scored by itself: some models
    (ECOD, COPOD) rank the rows that they are given together.

    Cost: That of the model; loading costs another fit. The state is 2 C numbers an image.
    Contamination: As the model resists it. Its own `contamination` sets a threshold that is not used here.
    Differs from the paper: Each model is PyOD's, with its defaults.
    Reference: Zhao et al., "PyOD: A Python Toolbox for Scalable Outlier Detection", JMLR 20 (2019).

    Attributes:
        model: Name of the class, such as "IForest".
        arguments: Of its constructor; `random_state` is `seed` unless it is among them.
    """

    name: ClassVar[str] = "pyod"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}

    model: str = "IForest"
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("arguments", isinstance(self.arguments, Mapping), 'be a table, such as {"n_neighbors": 10}')
        self._made()

    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        """See `Detector.fit`."""
        self._forget()
        rows = [pooled(batch, self.layers) for batch in data.batches(self.layers)]
        if not rows:
            raise InputError("PyOD.fit needs at least one image, got none.")
        self.rows_ = torch.cat(rows)  # (N, D)
        try:
            self._fitted()
        except Exception:
            self._forget()
            raise
        return self

    def _maps(self, batch: Batch, device: str) -> Tensor:
        columns, model = self._fitted()
        rows = columns.standardized(pooled(batch, self.layers).numpy())
        with seeded(self.seed):
            scores = [float(np.asarray(model.decision_function(row[None])).ravel()[0]) for row in rows]
        return torch.tensor(scores).view(-1, 1, 1)

    def _fitted(self) -> tuple[Columns, Any]:
        """The units of rows, and the model that has learned the training rows."""
        return self._cached("model", "cpu", self._refitted)

    def _refitted(self) -> tuple[Columns, Any]:
        rows = self.rows_.numpy()
        columns = Columns.of(rows)
        try:
            # where scores are made there are no gradients; some models print how far they are
            with seeded(self.seed), torch.inference_mode(False), torch.enable_grad(), redirect_stdout(sys.stderr):
                model = self._made()
                model.fit(columns.standardized(rows))
                model.decision_function(columns.standardized(rows[:1]))  # some take no single row
        except Exception as error:  # what its models raise is not documented
            raise TrainingError(
                f"{self.model} of PyOD cannot learn {len(rows)} images, or score one: {one_line(error)}"
            ) from error
        return columns, model

    def _made(self) -> Any:
        """The model of PyOD, unfitted."""
        cls = _model_class(self.model)
        seed = {"random_state": self.seed} if "random_state" in inspect.signature(cls).parameters else {}
        try:
            return cls(**{**seed, **self.arguments})
        except Exception as error:  # as above
            raise ParameterError(f"PyOD refuses {self.model}({dict(self.arguments)}): {one_line(error)}") from error


def _model_class(name: str) -> type[Any]:
    """A class of PyOD by its name, in upper or lower case; only its module is imported.

    Raises:
        ParameterError: There is none, or it needs a package that is not there.
    """
    modules = {m.name.replace("_", ""): m.name for m in pkgutil.iter_modules(models.__path__) if m.name[0] != "_"}
    if name.lower() not in modules:
        raise ParameterError(unknown_name("model of PyOD", name, modules))
    try:
        module = importlib.import_module(f"pyod.models.{modules[name.lower()]}")
    except ImportError as error:
        raise ParameterError(f"{name} of PyOD needs another package: {one_line(error)}") from error
    for key, value in vars(module).items():
        if key.lower() == name.lower() and inspect.isclass(value) and issubclass(value, BaseDetector):
            return value
    raise ParameterError(f"PyOD has no detector called '{name}'; its module {module.__name__} holds none.")


class _Images(NamedTuple):
    """Images as PyOD asks for their number."""

    images: ImageSet
    shape: tuple[int]


class FlawsiftOD(BaseDetector):  # type: ignore[misc]  # it has no types
    """One of our detectors as PyOD has them. X is as for `flawsift.adapters.sklearn.FlawsiftDetector`.

    `decision_scores_` are scores of the training images by models that have not seen them. `threshold_` and `labels_`
    follow from `contamination` as for all of PyOD's models: that share of the training set is flagged, whatever is in
    it. For a threshold of a stated rate of false alarms take `trained_.calibration`, or scikit-learn's interface.

    Attributes:
        trained_: The detector and its calibration.
        decision_scores_: (N,) higher is more anomalous.
        threshold_: Of scores.
        labels_: (N,) 1 for outliers, else 0.
    """

    def __init__(
        self,
        detector: Detector | str = "quorum",
        contamination: float = 0.1,
        *,
        backbone: str = "efficientnet_lite0",
        size: int | None = None,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        """Keep the parameters; but for the contamination they are checked by `fit`.

        Args:
            detector: A registry name or an unfitted detector.
            contamination: The share of the training set that is flagged, in (0, 0.5].
            backbone: A name for `flawsift.load_backbone`; rows have none.
            size: Edge length in pixels that images are brought to; None takes what fits them.
            seed: Of everything random.
            device: "auto" takes a GPU where there is one.
        """
        super().__init__(contamination=contamination)
        self.detector = detector
        self.backbone = backbone
        self.size = size
        self.seed = seed
        self.device = device

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn from unlabelled images or rows; y is not read.

        Raises:
            InputError: Fewer than two images, or one cannot be read.
            ValueError: A table is none of finite numbers.
        """
        settings = Settings(
            detector=self.detector, backbone=self.backbone, size=self.size, seed=self.seed, device=self.device
        )
        images = images_in(X)
        self.trained_ = train_on_rows(_rows(X), settings) if images is None else train_on_images(images, settings)
        self._set_n_classes(None)
        self.decision_scores_ = self.trained_.held_out
        self._process_decision_scores()
        return self

    def decision_function(self, X: Any) -> npt.NDArray[np.float64]:
        """(N,) higher is more anomalous.

        Raises:
            InputError: An image cannot be read.
        """
        check_is_fitted(self, "trained_")
        images = X.images if isinstance(X, _Images) else images_in(X)
        return self.trained_.scores(_rows(X) if images is None else images)

    def predict_proba(self, X: Any, method: str = "linear", return_confidence: bool = False) -> Any:
        """See `BaseDetector.predict_proba`."""
        images = images_in(X)
        given = _rows(X) if images is None else _Images(images, (len(images),))
        return super().predict_proba(given, method, return_confidence)


def _rows(X: Any) -> npt.NDArray[np.float64]:
    rows: npt.NDArray[np.float64] = check_array(X, dtype=np.float64)
    return rows
