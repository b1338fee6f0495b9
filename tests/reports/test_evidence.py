"""Votes of sub-models, and the colours of a screening's maps."""

from dataclasses import replace

import numpy as np
import pytest

from flawsift.data.images import ImageSet
from flawsift.reports.evidence import agreement, is_typical, map_scale
from flawsift.screening.result import SubModelScores
from tests.reports.material import K, N, make_screening, noise


def test_agreement_leaves_the_own_sub_model_out() -> None:
    images = ImageSet.from_arrays(noise(20, edge=2))
    scores = np.tile(np.arange(20, dtype=np.float32), (K, 1))
    scores[0, 0] = 1000  # sub-model 0 trained on image 0: its vote must not count
    scores[1, 5] = 1000  # image 5 is in subset 0 as well: sub-model 1's vote counts
    screening = make_screening(images, 2, submodels=SubModelScores((np.arange(20) % K)[None], scores))
    votes, voters, share = agreement(screening)
    assert (voters, share) == (4, 0.1)
    # of the 16 images that a sub-model did not see, 10 % are the highest 2
    assert votes[[0, 5, 19, 18]].tolist() == [0, 1, 4, 3]
    assert votes[:5].sum() == 0


def test_agreement_widens_with_the_share_removed_and_ignores_ties(images: ImageSet) -> None:
    screening = make_screening(images, 20)
    assert agreement(screening)[2] == 0.5
    flat = replace(screening, submodels=SubModelScores((np.arange(N) % K)[None], np.ones((K, N), np.float32)))
    assert agreement(flat)[0].tolist() == [0] * N


@pytest.mark.parametrize(("n", "n_removed", "n_typical"), [(1, 0, 1), (9, 0, 5), (10, 1, 5), (10, 2, 4), (10, 9, 1)])
def test_typical_images_are_the_lower_half_of_those_kept(n: int, n_removed: int, n_typical: int) -> None:
    screening = make_screening(ImageSet.from_arrays(noise(n, edge=1)), n_removed)
    lowest = np.argsort(screening.consensus)[:n_typical]
    assert np.flatnonzero(is_typical(screening)).tolist() == sorted(lowest.tolist())
    assert not is_typical(replace(screening, kept=screening.ids[:0])).any()


def test_colours_of_the_report_come_from_kept_images_alone(images: ImageSet) -> None:
    screening = make_screening(images)
    assert screening.patch_maps is not None
    grids = screening.patch_maps.copy()
    grids[~screening.is_kept] *= 1000
    assert map_scale(replace(screening, patch_maps=grids)) == map_scale(screening)
    grids[screening.is_kept] *= 2
    assert map_scale(replace(screening, patch_maps=grids)) != map_scale(screening)
