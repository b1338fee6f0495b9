"""Builds the image of Dockerfile and tries it; without docker or podman, runs the same steps in an environment.

A small model is exported, served, asked under the health check and with a picture, and its answer compared with the
model's. Prints what it takes: size, seconds until it answers, memory.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMAGE = "flawsift-check"
KEY = "of-a-check-and-no-secret"
PORT = 8000  # that the health check asks
PATIENCE = 60.0  # seconds until it must answer


def main() -> None:
    """Build, serve, ask, compare, measure."""
    with tempfile.TemporaryDirectory(prefix="flawsift-container-") as folder:
        line, picture, expected = exported(Path(folder))
        engine = next((name for name in ("docker", "podman") if runs(name)), None)
        print(f"With {engine}." if engine else "Neither docker nor podman runs here: the same steps in an environment.")
        served = in_container(engine, line) if engine else in_environment(Path(folder), line)
        with served as (megabytes, check, memory):
            seconds = answered()
            check()
            answer = asked(picture)
            print(f"size {megabytes:.0f} MB, answers after {seconds:.1f} s, memory {memory():.0f} MB after a picture")
        difference = abs(answer["score"] - expected) / expected
        if difference > 1e-3:
            sys.exit(f"It scores {answer['score']}, and the model {expected}.")
        print(f"The score of a picture is the model's, within {difference:.1e}.")


def exported(folder: Path) -> tuple[Path, bytes, float]:
    """A small model as a file, a picture, and its score."""
    import io

    import flawsift
    from flawsift.deploy.export import export_model
    from flawsift.features.store import FeatureStore
    from flawsift.testing import easy_set, tiny_backbone

    images = easy_set().images
    model = flawsift.fit(images, "patchcore", tiny_backbone(), store=FeatureStore(folder / "cache")).model
    export_model(model, folder / "line")
    content = io.BytesIO()
    images.image(45).save(content, "PNG")
    return folder / "line", content.getvalue(), float(model.predict(images.image(45)).scores[0])


def runs(engine: str) -> bool:
    """Whether an engine is there and has a daemon."""
    if shutil.which(engine) is None:
        return False
    return subprocess.run([engine, "info"], capture_output=True, check=False, timeout=60).returncode == 0


@contextmanager
def in_container(engine: str, line: Path) -> Iterator[tuple[float, Callable[[], object], Callable[[], float]]]:
    """The image built and served: its size, its health check, and its memory."""
    call(engine, "build", "--tag", IMAGE, str(ROOT))
    n_bytes = int(call(engine, "image", "inspect", "--format", "{{.Size}}", IMAGE))
    where = ["--publish", f"127.0.0.1:{PORT}:{PORT}", "--volume", f"{line}:/model:ro"]
    safe = ["--read-only", "--tmpfs", "/tmp", "--env", f"FLAWSIFT_API_KEY={KEY}"]
    name = call(engine, "run", "--detach", "--rm", *safe, *where, IMAGE).strip()
    try:
        peak = "next(l for l in open('/proc/1/status') if 'VmHWM' in l).split()[1]"
        yield (
            n_bytes / 1e6,
            lambda: call(engine, "exec", name, *health_check()),
            lambda: int(call(engine, "exec", name, "python", "-c", f"print({peak})")) / 1e3,
        )
    finally:
        call(engine, "stop", name)


@contextmanager
def in_environment(folder: Path, line: Path) -> Iterator[tuple[float, Callable[[], object], Callable[[], float]]]:
    """The steps of Dockerfile in an environment: its size, the health check, and the memory of the server."""
    python = folder / "venv" / "bin" / "python"
    call(sys.executable, "-m", "venv", str(folder / "venv"))
    group = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["dependency-groups"]["runtime"]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    call(*pip, "--constraint", str(ROOT / "constraints.txt"), *group)
    call(*pip, "--no-deps", str(ROOT))
    call(str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "pip", "setuptools")
    found = call(str(python), "-c", "import importlib.util; print(importlib.util.find_spec('torch'))").strip()
    if found != "None":
        sys.exit(f"torch is there: {found}")
    n_bytes = sum(f.stat().st_size for f in (folder / "venv").rglob("*") if f.is_file() and not f.is_symlink())
    command = [str(python), "-m", "flawsift", "serve", str(line), "--host", "0.0.0.0", "--port", str(PORT)]
    environment = {"FLAWSIFT_API_KEY": KEY, "PATH": str(python.parent)}
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    try:

        def memory() -> float:
            status = Path(f"/proc/{server.pid}/status").read_text()
            peak = re.search(r"VmHWM:\s*(\d+)", status)
            assert peak is not None
            return int(peak[1]) / 1e3

        yield n_bytes / 1e6, lambda: call(str(python), *health_check()[1:]), memory
    finally:
        server.terminate()
        server.wait(timeout=60)


def health_check() -> list[str]:
    """The command of Dockerfile."""
    command = re.search(r"HEALTHCHECK[^\[]*CMD (\[[^\n]*\])", (ROOT / "Dockerfile").read_text("utf-8"))
    assert command is not None
    words: list[str] = json.loads(command[1])
    return words


def answered() -> float:
    """Seconds until it answers."""
    started = time.monotonic()
    while time.monotonic() - started < PATIENCE:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5):
                return time.monotonic() - started
        except (urllib.error.URLError, OSError):
            time.sleep(0.02)
    sys.exit(f"It did not answer within {PATIENCE:g} s.")


def asked(picture: bytes) -> dict[str, Any]:
    """What it says of a picture, with regions and heatmap; without the key it must say nothing."""
    address = f"http://127.0.0.1:{PORT}/v1/default/inspect?regions=1&map=png"
    try:
        urllib.request.urlopen(urllib.request.Request(address, picture))
        sys.exit("It answers without the key.")
    except urllib.error.HTTPError as error:
        if error.code != 401:
            raise
    request = urllib.request.Request(address, picture, {"X-API-Key": KEY, "Content-Type": "image/png"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        (result,) = json.load(answer)["results"]
    told: dict[str, Any] = result
    return told


def call(*command: str) -> str:
    """What a command prints; its errors end the check."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
