"""SQL of what invoicing is told: entries, watermarks, tenants, and the state of months.

Entries are inserted whole batches at a time and never changed. `books` says, per tenant, up to
which seq there is no gap (`contiguous_seq`) and the highest seen; they differ only while a gap is
being fetched. Whoever moves a book on holds its row, so the consumer and the fetcher cannot miss
each other's entries.

`month_usage` holds the sums of the charges per (month, tenant, line). The statement that inserts
entries adds those that are new to it, so the sums are always those of the entries; what a month
needs is read from them, and costs what it has lines, however many charges there are.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from hisab_contracts.charges import OpenQuarantine, SourceBehind
from hisab_contracts.entries import EntryWatermark
from hisab_contracts.ids import HubCode, LegalEntityId, TenantId
from hisab_contracts.reference import TenantRecord
from invoicing.books import ForkedError, KeptCharge, KeptEntry, KeptMove, contiguous_after
from invoicing.periods import HubMark, MonthState
from invoicing.tax import TaxRow, rows_in_force, tax_point_on

if TYPE_CHECKING:
    from runtime.database import Connection

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)

# Entries.


_INSERT_ENTRIES = """
with kept as (
  insert into entries (tenant_id, seq, kind, entry_hash, period, hour_at, hub, sku, price_class,
                       used_gpu_ns, funded_micro, receivable_micro, unfunded_micro, document_id,
                       moved_micro)
  select n.tenant_id, n.seq, n.kind, n.entry_hash, n.period, n.hour_at, n.hub, n.sku,
         n.price_class, n.used_gpu_ns, n.funded_micro, n.receivable_micro, n.unfunded_micro,
         n.document_id, n.moved_micro
    from unnest($1::text[], $2::bigint[], $3::text[], $4::bytea[], $5::text[], $6::timestamptz[],
                $7::text[], $8::text[], $9::text[], $10::bigint[], $11::bigint[], $12::bigint[],
                $13::bigint[], $14::text[], $15::bigint[])
         as n (tenant_id, seq, kind, entry_hash, period, hour_at, hub, sku, price_class,
               used_gpu_ns, funded_micro, receivable_micro, unfunded_micro, document_id,
               moved_micro)
   order by n.tenant_id, n.seq
  on conflict (tenant_id, seq) do nothing
  returning tenant_id, seq, kind, period, hub, sku, price_class, used_gpu_ns, funded_micro,
            receivable_micro, unfunded_micro
), summed as (
  insert into month_usage as m (period, tenant_id, hub, sku, price_class, first_seq, last_seq,
                                used_gpu_ns, funded_micro, receivable_micro, unfunded_micro)
  select period, tenant_id, hub, sku, price_class, min(seq), max(seq), sum(used_gpu_ns),
         sum(funded_micro), sum(receivable_micro), sum(unfunded_micro)
    from kept
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
select count(*) from kept
"""


async def keep_entries(connection: Connection, entries: Sequence[KeptEntry]) -> None:
    """Insert entries, ignoring those that are here already; add to their sums, move books on.

    Raises `ForkedError` when one that is here already has another hash.
    """
    if not entries:
        return
    charges = [e.detail if isinstance(e.detail, KeptCharge) else None for e in entries]
    moves = [e.detail if isinstance(e.detail, KeptMove) else None for e in entries]
    usages = [charge.usage if charge else None for charge in charges]
    kept_count = await connection.fetchval(
        _INSERT_ENTRIES,
        [entry.tenant_id for entry in entries],
        [entry.seq for entry in entries],
        [entry.kind for entry in entries],
        [entry.entry_hash for entry in entries],
        [charge and charge.period for charge in charges],
        [_instant(charge.hour_ms) if charge else None for charge in charges],
        [usage and usage.hub for usage in usages],
        [usage and usage.sku for usage in usages],
        [usage and usage.price_class for usage in usages],
        [usage and usage.used_gpu_ns for usage in usages],
        [usage and usage.funded_micro for usage in usages],
        [usage and usage.receivable_micro for usage in usages],
        [usage and usage.unfunded_micro for usage in usages],
        [move and move.document_id for move in moves],
        [move and move.moved_micro for move in moves],
    )
    if kept_count != len(entries):
        await _refuse_forks(connection, entries)
    await _move_books_on(connection, entries)


_FORKED = """
select n.tenant_id, n.seq
  from unnest($1::text[], $2::bigint[], $3::bytea[]) as n (tenant_id, seq, entry_hash)
  join entries e on e.tenant_id = n.tenant_id and e.seq = n.seq
 where e.entry_hash <> n.entry_hash
 order by n.tenant_id, n.seq
 limit 1
"""


async def _refuse_forks(connection: Connection, entries: Sequence[KeptEntry]) -> None:
    row = await connection.fetchrow(
        _FORKED,
        [entry.tenant_id for entry in entries],
        [entry.seq for entry in entries],
        [entry.entry_hash for entry in entries],
    )
    if row is not None:
        raise ForkedError(f"entry {row['tenant_id']}.{row['seq']} came again with another hash")


_LOCK_BOOKS = """
select tenant_id, contiguous_seq, highest_seq
  from books
 where tenant_id = any($1::text[])
 order by tenant_id
   for update
"""
_SEQS_AFTER_GAP = """
select seq from entries where tenant_id = $1 and seq > $2 order by seq
"""
_STORE_BOOKS = """
insert into books as b (tenant_id, contiguous_seq, highest_seq)
select n.tenant_id, n.contiguous_seq, n.highest_seq
  from unnest($1::text[], $2::bigint[], $3::bigint[])
       as n (tenant_id, contiguous_seq, highest_seq)
 order by n.tenant_id
on conflict (tenant_id) do update
   set contiguous_seq = greatest(b.contiguous_seq, excluded.contiguous_seq),
       highest_seq = greatest(b.highest_seq, excluded.highest_seq)
"""


async def _move_books_on(connection: Connection, entries: Sequence[KeptEntry]) -> None:
    seqs: dict[str, list[int]] = {}
    for entry in entries:
        seqs.setdefault(entry.tenant_id, []).append(entry.seq)
    tenants = sorted(seqs)
    rows = await connection.fetch(_LOCK_BOOKS, tenants)
    known = {row["tenant_id"]: (row["contiguous_seq"], row["highest_seq"]) for row in rows}
    contiguous, highest = [], []
    for tenant in tenants:
        position, top = known.get(tenant, (0, 0))
        present = seqs[tenant]
        if position < top:
            stored = await connection.fetch(_SEQS_AFTER_GAP, tenant, position)
            present = [row["seq"] for row in stored]
        contiguous.append(contiguous_after(position, present))
        highest.append(max(top, *seqs[tenant]))
    await connection.execute(_STORE_BOOKS, tenants, contiguous, highest)


@dataclass(frozen=True, slots=True)
class Gap:
    """A book with entries missing: they are fetched from the ledger, after `contiguous_seq`."""

    tenant_id: TenantId
    contiguous_seq: int
    highest_seq: int


_GAPS = """
select tenant_id, contiguous_seq, highest_seq
  from books
 where contiguous_seq < highest_seq
 order by tenant_id
 limit 20
"""


async def gaps(connection: Connection) -> list[Gap]:
    """Return the first books that have a gap, in order of tenant."""
    rows = await connection.fetch(_GAPS)
    return [Gap(row["tenant_id"], row["contiguous_seq"], row["highest_seq"]) for row in rows]


# Watermarks and tenants.


_KEEP_WATERMARKS = """
insert into watermarks as w (partition, hub, revision, watermark_at, silent, quarantined, behind)
select n.partition, n.hub, n.revision, n.watermark_at, n.silent, n.quarantined, n.behind
  from unnest($1::int[], $2::text[], $3::bigint[], $4::timestamptz[], $5::boolean[], $6::jsonb[],
              $7::jsonb[])
       as n (partition, hub, revision, watermark_at, silent, quarantined, behind)
 order by n.partition, n.hub
on conflict (partition, hub) do update
   set revision = excluded.revision, watermark_at = excluded.watermark_at,
       silent = excluded.silent, quarantined = excluded.quarantined, behind = excluded.behind
 where excluded.revision > w.revision
"""


async def keep_watermarks(
    connection: Connection, marks: Sequence[tuple[int, EntryWatermark]]
) -> None:
    """Keep the newest watermark of each hub in each partition; an older revision is ignored."""
    newest: dict[tuple[int, HubCode], EntryWatermark] = {}
    for partition, mark in marks:
        known = newest.get((partition, mark.hub))
        if known is None or mark.revision > known.revision:
            newest[partition, mark.hub] = mark
    if not newest:
        return
    kept = list(newest.values())
    await connection.execute(
        _KEEP_WATERMARKS,
        [partition for partition, _ in newest],
        [mark.hub for mark in kept],
        [mark.revision for mark in kept],
        [None if mark.watermark_ms is None else _instant(mark.watermark_ms) for mark in kept],
        [mark.silent for mark in kept],
        [msgspec.json.encode(mark.quarantined).decode() for mark in kept],
        [msgspec.json.encode(mark.behind).decode() for mark in kept],
    )


_MARKS = """
select partition, hub, revision, watermark_at, silent, quarantined, behind
  from watermarks
 order by partition, hub
"""


async def marks(connection: Connection) -> tuple[HubMark, ...]:
    """Return the newest watermark of every hub in every partition."""
    return tuple(
        HubMark(
            partition=row["partition"],
            hub=row["hub"],
            revision=row["revision"],
            watermark_ms=None if row["watermark_at"] is None else _ms(row["watermark_at"]),
            silent=row["silent"],
            quarantined=msgspec.json.decode(row["quarantined"], type=tuple[OpenQuarantine, ...]),
            behind=msgspec.json.decode(row["behind"], type=tuple[SourceBehind, ...]),
        )
        for row in await connection.fetch(_MARKS)
    )


_KEEP_TENANTS = """
insert into tenants (tenant_id, kind, currency)
select n.tenant_id, n.kind, n.currency
  from unnest($1::text[], $2::text[], $3::text[]) as n (tenant_id, kind, currency)
 order by n.tenant_id
on conflict (tenant_id) do update set kind = excluded.kind, currency = excluded.currency
"""


async def keep_tenants(connection: Connection, records: Iterable[TenantRecord]) -> None:
    """Keep the newest record of each tenant (the last one given counts)."""
    newest = {record.tenant_id: record for record in records}
    await connection.execute(
        _KEEP_TENANTS,
        list(newest),
        [record.kind for record in newest.values()],
        [record.currency for record in newest.values()],
    )


# Who sells, and what tax.


@dataclass(frozen=True, slots=True)
class Seller:
    """A legal entity that issues invoices, and the series they are numbered in."""

    legal_entity_id: LegalEntityId
    name: str
    series: str


_SELLERS = "select legal_entity_id, name, series from legal_entities order by legal_entity_id"


async def sellers(connection: Connection) -> list[Seller]:
    """Return every legal entity, in order of id."""
    rows = await connection.fetch(_SELLERS)
    return [Seller(row["legal_entity_id"], row["name"], row["series"]) for row in rows]


_ADD_SELLER = """
insert into legal_entities (legal_entity_id, name, actor) values ($1, $2, $3)
on conflict (legal_entity_id) do nothing
"""


async def add_seller(
    connection: Connection, legal_entity_id: LegalEntityId, name: str, *, actor: str
) -> None:
    """Register a legal entity; one that exists stays as it is."""
    await connection.execute(_ADD_SELLER, legal_entity_id, name, actor)


_REGISTER_LOCK = "select pg_advisory_xact_lock(hashtextextended($1, 0))"


async def serialise_register(connection: Connection, register: str) -> None:
    """Let one transaction at a time add to a register whose rows are numbered or few."""
    await connection.fetchval(_REGISTER_LOCK, register)


_TAX_ROWS = """
select tax_version, hub, authority, tax_bps, valid_from, citation
  from tax_rates
 order by tax_version
"""


async def tax_rows(connection: Connection) -> list[TaxRow]:
    """Return the whole tax table, in the order it was recorded."""
    return [
        TaxRow(
            tax_version=row["tax_version"],
            hub=row["hub"],
            authority=row["authority"],
            tax_bps=row["tax_bps"],
            valid_from=row["valid_from"],
            citation=row["citation"],
        )
        for row in await connection.fetch(_TAX_ROWS)
    ]


_ADD_TAX_ROW = """
insert into tax_rates (tax_version, hub, authority, tax_bps, valid_from, citation, actor)
values ($1, $2, $3, $4, $5, $6, $7)
"""


async def add_tax_row(connection: Connection, row: TaxRow, *, actor: str) -> None:
    """Record a tax row under the next number (the caller holds the register)."""
    await connection.execute(
        _ADD_TAX_ROW,
        row.tax_version,
        row.hub,
        row.authority,
        row.tax_bps,
        row.valid_from,
        row.citation,
        actor,
    )


# The state of a month.


_KNOWN_TENANTS = "select tenant_id from tenants where tenant_id = any($1::text[])"


async def known_tenants(connection: Connection, tenants: Iterable[TenantId]) -> frozenset[TenantId]:
    """Return those of these tenants whom the ledger has told us about."""
    rows = await connection.fetch(_KNOWN_TENANTS, sorted(set(tenants)))
    return frozenset(row["tenant_id"] for row in rows)


_UNKNOWN_TENANTS = """
select distinct m.tenant_id
  from month_usage m
 where m.period = $1 and not exists (select from tenants t where t.tenant_id = m.tenant_id)
 order by m.tenant_id
 limit 100
"""


async def unknown_tenants(connection: Connection, month: str) -> tuple[TenantId, ...]:
    """Return tenants with charges in a month of whom nothing has been said."""
    rows = await connection.fetch(_UNKNOWN_TENANTS, month)
    return tuple(row["tenant_id"] for row in rows)


_BILLED_HUBS = """
select distinct m.hub
  from month_usage m
  join tenants t on t.tenant_id = m.tenant_id and t.kind = 'commercial'
 where m.period = $1
 order by m.hub
"""


async def billed_hubs(connection: Connection, month: str) -> tuple[HubCode, ...]:
    """Return the hubs at which commercial tenants used something in a month."""
    rows = await connection.fetch(_BILLED_HUBS, month)
    return tuple(row["hub"] for row in rows)


async def month_state(connection: Connection, month: str, partitions: int) -> MonthState:
    """Read all that decides whether a month may be closed."""
    at_on = tax_point_on(month)
    known_marks = await marks(connection)
    waiting = {item.tenant_id for mark in known_marks for item in mark.quarantined}
    rows = await tax_rows(connection)
    return MonthState(
        month=month,
        partitions=partitions,
        marks=known_marks,
        quarantined_tenants=await known_tenants(connection, waiting),
        broken_books=tuple(gap.tenant_id for gap in await gaps(connection)),
        unknown_tenants=await unknown_tenants(connection, month),
        taxed_hubs=frozenset(rows_in_force(rows, at_on, len(rows))),
        billed_hubs=await billed_hubs(connection, month),
        tax_point_on=at_on,
        has_seller=bool(await sellers(connection)),
    )


def _instant(instant_ms: int) -> dt.datetime:
    return _EPOCH + dt.timedelta(milliseconds=instant_ms)


def _ms(moment: dt.datetime) -> int:
    return (moment - _EPOCH) // dt.timedelta(milliseconds=1)
