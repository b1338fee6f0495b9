"""The learned state of a detector as the flat table of tensors that a safetensors file holds."""

from collections.abc import Mapping
from typing import Any

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
