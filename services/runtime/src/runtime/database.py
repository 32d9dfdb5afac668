"""PostgreSQL: pools, the one transaction helper, leases.

Theory. A deadline lives on the server (`statement_timeout`, `lock_timeout`,
`idle_in_transaction_session_timeout`); only acquiring a connection has a deadline of ours. A COMMIT
is never cancelled: cancelling a waiting COMMIT leaves a row that is visible and not replicated.
When the answer to COMMIT is lost the outcome is *unknown* (`CommitUnknown`): the caller looks its
key up over a new connection and then decides. A connection that says it is no longer the primary is
dropped, not given back.

Row-level security: `transaction(tenant=...)` sets `app.tenant` for that transaction only, and is
the only place that does. `ALL_TENANTS` is for keys whose role sees every tenant.

What is decided by the time of day, and stays, is decided by a reading that was held against the
server's clock (`checked_now_ms`): a reading that is far off, a clock that jumped a day ahead for a
moment, must not end holds or move watermarks for good.

Refusals: `Unavailable` when no connection is free within 2 s or the server cannot be reached;
`ClockStep` when the process and the server do not agree what time it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import asyncpg
import structlog
from asyncpg.connect_utils import SessionAttribute

from hisab_contracts.units import ms_of
from runtime.clock import Clock, now_ms, pause
from runtime.outages import LOST_CONNECTION, Outage, is_outage

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection = PoolConnectionProxy[asyncpg.Record]
    """One connection, inside a transaction unless a function says otherwise."""

ALL_TENANTS: Final = "*"
"""Not in the grammar of ids: the setting that the policies read as "every tenant"."""

ACQUIRE_TIMEOUT_S: Final = 2
RELEASE_TIMEOUT_S: Final = 10
CONNECT_TIMEOUT_S: Final = 5
LATE_OPENINGS: Final = 11
"""How often a start tries again where the server does not answer: a minute in all."""
LEASE_POLL_S: Final = 0.5
OUTAGE_PAUSE_S: Final = 1

CLOCK_TOLERANCE_MS: Final = 10_000
"""How far a reading may be from the server's clock: beyond what clocks that are kept drift, and
beyond the answer of a server under load; far below what could end an hour, a lot or a month early.
A process that was frozen in between is refused, too, and reads again."""

_NOT_WRITABLE: Final = ("25006", "57P01", "57P02", "57P03")
LOCK_NOT_AVAILABLE: Final = "55P03"
_log = structlog.get_logger("runtime.database")
_AFTER_COMMIT: ContextVar[list[Callable[[], None]] | None] = ContextVar(
    "after_commit", default=None
)

_ON_PROGRESS: ContextVar[Callable[[], None] | None] = ContextVar("on_progress", default=None)


class Unavailable(Outage):
    """The database cannot be used now; nothing was written."""


class CommitUnknown(Outage):
    """COMMIT was sent and its answer lost: the transaction may or may not be durable."""


class ClockStep(Outage):
    """The clock of the process and that of the server are apart; nothing was decided by either."""


def after_commit(callback: Callable[[], None]) -> None:
    """Have a callback run once the transaction of this task is durable, and only then."""
    callbacks = _AFTER_COMMIT.get()
    if callbacks is None:
        raise RuntimeError("after_commit outside a transaction of Database")
    callbacks.append(callback)


def note_progress() -> None:
    """Say that the transaction of this task gets on: it may take longer than a watchdog waits."""
    on_progress = _ON_PROGRESS.get()
    if on_progress is not None:
        on_progress()


@contextlib.contextmanager
def watched_by(on_progress: Callable[[], None]) -> Iterator[None]:
    """Have `note_progress` in the body of this task call whoever watches it."""
    token = _ON_PROGRESS.set(on_progress)
    try:
        yield
    finally:
        _ON_PROGRESS.reset(token)


@dataclass(frozen=True, slots=True)
class Limits:
    """Server-side deadlines of one pool, in milliseconds, and its size."""

    statement_timeout_ms: int = 30_000
    lock_timeout_ms: int = 5_000
    idle_in_transaction_ms: int = 15_000
    max_connections: int = 16


_PING = "select 1"
# A database that is dropped and made again has another oid; a server restored from a backup, or a
# standby that was promoted, another timeline.
_IDENTITY = """
select d.oid, s.system_identifier, c.timeline_id
  from pg_database d, pg_control_system() s, pg_control_checkpoint() c
 where d.datname = current_database()
"""


class Database:
    """A pool on one role of one database."""

    def __init__(self, dsn: str, *, name: str, limits: Limits | None = None) -> None:
        """Describe the pool; nothing is connected before `open`."""
        self._dsn = dsn
        self._name = name
        self._limits = limits or Limits()
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._identity: tuple[object, ...] | None = None
        self._replaced = asyncio.Event()

    async def open(self) -> None:
        """Create the pool with one connection, so that a wrong DSN is found at start.

        A server that is late is asked again: on a busy machine everything starts at once. One that
        refuses ends the start at once.
        """
        for _ in range(LATE_OPENINGS):
            with contextlib.suppress(TimeoutError):
                self._pool = await self._create_pool()
                return
        self._pool = await self._create_pool()

    async def _create_pool(self) -> asyncpg.Pool[asyncpg.Record]:
        limits = self._limits
        return await asyncpg.create_pool(
            dsn=self._dsn,
            min_size=1,
            max_size=limits.max_connections,
            max_inactive_connection_lifetime=300,
            timeout=CONNECT_TIMEOUT_S,
            target_session_attrs=SessionAttribute.read_write,
            init=self._prepare,
            # Nothing to reset: settings are local to transactions, leases are given back.
            reset=_nothing,
            server_settings={
                "application_name": self._name,
                "statement_timeout": str(limits.statement_timeout_ms),
                "lock_timeout": str(limits.lock_timeout_ms),
                "idle_in_transaction_session_timeout": str(limits.idle_in_transaction_ms),
                "timezone": "UTC",
                # Our statements take milliseconds; compiling one takes a hundred.
                "jit": "off",
                # A plan made for an empty table must not outlive the table's first million rows.
                "plan_cache_mode": "force_custom_plan",
            },
        )

    async def ping(self) -> None:
        """Return when the database answers; raises when it does not."""
        async with self.connection() as connection:
            await connection.fetchval(_PING)

    async def until_replaced(self) -> None:
        """Return once a new connection finds another database than the first one did.

        A database that was restored, or a standby that took over, may lack what this process has
        seen committed: whoever was built on it ends, and compares again at its next start.
        """
        await self._replaced.wait()

    async def _prepare(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        """Prepare a new connection; refuse it when it leads to another database than before."""
        # Read and write `numeric` as int: every numeric column of ours is a whole number.
        await connection.set_type_codec(
            "numeric", encoder=str, decoder=int, schema="pg_catalog", format="text"
        )
        row = await connection.fetchrow(_IDENTITY)
        identity = () if row is None else tuple(row.values())
        if self._identity not in (None, identity):
            _log.critical("another database than at start", name=self._name, identity=identity)
            self._replaced.set()
            raise Unavailable(f"{self._name}: the database is another one than at start")
        self._identity = identity

    async def close(self) -> None:
        """Close every connection; bounded, then hard."""
        if self._pool is None:
            return
        # Forgotten first: whoever asks for a connection from now on is refused, not kept waiting.
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
        except LOST_CONNECTION as error:
            raise Unavailable(f"{self._name}: no connection") from error
        try:
            yield connection
        except asyncpg.PostgresError as error:
            if error.sqlstate in _NOT_WRITABLE:
                _drop(connection)
            raise
        finally:
            # A connection that cannot be given back is closed; what it did is done.
            with contextlib.suppress(*LOST_CONNECTION, asyncpg.PostgresError):
                await pool.release(connection, timeout=RELEASE_TIMEOUT_S)

    @contextlib.asynccontextmanager
    async def transaction(
        self,
        *,
        tenant: str | None = None,
        lock_timeout_ms: int | None = None,
        snapshot: bool = False,
    ) -> AsyncIterator[Connection]:
        """Run the body in one transaction and commit it; roll back on any exception.

        `tenant` is what row-level security sees: a tenant id or `ALL_TENANTS`. With `snapshot` all
        its statements see what was committed when the first one began, and one that writes what
        another has written since is refused (`SerializationError`: run it again). Raises
        `CommitUnknown` when the answer to COMMIT is lost.
        """
        async with (
            self.connection() as connection,
            transaction_on(
                connection, tenant=tenant, lock_timeout_ms=lock_timeout_ms, snapshot=snapshot
            ),
        ):
            yield connection

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
                if not is_outage(error):
                    raise
                _log.warning("leased work interrupted", name=name, error=repr(error))
                await pause(stop, OUTAGE_PAUSE_S)


@contextlib.asynccontextmanager
async def transaction_on(
    connection: Connection,
    *,
    tenant: str | None = None,
    lock_timeout_ms: int | None = None,
    snapshot: bool = False,
) -> AsyncIterator[None]:
    """Run the body in a transaction on a connection that is already held."""
    callbacks: list[Callable[[], None]] = []
    token = _AFTER_COMMIT.set(callbacks)
    try:
        transaction = connection.transaction(isolation="repeatable_read" if snapshot else None)
        await transaction.start()
        try:
            if tenant is not None or lock_timeout_ms is not None:
                await _set_local(connection, tenant, lock_timeout_ms)
            yield
        except BaseException:
            # The cause matters, not that a dead connection cannot roll back.
            with contextlib.suppress(*LOST_CONNECTION, asyncpg.PostgresError):
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
    if isinstance(failure, LOST_CONNECTION):
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


_DATABASE_CLOCK = "select clock_timestamp()"


async def checked_now_ms(connection: Connection, clock: Clock = now_ms) -> int:
    """Read the time of day for a decision that stays; raises `ClockStep` when it cannot be right.

    Held against the clock of the server that keeps the decision, over the connection that writes.
    """
    read_ms = clock()
    check_clock(read_ms, await connection.fetchval(_DATABASE_CLOCK))
    return read_ms


def check_clock(read_ms: int, database_at: dt.datetime) -> None:
    """Refuse a reading that is too far from the server's clock, before or behind (`ClockStep`)."""
    step_ms = read_ms - ms_of(database_at)
    if abs(step_ms) > CLOCK_TOLERANCE_MS:
        # An error although the work is tried again: unlike other outages, this one is healed by
        # nobody but the operator, who has to find out which of the two clocks is wrong.
        _log.error("clock step: nothing is decided by this reading", step_ms=step_ms)
        raise ClockStep(
            f"the clock of this process is {step_ms} ms from that of the database; at most "
            f"{CLOCK_TOLERANCE_MS} ms are taken. Set the clock that is wrong; work goes on by "
            "itself as soon as they agree"
        )


_TRY_LEASE = "select pg_try_advisory_lock($1)"


async def _try_lease(connection: Connection, name: str) -> bool:
    """Take a lease if nobody has it; it is a lock of the session, so it ends with it."""
    return bool(await connection.fetchval(_TRY_LEASE, _lock_key(name)))


_END_LEASE = "select pg_advisory_unlock($1)"


async def _end_lease(connection: Connection, name: str) -> None:
    """Give a lease back, if need be with its connection."""
    try:
        await connection.fetchval(_END_LEASE, _lock_key(name))
    except (*LOST_CONNECTION, asyncpg.PostgresError):
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
