"""One folder, one result: another one would replace some of its files, and the rest would fit neither."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from flawsift.errors import OutputError
from flawsift.paths import show

# Of every kind of result, the file that no other kind has. All write a `report.html`; the first two a `manifest.json`
# too, by which each is damage to the other.
RESULTS = {
    "model.json": "a model",
    "screening.json": "a screening",
    "predictions.jsonl": "predictions",
    "metrics.json": "an evaluation",
    "drift.json": "a comparison of predictions",
}
WITH_MANIFEST = ("model.json", "screening.json")


def refuse_other_results(folder: str | Path | None, own: Sequence[str] = ()) -> None:
    """Raise where a folder holds a result of another kind than the one that is to be written.

    Predictions and the like that an earlier version put beside a model do not keep the model from being renewed.

    Args:
        folder: Of the new result; it may be missing. None where nothing is to be written.
        own: Names, or patterns, of files of the new result.

    Raises:
        OutputError: It holds another kind of result.
    """
    if folder is None:
        return
    there = [name for name in RESULTS if (Path(folder) / name).is_file()]
    mine = [name for name in there if any(fnmatch(name, pattern) for pattern in own)]
    others = [name for name in there if name not in mine and (not mine or name in WITH_MANIFEST)]
    if others:
        raise OutputError(
            f"'{show(folder)}' holds {RESULTS[others[0]]} ({others[0]}), which another result in the same folder would "
            "damage. Choose another folder."
        )
