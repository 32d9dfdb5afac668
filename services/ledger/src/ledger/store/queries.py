"""Questions about books: a balance, a hold, the trial balance, and everything for an audit. SQL.

Nothing is locked here. A balance and a hold are one query each, so that what they answer belongs
together; what it comes to is computed by the core, as of now: what holds that are over still
reserve is read beside the book, place by place, and is free in every answer. An element of an
array comes without names: it is read by the order of its columns.

Columns are named, always: a query that asks for a table's row as a whole changes its type with the
next column that a `pre` migration adds, and fails once on every connection of the old code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec import Struct

from hisab_contracts.ids import BucketId, TenantId
from hisab_contracts.units import moment_of, ms_of, optional_ms_of
from ledger.core.balance import Balance, balance_at, complete_until
from ledger.core.book import Book, BookedBucket, hold_state
from ledger.core.expiry import book_at, hold_at
from ledger.core.holds import Hold, HoldState
from ledger.core.lots import in_draw_order
from ledger.store.accounts import load_accounts
from ledger.store.books import (
    BOOK_COLUMNS,
    SELECT_BOOK,
    SELECT_BUCKET,
    SELECT_LOT,
    book_from_row,
    bucket_from_row,
    load_lots,
    lot_from_values,
)
from ledger.store.holds import SELECT_HOLD, hold_from_row

if TYPE_CHECKING:
    from runtime.database import Connection


# What the holds of a book that are over still reserve, place by place: no more rows than it has
# lots, however many holds.
_OVER = """
       array(select o from (
               select place, sum(micro)::bigint as micro
                 from holds due cross join lateral unnest(due.places, due.reserved) r (place, micro)
                where due.tenant_id = books.tenant_id and due.ended is null and due.expires_at <= $2
                group by place) o) as over
"""

# The lots that may count now, and a watermark for each hub that any partition has heard of: null
# where the tenant's has not, or where the hub has stated none.
_BALANCE = (
    SELECT_BOOK
    + ", array(select l from ("
    + SELECT_LOT
    + """
         from lots
        where lots.tenant_id = books.tenant_id
          and (remaining_micro > 0 or expires_at is null or expires_at > $2)) l) as lots,
       array(select w.watermark_at
               from (select distinct hub from hub_watermarks) h
               left join hub_watermarks w on w.hub = h.hub and w.partition = $3
            ) as watermarks,
"""
    + _OVER
    + """
  from books
 where tenant_id = $1
"""
)


async def balance_of(
    connection: Connection, tenant_id: str, now_ms: int, partition: int
) -> Balance | None:
    """Read a balance as of now. `partition` is the tenant's: its charges come through no other."""
    row = await connection.fetchrow(_BALANCE, tenant_id, moment_of(now_ms), partition)
    if row is None:
        return None
    book = book_from_row(row, in_draw_order(map(lot_from_values, row["lots"])), {})
    until_ms = complete_until(optional_ms_of(at) for at in row["watermarks"])
    return balance_at(book_at(book, map(tuple, row["over"])), now_ms, complete_until_ms=until_ms)


# One query, so that what it answers belongs together.
_HOLD_WITH_BOOK = (
    SELECT_HOLD
    + ", "
    + BOOK_COLUMNS
    + ", array(select l from ("
    + SELECT_LOT
    + """
         from lots where lots.tenant_id = holds.tenant_id and remaining_micro > 0) l) as lots,
"""
    + _OVER
    + """
  from holds
  join books using (tenant_id)
 where hold_id = $1
"""
)


async def hold_of(connection: Connection, hold_id: str, now_ms: int) -> HoldState | None:
    """Find a hold that this transaction may see, and say how it and its tenant stand now."""
    row = await connection.fetchrow(_HOLD_WITH_BOOK, hold_id, moment_of(now_ms))
    if row is None:
        return None
    book = book_from_row(row, in_draw_order(map(lot_from_values, row["lots"])), {})
    hold = hold_at(hold_from_row(row), now_ms)
    return hold_state(book_at(book, map(tuple, row["over"])), hold, now_ms)


class TrialBalance(Struct, frozen=True, kw_only=True):
    """Every account by name without its id, summed over all books, and the latest instant."""

    accounts: dict[str, int]
    recorded_ms: int
    entries: int


# Added up in SQL, as nothing is decided and there is a row per book, lot and account.
_TRIAL_BALANCE = """
select account, sum(micro)::numeric as micro
  from (
    select 'usage' as account, sum(charged_micro) as micro from books
    union all
    select 'receivable', -sum(receivable_micro) from books
    union all
    select 'settled', -sum(settled_micro) from books
    union all
    select 'unfunded', -sum(unfunded_micro) from books
    union all
    select 'breakage', sum(breakage_micro) from books
    union all
    select 'lot', sum(remaining_micro) from lots
    union all
    select split_part(account, ':', 1), sum(balance_micro) from accounts group by 1
  ) sums
 group by account
 order by account
"""
# What those sums include.
_AS_OF = """
select coalesce(max(recorded_at), 'epoch') as recorded_at, coalesce(sum(seq), 0) as entries
  from books
"""


async def trial_balance(connection: Connection) -> TrialBalance:
    """Sum every account over all books; the sum of the sums is 0."""
    rows = await connection.fetch(_TRIAL_BALANCE)
    as_of = await connection.fetchrow(_AS_OF)
    accounts = {row["account"]: int(row["micro"] or 0) for row in rows}
    recorded_ms = 0 if as_of is None else ms_of(as_of["recorded_at"])
    entries = 0 if as_of is None else int(as_of["entries"])
    return TrialBalance(accounts=accounts, recorded_ms=recorded_ms, entries=entries)


_LOWEST: Final = BucketId("0" * 32)
"""Before every bucket."""

_SNAPSHOT = "set transaction isolation level repeatable read, read only"


async def take_snapshot(connection: Connection) -> None:
    """Have everything that this transaction reads be of one instant; nothing was read before."""
    await connection.execute(_SNAPSHOT)


_BOOK_IDS_AFTER = "select tenant_id from books where tenant_id > $1 order by tenant_id limit $2"
_BOOK = SELECT_BOOK + " from books where tenant_id = $1"
_BUCKETS_AFTER = (
    SELECT_BUCKET
    + """
  from buckets
 where tenant_id = $1 and (hour_at, bucket_id) > ($2, $3)
 order by hour_at, bucket_id
 limit $4
"""
)
_HOLDS_AFTER = (
    SELECT_HOLD + " from holds where tenant_id = $1 and hold_id > $2 order by hold_id limit $3"
)


async def book_ids_after(connection: Connection, after: str, limit: int) -> list[TenantId]:
    """Name books in the order of their ids, after one."""
    rows = await connection.fetch(_BOOK_IDS_AFTER, after, limit)
    return [TenantId(row["tenant_id"]) for row in rows]


async def projected_book(connection: Connection, tenant_id: TenantId) -> Book:
    """Read a book as projected, whole. It exists: books are never removed."""
    (row,) = await connection.fetch(_BOOK, tenant_id)
    lots = await load_lots(connection, [tenant_id], spent_lots=True)
    accounts = await load_accounts(connection, [tenant_id], None)
    return book_from_row(row, in_draw_order(lots.get(tenant_id, ())), accounts.get(tenant_id, {}))


async def buckets_after(
    connection: Connection, tenant_id: TenantId, after: BookedBucket | None, limit: int
) -> list[BookedBucket]:
    """Read buckets of a book as projected, in order of hour and id, after one."""
    hour_ms, bucket_id = (0, _LOWEST) if after is None else (after.hour_ms, after.bucket_id)
    rows = await connection.fetch(_BUCKETS_AFTER, tenant_id, moment_of(hour_ms), bucket_id, limit)
    return list(map(bucket_from_row, rows))


async def holds_after(
    connection: Connection, tenant_id: TenantId, after: str, limit: int
) -> list[Hold]:
    """Read holds of a book as projected, in order of their ids, after one."""
    return list(map(hold_from_row, await connection.fetch(_HOLDS_AFTER, tenant_id, after, limit)))
