"""Whom work tells how far it is."""

import pytest

from flawsift.progress import as_progress, silent


@pytest.mark.parametrize("option", [None, False])
def test_silence(option: bool | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with as_progress(option) as tell:
        assert tell is silent
        tell("features", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_callable_is_told() -> None:
    told: list[tuple[str, int, int]] = []

    def listen(stage: str, done: int, total: int) -> None:
        told.append((stage, done, total))

    with as_progress(listen) as tell, as_progress(tell) as inner:
        inner("features", 1, 2)
    assert told == [("features", 1, 2)]


def test_a_bar_on_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    with as_progress(True) as tell:
        tell("features", 3, 64)
        tell("sub-models", 0, 5)
        tell("features", 64, 64)
    out, err = capsys.readouterr()
    assert out == ""
    assert "features" in err
    assert "64/64" in err
    assert "0/5" in err
