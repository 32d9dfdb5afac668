"""Questions about books: a balance, a hold, the trial balance, and everything for an audit. SQL.

Nothing is locked here. A balance and a hold are one query each, so that what they answer belongs
together. Whole rows come back as they are, for the functions of `books` that read them, and the
amounts are computed by the functions of the core that decide holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from hisab_contracts.ids import BucketId, HoldId
from hisab_contracts.units import moment_of, ms_of
from ledger.core.book import Book, BookedBucket, Lot, available_micro, hold_state, in_draw_order
from ledger.core.holds import Hold, HoldState
from ledger.store.books import (
    book_from_row,
    bucket_from_row,
    hold_from_row,
    load_accounts,
    load_lots,
    lot_from_row,
)

if TYPE_CHECKING:
    from runtime.database import Connection


class Balance(Struct, frozen=True):
    """A book's totals and open lots as of `seq`, and until when they are complete."""

    book: Book
    available_micro: int
    held_micro: int
    lots: tuple[Lot, ...]
    """Lots open now, in draw order."""
    complete_until_ms: int | None


# Reads a book with the lots that may count now, and how complete the tenant's partition is. A
# partition that has not heard of a hub yet has fewer hubs than there are: then nothing is complete.
_BALANCE = """
select b as book,
       array(select l from lots l
              where l.tenant_id = b.tenant_id
                and (l.remaining_micro > 0 or l.expires_at is null or l.expires_at > $2)) as lots,
       w.hubs, w.known, w.until
  from books b
  left join lateral (
    select count(*) filter (where partition = $3) as hubs, count(distinct hub) as known,
           case when bool_or(watermark_at is null) filter (where partition = $3) then null
                else min(watermark_at) filter (where partition = $3) end as until
      from hub_watermarks
  ) w on true
 where b.tenant_id = $1
"""


async def balance_of(
    connection: Connection, tenant_id: str, now_ms: int, partition: int
) -> Balance | None:
    """Read a balance as of now. `partition` is the tenant's: its charges come through no other.

    Complete until the lowest watermark of all hubs that have emitted anything; None while one of
    them has none, or has not yet been heard of in the tenant's partition.
    """
    row = await connection.fetchrow(_BALANCE, tenant_id, moment_of(now_ms), partition)
    if row is None:
        return None
    lots = in_draw_order(lot_from_row(lot) for lot in row["lots"])
    book = book_from_row(row["book"], lots, {})
    until = row["until"] if row["hubs"] == row["known"] else None
    return Balance(
        book=book,
        available_micro=available_micro(book, now_ms),
        held_micro=book.reserved_micro + sum(lot.reserved_micro for lot in lots),
        lots=tuple(lot for lot in lots if lot.expires_ms is None or lot.expires_ms > now_ms),
        complete_until_ms=None if until is None else ms_of(until),
    )


# Finds a hold, with the book and the lots that say what its tenant has available.
_HOLD = """
select h as hold, b as book,
       array(select l from lots l
              where l.tenant_id = h.tenant_id and l.remaining_micro > 0) as lots
  from holds h
  join books b on b.tenant_id = h.tenant_id
 where h.hold_id = $1
"""


async def hold_of(connection: Connection, hold_id: str, now_ms: int) -> HoldState | None:
    """Find a hold that this transaction may see."""
    row = await connection.fetchrow(_HOLD, hold_id)
    if row is None:
        return None
    book = book_from_row(row["book"], tuple(lot_from_row(lot) for lot in row["lots"]), {})
    return hold_state(book, hold_from_row(row["hold"]), now_ms)


class TrialBalance(Struct, frozen=True):
    """Every account by name without its id, summed over all books, and the latest instant."""

    accounts: dict[str, int]
    recorded_ms: int
    entries: int


# Sums every account over all books, by its name without its id.
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
    select 'lot', sum(remaining_micro) from lots
    union all
    select split_part(account, ':', 1), sum(balance_micro) from accounts group by 1
  ) sums
 group by account
 order by account
"""
# Says what those sums include.
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
    return TrialBalance(accounts, recorded_ms, entries)


# Reads every book, or all buckets or holds of one: for audits only.
_ALL_BOOKS = "select b as book from books b order by b.tenant_id"
_ALL_BUCKETS = "select b as bucket from buckets b where b.tenant_id = $1"
_ALL_HOLDS = "select h as hold from holds h where h.tenant_id = $1"


async def projected_books(connection: Connection) -> list[Book]:
    """Read every book as projected, whole, by id."""
    rows = [row["book"] for row in await connection.fetch(_ALL_BOOKS)]
    wanted = [row["tenant_id"] for row in rows]
    lots = await load_lots(connection, wanted, spent_lots=True)
    accounts = await load_accounts(connection, wanted, None)
    return [
        book_from_row(
            row,
            in_draw_order(lots.get(row["tenant_id"], ())),
            accounts.get(row["tenant_id"], {}),
        )
        for row in rows
    ]


async def projected_buckets(connection: Connection, tenant_id: str) -> dict[BucketId, BookedBucket]:
    """Read all buckets of a book as projected."""
    rows = await connection.fetch(_ALL_BUCKETS, tenant_id)
    buckets = [bucket_from_row(row["bucket"]) for row in rows]
    return {bucket.bucket_id: bucket for bucket in buckets}


async def projected_holds(connection: Connection, tenant_id: str) -> dict[HoldId, Hold]:
    """Read all holds of a book as projected."""
    rows = await connection.fetch(_ALL_HOLDS, tenant_id)
    holds = [hold_from_row(row["hold"]) for row in rows]
    return {hold.hold_id: hold for hold in holds}
