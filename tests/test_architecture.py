"""A room imports only rooms before its own; functions and files stay readable.

The order of the rooms is `ROOMS`; ARCHITECTURE.md explains it.
"""

import ast
import functools
import graphlib
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import flawsift

ROOT = Path(flawsift.__file__).parent
# Modules of the first line are leaves: they import nothing of flawsift but each other.
LEAVES = [
    "damage",
    "errors",
    "executors",
    "files",
    "occupied",
    "paths",
    "progress",
    "tables",
    "types",
    "unfinished",
    "workers",
]
ROOMS = ["data", "runtime", "datasets", "features", "metrics", "detectors", "screening", "models"]
ROOMS += ["reports", "deploy", "pipeline", "adapters"]
ROOMS += ["review", "benchmark", "cli", "testing"]

# What still fits on a screen or two. A function may be larger where a comment `# long: REASON` says why, beside its
# `def` or on the line above it or its decorators; `self` and `cls` are no parameters.
LIMITS = {"lines of a function": 60, "parameters": 8, "lines of a file": 400}
# What was larger when the limits came, as "module" or "module.function": take out what has been mended, add nothing.
STILL_LARGE: set[str] = set()

MODULES = {  # dotted name -> file
    ".".join(["flawsift", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports of flawsift, lazily or not."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flawsift":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "flawsift")


def module_of(name: str) -> str:
    """`flawsift.data.images` of `flawsift.data.images.ImageSet`, and of itself."""
    return name if name in MODULES else name.rpartition(".")[0]


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
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef) and node.bases and path.name != "base.py":
                bases = [ast.unparse(base) for base in node.bases]
                assert bases in (["Detector"], ["NamedTuple"], ["nn.Module"], ["Protocol"]), node.name


def test_no_two_modules_import_each_other() -> None:
    """Nor through others. Lazy imports count, and those for type checkers, but for the names that flawsift exports."""
    graph = {name: {module_of(found) for found in imports(path)} - {name} for name, path in MODULES.items()}
    graph["flawsift"] = set()
    assert graph["flawsift.pipeline"], "nothing was read"
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the modules of a circle


def test_exported_names_are_listed_once_and_in_order() -> None:
    exports = flawsift._EXPORTS
    kinds = {
        name: (not name.isupper(), not name[0].isupper(), name) for name in exports
    }  # constants, classes, functions
    assert list(exports) == sorted(exports, key=kinds.__getitem__)
    assert flawsift.__all__ == ["__version__", *exports]
    assert dir(flawsift) == sorted(flawsift.__all__)
    (block,) = (node for node in parsed(ROOT / "__init__.py").body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    shown: dict[str, str] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "type checkers take only `import x as x` for an export"
            shown[alias.name] = str(node.module).removeprefix("flawsift.")
    assert shown == exports


@pytest.mark.parametrize("name", flawsift._EXPORTS)
def test_an_exported_name_is_defined_where_it_is_said_to_be(name: str) -> None:
    home = flawsift._EXPORTS[name]
    defined: list[str] = []
    for node in parsed(MODULES[f"flawsift.{home}"]).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined += [ast.unparse(target) for target in targets]
    assert defined.count(name) == 1, f"{home} does not define {name}, or twice"
    assert getattr(flawsift, name) is getattr(importlib.import_module(f"flawsift.{home}"), name)


def oversized() -> Iterator[str]:
    """Modules and functions above `LIMITS` that no comment excuses."""
    for module, path in MODULES.items():
        lines = path.read_text("utf-8").splitlines()
        name = module.removeprefix("flawsift.")
        if len(lines) > LIMITS["lines of a file"]:
            yield name
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n_lines = (node.end_lineno or 0) - node.lineno + 1
                few = n_lines <= LIMITS["lines of a function"] and n_parameters(node) <= LIMITS["parameters"]
                above = min(part.lineno for part in [node, *node.decorator_list]) - 1
                if not few and not any("# long: " in line for line in lines[max(above - 1, 0) : node.lineno]):
                    yield f"{name}.{node.name}"


def n_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = node.args
    named = [a.arg for a in [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg] if a]
    return len(named) - (named[:1] in (["self"], ["cls"]))


def test_functions_and_files_are_readable() -> None:
    large = set(oversized())
    assert not large - STILL_LARGE, f"{sorted(large - STILL_LARGE)} exceed {LIMITS}"
    assert not STILL_LARGE - large, f"{sorted(STILL_LARGE - large)} are within the limits: take them out of STILL_LARGE"
