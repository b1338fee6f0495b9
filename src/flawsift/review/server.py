"""The review page's server, for this machine only; `flawsift.review.guard` checks what reaches it."""

import contextlib
import functools
import secrets
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any

from flawsift.errors import FlawsiftError, InputError, ParameterError
from flawsift.paths import show
from flawsift.review.guard import LOOPBACK, REPORT_POLICY, guarded
from flawsift.review.session import Review

try:
    import anyio
    import anyio.to_thread
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp

    from flawsift.deploy.http import listening, make_server
except ImportError as error:
    raise InputError("The review page needs more packages. Install them: pip install 'flawsift[review]'.") from error

MAX_DIGITS = 10  # of a number in an address
WORKERS = 4  # pictures made at once; more would only keep decisions waiting
STATIC = {f"{name}.js": "text/javascript" for name in ("common", "review", "region", "zoom")}
STATIC |= {"review.css": "text/css", "icon.svg": "image/svg+xml"}
PICTURES = dict.fromkeys(("thumb", "preview", "full"), "image/jpeg")
PICTURES |= dict.fromkeys(("thumb-map", "preview-map"), "image/png")


def make_app(review: Review, token: str, port: int) -> ASGIApp:
    """The page's server, behind its guard.

    Args:
        review: What is shown.
        token: First part of every path.
        port: Where it listens.
    """
    pages = _Pages(review, token)
    routes = [
        Route("/", pages.frame),
        Route("/content", pages.content),
        Route("/overview", pages.overview),
        Route("/decisions", pages.decisions),
        Route("/verdict", pages.verdict),
        Route("/picture/{kind}/{id:int}", pages.picture),
        Route("/picture/place/{id:int}/{place:int}", pages.place),
        Route("/shape/{id:int}", pages.shape),
        Route("/alike/{id:int}", pages.alike),
        Route("/nearest/{id:int}", pages.nearest),
        Route("/region", pages.region),
        Route("/region/mean", pages.mean),
        Route("/region/layer", pages.layer),
        Route("/region", pages.save_region, methods=["POST"]),
        Route("/decide", pages.decide, methods=["POST"]),
        Route("/refit", pages.refit, methods=["POST"]),
        Route("/report", pages.report),
        Route("/{name}", pages.static),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(review.refit.stop)

    app = Starlette(routes=routes, exception_handlers={FlawsiftError: _error_response}, lifespan=lifespan)
    return guarded(app, token, port)


class _Pages:
    """What each address answers. Work on the disk or on pictures is done in threads, so that requests do not wait."""

    def __init__(self, review: Review, token: str) -> None:
        self.review, self.token = review, token

    @functools.cached_property
    def _limit(self) -> anyio.CapacityLimiter:
        return anyio.CapacityLimiter(WORKERS)

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        return await anyio.to_thread.run_sync(call, limiter=self._limit)

    def _id(self, request: Request) -> int | None:
        """The image of an address, where the screening has it."""
        id_: int = request.path_params["id"]
        return id_ if id_ in self.review.position else None

    async def frame(self, request: Request) -> Response:
        if request.scope["flawsift.bare"]:  # links of the page are relative
            return RedirectResponse(f"/{self.token}/")
        return Response(self.review.page(), media_type="text/html")

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name == "style.css":
            return Response(self.review.style(), media_type="text/css")
        if name not in STATIC:
            return PlainTextResponse("There is no such page.", 404)
        return Response(_static(name), media_type=STATIC[name])

    async def content(self, request: Request) -> Response:
        return JSONResponse(await self._in_thread(self.review.content))

    async def overview(self, request: Request) -> Response:
        return Response(await self._in_thread(self.review.overview), media_type="text/html")

    async def decisions(self, request: Request) -> Response:
        since = request.query_params.get("since", "")
        seen = int(since) if since.isdecimal() and len(since) < MAX_DIGITS else -1
        return JSONResponse(await anyio.to_thread.run_sync(lambda: self.review.changes_since(seen)))

    async def verdict(self, request: Request) -> Response:
        return JSONResponse(await self._in_thread(self.review.verdict))

    async def picture(self, request: Request) -> Response:
        id_, kind = self._id(request), request.path_params["kind"]
        if id_ is None or kind not in PICTURES:
            return PlainTextResponse("There is no such image.", 404)
        return await self._picture(
            request, id_, lambda stamp: self.review.pictures.picture(kind, id_, stamp), PICTURES[kind]
        )

    async def place(self, request: Request) -> Response:
        id_, place = self._id(request), request.path_params["place"]
        if id_ is None or not self.review.pictures.has_place(place):
            return PlainTextResponse("There is no such place.", 404)
        return await self._picture(
            request, id_, lambda stamp: self.review.pictures.place_picture(id_, place, stamp), "image/jpeg"
        )

    async def _picture(
        self, request: Request, id_: int, make: Callable[[str], bytes | None], media_type: str
    ) -> Response:
        stamp = await self._in_thread(lambda: self.review.pictures.stamp(id_))
        headers = {"Cache-Control": "private, no-cache", "ETag": f'"{stamp}"'}  # a browser asks whether it has changed
        if stamp and request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        data = await self._in_thread(lambda: make(stamp))
        if data is None:
            return PlainTextResponse("This image cannot be read.", 404)
        return Response(data, media_type=media_type, headers=headers)

    async def shape(self, request: Request) -> Response:
        id_ = self._id(request)
        told = None if id_ is None else await self._in_thread(lambda: self.review.pictures.shape(id_))
        return PlainTextResponse("There is no such image.", 404) if told is None else JSONResponse(told)

    async def alike(self, request: Request) -> Response:
        id_ = self._id(request)
        if id_ is None:
            return PlainTextResponse("There is no such image.", 404)
        return JSONResponse(await self._in_thread(lambda: self.review.alike(id_)))

    async def nearest(self, request: Request) -> Response:
        id_ = self._id(request)
        if id_ is None:
            return PlainTextResponse("There is no such image.", 404)
        return JSONResponse(self.review.nearest(id_))

    async def region(self, request: Request) -> Response:
        return JSONResponse(await self._in_thread(self.review.drawing.state))

    async def mean(self, request: Request) -> Response:
        return Response(await self._in_thread(lambda: self.review.drawing.mean), media_type="image/png")

    async def layer(self, request: Request) -> Response:
        data = self.review.drawing.layer
        if data is None:
            return PlainTextResponse("The screening looked at whole images.", 404)
        return Response(data, media_type="image/png")

    async def save_region(self, request: Request) -> Response:
        try:
            polygons = (await request.json())["polygons"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return JSONResponse({"error": "Give {'polygons': [...]} as JSON."}, 400)
        return JSONResponse(await self._in_thread(lambda: self.review.drawing.save(polygons)))

    async def decide(self, request: Request) -> Response:
        try:
            changes = (await request.json())["changes"]
            if not isinstance(changes, list):
                raise TypeError(type(changes))
        except (ValueError, KeyError, TypeError, RecursionError):
            return JSONResponse({"error": "Give {'changes': [...]} as JSON."}, 400)
        result = await anyio.to_thread.run_sync(lambda: self.review.decide(changes))
        return JSONResponse(result, 409 if result["refused"] else 200)

    async def report(self, request: Request) -> Response:
        """That of the model that the last refit made, or of the one that it would replace."""
        data = await self._in_thread(self.review.report)
        if data is None:
            return PlainTextResponse("There is no report yet.", 404)
        return Response(data, media_type="text/html", headers={"Content-Security-Policy": REPORT_POLICY})

    async def refit(self, request: Request) -> Response:
        if not self.review.store.path.exists():
            await anyio.to_thread.run_sync(self.review.store.touch)
        started = await anyio.to_thread.run_sync(self.review.refit.start)
        return JSONResponse(self.review.refit.status, 202 if started else 409)


async def _error_response(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": show(str(error))}, 400 if isinstance(error, ParameterError) else 500)


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
    with listening(LOOPBACK, port) as (listener, chosen):
        server = make_server(make_app(review, token, chosen), patience=3)
        on_ready(f"http://{LOOPBACK}:{chosen}/{token}/")
        server.run(sockets=[listener])
