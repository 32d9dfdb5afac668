"""What an invoice says, word for word: its content, its number, its hash, and how it is printed.

The *content* is everything an invoice states and that never changes. Its canonical JSON (sorted
members, no white space, UTF-8; amounts are strings) is hashed: `content_sha256`. An answer of the
API is the content and five members about its processing, so an outsider checks the hash with

    for name in ("state", "updated_at", "waiting_for", "content_sha256", "pdf_sha256"):
        invoice.pop(name)
    text = json.dumps(invoice, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    hashlib.sha256(text.encode()).hexdigest()

and the PDF carries the same bytes as its attachment `invoice.json`.

Documents are kept for ever and grow only by optional members (decision 0009): a member that may be
absent is `None` by default, so that the encoding leaves it out and an invoice of an older release
keeps its bytes and its hash. No other default is allowed in `Content` and its parts.

Numbers are `<series>-<fiscal year>-<position>`: the fiscal year (July to June, Asia/Karachi) is the
one of `issued_on`, never of today; positions count 1, 2, 3 … per legal entity, series and fiscal
year. Within a series, over all its fiscal years, dates never fall: a draft carries the date of its
closing, and where a later one has been taken meanwhile, its number brings that date
(`issue_date_on`, decision 0016). The invoice's id is derived from what it is for, so computing it
twice gives one id.

`draft_of` goes the whole way from usage and tax rows to a document without a number; the close and
a recomputation both call it, so they cannot drift apart. Its refusals are those of `billing.bill`.

`printed` turns the content into the strings that the PDF's template sets: amounts grouped the
Pakistani way (12,34,567.89) with the decimals of the currency, dates in words. It adds nothing and
computes nothing but form.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

import msgspec
from msgspec import Struct

from hisab_contracts.canonical import Canonical, canonical_bytes, content_sha256
from hisab_contracts.currencies import EXPONENTS
from hisab_contracts.ids import (
    DocumentId,
    HubCode,
    LegalEntityId,
    PriceClass,
    Sku,
    TenantId,
)
from hisab_contracts.invariants import invariant
from hisab_contracts.units import HOUR_MS, first_day_on, fiscal_year, next_month
from invoicing.core.billing import (
    PIPELINE_VERSION,
    Bill,
    BillRefused,
    Line,
    RatedUsage,
    TaxShare,
    bill,
)
from invoicing.core.tax import TaxRow, rows_in_force, tax_point_on

NUMBER_DIGITS: Final = 6

ROUNDED_TO: Final[Mapping[int, str]] = MappingProxyType(
    {0: "whole units", 2: "two decimals", 3: "three decimals"}
)
"""How an invoice says to what its nets are rounded, by the decimals of its currency."""

InvoiceState = Literal["finalising", "finalised"]
"""`finalising`: numbered and hashed, but its PDF or the ledger's answer is still outstanding."""

InvoiceStep = Literal["pdf", "ledger"]
"""What is done with a numbered invoice: its PDF is made, the ledger enters what it bills."""

BillState = Literal["pending", "computed", "skipped", "numbered", "set_aside"]
"""To be computed (again), waiting for its number, nothing to invoice, an invoice, given up by an
override because it could not be computed."""


class InvoiceLine(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line as the document states it."""

    hub: HubCode
    sku: Sku
    price_class: PriceClass
    gpu_ms: str
    net_micro: str
    net_minor: str
    residue_micro: str
    authority: str
    tax_bps: int
    tax_minor: str


class TaxBreakdown(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one authority is owed, and the row it rests on."""

    authority: str
    hub: HubCode
    tax_bps: int
    valid_from: str
    citation: str
    net_minor: str
    tax_minor: str


class EntryRange(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which of the tenant's entries are billed: the month's charges up to `last_seq`.

    `first_seq` is the first of them, `last_seq` the book's position when the month was closed,
    `last_hash` the hash of that entry, which binds the whole book before it.
    """

    first_seq: str
    last_seq: str
    last_hash: str


class Versions(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """By which rules the bill was computed: it is a pure function of entries and these."""

    pipeline_version: int
    tax_version: int
    taken_up_tax_version: int | None = None
    """Where a hub had no row at `tax_version`: the later version that its row was taken from, the
    last where rows were taken up more than once."""


class Content(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that an invoice states. Its canonical encoding is what is hashed."""

    invoice_id: DocumentId
    number: str
    legal_entity: LegalEntityId
    legal_entity_name: str
    tenant_id: TenantId
    period: str
    currency: str
    issued_on: str
    tax_point_on: str
    lines: tuple[InvoiceLine, ...]
    taxes: tuple[TaxBreakdown, ...]
    net_minor: str
    tax_minor: str
    total_minor: str
    tender_minor: str
    due_minor: str
    entries: EntryRange
    versions: Versions


class Draft(Struct, frozen=True):
    """A bill computed and not yet numbered: the number in its content is empty."""

    content: Content
    funded_micro: int
    receivable_micro: int


class DocumentEvent(Struct, frozen=True):
    """What `invoicing.documents.v1` says of a document (key = tenant_id): never its content."""

    invoice_id: DocumentId
    tenant_id: TenantId
    legal_entity: LegalEntityId
    series: str
    fiscal_year: str
    position: int
    number: str
    period: str
    state: InvoiceState
    content_sha256: str
    pdf_sha256: str | None


class OutstandingStep(Struct, frozen=True):
    """A step that a numbered invoice still waits for: `pdf`, or the entry in the `ledger`."""

    step: InvoiceStep
    attempts: int
    reason: str | None
    """Why the last attempt failed; None while it is in progress."""


@dataclass(frozen=True, slots=True)
class NumberSeries:
    """A legal entity's series in one fiscal year: its numbers are 1, 2, 3 … without a gap."""

    legal_entity_id: LegalEntityId
    series: str
    fiscal_year: str

    @classmethod
    def on(cls, legal_entity_id: LegalEntityId, series: str, issued_on: dt.date) -> NumberSeries:
        """Return the series of a document issued on this date, also if it is numbered years later.

        The fiscal year is that of the date of issue, never that of today.
        """
        return cls(legal_entity_id, series, fiscal_year(issued_on))


@dataclass(frozen=True, slots=True)
class SeriesPosition:
    """An invoice's place in its series, counted from 1."""

    number_series: NumberSeries
    position: int

    @property
    def number(self) -> str:
        """What is printed and quoted: `INV-2025-26-000001`."""
        in_series = self.number_series
        return f"{in_series.series}-{in_series.fiscal_year}-{self.position:0{NUMBER_DIGITS}d}"


@dataclass(frozen=True, slots=True)
class InvoiceFacts:
    """What a document needs beside its charges: who, which month, when, from which entries."""

    legal_entity_id: LegalEntityId
    legal_entity_name: str
    series: str
    tenant_id: TenantId
    period: str
    currency: str
    issued_on: dt.date
    tax_version: int
    taken_up_versions: tuple[int, ...]
    """Later versions of the tax table that the bill has taken up, ascending."""
    last_seq: int
    last_hash: str

    @property
    def number_series(self) -> NumberSeries:
        """Return the series that its number is taken from."""
        return NumberSeries.on(self.legal_entity_id, self.series, self.issued_on)


@dataclass(frozen=True, slots=True)
class ComputedBill:
    """What came of a bill: computed with its draft, skipped, or pending with why it failed."""

    tenant_id: TenantId
    state: BillState
    draft: Draft | None = None
    reason: str | None = None
    reason_kind: str | None = None
    """What keeps it from being computed, as `periods.BlockerKind` names it."""
    reason_hub: HubCode | None = None


@dataclass(frozen=True, slots=True)
class FinalisedInvoice:
    """A numbered invoice, as it is written down."""

    at: SeriesPosition
    content: Content
    content_sha256: str
    funded_micro: int
    receivable_micro: int
    """What the ledger is to move from `receivable` to this document."""


@dataclass(frozen=True, slots=True)
class IssuedInvoice:
    """A numbered invoice as others are told of it: what names it, its hashes, what it waits for."""

    invoice_id: DocumentId
    tenant_id: TenantId
    period: str
    number_series: NumberSeries
    position: int
    number: str
    content_sha256: str
    pdf_sha256: str | None
    """None until the PDF is rendered."""
    outstanding: tuple[InvoiceStep, ...]


def document_id(legal_entity_id: LegalEntityId, tenant_id: TenantId, period: str) -> DocumentId:
    """Name the one invoice of (legal entity, tenant, month): `inv-` and 32 hexadecimal digits."""
    text = f"{legal_entity_id}\0{tenant_id}\0{period}"
    return DocumentId(f"inv-{hashlib.sha256(text.encode()).hexdigest()[:32]}")


def default_issued_on(period: str) -> dt.date:
    """Return the first day of the next month in Karachi: when an invoice is dated by default."""
    return first_day_on(next_month(period))


def issue_date_on(wanted_on: dt.date, last_on: dt.date | None) -> dt.date:
    """Return the date of a number that is taken now: what was wanted, or its series' last date.

    Whichever is later: within a series dates never fall.
    """
    return wanted_on if last_on is None else max(wanted_on, last_on)


def draft_of(
    facts: InvoiceFacts, first_seq: int, usage: Iterable[RatedUsage], tax_rows: Collection[TaxRow]
) -> Draft | BillRefused:
    """Compute a month's bill and state it as a document that still lacks its number.

    `usage` are the month's charges up to `facts.last_seq`, one by one or in any sums, the first of
    them at `first_seq`. Of `tax_rows`, the whole table, those count that were recorded when the
    month was closed, or taken up later, and are in force on its tax point. Refusals as `bill`.
    """
    at_on = tax_point_on(facts.period)
    in_force = rows_in_force(tax_rows, at_on, facts.tax_version, facts.taken_up_versions)
    billed = bill(usage, in_force, at_on, facts.currency)
    if not isinstance(billed, Bill):
        return billed
    content = _content(facts, first_seq, billed, at_on)
    return Draft(
        content=content,
        funded_micro=billed.funded_micro,
        receivable_micro=billed.receivable_micro,
    )


def number_draft(draft: Draft, at: SeriesPosition, issued_on: dt.date) -> Content:
    """Give a draft its place in its series and the date of it; nothing else of it changes."""
    invariant(fiscal_year(issued_on) == at.number_series.fiscal_year, "the year is the date's")
    return msgspec.structs.replace(draft.content, number=at.number, issued_on=issued_on.isoformat())


def finalise(draft: Draft, at: SeriesPosition, issued_on: dt.date) -> FinalisedInvoice:
    """Number, date and hash a draft: from now on it never changes."""
    content = number_draft(draft, at, issued_on)
    return FinalisedInvoice(
        at=at,
        content=content,
        content_sha256=content_sha256(content),
        funded_micro=draft.funded_micro,
        receivable_micro=draft.receivable_micro,
    )


def steps_of(invoice: FinalisedInvoice) -> tuple[InvoiceStep, ...]:
    """Return what is left to do: always a PDF; the ledger is asked only where it has to move."""
    return ("pdf", "ledger") if invoice.receivable_micro > 0 else ("pdf",)


def issued_invoice(invoice: FinalisedInvoice) -> IssuedInvoice:
    """Say of an invoice that was just numbered what others are told: all its steps are to come."""
    return IssuedInvoice(
        invoice_id=invoice.content.invoice_id,
        tenant_id=invoice.content.tenant_id,
        period=invoice.content.period,
        number_series=invoice.at.number_series,
        position=invoice.at.position,
        number=invoice.content.number,
        content_sha256=invoice.content_sha256,
        pdf_sha256=None,
        outstanding=steps_of(invoice),
    )


def invoice_state(outstanding: Collection[InvoiceStep | OutstandingStep]) -> InvoiceState:
    """Return the state of a numbered invoice: it follows from what is outstanding, is not stored.

    `finalising` while any step is to be done, `finalised` when none is.
    """
    return "finalising" if outstanding else "finalised"


def document_event(invoice: IssuedInvoice) -> DocumentEvent:
    """Announce an invoice in the state it is in."""
    return DocumentEvent(
        invoice_id=invoice.invoice_id,
        tenant_id=invoice.tenant_id,
        legal_entity=invoice.number_series.legal_entity_id,
        series=invoice.number_series.series,
        fiscal_year=invoice.number_series.fiscal_year,
        position=invoice.position,
        number=invoice.number,
        period=invoice.period,
        state=invoice_state(invoice.outstanding),
        content_sha256=invoice.content_sha256,
        pdf_sha256=invoice.pdf_sha256,
    )


def _content(facts: InvoiceFacts, first_seq: int, billed: Bill, at_on: dt.date) -> Content:
    return Content(
        invoice_id=document_id(facts.legal_entity_id, facts.tenant_id, facts.period),
        number="",
        legal_entity=facts.legal_entity_id,
        legal_entity_name=facts.legal_entity_name,
        tenant_id=facts.tenant_id,
        period=facts.period,
        currency=facts.currency,
        issued_on=facts.issued_on.isoformat(),
        tax_point_on=at_on.isoformat(),
        lines=tuple(_line(line) for line in billed.lines),
        taxes=tuple(_taxes(share) for share in billed.tax_shares),
        net_minor=str(billed.net_minor),
        tax_minor=str(billed.tax_minor),
        total_minor=str(billed.total_minor),
        tender_minor=str(billed.tender_minor),
        due_minor=str(billed.due_minor),
        entries=EntryRange(
            first_seq=str(first_seq), last_seq=str(facts.last_seq), last_hash=facts.last_hash
        ),
        versions=Versions(
            pipeline_version=PIPELINE_VERSION,
            tax_version=facts.tax_version,
            taken_up_tax_version=_taken_up(facts, billed),
        ),
    )


def _taken_up(facts: InvoiceFacts, billed: Bill) -> int | None:
    """Return the last version that was taken up, where any line rests on a row of later."""
    rests_on = any(line.tax_row.tax_version > facts.tax_version for line in billed.lines)
    return facts.taken_up_versions[-1] if rests_on else None


def content_bytes(content: Content) -> bytes:
    """Encode the content canonically: what is hashed, stored, attached to the PDF."""
    return canonical_bytes(content)


def read_content(encoded: bytes | str) -> Content:
    """Read a content back; encoding it again gives the same bytes."""
    return msgspec.json.decode(encoded, type=Content)


def _line(line: Line) -> InvoiceLine:
    return InvoiceLine(
        hub=line.hub,
        sku=line.sku,
        price_class=line.price_class,
        gpu_ms=str(line.used_gpu_ms),
        net_micro=str(line.net_micro),
        net_minor=str(line.net_minor),
        residue_micro=str(line.residue_micro),
        authority=line.tax_row.authority,
        tax_bps=line.tax_row.tax_bps,
        tax_minor=str(line.tax_minor),
    )


def _taxes(share: TaxShare) -> TaxBreakdown:
    return TaxBreakdown(
        authority=share.tax_row.authority,
        hub=share.tax_row.hub,
        tax_bps=share.tax_row.tax_bps,
        valid_from=share.tax_row.valid_from.isoformat(),
        citation=share.tax_row.citation,
        net_minor=str(share.net_minor),
        tax_minor=str(share.tax_minor),
    )


def printed(content: Content) -> Canonical:
    """Return the strings the template sets, in the order they are set."""
    issued_on = dt.date.fromisoformat(content.issued_on)
    tax_point = dt.date.fromisoformat(content.tax_point_on)
    decimal_count = EXPONENTS[content.currency]

    def money(shown_minor: str) -> str:
        return grouped_minor(int(shown_minor), decimal_count)

    return {
        "seller": content.legal_entity_name,
        "seller_id": content.legal_entity,
        "buyer_id": content.tenant_id,
        "number": content.number,
        "invoice_id": content.invoice_id,
        "issued": long_date(issued_on),
        "period": f"{first_day_on(content.period):%B %Y}",
        "from": long_date(first_day_on(content.period)),
        "until": long_date(tax_point),
        "currency": content.currency,
        "rounded_to": ROUNDED_TO[decimal_count],
        "lines": [_printed_line(line, decimal_count) for line in content.lines],
        "taxes": [_printed_tax(tax, decimal_count) for tax in content.taxes],
        "net": money(content.net_minor),
        "tax": money(content.tax_minor),
        "total": money(content.total_minor),
        "tender": "" if content.tender_minor == "0" else money(f"-{content.tender_minor}"),
        "due": money(content.due_minor),
        "entries": f"{content.entries.first_seq} to {content.entries.last_seq}",
        "last_hash": content.entries.last_hash,
        "versions": _printed_versions(content.versions),
        "content_sha256": content_sha256(content),
    }


def _printed_versions(versions: Versions) -> str:
    text = f"pipeline {versions.pipeline_version}, tax table {versions.tax_version}"
    if versions.taken_up_tax_version is None:
        return text
    return f"{text}, later rows taken up from {versions.taken_up_tax_version}"


def _printed_line(line: InvoiceLine, decimal_count: int) -> Canonical:
    return {
        "hub": line.hub,
        "sku": line.sku,
        "price_class": line.price_class.replace("_", "-"),
        "gpu_hours": gpu_hours(int(line.gpu_ms)),
        "net": grouped_minor(int(line.net_minor), decimal_count),
        "tax_rate": percent(line.tax_bps),
        "tax": grouped_minor(int(line.tax_minor), decimal_count),
        "gross": grouped_minor(int(line.net_minor) + int(line.tax_minor), decimal_count),
    }


def _printed_tax(tax: TaxBreakdown, decimal_count: int) -> Canonical:
    return {
        "authority": tax.authority,
        "hub": tax.hub,
        "tax_rate": percent(tax.tax_bps),
        "valid_from": long_date(dt.date.fromisoformat(tax.valid_from)),
        "citation": tax.citation,
        "net": grouped_minor(int(tax.net_minor), decimal_count),
        "tax": grouped_minor(int(tax.tax_minor), decimal_count),
    }


def grouped_minor(shown_minor: int, decimal_count: int) -> str:
    """Write minor units with the currency's decimals, grouped as in Pakistan: 12,34,56,789.05."""
    whole, part = divmod(abs(shown_minor), 10**decimal_count)
    shown = f"{'-' if shown_minor < 0 else ''}{_grouped(str(whole))}"
    return f"{shown}.{part:0{decimal_count}d}" if decimal_count else shown


def _grouped(digits: str) -> str:
    """Group digits: the last three stand together, all before them in pairs (lakh, crore)."""
    groups: list[str] = []
    head, tail = digits[:-3], digits[-3:]
    while head:
        groups.insert(0, head[-2:])
        head = head[:-2]
    return ",".join([*groups, tail])


def gpu_hours(used_gpu_ms: int) -> str:
    """Write GPU-milliseconds as GPU-hours with four decimals, floored: a quantity for display."""
    invariant(used_gpu_ms >= 0, "GPU time of a line is never negative")
    whole, rest_ms = divmod(used_gpu_ms, HOUR_MS)
    return f"{_grouped(str(whole))}.{rest_ms * 10_000 // HOUR_MS:04d}"


def percent(rate_bps: int) -> str:
    """Write basis points as per cent without needless zeros: `16 %`, `19.5 %`."""
    whole, part = divmod(rate_bps, 100)
    decimals = f"{part:02d}".rstrip("0")
    return f"{whole}.{decimals} %" if decimals else f"{whole} %"


def long_date(day_on: dt.date) -> str:
    """Write a date in words: `1 August 2025`."""
    return f"{day_on.day} {day_on:%B %Y}"
