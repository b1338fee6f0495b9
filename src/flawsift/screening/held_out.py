"""Stage 1 without sub-models: a detector of all images that scores each of them without itself and its group."""

from flawsift.data.images import ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.parts.maps import as_float16
from flawsift.detectors.parts.training import Watch
from flawsift.detectors.protocols import LeavesOut
from flawsift.errors import InputError
from flawsift.executors import Run
from flawsift.progress import Stage, steps_of
from flawsift.screening.options import ScreenOptions
from flawsift.screening.result import Ranking


def rank_by_held_out_scores(
    train: ImageSet, detector: Detector, options: ScreenOptions, run: Run, *, wants_fitted: bool = False
) -> Ranking:
    """Fit on all images, then score each of them without itself and its group.

    Args:
        train: N images with features attached, of two groups at least.
        detector: Unfitted, of a class with `flawsift.detectors.protocols.LeavesOut`.
        options: None of them is read here.
        run: Of it the device and the progress are read.
        wants_fitted: Hand over the detector of all images.

    Raises:
        InputError: All images are of one group.
    """
    if len(train.members) < 2:
        what = "image" if len(train) == 1 else "group of images"
        raise InputError(f"Images are compared with those of other groups, and there is only one {what}. Add images.")
    run.progress(Stage.LEARNING, 0, 1)
    fitted = detector.clone().fit(train, device=run.device, watch=Watch(steps_of(run.progress, Stage.LEARNING)))
    assert isinstance(fitted, LeavesOut)
    run.progress(Stage.COMPARING, 0, len(train))
    held_out = fitted.held_out(train, device=run.device, progress=steps_of(run.progress, Stage.COMPARING))
    return Ranking(
        consensus=held_out.scores,
        held_out_scores=held_out.scores,
        patch_maps=as_float16(held_out.maps),
        fitted=fitted if wants_fitted else None,
        evidence=held_out.evidence,
    )
