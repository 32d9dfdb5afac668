"""SQL of closing a month: the command, bills to make, numbers, and the steps that remain.

Numbering is one short transaction. It holds the closing's row, so the numbers of one month follow
the order of its tenants whoever finalises; it takes the counter's row last, and only the invoice,
its steps and its message follow. The gap proof is a constraint: every invoice but the first of its
series refers to the one before it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from hisab_contracts.ids import DocumentId, LegalEntityId, TenantId
from invoicing.billing import RatedUsage
from invoicing.document import Content, DocumentEvent, Draft, Facts, Place, content_bytes
from invoicing.periods import Blocker
from invoicing.tax import tax_point_on

if TYPE_CHECKING:
    from runtime.database import Connection


@dataclass(frozen=True, slots=True)
class Closing:
    """Finance's command to close a month, on the record."""

    period: str
    legal_entity_id: LegalEntityId
    issued_on: dt.date
    override_reason: str | None
    tax_version: int
    requested_at: dt.datetime
    closed_at: dt.datetime | None


_CLOSING = """
select period, legal_entity_id, issued_on, override_reason, tax_version, requested_at, closed_at
  from closings
 where period = $1
"""


async def closing_of(connection: Connection, period: str) -> Closing | None:
    """Return the closing of a month, if finance has asked for it."""
    row = await connection.fetchrow(_CLOSING, period)
    if row is None:
        return None
    return Closing(
        period=row["period"],
        legal_entity_id=row["legal_entity_id"],
        issued_on=row["issued_on"],
        override_reason=row["override_reason"],
        tax_version=row["tax_version"],
        requested_at=row["requested_at"],
        closed_at=row["closed_at"],
    )


@dataclass(frozen=True, slots=True)
class CloseRequest:
    """What finance asks for, and what it overrides."""

    period: str
    legal_entity_id: LegalEntityId
    issued_on: dt.date
    override_reason: str | None
    overridden: Sequence[Blocker]
    actor: str


_REQUEST_CLOSING = """
insert into closings (period, legal_entity_id, issued_on, override_reason, overridden, tax_version,
                      actor)
select $1, $2, $3, $4, $5, coalesce(max(tax_version), 0), $6 from tax_rates
on conflict (period) do nothing
"""


async def request_closing(connection: Connection, request: CloseRequest) -> bool:
    """Put a closing on the record with the tax table's version; False when there is one already."""
    status = await connection.execute(
        _REQUEST_CLOSING,
        request.period,
        request.legal_entity_id,
        request.issued_on,
        request.override_reason,
        msgspec.json.encode(request.overridden).decode(),
        request.actor,
    )
    return status == "INSERT 0 1"


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


_OPEN_PERIODS = "select period from closings where closed_at is null order by requested_at, period"


async def open_periods(connection: Connection) -> list[str]:
    """Return the months that are being closed, the first asked for first."""
    return [row["period"] for row in await connection.fetch(_OPEN_PERIODS)]


# Computing.


_PENDING_BILLS = """
select b.legal_entity_id, b.tenant_id, b.last_seq, l.name, l.series, t.currency, c.issued_on,
       c.tax_version, encode(e.entry_hash, 'hex') as last_hash
  from bills b
  join closings c on c.period = b.period
  join legal_entities l on l.legal_entity_id = b.legal_entity_id
  join tenants t on t.tenant_id = b.tenant_id
  join entries e on e.tenant_id = b.tenant_id and e.seq = b.last_seq
 where b.period = $1 and b.state = 'pending' and b.retry_at <= clock_timestamp()
 order by b.legal_entity_id, b.tenant_id
 limit $2
"""


async def pending_bills(connection: Connection, period: str, limit: int) -> list[Facts]:
    """Return the facts of bills still to compute; `first_seq` is 0 until the usage is read."""
    return [
        Facts(
            legal_entity_id=row["legal_entity_id"],
            legal_entity_name=row["name"],
            series=row["series"],
            tenant_id=row["tenant_id"],
            period=period,
            currency=row["currency"],
            issued_on=row["issued_on"],
            tax_point_on=tax_point_on(period),
            tax_version=row["tax_version"],
            first_seq=0,
            last_seq=row["last_seq"],
            last_hash=row["last_hash"],
        )
        for row in await connection.fetch(_PENDING_BILLS, period, limit)
    ]


@dataclass(frozen=True, slots=True)
class BookUsage:
    """A tenant's charges of a month up to a position, summed per line."""

    first_seq: int
    usage: tuple[RatedUsage, ...]


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
    connection: Connection, period: str, bills: Sequence[Facts]
) -> Mapping[TenantId, BookUsage]:
    """Sum the charges of these bills: the month's, up to each book's position.

    That is the month's sums without what came after the position, so late usage is all that is read
    charge by charge.
    """
    rows = await connection.fetch(
        _USAGE_SUMS, period, [bill.tenant_id for bill in bills], [bill.last_seq for bill in bills]
    )
    sums: dict[TenantId, BookUsage] = {}
    for row in rows:
        usage = RatedUsage(
            hub=row["hub"],
            sku=row["sku"],
            price_class=row["price_class"],
            used_gpu_ns=row["used_gpu_ns"],
            funded_micro=row["funded_micro"],
            receivable_micro=row["receivable_micro"],
            unfunded_micro=row["unfunded_micro"],
        )
        known = sums.get(row["tenant_id"])
        sums[row["tenant_id"]] = (
            BookUsage(row["first_seq"], (usage,))
            if known is None
            else BookUsage(min(known.first_seq, row["first_seq"]), (*known.usage, usage))
        )
    return sums


@dataclass(frozen=True, slots=True)
class Computed:
    """What came of a bill: a draft, nothing to invoice, or why it could not be computed."""

    tenant_id: TenantId
    draft: Draft | None
    reason: str | None


_STORE_COMPUTED = """
update bills b
   set state = case when n.reason is not null then 'pending'
                    when n.draft is not null then 'computed' else 'skipped' end,
       draft = n.draft, reason = n.reason, attempts = b.attempts + 1,
       retry_at = clock_timestamp()
         + least(60000, 250 * (1 << least(b.attempts, 8))) * interval '1 millisecond'
  from unnest($2::text[], $3::jsonb[], $4::text[]) as n (tenant_id, draft, reason)
 where b.period = $1 and b.tenant_id = n.tenant_id and b.state = 'pending'
"""


async def store_computed(connection: Connection, period: str, computed: Sequence[Computed]) -> None:
    """Record what came of bills; one that failed is tried again, ever later, at most a minute."""
    await connection.execute(
        _STORE_COMPUTED,
        period,
        [one.tenant_id for one in computed],
        [
            None if one.draft is None else msgspec.json.encode(one.draft).decode()
            for one in computed
        ],
        [one.reason for one in computed],
    )


# Numbering.


@dataclass(frozen=True, slots=True)
class Numbering:
    """The seller, series and date of the numbers of a month whose bills are all computed."""

    legal_entity_id: LegalEntityId
    series: str
    issued_on: dt.date


_LOCK_CLOSING = """
select legal_entity_id, issued_on,
       (select series from legal_entities l where l.legal_entity_id = c.legal_entity_id) as series,
       exists (select from bills b where b.period = c.period and b.state = 'pending') as pending
  from closings c
 where period = $1 and closed_at is null
   for update
"""


async def lock_numbering(connection: Connection, period: str) -> Numbering | None:
    """Become the only one who numbers a month; None while bills are still to compute."""
    row = await connection.fetchrow(_LOCK_CLOSING, period)
    if row is None or row["pending"]:
        return None
    return Numbering(row["legal_entity_id"], row["series"], row["issued_on"])


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


_TAKE_POSITIONS = """
insert into invoice_counters as c (legal_entity_id, series, fiscal_year, last_position)
values ($1, $2, $3, $4)
on conflict (legal_entity_id, series, fiscal_year) do update
   set last_position = c.last_position + excluded.last_position
returning last_position
"""


async def take_positions(connection: Connection, before: Place, count: int) -> int:
    """Take the next `count` positions of a series: the last lock. Returns the first of them."""
    last_position = await connection.fetchval(
        _TAKE_POSITIONS, before.legal_entity_id, before.series, before.fiscal_year, count
    )
    return int(last_position) - count + 1


@dataclass(frozen=True, slots=True)
class Finalised:
    """A numbered invoice, as it is written down."""

    place: Place
    content: Content
    funded_micro: int
    receivable_micro: int
    event: DocumentEvent


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


async def insert_invoices(connection: Connection, invoices: Sequence[Finalised]) -> None:
    """Write numbered invoices; the constraints of the table refuse gaps and wrong sums."""
    await connection.execute(
        _INSERT_INVOICES,
        [one.place.legal_entity_id for one in invoices],
        [one.place.series for one in invoices],
        [one.place.fiscal_year for one in invoices],
        [one.place.position for one in invoices],
        [one.funded_micro for one in invoices],
        [one.receivable_micro for one in invoices],
        [content_bytes(one.content).decode() for one in invoices],
        [one.event.content_sha256 for one in invoices],
    )
    await _insert_steps(connection, invoices)
    await _mark_numbered(connection, invoices)


_INSERT_STEPS = """
insert into invoice_steps (invoice_id, tenant_id, step)
select n.invoice_id, n.tenant_id, n.step
  from unnest($1::text[], $2::text[], $3::text[]) as n (invoice_id, tenant_id, step)
"""


async def _insert_steps(connection: Connection, invoices: Sequence[Finalised]) -> None:
    """Write down what remains: every invoice gets a PDF; the ledger hears of what is receivable."""
    steps = [(one.content, "pdf") for one in invoices]
    steps += [(one.content, "ledger") for one in invoices if one.receivable_micro > 0]
    await connection.execute(
        _INSERT_STEPS,
        [content.invoice_id for content, _ in steps],
        [content.tenant_id for content, _ in steps],
        [step for _, step in steps],
    )


_MARK_NUMBERED = """
update bills set state = 'numbered', draft = null
 where period = $1 and tenant_id = any($2::text[]) and state = 'computed'
"""


async def _mark_numbered(connection: Connection, invoices: Sequence[Finalised]) -> None:
    await connection.execute(
        _MARK_NUMBERED,
        invoices[0].content.period,
        [one.content.tenant_id for one in invoices],
    )


# What remains to be done for a numbered invoice.


@dataclass(frozen=True, slots=True)
class OpenStep:
    """A numbered invoice whose PDF, or whose answer from the ledger, is outstanding."""

    invoice_id: DocumentId
    tenant_id: TenantId
    period: str
    content: str
    content_sha256: str
    invoiced_micro: int
    first_seq: int
    last_seq: int


_OPEN_STEPS = """
select i.invoice_id, i.tenant_id, i.period, i.content, i.content_sha256, i.invoiced_micro,
       i.first_seq, i.last_seq
  from invoice_steps s
  join invoices i on i.invoice_id = s.invoice_id
 where s.step = $1 and s.done_at is null and s.retry_at <= clock_timestamp()
 order by s.retry_at, s.invoice_id
 limit $2
"""


async def open_steps(connection: Connection, step: str, limit: int) -> list[OpenStep]:
    """Return invoices for which this step is due."""
    return [
        OpenStep(
            invoice_id=row["invoice_id"],
            tenant_id=row["tenant_id"],
            period=row["period"],
            content=row["content"],
            content_sha256=row["content_sha256"],
            invoiced_micro=row["invoiced_micro"],
            first_seq=row["first_seq"],
            last_seq=row["last_seq"],
        )
        for row in await connection.fetch(_OPEN_STEPS, step, limit)
    ]


_STEP_FAILED = """
update invoice_steps
   set reason = $3, attempts = attempts + 1,
       retry_at = clock_timestamp()
         + least(60000, 250 * (1 << least(attempts, 8))) * interval '1 millisecond'
 where invoice_id = $1 and step = $2 and done_at is null
"""


async def step_failed(
    connection: Connection, invoice_id: DocumentId, step: str, reason: str
) -> None:
    """Record why a step failed; it is tried again, ever later, at most a minute."""
    await connection.execute(_STEP_FAILED, invoice_id, step, reason[:1000])


_KEEP_PDF = """
insert into invoice_pdfs (invoice_id, tenant_id, pdf, pdf_sha256)
values ($1, $2, $3, encode(sha256($3), 'hex'))
on conflict (invoice_id) do nothing
"""


async def keep_pdf(
    connection: Connection, invoice_id: DocumentId, tenant_id: TenantId, pdf: bytes
) -> None:
    """Keep the rendered PDF of an invoice, once."""
    await connection.execute(_KEEP_PDF, invoice_id, tenant_id, pdf)


_STEP_DONE = """
update invoice_steps
   set done_at = clock_timestamp(), outcome = $3, reason = null, attempts = attempts + 1
 where invoice_id = $1 and step = $2 and done_at is null
"""


async def step_done(
    connection: Connection, invoice_id: DocumentId, step: str, outcome: str
) -> DocumentEvent | None:
    """Record a step's outcome; returns what to announce when the invoice is then complete."""
    await _lock_steps(connection, invoice_id)
    if await connection.execute(_STEP_DONE, invoice_id, step, outcome) != "UPDATE 1":
        return None
    return await _complete_event(connection, invoice_id)


_LOCK_STEPS = """
select step from invoice_steps where invoice_id = $1 order by step for update
"""


async def _lock_steps(connection: Connection, invoice_id: DocumentId) -> None:
    """Hold all steps of an invoice, so that of two that end at once the second sees the first."""
    await connection.fetch(_LOCK_STEPS, invoice_id)


_COMPLETE = """
select i.invoice_id, i.tenant_id, i.legal_entity_id, i.series, i.fiscal_year, i.position, i.number,
       i.period, i.content_sha256, p.pdf_sha256
  from invoices i
  join invoice_pdfs p on p.invoice_id = i.invoice_id
 where i.invoice_id = $1
   and not exists (select from invoice_steps s
                    where s.invoice_id = i.invoice_id and s.done_at is null)
"""


async def _complete_event(connection: Connection, invoice_id: DocumentId) -> DocumentEvent | None:
    row = await connection.fetchrow(_COMPLETE, invoice_id)
    if row is None:
        return None
    return DocumentEvent(
        invoice_id=row["invoice_id"],
        tenant_id=row["tenant_id"],
        legal_entity=row["legal_entity_id"],
        series=row["series"],
        fiscal_year=row["fiscal_year"],
        position=row["position"],
        number=row["number"],
        period=row["period"],
        state="finalised",
        content_sha256=row["content_sha256"],
        pdf_sha256=row["pdf_sha256"],
    )


_WAITING = """
select 'compute' as step, b.tenant_id, b.attempts, b.reason
  from bills b
 where b.period = $1 and b.state in ('pending', 'computed')
union all
select s.step, s.tenant_id, s.attempts, s.reason
  from invoices i
  join invoice_steps s on s.invoice_id = i.invoice_id
 where i.period = $1 and s.done_at is null
 order by step, tenant_id
 limit 1000
"""


async def waiting(connection: Connection, period: str) -> list[Blocker]:
    """Return what a month that is being closed still waits for, and why."""
    return [
        Blocker(
            kind=row["step"],
            hub=None,
            source=None,
            tenant_id=row["tenant_id"],
            detail=f"attempt {row['attempts']}: {row['reason']}"
            if row["reason"]
            else "in progress",
        )
        for row in await connection.fetch(_WAITING, period)
    ]


_CLOSE_IF_DONE = """
update closings c set closed_at = clock_timestamp()
 where c.period = $1 and c.closed_at is null
   and not exists (select from bills b
                    where b.period = c.period and b.state in ('pending', 'computed'))
   and not exists (select from invoices i
                     join invoice_steps s on s.invoice_id = i.invoice_id
                    where i.period = c.period and s.done_at is null)
"""


async def close_if_done(connection: Connection, period: str) -> bool:
    """Close a month once each of its bills is skipped or complete; says whether it did."""
    return await connection.execute(_CLOSE_IF_DONE, period) == "UPDATE 1"
