"""A month's charges become the lines of a bill: exact sums, one rounding per line, tax per line.

Pipeline, version 1. Charges arrive rated by metering and split by the ledger into what lots funded,
what is receivable and what is unfunded; nothing is priced again here.

1. *An entry* of a book is read as far as bills need it (`book_entry_of`). The postings of a charge
   say who pays, in the tenant's view: what pays is negative. `lot:*` accounts fund it, the rest is
   `receivable` or `unfunded`.
2. *Rated usage* is grouped by (hub, SKU, price class); that partition is the line.
3. A line's exact net is what was funded plus what is receivable (micro-units). What the ledger
   left *unfunded* is never billed.
4. The net is rounded once, half-up, to minor units, and the difference is kept, so that nothing is
   lost or found: `residue_micro = net_minor x M - net_micro`. M is how many micro a minor unit of
   the book's currency has (`hisab_contracts.currencies`): 10 000 for PKR.
5. Tax is computed per line from the rounded net, and rounded once, half-up.
6. Grants and prepaid credit are *tender*: they do not reduce the taxable base.
   `tender_minor = floor(funded / M)` of the month; `due = total - tender`. The tender is
   floored once and lines are rounded one by one, so with very small untaxed lines the amount due
   may be a few minor units below zero: it is then simply owed.

Sums are Python integers of any size; no amount is ever a float.

Refusals of `bill`, in order: `CurrencyUnknown` when ISO 4217 gives the book's currency no minor
unit (books opened before codes were checked); `TaxMissing` when a line's hub has no tax row;
`ZeroBill` when no line comes to a whole minor unit (a zero invoice is skipped and burns no number).
`book_entry_of` refuses nothing: an entry that contradicts itself, or its kind, stops whoever reads
it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from hisab_contracts.currencies import micro_per_minor_of
from hisab_contracts.entries import ChargeDetail, Entry, Posting
from hisab_contracts.ids import DocumentId, HubCode, PriceClass, Sku, TenantId, entry_id
from hisab_contracts.invariants import invariant
from hisab_contracts.units import (
    floor_gpu_ms,
    minor_half_up,
    month_of,
    tax_minor_half_up,
    tender_minor_floor,
)
from invoicing.core.tax import TaxMissing, TaxRow

PIPELINE_VERSION = 1
"""Named on every invoice; a change of any rule above is a new version beside this one."""


@dataclass(frozen=True, slots=True)
class RatedUsage:
    """What one charge entry, or a sum of several, booked for one (hub, SKU, price class)."""

    hub: HubCode
    sku: Sku
    price_class: PriceClass
    used_gpu_ns: int
    funded_micro: int
    """Drawn from lots: grants and prepaid credit."""
    receivable_micro: int
    unfunded_micro: int

    @property
    def charge_micro(self) -> int:
        """What was charged: the three ways it was paid, together."""
        return self.funded_micro + self.receivable_micro + self.unfunded_micro


@dataclass(frozen=True, slots=True)
class BilledCharge:
    """A charge as bills see it: the month and hour of its usage, and who pays what of it."""

    period: str
    hour_ms: int
    usage: RatedUsage


@dataclass(frozen=True, slots=True)
class InvoicedReceivable:
    """What the ledger moved from receivable to one document."""

    document_id: DocumentId
    moved_micro: int


@dataclass(frozen=True, slots=True)
class BookEntry:
    """One entry of a book as bills see it; of other kinds only that it is there."""

    tenant_id: TenantId
    seq: int
    kind: str
    entry_hash: bytes
    detail: BilledCharge | InvoicedReceivable | None


@dataclass(frozen=True, slots=True)
class FetchedCharge:
    """What bills need of a charge that was fetched: its line, its usage hour, time and amount.

    The members are those of `ChargeDetail`, by the same names.
    """

    hub: HubCode
    sku: Sku
    price_class: PriceClass
    hour_ms: int
    gpu_ns: int
    charge_micro: int


@dataclass(frozen=True, slots=True)
class FetchedEntry:
    """What bills need of an entry that was fetched over HTTP, where the topic brings an `Entry`.

    The members are those of `Entry`, by the same names: `book_entry_of` reads both. What else an
    entry may say (its hold, its grant) is no matter of bills, so it may grow without this service.
    """

    tenant_id: TenantId
    seq: int
    kind: str
    hash: str
    postings: Sequence[Posting]
    charge: FetchedCharge | None


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a bill: a month's usage of one SKU, in one price class, at one hub."""

    hub: HubCode
    sku: Sku
    price_class: PriceClass
    used_gpu_ms: int
    net_micro: int
    net_minor: int
    residue_micro: int
    tax_row: TaxRow
    tax_minor: int


@dataclass(frozen=True, slots=True)
class TaxShare:
    """What one authority is owed by a bill: the sum of its lines."""

    tax_row: TaxRow
    net_minor: int
    tax_minor: int


@dataclass(frozen=True, slots=True)
class Bill:
    """A month of one tenant, in total order of its lines; every total is a sum of lines."""

    micro_per_minor: int
    """M of the bill's currency, by which each of its amounts was rounded."""
    lines: tuple[Line, ...]
    tax_shares: tuple[TaxShare, ...]
    net_minor: int
    tax_minor: int
    total_minor: int
    tender_minor: int
    due_minor: int
    funded_micro: int
    receivable_micro: int
    """What the ledger moves from `receivable` to this document: exactly what it bills of it."""


@dataclass(frozen=True, slots=True)
class CurrencyUnknown:
    """The book's currency has no minor unit in ISO 4217: nobody may guess how it is rounded."""

    currency: str


@dataclass(frozen=True, slots=True)
class ZeroBill:
    """Nothing comes to a whole minor unit: no invoice, no number."""


BillRefused = CurrencyUnknown | TaxMissing | ZeroBill
"""Why there is no bill, in order of precedence."""


def book_entry_of(entry: Entry | FetchedEntry) -> BookEntry:
    """Read what bills need of an entry: the same whether the topic or the ledger's API brought it.

    Raises `InvariantBroken` when a charge's payers do not add up to it, and `ValidationError` when
    an entry lacks what its kind promises: nobody may bill by guess.
    """
    detail: BilledCharge | InvoicedReceivable | None = None
    if entry.kind == "charge":
        if entry.charge is None:
            raise msgspec.ValidationError(
                f"{entry_id(entry.tenant_id, entry.seq)}: a charge without its detail"
            )
        usage = _usage_of(entry.charge, entry.postings)
        # The month is the usage hour's, not the booking's: usage that comes late still belongs to
        # the month in which it was used.
        detail = BilledCharge(month_of(entry.charge.hour_ms), entry.charge.hour_ms, usage)
    elif entry.kind == "invoiced":
        detail = _invoiced_by(entry)
    return BookEntry(
        tenant_id=entry.tenant_id,
        seq=entry.seq,
        kind=entry.kind,
        entry_hash=bytes.fromhex(entry.hash),
        detail=detail,
    )


def _usage_of(charge: ChargeDetail | FetchedCharge, postings: Iterable[Posting]) -> RatedUsage:
    """Split a charge by who pays: lots, the tenant's credit, or nobody."""
    funded_micro = receivable_micro = unfunded_micro = 0
    for posting in postings:
        if posting.account.startswith("lot:"):
            funded_micro -= posting.posting_micro
        elif posting.account == "receivable":
            receivable_micro -= posting.posting_micro
        elif posting.account == "unfunded":
            unfunded_micro -= posting.posting_micro
    usage = RatedUsage(
        hub=charge.hub,
        sku=charge.sku,
        price_class=charge.price_class,
        used_gpu_ns=charge.gpu_ns,
        funded_micro=funded_micro,
        receivable_micro=receivable_micro,
        unfunded_micro=unfunded_micro,
    )
    invariant(usage.charge_micro == charge.charge_micro, "funded + receivable + unfunded = charge")
    return usage


def _invoiced_by(entry: Entry | FetchedEntry) -> InvoicedReceivable:
    """Read which document took how much: `invoiced:<document>` takes what leaves `receivable`."""
    for posting in entry.postings:
        name, _, document_id = posting.account.partition(":")
        if name == "invoiced":
            return InvoicedReceivable(DocumentId(document_id), -posting.posting_micro)
    raise msgspec.ValidationError(
        f"{entry_id(entry.tenant_id, entry.seq)}: an invoiced entry that names no document"
    )


def bill(
    usage: Iterable[RatedUsage], tax_rows: Mapping[HubCode, TaxRow], at_on: dt.date, currency: str
) -> Bill | BillRefused:
    """Compute a month's bill from its rated usage and the tax rows in force on its tax point.

    Order and grouping of the usage cannot matter: single entries give the same bill as any sums of
    them. Σ lines = tax shares = totals, exactly. Refusals in order: `CurrencyUnknown`, `TaxMissing`
    for the first hub without a row (in order of hub), `ZeroBill`.
    """
    micro_per_minor = micro_per_minor_of(currency)
    if micro_per_minor is None:
        return CurrencyUnknown(currency)
    groups = _grouped(usage)
    for group in groups:
        if group.hub not in tax_rows:
            return TaxMissing(group.hub, at_on)
    lines = tuple(_line(group, tax_rows[group.hub], micro_per_minor) for group in groups)
    if not any(line.net_minor for line in lines):
        return ZeroBill()
    whole = _total(lines, groups, micro_per_minor)
    _check(whole)
    return whole


def _grouped(usage: Iterable[RatedUsage]) -> list[RatedUsage]:
    """Sum per (hub, SKU, price class), in that order; what came to nothing at all has no line."""
    sums: dict[tuple[HubCode, Sku, PriceClass], list[int]] = {}
    for item in usage:
        # Four plain integers, not a fact per item: a recomputed invoice sums 100 000 charges here.
        total = sums.setdefault((item.hub, item.sku, item.price_class), [0, 0, 0, 0])
        total[0] += item.used_gpu_ns
        total[1] += item.funded_micro
        total[2] += item.receivable_micro
        total[3] += item.unfunded_micro
    # Line and sums are in the order of the members of `RatedUsage`.
    return [RatedUsage(*line, *sums[line]) for line in sorted(sums) if any(sums[line])]


def _line(group: RatedUsage, tax_row: TaxRow, micro_per_minor: int) -> Line:
    net_micro = group.funded_micro + group.receivable_micro
    net_minor = minor_half_up(net_micro, micro_per_minor)
    return Line(
        hub=group.hub,
        sku=group.sku,
        price_class=group.price_class,
        used_gpu_ms=floor_gpu_ms(group.used_gpu_ns),
        net_micro=net_micro,
        net_minor=net_minor,
        residue_micro=net_minor * micro_per_minor - net_micro,
        tax_row=tax_row,
        tax_minor=tax_minor_half_up(net_minor, tax_row.tax_bps),
    )


def _total(lines: tuple[Line, ...], groups: Sequence[RatedUsage], micro_per_minor: int) -> Bill:
    net_minor = sum(line.net_minor for line in lines)
    tax_minor = sum(line.tax_minor for line in lines)
    funded_micro = sum(group.funded_micro for group in groups)
    tender_minor = tender_minor_floor(funded_micro, micro_per_minor)
    return Bill(
        micro_per_minor=micro_per_minor,
        lines=lines,
        tax_shares=_shares(lines),
        net_minor=net_minor,
        tax_minor=tax_minor,
        total_minor=net_minor + tax_minor,
        tender_minor=tender_minor,
        due_minor=net_minor + tax_minor - tender_minor,
        funded_micro=funded_micro,
        receivable_micro=sum(group.receivable_micro for group in groups),
    )


def _shares(lines: Iterable[Line]) -> tuple[TaxShare, ...]:
    """Sum lines per tax row; the taxes of lines are summed, never computed again from a sum."""
    shares: dict[TaxRow, tuple[int, int]] = {}
    for line in lines:
        net_minor, tax_minor = shares.get(line.tax_row, (0, 0))
        shares[line.tax_row] = (net_minor + line.net_minor, tax_minor + line.tax_minor)
    # In order of authority, so that a breakdown does not depend on the order of the lines.
    in_order = sorted(shares, key=lambda row: (row.authority, row.hub))
    return tuple(
        TaxShare(tax_row=row, net_minor=shares[row][0], tax_minor=shares[row][1])
        for row in in_order
    )


def _check(bill: Bill) -> None:
    """Hold a bill to its own sums, the rounded values it states (constraints say it again)."""
    exact_micro = sum(line.net_micro for line in bill.lines)
    residue_micro = sum(line.residue_micro for line in bill.lines)
    invariant(
        bill.net_minor * bill.micro_per_minor == exact_micro + residue_micro,
        "net = exact + residue",
    )
    invariant(bill.funded_micro + bill.receivable_micro == exact_micro, "funded + receivable")
    invariant(sum(share.net_minor for share in bill.tax_shares) == bill.net_minor, "Σ shares = net")
    invariant(sum(share.tax_minor for share in bill.tax_shares) == bill.tax_minor, "Σ shares = tax")
    invariant(bill.due_minor + bill.tender_minor == bill.total_minor, "due + tender = total")
