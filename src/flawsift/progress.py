"""How long work says how far it is: one callable, silent unless somebody listens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

from flawsift.errors import ParameterError


class Progress(Protocol):
    """Called with the name of a stage, the steps done and the steps in all."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


ProgressOption: TypeAlias = Progress | bool | None


def silent(stage: str, done: int, total: int) -> None:
    """Say nothing."""


@contextmanager
def as_progress(progress: ProgressOption) -> Iterator[Progress]:
    """What public functions take as `progress`, as a callable to be told.

    Args:
        progress: True shows a bar for each stage, on stderr or in a notebook, which vanishes at the end; False and None
            are silent; a callable is told.
    """
    if progress is None or progress is False:
        yield silent
        return
    if progress is not True:
        if not callable(progress):
            raise ParameterError(f"progress must be True, False, None or a function, got {progress!r}.")
        yield progress
        return
    from rich.console import Console  # slow to import
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield tell
