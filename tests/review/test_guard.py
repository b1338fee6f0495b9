"""Who is let in by the review page's server."""

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from flawsift.review.guard import MAX_BODY
from tests.review.material import BASE, TOKEN


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


@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example", 400), ("evil.example:8123", 400), ("www.localhost:8123", 400), ("localhost.evil.org:8123", 400),
     ("[::1]:8123", 400), ("127.0.0.1.:8123", 400), ("127.0.0.2:8123", 400), ("", 400), ("127.0.0.1:8124", 403),
     ("127.0.0.1:81230", 403), ("127.0.0.1", 403)],
)  # fmt: skip
def test_foreign_hosts_and_ports_are_refused(client: TestClient, host: str, status: int) -> None:
    answer = client.get(f"/{TOKEN}/content", headers={"Host": host})
    assert answer.status_code == status
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert client.get(f"/{TOKEN}/content", headers={"Host": "localhost:8123"}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:8123", "http://127.0.0.1:1"])
def test_foreign_origins_are_refused(client: TestClient, origin: str, folder: Path) -> None:
    body = {"changes": [{"id": 3, "decision": "keep", "version": 0}]}
    assert client.post(f"/{TOKEN}/decide", json=body, headers={"Origin": origin}).status_code == 403
    assert client.get(f"/{TOKEN}/content", headers={"Origin": origin}).status_code == 403
    assert not (folder / "decisions.csv").exists()
    assert client.post(f"/{TOKEN}/decide", json=body, headers={"Origin": BASE}).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])  # another port of this machine is the same site
def test_requests_that_a_browser_marks_as_foreign_are_refused(client: TestClient, site: str, folder: Path) -> None:
    marked = {"Sec-Fetch-Site": site}
    followed = {**marked, "Sec-Fetch-Mode": "navigate"}
    assert client.get(f"/{TOKEN}/picture/thumb/3", headers=marked).status_code == 403
    assert client.get(f"/{TOKEN}/", headers=followed).status_code == 200
    body = {"changes": [{"id": 3, "decision": "keep", "version": 0}]}
    assert client.post(f"/{TOKEN}/decide", json=body, headers=followed).status_code == 403
    assert not (folder / "decisions.csv").exists()
    for own in ("same-origin", "none"):
        assert client.get(f"/{TOKEN}/picture/thumb/3", headers={"Sec-Fetch-Site": own}).status_code == 200


def test_bodies_are_small_json(client: TestClient, folder: Path) -> None:
    path = f"/{TOKEN}/decide"
    large = b'{"changes": [' + b" " * MAX_BODY + b"]}"
    as_json = {"Content-Type": "application/json"}
    assert client.post(path, content=large, headers=as_json).status_code == 413
    for length in (str(MAX_BODY + 1), "9" * 5000, "-1", "many"):  # refused before it is read
        answer = client.post(path, content=b"{}", headers={**as_json, "Content-Length": length})
        assert answer.status_code == 413, length
    parts = (large[i : i + 65536] for i in range(0, len(large), 65536))  # in chunks, without a length
    assert client.post(path, content=parts, headers=as_json).status_code == 413
    assert client.post(path, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    for bad in (b"", b"[]", b"{", b'{"changes": 3}', b'{"changes": [3]}', b'{"changes": [{"id": 3}]}', b"\xff"):
        assert client.post(path, content=bad, headers=as_json).status_code == 400, bad
    assert not (folder / "decisions.csv").exists()


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


def test_a_report_may_bring_its_style_and_pictures_and_nothing_else(client: TestClient, folder: Path) -> None:
    assert client.get(f"/{TOKEN}/report").status_code == 404
    (folder / "model").mkdir()
    (folder / "model" / "report.html").write_text("<h1>made</h1>")
    answer = client.get(f"/{TOKEN}/report")
    assert (answer.text, answer.headers["content-type"]) == ("<h1>made</h1>", "text/html; charset=utf-8")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'", "img-src": "data:", "style-src": "'unsafe-inline'", "base-uri": "'none'",
        "form-action": "'none'", "frame-ancestors": "'none'",
    }  # fmt: skip
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/wrong/report").status_code == 403
