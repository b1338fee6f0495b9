"""The learned state of a detector as the flat table of tensors that a safetensors file holds."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_IN = "::"  # joins an attribute and a key in the state's file


def holds_tensors(value: object) -> bool:
    """Whether a value of a state goes into the file: a tensor, or a table of tensors."""
    if isinstance(value, dict):
        return bool(value) and all(isinstance(v, Tensor) for v in value.values())
    return isinstance(value, Tensor)


def flat(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state by the names that they have in the file."""
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            tensors[key] = value
        elif holds_tensors(value):
            tensors |= {f"{key}{_IN}{name}": tensor for name, tensor in value.items()}
    return tensors


def nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `flat` was given, of the names and tensors of a file."""
    state: dict[str, Any] = {}
    for key, tensor in tensors.items():
        attribute, _, name = key.partition(_IN)
        if name:
            state.setdefault(attribute, {})[name] = tensor
        else:
            state[attribute] = tensor
    return state


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """{name in the file: [type of its numbers, *shape]}, ready for JSON."""
    return {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in sorted(tensors.items())}


def check(tensors: Mapping[str, Tensor], shapes: Mapping[str, list[Any]] | None) -> None:
    """Compare the tensors of a file with what was said of them when they were written.

    Args:
        tensors: Of the file.
        shapes: What `shapes_of` returned; None where an earlier version did not say.

    Raises:
        ValueError: One is missing, unknown, of another shape or type, or holds nan or infinity.
    """
    there = shapes_of(tensors)
    if shapes is not None and there != shapes:
        names = sorted(name for name in {*there, *shapes} if there.get(name) != shapes.get(name))
        raise ValueError(f"the tensor {names[0]} is {there.get(names[0])}, not {shapes.get(names[0])}")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the tensor {name} holds values that are no numbers")
