"""The HTTP side of a server: routes, tokens, limits and errors."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager

from . import chat, metrics
from .bodies import read_body
from .documents import add, document, upload
from .errors import RequestError, request_error
from .responses import model, models
from .service import Service

logger = logging.getLogger(__name__)
MOST_LISTED = 1000  # documents of one response


def build_app(service: Service):
    """The Starlette application of a service, which it closes when it ends."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse
    from starlette.routing import Route

    def refused(error: RequestError) -> JSONResponse:
        return JSONResponse(error.to_dict(), error.status, error.headers)

    async def failed(request: Request, error: Exception) -> JSONResponse:
        try:
            return refused(request_error(error))
        except Exception:  # whatever it is, the client gets an answer, and the log the reason
            logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
            return refused(RequestError(500, "the server failed; its log says why", None, "internal_error"))

    async def not_routed(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path}: {error.detail.lower()}"
        return refused(RequestError(error.status_code, text, None, "unknown_url", dict(error.headers or {})))

    def route(path: str, method: str, handle, open_to_all: bool = False) -> Route:
        async def endpoint(request: Request):
            request.state.route = f"{method} {path}"
            if open_to_all:
                return await handle(request, None)
            service.turns.check_open()
            return await handle(request, service.access(request.headers.get("authorization")))

        async def guarded(request: Request):
            try:
                return await endpoint(request)
            except Exception as error:
                return await failed(request, error)

        return Route(path, guarded, methods=[method])

    async def completions(request: Request, access):
        return await chat.respond(service, request, access)

    async def list_models(request: Request, access):
        return JSONResponse(models(service.name, service.started))

    async def get_model(request: Request, access):
        if request.path_params["name"] != service.name:
            raise RequestError(404, f"there is no model {request.path_params['name']!r}", "model")
        return JSONResponse(model(service.name, service.started))

    async def add_documents(request: Request, access):
        body = await read_body(request, service.limits)
        kind = request.headers.get("content-type", "")
        given = await service.read(upload, body, kind, dict(request.query_params))
        namespace = access.one(given.namespace)
        ids = await service.write(add, service.store, given, namespace)
        service.metrics.count("msa_documents_changed_total", len(ids), kind="added")
        return JSONResponse({"object": "list", "namespace": namespace, "ids": ids})

    async def list_documents(request: Request, access):
        query = request.query_params
        limit, offset = _number(query, "limit", 100, 1), _number(query, "offset", 0, 0)
        wanted = query.getlist("namespace") or None
        names, limit = access.to_read(wanted), min(limit, MOST_LISTED)
        found = await service.read(service.store.list, names, limit=limit + 1, offset=offset)
        shown = [document(one) for one in found[:limit]]
        return JSONResponse({"object": "list", "data": shown, "has_more": len(found) > limit})

    async def get_document(request: Request, access):
        namespace = access.one(request.query_params.get("namespace"))
        found = await service.read(service.store.get, request.path_params["id"], namespace)
        return JSONResponse(document(found))

    async def delete_document(request: Request, access):
        namespace = access.one(request.query_params.get("namespace"))
        erase = request.query_params.get("erase", "false")
        if erase not in ("true", "false"):
            raise RequestError(400, "erase must be true or false", "erase")
        own = request.path_params["id"]
        work = service.store.forget if erase == "true" else service.store.delete
        await service.write(work, [own], namespace)
        service.metrics.count("msa_documents_changed_total", kind="deleted")
        return JSONResponse({"id": own, "object": "memory.document", "deleted": True})

    async def health(request: Request, access):
        status = "closing" if service.closing else "ok"
        return JSONResponse({"status": status}, 503 if service.closing else 200)

    async def show_metrics(request: Request, access):
        if not access.operator:
            raise RequestError(
                403, "metrics need a token that is bound to no namespaces", None, "permission_denied"
            )
        return PlainTextResponse(service.rendered_metrics(), media_type=metrics.CONTENT_TYPE)

    @asynccontextmanager
    async def lifespan(app):
        yield
        service.begin_closing()
        await asyncio.to_thread(service.close)

    one = "/v1/memory/documents/{id:path}"
    app = Starlette(
        routes=[
            route("/v1/chat/completions", "POST", completions),
            route("/v1/models", "GET", list_models),
            route("/v1/models/{name:path}", "GET", get_model),
            route("/v1/memory/documents", "POST", add_documents),
            route("/v1/memory/documents", "GET", list_documents),
            route(one, "GET", get_document),
            route(one, "DELETE", delete_document),
            route("/health", "GET", health, open_to_all=True),
            route("/metrics", "GET", show_metrics),
        ],
        exception_handlers={HTTPException: not_routed},
        lifespan=lifespan,
    )
    return _Measured(app, service)


class _Measured:
    """Counts requests when their response has ended."""

    def __init__(self, app, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 499  # of a client that went away before its answer

        async def noted(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = scope.get("state", {}).get("route", "none")
            self._service.metrics.request(route, status, time.perf_counter() - begun)


def _number(query, name: str, default: int, least: int) -> int:
    text = query.get(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 12 or int(text) < least:
        raise RequestError(400, f"{name} must be a number of at least {least}", name, "invalid_value")
    return int(text)
