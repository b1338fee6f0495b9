"""Images that the tests of the pages share."""

from pathlib import Path

import pytest
from PIL import Image

from flawsift.data.images import ImageSet
from tests.reports.material import MARKUP, N, noise


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return ImageSet.from_arrays(noise(N), ids=range(100, 100 + N))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for i, array in enumerate(noise(N - 2)):
        Image.fromarray(array).save(root / f"part-{i:02d}.png")
    Image.fromarray(noise(1)[0]).save(root / MARKUP, "PNG")
    Image.fromarray(noise(1)[0]).save(root / "a & b.png", "PNG")
    return root
