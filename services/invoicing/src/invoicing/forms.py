"""What the API takes and answers, member by member. Amounts and seqs are strings, rates numbers."""

from __future__ import annotations

import datetime as dt
from typing import Annotated

from msgspec import Meta, Struct

from hisab_contracts.ids import HUB_PATTERN, ID_PATTERN
from invoicing.document import Content, State
from invoicing.invoice_store import Waiting
from runtime.http import Model

_Id = Annotated[str, Meta(pattern=f"^{ID_PATTERN}$")]
_Hub = Annotated[str, Meta(pattern=f"^{HUB_PATTERN}$")]
_Text = Annotated[str, Meta(min_length=1, max_length=200)]


class LegalEntity(Model, frozen=True):
    """Who sells."""

    legal_entity_id: _Id
    name: _Text


class LegalEntityAnswer(Struct, frozen=True):
    """Who sells, and the series of its invoices."""

    legal_entity_id: str
    name: str
    series: str


class TaxRate(Model, frozen=True):
    """From a Karachi date on, an authority asks so much of what a hub sells, by this law."""

    hub: _Hub
    authority: _Text
    tax_bps: Annotated[int, Meta(ge=0, le=10_000)]
    valid_from: dt.date
    citation: Annotated[str, Meta(min_length=1, max_length=500)]


class TaxRateAnswer(Struct, frozen=True):
    """A recorded tax row."""

    tax_version: int
    hub: str
    authority: str
    tax_bps: int
    valid_from: dt.date
    citation: str


class Override(Model, frozen=True):
    """Why a month is closed although it is not complete."""

    reason: Annotated[str, Meta(min_length=1, max_length=1000)]


class CloseBody(Model, frozen=True):
    """The command to close a month; `issued_on` null is the first day of the next month."""

    issued_on: dt.date | None = None
    override: Override | None = None


class BlockedBy(Struct, frozen=True):
    """What stands in the way of a month."""

    kind: str
    hub: str | None
    source: str | None
    tenant_id: str | None
    detail: str


class ClosingAnswer(Struct, frozen=True):
    """The command that closes, or closed, a month."""

    requested_at: str
    issued_on: dt.date
    override: str | None
    closed_at: str | None


class PeriodAnswer(Struct, frozen=True):
    """A billing month: `open`, `closable` by watermark, or `closed` (done, not only asked for)."""

    period: str
    state: str
    blocked_by: list[BlockedBy]
    late_micro: str
    closing: ClosingAnswer | None


class StepAnswer(Struct, frozen=True):
    """One step of a waterfall."""

    step: str
    micro: str


class ReconciliationAnswer(Struct, frozen=True):
    """From what the ledger charged to what invoices say, step by step; differences are 0."""

    period: str
    steps: list[StepAnswer]
    difference_micro: str
    receivable_steps: list[StepAnswer]
    receivable_difference_micro: str
    invoices_count: int
    net_minor: str
    tax_minor: str
    total_minor: str
    tender_minor: str
    due_minor: str
    number_gaps: int


class InvoiceAnswer(Content, frozen=True, kw_only=True):
    """An invoice: its content, and how far its processing is."""

    state: State
    updated_at: str
    waiting_for: tuple[Waiting, ...]
    content_sha256: str
    pdf_sha256: str | None


class RecomputeAnswer(Struct, frozen=True):
    """What a fresh computation out of the entries arrived at."""

    content_sha256: str
    pdf_sha256: str
    identical: bool
