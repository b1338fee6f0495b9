"""Our detectors as an estimator of scikit-learn.

    detector = FlawsiftDetector(false_alarm_rate=0.05).fit("parts")
    detector.predict("new_parts")  # -1 for what is anomalous, else 1

It takes images, and rows of features of any origin.
"""

from typing import Any, Self

import numpy as np
import numpy.typing as npt

from flawsift.adapters.training import Settings, images_in, train_on_images, train_on_rows
from flawsift.data.images import ImageSet
from flawsift.detectors.base import Detector
from flawsift.errors import InputError
from flawsift.models.calibration import DEFAULT_RATE

try:
    from sklearn.base import BaseEstimator, OutlierMixin
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise InputError("This needs scikit-learn 1.6 or later: pip install 'flawsift[sklearn]'.") from error


class FlawsiftDetector(OutlierMixin, BaseEstimator):  # type: ignore[misc]  # it has no types
    """Finds anomalous images, or rows of features, after learning from unlabelled ones.

    X is a folder, a pattern, a list of files, PIL images or arrays, an array (N, H, W, 3), or a table (N, D) of
    numbers. Images go through both stages of `flawsift.fit`. Of a table each row is one patch: columns are
    standardised, and there is no stage 1.

    As everywhere in scikit-learn higher is more normal: `score_samples` is our score with its sign changed.

    Attributes:
        trained_: The detector, its calibration, and held-out scores of the training images.
        model_: `flawsift.Model` of images, which can be saved; None of rows.
        offset_: Less than this is an outlier: minus the threshold at `false_alarm_rate`.
        n_features_in_: D, of rows.
    """

    def __init__(
        self,
        detector: Detector | str = "quorum",
        *,
        backbone: str = "efficientnet_lite0",
        size: int | None = None,
        false_alarm_rate: float = DEFAULT_RATE,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        """Keep the parameters; they are checked by `fit`.

        Args:
            detector: A registry name or an unfitted detector.
            backbone: A name for `flawsift.load_backbone`; rows have none.
            size: Edge length in pixels that images are brought to; None takes what fits them.
            false_alarm_rate: Share of good images that `predict` may call outliers. It is no share of the training
                set: with no outlier in it, as few are flagged.
            seed: Of everything random.
            device: "auto" takes a GPU where there is one.
        """
        self.detector = detector
        self.backbone = backbone
        self.size = size
        self.false_alarm_rate = false_alarm_rate
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
        if images is None:
            rows = validate_data(self, X, dtype=(np.float64, np.float32), ensure_min_samples=2)
            self.trained_ = train_on_rows(rows, settings)
        else:
            self.trained_ = train_on_images(images, settings)
        self.model_ = self.trained_.model
        threshold = self.trained_.calibration.threshold(self.false_alarm_rate)
        assert threshold is not None, "there are two images"
        self.offset_ = -threshold.value
        return self

    def score_samples(self, X: Any) -> npt.NDArray[np.float64]:
        """(N,) higher is more normal.

        Raises:
            InputError: An image cannot be read.
        """
        check_is_fitted(self)
        return -self.trained_.scores(self._given(X))

    def decision_function(self, X: Any) -> npt.NDArray[np.float64]:
        """(N,) negative for outliers."""
        scores: npt.NDArray[np.float64] = self.score_samples(X) - self.offset_
        return scores

    def predict(self, X: Any) -> npt.NDArray[np.int64]:
        """(N,) -1 for outliers, else 1."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def fit_predict(self, X: Any, y: Any = None) -> npt.NDArray[np.int64]:
        """(N,) which of the images it learns from are outliers: -1, else 1.

        Each is judged by what was learned from the others. `fit(X).predict(X)` would find hardly any: to a detector
        that keeps what it has seen, that is normal.
        """
        self.fit(X)
        return np.where(-self.trained_.held_out - self.offset_ < 0, -1, 1)

    def _given(self, X: Any) -> ImageSet | npt.NDArray[Any]:
        images = images_in(X)
        if images is not None:
            return images
        rows: npt.NDArray[Any] = validate_data(self, X, dtype=(np.float64, np.float32), reset=False)
        return rows
