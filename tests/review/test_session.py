"""The review page's server: who is let in, what it hands out, and that decisions meet."""

import io
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from flawsift import pipeline
from flawsift.detectors.base import make_detector
from flawsift.errors import InputError
from flawsift.features.backbones import Backbone
from flawsift.models import model as models
from flawsift.review import session as reviewing
from flawsift.review.guard import MAX_BODY
from flawsift.review.refit import refit
from flawsift.review.server import make_app, serve
from flawsift.review.session import Refit, Review
from flawsift.screening.decisions import read_decisions
from flawsift.screening.stage1 import FINAL
from flawsift.screening.storage import images_of, read_screening

TOKEN, PORT = "s3cret", 8123
BASE = f"http://127.0.0.1:{PORT}"
MARKUP = "<img src=x onerror=alert(1)>.png"
ODD = os.fsdecode(b"caf\xe9.png")


@pytest.fixture(scope="module")
def screened(easy_folder: Path, tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A screening of a folder with odd names, and the folder beside it."""
    root = tmp_path_factory.mktemp("review")
    shutil.copytree(easy_folder, root / "parts")
    (root / "parts" / "part-00.png").rename(root / "parts" / MARKUP)
    (root / "parts" / "part-01.png").rename(root / "parts" / ODD)
    (root / "parts" / "empty.png").touch()
    (root / "outside.png").write_bytes((easy_folder / "part-02.png").read_bytes())
    pipeline.screen(root / "parts", "padim", tiny, out=root / "s")
    return root


@pytest.fixture
def folder(screened: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(screened / "s", tmp_path / "s"))


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    with TestClient(make_app(Review.open(folder), TOKEN, PORT), base_url=BASE) as made:
        yield made


def decide(client: TestClient, id_: int, choice: str, version: int) -> Any:
    return client.post(f"/{TOKEN}/decide", json={"changes": [{"id": id_, "decision": choice, "version": version}]})


@pytest.mark.parametrize(
    "path", ["/", "/wrong/", "/wrong/content", "//content", f"/{TOKEN}x/", "/decide", "/favicon.ico"]
)
def test_without_the_token_nothing_is_said(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 403
    assert "part-" not in answer.text
    posted = client.post(path, json={"changes": []})
    assert posted.status_code == 403


def test_tokens_are_compared_in_constant_time(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr("hmac.compare_digest", compare)
    assert client.get("/s3crex/content").status_code == 403
    assert client.get("/caf\u00e9/content").status_code == 403
    assert compared == [(b"s3crex", TOKEN.encode()), ("caf\u00e9".encode(), TOKEN.encode())]


def test_the_server_listens_on_this_machine_only_and_says_where(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[tuple[str, int]] = []
    addresses: list[str] = []
    apps: list[Any] = []

    def run(server: Any, sockets: list[socket.socket]) -> None:
        places.extend(s.getsockname() for s in sockets)
        apps.append(server.config.app)

    monkeypatch.setattr("uvicorn.Server.run", run)
    for _ in range(2):
        serve(Review.open(folder), on_ready=addresses.append)
    assert [host for host, _ in places] == ["127.0.0.1", "127.0.0.1"]
    for (_, port), address, app in zip(places, addresses, apps, strict=True):
        start, token, end = address.rsplit("/", 2)
        assert (start, end) == (f"http://127.0.0.1:{port}", "")
        assert len(token) >= 32  # 24 random bytes
        assert TestClient(app, base_url=start).get(f"/{token}/content").status_code == 200
    assert addresses[0].split("/")[3] != addresses[1].split("/")[3]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8123", "127.0.0.1:8124", "127.0.0.1", ""])
def test_foreign_hosts_are_refused(client: TestClient, host: str) -> None:
    assert client.get(f"/{TOKEN}/content", headers={"Host": host}).status_code == 403
    assert client.get(f"/{TOKEN}/content", headers={"Host": "localhost:8123"}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:8123", "http://127.0.0.1:1"])
def test_foreign_origins_are_refused(client: TestClient, origin: str, folder: Path) -> None:
    body = {"changes": [{"id": 3, "decision": "keep", "version": 0}]}
    assert client.post(f"/{TOKEN}/decide", json=body, headers={"Origin": origin}).status_code == 403
    assert client.get(f"/{TOKEN}/content", headers={"Origin": origin}).status_code == 403
    assert not (folder / "decisions.csv").exists()
    assert client.post(f"/{TOKEN}/decide", json=body, headers={"Origin": BASE}).status_code == 200


def test_requests_that_a_browser_marks_as_cross_site_are_refused(client: TestClient) -> None:
    cross = {"Sec-Fetch-Site": "cross-site"}
    assert client.get(f"/{TOKEN}/picture/thumb/3", headers=cross).status_code == 403
    assert client.get(f"/{TOKEN}/", headers={**cross, "Sec-Fetch-Mode": "navigate"}).status_code == 200


def test_bodies_are_small_json(client: TestClient, folder: Path) -> None:
    path = f"/{TOKEN}/decide"
    large = b'{"changes": [' + b" " * MAX_BODY + b"]}"
    as_json = {"Content-Type": "application/json"}
    assert client.post(path, content=large, headers=as_json).status_code == 413
    parts = (large[i : i + 65536] for i in range(0, len(large), 65536))  # in chunks, without a length
    assert client.post(path, content=parts, headers=as_json).status_code == 413
    assert client.post(path, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    for bad in (b"", b"[]", b"{", b'{"changes": 3}', b'{"changes": [3]}', b'{"changes": [{"id": 3}]}', b"\xff"):
        assert client.post(path, content=bad, headers=as_json).status_code == 400, bad
    assert not (folder / "decisions.csv").exists()


def test_the_address_without_its_last_slash_leads_to_the_page(client: TestClient) -> None:
    answer = client.get(f"/{TOKEN}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, f"/{TOKEN}/")  # links of the page are relative


@pytest.mark.parametrize(
    ("path", "status"),
    [("decisions?since=--5", 200), ("decisions?since=x", 200), (f"decisions?since={'1' * 5000}", 200),
     (f"picture/thumb/{'1' * 5000}", 414), (f"picture/thumb/{'1' * 150}", 404), ("x" * 5000, 414)],
)  # fmt: skip
def test_odd_numbers_in_addresses_are_answered(client: TestClient, path: str, status: int) -> None:
    answer = client.get(f"/{TOKEN}/{path}")
    assert answer.status_code == status
    if status == 200:
        assert answer.json()["decisions"] == {}


@pytest.mark.parametrize(
    "change",
    [{"id": True, "decision": "keep", "version": 0}, {"id": 5.0, "decision": "keep", "version": 0},
     {"id": 5, "decision": "keep", "version": False}, {"id": 5, "decision": ["keep"], "version": 0},
     {"id": [5], "decision": "keep", "version": 0}, {"id": 5, "decision": "\ud800", "version": 0}],
)  # fmt: skip
def test_changes_of_other_types_are_refused(client: TestClient, folder: Path, change: Any) -> None:
    answer = client.post(
        f"/{TOKEN}/decide", content=json.dumps({"changes": [change]}), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]
    assert not (folder / "decisions.csv").exists()


def test_other_methods_do_nothing(client: TestClient, folder: Path) -> None:
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        for path in ("decide", "content", "refit"):
            assert client.request(method, f"/{TOKEN}/{path}").status_code == 405
    for path in ("decide", "refit"):
        assert client.get(f"/{TOKEN}/{path}").status_code == 404
    assert not (folder / "decisions.csv").exists()


def test_answers_say_what_they_are(client: TestClient) -> None:
    kinds = {
        "": "text/html; charset=utf-8", "overview": "text/html; charset=utf-8", "content": "application/json",
        "decisions": "application/json", "review.js": "text/javascript; charset=utf-8", "icon.svg": "image/svg+xml",
        "review.css": "text/css; charset=utf-8", "style.css": "text/css; charset=utf-8",
        "nothing": "text/plain; charset=utf-8",
        "picture/thumb/3": "image/jpeg", "picture/thumb-map/3": "image/png",
    }  # fmt: skip
    for path, kind in kinds.items():
        answer = client.get(f"/{TOKEN}/{path}")
        assert answer.headers["content-type"] == kind, path
        assert answer.headers["cache-control"] == ("private, no-cache" if "picture" in path else "no-store"), path


@pytest.mark.parametrize(
    "path",
    ["picture/thumb/..%2f..%2foutside.png", "picture/thumb/999", "picture/thumb/-1", "picture/other/3", "screening.csv",
     "../screening.csv", "%2e%2e/outside.png", "review.py", "picture/thumb/3/../../../x"],
)  # fmt: skip
def test_only_ids_of_the_screening_are_served(client: TestClient, path: str) -> None:
    assert client.get(f"/{TOKEN}/{path}").status_code in (403, 404)


def test_pictures_are_made_by_us(client: TestClient, screened: Path) -> None:
    content = client.get(f"/{TOKEN}/content").json()
    id_ = content["ids"][content["names"].index("part-07.png")]
    for kind, form in (("thumb", "JPEG"), ("preview", "JPEG"), ("thumb-map", "PNG"), ("preview-map", "PNG")):
        answer = client.get(f"/{TOKEN}/picture/{kind}/{id_}")
        assert answer.status_code == 200
        with Image.open(io.BytesIO(answer.content)) as picture:
            assert picture.format == form
            assert picture.mode == ("RGB" if form == "JPEG" else "RGBA")
        assert answer.content != (screened / "parts" / "part-07.png").read_bytes()


def test_every_answer_forbids_what_it_does_not_need(client: TestClient) -> None:
    for path in (f"/{TOKEN}/", f"/{TOKEN}/content", "/nothing"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in headers
    page = client.get(f"/{TOKEN}/").text
    assert "http:" not in page
    assert "https:" not in page


def test_odd_names_are_text_and_their_pictures_are_found(client: TestClient) -> None:
    content = client.get(f"/{TOKEN}/content").json()
    for name in (MARKUP, "caf\\udce9.png"):
        id_ = content["ids"][content["names"].index(name)]
        assert client.get(f"/{TOKEN}/picture/thumb/{id_}").status_code == 200
        assert decide(client, id_, "keep", 0).status_code == 200
    overview = client.get(f"/{TOKEN}/overview").text
    assert "empty.png" in overview
    assert "empty file (0 bytes)" in overview
    assert "<img src=x" not in overview


def test_content_is_that_of_the_screening(client: TestClient, folder: Path) -> None:
    content, screening = client.get(f"/{TOKEN}/content").json(), read_screening(folder)
    assert content["ids"] == screening.ids.tolist()
    order = sorted(range(len(screening.ids)), key=lambda p: content["rank"][p])
    assert [content["ids"][p] for p in order] == screening.ranking.tolist()
    assert [i for i, k in zip(content["ids"], content["kept"], strict=True) if k] == screening.kept.tolist()
    assert (content["voters"], content["has_maps"]) == (4, True)
    near = client.get(f"/{TOKEN}/alike/{int(screening.removed[0])}").json()
    assert len(near) == 6
    assert set(near) <= set(screening.kept.tolist())


def test_decisions_conflict_per_image_and_merge(client: TestClient, folder: Path) -> None:
    assert decide(client, 5, "keep", 0).json()["written"] == {"5": ["keep", 1]}
    changes = [{"id": 5, "decision": "remove", "version": 0}, {"id": 6, "decision": "unsure", "version": 0}]
    answer = client.post(f"/{TOKEN}/decide", json={"changes": changes})
    assert answer.status_code == 409
    assert answer.json()["written"] == {"6": ["unsure", 1]}
    assert answer.json()["refused"] == {"5": ["keep", 1]}
    assert sorted(read_decisions(folder / "decisions.csv").values()) == ["keep", "unsure"]
    news = client.get(f"/{TOKEN}/decisions?since=1").json()
    assert news["decisions"] == {"6": ["unsure", 1]}
    assert decide(client, 5, "remove", 1).status_code == 200
    assert decide(client, 999, "keep", 0).status_code == 400
    assert decide(client, 6, "perhaps", 1).status_code == 400


def test_decisions_of_an_earlier_run_are_there(folder: Path, client: TestClient) -> None:
    decide(client, 5, "remove", 0)
    with TestClient(make_app(Review.open(folder), "other", PORT), base_url=BASE) as later:
        assert later.get("/other/content").json()["decisions"] == {"5": ["remove", 1]}
    now = Review.open(folder).reviewed_screening()
    assert 5 not in now.kept.tolist()
    assert 5 in read_screening(folder).kept.tolist()


def test_a_set_without_a_kept_image_can_still_be_looked_at(folder: Path) -> None:
    review = Review.open(folder)
    assert review.screening.grids is not None
    review.screening = replace(review.screening, rejected=review.screening.grids > 0)
    review.decide([{"id": i, "decision": "remove", "version": 0} for i in review.screening.ids.tolist()])
    page = review.overview()
    assert not len(review.reviewed_screening().kept)
    assert "nan" not in page


def test_a_damaged_decisions_file_is_told_and_kept(client: TestClient, folder: Path) -> None:
    (folder / "decisions.csv").write_text("path,decision\na,maybe\n")
    answer = decide(client, 5, "keep", 0)
    assert answer.status_code == 500
    assert "row 2" in answer.json()["error"]
    assert "maybe" in (folder / "decisions.csv").read_text()


def test_where_the_images_are(folder: Path, screened: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "screening.json").read_text())
    assert content.pop("images_root") == str(screened / "parts")
    (folder / "screening.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="does not say where its images are"):
        Review.open(folder)
    assert len(Review.open(folder, images=screened / "parts").images) == 50
    with pytest.raises(InputError, match="None of the 50 images"):
        Review.open(folder, images=tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        Review.open(folder, images=tmp_path / "gone")
    with pytest.raises(InputError, match="holds no screening"):
        Review.open(tmp_path / "gone")


def test_a_vanished_image_has_no_picture(folder: Path, screened: Path, tmp_path: Path) -> None:
    parts = Path(shutil.copytree(screened / "parts", tmp_path / "parts"))
    (parts / "part-05.png").unlink()
    with TestClient(make_app(Review.open(folder, images=parts), TOKEN, PORT), base_url=BASE) as client:
        content = client.get(f"/{TOKEN}/content").json()
        id_ = content["ids"][content["names"].index("part-05.png")]
        assert client.get(f"/{TOKEN}/picture/thumb/{id_}").status_code == 404
        assert decide(client, id_, "remove", 0).status_code == 200


def test_a_picture_is_that_of_the_file_as_it_is_now(folder: Path, screened: Path, tmp_path: Path) -> None:
    parts = Path(shutil.copytree(screened / "parts", tmp_path / "parts"))
    with TestClient(make_app(Review.open(folder, images=parts), TOKEN, PORT), base_url=BASE) as client:
        content = client.get(f"/{TOKEN}/content").json()
        path = f"/{TOKEN}/picture/thumb/{content['ids'][content['names'].index('part-05.png')]}"
        before = client.get(path)
        same = {"If-None-Match": before.headers["etag"]}
        assert client.get(path, headers=same).status_code == 304
        Image.new("RGB", (30, 20), (250, 0, 0)).save(parts / "part-05.png")
        after = client.get(path, headers=same)
        assert after.status_code == 200
        with Image.open(io.BytesIO(after.content)) as picture:
            assert picture.size == (30, 20)
        (parts / "part-05.png").unlink()
        assert client.get(path).status_code == 404
        os.mkfifo(parts / "part-05.png")  # whoever reads it waits for ever
        assert client.get(path).status_code == 404
        (parts / "part-05.png").unlink()
        shutil.copy(parts / "part-06.png", parts / "part-05.png")
        assert client.get(path).status_code == 200  # it is back


def test_of_a_link_out_of_the_folder_only_a_picture_is_shown(folder: Path, screened: Path, tmp_path: Path) -> None:
    parts = Path(shutil.copytree(screened / "parts", tmp_path / "parts"))
    (tmp_path / "secret.txt").write_text("secret")
    for name, target in (("part-05.png", tmp_path / "secret.txt"), ("part-06.png", screened / "outside.png")):
        (parts / name).unlink()
        (parts / name).symlink_to(target)
    with TestClient(make_app(Review.open(folder, images=parts), TOKEN, PORT), base_url=BASE) as client:
        content = client.get(f"/{TOKEN}/content").json()
        for name, status in (("part-05.png", 404), ("part-06.png", 200)):
            answer = client.get(f"/{TOKEN}/picture/preview/{content['ids'][content['names'].index(name)]}")
            assert answer.status_code == status
            assert b"secret" not in answer.content


def test_memory_for_pictures_is_bounded() -> None:
    # at most about 15 kB for a thumbnail, and 400 kB for a preview
    assert 15e3 * reviewing.THUMBS + 400e3 * reviewing.PREVIEWS < 100e6


def test_a_folder_that_vanishes_is_told(client: TestClient, folder: Path) -> None:
    shutil.rmtree(folder)
    for answer in (decide(client, 5, "keep", 0), client.post(f"/{TOKEN}/refit", json={})):
        assert answer.status_code == 500
        assert "Cannot write" in answer.json()["error"]


def finished(client: TestClient, seconds: float = 60) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        status: dict[str, Any] = client.get(f"/{TOKEN}/decisions").json()["refit"]
        if status["state"] not in ("idle", "running"):
            return status
        time.sleep(0.05)
    raise AssertionError("the refit did not end")


def test_a_refit_runs_in_its_own_process_and_says_how_far_it_is(folder: Path) -> None:
    review = Review.open(folder)
    assert review.refit.command[1:3] == ["-m", "flawsift.review.refit"]
    told = "import json, sys\nprint(json.dumps({'stage': 'detector', 'done': 1, 'total': 4}), flush=True)\n"
    review.refit.command = [sys.executable, "-c", told + "sys.stdin.read()"]
    with TestClient(make_app(review, TOKEN, PORT), base_url=BASE) as client:
        assert client.post(f"/{TOKEN}/refit", json={}).status_code == 202
        assert client.post(f"/{TOKEN}/refit", json={}).status_code == 409
        deadline = time.monotonic() + 30
        while review.refit.status.get("total") != 4:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process = review.refit._process
        assert process is not None
    assert process.poll() is not None  # ended with the server


def test_a_refit_that_fails_says_why() -> None:
    failing = Refit([sys.executable, "-c", "print('noise'); print('{\"error\": \"no space\"}'); raise SystemExit(2)"])
    assert failing.start()
    deadline = time.monotonic() + 30
    while failing.status["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert failing.status == {"state": "failed", "message": "no space"}
    missing = Refit(["/nonexistent/python"])
    missing.start()
    assert missing.status["state"] == "failed"


@pytest.mark.parametrize(
    "noise", ["5", "null", '"text"', "[1]", '{"other": 1}', '{"stage": "x", "state": "done"}', "[" * 20_000]
)
def test_what_libraries_print_does_not_disturb_a_refit(noise: str) -> None:
    result = json.dumps({"result": {"n_kept": 3, "threshold": float("nan")}})
    made = Refit([sys.executable, "-c", f"print({noise!r}); print({result!r}); print({noise!r})"])
    assert made.start()
    deadline = time.monotonic() + 30
    while made.status["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert made.status == {"state": "done", "n_kept": 3, "threshold": None}


def test_refit_trains_with_the_decisions_and_reports(folder: Path, tmp_path: Path) -> None:
    screening = read_screening(folder)
    back = int(screening.removed[0])
    names = dict(zip(screening.ids.tolist(), screening.names, strict=True))
    (tmp_path / "d.csv").write_text(f"path,decision\n{names[back]},keep\n")
    stages: list[str] = []
    out = tmp_path / os.fsdecode(b"mod\xe9l")  # the page is told in UTF-8
    result = refit(folder, out, decisions=tmp_path / "d.csv", progress=lambda stage, done, total: stages.append(stage))
    assert result["n_kept"] == len(screening.kept) + 1
    json.dumps(result, ensure_ascii=False, allow_nan=False).encode()
    assert "detector" in stages
    assert (out / "model.json").exists()
    page = (out / "report.html").read_text("utf-8")
    assert "a person decided to keep 1 and to remove 0" in page
    assert models.load_model(out).training["n_kept"] == len(screening.kept) + 1


def test_a_refit_replaces_a_model_by_one_of_its_kind(folder: Path, screened: Path, tiny: Backbone) -> None:
    out = folder / "model"
    final = make_detector("patchcore", coreset_ratio=0.02)
    pipeline.fit(screened / "parts", final, tiny, screening=folder, out=out, false_alarm_rate=0.07)
    (folder / "d.csv").write_text("path,decision\n")
    refit(folder, out, decisions=folder / "d.csv")
    model = models.load_model(out)
    assert (model.detector.name, model.detector.params()) == ("patchcore", final.params()), "the screening's is padim"
    assert model.training["false_alarm_rate"] == 0.07


def test_a_first_refit_has_the_default_detector(screened: Path, tiny: Backbone, tmp_path: Path) -> None:
    pipeline.screen(screened / "parts", "patchcore", tiny, out=tmp_path / "s", seed=3)
    (tmp_path / "d.csv").write_text("path,decision\n")
    for _ in range(2):  # without a model to replace, then with one
        refit(tmp_path / "s", tmp_path / "m", decisions=tmp_path / "d.csv")
        model = models.load_model(tmp_path / "m")
        assert model.detector.params() == make_detector(FINAL, seed=3).params()


def test_names_are_found_by_what_is_shown(screened: Path) -> None:
    images = images_of(read_screening(screened / "s"))
    assert ODD in images.names
    assert images.image(images.ids.tolist()[images.names.index(ODD)]).size == (64, 64)
