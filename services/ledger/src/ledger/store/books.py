"""Books and entries in PostgreSQL: lock and load, decide in memory, append. SQL lives here.

Theory. A transaction opens the books it needs (`open_books`: their rows locked in id order, so that
two transactions never wait for each other in a circle), loads the buckets and holds its commands
speak of, decides them one after another in memory (`OpenBooks.enter`) and writes everything once
(`OpenBooks.save`): one insert of entries and one write per projection, however many commands there
were. Nothing here decides about money; `decisions` does.

Whoever holds a book's row is the only one who appends to it: `seq` has no gap, `recorded_at` never
falls and the hash chain has one head.

A book is opened as far as a command needs it: the lots with anything left (the spent ones too when
a total went down) and the accounts it names. So a book of many years is as quick as a new one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from hisab_contracts.charges import BucketTotal
from hisab_contracts.entries import GENESIS_HASH, Entry
from hisab_contracts.ids import AllocationId, BucketId, GrantId, HoldId, ProgrammeId, TenantId
from ledger.book import Book, Bucket, Page, evolve
from ledger.decisions import Command, Refusal, decide
from ledger.feed import insert_entries, moment_of, ms_of, pg_array
from ledger.grants import Lot, in_draw_order
from ledger.holds import Hold

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection


AllocationKey = tuple[str, str, str]
"""(tenant, hub, allocation): a hub numbers its allocations by itself, two may use one id."""


class OpenBooks:
    """Books held by this transaction, and all that was decided on them so far."""

    def __init__(self, books: Mapping[str, Book]) -> None:
        self.books = dict(books)
        self.buckets: dict[tuple[str, str], Bucket] = {}
        self.holds: dict[tuple[str, str], Hold] = {}
        self.waiting: dict[AllocationKey, list[str]] = {}
        """Open holds by the allocation whose final ends them."""
        self.entries: list[Entry] = []
        self._traces: list[str | None] = []
        self._touched_buckets: set[tuple[str, str]] = set()
        self._touched_holds: set[tuple[str, str]] = set()
        self._lots_before = {tenant: book.lots for tenant, book in books.items()}

    def enter(
        self,
        tenant_id: str,
        command: Command,
        now_ms: int,
        *,
        bucket_id: str = "",
        hold_id: str | None = None,
        trace_id: str | None = None,
    ) -> tuple[Entry, ...] | Refusal:
        """Decide a command on a book as it stands now, and fold what it enters."""
        bucket_key, hold_key = (tenant_id, bucket_id), (tenant_id, hold_id or "")
        page = Page(self.books[tenant_id], self.buckets.get(bucket_key), self.holds.get(hold_key))
        decided = decide(page, command, now_ms)
        if not isinstance(decided, tuple):
            return decided
        for entry in decided:
            page = evolve(page, entry)
            self.entries.append(entry)
            self._traces.append(trace_id)
        if decided:
            self.books[tenant_id] = page.book
            if page.bucket is not None:
                self.buckets[bucket_key] = page.bucket
                self._touched_buckets.add(bucket_key)
            if page.hold is not None:
                self.holds[hold_key] = page.hold
                self._touched_holds.add(hold_key)
        return decided

    async def save(self, connection: Connection) -> None:
        """Write entries and projections; nothing when nothing was entered."""
        if not self.entries:
            return
        changed = {entry.tenant_id for entry in self.entries}
        books = [self.books[tenant] for tenant in sorted(changed)]
        await insert_entries(connection, self.entries, self._traces)
        await _update_books(connection, books)
        await _upsert_lots(connection, self._changed_lots(books))
        buckets = [(key[0], self.buckets[key]) for key in self._touched_buckets]
        await _upsert_buckets(connection, buckets)
        holds = [(key[0], self.holds[key]) for key in self._touched_holds]
        await _update_holds(connection, holds)
        accounts = [
            (book.tenant_id, account, micro)
            for book in books
            for account, micro in book.accounts.items()
        ]
        await _upsert_accounts(connection, accounts)

    def _changed_lots(self, books: Iterable[Book]) -> list[tuple[str, Lot]]:
        changed: list[tuple[str, Lot]] = []
        for book in books:
            before = self._lots_before[book.tenant_id]
            if book.lots is not before:
                known = set(before)
                changed += [(book.tenant_id, lot) for lot in book.lots if lot not in known]
        return changed


_LOCK_BOOKS = """
select tenant_id, kind, currency, credit_limit_micro, seq, head_hash, recorded_at, charged_micro,
       funded_micro, receivable_micro, invoiced_micro, settled_micro, unfunded_micro, reserved_micro
  from books
 where tenant_id = any($1::text[])
 order by tenant_id
   for no key update
"""


async def open_books(
    connection: Connection,
    tenant_ids: Iterable[str],
    *,
    spent_lots: bool = False,
    accounts: Collection[str] = (),
) -> OpenBooks:
    """Lock these books in id order and load them. Books that do not exist are left out.

    `accounts` are those beside usage, lots, receivable and unfunded that entries will move.
    """
    wanted = sorted(set(tenant_ids))
    rows = await connection.fetch(_LOCK_BOOKS, wanted)
    lots = await _load_lots(connection, wanted, spent_lots=spent_lots)
    named = await _load_accounts(connection, wanted, accounts) if accounts else {}
    books = {}
    for row in rows:
        tenant_id = row["tenant_id"]
        books[tenant_id] = book_from_row(
            row, in_draw_order(lots.get(tenant_id, ())), named.get(tenant_id, {})
        )
    return OpenBooks(books)


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
        lots=lots,
        accounts=accounts,
    )


_LOAD_LOTS = """
select tenant_id, grant_id, programme_id, priority, effective_at, expires_at, granted_micro,
       remaining_micro, reserved_micro
  from lots
 where tenant_id = any($1::text[])
   and ($2 or remaining_micro > 0)
"""


async def _load_lots(
    connection: Connection, tenant_ids: Sequence[str], *, spent_lots: bool
) -> dict[str, list[Lot]]:
    found: dict[str, list[Lot]] = {}
    for row in await connection.fetch(_LOAD_LOTS, tenant_ids, spent_lots):
        found.setdefault(row["tenant_id"], []).append(lot_from_row(row))
    return found


def lot_from_row(row: Row) -> Lot:
    """Read one lot."""
    expires_at = row["expires_at"]
    return Lot(
        grant_id=GrantId(row["grant_id"]),
        programme_id=ProgrammeId(row["programme_id"]),
        priority=row["priority"],
        effective_ms=ms_of(row["effective_at"]),
        expires_ms=None if expires_at is None else ms_of(expires_at),
        granted_micro=row["granted_micro"],
        remaining_micro=row["remaining_micro"],
        reserved_micro=row["reserved_micro"],
    )


_LOAD_ACCOUNTS = """
select tenant_id, account, balance_micro
  from accounts
 where tenant_id = any($1::text[]) and ($2::text[] is null or account = any($2::text[]))
"""


async def _load_accounts(
    connection: Connection, tenant_ids: Sequence[str], accounts: Collection[str] | None
) -> dict[str, dict[str, int]]:
    """Read these accounts of these books, or all of them."""
    named = None if accounts is None else list(accounts)
    found: dict[str, dict[str, int]] = {}
    for row in await connection.fetch(_LOAD_ACCOUNTS, tenant_ids, named):
        found.setdefault(row["tenant_id"], {})[row["account"]] = row["balance_micro"]
    return found


_LOAD_BUCKETS = """
select b.tenant_id, b.hour_at, b.bucket_id, b.revision, b.gpu_ns, b.charged_micro, b.accounts,
       b.draws
  from unnest($1::text[], $2::timestamptz[], $3::uuid[]) as n (tenant_id, hour_at, bucket_id)
  join buckets b
    on b.tenant_id = n.tenant_id and b.hour_at = n.hour_at and b.bucket_id = n.bucket_id
"""


async def load_buckets(
    connection: Connection, totals: Iterable[BucketTotal]
) -> dict[tuple[str, str], Bucket]:
    """Load what was booked of these buckets; those never booked are left out."""
    wanted = {(total.tenant_id, total.bucket_id): total.hour_ms for total in totals}
    rows = await connection.fetch(
        _LOAD_BUCKETS,
        [tenant for tenant, _ in wanted],
        [moment_of(hour_ms) for hour_ms in wanted.values()],
        [bucket for _, bucket in wanted],
    )
    return {(row["tenant_id"], row["bucket_id"].hex): _bucket_from_row(row) for row in rows}


def _bucket_from_row(row: Row) -> Bucket:
    return Bucket(
        bucket_id=BucketId(row["bucket_id"].hex),
        hour_ms=ms_of(row["hour_at"]),
        revision=row["revision"],
        gpu_ns=row["gpu_ns"],
        charged_micro=row["charged_micro"],
        draws=tuple(zip(row["accounts"], row["draws"], strict=True)),
    )


_LOAD_HOLDS = """
select h.tenant_id, h.hold_id, h.hold_micro, h.allocation_id, h.expires_at, h.ended, h.places,
       h.reserved
  from unnest($1::text[], $2::text[]) as n (tenant_id, hold_id)
  join holds h on h.tenant_id = n.tenant_id and h.hold_id = n.hold_id
"""


async def load_holds(
    connection: Connection, named: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], Hold]:
    """Load holds by (tenant, hold); unknown ones are left out."""
    wanted = sorted(set(named))
    if not wanted:
        return {}
    tenants, holds = [tenant for tenant, _ in wanted], [hold for _, hold in wanted]
    rows = await connection.fetch(_LOAD_HOLDS, tenants, holds)
    return {(row["tenant_id"], row["hold_id"]): _hold_from_row(row) for row in rows}


_LOAD_HOLDS_OF_ALLOCATIONS = """
select h.tenant_id, h.hub, h.hold_id, h.hold_micro, h.allocation_id, h.expires_at, h.ended,
       h.places, h.reserved
  from unnest($1::text[], $2::text[], $3::text[]) as n (tenant_id, hub, allocation_id)
  join holds h
    on h.tenant_id = n.tenant_id and h.hub = n.hub and h.allocation_id = n.allocation_id
   and h.ended is null
 order by h.tenant_id, h.hold_id
"""


async def load_holds_of_allocations(
    connection: Connection, allocations: Iterable[AllocationKey]
) -> dict[AllocationKey, list[Hold]]:
    """Load the open holds that wait for the final of one of these allocations."""
    wanted = sorted(set(allocations))
    if not wanted:
        return {}
    rows = await connection.fetch(
        _LOAD_HOLDS_OF_ALLOCATIONS,
        [tenant for tenant, _, _ in wanted],
        [hub for _, hub, _ in wanted],
        [allocation for _, _, allocation in wanted],
    )
    found: dict[AllocationKey, list[Hold]] = {}
    for row in rows:
        key = row["tenant_id"], row["hub"], row["allocation_id"]
        found.setdefault(key, []).append(_hold_from_row(row))
    return found


_EXPIRED_HOLDS = """
select tenant_id, hold_id from holds where ended is null and expires_at <= $1
 order by expires_at limit $2
"""


async def expired_holds(
    connection: Connection, now_ms: int, limit: int
) -> list[tuple[TenantId, HoldId]]:
    """Name open holds whose time has come, the oldest first. Lock their books before acting."""
    rows = await connection.fetch(_EXPIRED_HOLDS, moment_of(now_ms), limit)
    return [(TenantId(row["tenant_id"]), HoldId(row["hold_id"])) for row in rows]


def _hold_from_row(row: Row) -> Hold:
    allocation_id = row["allocation_id"]
    return Hold(
        hold_id=HoldId(row["hold_id"]),
        hold_micro=row["hold_micro"],
        allocation_id=None if allocation_id is None else AllocationId(allocation_id),
        expires_ms=ms_of(row["expires_at"]),
        end=row["ended"],
        reserved=tuple(zip(row["places"], row["reserved"], strict=True)),
    )


_ALL_BOOKS = """
select tenant_id, kind, currency, credit_limit_micro, seq, head_hash, recorded_at, charged_micro,
       funded_micro, receivable_micro, invoiced_micro, settled_micro, unfunded_micro, reserved_micro
  from books
 order by tenant_id
"""


async def projected_books(connection: Connection) -> dict[str, Book]:
    """Read every book as projected, whole. For audits: nothing is locked."""
    rows = await connection.fetch(_ALL_BOOKS)
    wanted = [row["tenant_id"] for row in rows]
    lots = await _load_lots(connection, wanted, spent_lots=True)
    accounts = await _load_accounts(connection, wanted, None)
    return {
        row["tenant_id"]: book_from_row(
            row,
            in_draw_order(lots.get(row["tenant_id"], ())),
            accounts.get(row["tenant_id"], {}),
        )
        for row in rows
    }


_ALL_BUCKETS = """
select tenant_id, hour_at, bucket_id, revision, gpu_ns, charged_micro, accounts, draws
  from buckets
 where tenant_id = $1
"""


async def every_bucket(connection: Connection, tenant_id: str) -> dict[BucketId, Bucket]:
    """Read all buckets of a book, for an audit."""
    rows = await connection.fetch(_ALL_BUCKETS, tenant_id)
    return {BucketId(row["bucket_id"].hex): _bucket_from_row(row) for row in rows}


_ALL_HOLDS = """
select tenant_id, hold_id, hold_micro, allocation_id, expires_at, ended, places, reserved
  from holds
 where tenant_id = $1
"""


async def every_hold(connection: Connection, tenant_id: str) -> dict[HoldId, Hold]:
    """Read all holds of a book, for an audit."""
    rows = await connection.fetch(_ALL_HOLDS, tenant_id)
    return {HoldId(row["hold_id"]): _hold_from_row(row) for row in rows}


_OPEN_BOOK = """
insert into books (tenant_id, kind, currency, credit_limit_micro, seq, head_hash, recorded_at,
                   charged_micro, funded_micro, receivable_micro, invoiced_micro, settled_micro,
                   unfunded_micro, reserved_micro)
values ($1, $2, $3, $4, 0, $5, 'epoch', 0, 0, 0, 0, 0, 0, 0)
"""


async def open_new_book(connection: Connection, book: Book) -> None:
    """Make the row of a book without entries."""
    await connection.execute(
        _OPEN_BOOK,
        book.tenant_id,
        book.kind,
        book.currency,
        book.credit_limit_micro,
        bytes.fromhex(GENESIS_HASH),
    )


_UPDATE_BOOKS = """
update books b
   set seq = n.seq, head_hash = n.head_hash, recorded_at = n.recorded_at,
       charged_micro = n.charged_micro, funded_micro = n.funded_micro,
       receivable_micro = n.receivable_micro, invoiced_micro = n.invoiced_micro,
       settled_micro = n.settled_micro, unfunded_micro = n.unfunded_micro,
       reserved_micro = n.reserved_micro
  from unnest($1::text[], $2::bigint[], $3::bytea[], $4::timestamptz[], $5::bigint[], $6::bigint[],
              $7::bigint[], $8::bigint[], $9::bigint[], $10::bigint[], $11::bigint[])
       as n (tenant_id, seq, head_hash, recorded_at, charged_micro, funded_micro, receivable_micro,
             invoiced_micro, settled_micro, unfunded_micro, reserved_micro)
 where b.tenant_id = n.tenant_id
"""


async def _update_books(connection: Connection, books: Sequence[Book]) -> None:
    await connection.execute(
        _UPDATE_BOOKS,
        [book.tenant_id for book in books],
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
    )


_UPSERT_LOTS = """
insert into lots (tenant_id, grant_id, programme_id, priority, effective_at, expires_at,
                  granted_micro, remaining_micro, reserved_micro)
select n.tenant_id, n.grant_id, n.programme_id, n.priority, n.effective_at, n.expires_at,
       n.granted_micro, n.remaining_micro, n.reserved_micro
  from unnest($1::text[], $2::text[], $3::text[], $4::int[], $5::timestamptz[], $6::timestamptz[],
              $7::bigint[], $8::bigint[], $9::bigint[])
       as n (tenant_id, grant_id, programme_id, priority, effective_at, expires_at, granted_micro,
             remaining_micro, reserved_micro)
on conflict (tenant_id, grant_id) do update
   set remaining_micro = excluded.remaining_micro, reserved_micro = excluded.reserved_micro
"""


async def _upsert_lots(connection: Connection, lots: Sequence[tuple[str, Lot]]) -> None:
    """Write lots that are new or have changed; a lot's terms never change."""
    if not lots:
        return
    await connection.execute(
        _UPSERT_LOTS,
        [tenant for tenant, _ in lots],
        [lot.grant_id for _, lot in lots],
        [lot.programme_id for _, lot in lots],
        [lot.priority for _, lot in lots],
        [moment_of(lot.effective_ms) for _, lot in lots],
        [None if lot.expires_ms is None else moment_of(lot.expires_ms) for _, lot in lots],
        [lot.granted_micro for _, lot in lots],
        [lot.remaining_micro for _, lot in lots],
        [lot.reserved_micro for _, lot in lots],
    )


_UPSERT_BUCKETS = """
insert into buckets (tenant_id, hour_at, bucket_id, revision, gpu_ns, charged_micro, accounts,
                     draws)
select n.tenant_id, n.hour_at, n.bucket_id, n.revision, n.gpu_ns, n.charged_micro,
       n.accounts::text[], n.draws::bigint[]
  from unnest($1::text[], $2::timestamptz[], $3::uuid[], $4::bigint[], $5::bigint[], $6::bigint[],
              $7::text[], $8::text[])
       as n (tenant_id, hour_at, bucket_id, revision, gpu_ns, charged_micro, accounts, draws)
on conflict (tenant_id, hour_at, bucket_id) do update
   set revision = excluded.revision, gpu_ns = excluded.gpu_ns,
       charged_micro = excluded.charged_micro, accounts = excluded.accounts, draws = excluded.draws
"""


async def _upsert_buckets(connection: Connection, buckets: Sequence[tuple[str, Bucket]]) -> None:
    if not buckets:
        return
    await connection.execute(
        _UPSERT_BUCKETS,
        [tenant for tenant, _ in buckets],
        [moment_of(bucket.hour_ms) for _, bucket in buckets],
        [bucket.bucket_id for _, bucket in buckets],
        [bucket.revision for _, bucket in buckets],
        [bucket.gpu_ns for _, bucket in buckets],
        [bucket.charged_micro for _, bucket in buckets],
        [pg_array(account for account, _ in bucket.draws) for _, bucket in buckets],
        [pg_array(str(micro) for _, micro in bucket.draws) for _, bucket in buckets],
    )


_UPDATE_HOLDS = """
update holds h set ended = n.ended, places = n.places::text[], reserved = n.reserved::bigint[]
  from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[])
       as n (tenant_id, hold_id, ended, places, reserved)
 where h.tenant_id = n.tenant_id and h.hold_id = n.hold_id
"""


async def _update_holds(connection: Connection, holds: Sequence[tuple[str, Hold]]) -> None:
    """Write what holds still reserve. A placed hold's row is made before its entry (`registry`)."""
    if not holds:
        return
    await connection.execute(
        _UPDATE_HOLDS,
        [tenant for tenant, _ in holds],
        [hold.hold_id for _, hold in holds],
        [hold.end for _, hold in holds],
        [pg_array(place for place, _ in hold.reserved) for _, hold in holds],
        [pg_array(str(micro) for _, micro in hold.reserved) for _, hold in holds],
    )


_UPSERT_ACCOUNTS = """
insert into accounts (tenant_id, account, balance_micro)
select * from unnest($1::text[], $2::text[], $3::bigint[])
on conflict (tenant_id, account) do update set balance_micro = excluded.balance_micro
"""


async def _upsert_accounts(
    connection: Connection, accounts: Sequence[tuple[str, str, int]]
) -> None:
    if not accounts:
        return
    await connection.execute(
        _UPSERT_ACCOUNTS,
        [tenant for tenant, _, _ in accounts],
        [account for _, account, _ in accounts],
        [micro for _, _, micro in accounts],
    )
