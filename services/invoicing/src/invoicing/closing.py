"""The job of closing a month: compute, number, render, tell the ledger; resumed after any crash.

Finance's command writes down the closing and one bill per tenant with its position, and answers.
What follows is this job's, in leased tasks that look for work in the database and record each
outcome there, so that whichever process runs next goes on where the last one stopped:

1. *compute* every bill from the sums of the month's entries (`store`; no locks held);
2. *number* the computed bills in order of tenant, a block per short transaction, once none of the
   month is left to compute; a zero bill is skipped and burns no number;
3. *pdf* and *ledger*, side by side, per numbered invoice: act outside any transaction, record;
4. the month is closed when nothing remains.

A PDF shows its number, so it is rendered after numbering. Until both steps are done the invoice's
state is `finalising`, with the reason and the number of attempts; each step is retried for ever,
ever later, at most a minute apart. What the ledger is asked to move is exactly the receivable part
of the charges the document bills, under a key made of the document.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, assert_never

import msgspec
import structlog

from hisab_contracts import topics
from hisab_contracts.canonical import content_sha256
from invoicing import closing_store, store
from invoicing.billing import Bill, UnbalancedError, ZeroBill, bill_of, invariant
from invoicing.closing_store import BookUsage, Computed, Finalised, OpenStep
from invoicing.document import (
    DocumentEvent,
    Draft,
    Facts,
    Place,
    content_bytes,
    draft_of,
    numbered,
    read_content,
)
from invoicing.ledger_client import LedgerClient, LedgerUnreachable, Move, Moved, MoveRefused
from invoicing.rendering import PressClient, RenderFailed
from invoicing.tax import TaxMissing, TaxRow, rows_in_force
from runtime.database import transaction_on
from runtime.kafka import Message
from runtime.streams import Outbox

if TYPE_CHECKING:
    from runtime.database import Connection

BILLS_AT_ONCE: Final = 200
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
        for period in await closing_store.open_periods(connection):
            while await compute_some(connection, period):
                pass
            while await self.number_some(connection, period):
                pass
            async with transaction_on(connection):
                closed = await closing_store.close_if_done(connection, period)
            if closed:
                _log.info("month closed", period=period)

    async def number_some(
        self, connection: Connection, period: str, limit: int = NUMBERS_AT_ONCE
    ) -> int:
        """Number the next computed bills of a month in one short transaction; says how many."""
        async with transaction_on(connection):
            numbering = await closing_store.lock_numbering(connection, period)
            if numbering is None:
                return 0
            drafts = await closing_store.computed_drafts(connection, period, limit)
            if not drafts:
                return 0
            place = Place.of(numbering.legal_entity_id, numbering.series, numbering.issued_on)
            first = await closing_store.take_positions(connection, place, len(drafts))
            invoices = [
                _finalised(draft, replace(place, position=first + offset))
                for offset, draft in enumerate(drafts)
            ]
            await closing_store.insert_invoices(connection, invoices)
            await self.outbox.write(connection, [_message(one.event) for one in invoices])
        return len(invoices)


async def compute_some(connection: Connection, period: str) -> int:
    """Compute some pending bills of a month; says how many were tried."""
    bills = await closing_store.pending_bills(connection, period, BILLS_AT_ONCE)
    if not bills:
        return 0
    usage = await closing_store.usage_sums(connection, period, bills)
    tax_rows = await store.tax_rows(connection)
    computed = [compute(bill, usage[bill.tenant_id], tax_rows) for bill in bills]
    async with transaction_on(connection):
        await closing_store.store_computed(connection, period, computed)
    return len(bills)


def compute(facts: Facts, book: BookUsage, tax_rows: Sequence[TaxRow]) -> Computed:
    """Compute one bill: a draft, nothing to invoice, or a reason that finance can read."""
    in_force = rows_in_force(tax_rows, facts.tax_point_on, facts.tax_version)
    try:
        bill = bill_of(book.usage, in_force, facts.tax_point_on)
    except UnbalancedError as error:
        return Computed(facts.tenant_id, None, f"does not balance: {error}")
    match bill:
        case Bill():
            draft = draft_of(replace(facts, first_seq=book.first_seq), bill)
            return Computed(facts.tenant_id, draft, None)
        case ZeroBill():
            return Computed(facts.tenant_id, None, None)
        case TaxMissing(hub, at_on):
            return Computed(facts.tenant_id, None, f"no tax row covers {hub} on {at_on}")
        case _:
            assert_never(bill)


def _finalised(draft: Draft, place: Place) -> Finalised:
    content = numbered(draft, place)
    event = DocumentEvent(
        invoice_id=content.invoice_id,
        tenant_id=content.tenant_id,
        legal_entity=place.legal_entity_id,
        series=place.series,
        fiscal_year=place.fiscal_year,
        position=place.position,
        number=content.number,
        period=content.period,
        state="finalising",
        content_sha256=content_sha256(content),
        pdf_sha256=None,
    )
    return Finalised(place, content, int(draft.funded_micro), int(draft.receivable_micro), event)


def _message(event: DocumentEvent) -> Message:
    return Message(topics.DOCUMENTS, event.tenant_id.encode(), msgspec.json.encode(event))


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders the PDFs of numbered invoices."""

    press: PressClient
    outbox: Outbox

    async def run(self, connection: Connection) -> None:
        """Render what is due, one after another."""
        while steps := await closing_store.open_steps(connection, "pdf", STEPS_AT_ONCE):
            for step in steps:
                await self.render(connection, step)

    async def render(self, connection: Connection, step: OpenStep) -> None:
        """Render one invoice and keep its PDF."""
        content = read_content(step.content)
        try:
            invariant(content_sha256(content) == step.content_sha256, "content = its hash")
            pdf = await self.press.pdf_of(content_bytes(content))
        except (RenderFailed, UnbalancedError) as error:
            _log.warning("pdf not rendered", invoice_id=step.invoice_id, error=str(error))
            await closing_store.step_failed(connection, step.invoice_id, "pdf", str(error))
            return
        async with transaction_on(connection):
            await closing_store.keep_pdf(connection, step.invoice_id, step.tenant_id, pdf)
            await record_done(connection, self.outbox, step, "pdf", _sha256(pdf))


@dataclass(frozen=True, slots=True)
class LedgerTeller:
    """Tells the ledger what numbered invoices bill."""

    ledger: LedgerClient
    outbox: Outbox

    async def run(self, connection: Connection) -> None:
        """Tell what is due, a few at a time."""
        while steps := await closing_store.open_steps(connection, "ledger", LEDGER_CALLS_AT_ONCE):
            answers = await asyncio.gather(*(self._tell(step) for step in steps))
            for step, answer in zip(steps, answers, strict=True):
                await self._record(connection, step, answer)

    async def _tell(self, step: OpenStep) -> Moved | MoveRefused:
        move = Move(
            document_id=step.invoice_id,
            tenant_id=step.tenant_id,
            period=step.period,
            invoiced_micro=step.invoiced_micro,
            first_seq=step.first_seq,
            last_seq=step.last_seq,
        )
        try:
            return await self.ledger.move(move)
        except LedgerUnreachable as error:
            return MoveRefused("unreachable", str(error))

    async def _record(
        self, connection: Connection, step: OpenStep, answer: Moved | MoveRefused
    ) -> None:
        match answer:
            case Moved(entry_id):
                async with transaction_on(connection):
                    await record_done(connection, self.outbox, step, "ledger", entry_id)
            case MoveRefused(code, detail):
                reason = f"ledger {code}: {detail}"
                _log.warning("ledger not told", invoice_id=step.invoice_id, reason=reason)
                await closing_store.step_failed(connection, step.invoice_id, "ledger", reason)
            case _:
                assert_never(answer)


async def record_done(
    connection: Connection, outbox: Outbox, step: OpenStep, name: str, outcome: str
) -> None:
    """Record a step's outcome, and announce the invoice when nothing more remains."""
    event = await closing_store.step_done(connection, step.invoice_id, name, outcome)
    if event is not None:
        await outbox.write(connection, [_message(event)])


def _sha256(pdf: bytes) -> str:
    return hashlib.sha256(pdf).hexdigest()
