"""The review page's server, for this machine only.

Whoever opens the page must know its token, come from this machine under its own name, and send little: see `_Guard`.
"""

import contextlib
import functools
import hmac
import secrets
import socket
from collections.abc import Callable
from importlib import resources
from typing import Any

from flawsift.errors import FlawsiftError, InputError, ParameterError
from flawsift.paths import show
from flawsift.review.session import Review

try:
    import anyio
    import anyio.to_thread
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise InputError("The review page needs more packages. Install them: pip install 'flawsift[review]'.") from error

LOOPBACK = "127.0.0.1"
MAX_BODY = 1 << 20  # bytes; a decision on 10,000 images at once is half of that
MAX_DIGITS = 10  # of a number in an address
MAX_PATH = 200  # characters; the longest address of the page has half of that
WORKERS = 4  # pictures made at once; more would only keep decisions waiting
POLICY = (
    "default-src 'none'; img-src 'self'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
STATIC = {"review.js": "text/javascript", "review.css": "text/css", "icon.svg": "image/svg+xml"}


class _Guard:
    """Refuses whoever does not know the token, comes under another host's name or from another page, or sends too much.

    A page of another site can make a browser send requests here, and a name of that site can be made to point here: so
    the Host must be this machine's and the Origin, where there is one, this page's. The token stands in the path, not
    in a cookie, since cookies are shared by all ports of a machine.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app, self.token = app, token.encode()
        self.hosts = {f"{name}:{port}" for name in (LOOPBACK, "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no other kind of connection is ever accepted

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for key, value in HEADERS.items():
                    headers[key] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        status, reason = self._refusal(scope)
        body = b""
        if not reason and scope["method"] == "POST":
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return
                body += message.get("body", b"")
                if len(body) > MAX_BODY:
                    status, reason = 413, "The request is too large."
                if reason or not message.get("more_body", False):
                    break
        if reason:
            await PlainTextResponse(f"{reason}\n", status, {"Connection": "close"})(scope, receive, send_guarded)
            return
        _, slash, rest = scope["path"][1:].partition("/")
        inner = {
            **scope,
            "path": f"/{rest}",
            "raw_path": f"/{rest}".encode(),
            "flawsift.bare": not slash,
        }
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self.app(inner, replay if scope["method"] == "POST" else receive, send_guarded)

    def _refusal(self, scope: Scope) -> tuple[int, str]:
        headers = Headers(scope=scope)
        if len(scope["path"]) > MAX_PATH:
            return 414, "The address is too long."
        if headers.get("host", "") not in self.hosts:
            return 403, "Wrong host. Open the address that `flawsift review` printed."
        origin = headers.get("origin")
        if origin is not None and origin not in {f"http://{host}" for host in self.hosts}:
            return 403, "Requests from other pages are refused."
        # a link to the page itself may be followed from anywhere: the token is in it
        followed = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not followed:
            return 403, "Requests from other pages are refused."
        token, _, _ = scope["path"][1:].partition("/")
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.token):
            return 403, "Wrong token. Open the address that `flawsift review` printed."
        if scope["method"] == "POST":
            if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                return 415, "Only JSON is taken."
            length = headers.get("content-length", "0")
            if not length.isdecimal() or len(length) > len(str(MAX_BODY)) or int(length) > MAX_BODY:
                return 413, "The request is too large."
        return 0, ""


def make_app(review: Review, token: str, port: int) -> ASGIApp:
    """The page's server, behind its guard."""
    limit: list[anyio.CapacityLimiter] = []

    async def in_thread(call: Callable[[], Any]) -> Any:
        if not limit:
            limit.append(anyio.CapacityLimiter(WORKERS))
        return await anyio.to_thread.run_sync(call, limiter=limit[0])

    def known(request: Request) -> int | None:
        id_: int = request.path_params["id"]
        return id_ if id_ in review.position else None

    async def page(request: Request) -> Response:
        return Response(review.page(), media_type="text/html")

    async def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name == "style.css":
            return Response(review.style(), media_type="text/css")
        if name not in STATIC:
            return PlainTextResponse("There is no such page.", 404)
        return Response(_static(name), media_type=STATIC[name])

    async def content(request: Request) -> Response:
        return JSONResponse(await in_thread(review.content))

    async def overview(request: Request) -> Response:
        return Response(await in_thread(review.overview), media_type="text/html")

    async def news(request: Request) -> Response:
        since = request.query_params.get("since", "")
        seen = int(since) if since.isdecimal() and len(since) < MAX_DIGITS else -1
        return JSONResponse(await anyio.to_thread.run_sync(lambda: review.news(seen)))

    async def picture(request: Request) -> Response:
        id_, kind = known(request), request.path_params["kind"]
        if id_ is None or kind not in ("thumb", "preview", "thumb-map", "preview-map"):
            return PlainTextResponse("There is no such image.", 404)
        stamp = await in_thread(lambda: review.stamp(id_))
        headers = {"Cache-Control": "private, no-cache", "ETag": f'"{stamp}"'}  # a browser asks whether it has changed
        if stamp and request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        data = await in_thread(lambda: review.picture(kind, id_, stamp))
        if data is None:
            return PlainTextResponse("This image cannot be read.", 404)
        media = "image/png" if kind.endswith("-map") else "image/jpeg"
        return Response(data, media_type=media, headers=headers)

    async def alike(request: Request) -> Response:
        id_ = known(request)
        if id_ is None:
            return PlainTextResponse("There is no such image.", 404)
        return JSONResponse(await in_thread(lambda: review.alike(id_)))

    async def decide(request: Request) -> Response:
        try:
            changes = (await request.json())["changes"]
            if not isinstance(changes, list):
                raise TypeError(type(changes))
        except (ValueError, KeyError, TypeError, RecursionError):
            return JSONResponse({"error": "Give {'changes': [...]} as JSON."}, 400)
        result = await anyio.to_thread.run_sync(lambda: review.decide(changes))
        return JSONResponse(result, 409 if result["refused"] else 200)

    async def refit(request: Request) -> Response:
        if not review.store.path.exists():
            await anyio.to_thread.run_sync(lambda: review.store.touch())
        started = await anyio.to_thread.run_sync(review.refit.start)
        return JSONResponse(review.refit.status, 202 if started else 409)

    async def told(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": show(str(error))}, 400 if isinstance(error, ParameterError) else 500)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> Any:
        yield
        await anyio.to_thread.run_sync(review.refit.stop)

    async def slash(request: Request) -> Response:
        return RedirectResponse(f"/{token}/") if request.scope.get("flawsift.bare") else await page(request)

    routes = [
        Route("/", slash),
        Route("/content", content),
        Route("/overview", overview),
        Route("/decisions", news),
        Route("/picture/{kind}/{id:int}", picture),
        Route("/alike/{id:int}", alike),
        Route("/decide", decide, methods=["POST"]),
        Route("/refit", refit, methods=["POST"]),
        Route("/{name}", static),
    ]
    app = Starlette(routes=routes, exception_handlers={FlawsiftError: told}, lifespan=lifespan)
    return _Guard(app, token, port)


@functools.cache
def _static(name: str) -> bytes:
    return (resources.files("flawsift.review") / "templates" / name).read_bytes()


def serve(review: Review, *, port: int = 0, on_ready: Callable[[str], object]) -> None:
    """Serve a review to this machine until it is interrupted.

    Args:
        review: What is shown.
        port: 0 takes a free one.
        on_ready: Called with the address, token included, once it answers.

    Raises:
        OSError: The port is taken.
    """
    token = secrets.token_urlsafe(24)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen(128)  # from here on a browser that comes early waits instead of being refused
        chosen = listener.getsockname()[1]
        config = uvicorn.Config(
            make_app(review, token, chosen),
            log_level="error",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=3,
        )
        on_ready(f"http://{LOOPBACK}:{chosen}/{token}/")
        uvicorn.Server(config).run(sockets=[listener])
