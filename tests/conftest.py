"""Shared by all tests: no test touches the user's cache, and images are made once."""

from pathlib import Path

import pytest
from PIL import Image

from flawsift.backbones import Backbone
from flawsift.datasets import Dataset
from flawsift.testing import easy_set, tiny_backbone


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has a feature cache of its own."""
    monkeypatch.setenv("FLAWSIFT_CACHE", str(tmp_path / "own-cache"))
    return tmp_path / "own-cache"


@pytest.fixture(scope="session")
def tiny() -> Backbone:
    """A backbone that takes milliseconds."""
    return tiny_backbone()


@pytest.fixture(scope="session")
def easy() -> Dataset:
    """40 good and 10 defective synthetic images in memory."""
    return easy_set()


@pytest.fixture(scope="session")
def easy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The easy set as an unlabelled folder: part-00.png to part-49.png, the last ten defective."""
    root = tmp_path_factory.mktemp("easy")
    images = easy_set().images
    for id_ in images.ids:
        picture: Image.Image = images.image(int(id_))
        picture.save(root / f"part-{int(id_):02d}.png")
    return root
