"""The table of a screening, a row per image, which a person can read, sort and edit in a spreadsheet."""

import itertools
from pathlib import PurePosixPath

from flawsift.paths import name_some
from flawsift.screening.result import Screening
from flawsift.tables import cells_of

NEEDED = ("id", "path", "kept", "error")
YES = frozenset({"1", "true", "yes"})  # what counts as kept in an edited table
NO = frozenset({"0", "false", "no", ""})


def table_of(screening: Screening) -> tuple[list[str], list[list[object]]]:
    """Header and rows, those of unreadable images last and without an id."""
    sub = screening.submodels
    n_models = 0 if sub is None else len(sub.score_matrix)
    columns = ["subset", *(f"score_{m}" for m in range(n_models))] if sub is not None else []
    grouped = ["group"] if screening.groups else []
    scores = ["held_out_score", "divergence", "consensus", "defect_probability"]
    header = ["id", "path", *grouped, *columns, *scores, "kept", "error"]
    spread = None if sub is None else sub.divergence
    rows: list[list[object]] = []
    for p, (id_, kept) in enumerate(zip(screening.ids, screening.is_kept, strict=True)):
        row: list[object] = [int(id_), screening.names[p]]
        row += [screening.groups.get(int(id_), "")] if grouped else []
        if sub is not None:
            row += [";".join(map(str, sub.subset_of[:, p])), *(f"{s:.7g}" for s in sub.score_matrix[:, p])]
        row += [f"{screening.held_out_scores[p]:.9g}", "" if spread is None else f"{spread[p]:.9g}"]
        row += [f"{screening.consensus[p]:.9g}", f"{screening.probability[p]:.9g}"]
        rows.append([*row, int(kept), ""])
    blank = [""] * (len(grouped) + len(columns) + len(scores))
    rows += [["", name, *blank, 0, reason] for name, reason in screening.unreadable.items()]
    return header, rows


def rows_of(table: bytes) -> list[dict[str, str]]:
    """Rows of the images that could be read, by id, of the content of a table.

    Raises:
        flawsift.damage.DAMAGE: It is damaged.
    """
    header, *cells = cells_of(table) or [[]]
    if lacking := [name for name in NEEDED if name not in header]:
        raise ValueError(f"no column '{lacking[0]}' among {name_some(header) or 'none'}; cells are parted by commas")
    # spreadsheets leave out empty cells at the end of a row, which those of `error` are; others were cut off
    rows = [{"error": "", **dict(zip(header, row, strict=False))} for row in cells]
    if short := [row.get("path", "") for row in rows if len(row) < len(header)]:
        raise ValueError(f"the row of '{short[0]}' is cut off")
    usable = sorted((row for row in rows if not row["error"]), key=lambda row: int(row["id"]))
    if twice := [a["path"] for a, b in itertools.pairwise(usable) if a["id"] == b["id"]]:
        raise ValueError(f"'{twice[0]}' is there twice")
    return usable


def safe_path(name: str) -> str:
    """A path that stays below its root.

    Raises:
        ValueError: It does not.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
        raise ValueError(f"'{name}' leads out of the image folder")
    return name


def is_yes(cell: str) -> bool:
    """Whether a cell of `kept` says yes.

    Raises:
        ValueError: It says neither yes nor no.
    """
    lowered = cell.strip().lower()
    if lowered not in YES | NO:
        raise ValueError(f"kept must be 1 or 0, got '{cell}'")
    return lowered in YES
