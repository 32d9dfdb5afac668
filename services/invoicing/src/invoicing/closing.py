"""The job of closing a month: compute, number, render, post to the ledger; resumed after any crash.

Finance's command writes down the closing and one bill per tenant with its position, and answers.
What follows is this job's, in leased tasks that look for work in the database and record each
outcome there, so that whichever process runs next goes on where the last one stopped:

1. *compute* every bill from the sums of the month's entries (`store`; no locks held);
2. *number* the computed bills in order of tenant, a block per short transaction, once none of the
   month is left to compute; a zero bill is skipped and burns no number. The number brings the date:
   the closing's, or the last of the series where another month has taken a later one;
3. *pdf* and *ledger*, side by side, per numbered invoice: act outside any transaction, record;
4. the month is closed when nothing remains.

A bill that cannot be computed parks its month, with a reason that names the way out; finance's
command, given again, takes it (`core.resumptions`).

A PDF shows its number, so it is rendered after numbering. Until both steps are done the invoice's
state is `finalising`, with the reason and the number of attempts; each step is retried for ever,
ever later, at most a minute apart. What the ledger is asked to move is exactly the receivable part
of the charges the document bills, under a key made of the document.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, assert_never

import msgspec
import structlog

from hisab_contracts import topics
from hisab_contracts.canonical import content_sha256
from hisab_contracts.ids import HubCode
from hisab_contracts.invariants import InvariantBroken, invariant
from invoicing.core.billing import CurrencyUnknown, ZeroBill
from invoicing.core.document import (
    ComputedBill,
    DocumentEvent,
    Draft,
    InvoiceFacts,
    InvoiceStep,
    NumberSeries,
    SeriesPosition,
    content_bytes,
    document_event,
    draft_of,
    finalise,
    issue_date_on,
    issued_invoice,
    read_content,
)
from invoicing.core.periods import BlockerKind
from invoicing.core.tax import TaxMissing, TaxRow
from invoicing.ledger_client import (
    InvoicedCommand,
    InvoicedEntry,
    InvoicedRefused,
    LedgerClient,
    LedgerUnreachable,
)
from invoicing.pdf import RenderFailed, TypesetterProcess, pdf_sha256
from invoicing.store import closings, tax_rates
from invoicing.store.closings import DueStep, NumberingRefused
from invoicing.store.entries import MonthUsage, usage_sums
from runtime.database import transaction_on
from runtime.kafka import Message
from runtime.outbox import Outbox

if TYPE_CHECKING:
    from runtime.database import Connection

BILLS_AT_ONCE: Final = 200
ROUNDS_AT_ONCE: Final = 50
"""How often a month's bills are taken up before other months have their turn."""
NUMBERS_AT_ONCE: Final = 50
STEPS_AT_ONCE: Final = 32
LEDGER_CALLS_AT_ONCE: Final = 8

_log = structlog.get_logger("invoicing.closing")


@dataclass(frozen=True, slots=True)
class Closer:
    """Computes and numbers the bills of months that are being closed."""

    outbox: Outbox

    async def run(self, connection: Connection) -> None:
        """Take every open closing as far as it goes."""
        for period in await closings.open_periods(connection):
            # Bills that fail may be due again before the last of them was tried: without a bound no
            # other month would ever have its turn.
            for _ in range(ROUNDS_AT_ONCE):
                if not await compute_some(connection, period):
                    break
            while await self.number_some(connection, period):
                pass
            async with transaction_on(connection):
                closed = await closings.close_if_done(connection, period)
            if closed:
                _log.info("month closed", period=period)

    async def number_some(
        self, connection: Connection, period: str, limit: int = NUMBERS_AT_ONCE
    ) -> int:
        """Number the next computed bills of a month; says how many.

        Where the database refuses a block, its bills are numbered one by one, up to the one that is
        to blame: that one parks its month with a reason, and no number is lost.
        """
        try:
            return await self._number(connection, period, limit)
        except NumberingRefused as error:
            if limit > 1:
                return await self.number_some(connection, period, 1)
            async with transaction_on(connection):
                await closings.return_next_bill(connection, period, f"refused a number: {error}")
            return 0

    async def _number(self, connection: Connection, period: str, limit: int) -> int:
        async with transaction_on(connection):
            turn = await closings.lock_numbering(connection, period)
            if turn is None:
                return 0
            drafts = await closings.computed_drafts(connection, period, limit)
            if not drafts:
                return 0
            # The series' lock is the last: from here to the commit nothing is waited for.
            last_on = await closings.lock_series(connection, turn.legal_entity_id, turn.series)
            issued_on = issue_date_on(turn.issued_on, last_on)
            series = NumberSeries.on(turn.legal_entity_id, turn.series, issued_on)
            first = await closings.take_positions(connection, series, len(drafts))
            invoices = [
                finalise(draft, SeriesPosition(series, position), issued_on)
                for position, draft in enumerate(drafts, start=first)
            ]
            await closings.insert_invoices(connection, period, invoices)
            await self.outbox.write(
                connection,
                [_message(document_event(issued_invoice(invoice))) for invoice in invoices],
            )
        return len(invoices)


async def compute_some(connection: Connection, period: str) -> int:
    """Compute some pending bills of a month; says how many were tried."""
    bills = await closings.pending_bills(connection, period, BILLS_AT_ONCE)
    if not bills:
        return 0
    usage = await usage_sums(connection, period, bills)
    tax_rows = await tax_rates.tax_rows(connection)
    # No transaction around all this: what a bill is computed from never changes below its position.
    computed = [compute_bill(facts, usage[facts.tenant_id], tax_rows) for facts in bills]
    async with transaction_on(connection):
        await closings.store_computed(connection, period, computed)
    return len(bills)


def compute_bill(
    facts: InvoiceFacts, month: MonthUsage, tax_rows: Sequence[TaxRow]
) -> ComputedBill:
    """Compute one bill: a draft, nothing to invoice, or a reason that finance can read."""
    try:
        draft = draft_of(facts, month.first_seq, month.usage, tax_rows)
    except InvariantBroken as error:
        # A defect of ours, but of this bill: the others are computed, and the month stays open.
        return _not_computed(facts, "compute", f"does not balance: {error}")
    match draft:
        case Draft():
            return ComputedBill(tenant_id=facts.tenant_id, state="computed", draft=draft)
        case ZeroBill():
            return ComputedBill(tenant_id=facts.tenant_id, state="skipped")
        case TaxMissing(hub, at_on):
            reason = f"no tax row covers {hub} on {at_on}"
            return _not_computed(facts, "tax-missing", reason, hub)
        case CurrencyUnknown(currency):
            reason = f"ISO 4217 gives {currency} no minor unit that could be billed"
            return _not_computed(facts, "currency-unknown", reason)
        case _:
            assert_never(draft)


def _not_computed(
    facts: InvoiceFacts, kind: BlockerKind, reason: str, hub: HubCode | None = None
) -> ComputedBill:
    """Leave a bill pending, with why: it is tried again later."""
    return ComputedBill(
        tenant_id=facts.tenant_id,
        state="pending",
        reason=reason,
        reason_kind=kind,
        reason_hub=hub,
    )


def _message(event: DocumentEvent) -> Message:
    return Message(
        topic=topics.DOCUMENTS, key=event.tenant_id.encode(), value=msgspec.json.encode(event)
    )


@dataclass(frozen=True, slots=True)
class InvoiceRenderer:
    """Renders the PDFs of numbered invoices."""

    typesetter: TypesetterProcess
    outbox: Outbox

    async def run(self, connection: Connection) -> None:
        """Render what is due, one after another."""
        while steps := await closings.due_steps(connection, "pdf", STEPS_AT_ONCE):
            for step in steps:
                await self.render(connection, step)

    async def render(self, connection: Connection, step: DueStep) -> None:
        """Render one invoice and keep its PDF."""
        content = read_content(step.content)
        try:
            # jsonb does not keep bytes: what is set and attached must be what was hashed.
            invariant(content_sha256(content) == step.content_sha256, "content = its hash")
            pdf = await self.typesetter.pdf_of(content_bytes(content))
        except (RenderFailed, InvariantBroken) as error:
            _log.warning("pdf not rendered", invoice_id=step.invoice_id, error=str(error))
            await closings.step_failed(connection, step.invoice_id, "pdf", str(error))
            return
        sha256 = pdf_sha256(pdf)
        async with transaction_on(connection):
            await closings.keep_pdf(connection, step.invoice_id, step.tenant_id, pdf, sha256)
            await record_done(connection, self.outbox, step, "pdf", sha256)


@dataclass(frozen=True, slots=True)
class LedgerPoster:
    """Has the ledger enter what numbered invoices bill."""

    ledger: LedgerClient
    outbox: Outbox

    async def run(self, connection: Connection) -> None:
        """Post what is due, a few at a time."""
        while steps := await closings.due_steps(connection, "ledger", LEDGER_CALLS_AT_ONCE):
            answers = await asyncio.gather(*(self._post(step) for step in steps))
            for step, answer in zip(steps, answers, strict=True):
                await self._record(connection, step, answer)

    async def _post(self, step: DueStep) -> InvoicedEntry | InvoicedRefused:
        command = InvoicedCommand(
            document_id=step.invoice_id,
            tenant_id=step.tenant_id,
            period=step.period,
            invoiced_micro=step.invoiced_micro,
            first_seq=step.first_seq,
            last_seq=step.last_seq,
        )
        try:
            return await self.ledger.post_invoiced(command)
        except LedgerUnreachable as error:
            # Perhaps it was booked and the answer lost: the key makes asking again harmless.
            return InvoicedRefused("unreachable", str(error))

    async def _record(
        self, connection: Connection, step: DueStep, answer: InvoicedEntry | InvoicedRefused
    ) -> None:
        match answer:
            case InvoicedEntry(entry_id):
                async with transaction_on(connection):
                    await record_done(connection, self.outbox, step, "ledger", entry_id)
            case InvoicedRefused(code, detail):
                reason = f"ledger {code}: {detail}"
                _log.warning(
                    "invoice not entered by the ledger", invoice_id=step.invoice_id, reason=reason
                )
                await closings.step_failed(connection, step.invoice_id, "ledger", reason)
            case _:
                assert_never(answer)


async def record_done(
    connection: Connection, outbox: Outbox, step: DueStep, name: InvoiceStep, outcome: str
) -> None:
    """Record a step's outcome, and announce the invoice when nothing more remains."""
    invoice = await closings.step_done(connection, step.invoice_id, name, outcome)
    if invoice is None:
        return
    event = document_event(invoice)
    # While it is finalising nothing has changed for those who follow documents.
    if event.state == "finalised":
        await outbox.write(connection, [_message(event)])
