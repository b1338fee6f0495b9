"""Ray on a cluster of two nodes that the tests start: equal results, killed workers and a lost node cost time only."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flawsift import pipeline
from flawsift.benchmark.config import parse_config
from flawsift.benchmark.runner import run
from flawsift.datasets import Dataset
from flawsift.detectors.registry import make_detector
from flawsift.errors import ExecutorError
from flawsift.executors import Ray, Run
from flawsift.features.backbones import Backbone
from flawsift.features.extraction import attach, loaded
from flawsift.features.store import FeatureStore
from flawsift.screening.options import ScreenOptions
from flawsift.screening.stage1 import screen

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'flawsift[ray]'")
# Ray itself leaves sockets and files to the garbage collector, and warns of what its later versions change.
# One process runs all of these tests: the cluster is started once.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("ray")]

SECONDS = 60  # for a node to come up or a killed one to be noticed, on a busy machine
TASKS = '''
import os, signal, time
from pathlib import Path

import ray
from flawsift.detectors.padim import PaDiM

FOLDER = Path(os.environ["FLAWSIFT_TEST_MARKS"])

def killed_once(name):
    if not (FOLDER / name).exists():
        (FOLDER / name).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return name

def node(_):
    time.sleep(1)
    return ray.get_runtime_context().get_node_id()

def fails(_):
    raise ValueError("told")

class Slow(PaDiM):
    """Leaves a mark when it starts, and takes its time."""

    def fit(self, data, **options):
        name = f"fit-{ray.get_runtime_context().get_node_id()}-{os.getpid()}-{time.time_ns()}"
        (FOLDER / name).write_text(str(sorted(data.ids.tolist())))
        time.sleep(3)
        return super().fit(data, **options)
'''


@dataclass
class Cluster:
    """A head and a worker node, each one core, in process groups of their own."""

    address: str
    head: "subprocess.Popen[bytes]"
    worker: "subprocess.Popen[bytes]"
    tasks: Any
    marks: Path

    def alive(self) -> list[str]:
        """Ids of the nodes that are up."""
        return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def start(arguments: list[str], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
    command += ["--num-gpus=0", "--object-store-memory=80000000", "--disable-usage-stats", *arguments]
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def stop(process: "subprocess.Popen[bytes]") -> None:
    """The group of one node, which this test started, and nothing else."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "ray_tasks.py").write_text(TASKS)
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray puts sockets there
    source = str(Path(pipeline.__file__).parent.parent)
    environment = {
        "PYTHONPATH": os.pathsep.join([source, str(folder), os.environ.get("PYTHONPATH", "")]),
        "FLAWSIFT_TEST_MARKS": str(folder),
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_initial_delay_ms": "1000",  # a lost node is noticed in seconds
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "4",
    }
    address = f"127.0.0.1:{port}"
    head = start(["--head", f"--port={port}", f"--temp-dir={temporary}", "--include-dashboard=false"], environment)
    os.environ["FLAWSIFT_TEST_MARKS"] = str(folder)
    sys.path.insert(0, str(folder))
    worker = None
    try:
        wait_for(lambda: reachable(port), "the head")
        worker = start([f"--address={address}"], environment)
        connect(address)
        found = Cluster(address, head, worker, __import__("ray_tasks"), folder)
        wait_for(lambda: len(found.alive()) == 2, "the second node")
        yield found
    finally:
        ray.shutdown()
        for process in (worker, head):
            if process is not None:
                stop(process)
        sys.path.remove(str(folder))
        sys.modules.pop("ray_tasks", None)
        del os.environ["FLAWSIFT_TEST_MARKS"]
        shutil.rmtree(temporary, ignore_errors=True)


def reachable(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def connect(address: str) -> None:
    """As the executor does it, once the head answers."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            assert list(Ray(address=address, retries=0).map(abs, [-1])) == [1]
        except ExecutorError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
        else:
            return


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not come up in {SECONDS} s")
        time.sleep(0.1)


@pytest.mark.parametrize("sees_files", [True, False])
def test_ray_equals_serial_bit_for_bit(
    cluster: Cluster,
    easy: Dataset,
    tiny: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sees_files: bool,
) -> None:
    detector = make_detector("patchcore", coreset_ratio=0.05)
    data, _ = attach(easy.images, tiny, detector.layers, store=FeatureStore(tmp_path / "c"))
    alone = screen(data, detector, ScreenOptions(n_subsets=3))
    if not sees_files:  # what travels must not need the store: once it is loaded, the store is gone

        def load_and_hide(*args: Any, **options: Any) -> Any:
            found = loaded(*args, **options)
            (tmp_path / "c").rename(tmp_path / "gone")
            return found

        monkeypatch.setattr("flawsift.screening.submodels.loaded", load_and_hide)
    together = screen(
        data, detector, ScreenOptions(n_subsets=3), Run(executor=Ray(address=cluster.address, sees_files=sees_files))
    )
    assert (tmp_path / "c").exists() == sees_files
    np.testing.assert_array_equal(alone.submodel_scores.score_matrix, together.submodel_scores.score_matrix)
    np.testing.assert_array_equal(alone.kept, together.kept)
    assert alone.patch_maps is not None
    assert together.patch_maps is not None
    np.testing.assert_array_equal(alone.patch_maps.view(np.uint16), together.patch_maps.view(np.uint16))


def test_tasks_go_to_both_nodes_and_failures_come_back(cluster: Cluster) -> None:
    executor = Ray(address=cluster.address)
    assert set(executor.map(cluster.tasks.node, range(4))) == set(cluster.alive())
    with pytest.raises(ValueError, match="told"):
        list(executor.map(cluster.tasks.fails, [1]))


def test_a_killed_worker_costs_a_retry(cluster: Cluster) -> None:
    assert list(Ray(address=cluster.address).map(cluster.tasks.killed_once, ["a", "b"])) == ["a", "b"]
    with pytest.raises(ExecutorError, match="killed 1 times"):
        list(Ray(address=cluster.address, retries=0).map(cluster.tasks.killed_once, ["c"]))


def test_cells_of_a_benchmark_run_on_the_cluster(cluster: Cluster, tmp_path: Path) -> None:
    config = parse_config(
        {
            "alphas": [0.0, 0.2],
            "seeds": [0],
            "presets": ["none"],
            "backbone": {"name": "tiny", "size": 64},
            "data": [{"name": "synthetic", "n_normal": 30, "n_anomalous": 20, "size": 64}],
            "detectors": [{"name": "padim", "params": {"n_features": 10}}],
        }
    )
    alone = run(config, tmp_path / "a")
    together = run(config, tmp_path / "b", executor=Ray(address=cluster.address))
    assert {r["key"]: r["image_auroc"] for r in alone} == {r["key"]: r["image_auroc"] for r in together}


def test_a_lost_node_costs_time_and_changes_nothing(
    cluster: Cluster, easy: Dataset, tiny: Backbone, tmp_path: Path
) -> None:
    """The last test: the second node is gone afterwards."""
    mine = ray.get_runtime_context().get_node_id()  # the driver's node is the head
    detector = cluster.tasks.Slow(n_features=10)
    data, _ = attach(easy.images, tiny, detector.layers, store=FeatureStore(tmp_path / "c"))
    alone = screen(data, make_detector("padim", n_features=10), ScreenOptions(n_subsets=3))

    def started_there() -> list[Path]:
        return [p for p in cluster.marks.glob("fit-*") if not p.name.startswith(f"fit-{mine}")]

    def kill_while_it_trains() -> None:
        wait_for(started_there, "a sub-model on the second node")
        stop(cluster.worker)

    killer = threading.Thread(target=kill_while_it_trains)
    killer.start()
    together = screen(data, detector, ScreenOptions(n_subsets=3), Run(executor=Ray(address=cluster.address)))
    killer.join()
    np.testing.assert_array_equal(alone.submodel_scores.score_matrix, together.submodel_scores.score_matrix)
    np.testing.assert_array_equal(alone.consensus, together.consensus)
    lost = {p.read_text() for p in started_there()}
    again = {p.read_text() for p in cluster.marks.glob(f"fit-{mine}*")}
    assert lost, "no sub-model was on the second node"
    assert lost <= again, "the lost sub-model was not trained again"
    wait_for(lambda: cluster.alive() == [mine], "the loss")
