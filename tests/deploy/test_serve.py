"""The server of models: what it answers, whom it lets in, and that no request is lost to another one or a new model."""

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import anyio
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from flawsift.datasets import Dataset
from flawsift.deploy import gate, products
from flawsift.deploy import serve as serving
from flawsift.deploy.export import export_model
from flawsift.deploy.gate import Limits, check_key
from flawsift.deploy.products import Loaded, Product, read_products
from flawsift.deploy.serve import make_app, serve
from flawsift.errors import ModelError, ParameterError
from flawsift.features.backbones import Backbone
from flawsift.runtime import Inspector, Verdict
from tests.deploy.test_graph import fitted

BASE = "http://127.0.0.1:8000"
KEY = "0123456789abcdef"
AT = "/v1/default/inspect"


@pytest.fixture(scope="module")
def product(exported: Path) -> Product:
    return Product(exported)


@pytest.fixture(scope="module")
def bad(easy_folder: Path) -> bytes:
    """A defective picture."""
    return (easy_folder / "part-45.png").read_bytes()


@pytest.fixture(scope="module")
def good(easy_folder: Path) -> bytes:
    return (easy_folder / "part-00.png").read_bytes()


class Server:
    """A server in this process, and what it logs."""

    def __init__(self, served: Mapping[str, Any], **options: Any) -> None:
        self.lines: list[Mapping[str, Any]] = []
        self.client = TestClient(make_app(served, log=self.lines.append, **options), base_url=BASE)


@pytest.fixture
def made(product: Product) -> Iterator[Callable[..., Server]]:
    """Makes servers."""
    running: list[TestClient] = []

    def make(served: Mapping[str, Any] | None = None, **options: Any) -> Server:
        server = Server({"default": product} if served is None else served, **options)
        server.client.__enter__()
        running.append(server.client)
        return server

    yield make
    for client in running:
        client.__exit__()


@pytest.fixture
def client(made: Callable[..., Server]) -> TestClient:
    return made().client


def test_a_name_that_is_no_text_is_answered_as_escapes(client: TestClient, good: bytes) -> None:
    body = b'{"name": "\\ud800", "image": "' + base64.b64encode(good) + b'"}'
    answer = client.post(AT, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["results"][0]["name"]) == (200, "\\ud800")


def test_the_three_ways_to_send_pictures_answer_the_same(
    client: TestClient, exported: Path, good: bytes, bad: bytes
) -> None:
    as_text = [base64.b64encode(content).decode() for content in (good, bad)]
    files = [("image", ("a.png", good)), ("image", ("b.png", bad))]
    form = client.post(AT, files=files)
    named = [{"name": name, "image": text} for name, text in zip(("a.png", "b.png"), as_text, strict=True)]
    of_json = client.post(AT, json={"images": named})
    assert form.json() == of_json.json()
    alone = [client.post(AT, content=content).json()["results"][0] for content in (good, bad)]
    assert [{**one, "name": name} for one, name in zip(alone, ("a.png", "b.png"), strict=True)] == form.json()[
        "results"
    ]
    assert client.post(AT, json={"image": as_text[1]}).json()["results"] == alone[1:]
    inspector = Inspector(exported)
    for content, told in zip((good, bad), alone, strict=True):
        verdict = inspector(content)
        assert (told["score"], told["p_value"], told["threshold"]) == (
            verdict.score,
            verdict.p_value,
            verdict.threshold,
        )
    assert [one["verdict"] for one in alone] == ["ok", "defect"]


def test_regions_and_the_heatmap_on_demand(client: TestClient, good: bytes, bad: bytes) -> None:
    wide = io.BytesIO()
    Image.open(io.BytesIO(bad)).resize((300, 100)).save(wide, "PNG")
    for content in (bad, wide.getvalue()):
        told = client.post(f"{AT}?regions=1&map=png", content=content).json()["results"][0]
        width, height = Image.open(io.BytesIO(content)).size
        picture = Image.open(io.BytesIO(base64.b64decode(told["map_png"])))
        assert (picture.size, picture.format) == ((width, height), "PNG")
        assert told["regions"]
        for region in told["regions"]:
            x, y, w, h = region["box"]
            assert 0 <= x < x + w <= width
            assert 0 <= y < y + h <= height
    told = client.post(f"{AT}?regions=yes", content=good).json()["results"][0]
    assert told["regions"] == []
    assert "map_png" not in told
    assert client.post(f"{AT}?map=svg", content=good).status_code == 400


def test_a_region_is_where_the_map_is_high() -> None:
    map_ = np.zeros((192, 192), np.float32)
    map_[48:96, 96:144] = 5.0
    (region,) = products._regions(Verdict(5.0, 0.1, True, 1.0, map_), (1920, 960))
    assert region["box"] == [960, 240, 480, 240]
    assert region["area"] == 480 * 240


def test_a_corrupt_picture_harms_no_neighbour(client: TestClient, good: bytes, bad: bytes) -> None:
    alone = client.post(AT, content=bad).json()["results"][0]
    broken = [b"", b"no picture", good[: len(good) // 2]]
    files = [("image", (f"{n}.png", content)) for n, content in enumerate([*broken, bad])]
    answer = client.post(AT, files=files)
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert [one["error"]["code"] for one in results[:3]] == ["unreadable"] * 3
    assert results[3] == {**alone, "name": "3.png"}
    answer = client.post(AT, files=files[:3])
    assert answer.status_code == 422
    answer = client.post(AT, json={"images": [{"image": "not base64!"}, {"image": base64.b64encode(bad).decode()}]})
    assert [("error" in one) for one in answer.json()["results"]] == [True, False]


def test_what_is_no_request_is_said(client: TestClient) -> None:
    header = {"Content-Type": "application/json"}
    for content in ("", "[]", "{", '{"images": 3}', '{"images": [3]}', '{"images": []}', "[" * 5000):
        answer = client.post(AT, content=content, headers=header)
        assert (answer.status_code, set(answer.json())) == (400, {"error"}), content
    for data in ({"content": b""}, {"data": {"image": "text"}, "files": {"a": b""}}):
        assert client.post(AT, **data).status_code == 400
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    assert client.post(AT, content=b"--y", headers=broken).status_code == 400
    assert client.post("/v1/other/inspect", content=b"x").status_code == 404
    assert client.get(AT).status_code == 405
    assert client.get("/none").status_code == 404
    assert client.get("/" + "x" * 300).status_code == 414


def test_limits_are_kept(made: Callable[..., Server], good: bytes) -> None:
    client = made(limits=Limits(max_body=len(good) + 1000, max_pixels=64 * 64 - 1, max_images=2)).client
    answer = client.post(AT, content=good)
    assert (answer.status_code, answer.json()["results"][0]["error"]["code"]) == (413, "too_large")
    assert client.post(AT, content=b"x" * (len(good) + 1001)).status_code == 413

    def chunks() -> Iterator[bytes]:  # whose length is not told
        for _ in range(len(good) // 100 + 20):
            yield b"x" * 100

    assert client.post(AT, content=chunks()).status_code == 413
    for n in (3, 9):
        answer = client.post(AT, files=[("image", (f"{i}.png", b"x")) for i in range(n)])
        assert (answer.status_code, "error" in answer.json()) == (413, True)
    assert client.post(AT, json={"images": [{"image": "eA=="}] * 3}).status_code == 413
    huge = io.BytesIO()
    Image.new("1", (8000, 8000)).save(huge, "PNG")
    told = made().client.post(AT, content=huge.getvalue())
    assert (told.status_code, told.json()["results"][0]["error"]["code"]) == (413, "too_large")


class Slow:
    """A product whose pictures wait until they may go on."""

    problem = ""

    def __init__(self, product: Product) -> None:
        self.started, self.may_go = threading.Semaphore(0), threading.Event()
        self.real = product.current

    @property
    def current(self) -> Any:
        return Loaded(cast(Inspector, self), self.real.digest)

    @property
    def card(self) -> Any:
        return self.real.inspector.card

    def __call__(self, image: Any) -> Verdict:
        self.started.release()
        assert self.may_go.wait(60)
        return self.real.inspector(image)

    def refresh(self) -> None:
        return None


def in_threads(n: int, call: Callable[[], Any]) -> tuple[list[threading.Thread], list[Any]]:
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(call())) for _ in range(n)]
    for thread in threads:
        thread.start()
    return threads, answers


def test_a_full_server_says_so_and_goes_on(made: Callable[..., Server], product: Product, good: bytes) -> None:
    slow = Slow(product)
    client = made({"default": slow}, limits=Limits(max_requests=2, workers=2)).client
    threads, answers = in_threads(2, lambda: client.post(AT, content=good).status_code)
    for _ in range(2):
        assert slow.started.acquire(timeout=60)
    answer = client.post(AT, content=good)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200
    slow.may_go.set()
    for thread in threads:
        thread.join()
    assert answers == [200, 200]
    assert client.get("/ready").status_code == 200
    assert client.post(AT, content=good).status_code == 200


def test_a_picture_does_not_wait_for_ever(made: Callable[..., Server], product: Product, good: bytes) -> None:
    slow = Slow(product)
    client = made({"default": slow}, limits=Limits(workers=1, wait=0.05)).client
    threads, answers = in_threads(1, lambda: client.post(AT, content=good).status_code)
    assert slow.started.acquire(timeout=60)
    answer = client.post(AT, content=good)
    assert (answer.status_code, answer.json()["results"][0]["error"]["code"]) == (503, "busy")
    slow.may_go.set()
    threads[0].join()
    assert answers == [200]


def test_a_client_that_stalls_or_goes_away_loses_its_place(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Mapping[str, Any]] = []
    app = make_app({"default": product}, limits=Limits(max_requests=1), log=lines.append)
    headers = [(b"host", b"127.0.0.1:8000")]
    scope = {"type": "http", "method": "POST", "path": AT, "headers": headers, "query_string": b""}
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.01)
    sent: list[Any] = []

    async def stalls() -> Any:
        await anyio.sleep_forever()

    async def goes() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    for receive in (stalls, goes, stalls):
        anyio.run(app, scope, receive, send)
    assert [line["status"] for line in lines] == [408, 499, 408]
    assert [message["status"] for message in sent if "status" in message] == [408, 408]


def test_what_fails_inside_is_not_told_outside(
    made: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, good: bytes
) -> None:
    def fail(*given: object) -> None:
        raise RuntimeError("/secret/place")

    monkeypatch.setattr(products, "inspect", fail)
    answer = made().client.post(AT, content=good)
    assert (answer.status_code, answer.json()["results"][0]["error"]["code"]) == (500, "failed")
    assert "secret" not in answer.text


def test_the_key_opens(made: Callable[..., Server], good: bytes) -> None:
    client = made(key=KEY).client
    for headers in ({}, {"X-API-Key": "x" * 16}, {"Authorization": f"Basic {KEY}"}, {"X-API-Key": ""}):
        for path in ("/v1", "/metrics", "/none", "/v1/other/inspect"):
            answer = client.get(path, headers=headers)
            assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert client.post(AT, content=good, headers=headers).status_code == 401
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}):
        assert client.post(AT, content=good, headers={**headers, "Host": "line.example"}).status_code == 200
        assert set(client.get("/v1", headers=headers).json()["products"]) == {"default"}
    for path in ("/", "/page.js", "/health", "/ready", "/openapi.json"):
        assert client.get(path).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Host": "evil.example"}, 403), ({"Host": "127.0.0.1.evil.example:8000"}, 403), ({"Host": ""}, 403),
     ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": BASE}, 200),
     ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200), ({"Host": "[::1]:8000"}, 200)],
)  # fmt: skip
def test_without_a_key_only_this_machine_is_served(
    client: TestClient, good: bytes, headers: dict[str, str], status: int
) -> None:
    assert client.post(AT, content=good, headers=headers).status_code == status
    assert client.get("/v1", headers=headers).status_code == status


def test_other_addresses_need_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.0.1", "line"):
        with pytest.raises(ParameterError, match="FLAWSIFT_API_KEY"):
            serve({}, host=host)
        assert check_key(f" {KEY}\n", host) == KEY
    for key in ("", "short", "é" * 16):
        with pytest.raises(ParameterError, match="characters"):
            check_key(key, "127.0.0.1")


def test_answers_are_sent_without_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[socket.socket] = []

    def run(server: Any, sockets: list[socket.socket]) -> None:
        with socket.create_connection(sockets[0].getsockname()):
            taken.append(sockets[0].accept()[0])

    monkeypatch.setattr("uvicorn.Server.run", run)
    serve({}, port=0)
    with taken[0] as connection:
        assert connection.proto == socket.IPPROTO_TCP  # by which asyncio knows that it may set TCP_NODELAY


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_an_openvino_file_may_be_overwritten(easy: Dataset, tiny: Backbone, tmp_path: Path) -> None:
    path = export_model(fitted("padim", easy, tiny), tmp_path / "model", "openvino")
    product = Product(path)
    assert str(path.with_suffix(".bin")) not in Path("/proc/self/maps").read_text("utf-8")
    assert product.current.inspector(np.zeros((64, 64, 3), np.uint8)).score > 0


def test_names_of_products() -> None:
    assert read_products(["a"]) == {"default": "a"}
    assert read_products(["x=a", "y-1=b=c"]) == {"x": "a", "y-1": "b=c"}
    for models in (["a", "b"], ["x=a", "x=b"], ["/x=a"], ["=a"], ["a b=c"], ["..=c"]):
        with pytest.raises(ParameterError, match="called|name"):
            read_products(models)


def test_requests_are_counted_and_logged(made: Callable[..., Server], good: bytes, bad: bytes) -> None:
    server = made()
    server.client.post(AT, files=[("image", ("a", good)), ("image", ("b", bad)), ("image", ("c", b""))])
    server.client.post("/v1/evil/inspect", content=b"x")
    text = server.client.get("/metrics").text
    for line in (
        'flawsift_requests_total{product="default",status="200"} 1.0',
        'flawsift_requests_total{product="",status="404"} 1.0',
        'flawsift_images_total{product="default",result="ok"} 1.0',
        'flawsift_images_total{product="default",result="defect"} 1.0',
        'flawsift_images_total{product="default",result="unreadable"} 1.0',
        'flawsift_image_seconds_count{product="default"} 3.0',
    ):
        assert line in text
    assert "evil" not in text  # a label for whatever is asked for would fill the memory
    first = server.lines[0]
    assert (first["method"], first["path"], first["status"], first["product"]) == ("POST", AT, 200, "default")
    assert (first["images"], first["errors"]) == (3, 1)
    assert len(server.lines) == 3
    json.dumps(server.lines)


def test_the_api_is_described(client: TestClient, bad: bytes) -> None:
    api = client.get("/openapi.json").json()
    told = client.post(f"{AT}?regions=1&map=png", content=bad).json()
    schemas = api["components"]["schemas"]
    assert set(told) == set(schemas["Answer"]["properties"])
    assert {*told["results"][0], "error"} == set(schemas["Result"]["properties"])
    assert set(told["results"][0]["regions"][0]) == set(schemas["Region"]["properties"])
    app: Any = client.app
    paths = {route.path for route in app.app.routes} - {"/", "/page.js", "/openapi.json"}
    assert paths == set(api["paths"])
    page = client.get("/")
    assert "page.js" in page.text
    assert 'list="products"' in page.text
    assert 'fetch("v1"' in client.get("/page.js").text, "the page offers the products that are served"
    assert "http" not in page.text  # nothing from elsewhere
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


def test_a_changed_model_is_taken_and_a_broken_one_is_not(exported: Path, tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "model.onnx"
    shutil.copy(exported, path)
    product = Product(path)
    first = product.current
    assert [product.refresh() for _ in range(3)] == [None] * 3
    path.write_bytes(b"half of a mod")
    assert product.refresh() is None  # it may still be being written
    assert product.refresh() is False
    assert product.current is first
    assert "cannot be loaded" in product.problem
    assert [product.refresh() for _ in range(2)] == [None] * 2
    path.unlink()
    assert [product.refresh() for _ in range(2)] == [None] * 2  # as while a folder is replaced
    shutil.copy(exported, path)
    assert [product.refresh() for _ in range(3)] == [None, True, None]
    assert product.problem == ""
    assert product.current is not first
    assert product.current.inspector(bad).score == first.inspector(bad).score
    with pytest.raises(ModelError):
        Product(tmp_path / "none.onnx")


def test_models_are_swapped_without_a_lost_request(
    made: Callable[..., Server], exported: Path, tmp_path: Path, bad: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "POLL", 0.005)
    shutil.copytree(exported.parent, tmp_path / "model")
    product = Product(tmp_path / "model", false_alarm_rate=0.1)
    client = made({"default": product}).client
    stop = threading.Event()

    def ask() -> list[tuple[int, Any]]:
        answers = []
        while not stop.is_set():
            answer = client.post(AT, content=bad)
            answers.append((answer.status_code, answer.json()["results"][0].get("score")))
        return answers

    threads, found = in_threads(2, ask)
    for _ in range(3):
        before = product.current
        shutil.copytree(exported.parent, tmp_path / "new")
        (tmp_path / "model").rename(tmp_path / "old")
        (tmp_path / "new").rename(tmp_path / "model")
        shutil.rmtree(tmp_path / "old")
        deadline = time.monotonic() + 60
        while product.current is before:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    stop.set()
    for thread in threads:
        thread.join()
    answers = [answer for part in found for answer in part]
    assert len(answers) > 3
    assert set(answers) == {(200, answers[0][1])}
    assert 'flawsift_reloads_total{outcome="taken",product="default"} 3.0' in client.get("/metrics").text


def test_the_command_serves_without_torch(exported: Path, bad: bytes, tmp_path: Path) -> None:
    program = "import sys; sys.modules['torch'] = None; from flawsift.cli.main import main; main(sys.argv[1:])"
    (tmp_path / "key").write_text(f"{KEY}\n")
    command = [sys.executable, "-c", program, "serve", f"tiles={exported}", "--host", "0.0.0.0", "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "FLAWSIFT_API_KEY"}
    refused = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert refused.returncode == 2
    assert "Without an API key only this machine is served" in refused.stderr
    command += ["--api-key-file", str(tmp_path / "key")]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        line = next(line for line in process.stderr if line.startswith("Serving at "))
        port = line.split("0.0.0.0:")[1].partition("/")[0]
        address = f"http://127.0.0.1:{port}/v1/tiles/inspect?regions=1&map=png"
        request = urllib.request.Request(address, bad, {"X-API-Key": KEY, "Content-Type": "image/png"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            told = json.load(answer)["results"][0]
        assert told["verdict"] == "defect"
        assert told["regions"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(urllib.request.Request(address, bad), timeout=60).close()
        with pytest.raises(urllib.error.HTTPError, match="413"):  # heard, though it was still sending
            urllib.request.urlopen(urllib.request.Request(address, bytes(90 << 20), {"X-API-Key": KEY})).close()
        logged = [json.loads(process.stdout.readline()) for _ in range(3)]
        assert [line["status"] for line in logged] == [200, 401, 413]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped" in err
