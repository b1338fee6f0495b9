"""The sentences about a screening: singular and plural, where the share comes from, what stage 2 leaves out."""

from dataclasses import replace

import numpy as np
import pytest

from flawsift.data.images import ImageSet
from flawsift.reports.wording import contamination_text, headline, selection_text
from flawsift.screening.consensus import SUSPECT, Contamination
from tests.reports.material import ESTIMATE, N, make_screening, noise

MIXTURE = "mixture of two laws"


@pytest.mark.parametrize(
    ("n", "n_removed", "estimate", "expected"),
    [(1, 0, ESTIMATE, "The only image was kept."),
     (2, 0, ESTIMATE, "Of 2 images, none was set aside; all were kept."),
     (2, 1, ESTIMATE, "Of 2 images, 1 looks defective and was set aside; 1 was kept."),
     (5, 2, ESTIMATE, "Of 5 images, 2 look defective and were set aside; 3 were kept."),
     (5, 1, None, "Of 5 images, the 1 most unusual was set aside; 4 were kept."),
     (5, 2, None, "Of 5 images, the 2 most unusual were set aside; 3 were kept.")],
)  # fmt: skip
def test_headline(n: int, n_removed: int, estimate: Contamination | None, expected: str) -> None:
    screening = make_screening(ImageSet.from_arrays(noise(n, edge=1)), n_removed, contamination=estimate)
    assert headline(screening) == expected
    unread = replace(screening, unreadable={"a.png": "empty"})
    assert headline(unread) == f"{headline(screening)} 1 file could not be read."
    unread = replace(screening, unreadable={"a.png": "empty", "b.png": "empty"})
    assert headline(unread) == f"{headline(screening)} 2 files could not be read."


@pytest.mark.parametrize(
    ("estimate", "keep_share", "expected"),
    [(None, 1.0, "To keep all images was set by the user"),
     (None, 0.6, "The share to set aside (40\u00a0%) was set by the user"),
     (Contamination(0.0, "none: too few scores", {}), 1.0, "could not be estimated (too few scores)."),
     (Contamination(0.0, MIXTURE, {}, (0.0, 0.0)), 1.0, "No more images score high"),
     (Contamination(0.0, MIXTURE, {}, (0.0, 0.03)), 1.0, ": 0 % (between 0 and 3 %). Perhaps none is defective"),
     (Contamination(0.05, MIXTURE, {}, (0.0, 0.1)), 1.0, "so nothing was set aside; look at the highest-ranked"),
     (Contamination(0.2, MIXTURE, {}, (0.0, 0.5)), 1.0, ": between 0 and 50 % (the scores tell no more). Perhaps"),
     (Contamination(0.2, MIXTURE, {}, (0.1, 0.3)), 0.8, ": 20 % (between 10 and 30 %). Nine of ten such"),
     (Contamination(0.3, MIXTURE, {}, (0.1, 0.5)), 0.8, ": between 10 and 50 % (the scores tell no more). Nine")],
)  # fmt: skip
def test_where_the_share_comes_from(estimate: Contamination | None, keep_share: float, expected: str) -> None:
    images = ImageSet.from_arrays(noise(5, edge=1))
    screening = make_screening(images, 0, contamination=estimate, keep_share=keep_share)
    assert expected in contamination_text(screening)


@pytest.mark.parametrize("partly", [False, True])
def test_what_is_learned_of_images_that_were_set_aside(images: ImageSet, partly: bool) -> None:
    rejected = np.zeros((N, 4, 6), bool)
    rejected[10, :3] = True
    rejected[:5, : 3 if partly else 4] = True  # of the five that are probably defective, most patches or all
    probability = np.where(np.arange(N) < 5, 0.9, 0.1)
    screening = make_screening(images, probability=probability, kept=images.ids[5:], rejected=rejected)
    text = selection_text(screening)
    assert f"Images that are defective with a probability above {100 * SUSPECT:.0f}% were set aside." in text
    assert ("is trained on the most ordinary patches only" in text) == partly
    by_hand = selection_text(replace(screening, contamination=None))
    assert by_hand.endswith("left out by detectors that leave out patches. Quorum, the default, is trained on all.")
    assert selection_text(replace(screening, rejected=np.zeros_like(rejected))) == ""
