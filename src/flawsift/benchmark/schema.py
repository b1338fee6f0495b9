"""What a benchmark's file may say: its tables, keys and values, checked by pydantic, and errors for people."""

import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from flawsift.benchmark.grid import (
    BY_PRESET,
    PROTOCOLS,
    SIZES,
    BackboneSpec,
    Config,
    DataSpec,
    DetectorSpec,
    options_of,
)
from flawsift.datasets import CATEGORIES
from flawsift.datasets.folder import DATA_VARIABLE
from flawsift.detectors.registry import detector_class
from flawsift.errors import ParameterError, unknown_name
from flawsift.executors import make_executor
from flawsift.features.runtimes import Runtime
from flawsift.screening.options import OWN


def parse_config(content: Mapping[str, Any]) -> Config:
    """A benchmark from the content of its file; see `flawsift.benchmark.config.read_config`.

    Raises:
        ParameterError: A key is unknown or missing, or a value is of the wrong type or out of range.
    """
    try:
        file = BenchmarkFile.model_validate(content)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # a key that is misspelt is missing, too: what is unknown tells more
        first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
        raise ParameterError(_text(first)) from None
    given = file.model_dump(exclude_unset=True, exclude={"backbone", "data", "detectors"})
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    if not file.subsets:
        settings.pop("subsets", None)
    backbone = BackboneSpec(**file.backbone.model_dump(exclude_unset=True))
    return Config(
        data=tuple(table.spec() for table in file.data),
        detectors=tuple(table.spec(backbone) for table in file.detectors),
        **settings,
    )


# ---- values ----------------------------------------------------------------------------------------------------------


T = TypeVar("T")


def _several(values: list[T]) -> list[T]:
    if not values:
        raise PydanticCustomError("empty", "Input should not be empty")
    return _distinct(values)


def _distinct(values: list[T]) -> list[T]:
    if len(set(values)) < len(values):
        raise PydanticCustomError("distinct", "Input should be distinct")
    return values


def _preset(name: str) -> str:
    options_of(name)
    return name


def _protocol(name: str) -> str:
    if name not in PROTOCOLS:
        raise ParameterError(unknown_name("protocol", name, PROTOCOLS))
    return name


def _executor(text: str) -> str:
    make_executor(text)
    return text


def _screener(name: str) -> str:
    if name not in (BY_PRESET, OWN):
        detector_class(name)
    return name


def _size(value: Any) -> int | float:
    """A whole number counts images, a fraction is a share of them: neither becomes the other."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise PydanticCustomError("size", "Input should be a number of images or a share of them")
    return value


def _option(value: Any) -> Any:
    """An option of a loader, which must be hashable: a cell is the key of its rows."""
    plain = str | int | float | bool
    if isinstance(value, list) and all(isinstance(v, plain) for v in value):
        return tuple(value)
    if not isinstance(value, plain):
        raise PydanticCustomError("option", "Input should be a text, a number, a truth value or a list of those")
    return value


Alphas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], AfterValidator(_several)]
Seeds = Annotated[list[NonNegativeInt], AfterValidator(_several)]
Presets = Annotated[list[Annotated[str, AfterValidator(_preset)]], AfterValidator(_several)]
Protocols = Annotated[list[Annotated[str, AfterValidator(_protocol)]], AfterValidator(_distinct)]
Subsets = Annotated[list[Annotated[int, Field(ge=2)]], AfterValidator(_distinct)]
Size = Annotated[Any, AfterValidator(_size)]
Categories = Annotated[list[str], BeforeValidator(lambda value: [] if value == "all" else value)]


# ---- tables ----------------------------------------------------------------------------------------------------------


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class BackboneTable(_Table):
    """[backbone], and what a detector changes of it."""

    name: str = BackboneSpec.name
    size: PositiveInt = BackboneSpec.size
    weights: str = ""
    runtime: Runtime = "auto"


class DataTable(_Table):
    """[[data]]: its own keys, and options of the loader."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[Any, AfterValidator(_option)]]

    name: str
    categories: Categories = []
    protocols: Protocols = []
    n_train: PositiveInt = 1
    test_normal: Size = 0
    test_anomalous: Size = 0

    def spec(self) -> DataSpec:
        """The same for the grid, with the place of a published set that workers may not know."""
        options = dict(self.__pydantic_extra__)
        base = os.environ.get(DATA_VARIABLE)
        if self.name in (*CATEGORIES, "cookie", "magnetic_tile", "screw") and base and "root" not in options:
            options["root"] = str(Path(base, self.name).resolve())  # workers may have another environment
        return DataSpec(
            name=self.name,
            categories=tuple(self.categories) or CATEGORIES.get(self.name, ()),
            protocols=tuple(self.protocols),
            sizes=tuple((key, getattr(self, key)) for key in SIZES if key in self.model_fields_set),
            options=tuple(sorted(options.items())),
        )


class DetectorTable(_Table):
    """[[detectors]]; parameters are those of the class."""

    name: str
    label: str = ""
    preset: str = DetectorSpec.preset
    params: dict[str, JsonValue] = {}
    backbone: BackboneTable = BackboneTable()

    @model_validator(mode="after")
    def _can_be_made(self) -> Self:
        self.spec(BackboneSpec()).make(0)  # bad parameters are told now, not after hours
        return self

    def spec(self, default: BackboneSpec) -> DetectorSpec:
        """The same for the grid; `default` is the backbone of detectors that name none of their own."""
        own = self.backbone.model_dump(exclude_unset=True)
        return DetectorSpec(
            label=self.label or self.name,
            name=self.name,
            preset=self.preset,
            params=json.dumps(self.params, sort_keys=True),
            backbone=BackboneSpec(**{**vars(default), **own}),
        )


Named = TypeVar("Named", DataTable, DetectorTable)


def _named(tables: list[Named], info: ValidationInfo) -> list[Named]:
    if not tables:
        raise ParameterError(f"give at least one table [[{info.field_name}]] with a name.")
    names = [getattr(table, "label", "") or table.name for table in tables]
    if len(set(names)) < len(names):
        raise ParameterError(f"must be distinct, got {', '.join(names)}. Give each a label or name.")
    return tables


class BenchmarkFile(_Table):
    """The whole file. What it leaves out is `flawsift.benchmark.grid.Config`'s to say."""

    data: Annotated[list[DataTable], AfterValidator(_named)] = Field(default=[], validate_default=True)
    detectors: Annotated[list[DetectorTable], AfterValidator(_named)] = Field(default=[], validate_default=True)
    backbone: BackboneTable = BackboneTable()
    alphas: Alphas = []
    seeds: Seeds = []
    presets: Presets = []
    protocols: Annotated[Protocols, AfterValidator(_several)] = []
    subsets: Subsets = []
    device: str = ""
    executor: Annotated[str, AfterValidator(_executor)] = ""
    fan_out: Literal["cells", "submodels"] = "cells"
    examples: NonNegativeInt = 0
    screener: Annotated[str, AfterValidator(_screener)] = ""
    calibrate: bool = True


# ---- errors ----------------------------------------------------------------------------------------------------------

_TABLES: Mapping[str, type[_Table]] = {"backbone": BackboneTable, "data": DataTable, "detectors": DetectorTable}


def _text(error: ErrorDetails) -> str:
    """One line: table, key, constraint and value."""
    table, model, keys = _place(error["loc"])
    unknown = keys.pop() if error["type"] == "extra_forbidden" else None
    where = ", ".join(filter(None, [table, ".".join(keys)]))
    if unknown is not None:
        return f"{where}: {unknown_name('key', unknown, model.model_fields)}"
    if error["type"] == "missing":
        return f"{where}: must be given."
    if error["type"] == "value_error":  # one of flawsift's own, which tells the value
        return f"{where}: {error['ctx']['error']}"
    kind = "must be a table" if error["type"] in ("model_type", "dict_type") else error["msg"]
    return f"{where}: {kind.replace('Input should', 'must', 1)}, got {reprlib.repr(error['input'])}."


def _place(location: Sequence[str | int]) -> tuple[str, type[_Table], list[str]]:
    """(table as a file writes it, its model, keys within it) of where pydantic found an error."""
    match location:
        case ("data" | "detectors" as name, int(position), *inner):
            table, model = f"[[{name}]] {position + 1}", _TABLES[name]
        case ("backbone" as name, _, *_):
            table, model, inner = f"[{name}]", _TABLES[name], list(location[1:])
        case _:
            table, model, inner = "benchmark", BenchmarkFile, list(location)
    if len(inner) > 1 and inner[0] == "backbone":
        model = BackboneTable  # of a detector
    return table, model, [key for key in inner if isinstance(key, str)]
