"""A benchmark's file: what it says, what is told of a bad one, and the cells that follow."""

import sys
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from flawsift.benchmark.config import parse_config, read_config
from flawsift.benchmark.grid import BackboneSpec, Config, estimate_seconds, plan
from flawsift.datasets import CATEGORIES
from flawsift.datasets.folder import DATA_VARIABLE
from flawsift.errors import InputError, ParameterError

SMALL: dict[str, Any] = {
    "alphas": [0.0, 0.2],
    "seeds": [0],
    "backbone": {"name": "tiny", "size": 64},
    "data": [{"name": "synthetic"}],
    "detectors": [{"name": "padim", "params": {"n_features": 10}}],
}


def grid(**changes: Any) -> Config:
    return parse_config({**SMALL, **changes})


def test_the_plan_is_the_product_and_keeps_together_what_shares_features() -> None:
    config = grid(
        data=[{"name": "synthetic"}, {"name": "realiad", "categories": ["toy", "usb"], "protocols": ["official"]}],
        alphas=[0.0, 0.1, 0.3],
        seeds=[0, 1],
        subsets=[3, 5],
        protocols=["no_overlap", "overlap"],
    )
    cells = plan(config)
    synthetic = [c for c in cells if c.data.name == "synthetic"]
    assert len(synthetic) == 2 * 3 * 2 * 2
    official = [c for c in cells if c.data.name == "realiad"]
    assert {c.alpha for c in official} == {0.0, 0.1}  # 0.3 was not published
    assert len(official) == 2 * 2 * 2 * 2
    places = [(c.data.name, c.category) for c in cells]
    assert places == sorted(places, key=lambda p: places.index(p))
    assert len({c.place("none") for c in cells}) == len(cells)


def test_all_categories_by_name() -> None:
    config = grid(data=[{"name": "visa", "categories": "all"}])
    assert len(plan(config)) == 12 * 2
    assert grid(data=[{"name": "btad"}]).data[0].categories == ("01", "02", "03")


def test_prepared_sets_are_found_by_workers_of_another_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    names = ["cookie", "magnetic_tile", "screw", "piped"]
    read = grid(data=[{"name": name} for name in names]).data
    assert [dict(data.options) for data in read] == [{"root": str(tmp_path / name)} for name in names]
    assert [data.categories for data in read] == [(), (), (), CATEGORIES["piped"]]
    assert {c.category for c in plan(grid(data=[{"name": "piped", "categories": ["PA_BRG01_RL"]}]))} == {"PA_BRG01_RL"}


BAD = [
    ({"alpha": [0.1]}, "benchmark: Unknown key 'alpha'. Did you mean 'alphas'"),
    ({"presets": ["papr"]}, "benchmark, presets: Unknown preset of stage 1 'papr'. Did you mean 'paper'"),
    ({"presets": []}, "benchmark, presets: must not be empty"),
    ({"protocols": ["overlapp"]}, "benchmark, protocols: Unknown protocol 'overlapp'. Did you mean 'overlap'"),
    ({"protocols": []}, "protocols: must not be empty"),
    ({"alphas": [1.0]}, "benchmark, alphas: must be less than 1, got 1.0."),
    ({"alphas": [0.2, -0.1]}, "alphas: must be greater than or equal to 0, got -0.1."),
    ({"alphas": []}, "alphas: must not be empty"),
    ({"alphas": 0.2}, "alphas: must be a valid list, got 0.2."),
    ({"alphas": [True]}, "alphas: must be a valid number, got True."),
    ({"seeds": [0, 0]}, "seeds: must be distinct, got [0, 0]."),
    ({"seeds": [0.5]}, "seeds: must be a valid integer, got 0.5."),
    ({"subsets": [1]}, "subsets: must be greater than or equal to 2, got 1."),
    ({"examples": "many"}, "examples: must be a valid integer, got 'many'."),
    ({"executor": "proces"}, "executor: Unknown executor 'proces'. Did you mean 'process'"),
    ({"screener": "patchcor"}, "screener: Unknown detector 'patchcor'. Did you mean 'patchcore'"),
    ({"calibrate": 1}, "calibrate: must be a valid boolean, got 1."),
    ({"fan_out": "nodes"}, "fan_out: must be 'cells' or 'submodels', got 'nodes'."),
    ({"detectors": []}, "give at least one table [[detectors]] with a name."),
    ({"detectors": ["padim"]}, "[[detectors]] 1: must be a table, got 'padim'."),
    ({"detectors": [{"nam": "padim"}]}, "[[detectors]] 1: Unknown key 'nam'. Did you mean 'name'"),
    ({"detectors": [{"label": "mine"}]}, "[[detectors]] 1, name: must be given."),
    ({"detectors": [{"name": "padim"}, {"name": "padin"}]}, "[[detectors]] 2: Unknown detector 'padin'"),
    ({"detectors": [{"name": "padim", "params": {"n_featurs": 1}}]}, "1: Unknown parameter of PaDiM 'n_featurs'"),
    ({"detectors": [{"name": "padim", "params": {"n_features": 0}}]}, "PaDiM.n_features must be at least 1, got 0."),
    ({"detectors": [{"name": "padim", "params": {"layers": date(2024, 1, 1)}}]}, "1, params.layers: input was not a"),
    ({"detectors": [{"name": "padim", "preset": "papers"}]}, "1: Unknown preset of padim 'papers'"),
    ({"detectors": [{"name": "padim"}, {"name": "padim"}]}, "detectors: must be distinct, got padim, padim."),
    ({"detectors": [{"name": "padim", "backbone": {"siz": 9}}]}, "[[detectors]] 1, backbone: Unknown key 'siz'"),
    ({"data": [{"name": "a"}, {"name": "a"}]}, "benchmark, data: must be distinct, got a, a."),
    (
        {"data": [{"name": "visa", "categories": "candle"}]},
        "[[data]] 1, categories: must be a valid list, got 'cand",
    ),
    ({"data": [{"name": "a", "protocols": ["all"]}]}, "[[data]] 1, protocols: Unknown protocol 'all'"),
    ({"data": [{"name": "a", "n_train": 0}]}, "[[data]] 1, n_train: must be greater than 0, got 0."),
    (
        {"data": [{"name": "a", "test_normal": -1}]},
        "must be a number of images or a share of them, got -1.",
    ),
    ({"data": [{"name": "a", "sizes": {"b": 1}}]}, "[[data]] 1, sizes: must be a text, a number, a truth value or"),
    ({"backbone": {"nam": "tiny"}}, "[backbone]: Unknown key 'nam'. Did you mean 'name'"),
    ({"backbone": {"size": 0}}, "[backbone], size: must be greater than 0, got 0."),
    ({"backbone": {"runtime": "onnx"}}, "[backbone], runtime: must be 'auto', 'torch' or 'openvino', got 'onnx'."),
]


@pytest.mark.parametrize(("changes", "text"), BAD)
def test_a_bad_grid_is_told_before_any_work(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ParameterError) as raised:
        grid(**changes)
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_a_file_says_is_what_the_grid_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    visa = {"name": "visa", "categories": ["pcb1"], "test_normal": 0.5, "n_train": 7, "resolution": 256, "b": [1, 2]}
    own = {"name": "padim", "label": "P", "preset": "paper", "backbone": {"size": 32}, "params": {"n_features": 9}}
    read = grid(data=[visa, {"name": "./own"}], detectors=[own, {"name": "patchcore"}], subsets=[], alphas=[0])
    data, folder = read.data
    assert (data.categories, dict(data.sizes)) == (("pcb1",), {"n_train": 7, "test_normal": 0.5})
    assert dict(data.options) == {"b": (1, 2), "resolution": 256, "root": str(tmp_path / "visa")}
    assert (folder.categories, folder.sizes, folder.options) == ((), (), ())
    first, second = read.detectors
    assert (first.label, first.preset, first.backbone) == ("P", "paper", BackboneSpec(name="tiny", size=32))
    assert (second.label, second.preset, second.backbone) == (
        "patchcore",
        "default",
        BackboneSpec(name="tiny", size=64),
    )
    assert first.make(3).params()["n_features"] == 9
    assert (read.alphas, read.subsets) == ((0.0,), (None,))
    left_out = {f.name for f in fields(Config)} - {"data", "detectors", "alphas", "seeds"}
    assert {name: getattr(read, name) for name in left_out} == {name: getattr(Config, name) for name in left_out}


def test_without_pydantic_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flawsift.benchmark.schema", raising=False)
    monkeypatch.delattr("flawsift.benchmark.schema", raising=False)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(InputError, match=r"needs the package pydantic: pip install 'flawsift\[benchmark\]'"):
        grid()


def test_a_file_that_is_no_grid(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("alphas = [")
    with pytest.raises(InputError, match="cannot be read"):
        read_config(tmp_path / "bad.toml")


def test_time_is_estimated_from_the_nearest_rows() -> None:
    config = grid(data=[{"name": "synthetic"}, {"name": "cookie"}], alphas=[0.0])
    rows = [
        {"detector": "padim", "data": "synthetic", "seconds_cell": "10"},
        {"detector": "padim", "data": "synthetic", "seconds_cell": "20"},
        {"detector": "padim", "data": "elpv", "seconds_cell": "60"},
        {"detector": "padim", "data": "elpv", "seconds_cell": "999", "error": "x"},
    ]
    assert estimate_seconds(plan(config), rows) == (15 + 30, 0)  # cookie: any data
    assert estimate_seconds(plan(config), []) == (0.0, 2)
