"""The application around the resources: what every request passes, and what no resource is.

A request passes one boundary. It opens a span, notes a metric under names from closed sets, and
lets no exception of ours go beyond it: every error leaves as a problem. Beside the resources there
are `/healthz`, `/readyz` and `/metrics` for whoever runs the service, and its own description: `/`,
`/docs` and `/openapi.json`, which need no key.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import msgspec
import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from runtime import telemetry
from runtime.documentation import PAGE_POLICY, docs_page, front_page
from runtime.http import Problem, Resource, has_control, json_response, problem_response
from runtime.kafka import MessageTooLarge
from runtime.looks import SharedLook
from runtime.openapi import openapi_document
from runtime.outages import is_outage

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send
    from starlette.types import Message as AsgiMessage

_log = structlog.get_logger("runtime.application")


def create_app(
    service: str,
    version: str,
    resources: Sequence[Resource],
    *,
    ready: Callable[[], Awaitable[None]],
    purpose: str = "",
) -> FastAPI:
    """Build the application: its resources, what runs beside them, and problems.

    `ready` raises when the service cannot answer; `purpose` says in a sentence what it is for.
    """
    app = FastAPI(
        title=service,
        version=version,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        # A path with one slash too many is not found; a redirect would follow the Host header.
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    for resource in resources:
        app.include_router(resource.router())

    async def healthz(_request: Request) -> Response:
        return json_response({"alive": True})

    readiness = SharedLook(ready)

    async def readyz(_request: Request) -> Response:
        await readiness.take()
        return json_response({"ready": True})

    async def metrics(_request: Request) -> Response:
        return Response(telemetry.metrics_text(), media_type=telemetry.METRICS_TYPE)

    app.add_route("/healthz", healthz)
    app.add_route("/readyz", readyz)
    app.add_route("/metrics", metrics)
    pages = _Pages(app, purpose)
    app.add_route("/", pages.front)
    app.add_route("/docs", pages.docs)
    app.add_route("/openapi.json", pages.openapi)
    for refused in (Problem, HTTPException, RequestValidationError, MessageTooLarge):
        app.add_exception_handler(refused, _refuse)
    app.add_middleware(_Boundary)
    return app


class _Pages:
    """What a service says of itself; written once, when it is first asked for."""

    def __init__(self, app: FastAPI, purpose: str) -> None:
        self._app = app
        self._purpose = purpose

    async def front(self, request: Request) -> Response:
        """Say what the service is and where to go: to a browser as a page, else as JSON."""
        service, version = self._app.title, self._app.version
        if "text/html" in request.headers.get("accept", ""):
            return _page(front_page(service, version, self._purpose))
        said = {"service": service, "version": version, "purpose": self._purpose}
        return json_response(
            {**said, "docs": "/docs", "openapi": "/openapi.json", "status": "/v1/status"}
        )

    async def docs(self, _request: Request) -> Response:
        """Show every endpoint."""
        return _page(self._docs)

    async def openapi(self, _request: Request) -> Response:
        """Answer with the OpenAPI document as it is committed."""
        return Response(self._openapi, media_type="application/json")

    @cached_property
    def _openapi(self) -> bytes:
        return openapi_document(self._app)

    @cached_property
    def _docs(self) -> str:
        return docs_page(msgspec.json.decode(self._openapi), self._purpose)


def _page(html: str) -> Response:
    headers = {"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff"}
    return Response(html, headers=headers, media_type="text/html; charset=utf-8")


async def _refuse(_request: Request, error: Exception) -> Response:
    """Turn a refusal, ours or the framework's, into a problem of the catalogue."""
    match error:
        case Problem():
            return problem_response(error)
        case MessageTooLarge():
            return problem_response(Problem("too-large", str(error)))
        case RequestValidationError():
            return problem_response(Problem("malformed", str(error)))
        case HTTPException():
            code = _FRAMEWORK_CODES.get(error.status_code, "bad-request")
            return problem_response(Problem(code))
        case _:
            raise error


_FRAMEWORK_CODES: Final = MappingProxyType(
    {404: "not-found", 405: "method-not-allowed", 413: "too-large", 415: "unsupported-media-type"}
)


class _Boundary:
    """The outermost layer: a span and a metric per request, and no exception beyond it.

    An outage, wherever it was met, is `unavailable`; any other exception is a defect of ours. What
    no name or text of ours can hold (control characters) is not even looked for.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        started_s = time.perf_counter()
        status: int | None = None

        async def noting(message: AsgiMessage) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with telemetry.request_span(request.method, request.headers):
            try:
                refused = _refused(request)
                app = self._app if refused is None else problem_response(refused)
                await app(scope, receive, noting)
            except ClientDisconnect:
                # Nobody is there to be answered, and nothing of ours has failed.
                pass
            except Exception as error:
                # Nothing may leave as the server's own page: a client reads problems only.
                code = "unavailable" if is_outage(error) else "internal"
                _log.exception("request failed", path=scope["path"], code=code, error=repr(error))
                if status is not None:
                    raise  # Part of an answer is out: only a broken connection can say so now.
                await problem_response(Problem(code))(scope, receive, noting)
            finally:
                # The template, not the path: paths are without number, templates are few.
                route = getattr(scope.get("route"), "path", telemetry.OTHER)
                telemetry.observe_request(
                    request.method, route, status or 0, time.perf_counter() - started_s
                )


def _refused(request: Request) -> Problem | None:
    """Refuse control characters in the path, which then names nothing, and in the query."""
    if has_control(request.scope["path"]):
        return Problem("not-found")
    for name, value in request.query_params.multi_items():
        if has_control(name) or has_control(value):
            return Problem("malformed", "control characters are not taken in a query")
    return None
