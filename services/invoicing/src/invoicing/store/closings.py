"""SQL of closing a month: the command, bills to make, numbers, and the steps that remain.

Numbering is one short transaction. It holds the closing's row, so the numbers of one month follow
the order of its tenants whoever finalises; it takes the row of the series last, over all fiscal
years, and only counter, invoices, their steps and messages follow. The gap proof is a constraint:
every invoice but the first of its series refers to the one before it. That dates never fall is held
by a trigger, which compares each with the row of its series.

What a lock protects is read after the lock, by a statement of its own: a sub-select beside `for
update` would still see what was there before it waited.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import asyncpg
import msgspec

from hisab_contracts.ids import DocumentId, LegalEntityId, TenantId
from invoicing.core.document import (
    ComputedBill,
    Draft,
    FinalisedInvoice,
    InvoiceFacts,
    InvoiceStep,
    IssuedInvoice,
    NumberSeries,
    content_bytes,
    steps_of,
)
from invoicing.core.periods import Closing, PeriodBlocker, RecordedClosing
from invoicing.store.tax_rates import TAKEN_UP_VERSIONS

if TYPE_CHECKING:
    from runtime.database import Connection

REASON_LENGTH: Final = 1000
"""How much of a failure's message is kept: it may quote whatever a stranger answered."""

# Months that are being closed.


_CLOSING_COLUMNS = """period, legal_entity_id, issued_on, override_reason, overridden, tax_version,
  actor"""


def _closing_from_row(row: asyncpg.Record) -> RecordedClosing:
    closing = Closing(
        period=row["period"],
        legal_entity_id=row["legal_entity_id"],
        issued_on=row["issued_on"],
        override_reason=row["override_reason"],
        overridden=msgspec.json.decode(row["overridden"], type=tuple[PeriodBlocker, ...]),
        tax_version=row["tax_version"],
        actor=row["actor"],
    )
    return RecordedClosing(
        closing=closing, requested_at=row["requested_at"], closed_at=row["closed_at"]
    )


_CLOSING = (
    "select " + _CLOSING_COLUMNS + ", requested_at, closed_at from closings where period = $1"
)


async def closing_of(connection: Connection, period: str) -> RecordedClosing | None:
    """Return the closing of a month, if finance has asked for it."""
    row = await connection.fetchrow(_CLOSING, period)
    return None if row is None else _closing_from_row(row)


_RECORD_CLOSING = (
    "insert into closings ("
    + _CLOSING_COLUMNS
    + ") values ($1, $2, $3, $4, $5, $6, $7) on conflict (period) do nothing"
)


async def record_closing(connection: Connection, closing: Closing) -> bool:
    """Put a closing on the record; False when the month has one already."""
    status = await connection.execute(
        _RECORD_CLOSING,
        closing.period,
        closing.legal_entity_id,
        closing.issued_on,
        closing.override_reason,
        msgspec.json.encode(closing.overridden).decode(),
        closing.tax_version,
        closing.actor,
    )
    return status == "INSERT 0 1"


# One bill for each commercial tenant with charges in the month, cut at its book's position. It runs
# in the snapshot that the close was decided on: whatever is booked meanwhile is late for all alike.
# In SQL, so that a tenant with a million charges costs no more than another.
_ADD_BILLS = """
insert into bills (period, legal_entity_id, tenant_id, last_seq)
select c.period, c.legal_entity_id, b.tenant_id, b.contiguous_seq
  from closings c
 cross join books b
  join tenants t on t.tenant_id = b.tenant_id and t.kind = 'commercial'
 where c.period = $1
   and exists (select from month_usage m
                where m.period = c.period and m.tenant_id = b.tenant_id
                  and m.first_seq <= b.contiguous_seq)
 order by b.tenant_id
"""


async def add_bills(connection: Connection, period: str) -> None:
    """Make one bill for each commercial tenant with charges, at its book's position as of now."""
    await connection.execute(_ADD_BILLS, period)


# Written by every close, so that two at once cannot both be decided on the same dates: the snapshot
# of the second is refused, and it is run again.
_COUNT_CLOSING = """
insert into invoice_series as s (legal_entity_id, series, closings_count)
select l.legal_entity_id, l.series, 1 from legal_entities l where l.legal_entity_id = $1
on conflict (legal_entity_id, series) do update set closings_count = s.closings_count + 1
"""


async def count_closing(connection: Connection, closing: Closing) -> None:
    """Write down in its series that a closing was given its date."""
    await connection.execute(_COUNT_CLOSING, closing.legal_entity_id)


# The first asked for is worked on first.
_OPEN_PERIODS = "select period from closings where closed_at is null order by requested_at, period"


async def open_periods(connection: Connection) -> list[str]:
    """Return the months that are being closed, the first asked for first."""
    return [row["period"] for row in await connection.fetch(_OPEN_PERIODS)]


# A month is closed once each of its bills is skipped, set aside or numbered and each invoice is
# complete, but for steps that an override does not wait for. The
# condition is in the statement, so that of a step that fails meanwhile nothing is overlooked.
_CLOSE_IF_DONE = """
update closings c set closed_at = clock_timestamp()
 where c.period = $1 and c.closed_at is null
   and not exists (select from bills b
                    where b.period = c.period and b.state in ('pending', 'computed'))
   and not exists (select from invoices i
                     join invoice_steps s on s.invoice_id = i.invoice_id
                    where i.period = c.period and s.done_at is null and not s.waived)
"""


async def close_if_done(connection: Connection, period: str) -> bool:
    """Close a month once each of its bills is skipped or complete; says whether it did."""
    return await connection.execute(_CLOSE_IF_DONE, period) == "UPDATE 1"


# Computing.


def facts_from_row(row: asyncpg.Record) -> InvoiceFacts:
    """Read what a document needs beside its charges; the same for a close and a recomputation."""
    return InvoiceFacts(
        legal_entity_id=row["legal_entity_id"],
        legal_entity_name=row["name"],
        series=row["series"],
        tenant_id=row["tenant_id"],
        period=row["period"],
        currency=row["currency"],
        issued_on=row["issued_on"],
        tax_version=row["tax_version"],
        taken_up_versions=tuple(row["taken_up_versions"]),
        last_seq=row["last_seq"],
        last_hash=row["last_hash"],
    )


# Bills whose turn has come: not computed yet, or tried in vain and due again. Who waits longest is
# first, so that many that fail keep nobody out.
_PENDING_BILLS = (
    """
select b.legal_entity_id, b.tenant_id, b.period, b.last_seq, l.name, l.series, t.currency,
       c.issued_on, c.tax_version, encode(e.entry_hash, 'hex') as last_hash,
"""
    + TAKEN_UP_VERSIONS
    + """
  from bills b
  join closings c on c.period = b.period
  join legal_entities l on l.legal_entity_id = b.legal_entity_id
  join tenants t on t.tenant_id = b.tenant_id
  join entries e on e.tenant_id = b.tenant_id and e.seq = b.last_seq
 where b.period = $1 and b.state = 'pending' and b.retry_at <= clock_timestamp()
 order by b.retry_at, b.tenant_id
 limit $2
"""
)


async def pending_bills(connection: Connection, period: str, limit: int) -> list[InvoiceFacts]:
    """Return the facts of bills still to compute."""
    return [facts_from_row(row) for row in await connection.fetch(_PENDING_BILLS, period, limit)]


# When a bill or a step that failed is due again: the wait doubles from a quarter of a second to a
# minute. It is worked out in SQL, because the server's clock says what is due (processes may have
# other clocks), and because one statement counts the attempts of many rows, each with its own.
_COUNT_ATTEMPT = """attempts = attempts + 1,
       retry_at = clock_timestamp()
         + least(60000, 250 * (1 << least(attempts, 8))) * interval '1 millisecond'"""

# One that is still pending failed, and is tried again when its wait is over.
_STORE_COMPUTED = (
    """
update bills b
   set state = n.state, draft = n.draft, reason = n.reason, reason_kind = n.reason_kind,
       reason_hub = n.reason_hub, """
    + _COUNT_ATTEMPT
    + """
  from unnest($2::text[], $3::text[], $4::jsonb[], $5::text[], $6::text[], $7::text[])
       as n (tenant_id, state, draft, reason, reason_kind, reason_hub)
 where b.period = $1 and b.tenant_id = n.tenant_id and b.state = 'pending'
"""
)


async def store_computed(
    connection: Connection, period: str, computed: Sequence[ComputedBill]
) -> None:
    """Record what came of bills; one that failed is tried again, ever later, at most a minute."""
    await connection.execute(
        _STORE_COMPUTED,
        period,
        [bill.tenant_id for bill in computed],
        [bill.state for bill in computed],
        [
            None if bill.draft is None else msgspec.json.encode(bill.draft).decode()
            for bill in computed
        ],
        [bill.reason and bill.reason[:REASON_LENGTH] for bill in computed],
        [bill.reason_kind for bill in computed],
        [bill.reason_hub for bill in computed],
    )


# Numbering.


class NumberingRefused(Exception):
    """The database refuses an invoice: a defect of ours, of this release or of one before it."""


@dataclass(frozen=True, slots=True)
class NumberingTurn:
    """A month whose bills are all computed, while this transaction alone may number them."""

    legal_entity_id: LegalEntityId
    series: str
    issued_on: dt.date


# The row lock makes one of any number of finalisers number this month.
_LOCK_CLOSING = """
select legal_entity_id from closings where period = $1 and closed_at is null for update
"""
# Read after the lock: the month as whoever held it before us has left it.
_NUMBERING_TURN = """
select c.legal_entity_id, l.series, c.issued_on,
       exists (select from bills b where b.period = c.period and b.state = 'pending') as pending
  from closings c
  join legal_entities l on l.legal_entity_id = c.legal_entity_id
 where c.period = $1 and c.closed_at is null
"""


async def lock_numbering(connection: Connection, period: str) -> NumberingTurn | None:
    """Become the only one who numbers a month; None while bills are still to compute."""
    await connection.fetch(_LOCK_CLOSING, period)
    row = await connection.fetchrow(_NUMBERING_TURN, period)
    if row is None or row["pending"]:
        return None
    return NumberingTurn(row["legal_entity_id"], row["series"], row["issued_on"])


# Numbers follow the order of tenants, so that a month closed again elsewhere has the same ones.
_COMPUTED_BILLS = """
select draft
  from bills
 where period = $1 and state = 'computed'
 order by legal_entity_id, tenant_id
 limit $2
"""


async def computed_drafts(connection: Connection, period: str, limit: int) -> list[Draft]:
    """Return the next drafts to number, in order of tenant."""
    rows = await connection.fetch(_COMPUTED_BILLS, period, limit)
    return [msgspec.json.decode(row["draft"], type=Draft) for row in rows]


# The last lock of the numbering transaction, so that it is held as briefly as can be: every month
# of this seller waits for it, whatever its fiscal year, because dates never fall over all of them.
_MAKE_SERIES = """
insert into invoice_series (legal_entity_id, series) values ($1, $2)
on conflict (legal_entity_id, series) do nothing
"""
_LOCK_SERIES = """
select last_issued_on from invoice_series where legal_entity_id = $1 and series = $2 for update
"""


async def lock_series(
    connection: Connection, legal_entity_id: LegalEntityId, series: str
) -> dt.date | None:
    """Take the last lock, that of a series; returns the date of its last number."""
    await connection.execute(_MAKE_SERIES, legal_entity_id, series)
    last_on: dt.date | None = await connection.fetchval(_LOCK_SERIES, legal_entity_id, series)
    return last_on


# Held to one at a time by the lock of the series.
_TAKE_POSITIONS = """
insert into invoice_counters as c (legal_entity_id, series, fiscal_year, last_position)
values ($1, $2, $3, $4)
on conflict (legal_entity_id, series, fiscal_year) do update
   set last_position = c.last_position + excluded.last_position
returning last_position
"""


async def take_positions(connection: Connection, series: NumberSeries, count: int) -> int:
    """Take the next `count` positions of a series in one year; returns the first of them."""
    last_position = await connection.fetchval(
        _TAKE_POSITIONS, series.legal_entity_id, series.series, series.fiscal_year, count
    )
    return int(last_position) - count + 1


# What stands in the content is read from it here, so that columns and content cannot differ.
_INSERT_INVOICES = """
insert into invoices (invoice_id, legal_entity_id, series, fiscal_year, position,
                      previous_position, number, tenant_id, period, issued_on, net_minor, tax_minor,
                      total_minor, tender_minor, due_minor, residue_micro, funded_micro,
                      invoiced_micro, first_seq, last_seq, content, content_sha256)
select n.content ->> 'invoice_id', n.legal_entity_id, n.series, n.fiscal_year, n.position,
       nullif(n.position - 1, 0), n.content ->> 'number', n.content ->> 'tenant_id',
       n.content ->> 'period', (n.content ->> 'issued_on')::date,
       (n.content ->> 'net_minor')::numeric, (n.content ->> 'tax_minor')::numeric,
       (n.content ->> 'total_minor')::numeric, (n.content ->> 'tender_minor')::numeric,
       (n.content ->> 'due_minor')::numeric,
       (select sum((line ->> 'residue_micro')::numeric)
          from jsonb_array_elements(n.content -> 'lines') as line),
       n.funded_micro, n.invoiced_micro,
       (n.content #>> '{entries,first_seq}')::bigint, (n.content #>> '{entries,last_seq}')::bigint,
       n.content, n.content_sha256
  from unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::numeric[], $6::numeric[],
              $7::jsonb[], $8::text[])
       as n (legal_entity_id, series, fiscal_year, position, funded_micro, invoiced_micro, content,
             content_sha256)
 order by n.position
"""
# What remains to be done for each, written down with it.
_INSERT_STEPS = """
insert into invoice_steps (invoice_id, tenant_id, step)
select n.invoice_id, n.tenant_id, n.step
  from unnest($1::text[], $2::text[], $3::text[]) as n (invoice_id, tenant_id, step)
"""
# The draft goes: the invoice's content is what counts from now on.
_MARK_NUMBERED = """
update bills set state = 'numbered', draft = null
 where period = $1 and tenant_id = any($2::text[]) and state = 'computed'
"""


async def insert_invoices(
    connection: Connection, period: str, invoices: Sequence[FinalisedInvoice]
) -> None:
    """Write a month's numbered invoices and what remains to be done for each.

    The constraints of the table refuse gaps, wrong sums and dates that fall: `NumberingRefused`.
    """
    in_series = [invoice.at.number_series for invoice in invoices]
    try:
        await connection.execute(
            _INSERT_INVOICES,
            [series.legal_entity_id for series in in_series],
            [series.series for series in in_series],
            [series.fiscal_year for series in in_series],
            [invoice.at.position for invoice in invoices],
            [invoice.funded_micro for invoice in invoices],
            [invoice.receivable_micro for invoice in invoices],
            [content_bytes(invoice.content).decode() for invoice in invoices],
            [invoice.content_sha256 for invoice in invoices],
        )
    except asyncpg.IntegrityConstraintViolationError as error:
        raise NumberingRefused(str(error)) from error
    steps = [(invoice.content, step) for invoice in invoices for step in steps_of(invoice)]
    await connection.execute(
        _INSERT_STEPS,
        [content.invoice_id for content, _ in steps],
        [content.tenant_id for content, _ in steps],
        [step for _, step in steps],
    )
    await connection.execute(
        _MARK_NUMBERED, period, [invoice.content.tenant_id for invoice in invoices]
    )


# The bill that comes next is computed again, by today's rules, and says why it has no number.
_RETURN_NEXT_BILL = (
    """
update bills b
   set state = 'pending', draft = null, reason = $2, reason_kind = 'compute', reason_hub = null,
       """
    + _COUNT_ATTEMPT
    + """
 where b.period = $1 and b.state = 'computed'
   and b.tenant_id = (select n.tenant_id from bills n
                       where n.period = $1 and n.state = 'computed'
                       order by n.legal_entity_id, n.tenant_id
                       limit 1)
"""
)


async def return_next_bill(connection: Connection, period: str, reason: str) -> None:
    """Take the next bill to number back among those to compute: it was refused a number."""
    await connection.execute(_RETURN_NEXT_BILL, period, reason[:REASON_LENGTH])


# What remains to be done for a numbered invoice.


@dataclass(frozen=True, slots=True)
class DueStep:
    """A numbered invoice whose PDF, or whose answer from the ledger, is to be seen to now."""

    invoice_id: DocumentId
    tenant_id: TenantId
    period: str
    content: str
    content_sha256: str
    invoiced_micro: int
    first_seq: int
    last_seq: int


# Steps whose turn has come, the longest due first: one that fails again and again does not stand
# in the way of the others.
_DUE_STEPS = """
select i.invoice_id, i.tenant_id, i.period, i.content, i.content_sha256, i.invoiced_micro,
       i.first_seq, i.last_seq
  from invoice_steps s
  join invoices i on i.invoice_id = s.invoice_id
 where s.step = $1 and s.done_at is null and s.retry_at <= clock_timestamp()
 order by s.retry_at, s.invoice_id
 limit $2
"""


async def due_steps(connection: Connection, step: InvoiceStep, limit: int) -> list[DueStep]:
    """Return invoices for which this step is due."""
    return [
        DueStep(
            invoice_id=row["invoice_id"],
            tenant_id=row["tenant_id"],
            period=row["period"],
            content=row["content"],
            content_sha256=row["content_sha256"],
            invoiced_micro=row["invoiced_micro"],
            first_seq=row["first_seq"],
            last_seq=row["last_seq"],
        )
        for row in await connection.fetch(_DUE_STEPS, step, limit)
    ]


# A step that is done meanwhile stays done: another process had its answer.
_STEP_FAILED = (
    "update invoice_steps set reason = $3, "
    + _COUNT_ATTEMPT
    + " where invoice_id = $1 and step = $2 and done_at is null"
)


async def step_failed(
    connection: Connection, invoice_id: DocumentId, step: InvoiceStep, reason: str
) -> None:
    """Record why a step failed; it is tried again, ever later, at most a minute."""
    await connection.execute(_STEP_FAILED, invoice_id, step, reason[:REASON_LENGTH])


# A second rendering after a lost answer gives the same bytes, so the first one may stay.
_KEEP_PDF = """
insert into invoice_pdfs (invoice_id, tenant_id, pdf, pdf_sha256)
values ($1, $2, $3, $4)
on conflict (invoice_id) do nothing
"""


async def keep_pdf(
    connection: Connection, invoice_id: DocumentId, tenant_id: TenantId, pdf: bytes, sha256: str
) -> None:
    """Keep the rendered PDF of an invoice, once."""
    await connection.execute(_KEEP_PDF, invoice_id, tenant_id, pdf, sha256)


# Holds all steps of an invoice, so that of two that end at once the second sees that the first is
# done: otherwise neither would announce the invoice.
_LOCK_STEPS = """
select step from invoice_steps where invoice_id = $1 order by step for update
"""
_STEP_DONE = """
update invoice_steps
   set done_at = clock_timestamp(), outcome = $3, reason = null, attempts = attempts + 1
 where invoice_id = $1 and step = $2 and done_at is null
"""
# A numbered invoice, its PDF's hash and what is outstanding.
_ISSUED_INVOICE = """
select i.invoice_id, i.tenant_id, i.legal_entity_id, i.series, i.fiscal_year, i.position, i.number,
       i.period, i.content_sha256, p.pdf_sha256,
       array(select s.step from invoice_steps s
              where s.invoice_id = i.invoice_id and s.done_at is null
              order by s.step) as outstanding
  from invoices i
  left join invoice_pdfs p on p.invoice_id = i.invoice_id
 where i.invoice_id = $1
"""


def _issued_from_row(row: asyncpg.Record) -> IssuedInvoice:
    return IssuedInvoice(
        invoice_id=row["invoice_id"],
        tenant_id=row["tenant_id"],
        period=row["period"],
        number_series=NumberSeries(
            legal_entity_id=row["legal_entity_id"],
            series=row["series"],
            fiscal_year=row["fiscal_year"],
        ),
        position=row["position"],
        number=row["number"],
        content_sha256=row["content_sha256"],
        pdf_sha256=row["pdf_sha256"],
        outstanding=tuple(row["outstanding"]),
    )


async def step_done(
    connection: Connection, invoice_id: DocumentId, step: InvoiceStep, outcome: str
) -> IssuedInvoice | None:
    """Record a step's outcome; returns the invoice as it is then, None if it had one already."""
    await connection.fetch(_LOCK_STEPS, invoice_id)
    if await connection.execute(_STEP_DONE, invoice_id, step, outcome) != "UPDATE 1":
        return None
    row = await connection.fetchrow(_ISSUED_INVOICE, invoice_id)
    return None if row is None else _issued_from_row(row)
