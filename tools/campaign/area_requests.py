"""Requests to `flawsift serve`, over real connections, of every wrong kind."""

import base64
import http.client
import json
import logging
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flawsift.deploy.gate import Limits
from flawsift.deploy.http import listening, make_server
from flawsift.deploy.products import Product
from flawsift.deploy.serve import make_app
from tools.campaign.material import Material
from tools.campaign.mutate import ODD_VALUES, Generator, change_bytes, change_json
from tools.campaign.outcome import Outcome

AT = "/v1/default/inspect"
WAIT = 20.0  # seconds for an answer
PATHS = (
    AT,
    "/v1",
    "/health",
    "/ready",
    "/metrics",
    "/",
    "/page.js",
    "/openapi.json",
    "/v1/other/inspect",
    "/v1//inspect",
    "/v1/../../etc/passwd",
    "/v1/%2e%2e/%2e%2e/etc/passwd",
    "/v1/default%00/inspect",
    "/%ff%fe",
    "/v1/%c0%af/inspect",
    "//evil.example/",
    "/v1/default/inspect/",
    "/v1/default/inspect?regions=%ff",
    f"{AT}?map=svg",
    f"{AT}?map=png&regions=1",
    f"{AT}?map=../../x",
    f"{AT}?regions={'1' * 900}",
    f"/{'a' * 300}",
    "/v1/é/inspect",
    "*",
    "http://evil.example/v1",
    f"{AT}?{'&'.join(f'a{n}=1' for n in range(400))}",
    "/static/../serve.py",
    f"{AT};x=1",
    f"{AT}#x",
    "/v1/\\..\\x",
)
METHODS = ("POST",) * 8 + (
    "GET",
    "PUT",
    "DELETE",
    "PATCH",
    "OPTIONS",
    "HEAD",
    "TRACE",
    "CONNECT",
    "post",
    "X" * 100,
    "BREW",
)
TYPES = (
    "",
    "application/json",
    "application/json; charset=utf-16",
    "image/png",
    "multipart/form-data",
    "multipart/form-data; boundary=x",
    "multipart/form-data; boundary=",
    f"multipart/form-data; boundary={'x' * 900}",
    'multipart/form-data; boundary="é"',
    "application/x-www-form-urlencoded",
    "text/plain",
    "a/b/c",
    ";;;",
    "é",
)
LENGTHS = ("0", "1", "-1", "+5", "1e3", "99999999999999999999", "٣", "0x10", "5, 5", "5.0", " ", "999999")
HEADERS = (
    ("Host", "evil.example"),
    ("Host", ""),
    ("Origin", "http://evil.example"),
    ("Origin", "null"),
    ("Transfer-Encoding", "chunked"),
    ("Transfer-Encoding", "gzip"),
    ("Expect", "100-continue"),
    ("Connection", "upgrade"),
    ("Upgrade", "websocket"),
    ("Content-Encoding", "gzip"),
    ("X-API-Key", "é" * 30),
    ("Authorization", "Bearer"),
    ("Cookie", "a" * 4000),
    ("Range", "bytes=0-"),
    ("X-Long", "a" * 9000),
    ("Accept", "\x7f"),
    ("Bad Name", "x"),
)
NAMES = (
    "part.png",
    "../../etc/passwd",
    "/etc/passwd",
    "a\\..\\b",
    "",
    "é",
    "\x00",
    "x" * 3000,
    "a\r\nX-Injected: 1",
    '"',
    "%2e%2e",
)


class Requests:
    """One odd request, and after it the good picture, which gets the same answer as before."""

    name = "requests"

    def __init__(self, material: Material, work: Path) -> None:
        self.logged: list[str] = []
        handler = logging.Handler(logging.ERROR)
        handler.emit = lambda record: self.logged.append(logging.Formatter().format(record))  # type: ignore[method-assign]
        logging.getLogger("uvicorn.error").addHandler(handler)
        self.good = (material.parts / "part-13.png").read_bytes()
        self.port = _serving(material.onnx)
        self.expected = self._good_answer()
        assert self.expected["results"][0]["score"] > 0

    def _good_answer(self) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        connection.request("POST", f"{AT}?regions=1", self.good)
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return answer

    def try_one(self, draw: Generator) -> Outcome:
        """Send one odd request, and then a good one."""
        what, sent, is_http = self._request(draw)
        self.logged.clear()
        try:
            status, headers, body = _exchange(self.port, sent, half_closes=draw.random() < 0.3)
        except TimeoutError:
            return Outcome("fault", what, f"no answer within {WAIT:g} s")
        except OSError as error:  # closed in the middle of what was sent: an answer as well
            status, headers, body = 0, {}, repr(error).encode()
        said = f"{status} {body[:300]!r}"
        try:
            good = self._good_answer()
        except (OSError, ValueError, http.client.HTTPException) as error:
            return Outcome("fault", what, f"the next picture had no answer: {error!r}; before: {said}")
        if good != self.expected:
            return Outcome("fault", what, f"the next picture had another answer: {good}; before: {said}")
        if self.logged:
            return Outcome("fault", what, "; ".join(self.logged)[-1500:])
        return _worth(what, status, headers, body, said, is_http)

    def _request(self, draw: Generator) -> tuple[str, bytes, bool]:
        """What it is, its bytes, and whether it is HTTP."""
        if draw.random() < 0.05:
            junk = (b"", b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"GET", b"GET / HTTP/9.9\r\n\r\n", draw.bytes(200))
            return "no HTTP", junk[int(draw.integers(len(junk)))], False
        kind, body, type_ = self._body(draw)
        method = METHODS[int(draw.integers(len(METHODS)))] if draw.random() < 0.3 else "POST"
        path = PATHS[int(draw.integers(len(PATHS)))] if draw.random() < 0.3 else AT
        headers = {"Host": f"127.0.0.1:{self.port}", "Content-Type": type_, "Content-Length": str(len(body))}
        is_http = True
        if draw.random() < 0.15:
            headers["Content-Type"] = TYPES[int(draw.integers(len(TYPES)))]
        if draw.random() < 0.15:
            name, value = HEADERS[int(draw.integers(len(HEADERS)))]
            headers[name] = value
            is_http = name not in ("Transfer-Encoding", "Upgrade", "Connection", "Bad Name", "Accept", "X-Long")
        if draw.random() < 0.1:
            headers["Content-Length"] = LENGTHS[int(draw.integers(len(LENGTHS)))]
            is_http = False
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"
        content = head.encode("utf-8", "surrogatepass") + body
        odd = method not in ("POST", "GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD") or not path.startswith("/")
        is_http = is_http and not odd and path.isascii() and "#" not in path
        return (
            f"{method} {path[:60]} {kind}, {headers['Content-Type'][:40]}, {headers['Content-Length']}",
            content,
            is_http,
        )

    def _body(self, draw: Generator) -> tuple[str, bytes, str]:
        way = int(draw.integers(4))
        name = NAMES[int(draw.integers(len(NAMES)))]
        if way == 0:
            what, body = change_bytes(self.good, draw)
            return f"picture {what}", body, "image/png"
        if way == 1:
            what, picture = change_bytes(self.good, draw)
            text = base64.b64encode(picture).decode()
            text = text[: int(draw.integers(len(text) + 1))] if draw.random() < 0.3 else text
            value: Any = {"images": [{"name": name, "image": text}, {"name": "good", "image": _text(self.good)}]}
            if draw.random() < 0.2:
                value = ODD_VALUES[int(draw.integers(len(ODD_VALUES)))]
            body = json.dumps(value).encode("utf-8", "surrogatepass")
            if draw.random() < 0.5 and isinstance(value, dict):
                more, body = change_json(body, draw)
                what += f", {more}"
            return f"JSON of a picture {what}", body, "application/json"
        if way == 2:
            what, picture = change_bytes(self.good, draw)
            body = _form([(name, picture), ("good.png", self.good)])
            if draw.random() < 0.5:
                more, body = change_bytes(body, draw)
                what += f", form {more}"
            return f"form with a picture {what}", body, "multipart/form-data; boundary=limit"
        n = int(draw.integers(0, 80))
        return f"form of {n} parts", _form([(name, b"x")] * n), "multipart/form-data; boundary=limit"


def _worth(what: str, status: int, headers: Mapping[str, str], body: bytes, said: str, is_http: bool) -> Outcome:
    if b"Traceback" in body or status == 500 or b"X-Injected" in b"".join(f"{k}".encode() for k in headers):
        return Outcome("fault", what, said)
    if status in (0, 100) or not is_http:
        return Outcome("error", what, said)  # what is no HTTP is refused by the library that reads it, in its own words
    is_json = headers.get("content-type", "").startswith("application/json")
    if status >= 400 and is_json and not what.startswith("HEAD"):
        try:
            told = json.loads(body)
        except ValueError:
            return Outcome("fault", what, f"no JSON: {said}")
        has_reason = "error" in told or any("error" in one for one in told.get("results", ())) or "ready" in told
        return Outcome("error" if has_reason else "fault", what, said)
    if status >= 400:
        return Outcome("error" if what.startswith("HEAD") and is_json else "fault", what, f"no JSON: {said}")
    if AT.encode() in what.encode() and is_json and body:
        results = json.loads(body).get("results", ())
        return Outcome("told" if any("error" in one for one in results) else "valid", what, said)
    return Outcome("valid", what, said)


def _serving(model: Path) -> int:
    """Serve in a thread, for as long as the process lives; the port."""
    ports: list[int] = []
    ready = threading.Event()

    def run() -> None:
        with listening("127.0.0.1", 0) as (listener, port):
            app = make_app({"default": Product(model, n_threads=1)}, limits=Limits(max_body=1 << 20, max_pixels=10**6))
            ports.append(port)
            ready.set()
            make_server(app, patience=1).run(sockets=[listener])

    threading.Thread(target=run, daemon=True).start()
    if not ready.wait(60):
        raise RuntimeError("the server does not start")
    return ports[0]


def _exchange(port: int, sent: bytes, *, half_closes: bool) -> tuple[int, dict[str, str], bytes]:
    """Send bytes, and what is answered first: status, headers in lower case, body. 0 where the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT) as connection:
        connection.sendall(sent)
        if half_closes or not sent:
            connection.shutdown(socket.SHUT_WR)
        answer = http.client.HTTPResponse(connection, method=sent.partition(b" ")[0].decode("latin-1") or "GET")
        connection.settimeout(1.5)  # what claims more than it sends is waited for by the server, and that is right
        try:
            answer.begin()
        except TimeoutError:
            return 0, {}, b"waited for"
        except (http.client.HTTPException, ValueError) as error:
            return 0, {}, repr(error).encode()
        connection.settimeout(WAIT)
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, headers, answer.read()


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _form(parts: list[tuple[str, bytes]]) -> bytes:
    body = b""
    for name, content in parts:
        shown = name.encode("utf-8", "replace").replace(b'"', b'\\"')
        head = b'--limit\r\nContent-Disposition: form-data; name="image"; filename="' + shown + b'"\r\n\r\n'
        body += head + content + b"\r\n"
    return body + b"--limit--\r\n"
