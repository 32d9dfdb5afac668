"""Books in PostgreSQL: lock and load, let the core decide, save. Nothing is decided here.

Theory. A transaction opens the books it needs (`open_books`, `open_for_charges`, `open_expired`):
their rows locked in id order, so that two transactions never wait for each other in a circle, with
the buckets and holds that its commands speak of and the holds that are due. What comes back is a
`UnitOfWork` of the core, which decides the commands one after another in memory. `save` writes
everything once: one insert of entries and one write per projection, however many commands there
were.

The clock is read once, after the locks, so that entries carry the time at which they were decided,
and held against the server's: a reading that cannot be right decides nothing (`ClockStep`).

Whoever holds a book's row is the only one who appends to it: `seq` has no gap, `recorded_at` never
falls and the hash chain has one head.

A book is opened as far as a command needs it: the lots with anything left (the spent ones too when
a total may go down, the expired ones when usage of their windows comes) and the accounts it names.
So a book of many years is as quick as a new one.

Each table has one list of columns, one function that reads a row and one that writes rows as
arrays. Arrays inside a row travel as array literals, because `unnest` flattens arrays of arrays.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from hisab_contracts.charges import AllocationFinal, BucketTotal
from hisab_contracts.entries import GrantScope
from hisab_contracts.ids import (
    BucketId,
    GrantId,
    ProgrammeId,
    TenantId,
)
from hisab_contracts.units import moment_of, ms_of, optional_moment_of, optional_ms_of
from ledger.core.book import Book, BookedBucket
from ledger.core.charges import may_return_credit
from ledger.core.decisions import BookChanges, UnitOfWork
from ledger.core.lots import Lot, in_draw_order
from ledger.store.accounts import load_accounts, upsert_accounts
from ledger.store.completeness import complete_until_of
from ledger.store.entries import insert_entries, pg_array
from ledger.store.holds import (
    find_due,
    insert_holds,
    load_due,
    load_holds,
    load_holds_of_allocations,
    load_holds_on,
    update_holds,
)
from runtime.database import checked_now_ms

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.clock import Clock
    from runtime.database import Connection

BOOK_COLUMNS: Final = """
tenant_id, kind, currency, credit_limit_micro, seq, head_hash, recorded_at, charged_micro,
funded_micro, receivable_micro, invoiced_micro, settled_micro, unfunded_micro, reserved_micro,
breakage_micro, is_suspended
"""
_LOT_COLUMNS: Final = """
tenant_id, grant_id, programme_id, priority, effective_at, expires_at, granted_micro,
remaining_micro, reserved_micro, scope, coverage_bps, expired_micro, reclaimed_micro
"""
_LOT_NAMES: Final = tuple(name.strip() for name in _LOT_COLUMNS.split(","))
_BUCKET_SCALARS: Final = (
    "tenant_id, hour_at, bucket_id, revision, gpu_ns, charged_micro, refunded_micro"
)
_BUCKET_COLUMNS: Final = _BUCKET_SCALARS + ", accounts, draws"
SELECT_BOOK: Final = "select " + BOOK_COLUMNS
SELECT_LOT: Final = "select " + _LOT_COLUMNS
SELECT_BUCKET: Final = "select " + _BUCKET_COLUMNS


async def open_books(
    connection: Connection,
    book_ids: Iterable[str],
    clock: Clock,
    *,
    accounts: Collection[str] = (),
    hold_ids: Iterable[tuple[str, str]] = (),
    spent_lots: bool = False,
    complete_until_ms: Mapping[str, int | None] | None = None,
) -> UnitOfWork:
    """Lock these books and load them for commands. Books and holds that do not exist are left out.

    `accounts` are those that entries will move beside lots and the totals of a book; `hold_ids` are
    (tenant, hold). `complete_until_ms` by tenant, where a command is decided by it.
    """
    wanted = sorted(set(book_ids))
    rows = await _lock_books(connection, wanted)
    now_ms, due = await load_due(connection, wanted, clock)
    lots = await load_lots(connection, wanted, spent_lots=spent_lots)
    named = await load_accounts(connection, wanted, accounts) if accounts else {}
    loaded = await load_holds(connection, hold_ids)
    return UnitOfWork(
        _books_of(rows, lots, named),
        now_ms,
        holds=loaded,
        due=due,
        complete_until_ms=complete_until_ms,
    )


async def open_to_expire_lots(
    connection: Connection, complete_until_ms: Mapping[str, int | None], clock: Clock
) -> UnitOfWork:
    """Lock these tenants' books, and load them for their lots to expire, with who reserves there.

    Until when a tenant's usage is complete only ever rises but where a hub is new, so what was read
    before the locks holds.
    """
    wanted = sorted(complete_until_ms)
    rows = await _lock_books(connection, wanted)
    now_ms, due = await load_due(connection, wanted, clock)
    lots = await load_lots(connection, wanted, spent_lots=False)
    closing = [
        lot.account
        for tenant_id, of_tenant in lots.items()
        for lot in of_tenant
        if lot.reserved_micro and lot.is_closed_for_good(complete_until_ms[tenant_id])
    ]
    placed = await load_holds_on(connection, wanted, closing) if closing else {}
    return UnitOfWork(
        _books_of(rows, lots, {}),
        now_ms,
        holds={key: hold for key, (hold, _) in placed.items()},
        due=due,
        terms={key: terms for key, (_, terms) in placed.items()},
        complete_until_ms=complete_until_ms,
    )


async def open_expired(connection: Connection, clock: Clock, limit: int) -> UnitOfWork | None:
    """Lock books with holds that are over, and load the first `limit` of these; None: none is."""
    # Looked for without locks, so that a look that finds nothing disturbs nobody. The core asks
    # again, by another reading, once the books are locked (`release_expired`).
    found = await find_due(connection, clock(), limit)
    if not found:
        return None
    wanted = sorted({tenant_id for tenant_id, _ in found})
    rows = await _lock_books(connection, wanted)
    now_ms = await checked_now_ms(connection, clock)
    lots = await load_lots(connection, wanted, spent_lots=False)
    return UnitOfWork(_books_of(rows, lots, {}), now_ms, holds=await load_holds(connection, found))


async def open_for_charges(
    connection: Connection,
    totals: Sequence[BucketTotal],
    finals: Sequence[AllocationFinal],
    clock: Clock,
    partitions: Mapping[str, int],
) -> UnitOfWork:
    """Lock and load all that a batch of charges speaks of: books first, then what they protect.

    `partitions` says through which partition each tenant's charges come.
    """
    wanted = sorted({total.tenant_id for total in totals} | {final.tenant_id for final in finals})
    if not wanted:
        # Nothing can be entered, so no time is needed either.
        return UnitOfWork({}, 0)
    rows = await _lock_books(connection, wanted)
    # Everything below is read after the locks: nobody can change it before this transaction ends.
    now_ms, due = await load_due(connection, wanted, clock)
    buckets = await load_buckets(
        connection, {(total.tenant_id, total.bucket_id): total.hour_ms for total in totals}
    )
    spent_lots = any(
        may_return_credit(total, buckets.get((total.tenant_id, total.bucket_id)))
        for total in totals
    )
    first_hour_ms = min((total.hour_ms for total in totals), default=None)
    lots = await load_lots(connection, wanted, spent_lots=spent_lots, used_from_ms=first_hour_ms)
    complete_until_ms: dict[str, int | None] = {}
    if spent_lots or any(lot.expired_micro for of_tenant in lots.values() for lot in of_tenant):
        # Only what returns can return to a lot whose window is complete: to a spent one, or within
        # this batch to one that it was taken back from.
        found = await complete_until_of(connection, set(partitions.values()))
        complete_until_ms = {tenant_id: found[of] for tenant_id, of in partitions.items()}
    loaded = await load_holds(
        connection,
        [(total.tenant_id, total.hold_id) for total in totals if total.hold_id is not None],
    )
    of_allocations = await load_holds_of_allocations(connection, finals)
    for (tenant_id, _, _), ending in of_allocations.items():
        loaded |= {(tenant_id, hold.hold_id): hold for hold in ending}
    return UnitOfWork(
        _books_of(rows, lots, {}),
        now_ms,
        buckets=buckets,
        holds=loaded,
        due=due,
        complete_until_ms=complete_until_ms,
        holds_of_allocations={
            allocation: [hold.hold_id for hold in ending]
            for allocation, ending in of_allocations.items()
        },
    )


async def lock_whole_books(connection: Connection, book_ids: Iterable[str]) -> dict[str, Book]:
    """Lock these books and load all of their lots and accounts; those that do not exist are out."""
    wanted = sorted(set(book_ids))
    rows = await _lock_books(connection, wanted)
    lots = await load_lots(connection, wanted, spent_lots=True)
    return _books_of(rows, lots, await load_accounts(connection, wanted, None))


async def save(connection: Connection, changes: BookChanges) -> None:
    """Write what a unit of work has changed; nothing when nothing was entered."""
    if not changes.entries:
        return
    await _update_books(connection, changes.books)
    if changes.lots:
        await _upsert_lots(connection, changes.lots)
    if changes.buckets:
        await _upsert_buckets(connection, changes.buckets)
    if changes.placed:
        await insert_holds(connection, changes.placed)
    if changes.holds:
        await update_holds(connection, changes.holds)
    if changes.accounts:
        await upsert_accounts(connection, changes.accounts)
    await insert_entries(connection, changes.entries, changes.traces)


# Books.

# Locks books for appending. In id order, always: the order is what keeps deadlocks away.
_LOCK_BOOKS = (
    SELECT_BOOK
    + " from books where tenant_id = any($1::text[]) order by tenant_id for no key update"
)
# The columns of books as arrays, for both statements that write them.
_BOOK_ARRAYS = (
    """
  from unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bytea[],
              $7::timestamptz[], $8::bigint[], $9::bigint[], $10::bigint[], $11::bigint[],
              $12::bigint[], $13::bigint[], $14::bigint[], $15::bigint[], $16::boolean[]) as n ("""
    + BOOK_COLUMNS
    + ")"
)
_INSERT_BOOK = "insert into books (" + BOOK_COLUMNS + ") select " + BOOK_COLUMNS + _BOOK_ARRAYS
# Kind and currency of a book never change.
_UPDATE_BOOKS = (
    """
update books b
   set seq = n.seq, head_hash = n.head_hash, recorded_at = n.recorded_at,
       credit_limit_micro = n.credit_limit_micro,
       charged_micro = n.charged_micro, funded_micro = n.funded_micro,
       receivable_micro = n.receivable_micro, invoiced_micro = n.invoiced_micro,
       settled_micro = n.settled_micro, unfunded_micro = n.unfunded_micro,
       reserved_micro = n.reserved_micro, breakage_micro = n.breakage_micro,
       is_suspended = n.is_suspended
"""
    + _BOOK_ARRAYS
    + " where b.tenant_id = n.tenant_id"
)


async def _lock_books(connection: Connection, book_ids: Sequence[str]) -> Sequence[Row]:
    return await connection.fetch(_LOCK_BOOKS, book_ids)


async def insert_book(connection: Connection, book: Book) -> None:
    """Open a book without entries."""
    await connection.execute(_INSERT_BOOK, *_columns_of_books([book]))


_IS_SUSPENDED = "select is_suspended from books where tenant_id = $1"


async def is_suspended(connection: Connection, tenant_id: str) -> bool:
    """Say whether no new job of a tenant is admitted now; whoever admits one asks again, locked."""
    return bool(await connection.fetchval(_IS_SUSPENDED, tenant_id))


async def _update_books(connection: Connection, books: Sequence[Book]) -> None:
    await connection.execute(_UPDATE_BOOKS, *_columns_of_books(books))


def book_from_row(row: Row, lots: tuple[Lot, ...], accounts: Mapping[str, int]) -> Book:
    """Read one book, with the lots and accounts that were loaded of it."""
    return Book(
        tenant_id=TenantId(row["tenant_id"]),
        kind=row["kind"],
        currency=row["currency"],
        credit_limit_micro=row["credit_limit_micro"],
        seq=row["seq"],
        head_hash=row["head_hash"].hex(),
        recorded_ms=ms_of(row["recorded_at"]),
        charged_micro=row["charged_micro"],
        funded_micro=row["funded_micro"],
        receivable_micro=row["receivable_micro"],
        invoiced_micro=row["invoiced_micro"],
        settled_micro=row["settled_micro"],
        unfunded_micro=row["unfunded_micro"],
        reserved_micro=row["reserved_micro"],
        breakage_micro=row["breakage_micro"],
        is_suspended=row["is_suspended"],
        lots=lots,
        accounts=accounts,
    )


def _books_of(
    rows: Iterable[Row],
    lots: Mapping[str, Sequence[Lot]],
    accounts: Mapping[str, Mapping[str, int]],
) -> dict[str, Book]:
    return {
        row["tenant_id"]: book_from_row(
            row, in_draw_order(lots.get(row["tenant_id"], ())), accounts.get(row["tenant_id"], {})
        )
        for row in rows
    }


def _columns_of_books(books: Sequence[Book]) -> tuple[list[object], ...]:
    return (
        [book.tenant_id for book in books],
        [book.kind for book in books],
        [book.currency for book in books],
        [book.credit_limit_micro for book in books],
        [book.seq for book in books],
        [bytes.fromhex(book.head_hash) for book in books],
        [moment_of(book.recorded_ms) for book in books],
        [book.charged_micro for book in books],
        [book.funded_micro for book in books],
        [book.receivable_micro for book in books],
        [book.invoiced_micro for book in books],
        [book.settled_micro for book in books],
        [book.unfunded_micro for book in books],
        [book.reserved_micro for book in books],
        [book.breakage_micro for book in books],
        [book.is_suspended for book in books],
    )


# Lots.

# Those that can still give something; those that have expired and of whose windows usage comes; or
# all where credit may come back to a spent one (`may_return_credit` decides).
_LOAD_LOTS = (
    SELECT_LOT
    + """
  from lots
 where tenant_id = any($1::text[])
   and ($2 or remaining_micro > 0 or expired_micro > 0 and expires_at > $3)
"""
)
# Of a lot's terms only its end changes, when the grant is revoked; what was granted falls to 0 when
# the grant is reversed.
_UPSERT_LOTS = (
    "insert into lots ("
    + _LOT_COLUMNS
    + ") select "
    + _LOT_COLUMNS
    + """
  from unnest($1::text[], $2::text[], $3::text[], $4::int[], $5::timestamptz[], $6::timestamptz[],
              $7::bigint[], $8::bigint[], $9::bigint[], $10::jsonb[], $11::int[], $12::bigint[],
              $13::bigint[]) as n ("""
    + _LOT_COLUMNS
    + """)
on conflict (tenant_id, grant_id) do update
   set granted_micro = excluded.granted_micro, remaining_micro = excluded.remaining_micro,
       reserved_micro = excluded.reserved_micro, expired_micro = excluded.expired_micro,
       reclaimed_micro = excluded.reclaimed_micro, expires_at = excluded.expires_at
"""
)


class LotOver(NamedTuple):
    """A lot whose window has ended, in the order in which windows end."""

    expires_at: dt.datetime
    tenant_id: TenantId
    grant_id: GrantId


FIRST_LOT: Final = LotOver(moment_of(0), TenantId(""), GrantId(""))
"""Before every lot."""
# Looked for without locks; the core asks again once their books are locked (`expire_lots`).
_FIND_LOTS_OVER = """
select expires_at, tenant_id, grant_id from lots
 where remaining_micro > 0 and expires_at <= $1 and (expires_at, tenant_id, grant_id) > ($2, $3, $4)
 order by expires_at, tenant_id, grant_id limit $5
"""


async def find_lots_over(
    connection: Connection, until_ms: int, after: LotOver, limit: int
) -> list[LotOver]:
    """Name lots with something left whose windows ended until an instant, in order, after one."""
    rows = await connection.fetch(_FIND_LOTS_OVER, moment_of(until_ms), *after, limit)
    return [LotOver(*row) for row in rows]


async def load_lots(
    connection: Connection,
    tenant_ids: Sequence[str],
    *,
    spent_lots: bool,
    used_from_ms: int | None = None,
) -> dict[str, list[Lot]]:
    """Load the lots of books, in no order; for usage from an instant on also what had expired."""
    found: dict[str, list[Lot]] = {}
    used_from = optional_moment_of(used_from_ms)
    for row in await connection.fetch(_LOAD_LOTS, tenant_ids, spent_lots, used_from):
        found.setdefault(row["tenant_id"], []).append(lot_from_row(row))
    return found


def lot_from_values(values: tuple[object, ...]) -> Lot:
    """Read one lot that came as an element of an array: its columns in order, without names."""
    return lot_from_row(dict(zip(_LOT_NAMES, values, strict=True)))


def lot_from_row(row: Row | Mapping[str, Any]) -> Lot:
    """Read one lot."""
    return Lot(
        grant_id=GrantId(row["grant_id"]),
        programme_id=ProgrammeId(row["programme_id"]),
        priority=row["priority"],
        effective_ms=ms_of(row["effective_at"]),
        expires_ms=optional_ms_of(row["expires_at"]),
        granted_micro=row["granted_micro"],
        remaining_micro=row["remaining_micro"],
        reserved_micro=row["reserved_micro"],
        scope=scope_from_json(row["scope"]),
        coverage_bps=row["coverage_bps"],
        expired_micro=row["expired_micro"],
        reclaimed_micro=row["reclaimed_micro"],
    )


def scope_from_json(text: str | None) -> GrantScope | None:
    """Read what a grant may be used for; null is everything."""
    return None if text is None else msgspec.json.decode(text, type=GrantScope)


def scope_as_json(scope: GrantScope | None) -> str | None:
    """Write what a grant may be used for; null is everything."""
    return None if scope is None else msgspec.json.encode(scope).decode()


async def _upsert_lots(connection: Connection, lots: Sequence[tuple[str, Lot]]) -> None:
    await connection.execute(
        _UPSERT_LOTS,
        [tenant_id for tenant_id, _ in lots],
        [lot.grant_id for _, lot in lots],
        [lot.programme_id for _, lot in lots],
        [lot.priority for _, lot in lots],
        [moment_of(lot.effective_ms) for _, lot in lots],
        [optional_moment_of(lot.expires_ms) for _, lot in lots],
        [lot.granted_micro for _, lot in lots],
        [lot.remaining_micro for _, lot in lots],
        [lot.reserved_micro for _, lot in lots],
        [scope_as_json(lot.scope) for _, lot in lots],
        [lot.coverage_bps for _, lot in lots],
        [lot.expired_micro for _, lot in lots],
        [lot.reclaimed_micro for _, lot in lots],
    )


# Buckets.

# The hour is part of the key, so that it stays local.
_LOAD_BUCKETS = (
    SELECT_BUCKET
    + """
  from unnest($1::text[], $2::timestamptz[], $3::uuid[]) as n (of_tenant, of_hour, of_bucket)
  join buckets b
    on b.tenant_id = n.of_tenant and b.hour_at = n.of_hour and b.bucket_id = n.of_bucket
"""
)
# Writes what has been booked of buckets now, and who paid.
_UPSERT_BUCKETS = (
    "insert into buckets ("
    + _BUCKET_COLUMNS
    + ") select "
    + _BUCKET_SCALARS
    + """, accounts::text[], draws::bigint[]
  from unnest($1::text[], $2::timestamptz[], $3::uuid[], $4::bigint[], $5::bigint[], $6::bigint[],
              $7::bigint[], $8::text[], $9::text[]) as n ("""
    + _BUCKET_COLUMNS
    + """)
on conflict (tenant_id, hour_at, bucket_id) do update
   set revision = excluded.revision, gpu_ns = excluded.gpu_ns,
       charged_micro = excluded.charged_micro, refunded_micro = excluded.refunded_micro,
       accounts = excluded.accounts, draws = excluded.draws
"""
)


async def load_buckets(
    connection: Connection, wanted: Mapping[tuple[str, str], int]
) -> dict[tuple[str, str], BookedBucket]:
    """Load what was booked of buckets, by (tenant, bucket); `wanted` has the hour of each."""
    rows = await connection.fetch(
        _LOAD_BUCKETS,
        [tenant_id for tenant_id, _ in wanted],
        [moment_of(hour_ms) for hour_ms in wanted.values()],
        [bucket_id for _, bucket_id in wanted],
    )
    return {(row["tenant_id"], row["bucket_id"].hex): bucket_from_row(row) for row in rows}


def bucket_from_row(row: Row) -> BookedBucket:
    """Read what was booked of one bucket."""
    return BookedBucket(
        bucket_id=BucketId(row["bucket_id"].hex),
        hour_ms=ms_of(row["hour_at"]),
        revision=row["revision"],
        gpu_ns=row["gpu_ns"],
        charged_micro=row["charged_micro"],
        refunded_micro=row["refunded_micro"],
        draws=tuple(zip(row["accounts"], row["draws"], strict=True)),
    )


async def _upsert_buckets(
    connection: Connection, buckets: Sequence[tuple[str, BookedBucket]]
) -> None:
    await connection.execute(
        _UPSERT_BUCKETS,
        [tenant_id for tenant_id, _ in buckets],
        [moment_of(bucket.hour_ms) for _, bucket in buckets],
        [bucket.bucket_id for _, bucket in buckets],
        [bucket.revision for _, bucket in buckets],
        [bucket.gpu_ns for _, bucket in buckets],
        [bucket.charged_micro for _, bucket in buckets],
        [bucket.refunded_micro for _, bucket in buckets],
        [pg_array(account for account, _ in bucket.draws) for _, bucket in buckets],
        [pg_array(str(micro) for _, micro in bucket.draws) for _, bucket in buckets],
    )
