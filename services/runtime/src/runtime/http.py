"""The HTTP shell: problems, strict bodies, idempotent commands, pages, and the generated document.

Theory. An endpoint takes the raw request and calls, in this order: `access.authorise` (401, 403),
its own look-up of what the path names (404), `read_body` (413, 415, 422), and then acts (409): so the
order of checks is the order of lines. Models are msgspec structs, strict: an integer is never taken
from a float, a string or a boolean, unknown members are refused. Every error leaves as
`application/problem+json` from the catalogue of `hisab_contracts.problems`.

A command with an `Idempotency-Key` runs in one transaction with the row that remembers its answer:
(scope, key) is unique, so of any number of equal requests one runs and all get its answer byte for
byte. A refusal (409) is remembered too, unless it is retryable, or not about the command at all.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import msgspec
from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import Response

from runtime.auth import Principal
from runtime.database import Database

if TYPE_CHECKING:
    from runtime.database import Connection

M = TypeVar("M", bound=msgspec.Struct)

MAX_BODY_BYTES: Final = 1_048_576
MAX_DEPTH: Final = 32
MAX_LIMIT: Final = 1_000

IntegerText = Annotated[str, msgspec.Meta(pattern=r"^-?(0|[1-9][0-9]{0,37})$")]
"""A whole number in a JSON string; read it with `int()`."""


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a request body is made of: strict, frozen, closed."""


class Problem(Exception):
    """An answer from the catalogue of problems, with what this case adds to it."""

    def __init__(self, code: str, detail: str = "", /, **members: object) -> None:
        """Name a problem of the catalogue; `members` become members of the document."""
        super().__init__(code, detail)
        self.code = code
        self.detail = detail
        self.members = members


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command answers. `stored` is what a retry gets, when that must differ (secrets)."""

    status: int
    body: object
    """A struct, mapping or list; encoded as JSON."""
    stored: object = None


@dataclass(frozen=True, slots=True)
class Command:
    """An idempotent request: what names it and what it says."""

    scope: str
    """The tenant whose book it changes, else the caller's role: keys are unique per scope."""
    key: str
    document: Mapping[str, object]


def operation(
    *,
    answer: type | None = None,
    status: int = 200,
    body: type | None = None,
    problems: Sequence[str] = (),
    idempotent: bool = False,
    query: Sequence[str] = (),
) -> dict[str, Any]:
    """Keyword arguments for a route decorator, so that the document says what the code does.

    `answer` and `body` are msgspec structs, `problems` codes of the catalogue beyond those that every
    endpoint has (401, 403, 404, 413, 422, 429, 500, 503).
    """
    raise NotImplementedError


def create_app(service: str, version: str, router: APIRouter, **more: object) -> FastAPI:
    """Build the application: routes, problems, /healthz, /readyz, /metrics."""
    raise NotImplementedError


async def read_body(request: Request, model: type[M], *, max_bytes: int = MAX_BODY_BYTES) -> M:
    """Read and check a JSON body; raises `Problem` 413, 415 or 422 (with where and what)."""
    raise NotImplementedError


async def read_bytes(request: Request, *, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """Read a raw body of at most `max_bytes`; raises `Problem` 413."""
    raise NotImplementedError


def command_of(request: Request, body: msgspec.Struct, *, scope: str) -> Command:
    """Name the command by its Idempotency-Key header (422 without one), its path and its body."""
    raise NotImplementedError


async def idempotent(
    database: Database,
    command: Command,
    principal: Principal,
    run: Callable[[Connection], Awaitable[Answer]],
) -> Response:
    """Run a command at most once for its key, in one transaction, and give every retry its answer."""
    raise NotImplementedError


def json_response(
    body: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Encode an answer (structs, mappings) as JSON."""
    raise NotImplementedError


def cached_response(request: Request, body: object, *, etag: str) -> Response:
    """The same with a strong ETag; 304 when `If-None-Match` names it."""
    raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is asked for: rows after `after`, at most `limit`."""

    limit: int
    after: tuple[str | int, ...] | None


def page_of(request: Request, *, default: int = 100) -> Page:
    """Read `?limit=&cursor=`; raises `Problem` 422 for a limit over 1000 or a foreign cursor."""
    raise NotImplementedError


def page_response(items: Sequence[object], page: Page, key: Callable[[Any], tuple[str | int, ...]]) -> Response:
    """Answer `{"items","next"}` for rows read with `limit = page.limit + 1`.

    `key` names the position of an item in the list's order; it goes into the opaque cursor.
    """
    raise NotImplementedError


def openapi_document(app: FastAPI) -> bytes:
    """The application's OpenAPI 3.1 document in its committed form."""
    raise NotImplementedError
