"""A short form of `make fuzz` and `make kill`: bad input and kills end in a clear word and lose nothing."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from tools.campaign.fuzz import AREAS, tried
from tools.campaign.kill import kill
from tools.campaign.material import Material, make_material
from tools.campaign.outcome import Answer, judged
from tools.campaign.rows import write_rows

SEED = 5
TRIES = {"requests": 60, "options": 15, "tables": 12, "exports": 16, "models": 10, "images": 10, "caches": 4}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("campaign") / "material")


# as in a command, where what libraries warn of is no error: files of a damaged form are closed when they are collected
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(AREAS))
def test_mutated_input_ends_in_a_clear_word(name: str, material: Material, tmp_path: Path) -> None:
    area = AREAS[name](material, tmp_path / name)
    outcomes = [tried(area, name, SEED, n) for n in range(TRIES[name])]
    assert not [outcome for outcome in outcomes if outcome.kind == "fault"]
    assert any(outcome.kind in ("error", "told") for outcome in outcomes), "nothing was harmed"


def test_killed_commands_leave_the_old_result_or_the_new_one(tmp_path: Path) -> None:
    faults: list[str] = []
    counts = kill(range(3), SEED, tmp_path / "kill", faults.append, ["screen", "watch", "export-model"])
    assert not faults
    assert {name: sum(count.values()) for name, count in counts.items()} == {"screen": 1, "watch": 1, "export-model": 1}


@pytest.mark.parametrize(
    ("answer", "is_checked", "kind"),
    [(Answer(0, "3", ""), True, "same"), (Answer(0, "4", ""), True, "fault"), (Answer(0, "4", ""), False, "valid"),
     (Answer(0, "4", "flawsift: a.csv is odd"), True, "told"), (Answer(0, "3", "flawsift: a.csv is odd"), True, "told"),
     (Answer(0, "NaN", ""), False, "fault"), (Answer(0, "", ""), False, "fault"),
     (Answer(1, "", "a.csv"), True, "fault"), (Answer(2, "", "flawsift: error: a.csv is odd"), True, "error"),
     (Answer(2, "", "flawsift: error: odd"), True, "fault"),
     (Answer(None, "", "Traceback: a.csv"), False, "fault"), (Answer(0, "3", "Traceback: a.csv"), False, "fault"),
     (Answer(-11, "", "a.csv"), False, "fault")],
)  # fmt: skip
def test_who_judges_can_tell(answer: Answer, is_checked: bool, kind: str) -> None:
    assert judged(answer, 3, "what", ["a.csv"], is_checked=is_checked, view=lambda result: result).kind == kind


def test_rows_of_one_area_leave_the_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, "fuzz", 1, {"images": Counter(same=3), "tables": Counter(error=2)})
    write_rows(path, "kill", 2, {"fit": Counter(same=1)})
    write_rows(path, "fuzz", 4, {"tables": Counter(told=5)})
    with path.open() as file:
        found = [(row["task"], row["name"], row["seed"], row["same"], row["told"]) for row in csv.DictReader(file)]
    assert found == [
        ("fuzz", "images", "1", "3", "0"),
        ("fuzz", "tables", "4", "0", "5"),
        ("kill", "fit", "2", "1", "0"),
    ]
