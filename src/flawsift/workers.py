"""Processes that do pickled tasks for the executors, on this machine or on a cluster.

No worker looks for modules in the working folder unless the caller does: a csv.py that happens to lie among the images
would be run as if it were Python's own.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

from flawsift.errors import ExecutorError


@dataclass(frozen=True)
class Failure:
    """What a task raised, or that its workers were lost.

    Attributes:
        error: The exception.
    """

    error: Exception


@dataclass(eq=False)
class Pool:
    """Worker processes with one task each; one that dies takes no other down."""

    function: bytes
    size: int
    idle: list[tuple[BaseProcess, Connection]] = field(default_factory=list)
    busy: dict[Connection, tuple[BaseProcess, int]] = field(default_factory=dict)

    @property
    def has_room(self) -> bool:
        return len(self.busy) < self.size

    def start(self, position: int, item: bytes) -> None:
        process, pipe = self.idle.pop() if self.idle else self._spawn()
        self.busy[pipe] = (process, position)
        with contextlib.suppress(OSError):  # it died while idle: `answers` sees the end of its pipe
            pipe.send_bytes(item)

    def answers(self) -> Iterator[tuple[int, bytes | None]]:
        """(position, pickled outcome, or None if its worker died) of the tasks that ended; waits for one at least."""
        for ready in wait(list(self.busy)):
            pipe = cast(Connection, ready)  # Windows has another class of the same methods
            process, position = self.busy.pop(pipe)
            try:
                answer = pipe.recv_bytes()
            except (EOFError, OSError):
                pipe.close()
                process.join()
                yield position, None
            else:
                self.idle.append((process, pipe))
                yield position, answer

    def close(self) -> None:
        """End all workers; those amid a task, which nobody wants any more, at once."""
        for process, _ in self.busy.values():
            process.terminate()
        for pipe in [*self.busy, *(pipe for _, pipe in self.idle)]:
            pipe.close()  # an idle worker ends when its pipe does
        for process in [*(p for p, _ in self.busy.values()), *(p for p, _ in self.idle)]:
            process.join()

    def _spawn(self) -> tuple[BaseProcess, Connection]:
        # spawned, not forked: a fork copies the locks of torch's threads in whatever state they are
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.function, torch_threads()), daemon=True)
        with _quiet_start():
            process.start()
        theirs.close()
        return process, mine


_SAFE_PATH = "PYTHONSAFEPATH"
_ONE_STARTS = threading.Lock()  # the environment is one for all threads


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """Processes that are started here get no Ctrl-C, which is the caller's, and no modules of the working folder.

    `python -c` looks for modules there by itself. What the caller's `sys.path` has, a worker gets once it runs.
    """
    with _ONE_STARTS:
        before = os.environ.get(_SAFE_PATH)
        os.environ[_SAFE_PATH] = "1"
        masked = hasattr(signal, "pthread_sigmask")  # not on Windows
        if masked:
            resource_tracker.ensure_running()  # starting it would unblock the signal
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited; here, it comes later
        try:
            yield
        finally:
            if masked:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            if before is None:
                del os.environ[_SAFE_PATH]
            else:
                os.environ[_SAFE_PATH] = before


def _serve(pipe: Connection, function: bytes, n_threads: int) -> None:
    """A worker's life: tasks come through the pipe until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            item = pipe.recv_bytes()
            pipe.send_bytes(call(function, item, n_threads))
        except (EOFError, OSError):
            return


def _end_with_parent() -> None:
    """A caller that was killed wants no result: a task may take hours."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def added_by_ray() -> frozenset[str]:
    """The working folder, in which Ray's workers look for modules first, unless the caller does so too."""
    here = os.getcwd()
    return frozenset() if here in map(os.path.abspath, sys.path) else frozenset({here})


def task_without(folders: frozenset[str]) -> Callable[[bytes, bytes, int], bytes]:
    """`call`, run by a worker that does not look for modules in some folders."""

    def task(function: bytes, item: bytes, n_threads: int) -> bytes:
        # a function within a function travels by its code: the path is set before flawsift is imported
        import sys

        sys.path[:] = [folder for folder in sys.path if folder not in folders]
        from flawsift.workers import call

        return call(function, item, n_threads)

    return task


def call(function: bytes, item: bytes, n_threads: int) -> bytes:
    """Run one pickled task; its pickled result or failure. Bytes in and out: no shared memory outlives a worker."""
    # for a torch that the task imports itself
    os.environ |= {"OMP_NUM_THREADS": str(n_threads), "MKL_NUM_THREADS": str(n_threads)}
    try:
        task, argument = pickle.loads(function), pickle.loads(item)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(n_threads)
        return pickle.dumps(task(argument))
    except Exception as error:  # noqa: BLE001 - handed to the caller
        return _packed(error)


def torch_threads() -> int:
    """The caller's torch threads; torch is imported here, so that tasks without it start at once."""
    import torch

    return torch.get_num_threads()


def _packed(error: Exception) -> bytes:
    try:
        packed = pickle.dumps(Failure(error))
        pickle.loads(packed)  # some exceptions can be pickled and not be read again
    except Exception:  # noqa: BLE001 - whatever it is, its text can travel
        return pickle.dumps(Failure(ExecutorError(f"A task failed: {type(error).__name__}: {error}")))
    return packed


def unpacked(answer: bytes) -> Any:
    """What a worker answered; a result that can be pickled and not be read again is a failure of its task alone."""
    try:
        return pickle.loads(answer)
    except Exception as error:  # noqa: BLE001 - whatever its class does when it is read
        return Failure(ExecutorError(f"The result of a task cannot be read: {type(error).__name__}: {error}"))


def lost_worker(attempts: int, why: str = "") -> ExecutorError:
    return ExecutorError(
        f"The worker of a task was killed {attempts} times{why}, perhaps for want of memory. Use fewer workers."
    )
