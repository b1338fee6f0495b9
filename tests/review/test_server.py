"""What the review page's server hands out, and that decisions of several pages meet."""

import io
import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from flawsift.review.server import make_app, serve
from flawsift.review.session import Review
from flawsift.screening.decisions import read_decisions
from flawsift.screening.storage import load_screening, save_screening
from tests.reports.material import make_evidence
from tests.review.material import BASE, MARKUP, PORT, TOKEN, decide


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


def test_the_address_without_its_last_slash_leads_to_the_page(client: TestClient) -> None:
    answer = client.get(f"/{TOKEN}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, f"/{TOKEN}/")  # links of the page are relative


@pytest.mark.parametrize(
    ("path", "status"),
    [("decisions?since=--5", 200), ("decisions?since=x", 200), (f"decisions?since={'1' * 5000}", 200),
     (f"picture/thumb/{'1' * 5000}", 414), (f"picture/thumb/{'1' * 150}", 404), ("x" * 250, 414), ("x" * 5000, 414)],
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
    content, screening = client.get(f"/{TOKEN}/content").json(), load_screening(folder)
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
    assert 5 in load_screening(folder).kept.tolist()


def test_a_damaged_decisions_file_is_told_and_kept(client: TestClient, folder: Path) -> None:
    (folder / "decisions.csv").write_text("path,decision\na,maybe\n")
    answer = decide(client, 5, "keep", 0)
    assert answer.status_code == 500
    assert "row 2" in answer.json()["error"]
    assert "maybe" in (folder / "decisions.csv").read_text()


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
        assert client.get(path, headers={"If-None-Match": '""'}).status_code == 404
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


def test_a_folder_that_vanishes_is_told(client: TestClient, folder: Path) -> None:
    shutil.rmtree(folder)
    for answer in (decide(client, 5, "keep", 0), client.post(f"/{TOKEN}/refit", json={})):
        assert answer.status_code == 500
        assert "Cannot write" in answer.json()["error"]


def test_the_nearest_places_and_their_pictures(folder: Path, screened: Path, tmp_path: Path) -> None:
    parts = Path(shutil.copytree(screened / "parts", tmp_path / "parts"))
    screening = load_screening(folder)
    evidence = make_evidence(screening.ids)
    far = 1.5 * evidence.distances[:, 0].astype(float)  # the nearest place is not much nearer than the others
    save_screening(replace(screening, evidence=evidence, held_out_scores=far), folder)
    id_, kept = int(screening.removed[0]), int(screening.ranking[-1])
    position = screening.ids.tolist().index(id_)
    with TestClient(make_app(Review.open(folder, images=parts), TOKEN, PORT), base_url=BASE) as client:
        answer = client.get(f"/{TOKEN}/nearest/{id_}").json()
        assert answer["text"] == "Nothing like this in 49 other images. The closest places:"
        assert "Nothing" not in client.get(f"/{TOKEN}/nearest/{kept}").json()["text"]
        shown = [(o["id"], o["place"], o["distance"]) for o in answer["nearest"]]
        assert shown == [(i, place, f"{d:.4g}") for i, place, d in evidence.nearest(position)]
        assert answer["place"] == int(evidence.places[position])
        for i, place in [(id_, answer["place"]), *(row[:2] for row in shown)]:
            picture = client.get(f"/{TOKEN}/picture/place/{i}/{place}")
            assert picture.headers["content-type"] == "image/jpeg"
            assert picture.headers["cache-control"] == "private, no-cache"
            with Image.open(io.BytesIO(picture.content)) as opened:
                assert max(opened.size) == 96
        own = f"/{TOKEN}/picture/place/{id_}"
        other_place = (answer["place"] + 12) % 24
        assert client.get(f"{own}/{answer['place']}").content != client.get(f"{own}/{other_place}").content
        for path in (f"{own}/24", f"{own}/-1", f"/{TOKEN}/picture/place/999/0", f"/{TOKEN}/nearest/999"):
            assert client.get(path).status_code == 404, path
        same = {"If-None-Match": client.get(f"{own}/0").headers["etag"]}
        assert client.get(f"{own}/0", headers=same).status_code == 304
        (parts / screening.names[position]).unlink()
        assert client.get(f"{own}/0").status_code == 404


def test_a_screening_by_submodels_has_no_places(client: TestClient) -> None:
    id_ = client.get(f"/{TOKEN}/content").json()["ids"][3]
    assert client.get(f"/{TOKEN}/nearest/{id_}").json() == {}
    assert client.get(f"/{TOKEN}/picture/place/{id_}/0").status_code == 404
