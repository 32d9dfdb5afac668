"""SQL of what is asked about invoices: lists, documents, PDFs, reruns and the reconciliation."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from invoicing.billing import MonthFacts, RatedUsage, ReceivableFacts
from invoicing.document import Content, Facts, State, read_content
from invoicing.tax import tax_point_on

if TYPE_CHECKING:
    from runtime.database import Connection

ENTRIES_AT_ONCE = 5_000


class Waiting(msgspec.Struct, frozen=True):
    """A step that a numbered invoice still waits for."""

    step: str
    attempts: int
    reason: str | None


@dataclass(frozen=True, slots=True)
class StoredInvoice:
    """An invoice and how far its processing is."""

    content: Content
    content_sha256: str
    state: State
    waiting_for: tuple[Waiting, ...]
    pdf_sha256: str | None
    updated_at: dt.datetime


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which invoices a list asks for; None asks for all."""

    period: str | None
    tenant_id: str | None
    state: State | None
    updated_from: dt.datetime | None
    invoice_id: str | None
    after: tuple[str, str, str] | None
    """The (period, legal entity, tenant) of the last one already seen."""
    limit: int


_INVOICES = """
select i.content, i.content_sha256, p.pdf_sha256, s.waiting,
       greatest(i.finalised_at, s.done_at) as updated_at
  from invoices i
  left join invoice_pdfs p on p.invoice_id = i.invoice_id
 cross join lateral (
       select max(o.done_at) as done_at,
              coalesce(jsonb_agg(jsonb_build_object('step', o.step, 'attempts', o.attempts,
                                                    'reason', o.reason) order by o.step)
                         filter (where o.done_at is null), '[]') as waiting
         from invoice_steps o where o.invoice_id = i.invoice_id) as s
 where ($1::text is null or i.period = $1)
   and ($2::text is null or i.tenant_id = $2)
   and ($3::text is null or $3 = case when s.waiting = '[]' then 'finalised' else 'finalising' end)
   and ($4::timestamptz is null or greatest(i.finalised_at, s.done_at) >= $4)
   and ($5::text is null or i.invoice_id = $5)
   and ($6::text is null or (i.period, i.legal_entity_id, i.tenant_id) > ($6, $7, $8))
 order by i.period, i.legal_entity_id, i.tenant_id
 limit $9
"""


async def invoices(connection: Connection, wanted: Wanted) -> list[StoredInvoice]:
    """Return invoices in order of (period, legal entity, tenant)."""
    after: Sequence[str | None] = wanted.after or (None, None, None)
    rows = await connection.fetch(
        _INVOICES,
        wanted.period,
        wanted.tenant_id,
        wanted.state,
        wanted.updated_from,
        wanted.invoice_id,
        *after,
        wanted.limit,
    )
    found = []
    for row in rows:
        waiting_for = msgspec.json.decode(row["waiting"], type=tuple[Waiting, ...])
        found.append(
            StoredInvoice(
                content=read_content(row["content"]),
                content_sha256=row["content_sha256"],
                state="finalising" if waiting_for else "finalised",
                waiting_for=waiting_for,
                pdf_sha256=row["pdf_sha256"],
                updated_at=row["updated_at"],
            )
        )
    return found


async def invoice(connection: Connection, invoice_id: str) -> StoredInvoice | None:
    """Return one invoice, if the caller may see it."""
    found = await invoices(connection, Wanted(None, None, None, None, invoice_id, None, 1))
    return found[0] if found else None


_PDF = "select pdf from invoice_pdfs where invoice_id = $1"


async def pdf_of(connection: Connection, invoice_id: str) -> bytes | None:
    """Return an invoice's PDF, once it is rendered."""
    pdf: bytes | None = await connection.fetchval(_PDF, invoice_id)
    return pdf


# A rerun: what an invoice was computed from.


@dataclass(frozen=True, slots=True)
class RerunFacts:
    """The facts of an invoice, its position in its series and the hashes it must come to."""

    facts: Facts
    position: int
    content_sha256: str
    pdf_sha256: str | None


_RERUN_FACTS = """
select i.legal_entity_id, i.series, i.tenant_id, i.period, i.issued_on, i.position,
       i.content_sha256, l.name, t.currency, c.tax_version, b.last_seq, p.pdf_sha256,
       (select encode(e.entry_hash, 'hex') from entries e
         where e.tenant_id = b.tenant_id and e.seq = b.last_seq) as last_hash,
       (select min(e.seq) from entries e
         where e.tenant_id = b.tenant_id and e.kind = 'charge' and e.period = b.period
           and e.seq <= b.last_seq) as first_seq
  from invoices i
  join legal_entities l on l.legal_entity_id = i.legal_entity_id
  join tenants t on t.tenant_id = i.tenant_id
  join closings c on c.period = i.period
  join bills b on b.period = i.period and b.legal_entity_id = i.legal_entity_id
              and b.tenant_id = i.tenant_id
  left join invoice_pdfs p on p.invoice_id = i.invoice_id
 where i.invoice_id = $1
"""


async def rerun_facts(connection: Connection, invoice_id: str) -> RerunFacts | None:
    """Read what an invoice rests on, apart from its stored content."""
    row = await connection.fetchrow(_RERUN_FACTS, invoice_id)
    if row is None:
        return None
    return RerunFacts(
        facts=Facts(
            legal_entity_id=row["legal_entity_id"],
            legal_entity_name=row["name"],
            series=row["series"],
            tenant_id=row["tenant_id"],
            period=row["period"],
            currency=row["currency"],
            issued_on=row["issued_on"],
            tax_point_on=tax_point_on(row["period"]),
            tax_version=row["tax_version"],
            first_seq=row["first_seq"],
            last_seq=row["last_seq"],
            last_hash=row["last_hash"],
        ),
        position=row["position"],
        content_sha256=row["content_sha256"],
        pdf_sha256=row["pdf_sha256"],
    )


_CHARGES = """
select seq, hub, sku, price_class, used_gpu_ns, funded_micro, receivable_micro, unfunded_micro
  from entries
 where tenant_id = $1 and kind = 'charge' and period = $2 and seq > $3 and seq <= $4
 order by seq
 limit $5
"""


async def charges(
    connection: Connection, facts: Facts, after_seq: int
) -> tuple[list[RatedUsage], int]:
    """Return the next single charges a bill was made of, and the seq of the last of them."""
    rows = await connection.fetch(
        _CHARGES, facts.tenant_id, facts.period, after_seq, facts.last_seq, ENTRIES_AT_ONCE
    )
    found = [
        RatedUsage(
            hub=row["hub"],
            sku=row["sku"],
            price_class=row["price_class"],
            used_gpu_ns=row["used_gpu_ns"],
            funded_micro=row["funded_micro"],
            receivable_micro=row["receivable_micro"],
            unfunded_micro=row["unfunded_micro"],
        )
        for row in rows
    ]
    return found, rows[-1]["seq"] if rows else after_seq


# Reconciliation: charges from the entries, the rest from the documents.


_MONTH_FACTS = """
with charges as (
  select e.tenant_id, e.seq, t.kind, b.last_seq, b.state, e.unfunded_micro,
         e.funded_micro::numeric + e.receivable_micro + e.unfunded_micro as charge_micro
    from entries e
    left join tenants t on t.tenant_id = e.tenant_id
    left join bills b on b.period = $1 and b.tenant_id = e.tenant_id
   where e.kind = 'charge' and e.period = $1
), placed as (
  select charge_micro, unfunded_micro,
         case when kind <> 'commercial' then 'non-commercial'
              when kind is null or c.period is null then 'not-invoiced'
              when last_seq is null or seq > last_seq then 'late'
              when state = 'skipped' then 'skipped'
              when state = 'numbered' then 'invoiced'
              else 'not-invoiced' end as place
    from charges left join closings c on c.period = $1
), documents as (
  select coalesce(sum(net_minor), 0) as net_minor, coalesce(sum(residue_micro), 0) as residue_micro
    from invoices where period = $1
)
select coalesce(sum(charge_micro), 0) as charged_micro,
       coalesce(sum(charge_micro) filter (where place = 'non-commercial'), 0)
         as non_commercial_micro,
       coalesce(sum(unfunded_micro) filter (where place = 'invoiced'), 0) as unfunded_micro,
       coalesce(sum(charge_micro) filter (where place = 'late'), 0) as late_micro,
       coalesce(sum(charge_micro) filter (where place = 'not-invoiced'), 0) as not_invoiced_micro,
       coalesce(sum(charge_micro) filter (where place = 'skipped'), 0) as skipped_micro,
       (select residue_micro from documents) as residue_micro,
       (select net_minor from documents) as net_minor
  from placed
"""


async def month_facts(connection: Connection, period: str) -> MonthFacts:
    """Read what a month's charges and documents come to, in one snapshot."""
    row = await connection.fetchrow(_MONTH_FACTS, period)
    if row is None:
        raise LookupError("an aggregate without a row")
    return MonthFacts(
        charged_micro=row["charged_micro"],
        non_commercial_micro=row["non_commercial_micro"],
        unfunded_micro=row["unfunded_micro"],
        late_micro=row["late_micro"],
        not_invoiced_micro=row["not_invoiced_micro"],
        skipped_micro=row["skipped_micro"],
        residue_micro=row["residue_micro"],
        net_minor=row["net_minor"],
    )


_LATE = """
select coalesce(sum(late.charge_micro), 0)
  from (select c.period, m.tenant_id, coalesce(b.last_seq, 0) as last_seq
          from closings c
          join month_usage m on m.period = c.period
          join tenants t on t.tenant_id = m.tenant_id and t.kind = 'commercial'
          left join bills b on b.period = c.period and b.tenant_id = m.tenant_id
         where c.period = $1
         group by c.period, m.tenant_id, b.last_seq
        having max(m.last_seq) > coalesce(b.last_seq, 0)) as behind
 cross join lateral (
       select sum(e.funded_micro::numeric + e.receivable_micro + e.unfunded_micro) as charge_micro
         from entries e
        where e.tenant_id = behind.tenant_id and e.kind = 'charge' and e.period = $1
          and e.seq > behind.last_seq) as late
"""


async def late_micro(connection: Connection, period: str) -> int:
    """Sum commercial tenants' charges booked after their positions at the close; 0 before it."""
    return int(await connection.fetchval(_LATE, period))


_RECEIVABLE_FACTS = """
select coalesce(sum(i.net_minor * 10000 - i.residue_micro), 0) as net_micro,
       coalesce(sum(i.funded_micro), 0) as funded_micro,
       coalesce(sum(e.moved_micro), 0) as moved_micro,
       coalesce(sum(i.invoiced_micro) filter (where e.document_id is null), 0) as awaited_micro
  from invoices i
  left join entries e on e.kind = 'invoiced' and e.document_id = i.invoice_id
 where i.period = $1
"""


async def receivable_facts(connection: Connection, period: str) -> ReceivableFacts:
    """Read what a month's invoices bill of the books, and what the ledger says it moved."""
    row = await connection.fetchrow(_RECEIVABLE_FACTS, period)
    if row is None:
        raise LookupError("an aggregate without a row")
    return ReceivableFacts(
        net_micro=row["net_micro"],
        funded_micro=row["funded_micro"],
        moved_micro=row["moved_micro"],
        awaited_micro=row["awaited_micro"],
    )


@dataclass(frozen=True, slots=True)
class MonthTotals:
    """What a month's invoices add up to."""

    invoices_count: int
    net_minor: int
    tax_minor: int
    total_minor: int
    tender_minor: int
    due_minor: int


_TOTALS = """
select count(*) as invoices_count, coalesce(sum(net_minor), 0) as net_minor,
       coalesce(sum(tax_minor), 0) as tax_minor, coalesce(sum(total_minor), 0) as total_minor,
       coalesce(sum(tender_minor), 0) as tender_minor, coalesce(sum(due_minor), 0) as due_minor
  from invoices
 where period = $1
"""


async def month_totals(connection: Connection, period: str) -> MonthTotals:
    """Add up a month's invoices."""
    row = await connection.fetchrow(_TOTALS, period)
    if row is None:
        raise LookupError("an aggregate without a row")
    return MonthTotals(
        invoices_count=row["invoices_count"],
        net_minor=row["net_minor"],
        tax_minor=row["tax_minor"],
        total_minor=row["total_minor"],
        tender_minor=row["tender_minor"],
        due_minor=row["due_minor"],
    )


_NUMBER_GAPS = """
select count(*)
  from (select legal_entity_id, series, fiscal_year, max(position) as last, count(*) as held
          from invoices group by legal_entity_id, series, fiscal_year) as s
 where s.last <> s.held
"""


async def number_gaps(connection: Connection) -> int:
    """Count series whose numbers are not 1, 2, 3 … without a gap: always 0."""
    return int(await connection.fetchval(_NUMBER_GAPS))
