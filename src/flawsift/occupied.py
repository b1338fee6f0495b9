"""One folder, one result: another one would replace some of its files, and the rest would fit neither."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from flawsift.errors import OutputError
from flawsift.paths import show

# Of every kind of result, the file that no other kind has. All write a `report.html` or a `manifest.json`.
RESULTS = {
    "model.json": "a model",
    "screening.json": "a screening",
    "predictions.jsonl": "predictions",
    "metrics.json": "an evaluation",
    "drift.json": "a comparison of predictions",
}


def refuse_other_results(folder: str | Path, own: Sequence[str] = ()) -> None:
    """Raise where a folder holds a result of another kind than the one that is to be written.

    Args:
        folder: Of the new result; it may be missing.
        own: Names, or patterns, of files of the new result.

    Raises:
        OutputError: It holds another kind of result.
    """
    for name, kind in RESULTS.items():
        if not any(fnmatch(name, pattern) for pattern in own) and (Path(folder) / name).is_file():
            raise OutputError(
                f"'{show(folder)}' holds {kind} ({name}), which another result in the same folder would damage. "
                "Choose another folder."
            )
