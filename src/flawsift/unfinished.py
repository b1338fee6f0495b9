"""Unfinished work on disk: tensors that a later run goes on with, or makes again where they are damaged."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from flawsift.damage import DAMAGE
from flawsift.files import write_bytes
from flawsift.paths import show

log = logging.getLogger("flawsift")

_DIGEST = hashlib.sha256().digest_size  # bytes before the tensors: safetensors itself does not tell a changed number
_PLACE = 3  # last parts of a path, which say what a file is of: run, step of the run, name


def write_unfinished(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors after the SHA-256 of them and of their place, in one step.

    Raises:
        OutputError: They cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_bytes(path, _digest(path, content) + content)


def read_unfinished(path: Path) -> dict[str, Tensor] | None:
    """What `write_unfinished` wrote; None where there is nothing, or something else, which is told."""
    try:
        content = path.read_bytes()
        if _digest(path, content[_DIGEST:]) != content[:_DIGEST]:
            raise ValueError("it does not match its SHA-256")
        return load(content[_DIGEST:])
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, *DAMAGE) as error:
        tell_made_again(path, error)
        return None


def _digest(path: Path, content: bytes) -> bytes:
    return hashlib.sha256("/".join(path.parts[-_PLACE:]).encode("utf-8", "surrogateescape") + content).digest()


def tell_made_again(path: Path, error: Exception) -> None:
    """Warn that unfinished work cannot be used, which costs its time and nothing else."""
    log.warning("Unfinished work in '%s' is damaged and is made again: %s.", show(path), str(error).rstrip("."))
