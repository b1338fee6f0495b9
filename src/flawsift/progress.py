"""How long work says how far it is: one callable, silent unless somebody listens."""

from typing import Protocol


class Progress(Protocol):
    """Called with the name of a stage, the steps done and the steps in all."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """Say nothing."""
