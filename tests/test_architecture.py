"""Modules import only what comes before them in the reading order, and leaves."""

import ast
from pathlib import Path

import flawsift

ROOT = Path(flawsift.__file__).parent
# The reading order of ARCHITECTURE.md.
ORDER = ["images", "backbones", "features", "detector", "detectors", "submodels", "screening", "metrics", "results"]
ORDER += ["models", "pipeline", "report", "evaluation", "export", "refit", "review", "review_server", "diagnostics"]
ORDER += ["demo", "cli_options", "cli_benchmark", "cli"]
LEAVES = {"errors", "executors", "files", "progress", "maps", "nn", "consensus", "calibration", "overlays", "views"}
LEAVES |= {"coreset", "corruption", "decisions", "flows", "lookalikes", "networks", "rows", "runtimes", "training"}
LEAVES |= {"aupro", "histogram", "pages", "pairs", "trunks"}
# Leaves may use other leaves and the id type; these stand on top of the numbered modules.
TOP = {"testing", "datasets", "contamination", "grid", "trial", "benchmark", "benchmark_report", "benchmark_tables"}


def imports(path: Path) -> set[str]:
    """Names of flawsift modules that a file imports, lazily or not."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flawsift":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("flawsift.")}
    return found & {*ORDER, *LEAVES, *TOP}


def files(module: str) -> list[Path]:
    folder = ROOT / module
    return sorted(folder.glob("*.py")) if folder.is_dir() else [ROOT / f"{module}.py"]


def test_every_module_has_its_place() -> None:
    there = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p.is_dir() and (p / "__init__.py").exists())}
    assert there - {"__init__"} == {*ORDER, *LEAVES, *TOP}


def test_numbered_modules_look_back_only() -> None:
    for position, module in enumerate(ORDER[:-4]):
        for path in files(module):
            later = imports(path) - set(ORDER[: position + 1]) - LEAVES
            assert not later, f"{path.name} imports {later}, which come later"


def test_leaves_use_leaves() -> None:
    for module in LEAVES:
        for path in files(module):
            assert imports(path) <= LEAVES | {"images"}, f"{path.name} is no leaf: {imports(path)}"


def test_inheritance_is_one_level_deep() -> None:
    for path in (ROOT / "detectors").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.bases:
                assert [ast.unparse(b) for b in node.bases] in (["Detector"], ["NamedTuple"], ["nn.Module"]), node.name
