"""The command line where streams are closed, nobody has a home, folders are read-only, files few, or POSIX is not."""

import ctypes
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

POSIX = pytest.mark.skipif(os.name != "posix", reason="of POSIX systems")
DROP_BOUNDING, OVERRIDES = 24, (1, 2)  # of prctl: PR_CAPBSET_DROP; what lets root write and read where nobody may


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    numbers = np.random.default_rng(0)
    (tmp_path / "parts").mkdir()
    for i in range(6):
        Image.fromarray(numbers.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "parts" / f"{i}.png")
    return tmp_path


def screen(parts: Path, *more: str) -> list[str]:
    tail = ["screen", "parts", "--backbone", "tiny", "--size", "64", "--out", "s", *more]
    return [sys.executable, "-m", "flawsift", *tail]


def environment(parts: Path, **changes: str | None) -> dict[str, str]:
    settings = {**os.environ, "FLAWSIFT_CACHE": str(parts / "cache"), **changes}
    return {name: value for name, value in settings.items() if value is not None}


def ran(command: list[str], parts: Path, env: dict[str, str], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=parts, env=env, capture_output=True, text=True, check=False, **more)


@POSIX
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_stop_nothing(parts: Path, closed: str) -> None:
    done = ran(["sh", "-c", f'exec "$@" {closed}', "sh", *screen(parts)], parts, environment(parts))
    assert done.returncode == 0, done.stderr
    assert (parts / "s" / "screening.csv").read_text().count("\n") == 7
    wrong = ran(["sh", "-c", f'exec "$@" {closed}', "sh", *screen(parts, "--size", "x")], parts, environment(parts))
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


def test_a_full_disk_behind_stdout_is_told(parts: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "flawsift", "detectors", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode != 0
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


NO_HOME = """
import sys
try:
    import pwd
    def nobody(*_): raise KeyError("no such user")
    pwd.getpwuid = nobody
except ImportError:
    pass
from flawsift.cli.main import main
main(sys.argv[1:])
"""


@POSIX
def test_a_user_without_a_home_is_told_where_features_may_go(parts: Path) -> None:
    command = [sys.executable, "-c", NO_HOME, *screen(parts)[3:]]
    env = environment(parts, FLAWSIFT_CACHE=None, XDG_CACHE_HOME=None, HOME=None)
    done = ran(command, parts, env)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("flawsift: error: There is no home folder")
    assert "FLAWSIFT_CACHE" in done.stderr
    assert ran([*command, "--cache", "c"], parts, env).returncode == 0


def without_overrides() -> None:
    """Root heeds the permissions of files in the process that follows."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for capability in OVERRIDES:
        if os.geteuid() == 0 and prctl(DROP_BOUNDING, capability, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_read_only_cache_is_told(parts: Path) -> None:
    (parts / "cache").mkdir(mode=0o555)
    try:
        probe = [sys.executable, "-c", f"open({str(parts / 'cache' / 'x')!r}, 'w')"]
        if ran(probe, parts, environment(parts), preexec_fn=without_overrides).returncode == 0:
            pytest.skip("this user writes everywhere")
    except subprocess.SubprocessError:
        pytest.skip("this process may not give up rights")
    done = ran(screen(parts), parts, environment(parts), preexec_fn=without_overrides)
    assert done.returncode == 2
    assert "cache': permission denied" in done.stderr
    assert "FLAWSIFT_CACHE" in done.stderr
    assert "Traceback" not in done.stderr


@POSIX
def test_few_files_at_once_are_enough(parts: Path) -> None:
    done = ran(["sh", "-c", 'ulimit -n 24; exec "$@"', "sh", *screen(parts, "--json")], parts, environment(parts))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n_images"] == 6


# Windows has none of these. Pure Python modules of the standard library that Windows has ask for some in a `try`.
NO_POSIX = """
import importlib, os, pkgutil, sys
HIDDEN = {"resource", "fcntl", "termios", "pwd", "grp"}
for name in HIDDEN:
    sys.modules[name] = None  # so that an import of it is an ImportError, in this process and whoever asks
for name in ("fork", "forkpty", "mkfifo", "getuid", "geteuid", "getpgid", "killpg"):
    if hasattr(os, name):
        delattr(os, name)
import flawsift
for module in pkgutil.walk_packages(flawsift.__path__, "flawsift."):
    # what is behind other libraries needs these
    if not module.name.endswith("__main__") and not module.name.startswith("flawsift.adapters."):
        importlib.import_module(module.name)
assert all(sys.modules[name] is None for name in HIDDEN)
from flawsift.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("command", [["--help"], None])
def test_nothing_needs_posix(parts: Path, command: list[str] | None) -> None:
    done = ran([sys.executable, "-c", NO_POSIX, *(command or screen(parts)[3:])], parts, environment(parts))
    assert done.returncode == 0, done.stderr[-2000:]
    assert command is not None or (parts / "s" / "screening.csv").exists()


def test_a_library_without_the_memory_to_be_loaded_is_an_error(
    cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: object) -> None:
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object")

    monkeypatch.setattr("flawsift.cli.use._check_folder", fails)
    code, _, error = cli("predict", tmp_path, tmp_path, "--quiet")
    assert code == 2
    assert error.startswith("flawsift: error: a library cannot be loaded: libtorch_cpu.so: failed to map")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_result_that_cannot_be_printed_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        told = subprocess.run(
            [sys.executable, "-m", "flawsift", "detectors", "--quiet"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        unseen = subprocess.run(
            [sys.executable, "-m", "flawsift", "cache", "verify", "--nothing"], stderr=full, check=False
        )
    assert (told.returncode, told.stderr.count("\n")) == (2, 1)
    assert told.stderr.startswith("flawsift: error: Cannot print the result: No space left on device.")
    assert unseen.returncode == 2


@POSIX
def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    code = "import os, sys; os.rmdir('../gone'); from flawsift.cli.main import main; main(['detectors'])"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "gone", capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "flawsift: error: The current folder is gone. Change to another one and try again.\n"


def fails_on_errors(text: str, *, err: bool = False) -> None:
    if err:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_decisions_that_nobody_asked_for_are_told(
    cli: Callable[..., tuple[int, str, str]], parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(parts)
    small = ("--backbone", "tiny", "--size", "64")
    assert cli("screen", "parts", "--out", "s", *small)[0] == 0
    (parts / "s" / "decisions.csv").write_text("path,decision\n0.png,remove\n")
    given = "fit", "parts", "--screening", "s", "--out", "m", *small
    told = "What was decided in 's/decisions.csv' is not used."
    assert told in cli(*given)[2]
    monkeypatch.setattr("flawsift.cli.options.typer.echo", fails_on_errors)
    assert cli(*given)[0] == 0  # nobody can read the warning
    monkeypatch.undo()
    monkeypatch.chdir(parts)
    assert told not in cli(*given, "--decisions", "s/decisions.csv")[2]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["screen", "parts", "--out", ""], "--out"),
        (["screen", "parts", "--out="], "--out"),
        (["screen", "parts", "--out", "s", "--cache", ""], "--cache"),
        (["predict", "", "parts"], "an argument"),
    ],
)
def test_an_empty_value_is_not_the_current_folder(
    cli: Callable[..., tuple[int, str, str]], parts: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], named: str
) -> None:
    monkeypatch.chdir(parts)
    code, _, error = cli(*given)
    assert (code, error) == (2, f"flawsift: error: The value of {named} is empty. Was a variable not set?\n")
    assert [path.name for path in parts.iterdir()] == ["parts"]
