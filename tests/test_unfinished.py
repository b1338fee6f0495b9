"""Unfinished work: read as it was written at its own place, and otherwise told and made again."""

from pathlib import Path

import pytest
import torch

from flawsift.unfinished import read_unfinished, write_unfinished

TENSORS = {"scores": torch.arange(4.0), "grids": torch.ones(4, 2, 2, dtype=torch.float16)}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "step" / "scores-0"
    write_unfinished(path, TENSORS)
    return path


def test_it_is_read_as_it_was_written(written: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = read_unfinished(written)
    assert found is not None
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert read_unfinished(written.with_name("scores-1")) is None
    assert not caplog.text, "what is not there is no damage"


def test_a_changed_byte_is_told_and_nothing_is_read(written: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = written.read_bytes()
    for at in range(len(whole)):
        written.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert read_unfinished(written) is None
    for at in (0, 31, 32, 40, len(whole) - 1):
        written.write_bytes(whole[:at])
        assert read_unfinished(written) is None
    assert caplog.text.count("scores-0' is damaged and is made again") == len(whole) + 5


def test_that_of_another_step_is_not_taken(written: Path, caplog: pytest.LogCaptureFixture) -> None:
    for other in (written.with_name("scores-1"), written.parent.parent.with_name("run2") / "step" / "scores-0"):
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(written.read_bytes())
        assert read_unfinished(other) is None
    assert caplog.text.count("is made again") == 2
