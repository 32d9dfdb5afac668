"""SQL of what `ledger.entries.v1` says: entries, summed by month and line, and watermarks.

Entries are inserted whole batches at a time and never changed. An entry is named by (tenant, seq),
so one that comes again is recognised; one that comes again with *another hash* means that the
ledger has told two histories, and everything must stop (`ForkedError`).

`books` says, per tenant, up to which seq there is no gap (`contiguous_seq`) and the highest seen;
they differ only while a gap is being fetched. Whoever moves a book on holds its row, so the
consumer and the fetcher cannot miss each other's entries.

`month_usage` holds the sums of the charges per (month, tenant, line). The statement that inserts
entries adds those that are new to it, so the sums are always those of the entries; what a month
needs is read from them, and costs what it has lines, however many charges there are.

Watermarks stand beside the entries, because they come among them: one that is here says that all
entries before it in its partition are here as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from hisab_contracts.charges import OpenQuarantine, ReconcileResult, SourceBehind
from hisab_contracts.entries import EntryWatermark
from hisab_contracts.ids import HubCode, TenantId
from hisab_contracts.units import moment_of, optional_moment_of, optional_ms_of
from invoicing.core.billing import BilledCharge, BookEntry, InvoicedReceivable, RatedUsage
from invoicing.core.document import InvoiceFacts
from invoicing.core.periods import PartitionWatermark

if TYPE_CHECKING:
    import asyncpg

    from runtime.database import Connection

CHARGES_AT_ONCE: Final = 5_000
"""How many single charges a recomputation reads in one statement."""

SEQS_AT_ONCE: Final = 1_000
"""How many seqs behind a gap are looked at in one statement: while one is open, a book may hold any
number of later entries."""


class ForkedError(Exception):
    """An entry came again with another content: the ledger's history was changed behind us."""


_ENTRY_COLUMNS = """tenant_id, seq, kind, entry_hash, period, hour_at, hub, sku, price_class,
  used_gpu_ns, funded_micro, receivable_micro, unfunded_micro, document_id, moved_micro"""
_USAGE_COLUMNS = """hub, sku, price_class, used_gpu_ns, funded_micro, receivable_micro,
  unfunded_micro"""


def _columns_of(entries: Sequence[BookEntry]) -> tuple[list[object], ...]:
    """Return the values of `_ENTRY_COLUMNS`, a list per column."""
    charges = [e.detail if isinstance(e.detail, BilledCharge) else None for e in entries]
    documents = [e.detail if isinstance(e.detail, InvoicedReceivable) else None for e in entries]
    usages = [charge.usage if charge else None for charge in charges]
    return (
        [entry.tenant_id for entry in entries],
        [entry.seq for entry in entries],
        [entry.kind for entry in entries],
        [entry.entry_hash for entry in entries],
        [charge and charge.period for charge in charges],
        [moment_of(charge.hour_ms) if charge else None for charge in charges],
        [usage and usage.hub for usage in usages],
        [usage and usage.sku for usage in usages],
        [usage and usage.price_class for usage in usages],
        [usage and usage.used_gpu_ns for usage in usages],
        [usage and usage.funded_micro for usage in usages],
        [usage and usage.receivable_micro for usage in usages],
        [usage and usage.unfunded_micro for usage in usages],
        [document and document.document_id for document in documents],
        [document and document.moved_micro for document in documents],
    )


def _usage_from_row(row: asyncpg.Record) -> RatedUsage:
    return RatedUsage(
        hub=row["hub"],
        sku=row["sku"],
        price_class=row["price_class"],
        used_gpu_ns=row["used_gpu_ns"],
        funded_micro=row["funded_micro"],
        receivable_micro=row["receivable_micro"],
        unfunded_micro=row["unfunded_micro"],
    )


# Entries as they come.


# One statement, so that an entry and its part of the month's sums are there together or not at all,
# and an entry that was here already (`do nothing` returns no row for it) is not summed again.
_APPEND_ENTRIES = (
    "with appended as (insert into entries ("
    + _ENTRY_COLUMNS
    + ") select "
    + _ENTRY_COLUMNS
    + """
    from unnest($1::text[], $2::bigint[], $3::text[], $4::bytea[], $5::text[], $6::timestamptz[],
                $7::text[], $8::text[], $9::text[], $10::bigint[], $11::bigint[], $12::bigint[],
                $13::bigint[], $14::text[], $15::bigint[]) as n ("""
    + _ENTRY_COLUMNS
    + """)
   order by tenant_id, seq
  on conflict (tenant_id, seq) do nothing
  returning tenant_id, seq, kind, period, """
    + _USAGE_COLUMNS
    + """
), summed as (
  insert into month_usage as m (period, tenant_id, first_seq, last_seq, hub, sku, price_class,
                                used_gpu_ns, funded_micro, receivable_micro, unfunded_micro)
  select period, tenant_id, min(seq), max(seq), hub, sku, price_class, sum(used_gpu_ns),
         sum(funded_micro), sum(receivable_micro), sum(unfunded_micro)
    from appended
   where kind = 'charge'
   group by period, tenant_id, hub, sku, price_class
   order by period, tenant_id, hub, sku, price_class
  on conflict (period, tenant_id, hub, sku, price_class) do update
     set first_seq = least(m.first_seq, excluded.first_seq),
         last_seq = greatest(m.last_seq, excluded.last_seq),
         used_gpu_ns = m.used_gpu_ns + excluded.used_gpu_ns,
         funded_micro = m.funded_micro + excluded.funded_micro,
         receivable_micro = m.receivable_micro + excluded.receivable_micro,
         unfunded_micro = m.unfunded_micro + excluded.unfunded_micro
)
select count(*) from appended
"""
)


async def append_entries(connection: Connection, entries: Sequence[BookEntry]) -> None:
    """Insert entries, ignoring those that are here already; add to their sums, move books on.

    Raises `ForkedError` when one that is here already has another hash.
    """
    if not entries:
        return
    appended_count = await connection.fetchval(_APPEND_ENTRIES, *_columns_of(entries))
    if appended_count != len(entries):
        await _refuse_forks(connection, entries)
    await _move_books_on(connection, entries)


# The first entry that is here with another hash than it comes with now.
_FORKED = """
select n.tenant_id, n.seq
  from unnest($1::text[], $2::bigint[], $3::bytea[]) as n (tenant_id, seq, entry_hash)
  join entries e on e.tenant_id = n.tenant_id and e.seq = n.seq
 where e.entry_hash <> n.entry_hash
 order by n.tenant_id, n.seq
 limit 1
"""


async def _refuse_forks(connection: Connection, entries: Sequence[BookEntry]) -> None:
    row = await connection.fetchrow(
        _FORKED,
        [entry.tenant_id for entry in entries],
        [entry.seq for entry in entries],
        [entry.entry_hash for entry in entries],
    )
    if row is not None:
        raise ForkedError(f"entry {row['tenant_id']}.{row['seq']} came again with another hash")


# Books: how far each is here.


@dataclass(frozen=True, slots=True)
class BookGap:
    """A book with entries missing: they are fetched from the ledger, after `contiguous_seq`."""

    tenant_id: TenantId
    contiguous_seq: int
    highest_seq: int


_BOOK_COLUMNS = "tenant_id, contiguous_seq, highest_seq"


def _gap_from_row(row: asyncpg.Record) -> BookGap:
    return BookGap(
        tenant_id=row["tenant_id"],
        contiguous_seq=row["contiguous_seq"],
        highest_seq=row["highest_seq"],
    )


# In order of tenant, as everybody locks books: two batches with the same tenants cannot deadlock.
_LOCK_BOOKS = (
    "select "
    + _BOOK_COLUMNS
    + " from books where tenant_id = any($1::text[]) order by tenant_id for update"
)
_SEQS_AFTER = """
select seq from entries where tenant_id = $1 and seq > $2 order by seq limit $3
"""
# `greatest`: of two who made a book's first row at once neither held it, so the later one must not
# take the book back.
_STORE_BOOKS = (
    "insert into books as b ("
    + _BOOK_COLUMNS
    + ") select "
    + _BOOK_COLUMNS
    + " from unnest($1::text[], $2::bigint[], $3::bigint[]) as n ("
    + _BOOK_COLUMNS
    + """) order by tenant_id
on conflict (tenant_id) do update
   set contiguous_seq = greatest(b.contiguous_seq, excluded.contiguous_seq),
       highest_seq = greatest(b.highest_seq, excluded.highest_seq)
"""
)


async def _move_books_on(connection: Connection, entries: Sequence[BookEntry]) -> None:
    """Move each book's position to the end of what is here without a gap."""
    seqs: dict[TenantId, list[int]] = {}
    for entry in entries:
        seqs.setdefault(entry.tenant_id, []).append(entry.seq)
    tenants = sorted(seqs)
    books = [_gap_from_row(row) for row in await connection.fetch(_LOCK_BOOKS, tenants)]
    by_tenant = {book.tenant_id: book for book in books}
    contiguous, highest = [], []
    for tenant in tenants:
        book = by_tenant.get(tenant) or BookGap(tenant, contiguous_seq=0, highest_seq=0)
        position = contiguous_after(book.contiguous_seq, seqs[tenant])
        if book.contiguous_seq < book.highest_seq:
            # The batch may close a gap before entries that came earlier: they count as well.
            position = await _contiguous_after(connection, tenant, book.contiguous_seq)
        contiguous.append(position)
        highest.append(max(book.highest_seq, *seqs[tenant]))
    await connection.execute(_STORE_BOOKS, tenants, contiguous, highest)


async def _contiguous_after(connection: Connection, tenant_id: TenantId, position: int) -> int:
    """Move a position on over what is here, reading no further than one statement past a gap."""
    while True:
        rows = await connection.fetch(_SEQS_AFTER, tenant_id, position, SEQS_AT_ONCE)
        moved = contiguous_after(position, [row["seq"] for row in rows])
        if moved < position + SEQS_AT_ONCE:
            return moved
        position = moved


def contiguous_after(position: int, seqs: Collection[int]) -> int:
    """Return the last seq up to which a book has no gap: `position`, moved on by what is there."""
    present = frozenset(seqs)
    while position + 1 in present:
        position += 1
    return position


# The next books that have a gap, by an index that holds only these. Books of programmes (their ids
# begin with a slash) bill nobody: what is missing of them holds up no month.
_GAPS = (
    "select "
    + _BOOK_COLUMNS
    + """
  from books
 where contiguous_seq < highest_seq and tenant_id > $1 and not starts_with(tenant_id, '/')
 order by tenant_id
 limit 20
"""
)


async def gaps(connection: Connection, after: str = "") -> list[BookGap]:
    """Return the next tenants' books that have a gap, in order of tenant; at most 20."""
    return [_gap_from_row(row) for row in await connection.fetch(_GAPS, after)]


# Watermarks.


_WATERMARK_COLUMNS = (
    "partition, hub, revision, watermark_at, silent, quarantined, behind, reconciled"
)


def _watermark_from_row(row: asyncpg.Record) -> PartitionWatermark:
    return PartitionWatermark(
        partition=row["partition"],
        hub=row["hub"],
        revision=row["revision"],
        watermark_ms=optional_ms_of(row["watermark_at"]),
        silent=row["silent"],
        quarantined=msgspec.json.decode(row["quarantined"], type=tuple[OpenQuarantine, ...]),
        behind=msgspec.json.decode(row["behind"], type=tuple[SourceBehind, ...]),
        reconciled=None
        if row["reconciled"] is None
        else msgspec.json.decode(row["reconciled"], type=ReconcileResult),
    )


# A watermark with an older revision is ignored: a partition that is read again brings it again.
_STORE_WATERMARKS = (
    "insert into watermarks as w ("
    + _WATERMARK_COLUMNS
    + ") select "
    + _WATERMARK_COLUMNS
    + """
  from unnest($1::int[], $2::text[], $3::bigint[], $4::timestamptz[], $5::boolean[], $6::jsonb[],
              $7::jsonb[], $8::jsonb[]) as n ("""
    + _WATERMARK_COLUMNS
    + """)
 order by partition, hub
on conflict (partition, hub) do update
   set revision = excluded.revision, watermark_at = excluded.watermark_at,
       silent = excluded.silent, quarantined = excluded.quarantined, behind = excluded.behind,
       reconciled = excluded.reconciled
 where excluded.revision > w.revision
"""
)


async def store_watermarks(
    connection: Connection, watermarks: Sequence[tuple[int, EntryWatermark]]
) -> None:
    """Keep the newest watermark of each hub in each partition; an older revision is ignored."""
    newest: dict[tuple[int, HubCode], EntryWatermark] = {}
    for partition, watermark in watermarks:
        known = newest.get((partition, watermark.hub))
        if known is None or watermark.revision > known.revision:
            newest[partition, watermark.hub] = watermark
    if not newest:
        return
    marks = list(newest.values())
    await connection.execute(
        _STORE_WATERMARKS,
        [partition for partition, _ in newest],
        [mark.hub for mark in marks],
        [mark.revision for mark in marks],
        [optional_moment_of(mark.watermark_ms) for mark in marks],
        [mark.silent for mark in marks],
        [msgspec.json.encode(mark.quarantined).decode() for mark in marks],
        [msgspec.json.encode(mark.behind).decode() for mark in marks],
        [
            None if mark.reconciled is None else msgspec.json.encode(mark.reconciled).decode()
            for mark in marks
        ],
    )


# Of what waits in quarantine only the month's: each watermark may list thousands of others.
_MONTH_WATERMARKS = """
select partition, hub, revision, watermark_at, silent, behind, reconciled,
       jsonb_path_query_array(quarantined, '$[*] ? (@.month == $month)',
                              jsonb_build_object('month', $1::text)) as quarantined
  from watermarks
 order by partition, hub
"""


async def month_watermarks(connection: Connection, period: str) -> tuple[PartitionWatermark, ...]:
    """Return the newest watermark of every hub in every partition, and what it says of a month."""
    rows = await connection.fetch(_MONTH_WATERMARKS, period)
    return tuple(_watermark_from_row(row) for row in rows)


# Without what they list: whoever asks how far hubs are asks often.
_PLAIN_WATERMARKS = """
select partition, hub, revision, watermark_at, silent, '[]'::jsonb as quarantined,
       '[]'::jsonb as behind, reconciled
  from watermarks
 order by partition, hub
"""


async def plain_watermarks(connection: Connection) -> tuple[PartitionWatermark, ...]:
    """Return the newest watermark of every hub in every partition, without what it lists."""
    return tuple(_watermark_from_row(row) for row in await connection.fetch(_PLAIN_WATERMARKS))


# What a month's charges come to.


@dataclass(frozen=True, slots=True)
class MonthUsage:
    """A tenant's charges of a month up to a position, summed per line."""

    first_seq: int
    usage: tuple[RatedUsage, ...]


# The month's sums of each book without what came after its bill's position: so only late usage is
# read charge by charge, and only of lines that have any (`m.last_seq > b.last_seq`).
_USAGE_SUMS = """
select m.tenant_id, m.hub, m.sku, m.price_class, m.first_seq,
       m.used_gpu_ns - late.used_gpu_ns as used_gpu_ns,
       m.funded_micro - late.funded_micro as funded_micro,
       m.receivable_micro - late.receivable_micro as receivable_micro,
       m.unfunded_micro - late.unfunded_micro as unfunded_micro
  from unnest($2::text[], $3::bigint[]) as b (tenant_id, last_seq)
  join month_usage m on m.period = $1 and m.tenant_id = b.tenant_id and m.first_seq <= b.last_seq
 cross join lateral (
       select coalesce(sum(e.used_gpu_ns), 0) as used_gpu_ns,
              coalesce(sum(e.funded_micro), 0) as funded_micro,
              coalesce(sum(e.receivable_micro), 0) as receivable_micro,
              coalesce(sum(e.unfunded_micro), 0) as unfunded_micro
         from entries e
        where m.last_seq > b.last_seq
          and e.tenant_id = m.tenant_id and e.kind = 'charge' and e.period = $1
          and e.seq > b.last_seq
          and e.hub = m.hub and e.sku = m.sku and e.price_class = m.price_class) as late
 order by m.tenant_id, m.hub, m.sku, m.price_class
"""


async def usage_sums(
    connection: Connection, period: str, bills: Sequence[InvoiceFacts]
) -> Mapping[TenantId, MonthUsage]:
    """Sum the charges of these bills: the month's, up to each book's position."""
    rows = await connection.fetch(
        _USAGE_SUMS, period, [bill.tenant_id for bill in bills], [bill.last_seq for bill in bills]
    )
    sums: dict[TenantId, MonthUsage] = {}
    for row in rows:
        usage = _usage_from_row(row)
        known = sums.get(row["tenant_id"])
        sums[row["tenant_id"]] = (
            MonthUsage(row["first_seq"], (usage,))
            if known is None
            else MonthUsage(min(known.first_seq, row["first_seq"]), (*known.usage, usage))
        )
    return sums


# The single charges that a bill was made of, in order, some thousands at a time.
_CHARGES = (
    "select seq, "
    + _USAGE_COLUMNS
    + """
  from entries
 where tenant_id = $1 and kind = 'charge' and period = $2 and seq > $3 and seq <= $4
 order by seq
 limit $5
"""
)


async def charges(
    connection: Connection, facts: InvoiceFacts, after_seq: int
) -> tuple[list[RatedUsage], int]:
    """Return the next single charges a bill was made of, and the seq of the last of them."""
    rows = await connection.fetch(
        _CHARGES, facts.tenant_id, facts.period, after_seq, facts.last_seq, CHARGES_AT_ONCE
    )
    return [_usage_from_row(row) for row in rows], rows[-1]["seq"] if rows else after_seq
