"""Shared by all tests: one thread, no test touches the user's cache, and images are made once."""

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from PIL import Image
from threadpoolctl import threadpool_limits

from flawsift.data.images import ImageSet
from flawsift.datasets import Dataset
from flawsift.detectors.parts.training import Watch
from flawsift.features.backbones import Backbone
from flawsift.testing import easy_set, tiny_backbone

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no fault
hypothesis.settings.load_profile("untimed")


def _no_sync(fd: object) -> None:
    """Instead of milliseconds each: what a killed process wrote stays without it, only a power cut would take it."""


def pytest_configure() -> None:
    """One thread for torch and BLAS, and for the processes that tests start.

    On networks and images this small, threads mostly wait for each other: next to other work, such as a second process
    of tests, for minutes. And sums are taken in one order, whatever the machine.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    # Ray alone on a machine may leave a token in the home folder, by which clusters that are started later refuse us.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.fsync = _no_sync
    torch.set_num_threads(1)
    threadpool_limits(1)


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


@pytest.fixture
def check_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, ImageSet], None]:
    """Checks that a fit of six steps, killed in its fourth, goes on there to the weights of one that was not killed."""
    monkeypatch.setattr("flawsift.detectors.parts.training.SAVE_SECONDS", -1.0)

    def check(detector: Any, data: ImageSet) -> None:
        expected = detector.clone().fit(data)

        def kill(stage: str, done: int, total: int) -> None:
            if done == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            detector.clone().fit(data, watch=Watch(kill, tmp_path / "state"))
        seen: list[int] = []
        found = detector.clone().fit(data, watch=Watch(lambda _, done, total: seen.append(done), tmp_path / "state"))
        assert seen == [4, 5, 6]
        for name, value in expected.weights_.items():
            assert torch.equal(found.weights_[name], value), name

    return check


@pytest.fixture
def killed_at() -> Callable[[int, Callable[[], object]], bool]:
    """Runs something in a process that is killed before its nth step on the disk, and says whether it came so far."""

    def run(n: int, work: Callable[[], object]) -> bool:
        child = os.fork()
        if not child:
            steps = itertools.count()

            def stepping(step: Callable[..., Any]) -> Callable[..., Any]:
                def counted(*args: Any, **kwargs: Any) -> Any:
                    if next(steps) == n:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return step(*args, **kwargs)

                return counted

            for name in ("replace", "fsync", "unlink", "mkdir", "rmdir"):
                setattr(os, name, stepping(getattr(os, name)))
            try:
                work()
            except BaseException:  # noqa: BLE001  # nothing may go on as a second process of tests
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work failed"
        return os.WIFSIGNALED(status)

    return run


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: exit code, what was printed, errors."""
    from flawsift.cli.main import main

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return call
