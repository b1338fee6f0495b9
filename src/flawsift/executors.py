"""Fan-out of independent tasks: one after the other, over processes of this machine, or over a Ray cluster.

A task is a function of its item and gives the same result wherever it runs, so a task whose worker was killed is simply
run again. Workers take as many torch threads as the caller has: the number of threads decides in which order sums are
taken, and equal orders are what makes all executors agree bit for bit on machines of one kind.

>>> list(SERIAL.map(abs, [-1, 2, -3]))
[1, 2, 3]
"""

import importlib
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from flawsift.errors import ExecutorError, ParameterError, unknown_name
from flawsift.progress import Progress, silent
from flawsift.workers import Failure, Pool, added_by_ray, lost_worker, task_without, torch_threads, unpacked

T = TypeVar("T")
R = TypeVar("R")

_EXECUTORS = "Serial(), Processes(...) or Ray(...) of flawsift.executors"  # what errors name

RETRIES = 3  # further attempts: enough for lost nodes, few enough that a task that kills its worker soon gives up


class Executor(ABC):
    """Runs a function over items. Functions, items and results are pickled unless the executor is `SERIAL`."""

    shares_files: ClassVar[bool] = True  # whether workers see the caller's file system

    @abstractmethod
    def completed(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[int, R | Failure]]:
        """(position of the item, result or failure) of each item, as they are done."""

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """The results in the order of the items.

        Raises:
            ExecutorError: The workers of a task were lost more often than it is retried.
            Exception: What a task raised.
        """
        waiting: dict[int, R | Failure] = {}
        following = 0
        outcomes = self.completed(function, list(items))
        try:
            for position, outcome in outcomes:
                waiting[position] = outcome
                while following in waiting:
                    result = waiting.pop(following)
                    if isinstance(result, Failure):
                        raise result.error
                    yield result
                    following += 1
        finally:  # at once: the traceback of an error would keep the workers until it is forgotten
            if isinstance(outcomes, Generator):
                outcomes.close()


@dataclass(frozen=True)
class Serial(Executor):
    """One after the other, in this process."""

    def completed(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[int, R | Failure]]:
        for position, item in enumerate(items):
            try:
                yield position, function(item)
            except Exception as error:  # noqa: BLE001 - handed to the caller
                yield position, Failure(error)


SERIAL = Serial()


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where and how work runs. But for the seed, nothing of it changes a result on machines of one kind.

    Attributes:
        seed: Of random partitions; detectors have a seed of their own.
        device: "auto" takes a GPU where there is one.
        executor: Where independent trainings run.
        progress: Told how far it is.
        checkpoint: A folder for unfinished work, so that a killed run goes on where it was.
    """

    seed: int = 0
    device: str = "auto"
    executor: Executor = SERIAL
    progress: Progress = silent
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.seed, Integral) and not isinstance(self.seed, bool) and self.seed >= 0
        _require("seed", whole, "be a whole number that is not negative", repr(self.seed))
        _require("executor", isinstance(self.executor, Executor), f"be {_EXECUTORS}", repr(self.executor))


@dataclass(frozen=True, kw_only=True)
class Processes(Executor):
    """Over processes of this machine; a script that uses it needs `if __name__ == "__main__":`.

    Attributes:
        workers: Processes at a time; None takes one per core.
        retries: Further attempts of a task whose worker was killed.
    """

    workers: int | None = None
    retries: int = RETRIES

    def __post_init__(self) -> None:
        _require("Processes.workers", self.workers is None or self.workers >= 1, "be at least 1", self.workers)
        _require("Processes.retries", self.retries >= 0, "not be negative", self.retries)

    def completed(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[int, R | Failure]]:
        pool = Pool(pickle.dumps(function), min(self.workers or os.cpu_count() or 1, len(items)))
        queue = list(reversed(range(len(items))))
        lost = dict.fromkeys(queue, 0)
        try:
            while queue or pool.busy:
                while queue and pool.has_room:
                    position = queue.pop()
                    pool.start(position, pickle.dumps(items[position]))
                for position, answer in pool.answers():
                    if answer is not None:
                        yield position, unpacked(answer)
                        continue
                    lost[position] += 1
                    if lost[position] <= self.retries:
                        queue.append(position)
                    else:
                        yield position, Failure(lost_worker(lost[position]))
        finally:
            pool.close()


@dataclass(frozen=True, kw_only=True)
class Ray(Executor):
    """Over the nodes of a Ray cluster; see docs/cluster.md.

    Attributes:
        address: Of the cluster, as for `ray.init`: "auto" for the one this machine belongs to, "host:port", or
            "local" for a new one on this machine.
        cpus: Cores that a task takes.
        gpus: GPUs that a task takes; 0.25 puts four tasks on each.
        retries: Further attempts of a task whose worker or node was lost.
        sees_files: Whether all nodes see the caller's files under the same paths. If not, features and pixels travel
            with the tasks.
    """

    address: str = "auto"
    cpus: float = 1.0
    gpus: float = 0.0
    retries: int = RETRIES
    sees_files: bool = True

    def __post_init__(self) -> None:
        _require("Ray.cpus", self.cpus >= 0, "not be negative", self.cpus)
        _require("Ray.gpus", self.gpus >= 0, "not be negative", self.gpus)
        _require("Ray.retries", self.retries >= 0, "not be negative", self.retries)

    @property
    def shares_files(self) -> bool:  # type: ignore[override]  # here it is the user's to say
        return self.sees_files

    def completed(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[int, R | Failure]]:
        ray = _ray()
        if not ray.is_initialized():
            self._connect(ray)
        task = ray.remote(task_without(added_by_ray())).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_retries=self.retries, retry_exceptions=False
        )
        shared = ray.put(pickle.dumps(function))  # once, however many tasks
        n_threads = torch_threads()
        pending = {task.remote(shared, pickle.dumps(item), n_threads): p for p, item in enumerate(items)}
        try:
            while pending:
                (done, *_), _ = ray.wait(list(pending), num_returns=1)
                position = pending.pop(done)
                try:
                    outcome = unpacked(ray.get(done))
                except ray.exceptions.RayError as error:
                    outcome = Failure(lost_worker(self.retries + 1, f" ({type(error).__name__})"))
                yield position, outcome
        finally:
            for unwanted in pending:
                ray.cancel(unwanted, force=True)

    def _connect(self, ray: Any) -> None:
        try:
            ray.init(address=self.address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            line = " ".join(str(error).split())
            raise ExecutorError(f"No Ray cluster at '{self.address}': {line} Start one: ray start --head.") from error


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ExecutorError("The executor ray needs the package ray: pip install 'flawsift[ray]'.") from error


def _require(name: str, holds: bool, constraint: str, got: object) -> None:
    if not holds:
        raise ParameterError(f"{name} must {constraint}, got {got}.")


KINDS: dict[str, type[Executor]] = {"serial": Serial, "process": Processes, "ray": Ray}


def make_executor(text: Executor | str) -> Executor:
    """An executor from a line: "serial", "process", "process:4", "ray", "ray:host:6379,gpus=0.25,sees_files=false".

    One that is made already is returned as it is.

    Raises:
        ParameterError: Unknown kind or option, or a value that is out of range; or it is neither text nor executor.

    >>> make_executor("process:4")
    Processes(workers=4, retries=3)
    """
    if isinstance(text, Executor):
        return text
    _require("executor", isinstance(text, str), f"be a text such as 'process:4', or {_EXECUTORS}", repr(text))
    head, *options = text.split(",")
    kind, _, argument = head.partition(":")
    if kind not in KINDS:
        raise ParameterError(unknown_name("executor", kind, KINDS))
    given = {key: value for key, _, value in (option.partition("=") for option in options)}
    if argument:
        given["workers" if kind == "process" else "address"] = argument
    cls, readers = KINDS[kind], _READERS[kind]
    for key in given:
        if key not in readers:
            raise ParameterError(unknown_name(f"option of the executor {kind}", key, readers))
    try:
        values = {key: readers[key](value) for key, value in given.items()}
    except (ValueError, KeyError) as error:
        raise ParameterError(f"The executor '{text}' has an option that cannot be read: {error}.") from None
    return cls(**values)


_READERS: dict[str, dict[str, Callable[[str], object]]] = {
    "serial": {},
    "process": {"workers": int, "retries": int},
    "ray": {
        "address": str,
        "cpus": float,
        "gpus": float,
        "retries": int,
        "sees_files": {"true": True, "false": False}.__getitem__,
    },
}
