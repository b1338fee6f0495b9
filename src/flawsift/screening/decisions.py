"""What a person decided about the images of a screening: one row of decisions.csv per image, each with a version.

A version counts how often a row was written. Whoever writes says which version they saw: two tabs, or two programs,
that decide on different images both win; where they decide on the same one, the later is told instead of overwriting.
"""

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flawsift.data.joins import find_images, images_named, read_table
from flawsift.errors import InputError, ParameterError
from flawsift.files import alone
from flawsift.paths import name_some, show
from flawsift.screening.mixture import DEFECTIVE, GOOD
from flawsift.tables import write_csv

NAME = "decisions.csv"
CHOICES = ("keep", "remove", "unsure")
SAID = {"keep": GOOD, "remove": DEFECTIVE}  # what a decision says of an image
MAX_DIGITS = 9  # of a version: no row is written a billion times
HEADER = ("path", "decision", "version", "time", "defect_type")
MAX_TYPE = 60  # characters of a defect's name
log = logging.getLogger("flawsift")


@dataclass(frozen=True)
class Decision:
    """The state of one image.

    Attributes:
        choice: One of `CHOICES`, or "" where a decision was taken back.
        version: How often it was written; 0 is never.
        time: When, UTC.
        defect_type: Of an image that is removed, in the reviewer's words; "" where nobody said.
    """

    choice: str = ""
    version: int = 0
    time: str = ""
    defect_type: str = ""


@dataclass(frozen=True)
class Change:
    """A decision to be written.

    Attributes:
        name: Relative path as `show` prints it.
        choice: One of `CHOICES`, or "" to take a decision back.
        seen: The version that whoever decides has seen.
        defect_type: None leaves the one that is there, as long as the image stays removed.
    """

    name: str
    choice: str
    seen: int
    defect_type: str | None = None

    def type_after(self, there: Decision) -> str:
        """The defect type in place of that of a row."""
        if self.choice != "remove":
            return ""
        given = there.defect_type if self.defect_type is None else self.defect_type
        return " ".join(given.split())


def read_decisions(path: str | Path) -> dict[str, str]:
    """{relative path: "keep", "remove" or "unsure"} from a CSV file with the columns `path` and `decision`.

    Raises:
        InputError: The file is missing, lacks a column, or has a row that cannot be understood.
    """
    return {name: decision.choice for name, decision in _read(Path(path)).items() if decision.choice}


def is_name(defect_type: str) -> bool:
    """Whether a text can name a type of defect: other tools show it in a list."""
    return len(defect_type) <= MAX_TYPE and defect_type.isprintable()


def read_defect_types(path: str | Path) -> dict[str, str]:
    """{relative path: name of its defect}, of removed images, from the column `defect_type`, which may be missing.

    Raises:
        InputError: As `read_decisions`.
    """
    return {name: decision.defect_type for name, decision in _read(Path(path)).items() if decision.defect_type}


def choices_of(given: str | Path | Mapping[str, str] | None) -> dict[str, str]:
    """Decisions as `read_decisions` gives them, from a file, or from {relative path: decision}; none of None.

    Raises:
        InputError: As `read_decisions`.
        ParameterError: One that is not from a file is not keep, remove or unsure.
    """
    if isinstance(given, str | Path):
        return read_decisions(given)
    choices = given or {}
    checked = {show(name): choice.strip().lower() for name, choice in choices.items()}
    for name, choice in checked.items():
        if choice not in CHOICES:
            raise ParameterError(f"The decision about '{name}' must be keep, remove or unsure, got '{choice}'.")
    return checked


def _read(path: Path) -> dict[str, Decision]:
    where, rows = f"Decisions file '{show(path)}'", read_table(path, "Decisions file", [("path",), ("decision",)])
    decisions: dict[str, Decision] = {}
    for line, row in enumerate(rows, 2):
        name, choice = row["path"], row["decision"]
        choice = choice.strip().lower()
        if choice not in (*CHOICES, ""):
            raise InputError(f"{where}, row {line}: decision must be keep, remove or unsure, got '{choice}'.")
        if name in decisions and decisions[name].choice != choice:
            raise InputError(f"{where}, row {line}: '{name}' is decided twice, differently.")
        version = (row.get("version") or "").strip()
        if version and not (version.isdecimal() and len(version) <= MAX_DIGITS):
            raise InputError(f"{where}, row {line}: version must be a whole number, got '{version}'.")
        kind = " ".join((row.get("defect_type") or "").split()) if choice == "remove" else ""
        if not is_name(kind):
            raise InputError(f"{where}, row {line}: a defect type must be {MAX_TYPE} printable characters at most.")
        decisions[name] = Decision(choice, int(version or 1), row.get("time") or "", kind)
    return decisions


def located(choices: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """Decisions by the names of images, as `show` prints them, where a table names these in another way.

    Args:
        choices: From `read_decisions`.
        names: (N,) relative paths of the images. Decisions about no image are logged, and stay.

    Raises:
        InputError: No decision is about one of these images; or two are about one, see `data.joins.images_named`.
    """
    name_of = images_named(choices, names, "decisions")
    return {show(name_of.get(row, row)): choice for row, choice in choices.items()}


def apply_decisions(
    names: Sequence[str], is_kept: npt.NDArray[np.bool_], choices: Mapping[str, str]
) -> tuple[npt.NDArray[np.bool_], dict[str, int]]:
    """(N,) what is kept once a person has decided, and how many decisions of each kind there were.

    Args:
        names: (N,) relative paths.
        is_kept: (N,) what the screening kept; stands where the choice is "unsure" or there is none.
        choices: From `read_decisions`.

    Raises:
        InputError: None of the decisions is about one of these images, or no image is left.
    """
    position = {show(name): p for p, name in enumerate(names)}
    result = is_kept.copy()
    counts = Counter({"keep": 0, "remove": 0, "unsure": 0, "elsewhere": 0})
    for name, choice in choices.items():
        p = position.get(name)
        counts[choice if p is not None else "elsewhere"] += 1
        if p is not None and choice != "unsure":
            result[p] = choice == "keep"
    if choices and counts["elsewhere"] == len(choices):
        raise InputError(
            f"None of the {len(choices)} decisions is about an image of this set: '{next(iter(choices))}' is not in "
            "it. Give the decisions of this screening."
        )
    if not result.any():
        raise InputError("The decisions leave no image to train on.")
    return result, dict(counts)


@dataclass(eq=False)
class DecisionStore:
    """decisions.csv of one folder, written in one step after every decision.

    Attributes:
        path: The file; it may not exist yet.
        names: Of the images, as `show` prints them: rows that name one in another way (see `data.joins.images_named`)
            are about it, and how many are about none is logged. None takes rows as they are.
        revision: Rises with every change, for those who ask what is new.
    """

    path: Path
    names: Sequence[str] | None = None
    revision: int = 0
    _rows: dict[str, Decision] = field(default_factory=dict)
    _changed: dict[str, int] = field(default_factory=dict)  # {name: revision of its last change}
    _seen: tuple[int, int, int] | None = None  # of the file that _rows is
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._refresh()

    def since(self, revision: int) -> tuple[int, dict[str, Decision]]:
        """The revision now, and every row that changed after an older one.

        Raises:
            InputError: The file was damaged by others.
        """
        with self._lock:
            self._refresh()
            return self.revision, {n: self._rows[n] for n, at in self._changed.items() if at > revision}

    def write(self, changes: Sequence[Change]) -> tuple[dict[str, Decision], dict[str, Decision]]:
        """Write what does not contradict somebody else.

        A change is refused when its image has another version than the one seen, and another choice or defect type than
        wanted.

        Returns:
            The rows written, and the rows that stand against a refused change.

        Raises:
            ParameterError: A choice is unknown, or a defect type is no short text.
            OutputError: The file cannot be written; nothing has changed then.
        """
        if bad := [c.choice for c in changes if c.choice not in (*CHOICES, "")]:
            raise ParameterError(f"A decision must be keep, remove or unsure, got '{bad[0]}'.")
        if not all(is_name(c.defect_type or "") for c in changes):
            raise ParameterError(f"A defect type must be {MAX_TYPE} printable characters at most.")
        with self._lock, alone(self.path):
            self._refresh()
            now = datetime.now(UTC).isoformat(timespec="seconds")
            rows, written, refused = dict(self._rows), {}, {}
            for change in changes:
                there = rows.get(change.name, Decision())
                kind = change.type_after(there)
                if (there.choice, there.defect_type) == (change.choice, kind):
                    written[change.name] = there
                elif there.version != change.seen:
                    refused[change.name] = there
                else:
                    written[change.name] = rows[change.name] = Decision(change.choice, there.version + 1, now, kind)
            if rows != self._rows:
                write_csv(self.path, HEADER, [(n, d.choice, d.version, d.time, d.defect_type) for n, d in rows.items()])
                self._take(rows, self._stamp())
            return written, refused

    def touch(self) -> None:
        """Make the file, without a row, where there is none.

        Raises:
            OutputError: It cannot be written.
        """
        with self._lock, alone(self.path):
            if not self.path.exists():
                write_csv(self.path, HEADER, [])

    def _refresh(self) -> None:
        stamp = self._stamp()
        if stamp != self._seen:
            self._take(self._by_image(_read(self.path)) if stamp is not None else {}, stamp)

    def _by_image(self, rows: Mapping[str, Decision]) -> dict[str, Decision]:
        if self.names is None:
            return dict(rows)
        name_of = find_images(rows, self.names, f"decisions in '{show(self.path)}'")
        if strangers := [row for row in rows if row not in name_of]:
            some = (len(strangers), len(rows), show(self.path), name_some(strangers))
            log.warning("%d of %d decisions in '%s' are about no image of this screening: %s. They stay there.", *some)
        return {name_of.get(row, row): decision for row, decision in rows.items()}

    def _take(self, rows: dict[str, Decision], stamp: tuple[int, int, int] | None) -> None:
        """Rows that are on disk now. What was edited by hand, or taken out of the file, is newer than before."""
        gone = {n: Decision() for n in self._rows if n not in rows}
        rows = {n: _following(self._rows.get(n, Decision()), d) for n, d in {**rows, **gone}.items()}
        if news := [n for n, d in rows.items() if self._rows.get(n) != d]:
            self.revision += 1
            self._changed |= dict.fromkeys(news, self.revision)
        self._rows, self._seen = rows, stamp

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(
                f"Decisions file '{show(self.path)}' cannot be read: {error.strerror or error}."
            ) from error
        return status.st_ino, status.st_mtime_ns, status.st_size


def _following(known: Decision, written: Decision) -> Decision:
    """A row of the file in place of the one known so far.

    A hand writes no versions. Versions must not fall, nor stay for another choice or type: whoever saw the older row
    could overwrite the newer one unseen.
    """
    if (written.choice, written.defect_type) == (known.choice, known.defect_type):
        return written if written.version > known.version else known
    return replace(written, version=max(written.version, known.version + 1))
