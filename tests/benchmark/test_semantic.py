"""The stand-in for semantic anomalies runs, on splits as its text says."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flawsift.benchmark.rows import read_rows

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmarks are not in the source distribution")


@pytest.fixture
def semantic(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("semantic")


def test_features_are_grey_values(semantic: Any) -> None:
    images, target = semantic.digits()
    batch = next(images.select([5, 900]).batches((semantic.LAYER,)))
    for id_, values in zip((5, 900), batch.features[semantic.LAYER], strict=True):
        grey = np.asarray(images.image(id_))[:, :, 0].flatten()
        np.testing.assert_allclose(values.flatten() * 255 / 16, grey, atol=1)
    assert np.bincount(target).min() > 170


def test_a_table_of_one_digit(
    semantic: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    splits: list[Any] = []
    contaminate, (_, target) = semantic.contaminate, semantic.digits()

    def watch(*arguments: Any, **options: Any) -> Any:
        splits.append(contaminate(*arguments, **options))
        return splits[-1]

    monkeypatch.setattr(semantic, "contaminate", watch)
    options = ["--digits", "3", "--steps", "20", "--seeds", "0", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["semantic.py", *options])
    semantic.main()
    figures = json.loads(capsys.readouterr().out)
    rows = read_rows(tmp_path / "semantic.csv")
    assert [float(row["alpha"]) for row in rows] == [ratio for ratio in semantic.RATIOS for _ in range(2)]
    for row in rows:
        auroc = float(row["image_auroc"])
        assert auroc > (0.7 if row["detector"] == "funad" else 0.9), "no better than chance"
        assert figures[f"{row['detector']}_{row['alpha']}"] == pytest.approx(auroc, abs=1e-3), "one digit, one seed"
    for ratio, split in zip(semantic.RATIOS, splits, strict=True):
        train, test = target[split.train_ids] != 3, target[split.test_ids] != 3
        assert not set(split.train_ids.tolist()) & set(split.test_ids.tolist())
        assert train.sum() == int(ratio * (~train).sum())
        assert test.sum() == (~test).sum() == (target == 3).sum() // 2
        assert (~train).sum() == (target == 3).sum() - (~test).sum()
