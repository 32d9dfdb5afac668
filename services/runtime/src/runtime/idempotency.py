"""Idempotent commands: a retry gets the first answer.

Theory. A command with an `Idempotency-Key` runs in one transaction with the row that remembers its
answer: (scope, key) is unique, so of any number of equal requests one runs and all get its answer,
byte for byte. A refusal (409) is remembered too, 35 days long, unless it is retryable. When the
answer to COMMIT is lost, the key is looked up over a new connection.

What makes two commands equal is the *fingerprint*: method, path, and the JSON that the client sent,
parsed and written again with its keys sorted. White space and the order of members do not count.
Defaults are not filled in, so a retry across an upgrade that added an optional member is still the
same command; and an explicit null is not an absent member (decision 0009).

Refusals: `Problem` `idempotency-key-missing`, `malformed` for a key that is none; then
`idempotency-key-reused`, `idempotency-key-in-flight`; `unavailable` when the outcome stays unknown.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import asyncpg
import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response

from runtime.database import LOCK_NOT_AVAILABLE, CommitUnknown, Database
from runtime.http import (
    PROBLEM_JSON,
    Problem,
    check_media_type,
    decode_body,
    encode,
    may_be_absent,
    problem_body,
    read_bytes,
)

if TYPE_CHECKING:
    from runtime.database import Connection

M = TypeVar("M", bound=msgspec.Struct)

MAX_KEY_LENGTH: Final = 255
IN_FLIGHT_WAIT_MS: Final = 5_000
UNKNOWN_ATTEMPTS: Final = 5
FORGOTTEN_AT_ONCE: Final = 5_000

_KEY = re.compile(r"[\x21-\x7e]{1,255}")

_log = structlog.get_logger("runtime.idempotency")


@dataclass(frozen=True, slots=True)
class Command(Generic[M]):
    """An idempotent request: what names it, and what it says."""

    key: str
    """The client's name for it, unique in its scope."""
    call: str
    """Method and path."""
    sent: bytes
    """The JSON that the client sent: keys sorted, nothing filled in. Of a file what names it."""
    body: M
    """The same as a model."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command answers. `stored` is what a retry gets, when that must differ (secrets)."""

    status: int
    body: object
    """A struct, mapping or list; encoded as JSON."""
    stored: object = None


async def read_command(request: Request, model: type[M]) -> Command[M]:
    """Read a command; raises `Problem` 413, 415, or 422 for its body, then for its key.

    A command whose model demands no member may come without a body: it then reads as `{}`.
    """
    raw = await read_bytes(request)
    if not raw and may_be_absent(model):
        raw, body = b"{}", model()
    else:
        body = decode_body(request, raw, model)
    key = _key_of(request)
    sent = msgspec.json.encode(msgspec.json.decode(raw), order="sorted")
    return Command(key, f"{request.method} {request.url.path}", sent, body)


async def read_file_command(
    request: Request,
    media_type: str,
    decode: Callable[[bytes], M],
    options: Mapping[str, bool],
) -> Command[M]:
    """Read a command whose body is a file; raises `Problem` 413, 415, what `decode` does, then 422.

    It is the same command when the file is the same, byte for byte, and so are the `options` of its
    query. What is kept of the file is its hash: what it came to is in the answer.
    """
    raw = await read_bytes(request)
    check_media_type(request, media_type)
    body = decode(raw)
    key = _key_of(request)
    named = {"file_sha256": hashlib.sha256(raw).hexdigest(), **options}
    sent = msgspec.json.encode(named, order="sorted")
    return Command(key, f"{request.method} {request.url.path}", sent, body)


def _key_of(request: Request) -> str:
    key = request.headers.get("idempotency-key")
    if key is None:
        raise Problem("idempotency-key-missing", "send an Idempotency-Key header")
    if _KEY.fullmatch(key) is None:
        raise Problem("malformed", f"Idempotency-Key: 1 to {MAX_KEY_LENGTH} visible characters")
    return key


async def run_command(
    database: Database,
    command: Command[M],
    run: Callable[[Connection], Awaitable[Answer]],
    *,
    scope: str,
    tenant: str,
    snapshot: bool = False,
) -> Response:
    """Run a command at most once for its key, and give every retry the first answer.

    `run` works inside the command's transaction; a `Problem` it raises rolls everything back and,
    when it is a refusal that is not retryable, is the answer that retries get for 35 days.
    `scope` is the tenant whose book it changes, else the caller's role: keys are unique per scope
    (decision 0008). `tenant` is what row-level security sees. With `snapshot` all that the command
    reads was committed at one moment; one that loses against another is run again on a new one.
    """
    for attempt in range(1, UNKNOWN_ATTEMPTS + 1):
        try:
            return await _run_once(database, command, run, scope, tenant, snapshot=snapshot)
        except (CommitUnknown, asyncpg.SerializationError, asyncpg.DeadlockDetectedError) as error:
            # Looked up on a new connection by running again: the key's row decides.
            _log.warning("command repeated", attempt=attempt, error=repr(error))
            await asyncio.sleep(random.uniform(0, 0.02 * 2**attempt))  # noqa: S311
    raise Problem("unavailable", "the outcome is not known yet; repeat with the same key")


async def _run_once(
    database: Database,
    command: Command[M],
    run: Callable[[Connection], Awaitable[Answer]],
    scope: str,
    tenant: str,
    *,
    snapshot: bool,
) -> Response:
    try:
        async with database.transaction(
            tenant=tenant, lock_timeout_ms=IN_FLIGHT_WAIT_MS, snapshot=snapshot
        ) as connection:
            # The key's row first: an equal request waits for it, and then finds the answer.
            found = await _begin(connection, command, scope)
            if found is not None:
                return found
            answer = await run(connection)
            body = encode(answer.body)
            stored = body if answer.stored is None else encode(answer.stored)
            await _finish(connection, command, scope, answer.status, stored)
    except Problem as refusal:
        # What may pass later, or says that the request itself is wrong, is not remembered.
        if refusal.kind.status != 409 or refusal.kind.retryable:
            raise
        return await _remember(database, command, refusal, scope, tenant)
    return Response(body, answer.status, media_type="application/json")


async def _remember(
    database: Database, command: Command[M], refusal: Problem, scope: str, tenant: str
) -> Response:
    """Store a refusal, unless an equal request was answered meanwhile: then that answer counts."""
    body = encode(problem_body(refusal))
    async with database.transaction(tenant=tenant, lock_timeout_ms=IN_FLIGHT_WAIT_MS) as connection:
        found = await _begin(connection, command, scope)
        if found is not None:
            return found
        await _finish(connection, command, scope, refusal.kind.status, body)
    return _answered(refusal.kind.status, body)


_BEGIN = """
insert into idempotency (scope, idempotency_key, command, document)
values ($1, $2, $3, $4)
on conflict (scope, idempotency_key) do nothing
"""
_FIRST_ANSWER = """
select command, document, status, answer
  from idempotency
 where scope = $1 and idempotency_key = $2
"""


async def _begin(connection: Connection, command: Command[M], scope: str) -> Response | None:
    """Take the key for this transaction; return the first answer when it was taken before."""
    try:
        status = await connection.execute(_BEGIN, scope, command.key, command.call, command.sent)
    except asyncpg.PostgresError as error:
        if error.sqlstate == LOCK_NOT_AVAILABLE:
            raise Problem("idempotency-key-in-flight") from error
        raise
    if status == "INSERT 0 1":
        return None
    row = await connection.fetchrow(_FIRST_ANSWER, scope, command.key)
    if row is None:
        raise Problem("idempotency-key-in-flight")
    differing = _differing(command, row["command"], row["document"])
    if differing:
        raise Problem(
            "idempotency-key-reused",
            f"the first command with this key differs in {', '.join(differing)}",
            differing=differing,
        )
    return _answered(row["status"], row["answer"])


_FINISH = """
update idempotency set status = $3, answer = $4 where scope = $1 and idempotency_key = $2
"""


async def _finish(
    connection: Connection, command: Command[M], scope: str, status: int, answer: bytes
) -> None:
    """Store the answer in the command's own transaction: both become durable, or neither."""
    await connection.execute(_FINISH, scope, command.key, status, answer)


# So many at a time, oldest first: after a long pause, all at once would never end in time.
_FORGET_REFUSALS = """
delete from idempotency
 where (scope, idempotency_key) in (
   select scope, idempotency_key from idempotency
    where status >= 400 and recorded_at < clock_timestamp() - interval '35 days'
    order by recorded_at
    limit $1)
"""


async def forget_refusals(connection: Connection, at_once: int = FORGOTTEN_AT_ONCE) -> None:
    """Delete refusals that are older than 35 days (the `writer` role may); answers stay for ever.

    Outside a transaction: each part is committed by itself.
    """
    while await connection.execute(_FORGET_REFUSALS, at_once) != "DELETE 0":
        pass


def _answered(status: int, body: bytes) -> Response:
    media_type = "application/json" if status < 400 else PROBLEM_JSON
    return Response(body, status, media_type=media_type)


def _differing(command: Command[M], call: str, sent: bytes) -> list[str]:
    """Name the members in which this command differs from the first with its key."""
    if command.call == call and command.sent == sent:
        return []
    mine, first = msgspec.json.decode(command.sent), msgspec.json.decode(sent)
    names = sorted(name for name in {*mine, *first} if mine.get(name, ...) != first.get(name, ...))
    return names if command.call == call else ["path", *names]
