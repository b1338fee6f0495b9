"""Which requests reach the models: with the key, small, and no more than can be kept; each is counted and logged."""

import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import anyio

from flawsift.errors import InputError, ParameterError

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.responses import JSONResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise InputError("Serving needs more packages. Install them: pip install 'flawsift[serve]'.") from error

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN = ("/", "/page.js", "/health", "/ready", "/openapi.json")  # say nothing of the products
MAX_PATH = 200  # characters; a product's name has at most 64
MIN_KEY = 16  # characters: what is shorter can be guessed
BODY_SECONDS = 30.0  # in which a body must have arrived: a client that stalls keeps a place
DRAIN_SECONDS = 5.0  # for which the body of a refused request is read: a client that sends does not hear the answer
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src data:; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
Log = Callable[[Mapping[str, Any]], object]


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        max_body: Bytes of a request.
        max_pixels: Of a picture.
        max_images: Of a request.
        max_requests: That are read, wait or are answered at a time; more are told to come again.
        workers: Pictures that are scored at a time.
        wait: Seconds for which a picture may wait for a worker.
    """

    max_body: int = 64 << 20
    max_pixels: int = 50_000_000
    max_images: int = 64
    max_requests: int = 32
    workers: int = 2
    wait: float = 30.0


class Metrics:
    """Counters in the format of Prometheus, of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "flawsift_requests", "Requests by status.", ["product", "status"], registry=self.registry
        )
        self.images = Counter("flawsift_images", "Pictures by result.", ["product", "result"], registry=self.registry)
        self.seconds = Histogram(
            "flawsift_image_seconds", "From a free worker to the verdict.", ["product"], registry=self.registry
        )
        self.reloads = Counter(
            "flawsift_reloads", "Changed model files by outcome.", ["product", "outcome"], registry=self.registry
        )
        self.active = Gauge("flawsift_active_requests", "Requests that have a place.", registry=self.registry)


def check_key(key: str | None, host: str) -> str | None:
    """The key, without what stands around it.

    Raises:
        ParameterError: It is too short, or there is none and the server would be reached from elsewhere.
    """
    key = None if key is None else key.strip()
    if key is not None and (len(key) < MIN_KEY or not (key.isascii() and key.isprintable())):
        raise ParameterError(f"The API key needs at least {MIN_KEY} characters, printable and ASCII.")
    if key is None and host not in LOOPBACK:
        raise ParameterError(
            f"Without an API key only this machine is served, not '{host}'. Set FLAWSIFT_API_KEY or --api-key-file."
        )
    return key


class Gate:
    """Lets requests in, or says why not.

    Without a key only this machine is served. A page of another site can make a browser send requests to it, also
    under a name that points here, so Host and Origin must be this machine's.
    """

    def __init__(self, app: ASGIApp, limits: Limits, key: str | None, metrics: Metrics, log: Log) -> None:
        self.app, self.limits, self.metrics, self.log = app, limits, metrics, log
        self._key = None if key is None else key.encode()
        self.n_active = 0

    @property
    def is_full(self) -> bool:
        """Whether no more requests have a place."""
        return self.n_active >= self.limits.max_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":  # no other kind of connection is accepted
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status, told = time.perf_counter(), 0, dict[str, Any]()

        async def send_restricted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._admit({**scope, "flawsift.told": told}, receive, send_restricted)
        finally:
            # a client that went away before its answer has none
            product = told.get("product", "")
            self.metrics.requests.labels(product, str(status or 499)).inc()
            self.log(
                {
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "client": (scope.get("client") or ("",))[0],
                    "method": scope["method"],
                    "path": scope["path"][:MAX_PATH],
                    "status": status or 499,
                    "ms": round(1000 * (time.perf_counter() - started), 1),
                    **told,
                }
            )

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope)
        if refusal is None and scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if refusal is None and self.is_full:
            refusal = refused(429, "busy", "All places are taken. Try again.", {"Retry-After": "1"})
        if refusal is not None:
            await _refuse(refusal, scope, receive, send)
            return
        self.n_active += 1
        self.metrics.active.set(self.n_active)
        try:
            body = await self._body(receive)
            if isinstance(body, bytes):
                await self.app(scope, _replay(body, receive), send)
            elif body is not None:
                await _refuse(body, scope, receive, send)
        finally:
            self.n_active -= 1
            self.metrics.active.set(self.n_active)

    async def _body(self, receive: Receive) -> bytes | JSONResponse | None:
        """The body, or why it is not taken; None of a client that went away."""
        chunks, size = list[bytes](), 0
        with anyio.move_on_after(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                if size > self.limits.max_body:
                    return self._too_large()
                if not message.get("more_body", False):
                    return b"".join(chunks)
        return refused(408, "slow", f"The request did not arrive within {BODY_SECONDS:g} seconds.")

    def _too_large(self) -> JSONResponse:
        return refused(413, "too_large", f"A request has at most {self.limits.max_body} bytes.")

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        """By what is known before the body is read."""
        headers = Headers(scope=scope)
        if len(scope["path"]) > MAX_PATH:
            return refused(414, "too_long", "The address is too long.")
        if self._key is None:
            host = _name(headers.get("host", ""))
            if host not in LOOPBACK:
                return refused(403, "host", "Only this machine is served, under its own name.")
            origin = headers.get("origin")
            if origin is not None and origin != f"http://{headers['host']}":
                return refused(403, "origin", "Requests from other pages are refused.")
        elif scope["path"] not in OPEN and not self._has_key(headers):
            message = "Send the API key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'."
            return refused(401, "key", message, {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self.limits.max_body:
            return self._too_large()
        return None

    def _has_key(self, headers: Headers) -> bool:
        assert self._key is not None
        kind, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._key)


def refused(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An answer that says what is wrong."""
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers)


async def _refuse(refusal: JSONResponse, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer, and close the connection. A client that asks before it sends its body is answered at once."""
    if scope["method"] == "POST" and refusal.status_code != 408 and "expect" not in Headers(scope=scope):
        with anyio.move_on_after(DRAIN_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    break
    refusal.headers["Connection"] = "close"
    await refusal(scope, receive, send)


def _name(host: str) -> str:
    """Of a Host header, without its port: 127.0.0.1:80, [::1]:80."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _replay(body: bytes, receive: Receive) -> Receive:
    is_replayed = False

    async def replay() -> Message:
        nonlocal is_replayed
        if is_replayed:
            return await receive()
        is_replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
