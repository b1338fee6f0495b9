"""Exported models over HTTP; `flawsift.deploy.gate` checks what reaches them."""

import base64
import binascii
import contextlib
import functools
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from importlib import resources
from typing import Any, NamedTuple

from flawsift.deploy import products
from flawsift.deploy.gate import Gate, Limits, Log, Metrics, check_key, refused
from flawsift.deploy.products import Loaded, Product, Wanted
from flawsift.errors import InputError, one_line
from flawsift.paths import show

try:
    import anyio
    import anyio.to_thread
    import python_multipart as _python_multipart  # noqa: F401  # starlette asks for it with the first form only
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.applications import Starlette
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp

    from flawsift.deploy.http import listening, make_server
except ImportError as error:
    raise InputError("Serving needs more packages. Install them: pip install 'flawsift[serve]'.") from error

log = logging.getLogger("flawsift")

POLL = 1.0  # seconds between looks at the files of models
STATUS = {"unreadable": 422, "too_large": 413, "failed": 500, "busy": 503}
YES = ("1", "true", "yes")


class Given(NamedTuple):
    """A picture of a request: its name, and its content or what is wrong with it."""

    name: str
    content: bytes | dict[str, str]


class BadRequest(Exception):
    """A request that holds no pictures in a way that is known, or too many."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def make_app(
    served: Mapping[str, Product], *, limits: Limits | None = None, key: str | None = None, log: Log = lambda told: None
) -> ASGIApp:
    """The server of models, behind its gate.

    Args:
        served: Products by name.
        limits: What it takes on.
        key: That requests must carry; None serves this machine only.
        log: Called with what is told of each request.
    """
    pages = _Pages(served, limits or Limits())
    routes = [
        Route("/", functools.partial(_static, name="page.html", kind="text/html")),
        Route("/page.js", functools.partial(_static, name="page.js", kind="text/javascript")),
        Route("/openapi.json", functools.partial(_static, name="openapi.json", kind="application/json")),
        Route("/health", pages.health),
        Route("/ready", pages.ready),
        Route("/metrics", pages.metrics_page),
        Route("/v1", pages.products),
        Route("/v1/{product}/inspect", pages.inspect, methods=["POST"]),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pages.follow_files)
            yield
            tasks.cancel_scope.cancel()

    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error}, lifespan=lifespan)
    pages.gate = Gate(app, pages.limits, key, pages.metrics, log)
    return pages.gate


class _Pages:
    """What each address answers."""

    gate: Gate

    def __init__(self, served: Mapping[str, Product], limits: Limits) -> None:
        self.served, self.limits, self.metrics = dict(served), limits, Metrics()

    @functools.cached_property
    def _threads(self) -> anyio.CapacityLimiter:
        return anyio.CapacityLimiter(self.limits.workers)

    @functools.cached_property
    def _free(self) -> anyio.Semaphore:
        return anyio.Semaphore(self.limits.workers)

    async def follow_files(self) -> None:
        """Take changed models; a task of the server."""
        while True:
            await anyio.sleep(POLL)
            for name, product in self.served.items():
                taken = await anyio.to_thread.run_sync(product.refresh)
                if taken is not None:
                    self.metrics.reloads.labels(name, "taken" if taken else "refused").inc()

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        return JSONResponse({"ready": not self.gate.is_full}, 503 if self.gate.is_full else 200)

    async def metrics_page(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def products(self, request: Request) -> Response:
        return JSONResponse({"products": {name: _told(product) for name, product in self.served.items()}})

    async def inspect(self, request: Request) -> Response:
        name = request.path_params["product"]
        product = self.served.get(name)
        if product is None:
            return refused(404, "unknown_product", "There is no such product; GET /v1 lists all.")
        told: dict[str, Any] = request.scope["flawsift.told"]
        told["product"] = name
        try:
            wanted = _wanted(request)
            given = await self._given(request)
        except BadRequest as error:
            return refused(error.status, error.code, one_line(error))
        loaded = product.current
        results: list[dict[str, Any]] = [{} for _ in given]
        async with anyio.create_task_group() as tasks:
            for place, picture in enumerate(given):
                tasks.start_soon(self._inspect_into, results, place, picture, name, loaded, wanted)
        errors = [result["error"]["code"] for result in results if "error" in result]
        told.update(images=len(results), errors=len(errors))
        status = STATUS[errors[0]] if len(errors) == len(results) else 200
        answer = {"product": name, "model": loaded.digest, "results": results}
        return JSONResponse(answer, status, {"Retry-After": "1"} if status == 503 else None)

    async def _inspect_into(
        self, results: list[dict[str, Any]], place: int, picture: Given, name: str, loaded: Loaded, wanted: Wanted
    ) -> None:
        """Fill in the result of one picture; whatever is wrong with it, its neighbours have theirs."""
        told = await self._result(picture, name, loaded, wanted)
        results[place] = {"name": picture.name, **told}
        result = told["error"]["code"] if "error" in told else told["verdict"]
        self.metrics.images.labels(name, result).inc()

    async def _result(self, picture: Given, name: str, loaded: Loaded, wanted: Wanted) -> dict[str, Any]:
        content = picture.content
        if isinstance(content, dict):
            return {"error": content}
        with anyio.move_on_after(self.limits.wait) as waiting:
            await self._free.acquire()
        if waiting.cancelled_caught:
            return {"error": {"code": "busy", "message": f"No worker was free for {self.limits.wait:g} seconds."}}
        try:
            with self.metrics.seconds.labels(name).time():
                return await anyio.to_thread.run_sync(
                    lambda: products.inspect(loaded, content, wanted, self.limits.max_pixels), limiter=self._threads
                )
        except Exception as error:  # noqa: BLE001  # one picture, of whatever kind, must not end the others
            return {"error": products.error_of(error)}
        finally:
            self._free.release()

    async def _given(self, request: Request) -> list[Given]:
        """The pictures of a request.

        Raises:
            BadRequest: There are none, or too many, or it is not what its type says.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            given = await self._of_form(request)
        elif kind == "application/json":
            body = await request.body()
            given = await anyio.to_thread.run_sync(lambda: _of_json(body))
        else:
            body = await request.body()
            given = [Given("", body)] if body else []
        if not given:
            raise BadRequest(400, "no_images", "Send a picture: as the body, in a form, or as base64 in JSON.")
        if len(given) > self.limits.max_images:
            raise BadRequest(413, "too_many", f"A request has at most {self.limits.max_images} pictures.")
        return given

    async def _of_form(self, request: Request) -> list[Given]:
        most = self.limits.max_images
        try:
            async with request.form(max_files=most + 1, max_fields=most + 1) as form:
                parts = form.multi_items()
                if any(not isinstance(part, UploadFile) for _, part in parts):
                    raise BadRequest(400, "form", "Send pictures as files: curl -F image=@part.png.")
                return [Given(part.filename or "", await part.read()) for _, part in parts if not isinstance(part, str)]
        except HTTPException as error:
            raise BadRequest(413 if "Too many" in error.detail else 400, "form", error.detail) from error


def _wanted(request: Request) -> Wanted:
    query = request.query_params
    if query.get("map", "png") != "png":
        raise BadRequest(400, "map", "The only kind of map is png.")
    return Wanted(regions=query.get("regions", "").lower() in YES, map="map" in query)


def _of_json(body: bytes) -> list[Given]:
    try:
        content = json.loads(body)
        images = content.get("images", [content])
        if not isinstance(images, list):
            raise TypeError
        named = [(show(str(image.get("name", ""))), image["image"]) for image in images]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        message = 'Send {"image": BASE64}, or {"images": [{"name": TEXT, "image": BASE64}, ...]}.'
        raise BadRequest(400, "json", message) from None
    return [Given(name, _decoded(text)) for name, text in named]


def _decoded(text: object) -> bytes | dict[str, str]:
    try:
        if not isinstance(text, str):
            raise ValueError
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        return {"code": "unreadable", "message": "The image is not base64."}


def _told(product: Product) -> dict[str, Any]:
    loaded = product.current
    card = loaded.inspector.card
    return {
        "model": loaded.digest,
        "threshold": loaded.inspector.threshold,
        "problem": product.problem,
        **{name: card.get(name) for name in ("product", "exported", "detector", "intended_use")},
    }


async def _static(request: Request, *, name: str, kind: str) -> Response:
    return Response(_file(name), media_type=kind)


@functools.cache
def _file(name: str) -> bytes:
    return (resources.files("flawsift.deploy") / "templates" / name).read_bytes()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refused(error.status_code, "http", str(error.detail), error.headers)


def serve(
    served: Mapping[str, Product],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str | None = None,
    limits: Limits | None = None,
    log: Log = lambda told: None,
    on_ready: Callable[[str], object] = lambda address: None,
) -> None:
    """Serve models until interrupted; requests that have begun are answered.

    Args:
        served: Products by name.
        host: Address to listen at; another one than this machine's needs a key.
        port: 0 takes a free one.
        key: That requests must carry.
        limits: What it takes on.
        log: Called with what is told of each request.
        on_ready: Called with the address once it listens.

    Raises:
        ParameterError: There is no key, and it would be reached from elsewhere; or the key is too short.
        OSError: The port is taken, or the address is not this machine's.
    """
    key = check_key(key, host)
    with listening(host, port) as (listener, chosen):
        server = make_server(make_app(served, limits=limits, key=key, log=log), patience=30)
        shown = f"[{host}]" if ":" in host else host
        on_ready(f"http://{shown}:{chosen}/")
        server.run(sockets=[listener])
