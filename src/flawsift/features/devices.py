"""Where torch computes: one rule for backbones and detectors."""

import torch

from flawsift.errors import ParameterError

AUTO = "auto"


def resolve_device(device: str) -> str:
    """The device behind a name: that of "auto" is a GPU where there is one.

    Raises:
        ParameterError: There is no such device here.
    """
    if device == AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        there = torch.device(str(device))
        torch.ones(1, device=there).item()  # "meta" has devices, but no numbers
    except (RuntimeError, AssertionError) as error:  # among them NotImplementedError
        raise ParameterError(f"device '{device}' cannot be used here: there is {', '.join(_devices())}.") from error
    return str(there)


def _devices() -> list[str]:
    """Names of the devices that torch finds on this machine."""
    graphics = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    graphics += ["mps"] if torch.backends.mps.is_available() else []
    return [AUTO, "cpu", *(["cuda"] if graphics[:1] == ["cuda:0"] else []), *graphics]
