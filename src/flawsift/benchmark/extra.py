"""Packages that benchmarks need above those of flawsift itself: the extra `benchmark`."""

import contextlib
from collections.abc import Iterator

from flawsift.errors import InputError


@contextlib.contextmanager
def needed_for(what: str) -> Iterator[None]:
    """Around imports: what is not installed is told with the extra that has it.

    Raises:
        InputError: A package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"{what} needs the package {error.name}: pip install 'flawsift[benchmark]'.") from error
