"""A folder that holds one kind of result stays as it is when another kind is to be written into it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flawsift import pipeline
from flawsift.errors import OutputError
from flawsift.features.backbones import Backbone
from flawsift.files import new_result
from flawsift.occupied import RESULTS, refuse_other_results

SMALL = ("--backbone", "tiny", "--size", "64")


def content(folder: Path) -> dict[str, bytes]:
    """What a folder holds, locks left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("command", ["screen", "predict", "evaluate", "drift", "fit", "calibrate"])
def test_commands_leave_the_results_of_others_alone(
    command: str, cli: Callable[..., tuple[int, str, str]], easy_folder: Path, tmp_path: Path
) -> None:
    model, screening = tmp_path / "model", tmp_path / "screening"
    for name, out in (("fit", model), ("screen", screening)):
        assert cli(name, easy_folder, "--out", out, *SMALL)[0] == 0
    into = screening if command in ("fit", "calibrate") else model
    of_model = [model, easy_folder] if command not in ("screen", "fit") else [easy_folder]
    before = content(into)
    code, _, error = cli(command, *of_model, "--out", into, *(SMALL if command in ("screen", "fit") else ()))
    assert code == 2
    assert f"'{into}' holds {'a screening' if into == screening else 'a model'}" in error
    assert content(into) == before


@pytest.mark.parametrize("name", RESULTS)
def test_every_kind_may_replace_itself_only(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    refuse_other_results(tmp_path, [name])
    with pytest.raises(OutputError, match=f"{RESULTS[name]} \\({name}\\)"):
        refuse_other_results(tmp_path)
    refuse_other_results(tmp_path / "missing")


def test_what_an_earlier_version_put_beside_a_model_does_not_keep_it_from_being_renewed(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{}")
    (tmp_path / "predictions.jsonl").write_text("{}")
    refuse_other_results(tmp_path, ["model.json"])
    for own in (["predictions.jsonl"], ["metrics.json"]):
        with pytest.raises(OutputError, match="holds a model"):
            refuse_other_results(tmp_path, own)


def test_no_manifest_replaces_that_of_another_kind(tmp_path: Path) -> None:
    with new_result(tmp_path, old=["model.json"]) as new:
        (new / "model.json").write_text("{}")
    with pytest.raises(OutputError, match="holds a model"), new_result(tmp_path, old=["screening.json"]):
        raise AssertionError("work was done")
    assert list(json.loads((tmp_path / "manifest.json").read_text())["files"]) == ["model.json"]
    with new_result(tmp_path, adds=True) as new:  # a part of the same result
        (new / "more.txt").write_text("")


def test_python_is_told_before_any_work(easy_folder: Path, tiny: Backbone, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    calls: list[Any] = [pipeline.screen, pipeline.fit]
    for call in calls:
        with pytest.raises(OutputError, match="an evaluation"):
            call(easy_folder, backbone=tiny, out=tmp_path, progress=lambda *_: pytest.fail("work was done"))
