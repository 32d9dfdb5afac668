"""SQL of a month: what decides whether it may be closed, and what its reconciliation adds up.

What a month asks costs what it has lines, or what is late: only the reconciliation, which must not
trust the sums it is to check, reads the month's entries themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hisab_contracts.ids import HubCode, TenantId
from hisab_contracts.units import MICRO_PER_MINOR
from invoicing.core.periods import PeriodState
from invoicing.core.reconciliation import (
    ChargeSums,
    DocumentSums,
    MonthFacts,
    MonthTotals,
    ReceivableFacts,
    month_facts,
)
from invoicing.store import closings, entries, reference

if TYPE_CHECKING:
    from runtime.database import Connection

# Tenants with charges of whom nothing has been said yet; the first hundred are enough to look into.
_UNKNOWN_TENANTS = """
select distinct m.tenant_id
  from month_usage m
 where m.period = $1 and not exists (select from tenants t where t.tenant_id = m.tenant_id)
 order by m.tenant_id
 limit 100
"""


async def unknown_tenants(connection: Connection, period: str) -> tuple[TenantId, ...]:
    """Return tenants with charges in a month of whom nothing has been said."""
    rows = await connection.fetch(_UNKNOWN_TENANTS, period)
    return tuple(row["tenant_id"] for row in rows)


# Only commercial tenants are ever billed (`tenant_kind` in `core/reconciliation.py` says the same):
# in SQL, so that a month of thousands of others is not read to be thrown away.
_BILLED_HUBS = """
select distinct m.hub
  from month_usage m
  join tenants t on t.tenant_id = m.tenant_id and t.kind = 'commercial'
 where m.period = $1
 order by m.hub
"""


async def billed_hubs(connection: Connection, period: str) -> tuple[HubCode, ...]:
    """Return the hubs at which commercial tenants used something in a month."""
    rows = await connection.fetch(_BILLED_HUBS, period)
    return tuple(row["hub"] for row in rows)


async def period_state(connection: Connection, period: str, partitions: int) -> PeriodState:
    """Read all that decides whether a month may be closed, and how far it is."""
    recorded = await closings.closing_of(connection, period)
    marks = await entries.watermarks(connection)
    quarantined = {item.tenant_id for mark in marks for item in mark.quarantined}
    return PeriodState(
        period=period,
        partitions=partitions,
        watermarks=marks,
        quarantined_tenants=await reference.known_tenants(connection, quarantined),
        broken_books=tuple(gap.tenant_id for gap in await entries.gaps(connection)),
        unknown_tenants=await unknown_tenants(connection, period),
        billed_hubs=await billed_hubs(connection, period),
        tax_rows=tuple(await closings.tax_rows(connection)),
        sellers=tuple(await reference.sellers(connection)),
        recorded=recorded,
        outstanding=()
        if recorded is None or recorded.closed_at is not None
        else await closings.outstanding_bills(connection, period),
    )


# Commercial tenants' charges booked after their positions at the close: the place `late` of the
# reconciliation. It is decided here a second time because every look at a month shows the sum:
# `month_usage` says in which books something came after the cut, and only those late charges are
# read. A test holds this sum to the reconciliation's.
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


# Reconciliation: charges from the entries, the rest from the documents.


# The month's charges, summed by what decides where they are (`core.reconciliation` names the
# place), each group beside what the documents say. One statement, because only that is one
# snapshot: an invoice numbered between two statements would be a difference where there is none.
_MONTH_SUMS = """
with charges as (
  select t.kind, b.state, coalesce(e.seq <= b.last_seq, false) as before_cut,
         sum(e.funded_micro::numeric + e.receivable_micro + e.unfunded_micro) as charge_micro,
         sum(e.unfunded_micro) as unfunded_micro
    from entries e
    left join tenants t on t.tenant_id = e.tenant_id
    left join bills b on b.period = $1 and b.tenant_id = e.tenant_id
   where e.kind = 'charge' and e.period = $1
   group by 1, 2, 3
), documents as (
  select coalesce(sum(residue_micro), 0) as residue_micro, coalesce(sum(net_minor), 0) as net_minor,
         exists (select from closings where period = $1) as closed
    from invoices
   where period = $1
)
select d.residue_micro, d.net_minor, d.closed, c.kind, c.state, c.before_cut, c.charge_micro,
       c.unfunded_micro
  from documents d
  left join charges c on true
"""


async def facts_of_month(connection: Connection, period: str) -> MonthFacts:
    """Read what a month's charges and documents come to, in one snapshot."""
    rows = await connection.fetch(_MONTH_SUMS, period)
    charges = [
        ChargeSums(
            tenant_kind=row["kind"],
            bill_state=row["state"],
            before_cut=row["before_cut"],
            charge_micro=row["charge_micro"],
            unfunded_micro=row["unfunded_micro"],
        )
        for row in rows
        if row["charge_micro"] is not None
    ]
    documents = DocumentSums(residue_micro=rows[0]["residue_micro"], net_minor=rows[0]["net_minor"])
    return month_facts(charges, documents, closed=rows[0]["closed"])


# What a month's invoices bill of the books, beside the `invoiced` entry that the ledger made for
# each. An invoice without one is awaited: its step is open, or its entry is still on its way here.
_RECEIVABLE_FACTS = """
select coalesce(sum(i.net_minor * $2::bigint - i.residue_micro), 0) as net_micro,
       coalesce(sum(i.funded_micro), 0) as funded_micro,
       coalesce(sum(e.moved_micro), 0) as moved_micro,
       coalesce(sum(i.invoiced_micro) filter (where e.document_id is null), 0) as awaited_micro
  from invoices i
  left join entries e on e.kind = 'invoiced' and e.document_id = i.invoice_id
 where i.period = $1
"""


async def receivable_facts(connection: Connection, period: str) -> ReceivableFacts:
    """Read what a month's invoices bill of the books, and what the ledger says it moved."""
    (row,) = await connection.fetch(_RECEIVABLE_FACTS, period, MICRO_PER_MINOR)
    return ReceivableFacts(
        net_micro=row["net_micro"],
        funded_micro=row["funded_micro"],
        moved_micro=row["moved_micro"],
        awaited_micro=row["awaited_micro"],
    )


_TOTALS = """
select count(*) as invoices_count, coalesce(sum(net_minor), 0) as net_minor,
       coalesce(sum(tax_minor), 0) as tax_minor, coalesce(sum(total_minor), 0) as total_minor,
       coalesce(sum(tender_minor), 0) as tender_minor, coalesce(sum(due_minor), 0) as due_minor
  from invoices
 where period = $1
"""


async def month_totals(connection: Connection, period: str) -> MonthTotals:
    """Add up a month's invoices."""
    (row,) = await connection.fetch(_TOTALS, period)
    return MonthTotals(
        invoices_count=row["invoices_count"],
        net_minor=row["net_minor"],
        tax_minor=row["tax_minor"],
        total_minor=row["total_minor"],
        tender_minor=row["tender_minor"],
        due_minor=row["due_minor"],
    )


# Series whose highest number is not the count of their numbers. A constraint makes it impossible;
# whoever reconciles must not have to believe that.
_NUMBER_GAPS = """
select count(*)
  from (select legal_entity_id, series, fiscal_year, max(position) as last, count(*) as held
          from invoices group by legal_entity_id, series, fiscal_year) as s
 where s.last <> s.held
"""


async def number_gaps(connection: Connection) -> int:
    """Count series whose numbers are not 1, 2, 3 … without a gap: always 0."""
    return int(await connection.fetchval(_NUMBER_GAPS))
