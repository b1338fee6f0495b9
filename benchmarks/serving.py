"""Many clients of one server: what `flawsift serve` answers, how soon, and whether a bad picture harms its neighbours.

A model of synthetic parts is trained and exported. Clients keep their connection and send one picture after the other;
one in twenty sends a damaged one. A request that is told to come again waits for as long as it is told and does.
"""

import argparse
import http.client
import io
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

import _rows
from flawsift.datasets.synthetic import synthetic
from flawsift.deploy.export import export_model
from flawsift.features.backbones import load_backbone
from flawsift.pipeline import fit

DAMAGED = 20  # one picture in so many
PATIENCE = 120.0  # seconds a client waits for an answer


class Client(threading.Thread):
    """Sends pictures and keeps what came back: status, seconds, score."""

    def __init__(self, port: int, bodies: list[bytes], start: threading.Event) -> None:
        super().__init__()
        self.port, self.bodies, self.begin = port, bodies, start
        self.answers: list[tuple[int, float, float | None]] = []
        self.n_again = 0

    def run(self) -> None:
        self.begin.wait()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        for body in self.bodies:
            started = time.perf_counter()
            while True:
                connection.request("POST", "/v1/part/inspect", body)
                answer = connection.getresponse()
                content = answer.read()
                if answer.status not in (429, 503):
                    break
                self.n_again += 1
                time.sleep(float(answer.headers.get("Retry-After", 1)))
            told = json.loads(content)
            one = told["results"][0] if "results" in told else {}
            self.answers.append((answer.status, time.perf_counter() - started, one.get("score")))


def encoded(picture: np.ndarray) -> bytes:
    """As a PNG file."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()


def main() -> None:
    """One row for each number of clients."""
    parser = _rows.common_flags(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 20, 200])
    parser.add_argument("--requests", type=int, default=600, help="in all (default: %(default)s)")
    parser.add_argument("--detector", default="quorum")
    args = parser.parse_args()
    data = synthetic(60, 10, size=256)
    model = fit(data.images, args.detector, load_backbone(size=256), no_screen=True).model
    pictures = [encoded(np.asarray(data.images.image(i), np.uint8)) for i in data.images.ids.tolist()[:40]]
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = export_model(model, Path(folder) / "part")
        command = [sys.executable, "-m", "flawsift", "serve", f"part={file}", "--port", "0", "--max-requests", "256"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            port = int(
                next(line for line in server.stderr if "127.0.0.1:" in line).split("127.0.0.1:")[1].split("/")[0]
            )
            threading.Thread(target=server.stderr.read, daemon=True).start()  # its log must not stop it
            try:
                for n_clients in args.clients:
                    row = _loaded(port, pictures, n_clients, args.requests) | {"detector": args.detector}
                    row["server_mb"] = _peak_mb(server.pid)
                    _rows.append_rows(args.results / "serving.csv", [row | _rows.provenance()])
                    _rows.say(str(row))
                    figures |= {f"{n_clients}_p99_ms": row["ms_p99"], f"{n_clients}_failed": row["n_failed"]}
            finally:
                server.terminate()
    _rows.finish("serving", figures, args)


def _loaded(port: int, pictures: list[bytes], n_clients: int, n_requests: int) -> dict[str, float]:
    alone = Client(port, pictures, threading.Event())
    alone.begin.set()
    alone.run()
    wanted = [score for _, _, score in alone.answers]
    begin, clients, each = threading.Event(), list[Client](), max(1, n_requests // n_clients)
    for c in range(n_clients):
        chosen = [(c * each + i) % len(pictures) for i in range(each)]
        bodies = [
            pictures[j][: len(pictures[j]) // 2] if (c + i) % DAMAGED == 7 else pictures[j]
            for i, j in enumerate(chosen)
        ]
        clients.append(Client(port, bodies, begin))
        clients[-1].chosen = chosen  # type: ignore[attr-defined]
        clients[-1].start()
    started = time.perf_counter()
    begin.set()
    for client in clients:
        client.join()
    taken = time.perf_counter() - started
    statuses, seconds, n_other, n_failed, n_damaged = Counter[int](), list[float](), 0, 0, 0
    for c, client in enumerate(clients):
        n_failed += each - len(client.answers)
        for i, (status, second, score) in enumerate(client.answers):
            statuses[status] += 1
            seconds.append(second)
            if (c + i) % DAMAGED == 7:
                n_damaged += 1
                n_failed += score is not None or status >= 500
            elif status != 200:
                n_failed += 1
            else:
                n_other += score != wanted[client.chosen[i]]  # type: ignore[attr-defined]
    return {
        "n_clients": n_clients,
        "n_requests": len(seconds),
        "n_damaged": n_damaged,
        "n_failed": n_failed,
        "n_other_answers": n_other,
        "n_told_to_come_again": sum(client.n_again for client in clients),
        "ms_median": 1000 * statistics.median(seconds),
        "ms_p99": 1000 * float(np.quantile(seconds, 0.99)),
        "per_second": len(seconds) / taken,
    }


def _peak_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


if __name__ == "__main__":
    main()
