"""The HTTP edge: resources, strict bodies, problems, pages, and the application around them.

Theory. A resource is a class whose marked methods (`get`, `post`) are endpoints; what they need is
given to its constructor. An endpoint takes the raw request and calls, in this order:
`access.authorise` (401, 403), its own look-up of what the path names (404), `read_body` or
`idempotency.read_command` (413, 415, 422), and then acts (409): the order of checks is the order of
lines. Models are msgspec structs, strict: an integer is never taken from a float, a string or a
boolean, unknown members are refused. Every error leaves as `application/problem+json` from the
catalogue of `hisab_contracts.problems`.

Refusals: `Problem`.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Final, Generic, TypeVar

import msgspec
import structlog
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hisab_contracts.problems import PROBLEMS
from runtime import telemetry
from runtime.kafka import MessageTooLarge
from runtime.outages import is_outage

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send
    from starlette.types import Message as AsgiMessage

M = TypeVar("M", bound=msgspec.Struct)

MAX_BODY_BYTES: Final = 1_048_576
MAX_DEPTH: Final = 32
PAGE_LIMIT: Final = 100
MAX_LIMIT: Final = 1_000

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
"""PostgreSQL takes no NUL, and no line of ours should hold the others."""
_MAYBE_CONTROL = re.compile(rb"\x7f|\\[ubfnrt]")
PROBLEM_JSON: Final = "application/problem+json"

_log = structlog.get_logger("runtime.http")

IntegerText = Annotated[str, msgspec.Meta(pattern="^(0|-?[1-9][0-9]{0,37})$")]
"""A whole number in a JSON string; read it with `int()`."""


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a request body is made of: strict, frozen, closed."""


class NoBody(Model, frozen=True, kw_only=True):
    """The body of a command that says nothing more than its path."""


def may_be_absent(model: type[msgspec.Struct]) -> bool:
    """Say whether a body of this model may be left out: it demands no member.

    So a member that is added to such a command later does not turn older clients away.
    """
    return not any(field.required for field in msgspec.structs.fields(model))


class Problem(Exception):
    """An answer from the catalogue of problems, with what this case adds to it."""

    def __init__(self, code: str, detail: str = "", /, **members: object) -> None:
        """Name a problem of the catalogue; `members` become members of the document."""
        super().__init__(code, detail)
        self.kind = PROBLEMS[code]
        self.detail = detail
        self.members = members


class ProblemDocument(msgspec.Struct, frozen=True):
    """What every problem has (RFC 9457); a case may add members."""

    type: str
    code: str
    title: str
    status: int
    detail: str
    retryable: bool
    trace_id: str


# Requests.


async def read_bytes(request: Request, *, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """Read a raw body of at most `max_bytes`; raises `Problem` 413."""
    too_large = Problem("too-large", f"this endpoint takes at most {max_bytes} bytes")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise too_large
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Problem("unsupported-media-type", "send the body without a content encoding")
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


async def read_body(request: Request, model: type[M], *, max_bytes: int = MAX_BODY_BYTES) -> M:
    """Read and check a JSON body; raises `Problem` 413, 415 or 422 (with where and what)."""
    return decode_body(request, await read_bytes(request, max_bytes=max_bytes), model)


def decode_body(request: Request, body: bytes, model: type[M]) -> M:
    """Check a JSON body that was read; raises `Problem` 415 or 422 (with where and what)."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Problem("unsupported-media-type", "send application/json")
    check_depth(body)
    try:
        decoded = msgspec.json.decode(body, type=model)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Problem("malformed", str(error)) from error
    # Decoding is cheap and walking what was decoded is not: most bodies cannot hide any.
    if _MAYBE_CONTROL.search(body) is not None:
        where = _control_in(msgspec.to_builtins(decoded), "$")
        if where is not None:
            raise Problem("malformed", f"control characters are not taken - at `{where}`")
    return decoded


def _control_in(value: object, where: str) -> str | None:
    """Return the first member whose text, or name, has a control character, as msgspec names it."""
    if isinstance(value, str):
        return where if _CONTROL.search(value) is not None else None
    inner: Iterable[tuple[object, str]] = ()
    if isinstance(value, dict):
        if any(_CONTROL.search(name) is not None for name in value):
            return where
        inner = ((member, f"{where}.{name}") for name, member in value.items())
    elif isinstance(value, list | tuple):
        inner = ((member, f"{where}[{number}]") for number, member in enumerate(value))
    return next((found for member, at in inner if (found := _control_in(member, at))), None)


def check_depth(body: bytes) -> None:
    """Raise `Problem` 422 for JSON nested deeper than 32 levels."""
    depth = 0
    for bracket in _STRING.sub(b"", body).translate(None, _NOT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise Problem("malformed", f"nested deeper than {MAX_DEPTH} levels")


def query_integer(request: Request, name: str, *, default: int, most: int, least: int = 0) -> int:
    """Read a whole number from the query; raises `Problem` 422 when it is none or out of bounds."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if re.fullmatch(r"-?[0-9]{1,19}", text) is None or not least <= int(text) <= most:
        raise Problem("malformed", f"{name} is a whole number from {least} to {most}")
    return int(text)


# Answers.


def encode(body: object) -> bytes:
    """Encode an answer as JSON, members in the order of the model."""
    return msgspec.json.encode(body)


def json_response(
    body: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Answer with a struct, mapping or list as JSON."""
    return Response(encode(body), status, headers, "application/json")


def cached_response(request: Request, body: object, *, etag: str) -> Response:
    """The same with a strong ETag; 304 when `If-None-Match` names it."""
    quoted = f'"{etag}"'
    named = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
    if quoted in named or "*" in named:
        return Response(status_code=304, headers={"etag": quoted})
    return json_response(body, headers={"etag": quoted})


def problem_body(problem: Problem) -> dict[str, object]:
    """Return the RFC 9457 document of a problem."""
    kind = problem.kind
    document = ProblemDocument(
        type=f"/problems/{kind.code}",
        code=kind.code,
        title=kind.title,
        status=kind.status,
        detail=problem.detail or kind.title,
        retryable=kind.retryable,
        trace_id=telemetry.current_trace_id(),
    )
    return {**msgspec.structs.asdict(document), **problem.members}


def problem_response(problem: Problem) -> Response:
    """Answer with a problem."""
    headers = {}
    if problem.kind.status == 401:
        headers["www-authenticate"] = "Bearer"
    if problem.kind.retryable and problem.kind.status != 500:
        headers["retry-after"] = "1"
    return Response(encode(problem_body(problem)), problem.kind.status, headers, PROBLEM_JSON)


Position = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""A whole number in a cursor's position: what PostgreSQL's bigint holds."""

P = TypeVar("P", bound=tuple[str | int, ...])


@dataclass(frozen=True, slots=True)
class Page(Generic[P]):
    """Which part of a list is asked for: at most `limit` items after the position `after`."""

    limit: int
    after: P | None


def page_of(request: Request, position: type[P]) -> Page[P]:
    """Read `?limit=&cursor=`; raises `Problem` 422 for a limit over 1000 or a foreign cursor.

    `position` is what a position of this list is made of: `tuple[Position]`, `tuple[str, str]`.
    """
    limit = query_integer(request, "limit", default=PAGE_LIMIT, least=1, most=MAX_LIMIT)
    cursor = request.query_params.get("cursor")
    if cursor is None:
        return Page(limit, None)
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        packed = base64.urlsafe_b64decode(padded.encode("ascii"))
        after = msgspec.json.decode(packed, type=position)
    except (ValueError, msgspec.MsgspecError) as error:
        raise Problem("malformed", "cursor is not one that this list gave") from error
    if _control_in(after, "cursor") is not None:
        raise Problem("malformed", "cursor is not one that this list gave")
    return Page(limit, after)


T = TypeVar("T")


def page_response(
    items: Sequence[T], page: Page[P], position: Callable[[T], P], *, more: bool = False
) -> Response:
    """Answer `{"items","next"}` for items after `page.after`: all, or the first `page.limit + 1`.

    `position` says where an item stands in the list's order; it goes into the opaque cursor.
    `more` says that the list goes on although no further item was read.
    """
    shown = items[: page.limit]
    goes_on = shown and (more or len(items) > len(shown))
    ended = position(shown[-1]) if goes_on else None
    return json_response({"items": shown, "next": next_cursor(page, ended)})


def next_cursor(_page: Page[P], ended: P | None) -> str | None:
    """Return the cursor of the page after one that ended there; None when it was the last."""
    if ended is None:
        return None
    return base64.urlsafe_b64encode(encode(ended)).rstrip(b"=").decode()


# Resources.


@dataclass(frozen=True, slots=True)
class Operation:
    """An endpoint as it is routed, and what the generated document says about it."""

    method: str
    path: str
    answer: type[msgspec.Struct] | None
    """The model of the answer; of a paged list, that of one item."""
    status: int
    body: type[msgspec.Struct] | None
    paged: bool
    idempotent: bool
    query: tuple[str, ...]
    problems: tuple[str, ...]
    """Codes beyond those that follow from the rest: 401, 403, 429, 500, 503; 404 with a path
    parameter; 413, 415, 422 with a body; those of an Idempotency-Key."""


Endpoint = TypeVar("Endpoint", bound=Callable[..., Awaitable[Response]])


def get(
    path: str,
    *,
    answer: type[msgspec.Struct] | None = None,
    paged: bool = False,
    query: Sequence[str] = (),
    problems: Sequence[str] = (),
) -> Callable[[Endpoint], Endpoint]:
    """Mark a method of a `Resource` as the endpoint of `GET path`."""
    return _mark(
        Operation(
            method="GET",
            path=path,
            answer=answer,
            status=200,
            body=None,
            paged=paged,
            idempotent=False,
            query=tuple(query),
            problems=tuple(problems),
        )
    )


def post(
    path: str,
    *,
    body: type[msgspec.Struct] | None = None,
    answer: type[msgspec.Struct] | None = None,
    status: int = 200,
    idempotent: bool = False,
    problems: Sequence[str] = (),
) -> Callable[[Endpoint], Endpoint]:
    """Mark a method of a `Resource` as the endpoint of `POST path`."""
    return _mark(
        Operation(
            method="POST",
            path=path,
            answer=answer,
            status=status,
            body=body,
            paged=False,
            idempotent=idempotent,
            query=(),
            problems=tuple(problems),
        )
    )


_MARK: Final = "operation"


def _mark(operation: Operation) -> Callable[[Endpoint], Endpoint]:
    def mark(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _MARK, operation)
        return endpoint

    return mark


class Resource:
    """What one or a few paths name: its marked methods are their endpoints."""

    def router(self) -> APIRouter:
        """Return the routes of the marked methods, in the order in which they are written."""
        routes = APIRouter()
        # A class body keeps its order; what a subclass overrides keeps the place it had.
        names = dict.fromkeys(name for kind in reversed(type(self).__mro__) for name in vars(kind))
        for name in names:
            operation = getattr(getattr(type(self), name), _MARK, None)
            if isinstance(operation, Operation):
                routes.add_api_route(
                    operation.path,
                    getattr(self, name),
                    methods=[operation.method],
                    # Endpoints answer with bytes of their own: FastAPI has nothing to convert.
                    response_model=None,
                    openapi_extra={_MARK: operation},
                )
        return routes


def operation_of(route: APIRoute) -> Operation | None:
    """Return what a route was marked with; None for a route that is not a resource's."""
    found = (route.openapi_extra or {}).get(_MARK)
    return found if isinstance(found, Operation) else None


# The application.


def create_app(
    service: str,
    version: str,
    resources: Sequence[Resource],
    *,
    ready: Callable[[], Awaitable[None]],
) -> FastAPI:
    """Build the application: its resources, /healthz, /readyz, /metrics, and problems.

    `ready` raises when the service cannot answer.
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

    async def readyz(_request: Request) -> Response:
        await ready()
        return json_response({"ready": True})

    async def metrics(_request: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    app.add_route("/healthz", healthz)
    app.add_route("/readyz", readyz)
    app.add_route("/metrics", metrics)
    for refused in (Problem, HTTPException, RequestValidationError, MessageTooLarge):
        app.add_exception_handler(refused, _refuse)
    app.add_middleware(_Boundary)
    return app


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
            except Exception as error:
                # Nothing may leave as the server's own page: a client reads problems only.
                code = "unavailable" if is_outage(error) else "internal"
                _log.exception("request failed", path=scope["path"], code=code, error=repr(error))
                if status is not None:
                    raise  # Part of an answer is out: only a broken connection can say so now.
                await problem_response(Problem(code))(scope, receive, noting)
            finally:
                # The template, not the path: paths are without number, templates are few.
                route = getattr(scope.get("route"), "path", "unmatched")
                telemetry.observe_request(
                    request.method, route, status or 0, time.perf_counter() - started_s
                )


def _refused(request: Request) -> Problem | None:
    """Refuse control characters in the path, which then names nothing, and in the query."""
    if _CONTROL.search(request.scope["path"]) is not None:
        return Problem("not-found")
    for name, value in request.query_params.multi_items():
        if _CONTROL.search(name + value) is not None:
            return Problem("malformed", "control characters are not taken in a query")
    return None
