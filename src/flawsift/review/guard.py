"""Which requests reach the review page: with its token, from this machine under its own name and port, and small."""

import hmac

from flawsift.errors import InputError

try:
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import PlainTextResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise InputError("The review page needs more packages. Install them: pip install 'flawsift[review]'.") from error

LOOPBACK = "127.0.0.1"
HOSTS = (LOOPBACK, "localhost")
MAX_BODY = 1 << 20  # bytes; a decision on 10,000 images at once is half of that
MAX_PATH = 200  # characters; the longest address of the page has half of that
POLICY = (
    "default-src 'none'; img-src 'self'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Of a report, which brings its style and its pictures along: still no script, and nothing is loaded.
REPORT_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def guarded(app: ASGIApp, token: str, port: int) -> ASGIApp:
    """An app behind its guard: requests are checked, answers restrict what a browser may do with them.

    A page of another site can make a browser send requests here, and a name of that site can be made to point here (DNS
    rebinding). So the Host must be a loopback name (`TrustedHostMiddleware`) with this port, which that middleware does
    not look at, and the Origin, where there is one, this page's. The token stands in the path, not in a cookie, since
    cookies are shared by all ports of a machine.

    Args:
        app: Sees paths without the token; `scope["flawsift.bare"]` is set where nothing followed it, not even a slash.
        token: First part of every path.
        port: Where the server listens.
    """
    trusted = TrustedHostMiddleware(_Guard(app, token, port), HOSTS, www_redirect=False)

    async def with_headers(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_restricted(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for key, value in HEADERS.items():
                    headers.setdefault(key, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        if scope["type"] == "lifespan":
            await app(scope, receive, send)
        elif scope["type"] == "http":  # no other kind of connection is ever accepted
            await trusted(scope, receive, send_restricted)

    return with_headers


class _Guard:
    """Refuses requests without the token, to another port, from other pages, or too large."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app, self.token, self.port = app, token.encode(), port
        self.origins = {f"http://{name}:{port}" for name in HOSTS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
            await PlainTextResponse(f"{reason}\n", status, {"Connection": "close"})(scope, receive, send)
            return
        _, slash, rest = scope["path"][1:].partition("/")
        inner = {**scope, "path": f"/{rest}", "raw_path": f"/{rest}".encode(), "flawsift.bare": not slash}
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if not replayed:
                replayed = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self.app(inner, replay if scope["method"] == "POST" else receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str]:
        """Status and reason; no reason where a request is let in, its body not yet read."""
        headers = Headers(scope=scope)
        if len(scope["path"]) > MAX_PATH:
            return 414, "The address is too long."
        # the middleware before this one has looked at the name and ignores the port
        if headers["host"].rpartition(":")[2] != str(self.port):
            return 403, "Wrong port. Open the address that `flawsift review` printed."
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins:
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
                return 415, "Only JSON is accepted."
            length = headers.get("content-length", "0")
            if not length.isdecimal() or len(length) > len(str(MAX_BODY)) or int(length) > MAX_BODY:
                return 413, "The request is too large."
        return 0, ""
