"""Recurring defects, seen without labels: a patch unlike most images that has a look-alike in another one."""

import pytest
import torch

from flawsift.reports.recurrence import find_recurrence, reference_distances


def test_reference_distances_equal_brute_force_without_the_own_image() -> None:
    patches = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0))
    references = torch.tensor([1, 2, 4, 5, 6])
    near, typical = reference_distances(patches, references)
    for i in range(7):
        others = [r for r in references.tolist() if r != i]
        for p in range(5):
            each = [(patches[r] - patches[i, p]).norm(dim=1).min().item() for r in others]
            assert near[i, p].item() == pytest.approx(min(each), abs=1e-5)
            assert typical[i, p].item() == pytest.approx(sorted(each)[(len(each) - 1) // 2], abs=1e-5)


def test_references_of_the_same_owner_are_left_out() -> None:
    vectors = torch.tensor([[0.0], [1.0], [10.0], [14.0]]).unsqueeze(1)
    near, typical = reference_distances(vectors, torch.arange(4), owners=torch.tensor([0, 0, 1, 1]))
    assert near.flatten().tolist() == [10, 9, 9, 13]
    assert typical.flatten().tolist() == [10, 9, 9, 13]  # of two the lower


def test_copies_are_at_distance_zero() -> None:
    one = torch.randn(1, 30, 300, generator=torch.Generator().manual_seed(0))
    near, typical = reference_distances(one.repeat(6, 1, 1), torch.arange(6))
    assert (near == 0).all()
    assert (typical == 0).all()


@pytest.mark.parametrize(("n_alike", "suspicious"), [(2, False), (3, True)])
def test_two_look_alikes_are_a_coincidence(n_alike: int, suspicious: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(40, 20, 16, generator=generator)
    patches[:n_alike, 7] = torch.randn(16, generator=generator) * 4
    found = find_recurrence(*reference_distances(patches, torch.arange(40)))
    assert found.twins == list(range(n_alike))
    assert found.suspicious == suspicious


def test_a_recurring_defect_is_seen_on_a_saturated_background() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(40, 20, 16, generator=generator)
    patches[:, :14] = torch.randn(16, generator=generator)  # the same in all images: most patches are copies
    patches[:5, 17] = torch.randn(16, generator=generator) * 4 + 0.1 * torch.randn(5, 16, generator=generator)
    found = find_recurrence(*reference_distances(patches, torch.arange(40)))
    assert found.ordinary > 1
    assert found.twins == list(range(5))
    assert found.suspicious


def test_a_recurring_patch_is_a_twin_and_a_scattered_one_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(40, 20, 16, generator=generator)
    same, spots = torch.randn(16, generator=generator) * 4, torch.randn(5, 16, generator=generator) * 4
    patches[:5, 7] = same + 0.1 * torch.randn(5, 16, generator=generator)  # one defect in five images
    patches[5:10, 3] = spots  # five different ones
    found = find_recurrence(*reference_distances(patches, torch.arange(40)))
    assert found.unusual == list(range(10))
    assert found.twins == list(range(5))
    assert found.suspicious


def test_copies_alone_are_no_twins() -> None:
    first, second = torch.randn(2, 1, 20, 16, generator=torch.Generator().manual_seed(0))
    alike = find_recurrence(*reference_distances(first.repeat(10, 1, 1), torch.arange(10)))
    assert (alike.unusual, alike.twins) == ([], [])
    both = torch.cat([first.repeat(10, 1, 1), second.repeat(3, 1, 1)])
    found = find_recurrence(*reference_distances(both, torch.arange(13)))
    assert (found.unusual, found.ordinary) == ([10, 11, 12], 0)
    assert found.twins == [], "nothing is nearer than copies are to each other"
