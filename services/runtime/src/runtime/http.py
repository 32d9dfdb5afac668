"""The HTTP edge: resources, strict bodies, problems, and pages.

Theory. A resource is a class whose marked methods (`get`, `post`, `put`) are endpoints; what they
need is given to its constructor. An endpoint takes the raw request and calls, in this order:
`access.authorise` (401, 403), its own look-up of what the path names (404), `read_body` or
`idempotency.read_command` (413, 415, 422), and then acts (409): the order of checks is the order of
lines. Models are msgspec structs, strict: an integer is never taken from a float, a string or a
boolean, unknown members are refused. Every error leaves as `application/problem+json` from the
catalogue of `hisab_contracts.problems`.

Refusals: `Problem`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Final, Generic, Literal, TypeVar

import msgspec
from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from hisab_contracts.invariants import InvariantBroken
from hisab_contracts.problems import PROBLEMS
from runtime import telemetry

M = TypeVar("M", bound=msgspec.Struct)

MAX_BODY_BYTES: Final = 1_048_576
MAX_DEPTH: Final = 32
PAGE_LIMIT: Final = 100
MAX_LIMIT: Final = 1_000
MAX_PAGE_BYTES: Final = 8 * 1_048_576
MAX_CURSOR: Final = 4_096
CALLER: Final = "caller"
"""Where a request's state says what its caller may see."""

MAX_DETAIL: Final = 1_000
"""Characters of a refusal's detail: it may quote what was sent, and need not quote all of it."""

_NOT_OPENING = bytes(set(range(256)) - set(b"[{"))
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
"""PostgreSQL takes no NUL, and no line of ours should hold the others."""
_NUMBER = re.compile(r"-?[0-9]{1,19}")
_MAYBE_CONTROL = re.compile(rb"\x7f|\\[ubfnrt]")
PROBLEM_JSON: Final = "application/problem+json"

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
    # Without its leading zeros, a length with more digits than the bound is beyond it: no number
    # is made of what a client may write as long as it likes.
    length = request.headers.get("content-length", "").lstrip("0")
    if length.isdecimal() and (len(length) > len(str(max_bytes)) or int(length) > max_bytes):
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
    check_media_type(request, "application/json")
    check_depth(body)
    try:
        decoded = msgspec.json.decode(body, type=model)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Problem("malformed", str(error)[:MAX_DETAIL]) from error
    # Decoding is cheap and walking what was decoded is not: most bodies cannot hide any.
    if _MAYBE_CONTROL.search(body) is not None:
        where = _control_in(msgspec.to_builtins(decoded))
        if where is not None:
            detail = f"control characters are not taken - at `${where[:MAX_DETAIL]}`"
            raise Problem("malformed", detail)
    return decoded


def check_media_type(request: Request, media_type: str) -> None:
    """Raise `Problem` 415 for a body that says it is something else, or does not say."""
    sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if sent != media_type:
        raise Problem("unsupported-media-type", f"send {media_type}")


def _control_in(value: object) -> str | None:
    """Return the path to the first text, or member's name, with a control character.

    The path is put together on the way back from what was found, never on the way there: a long
    name in front of many members would be copied for each of them.
    """
    if isinstance(value, str):
        return "" if _CONTROL.search(value) is not None else None
    inner: Iterable[tuple[str | int, object]] = ()
    if isinstance(value, dict):
        if any(_CONTROL.search(name) is not None for name in value):
            return ""
        inner = value.items()
    elif isinstance(value, list | tuple):
        inner = enumerate(value)
    for place, member in inner:
        found = _control_in(member)
        if found is not None:
            return (f".{place}" if isinstance(place, str) else f"[{place}]") + found
    return None


def has_control(text: str) -> bool:
    """Say whether a text has a control character."""
    return _CONTROL.search(text) is not None


def check_depth(body: bytes) -> None:
    """Raise `Problem` 422 for JSON nested deeper than 32 levels, in time linear in its length.

    What is no JSON may pass: its reader refuses it afterwards, and has a bound of its own.
    """
    if len(body.translate(None, _NOT_OPENING)) <= MAX_DEPTH:
        return
    # Escaped backslashes go first, so that a quote behind one is seen to end its text. Then every
    # second part between quotes is text, the last one too when nothing ends it. A regular
    # expression that skips texts would start again at every quote of a text without an end.
    parts = body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
    depth = 0
    for bracket in b"".join(parts[::2]).translate(None, _NOT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise Problem("malformed", f"nested deeper than {MAX_DEPTH} levels")


def query_integer(request: Request, name: str, *, default: int, most: int, least: int = 0) -> int:
    """Read a whole number from the query; raises `Problem` 422 when it is none or out of bounds."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if _NUMBER.fullmatch(text) is None or not least <= int(text) <= most:
        raise Problem("malformed", f"{name} is a whole number from {least} to {most}")
    return int(text)


def query_flag(request: Request, name: str) -> bool:
    """Read `true` or `false` from the query, false without it; raises `Problem` 422."""
    text = request.query_params.get(name, "false")
    if text not in {"true", "false"}:
        raise Problem("malformed", f"{name} is true or false")
    return text == "true"


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
        headers["retry-after"] = str(problem.members.get("retry_after_s", 1))
    return Response(encode(problem_body(problem)), problem.kind.status, headers, PROBLEM_JSON)


Position = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""A whole number in a cursor's position: what PostgreSQL's bigint holds."""

P = TypeVar("P", bound=tuple[str | int, ...])


@dataclass(frozen=True, slots=True)
class Page(Generic[P]):
    """Which part of a list is asked for: at most `limit` items after the position `after`."""

    limit: int
    after: P | None
    binding: str
    """Whose list it is, and which: a cursor of another one is refused."""


def page_of(request: Request, position: type[P]) -> Page[P]:
    """Read `?limit=&cursor=`; raises `Problem` 422 for a limit over 1000 or a foreign cursor.

    `position` is what a position of this list is made of: `tuple[Position]`, `tuple[str, str]`.
    A cursor belongs to one list, with one filter, as one caller sees it. With any other it would
    give a wrong part of a list without a word.
    """
    limit = query_integer(request, "limit", default=PAGE_LIMIT, least=1, most=MAX_LIMIT)
    binding = _binding_of(request)
    cursor = request.query_params.get("cursor")
    if cursor is None:
        return Page(limit, None, binding)
    foreign = Problem("malformed", "cursor is not one that this list gave with this filter")
    if len(cursor) > MAX_CURSOR:
        raise foreign
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        packed = base64.urlsafe_b64decode(padded.encode("ascii"))
        bound_to, written = msgspec.json.decode(packed, type=tuple[str, msgspec.Raw])
        after = msgspec.json.decode(written, type=position)
    # What is nested too deep to be taken apart is not ours either.
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise foreign from error
    if bound_to != binding or _control_in(after) is not None:
        raise foreign
    return Page(limit, after, binding)


def _binding_of(request: Request) -> str:
    """Name the list that is asked for: its path, its filter, and what the caller may see of it."""
    asked = sorted(
        pair for pair in request.query_params.multi_items() if pair[0] not in {"limit", "cursor"}
    )
    listed = (request.scope["path"], asked, getattr(request.state, CALLER, None))
    return hashlib.sha256(encode(listed)).hexdigest()[:16]


T = TypeVar("T")


def page_response(
    items: Sequence[T], page: Page[P], position: Callable[[T], P], *, more: bool = False
) -> Response:
    """Answer `{"items","next"}` for items after `page.after`: all, or the first `page.limit + 1`.

    `position` says where an item stands in the list's order; it goes into the opaque cursor.
    `more` says that the list goes on although no further item was read. A page ends early where its
    items pass 8 MiB; it has one item at least.
    """
    shown: list[msgspec.Raw] = []
    page_bytes = 0
    for item in items[: page.limit]:
        encoded = encode(item)
        page_bytes += len(encoded)
        if shown and page_bytes > MAX_PAGE_BYTES:
            break
        shown.append(msgspec.Raw(encoded))
    goes_on = shown and (more or len(items) > len(shown))
    ended = position(items[len(shown) - 1]) if goes_on else None
    return json_response({"items": shown, "next": next_cursor(page, ended)})


def next_cursor(page: Page[P], ended: P | None) -> str | None:
    """Return the cursor of the page after one that ended there; None when it was the last."""
    if ended is None:
        return None
    packed = base64.urlsafe_b64encode(encode((page.binding, ended)))
    return packed.rstrip(b"=").decode()


# Resources.


Others = Literal["not-found", "forbidden", "own"]
"""What an endpoint answers to a key that asks for what is another's: 404; 403; or only what is its
own, because nothing in the request names an owner."""

ANY_KEY: Final[tuple[str, ...]] = ()
"""For `roles`: every valid key will do."""


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
    roles: tuple[str, ...]
    """Whose keys it takes: enforced by `Access.authorise`. Empty: every valid key."""
    others: Mapping[str, Others]
    """By role: what a key gets for what is another's. Roles that belong to nobody are not here."""
    query: tuple[str, ...]
    forms: tuple[str, ...]
    """Media types, beside JSON, in which it answers whoever accepts one by name."""
    problems: tuple[str, ...]
    """Codes beyond those that follow from the rest: 401, 403, 429, 500, 503; 404 with a path
    parameter; 413, 415, 422 with a body; those of an Idempotency-Key."""
    csv_columns: tuple[str, ...] = ()
    """The header of the CSV file that it takes instead of JSON; empty: it takes none."""


NOBODY: Final[Mapping[str, Others]] = MappingProxyType({})
"""For `others`: no role that may ask belongs to anybody."""

Endpoint = TypeVar("Endpoint", bound=Callable[..., Awaitable[Response]])


def get(
    path: str,
    *,
    roles: Collection[str],
    others: Mapping[str, Others] = NOBODY,
    answer: type[msgspec.Struct] | None = None,
    paged: bool = False,
    query: Sequence[str] = (),
    forms: Sequence[str] = (),
    problems: Sequence[str] = (),
) -> Callable[[Endpoint], Endpoint]:
    """Mark a method of a `Resource` as the endpoint of `GET path`, for keys of these roles."""
    return _mark(
        Operation(
            method="GET",
            path=path,
            answer=answer,
            status=200,
            body=None,
            paged=paged,
            idempotent=False,
            roles=tuple(roles),
            others=others,
            query=tuple(query),
            forms=tuple(forms),
            problems=tuple(problems),
        )
    )


def post(
    path: str,
    *,
    roles: Collection[str],
    others: Mapping[str, Others] = NOBODY,
    body: type[msgspec.Struct] | None = None,
    answer: type[msgspec.Struct] | None = None,
    status: int = 200,
    idempotent: bool = False,
    query: Sequence[str] = (),
    problems: Sequence[str] = (),
    csv_columns: Sequence[str] = (),
) -> Callable[[Endpoint], Endpoint]:
    """Mark a method of a `Resource` as the endpoint of `POST path`, for keys of these roles."""
    return _mark(
        Operation(
            method="POST",
            path=path,
            answer=answer,
            status=status,
            body=body,
            paged=False,
            idempotent=idempotent,
            roles=tuple(roles),
            others=others,
            query=tuple(query),
            forms=(),
            problems=tuple(problems),
            csv_columns=tuple(csv_columns),
        )
    )


def put(
    path: str,
    *,
    roles: Collection[str],
    others: Mapping[str, Others] = NOBODY,
    body: type[msgspec.Struct],
    answer: type[msgspec.Struct],
    problems: Sequence[str] = (),
) -> Callable[[Endpoint], Endpoint]:
    """Mark a method of a `Resource` as the endpoint of `PUT path`: it takes no Idempotency-Key."""
    return _mark(
        Operation(
            method="PUT",
            path=path,
            answer=answer,
            status=200,
            body=body,
            paged=False,
            idempotent=False,
            roles=tuple(roles),
            others=others,
            query=(),
            forms=(),
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


def operation_of(route: object) -> Operation | None:
    """Return what a route was marked with; None for a route that is not a resource's."""
    extra = route.openapi_extra if isinstance(route, APIRoute) else None
    found = (extra or {}).get(_MARK)
    return found if isinstance(found, Operation) else None


def operation_asked(request: Request) -> Operation:
    """Return what the endpoint that answers a request was marked with."""
    operation = operation_of(request.scope.get("route"))
    if operation is None:
        raise InvariantBroken("only an endpoint of a resource says whose keys it takes")
    return operation
