"""A room imports only rooms before its own. The order is `ROOMS`; ARCHITECTURE.md explains it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flawsift

ROOT = Path(flawsift.__file__).parent
# Modules of the first line are leaves: they import nothing of flawsift but each other.
LEAVES = ["errors", "executors", "files", "paths", "progress", "types"]
ROOMS = ["data", "datasets", "features", "metrics", "detectors", "screening", "models", "reports", "pipeline"]
ROOMS += ["review", "benchmark", "cli", "testing"]


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports of flawsift, lazily or not."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flawsift":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "flawsift")


def room(name: str) -> str:
    """`data` of `flawsift.data.images.ImageSet`; "" of what the package itself holds, such as its version."""
    parts = name.split(".")[1:]
    return parts[0] if parts and parts[0] in {*LEAVES, *ROOMS} else ""


def files(name: str) -> list[Path]:
    folder = ROOT / name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [ROOT / f"{name}.py"]


def test_every_module_has_its_room() -> None:
    there = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p.is_dir() and list(p.rglob("*.py")))}
    assert there - {"__init__", "__main__"} == {*LEAVES, *ROOMS}


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_look_back_only(name: str) -> None:
    known = {"", *LEAVES, *ROOMS[: ROOMS.index(name) + 1]}
    for path in files(name):
        later = {found for found in imports(path) if room(found) not in known}
        assert not later, f"{path.relative_to(ROOT)} imports {sorted(later)}, which come later"


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_use_leaves(name: str) -> None:
    for path in files(name):
        assert {room(found) for found in imports(path)} <= {*LEAVES}, f"{path.name} is no leaf"


def test_inheritance_is_one_level_deep() -> None:
    for path in (ROOT / "detectors").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef) and node.bases and path.name != "base.py":
                assert [ast.unparse(b) for b in node.bases] in (["Detector"], ["NamedTuple"], ["nn.Module"]), node.name
