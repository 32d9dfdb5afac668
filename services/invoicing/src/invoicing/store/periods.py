"""SQL of a month: what decides whether it may be closed, and what its reconciliation adds up.

What a month asks costs what it has lines, or what is late: only the reconciliation, which must not
trust the sums it is to check, reads the month's entries themselves.
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Final

from hisab_contracts.currencies import EXPONENTS
from hisab_contracts.ids import HubCode, LegalEntityId, TenantId
from invoicing.core.periods import OutstandingBill, PeriodState, TenantCurrency
from invoicing.core.reconciliation import (
    ChargeSums,
    DocumentSums,
    MonthFacts,
    MonthTotals,
    ReceivableFacts,
    month_facts,
)
from invoicing.store import closings, entries, reference, tax_rates

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


_OF_MONTH: Final = """
  from (select case when b.state = 'computed' then 'number'
                    else coalesce(b.reason_kind, 'compute') end as kind,
               b.reason_hub as hub, b.tenant_id, b.attempts, b.reason
          from bills b
         where b.period = $1 and b.state in ('pending', 'computed')
        union all
        select s.step, null, s.tenant_id, s.attempts, s.reason
          from invoices i
          join invoice_steps s on s.invoice_id = i.invoice_id
         where i.period = $1 and s.done_at is null and not s.waived) as o
"""
"""What bills, not yet numbered, and numbered invoices of a month still need."""

# What has failed comes first, and at most so many are shown.
_OUTSTANDING = (
    "select o.kind, o.hub, o.tenant_id, o.attempts, o.reason"
    + _OF_MONTH
    + """ where not $2 or o.reason is not null
 order by o.reason is null, o.kind, o.tenant_id
 limit 1000
"""
)
_FAILED_COUNT = "select count(*)" + _OF_MONTH + " where o.reason is not null"


async def outstanding_bills(
    connection: Connection, period: str, *, failed_only: bool = False
) -> tuple[OutstandingBill, ...]:
    """Return what the bills of a month that is being closed still need, and why."""
    return tuple(
        OutstandingBill(
            tenant_id=row["tenant_id"],
            kind=row["kind"],
            hub=row["hub"],
            attempts=row["attempts"],
            reason=row["reason"],
        )
        for row in await connection.fetch(_OUTSTANDING, period, failed_only)
    )


async def count_failed_bills(connection: Connection, period: str) -> int:
    """Count what of a month has failed: all of it, also where fewer are shown."""
    return int(await connection.fetchval(_FAILED_COUNT, period))


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


# Commercial tenants with charges whose currency is none of the table's: books opened before it was
# looked at. The first hundred are enough to look into.
_UNKNOWN_CURRENCIES = """
select distinct t.tenant_id, t.currency
  from month_usage m
  join tenants t on t.tenant_id = m.tenant_id and t.kind = 'commercial'
 where m.period = $1 and t.currency <> all($2::text[])
 order by t.tenant_id
 limit 100
"""


async def unknown_currencies(connection: Connection, period: str) -> tuple[TenantCurrency, ...]:
    """Return billed tenants of a month in a currency that has no minor unit."""
    rows = await connection.fetch(_UNKNOWN_CURRENCIES, period, list(EXPONENTS))
    return tuple(TenantCurrency(row["tenant_id"], row["currency"]) for row in rows)


# The latest date of a series: of a number that was taken, or given to a closing whose numbers are
# still to come (one that ended without invoices holds nobody back).
_LAST_ISSUED_ON = """
select greatest(
         (select max(s.last_issued_on)
            from invoice_series s
            join legal_entities l on l.legal_entity_id = s.legal_entity_id and l.series = s.series
           where s.legal_entity_id = $1),
         (select max(c.issued_on)
            from closings c
           where c.legal_entity_id = $1 and c.closed_at is null))
"""


async def last_issued_on(connection: Connection, legal_entity_id: LegalEntityId) -> dt.date | None:
    """Return the date before which no invoice of this seller may be dated any more."""
    last_on: dt.date | None = await connection.fetchval(_LAST_ISSUED_ON, legal_entity_id)
    return last_on


async def period_state(connection: Connection, period: str, partitions: int) -> PeriodState:
    """Read all that decides whether a month may be closed, and how far it is.

    Many statements: the caller's transaction reads one snapshot.
    """
    recorded = await closings.closing_of(connection, period)
    marks = await entries.month_watermarks(connection, period)
    sellers = await reference.sellers(connection)
    quarantined = {item.tenant_id for mark in marks for item in mark.quarantined}
    return PeriodState(
        period=period,
        partitions=partitions,
        watermarks=marks,
        quarantined_tenants=await reference.known_tenants(connection, quarantined),
        broken_books=tuple(gap.tenant_id for gap in await entries.gaps(connection)),
        unknown_tenants=await unknown_tenants(connection, period),
        billed_hubs=await billed_hubs(connection, period),
        unknown_currencies=await unknown_currencies(connection, period),
        tax_rows=tuple(await tax_rates.tax_rows(connection)),
        sellers=tuple(sellers),
        last_issued_on=await last_issued_on(connection, sellers[0].legal_entity_id)
        if sellers
        else None,
        recorded=recorded,
        outstanding=()
        if recorded is None or recorded.closed_at is not None
        else await outstanding_bills(connection, period),
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
  select coalesce(sum(residue_micro), 0) as residue_micro,
         coalesce(sum(net_minor * micro_per_minor(content ->> 'currency')), 0) as stated_micro,
         exists (select from closings where period = $1) as closed
    from invoices
   where period = $1
)
select d.residue_micro, d.stated_micro, d.closed, c.kind, c.state, c.before_cut, c.charge_micro,
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
    documents = DocumentSums(
        residue_micro=rows[0]["residue_micro"], stated_micro=rows[0]["stated_micro"]
    )
    return month_facts(charges, documents, closed=rows[0]["closed"])


# What a month's invoices bill of the books, beside the `invoiced` entry that the ledger made for
# each. An invoice without one is awaited: its step is open, or its entry is still on its way here.
_RECEIVABLE_FACTS = """
select coalesce(sum(i.net_minor * micro_per_minor(i.content ->> 'currency') - i.residue_micro), 0)
         as net_micro,
       coalesce(sum(i.funded_micro), 0) as funded_micro,
       coalesce(sum(e.moved_micro), 0) as moved_micro,
       coalesce(sum(i.invoiced_micro) filter (where e.document_id is null), 0) as awaited_micro
  from invoices i
  left join entries e on e.kind = 'invoiced' and e.document_id = i.invoice_id
 where i.period = $1
"""


async def receivable_facts(connection: Connection, period: str) -> ReceivableFacts:
    """Read what a month's invoices bill of the books, and what the ledger says it moved."""
    (row,) = await connection.fetch(_RECEIVABLE_FACTS, period)
    return ReceivableFacts(
        net_micro=row["net_micro"],
        funded_micro=row["funded_micro"],
        moved_micro=row["moved_micro"],
        awaited_micro=row["awaited_micro"],
    )


# A currency each: minor units of one are not those of another.
_TOTALS = """
select content ->> 'currency' as currency, count(*) as invoices_count, sum(net_minor) as net_minor,
       sum(tax_minor) as tax_minor, sum(total_minor) as total_minor,
       sum(tender_minor) as tender_minor, sum(due_minor) as due_minor
  from invoices
 where period = $1
 group by content ->> 'currency'
 order by content ->> 'currency'
"""


async def month_totals(connection: Connection, period: str) -> tuple[MonthTotals, ...]:
    """Add up a month's invoices, per currency."""
    return tuple(
        MonthTotals(
            currency=row["currency"],
            invoices_count=row["invoices_count"],
            net_minor=row["net_minor"],
            tax_minor=row["tax_minor"],
            total_minor=row["total_minor"],
            tender_minor=row["tender_minor"],
            due_minor=row["due_minor"],
        )
        for row in await connection.fetch(_TOTALS, period)
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
