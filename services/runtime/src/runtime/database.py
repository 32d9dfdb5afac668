"""PostgreSQL: pools, the one transaction helper, leases, stored progress, the outbox's rows.

Theory. A deadline lives on the server (`statement_timeout`, `lock_timeout`,
`idle_in_transaction_session_timeout`); only acquiring a connection has a deadline of ours. A COMMIT
is never cancelled: cancelling a waiting COMMIT leaves a row that is visible and not replicated.
When the answer to COMMIT is lost the outcome is *unknown* (`CommitUnknown`): the caller looks its
key up over a new connection and then decides. A connection that says it is no longer the primary is
dropped, not given back.

Row-level security: `transaction(tenant=...)` sets `app.tenant` for that transaction only, and is
the only place that does. `ALL_TENANTS` is for keys whose role sees every tenant.

Refusals: `Unavailable` when no connection is free within 2 s or the server cannot be reached.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import asyncpg
import msgspec
import structlog
from asyncpg.connect_utils import SessionAttribute

from runtime.kafka import BrokerLost, Message, PublishFailed
from runtime.machine import Claim, Partition, Slice

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection = PoolConnectionProxy[asyncpg.Record]
    """One connection, inside a transaction unless a function says otherwise."""

T = TypeVar("T")

ALL_TENANTS: Final = "*"
"""Not in the grammar of ids: the setting that the policies read as "every tenant"."""

ACQUIRE_TIMEOUT_S: Final = 2
RELEASE_TIMEOUT_S: Final = 10
CONNECT_TIMEOUT_S: Final = 5
RETRY_ATTEMPTS: Final = 6
LEASE_POLL_S: Final = 0.5
OUTAGE_PAUSE_S: Final = 1

_NOT_WRITABLE: Final = ("25006", "57P01", "57P02", "57P03")
_RETRYABLE: Final = ("40001", "40P01")
LOCK_NOT_AVAILABLE: Final = "55P03"
_LOST = (
    OSError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.InternalClientError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    TimeoutError,
)

_log = structlog.get_logger("runtime.database")
_AFTER_COMMIT: ContextVar[list[Callable[[], None]] | None] = ContextVar(
    "after_commit", default=None
)


class Unavailable(Exception):
    """The database cannot be used now; nothing was written."""


class CommitUnknown(Exception):
    """COMMIT was sent and its answer lost: the transaction may or may not be durable."""


class FencedError(Exception):
    """A progress row no longer carries our epoch and offset: another owner has moved it."""


def is_infrastructure(error: BaseException) -> bool:
    """Say whether the database, the broker or the network made work fail, not the work itself."""
    if isinstance(error, Unavailable | CommitUnknown | FencedError | BrokerLost | PublishFailed):
        return True
    if isinstance(error, asyncpg.InterfaceError) and isinstance(error, ValueError):
        return False  # A value the driver cannot encode.
    if isinstance(error, asyncpg.PostgresError):
        # Class 40 conflicts, 53 resources, 55 locks, 57 operator, 58 system, 08 connection; 25P03:
        # the server ended a transaction that stood idle.
        state = error.sqlstate or ""
        return state[:2] in ("08", "40", "53", "55", "57", "58") or state in ("25006", "25P03")
    return isinstance(error, _LOST)


async def pause(stop: asyncio.Event, seconds: float) -> None:
    """Wait so long, or until `stop`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()


def after_commit(callback: Callable[[], None]) -> None:
    """Have a callback run once the transaction of this task is durable, and only then."""
    callbacks = _AFTER_COMMIT.get()
    if callbacks is None:
        raise RuntimeError("after_commit outside a transaction of Database")
    callbacks.append(callback)


@dataclass(frozen=True, slots=True)
class Limits:
    """Server-side deadlines of one pool, in milliseconds, and its size."""

    statement_timeout_ms: int = 30_000
    lock_timeout_ms: int = 5_000
    idle_in_transaction_ms: int = 15_000
    max_connections: int = 16


class Database:
    """A pool on one role of one database."""

    def __init__(self, dsn: str, *, name: str, limits: Limits | None = None) -> None:
        """Describe the pool; nothing is connected before `open`."""
        self._dsn = dsn
        self._name = name
        self._limits = limits or Limits()
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    async def open(self) -> None:
        """Create the pool with one connection, so that a wrong DSN is found at start."""
        limits = self._limits
        self._pool = await asyncpg.create_pool(
            dsn=self._dsn,
            min_size=1,
            max_size=limits.max_connections,
            max_inactive_connection_lifetime=300,
            timeout=CONNECT_TIMEOUT_S,
            target_session_attrs=SessionAttribute.read_write,
            init=_prepare,
            # Nothing to reset: settings are local to transactions, leases are given back.
            reset=_nothing,
            server_settings={
                "application_name": self._name,
                "statement_timeout": str(limits.statement_timeout_ms),
                "lock_timeout": str(limits.lock_timeout_ms),
                "idle_in_transaction_session_timeout": str(limits.idle_in_transaction_ms),
                "timezone": "UTC",
                "jit": "off",
                # A plan made for an empty table must not outlive the table's first million rows.
                "plan_cache_mode": "force_custom_plan",
            },
        )

    async def close(self) -> None:
        """Close every connection; bounded, then hard."""
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        try:
            async with asyncio.timeout(5):
                await pool.close()
        except TimeoutError:
            pool.terminate()

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend a connection outside any transaction (each statement commits by itself)."""
        pool = self._pool
        if pool is None:
            raise Unavailable(f"{self._name}: the pool is not open")
        try:
            connection = await pool.acquire(timeout=ACQUIRE_TIMEOUT_S)
        except _LOST as error:
            raise Unavailable(f"{self._name}: no connection") from error
        try:
            yield connection
        except asyncpg.PostgresError as error:
            if error.sqlstate in _NOT_WRITABLE:
                _drop(connection)
            raise
        finally:
            # A connection that cannot be given back is closed; what it did is done.
            with contextlib.suppress(*_LOST, asyncpg.PostgresError):
                await pool.release(connection, timeout=RELEASE_TIMEOUT_S)

    @contextlib.asynccontextmanager
    async def transaction(
        self, *, tenant: str | None = None, lock_timeout_ms: int | None = None
    ) -> AsyncIterator[Connection]:
        """Run the body in one transaction and commit it; roll back on any exception.

        `tenant` is what row-level security sees: a tenant id or `ALL_TENANTS`. Raises
        `CommitUnknown` when the answer to COMMIT is lost.
        """
        async with (
            self.connection() as connection,
            transaction_on(connection, tenant=tenant, lock_timeout_ms=lock_timeout_ms),
        ):
            yield connection

    async def retried(
        self, work: Callable[[Connection], Awaitable[T]], *, tenant: str | None = None
    ) -> T:
        """Run `work` in a transaction, again from the start after a deadlock or conflict.

        `work` must have no effect outside its transaction. At most 6 attempts, with jitter.
        """
        for attempt in range(1, RETRY_ATTEMPTS):
            try:
                async with self.transaction(tenant=tenant) as connection:
                    return await work(connection)
            except asyncpg.PostgresError as error:
                if error.sqlstate not in _RETRYABLE:
                    raise
                await asyncio.sleep(random.uniform(0, 0.01 * 2**attempt))  # noqa: S311
        async with self.transaction(tenant=tenant) as connection:
            return await work(connection)

    @contextlib.asynccontextmanager
    async def lease(self, name: str, stop: asyncio.Event) -> AsyncIterator[Connection | None]:
        """Wait until this process is the only one that holds `name`; lend the holding connection.

        None when `stop` came first. The lease ends with the connection. Write through this
        connection only: a holder that lost it can then no longer write. It is outside a
        transaction: use `transaction_on`.
        """
        while not stop.is_set():
            async with self.connection() as connection:
                if await _try_lease(connection, name):
                    try:
                        yield connection
                    finally:
                        await _end_lease(connection, name)
                    return
            await pause(stop, LEASE_POLL_S)
        yield None

    async def run_leased(
        self,
        name: str,
        work: Callable[[Connection], Awaitable[None]],
        *,
        interval_ms: int,
        stop: asyncio.Event,
    ) -> None:
        """Do `work` again and again while this process holds the lease; wait out an outage.

        `work` gets the connection that holds the lease, outside a transaction.
        """
        while not stop.is_set():
            try:
                async with self.lease(name, stop) as connection:
                    while connection is not None and not stop.is_set():
                        await work(connection)
                        await pause(stop, interval_ms / 1000)
            except Exception as error:
                if not is_infrastructure(error):
                    raise
                _log.warning("leased work interrupted", name=name, error=repr(error))
                await pause(stop, OUTAGE_PAUSE_S)


@contextlib.asynccontextmanager
async def transaction_on(
    connection: Connection, *, tenant: str | None = None, lock_timeout_ms: int | None = None
) -> AsyncIterator[None]:
    """Run the body in a transaction on a connection that is already held."""
    callbacks: list[Callable[[], None]] = []
    token = _AFTER_COMMIT.set(callbacks)
    try:
        transaction = connection.transaction()
        await transaction.start()
        try:
            if tenant is not None or lock_timeout_ms is not None:
                await _set_local(connection, tenant, lock_timeout_ms)
            yield
        except BaseException:
            # The cause matters, not that a dead connection cannot roll back.
            with contextlib.suppress(*_LOST, asyncpg.PostgresError):
                await asyncio.shield(transaction.rollback())
            raise
        await _commit(transaction.commit())
    finally:
        _AFTER_COMMIT.reset(token)
    for callback in callbacks:
        callback()


async def _commit(commit: Awaitable[None]) -> None:
    """Wait for COMMIT, whatever is cancelled meanwhile."""
    task = asyncio.ensure_future(commit)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([asyncio.shield(task)])
        except asyncio.CancelledError as error:
            cancelled = error
    failure = task.exception()
    if isinstance(failure, _LOST):
        raise CommitUnknown("the answer to COMMIT was lost") from failure
    if failure is not None:
        raise failure
    if cancelled is not None:
        raise cancelled


_SET_LOCAL = """
select set_config('app.tenant', coalesce($1, ''), true),
       set_config('lock_timeout', coalesce($2, current_setting('lock_timeout')), true)
"""


async def _set_local(
    connection: Connection, tenant: str | None, lock_timeout_ms: int | None
) -> None:
    """Bind the transaction to a tenant, and to how long it waits for a lock."""
    timeout = None if lock_timeout_ms is None else f"{lock_timeout_ms}ms"
    await connection.fetchrow(_SET_LOCAL, tenant, timeout)


_TRY_LEASE = "select pg_try_advisory_lock($1)"


async def _try_lease(connection: Connection, name: str) -> bool:
    return bool(await connection.fetchval(_TRY_LEASE, _lock_key(name)))


_END_LEASE = "select pg_advisory_unlock($1)"


async def _end_lease(connection: Connection, name: str) -> None:
    """Give a lease back, if need be with its connection."""
    try:
        await connection.fetchval(_END_LEASE, _lock_key(name))
    except (*_LOST, asyncpg.PostgresError):
        _drop(connection)
    except asyncio.CancelledError:
        _drop(connection)
        raise


def _drop(connection: Connection) -> None:
    """End a connection; one that is lost has already left the pool and refuses every call."""
    with contextlib.suppress(asyncpg.InterfaceError):
        connection.terminate()


def _lock_key(name: str) -> int:
    """Name an advisory lock: 64 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


async def _nothing(_connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Spare a round trip per transaction; asyncpg still rolls back what was left open."""


async def _prepare(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Read and write `numeric` as int: every numeric column of ours is a whole number."""
    await connection.set_type_codec(
        "numeric", encoder=str, decoder=int, schema="pg_catalog", format="text"
    )


@dataclass(frozen=True, slots=True)
class PartitionRange:
    """What the broker says about a partition before it is claimed."""

    first_offset: int
    end_offset: int
    hint_offset: int | None


_CLAIM = """
with overridden as (
  update consumer_override set used_at = clock_timestamp()
   where used_at is null
     and (topic, partition) in (select * from unnest($1::text[], $2::int[]))
  returning topic, partition, next_offset
), asked as (
  select a.topic, a.partition, a.floor_offset, o.next_offset as override_offset
    from unnest($1::text[], $2::int[], $3::bigint[]) as a (topic, partition, floor_offset)
    left join overridden o on o.topic = a.topic and o.partition = a.partition
), claimed as (
  insert into consumer_progress as p
         (topic, partition, owner_epoch, next_offset, attempt_offset, attempts)
  select topic, partition, 1, coalesce(override_offset, floor_offset), -1, 0
    from asked
   order by topic, partition
  on conflict (topic, partition) do update
     set owner_epoch = p.owner_epoch + 1,
         next_offset = coalesce(
           (select a.override_offset from asked a
             where a.topic = p.topic and a.partition = p.partition),
           greatest(p.next_offset, excluded.next_offset))
  returning topic, partition, owner_epoch, next_offset, attempt_offset, attempts
)
select c.topic, c.partition, c.owner_epoch, c.next_offset,
       case when c.attempt_offset = c.next_offset then c.attempts else 0 end as attempts,
       a.override_offset is not null as overridden
  from claimed c
  join asked a on a.topic = c.topic and a.partition = c.partition
 order by c.topic, c.partition
"""


async def claim(
    connection: Connection, ranges: dict[Partition, PartitionRange], *, compacted: bool
) -> tuple[Claim, ...]:
    """Raise the owner epoch of these progress rows (made when absent) and read their offsets.

    A new row begins at 0; on a compacted topic at the first offset the broker has, because there
    a removed record was replaced by a newer one. An operator's unused override wins and is marked.
    """
    asked = sorted(ranges)
    floors = [ranges[p].first_offset if compacted else 0 for p in asked]
    topics, numbers = [p.topic for p in asked], [p.number for p in asked]
    rows = await connection.fetch(_CLAIM, topics, numbers, floors)
    places = [Partition(row["topic"], row["partition"]) for row in rows]
    return tuple(
        Claim(
            partition=place,
            epoch=row["owner_epoch"],
            next_offset=row["next_offset"],
            attempts=row["attempts"],
            first_offset=ranges[place].first_offset,
            end_offset=ranges[place].end_offset,
            hint_offset=None if row["overridden"] else ranges[place].hint_offset,
        )
        for place, row in zip(places, rows, strict=True)
    )


_ADVANCE = """
update consumer_progress p set next_offset = b.until_offset
  from unnest($1::text[], $2::int[], $3::bigint[], $4::bigint[], $5::bigint[])
       as b (topic, partition, epoch, expected_offset, until_offset)
 where p.topic = b.topic and p.partition = b.partition
   and p.owner_epoch = b.epoch and p.next_offset = b.expected_offset
   and b.until_offset > b.expected_offset
"""


async def advance(connection: Connection, slices: Sequence[Slice]) -> None:
    """Move these progress rows to `until`; `FencedError` unless every one was as expected."""
    untils = [piece.until for piece in slices]
    _require_all(await connection.execute(_ADVANCE, *_expected(slices), untils), slices)


_MARK_ATTEMPT = """
update consumer_progress p set attempt_offset = b.expected_offset, attempts = b.attempt
  from unnest($1::text[], $2::int[], $3::bigint[], $4::bigint[], $5::int[])
       as b (topic, partition, epoch, expected_offset, attempt)
 where p.topic = b.topic and p.partition = b.partition
   and p.owner_epoch = b.epoch and p.next_offset = b.expected_offset
"""


async def mark_attempt(connection: Connection, slices: Sequence[Slice]) -> None:
    """Store, before they are processed, that these slices are being attempted."""
    attempts = [piece.attempt for piece in slices]
    _require_all(await connection.execute(_MARK_ATTEMPT, *_expected(slices), attempts), slices)


def _expected(slices: Sequence[Slice]) -> tuple[list[str], list[int], list[int], list[int]]:
    """Return the columns that name progress rows as their owner left them."""
    topics = [piece.partition.topic for piece in slices]
    numbers = [piece.partition.number for piece in slices]
    return topics, numbers, [piece.epoch for piece in slices], [piece.expected for piece in slices]


def _require_all(status: str, slices: Sequence[Slice]) -> None:
    if status != f"UPDATE {len(slices)}":
        raise FencedError(f"{status} of {len(slices)} progress rows")


_STORED_PROGRESS = """
select topic, partition, next_offset from consumer_progress where topic = any($1::text[])
"""


async def stored_progress(connection: Connection, topics: Sequence[str]) -> dict[Partition, int]:
    """Return the next offset of every partition of these topics that was ever claimed."""
    rows = await connection.fetch(_STORED_PROGRESS, list(topics))
    return {Partition(row["topic"], row["partition"]): row["next_offset"] for row in rows}


@dataclass(frozen=True, slots=True)
class Override:
    """An operator accepts that a partition is read on from another offset."""

    partition: Partition
    next_offset: int
    accepted_by: str
    reason: str


_OVERRIDE = """
insert into consumer_override (topic, partition, next_offset, accepted_by, reason)
values ($1, $2, $3, $4, $5)
"""


async def override_progress(connection: Connection, override: Override) -> None:
    """Put an override on the record; the next claim of the partition uses it up."""
    topic, number = override.partition.topic, override.partition.number
    said = (override.next_offset, override.accepted_by, override.reason)
    await connection.execute(_OVERRIDE, topic, number, *said)


@dataclass(frozen=True, slots=True)
class OutboxRows:
    """The lowest rows of a topic, and the snapshot taken just before they were read."""

    ids: list[int]
    messages: list[Message]
    xmin: int
    xmax: int


_INSERT_MESSAGES = """
insert into outbox (topic, partition, message_key, message_value, message_headers)
select m.topic, m.partition, m.message_key, m.message_value, m.message_headers
  from unnest($1::text[], $2::int[], $3::bytea[], $4::bytea[], $5::bytea[]) with ordinality
       as m (topic, partition, message_key, message_value, message_headers, place)
 order by m.place
"""


async def insert_messages(connection: Connection, messages: Sequence[Message]) -> None:
    """Write outbox rows, numbered in the order given."""
    await connection.execute(
        _INSERT_MESSAGES,
        [message.topic for message in messages],
        [message.partition for message in messages],
        [message.key for message in messages],
        [message.value for message in messages],
        [
            msgspec.msgpack.encode(message.headers) if message.headers else None
            for message in messages
        ],
    )


_SNAPSHOT = """
select pg_snapshot_xmin(s)::text::bigint as xmin, pg_snapshot_xmax(s)::text::bigint as xmax
  from pg_current_snapshot() as s
"""
_LOWEST_MESSAGES = """
select outbox_id, partition, message_key, message_value, message_headers
  from outbox
 where topic = $1 and outbox_id >= $2
 order by outbox_id
 limit $3
"""


async def lowest_messages(
    connection: Connection, topic: str, lowest_id: int, most: int
) -> OutboxRows:
    """Read the lowest rows of a topic, at most `most`, from `lowest_id` on."""
    snapshot = await connection.fetchrow(_SNAPSHOT)
    rows = await connection.fetch(_LOWEST_MESSAGES, topic, lowest_id, most)
    if snapshot is None:
        raise RuntimeError("PostgreSQL always has a snapshot")
    messages = [
        Message(
            topic,
            row["message_key"],
            row["message_value"],
            _HEADERS.decode(row["message_headers"]) if row["message_headers"] else (),
            row["partition"],
        )
        for row in rows
    ]
    ids = [row["outbox_id"] for row in rows]
    return OutboxRows(ids, messages, snapshot["xmin"], snapshot["xmax"])


_HEADERS: Final = msgspec.msgpack.Decoder(tuple[tuple[str, bytes | None], ...])

_DELETE_MESSAGES = "delete from outbox where topic = $1 and outbox_id = any($2::bigint[])"


async def delete_messages(connection: Connection, topic: str, ids: Sequence[int]) -> None:
    """Delete rows that the broker has acknowledged."""
    await connection.execute(_DELETE_MESSAGES, topic, ids)


_COUNT_MESSAGES = "select count(*) from outbox"


async def count_messages(connection: Connection) -> int:
    """Count the rows that the broker has not acknowledged."""
    return int(await connection.fetchval(_COUNT_MESSAGES))
