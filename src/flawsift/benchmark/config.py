"""The file of a benchmark, read and checked."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flawsift.benchmark.extra import needed_for
from flawsift.benchmark.grid import Config
from flawsift.errors import InputError
from flawsift.paths import show


def read_config(path: str | Path) -> Config:
    """Read a benchmark from a TOML file.

    Top level: `alphas`, `seeds`, `presets` (none, oracle_clean, paper, default, ...), `protocols` (no_overlap, overlap,
    official), `subsets` (values of k; empty for the presets' own), `device`, `executor` (as for `--executor`),
    `fan_out` ("cells" or "submodels": what the executor gets), `examples` (pictures per category in the report),
    `screener` and `calibrate` (as for `flawsift.benchmark.trial.Trial`).
    Tables: `backbone` (name, size, weights, runtime); `[[data]]` (name, categories, protocols, n_train, test_normal,
    test_anomalous, and options of its loader); `[[detectors]]` (name, label, preset, params, backbone).

    Raises:
        InputError: The file cannot be read or is not TOML, or pydantic is not installed.
        ParameterError: A key is unknown, or a value is of the wrong type or out of range.
    """
    try:
        content = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last of brackets within brackets
        raise InputError(f"The benchmark '{show(path)}' cannot be read: {error}") from error
    return parse_config(content)


def parse_config(content: Mapping[str, Any]) -> Config:
    """A benchmark from the content of its file; see `read_config`."""
    with needed_for("The file of a benchmark"):
        from flawsift.benchmark import schema  # a tenth of a second of pydantic, which workers have no use for
    return schema.parse_config(content)
