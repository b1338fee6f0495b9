"""The exceptions that flawsift raises on purpose.

    Exception
    └── FlawsiftError            everything below; its text is meant for the user
        ├── InputError           images or folders that cannot be used (also a ValueError)
        ├── ParameterError       a parameter out of its range (also a ValueError)
        ├── NotFittedError       `predict` before `fit` (also a ValueError)
        ├── WeightsError         backbone weights missing, unreachable or not the ones expected
        ├── ModelError           a model folder that is missing, damaged or from a newer version
        ├── TrainingError        a training that diverged
        ├── ExecutorError        workers that were lost, or a cluster out of reach
        ├── OutputError          an output folder that cannot be written
        └── SplitError           a protocol asks for more images than there are (also a ValueError)

The command line prints the text of any FlawsiftError on one line and exits with code 2.
"""

import difflib
from collections.abc import Iterable


class FlawsiftError(Exception):
    """Base of all errors that tell a user what, where and what to do."""


class InputError(FlawsiftError, ValueError):
    """Images or folders that cannot be used."""


class ParameterError(FlawsiftError, ValueError):
    """A parameter outside its range."""


class NotFittedError(FlawsiftError, ValueError):
    """A detector was asked to predict before it was fitted."""


class WeightsError(FlawsiftError):
    """Backbone weights are missing, unreachable or not the ones expected."""


class ModelError(FlawsiftError):
    """A model folder is missing, damaged or from a newer version."""


class TrainingError(FlawsiftError):
    """A training diverged: its loss is not finite."""


class ExecutorError(FlawsiftError):
    """Workers were lost more often than a task is retried, or a cluster is out of reach."""


class OutputError(FlawsiftError):
    """An output folder cannot be written."""


class SplitError(FlawsiftError, ValueError):
    """A protocol asks for more images than there are."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The text for an unknown name, with the closest known one suggested.

    >>> unknown_name("detector", "patchcor", ["padim", "patchcore"])
    "Unknown detector 'patchcor'. Did you mean 'patchcore'? Known: padim, patchcore."
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"Unknown {kind} '{name}'.{hint} Known: {', '.join(names)}."


def one_line(error: BaseException) -> str:
    """The text of an error on one line, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
