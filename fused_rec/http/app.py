"""ASGI application that serves a finished run: routes, limits, errors as JSON, and the exchange of the model.

    GET, POST /v1/recommend        GET /v1/explain        GET /v1/similar_items        GET /health        GET /metrics

The event loop parses and answers. One thread computes, a request at a time, so that caches of the run need no locks
and each request has all cores; another thread loads the next model. A request keeps the model that it began with.
"""

import asyncio
import concurrent.futures
import json
import logging
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fused_rec.http.metrics import CONTENT_TYPE, Metrics
from fused_rec.http.requests import (
    Limits,
    RequestError,
    check_id,
    check_k,
    parse_body,
    parse_query,
    recommend_request,
    shown,
)
from fused_rec.http.served import ServedModel

LOG = logging.getLogger(__name__)


class Service:
    """The served model, the threads that compute and load, and what is measured.

    Args:
      load: loads a model; called at once, and again for each `reload`.
      limits: bounds of requests.
      server_names: accepted host names of the header Host, without port; None = any.

    Raises:
      Exception: what the first `load` raises.
    """

    def __init__(self, load: Callable[[], ServedModel], limits: Limits, server_names: Sequence[str] | None = None):
        self.limits, self.server_names = limits, server_names
        self.metrics = Metrics()
        self.stopping = self.load_failed = self._loading = False
        self._load = load
        self._asked: queue.SimpleQueue[None] = queue.SimpleQueue()  # its put may interrupt itself, as signals do
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "compute")
        self._pending: set[concurrent.futures.Future] = set()
        self.metrics.pending.set_function(lambda: len(self._pending))
        self.model = load()
        self.metrics.served(self.model)
        threading.Thread(target=self._load_when_asked, name="load", daemon=True).start()

    def reload(self) -> None:
        """Loads the model anew in the background and then exchanges it; may be called by a signal handler.

        If that fails, the model stays, and the failure is logged and counted.
        """
        self._asked.put(None)

    def _load_when_asked(self) -> None:
        while True:
            self._asked.get()
            while not self._asked.empty():  # asked several times before this load begins
                self._asked.get()
            LOG.info("loading the model anew")
            self._loading = True
            try:
                model = self._load()
            except Exception:
                LOG.exception("the model could not be loaded; the one of %s stays", self.model.loaded)
                self.load_failed = True
                self.metrics.loads.labels("failed").inc()
            else:
                self.model, self.load_failed = model, False
                self.metrics.served(model)
                self.metrics.loads.labels("done").inc()
                LOG.info("serving model %s on tables %s", model.model, model.tables)
            self._loading = False

    async def compute(self, function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """Computes in the thread for it.

        Args:
          function: what computes.
          *arguments: of the function.

        Returns:
          Its result.

        Raises:
          RequestError: too many requests wait (503), or the result takes too long (504).
        """
        limits = self.limits
        if len(self._pending) >= limits.max_pending:
            raise RequestError(503, f"{limits.max_pending:,} requests are pending, the most; try again in a second")
        future = self._worker.submit(function, *arguments)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)  # after a timeout not before the thread has come to its end
        try:
            async with asyncio.timeout(limits.timeout):
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            raise RequestError(
                504, f"the answer took more than {limits.timeout:g} seconds; ask for less, or later"
            ) from error

    def close(self) -> bool:
        """Drops computations that have not begun.

        Returns:
          Whether a computation or load is still under way.
        """
        self._worker.shutdown(wait=False, cancel_futures=True)
        return self._loading or len(self._pending) > 0


def create_app(service: Service) -> Starlette:
    """Creates the ASGI application of a service."""
    routes = {
        "/v1/recommend": (_recommend, ["GET", "POST"]),
        "/v1/explain": (_explain, ["GET"]),
        "/v1/similar_items": (_similar_items, ["GET"]),
        "/health": (_health, ["GET"]),
        "/metrics": (_metrics, ["GET"]),
    }
    app = Starlette(
        routes=[Route(path, _endpoint(service, answer), methods=methods) for path, (answer, methods) in routes.items()],
        middleware=[Middleware(_Measured, service=service, paths=frozenset(routes))],
        exception_handlers={HTTPException: _refused_by_router},
    )
    app.router.redirect_slashes = False
    return app


async def _recommend(service: Service, request: Request) -> Response:
    model, limits = service.model, service.limits
    if request.method == "POST":
        values = parse_body(await _body(request, limits))
    else:
        values = parse_query(request.query_params.multi_items(), ("user",), ("k", "where", "items", "include_seen"))
        values["users"] = [values.pop("user")]
    return _json(await service.compute(model.recommend, recommend_request(values, limits)))


async def _explain(service: Service, request: Request) -> Response:
    values = parse_query(request.query_params.multi_items(), ("user", "item"), ("k",))
    user, item = (check_id(name, values[name]) for name in ("user", "item"))
    k = check_k(values["k"], service.limits) if "k" in values else None
    return _json(await service.compute(service.model.explain, user, item, k))


async def _similar_items(service: Service, request: Request) -> Response:
    values = parse_query(request.query_params.multi_items(), ("item",), ("k",))
    item, k = check_id("item", values["item"]), check_k(values.get("k", 10), service.limits)
    return _json(await service.compute(service.model.similar_items, item, k))


async def _health(service: Service, request: Request) -> Response:
    model = service.model
    values = {
        "ready": not service.stopping,
        "model": model.model,
        "tables": model.tables,
        "rules": model.rules_digest,
        "history": model.history,
        "loaded": model.loaded.isoformat(timespec="seconds"),
        "last_load_failed": service.load_failed,
    }
    return _json(values, 503 if service.stopping else 200)


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _endpoint(
    service: Service, answer: Callable[[Service, Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    """Returns the endpoint, which answers faults too: the connection stays."""

    async def endpoint(request: Request) -> Response:
        try:
            _check_host(service, request)
            return await answer(service, request)
        except RequestError as error:
            headers = {503: {"Retry-After": "1"}, 408: {"Connection": "close"}}
            return _json({"error": str(error)}, error.status, headers.get(error.status))
        except Exception:
            LOG.exception("a request to %s failed", request.url.path)
            return _json({"error": "the server failed; its log says why"}, 500)

    return endpoint


def _check_host(service: Service, request: Request) -> None:
    host = request.headers.get("host", "").lower()
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if service.server_names is not None and name not in service.server_names:
        raise RequestError(421, f"the header Host is {shown(host)}; it must be a name of --server_names")


async def _body(request: Request, limits: Limits) -> bytes:
    """Reads a body, no further than its limit."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(415, f"the content type is {shown(kind)}; send application/json")
    length = request.headers.get("content-length", "0")
    parts, size = [], 0
    try:
        if int(length) > limits.max_body:
            raise RequestError(413, f"the body has {int(length):,} bytes; {limits.max_body:,} at most: ask in parts")
        async with asyncio.timeout(limits.timeout):
            async for part in request.stream():
                size += len(part)
                if size > limits.max_body:
                    raise RequestError(413, f"the body has more than {limits.max_body:,} bytes, the most: ask in parts")
                parts.append(part)
    except TimeoutError as error:
        raise RequestError(408, f"the body took more than {limits.timeout:g} seconds; send it faster") from error
    except ClientDisconnect as error:
        raise RequestError(400, "the connection ended before the body did; send all of it") from error
    return b"".join(parts)


def _json(values: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    body = json.dumps(values, allow_nan=False, separators=(",", ":")).encode()
    return Response(body, status, {"Cache-Control": "no-store", **(headers or {})}, "application/json")


async def _refused_by_router(request: Request, error: Exception) -> Response:
    """Answers unknown paths and methods."""
    assert isinstance(error, HTTPException)
    known = "the paths are /v1/recommend, /v1/explain, /v1/similar_items, /health, /metrics"
    message = f"the method is {shown(request.method)}; see the header Allow" if error.status_code == 405 else known
    return _json({"error": message}, error.status_code, dict(error.headers or {}))


class _Measured:
    """Middleware that counts requests and their seconds by route and status."""

    def __init__(self, app: ASGIApp, service: Service, paths: frozenset[str]):
        self._app, self._metrics, self._paths = app, service.metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self._paths else "other"
        status, start = 500, time.perf_counter()

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._metrics.in_flight.track_inprogress():
            try:
                await self._app(scope, receive, sent)
            finally:
                self._metrics.requests.labels(route, status).inc()
                self._metrics.seconds.labels(route).observe(time.perf_counter() - start)
