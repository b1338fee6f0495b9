"""Executors: the same results in the same order, whatever fails, and equal stage 1 bit for bit."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flawsift import pipeline
from flawsift.data.images import ImageSet
from flawsift.datasets import Dataset
from flawsift.detectors.base import Detector
from flawsift.detectors.registry import make_detector
from flawsift.errors import ExecutorError, ParameterError
from flawsift.executors import SERIAL, Executor, Processes, Ray, Run, make_executor
from flawsift.features.backbones import Backbone
from flawsift.features.extraction import attach, loaded
from flawsift.features.store import FeatureStore
from flawsift.progress import Stage
from flawsift.screening.options import ScreenOptions
from flawsift.screening.result import Screening
from flawsift.screening.stage1 import screen
from flawsift.screening.submodels import rank_by_submodels
from flawsift.workers import Failure

TASKS = '''
import os, signal, time
from pathlib import Path

class Unreadable:
    def __init__(self, x):
        self.x = x
    def __reduce__(self):
        return (Unreadable, ())  # one argument too few

class Odd(Exception):
    def __init__(self, a, b):  # cannot be read back from its pickle
        super().__init__(f"{a} and {b}")

def square(x):
    return x * x

def slow_first(x):
    time.sleep(0.3 if x == 0 else 0)
    return x

def fails_at_two(x):
    if x == 2:
        raise ValueError("two")
    return x

def odd(x):
    raise Odd(1, x)

def unreadable(x):
    return Unreadable(x) if x == 1 else x

def fails_first(x):
    if x == 0:
        raise ValueError("zero")
    time.sleep(600)

def cannot_travel(x):
    return lambda: x

def killed_once(path):
    """Its worker is killed the first time it gets this item."""
    if not Path(path).exists():
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return Path(path).name

def always_killed(x):
    if x == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return x

def threads(_):
    import torch
    return torch.get_num_threads()

def process(_):
    time.sleep(0.2)
    return os.getpid()
'''


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A module that workers can import."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "executor_tasks.py").write_text(TASKS)
    sys.path.insert(0, str(folder))
    import executor_tasks  # type: ignore[import-not-found]

    yield executor_tasks
    sys.path.remove(str(folder))
    del sys.modules["executor_tasks"]


def test_a_result_that_cannot_be_read_again_fails_alone(tasks: Any) -> None:
    found = dict(Processes(workers=2).completed(tasks.unreadable, [0, 1, 2]))
    assert (found[0], found[2]) == (0, 2)
    assert isinstance(found[1].error, ExecutorError)
    assert "cannot be read: TypeError" in str(found[1].error)


def test_a_failure_ends_the_workers_at_once(tasks: Any) -> None:
    with pytest.raises(ValueError, match="zero") as kept:  # and with it the frames that it went through
        list(Processes(workers=2).map(tasks.fails_first, [0, 1]))
    assert multiprocessing.active_children() == []
    assert kept.value.args == ("zero",)


@settings(max_examples=20)
@given(st.permutations(range(6)))
def test_map_puts_results_in_order_whenever_they_come(order: list[int]) -> None:
    class Shuffled(Executor):
        def completed(self, function: Any, items: Any) -> Iterator[tuple[int, Any]]:
            yield from ((p, function(items[p])) for p in order)

    assert list(Shuffled().map(str, range(6))) == ["0", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize("executor", [SERIAL, Processes(workers=2)])
def test_failures_do_not_stop_the_rest(tasks: Any, executor: Executor) -> None:
    found = dict(executor.completed(tasks.fails_at_two, [0, 1, 2, 3]))
    failure = found.pop(2)
    assert isinstance(failure, Failure)
    assert (type(failure.error), str(failure.error)) == (ValueError, "two")
    assert found == {0: 0, 1: 1, 3: 3}
    with pytest.raises(ValueError, match="two"):
        list(executor.map(tasks.fails_at_two, [0, 1, 2, 3]))


def test_processes_keep_order_threads_and_workers(tasks: Any) -> None:
    import torch

    pool = Processes(workers=2)
    assert list(pool.map(tasks.slow_first, [0, 1, 2])) == [0, 1, 2]
    assert [p for p, _ in pool.completed(tasks.slow_first, [0, 1, 2])][-1] == 0
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert list(pool.map(tasks.threads, [0])) == [before + 1]
    finally:
        torch.set_num_threads(before)
    seen = list(pool.map(tasks.process, range(4)))
    assert len(set(seen)) == 2
    assert os.getpid() not in seen


def test_no_items(tasks: Any) -> None:
    assert list(Processes().map(tasks.square, [])) == []


def test_odd_exceptions_and_results_travel_as_text(tasks: Any) -> None:
    for task, text in ((tasks.odd, "Odd: 1 and 5"), (tasks.cannot_travel, "pickle")):
        ((_, failure),) = Processes(workers=1).completed(task, [5])
        assert isinstance(failure, Failure)
        assert text in str(failure.error)


def test_a_killed_worker_costs_a_retry_of_its_task_only(tasks: Any, tmp_path: Path) -> None:
    items = [str(tmp_path / name) for name in "abc"]
    assert list(Processes(workers=2).map(tasks.killed_once, items)) == ["a", "b", "c"]
    found = dict(Processes(workers=2, retries=1).completed(tasks.always_killed, [0, 1, 2, 3]))
    lost = found.pop(1)
    assert isinstance(lost, Failure)
    assert isinstance(lost.error, ExecutorError)
    assert "killed 2 times" in str(lost.error)
    assert found == {0: 0, 2: 2, 3: 3}


def test_executors_by_a_line() -> None:
    assert make_executor("serial") == SERIAL
    assert make_executor("process:3,retries=0") == Processes(workers=3, retries=0)
    assert make_executor("ray:h:6379,gpus=0.25,sees_files=false") == Ray(address="h:6379", gpus=0.25, sees_files=False)
    assert not make_executor("ray:auto,sees_files=false").shares_files


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("proces", "Unknown executor 'proces'. Did you mean 'process'"),
        ("process:0", "Processes.workers must be at least 1, got 0"),
        ("process:many", "cannot be read"),
        ("ray,gpu=1", "Did you mean 'gpus'"),
        ("ray,gpus=-1", "Ray.gpus must not be negative"),
        ("ray,sees_files=maybe", "cannot be read"),
        ("serial:2", "Unknown option of the executor serial"),
    ],
)
def test_bad_lines_are_told(line: str, text: str) -> None:
    with pytest.raises(ParameterError, match=text):
        make_executor(line)


# ---- stage 1 ---------------------------------------------------------------------------------------------------------


def equal(a: Screening, b: Screening) -> None:
    """Bit for bit."""
    np.testing.assert_array_equal(a.submodel_scores.score_matrix, b.submodel_scores.score_matrix)
    np.testing.assert_array_equal(a.consensus, b.consensus)
    np.testing.assert_array_equal(a.kept, b.kept)
    assert a.patch_maps is not None
    assert b.patch_maps is not None
    np.testing.assert_array_equal(a.patch_maps.view(np.uint16), b.patch_maps.view(np.uint16))


def stored(easy: Dataset, tiny: Backbone, detector: Detector, tmp_path: Path) -> ImageSet:
    """The easy set with its features in a store."""
    return attach(easy.images, tiny, detector.layers, views=detector.views, store=FeatureStore(tmp_path / "c"))[0]


# additive statistics; a memory bank; trained by gradient, in bfloat16 where it pays
@pytest.mark.parametrize("name", ["padim", "softpatch", "dinomaly"])
def test_processes_equal_serial_bit_for_bit(easy: Dataset, tiny: Backbone, tmp_path: Path, name: str) -> None:
    params: dict[str, dict[str, Any]] = {
        "padim": {"n_features": 20},
        "softpatch": {"coreset_ratio": 0.05},
        "dinomaly": {"width": 32, "n_blocks": 2, "steps": 6, "batch_size": 8, "warmup": 2, "easy_ramp": 3},
    }
    detector = make_detector(name, **params[name])
    data = stored(easy, tiny, detector, tmp_path)
    alone = screen(data, detector, ScreenOptions(n_subsets=3, divergence_weight=0.5))
    options = ScreenOptions(n_subsets=3, divergence_weight=0.5)
    together = screen(data, detector, options, Run(executor=Processes(workers=2)))
    equal(alone, together)


def test_additive_submodels_travel_back_and_are_merged(easy: Dataset, tiny: Backbone, tmp_path: Path) -> None:
    detector = make_detector("padim", n_features=20)
    data, options = stored(easy, tiny, detector, tmp_path), ScreenOptions(n_subsets=3)
    runs = (Run(), Run(executor=Processes(workers=2)))
    alone, together = (rank_by_submodels(data, detector, options, run, wants_fitted=True).fitted for run in runs)
    assert alone is not None
    assert together is not None
    np.testing.assert_array_equal(alone.predict(data).scores, together.predict(data).scores)
    np.testing.assert_allclose(alone.predict(data).scores, detector.clone().fit(data).predict(data).scores, rtol=1e-3)
    unwanted = rank_by_submodels(data, detector, options, Run())
    assert unwanted.fitted is None


def test_a_resumed_run_merges_no_submodels_of_other_partitions(easy: Dataset, tiny: Backbone, tmp_path: Path) -> None:
    detector = make_detector("padim", n_features=20)
    data, options = stored(easy, tiny, detector, tmp_path), ScreenOptions(n_subsets=3, n_partitions=2)
    run = Run(checkpoint=tmp_path / "p", executor=Processes(workers=1))
    rank_by_submodels(data, detector, options, run)
    for m in range(1, 6):  # the first of the first partition is there, the five others are not
        (tmp_path / "p" / f"scores-{m}.unfinished").unlink()
    assert rank_by_submodels(data, detector, options, run, wants_fitted=True).fitted is None


@dataclass(eq=False)
class Counting(Executor):
    """Another executor, and the items that it was given."""

    inner: Executor
    items: list[Any] = field(default_factory=list)

    def completed(self, function: Any, items: Any) -> Any:
        self.items += items
        return self.inner.completed(function, items)


def test_fan_out_goes_on_where_it_was(easy: Dataset, tiny: Backbone, tmp_path: Path) -> None:
    detector = make_detector("padim", n_features=20)
    data = stored(easy, tiny, detector, tmp_path)
    first = screen(
        data, detector, ScreenOptions(n_subsets=3), Run(checkpoint=tmp_path / "p", executor=Processes(workers=1))
    )
    (tmp_path / "p" / "scores-1.unfinished").unlink()
    counting = Counting(Processes(workers=1))
    again = screen(data, detector, ScreenOptions(n_subsets=3), Run(checkpoint=tmp_path / "p", executor=counting))
    assert counting.items == [1]
    equal(first, again)


@pytest.mark.parametrize("executor", ["serial", "process:1"])
def test_damaged_unfinished_work_is_told_and_made_again(
    executor: str, easy: Dataset, tiny: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    detector = make_detector("patchcore", coreset_ratio=0.1)
    data, options = stored(easy, tiny, detector, tmp_path), ScreenOptions(rank_by="submodels", n_subsets=3)
    run = Run(checkpoint=tmp_path / "p", executor=make_executor(executor))
    first = screen(data, detector, options, run)
    assert not caplog.text
    scores = [tmp_path / "p" / f"scores-{m}.unfinished" for m in range(3)]
    wholes = [path.read_bytes() for path in scores]
    for changed in (wholes[1][:-1] + b"x", wholes[1][:50], b"", wholes[0]):  # the last is that of another sub-model
        scores[1].write_bytes(changed)
        caplog.clear()
        equal(first, screen(data, detector, options, run))
        assert "scores-1.unfinished' is damaged and is made again" in caplog.text
        assert scores[1].read_bytes() == wholes[1]


@pytest.mark.parametrize("name", ["detector.json", "saved"])
def test_a_damaged_submodel_is_told_and_trained_again(
    name: str, easy: Dataset, tiny: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    detector = make_detector("patchcore", coreset_ratio=0.1)
    data, options = stored(easy, tiny, detector, tmp_path), ScreenOptions(rank_by="submodels", n_subsets=3)
    first = screen(data, detector, options, Run())

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == (Stage.PARTS, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        screen(data, detector, options, Run(checkpoint=tmp_path / "p", progress=stop))
    path = tmp_path / "p" / "model-0" / name
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    equal(first, screen(data, detector, options, Run(checkpoint=tmp_path / "p")))
    assert "model-0' is damaged and is made again" in caplog.text


def test_the_pipeline_fans_out(easy_folder: Path, tiny: Backbone, tmp_path: Path) -> None:
    models = [
        pipeline.fit(
            easy_folder,
            make_detector("padim", n_features=20),
            tiny,
            store=FeatureStore(tmp_path / "c"),
            out=tmp_path / str(number),
            executor=executor,
        ).model
        for number, executor in enumerate((SERIAL, Processes(workers=2)))
    ]
    assert models[0].training["kept_digest"] == models[1].training["kept_digest"]
    np.testing.assert_array_equal(models[0].calibration.scores, models[1].calibration.scores)


def test_a_set_can_travel_without_its_files(easy_folder: Path, tiny: Backbone, tmp_path: Path) -> None:
    images = ImageSet.from_folder(easy_folder)
    data, _ = attach(
        images, tiny, ("stride8",), views=("rotate:90",), store=FeatureStore(tmp_path / "c", dtype="float32")
    )
    part = data.select(data.ids[[7, 3, 40]])
    alone = loaded(part, ("stride8",), ("rotate:90",), pixels=True)
    for view in ("", "rotate:90"):
        seen, travelled = part.view(view), alone.view(view)
        first = next(seen.batches(("stride8",), pixels=True))
        second = next(travelled.batches(("stride8",), pixels=True))
        assert first.ids.tolist() == second.ids.tolist() == [7, 3, 40]
        assert (first.features["stride8"] == second.features["stride8"]).all()
        assert first.pixels is not None
        assert second.pixels is not None
        assert (first.pixels == second.pixels).all()


CALLER = """
import sys
from pathlib import Path
from flawsift.executors import Processes, Ray
import caller_tasks

if __name__ == "__main__":
    executor = Processes(workers=1) if sys.argv[1] == "process" else Ray(address="local")
    print(list(executor.map(caller_tasks.modules, [0])))
"""
CALLED = """
import csv, fractions, imaplib

def modules(_):
    return [m.__file__ for m in (csv, fractions, imaplib) if "working" in m.__file__]
"""


@pytest.mark.parametrize("kind", ["process", "ray"])
def test_no_worker_runs_code_of_the_working_folder(kind: str, tmp_path: Path) -> None:
    if kind == "ray":
        pytest.importorskip("ray")
    (tmp_path / "working").mkdir()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "caller_tasks.py").write_text(CALLED)
    (tmp_path / "scripts" / "caller.py").write_text(CALLER)
    for name in ("csv", "fractions", "imaplib", "pickle", "secrets", "socket"):  # Python's own, early and late
        (tmp_path / "working" / f"{name}.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'a').write({name!r})\n")
    environment = {**os.environ, "RAY_DISABLE_IMPORT_WARNING": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PYTHONPATH"] = str(Path(pipeline.__file__).parent.parent)
    run = subprocess.run(
        [sys.executable, tmp_path / "scripts" / "caller.py", kind],
        cwd=tmp_path / "working",
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (run.returncode, run.stdout.strip().splitlines()[-1:]) == (0, ["[[]]"]), run.stderr
    assert not (tmp_path / "RAN").exists(), (tmp_path / "RAN").read_text()


def test_workers_end_with_a_caller_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "caller_tasks.py").write_text(
        "import os, pathlib, time\n"
        "def sleep(path):\n    pathlib.Path(path).write_text(str(os.getpid()))\n    time.sleep(600)\n"
    )
    (tmp_path / "caller.py").write_text(
        "import caller_tasks\nfrom flawsift.executors import Processes\nif __name__ == '__main__':\n"
        f"    list(Processes(workers=1).map(caller_tasks.sleep, [{str(tmp_path / 'pid')!r}]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(pipeline.__file__).parent.parent)}
    caller = subprocess.Popen([sys.executable, tmp_path / "caller.py"], env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker = int((tmp_path / "pid").read_text())
    caller.kill()
    caller.wait()
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split():
        assert time.monotonic() < deadline, "the worker goes on"
        time.sleep(0.05)
