"""A screening of a folder with odd names, its review page as a client sees it, and a browser on another one."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from flawsift import pipeline
from flawsift.features.backbones import Backbone
from flawsift.review.server import make_app
from flawsift.review.session import Review
from flawsift.screening.options import ScreenOptions
from tests.review.material import BASE, MARKUP, ODD, PORT, TOKEN


@pytest.fixture(scope="module")
def screened(easy_folder: Path, tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A screening of a folder with odd names, and the folder beside it."""
    root = tmp_path_factory.mktemp("review")
    shutil.copytree(easy_folder, root / "parts")
    (root / "parts" / "part-00.png").rename(root / "parts" / MARKUP)
    (root / "parts" / "part-01.png").rename(root / "parts" / ODD)
    (root / "parts" / "empty.png").touch()
    (root / "outside.png").write_bytes((easy_folder / "part-02.png").read_bytes())
    pipeline.screen(root / "parts", "padim", tiny, out=root / "s")
    return root


@pytest.fixture
def folder(screened: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(screened / "s", tmp_path / "s"))


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    with TestClient(make_app(Review.open(folder), TOKEN, PORT), base_url=BASE) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from tests.review.browser import CHROMIUM, FLAGS, playwright  # skips where there is none

    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def seen_in_browser(easy_folder: Path, tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("browser")
    shutil.copytree(easy_folder, root / "parts")
    (root / "parts" / "part-45.png").rename(root / "parts" / MARKUP)
    (root / "parts" / "empty.png").touch()
    pipeline.screen(root / "parts", "padim", tiny, out=root / "s", options=ScreenOptions(keep=0.8))
    return root


@pytest.fixture(scope="module")
def running(seen_in_browser: Path) -> Iterator[Any]:
    from tests.review.browser import Server

    made = Server(seen_in_browser / "s")
    yield made
    made.kill()


@pytest.fixture
def server(running: Any) -> Any:
    """One server for all tests, since starting one takes seconds; nothing is decided yet."""
    (running.folder / "decisions.csv").unlink(missing_ok=True)
    return running


@pytest.fixture
def errors() -> Any:
    from tests.review.browser import Errors

    return Errors()
