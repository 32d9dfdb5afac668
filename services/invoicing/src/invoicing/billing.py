"""A month's charges become the lines of a bill: exact sums, one rounding per line, tax per line.

Pipeline, version 1. Charges arrive rated by metering and split by the ledger into what lots funded,
what is receivable and what is unfunded; nothing is priced again here.

1. *Rated usage* is grouped by (hub, SKU, price class); that partition is the line.
2. A line's exact net is what was funded plus what is receivable (micro-units). What the ledger
   left *unfunded* is never billed.
3. The net is rounded once, half-up, to minor units, and the difference is kept, so that nothing is
   lost or found: `residue_micro = net_minor x 10 000 - net_micro`.
4. Tax is computed per line from the rounded net, and rounded once, half-up.
5. Grants and prepaid credit are *tender*: they do not reduce the taxable base.
   `tender_minor = floor(funded / 10 000)` of the month; `due = total - tender`. The tender is
   floored once and lines are rounded one by one, so with very small untaxed lines the amount due
   may be a few minor units below zero: it is then simply owed.

Sums are Python integers of any size; no amount is ever a float. `waterfall` accounts for the way
from what the ledger charged to what invoices say; it ends at exactly 0 or something is wrong.

Refusals: `TaxMissing` when a line's hub has no tax row; `ZeroBill` when no line comes to a whole
minor unit (a zero invoice is skipped and burns no number).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hisab_contracts.ids import HubCode, PriceClass, Sku
from hisab_contracts.units import (
    MICRO_PER_MINOR,
    floor_gpu_ms,
    minor_half_up,
    tax_minor_half_up,
    tender_minor_floor,
)
from invoicing.tax import TaxMissing, TaxRow

PIPELINE_VERSION = 1
"""Named on every invoice; a change of any rule above is a new version beside this one."""


class UnbalancedError(Exception):
    """An amount that must balance does not: a defect of ours, never a customer's mistake."""


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
    unfunded_micro: int


@dataclass(frozen=True, slots=True)
class ZeroBill:
    """Nothing comes to a whole minor unit: no invoice, no number."""

    net_micro: int


def invariant(holds: object, what: str) -> None:
    """Stop when something that must hold does not (not `assert`: `-O` strips it)."""
    if not holds:
        raise UnbalancedError(what)


def bill_of(
    usage: Iterable[RatedUsage], tax_rows: Mapping[HubCode, TaxRow], at_on: dt.date
) -> Bill | TaxMissing | ZeroBill:
    """Compute a month's bill from its rated usage and the tax rows in force on its tax point.

    Order and grouping of the usage cannot matter: single entries give the same bill as any sums of
    them. Σ lines = tax shares = totals, exactly. Refusals in order: `TaxMissing` for the first hub
    without a row (in order of hub), `ZeroBill`.
    """
    groups = _grouped(usage)
    for group in groups:
        if group.hub not in tax_rows:
            return TaxMissing(group.hub, at_on)
    lines = tuple(_line(group, tax_rows[group.hub]) for group in groups)
    if not any(line.net_minor for line in lines):
        return ZeroBill(sum(line.net_micro for line in lines))
    bill = _total(lines, groups)
    _check(bill)
    return bill


def _grouped(usage: Iterable[RatedUsage]) -> list[RatedUsage]:
    """Sum per (hub, SKU, price class), in that order; what came to nothing at all has no line."""
    sums: dict[tuple[HubCode, Sku, PriceClass], list[int]] = {}
    for item in usage:
        total = sums.setdefault((item.hub, item.sku, item.price_class), [0, 0, 0, 0])
        total[0] += item.used_gpu_ns
        total[1] += item.funded_micro
        total[2] += item.receivable_micro
        total[3] += item.unfunded_micro
    return [RatedUsage(*key, *sums[key]) for key in sorted(sums) if any(sums[key])]


def _line(group: RatedUsage, tax_row: TaxRow) -> Line:
    net_micro = group.funded_micro + group.receivable_micro
    net_minor = minor_half_up(net_micro)
    return Line(
        hub=group.hub,
        sku=group.sku,
        price_class=group.price_class,
        used_gpu_ms=floor_gpu_ms(group.used_gpu_ns),
        net_micro=net_micro,
        net_minor=net_minor,
        residue_micro=net_minor * MICRO_PER_MINOR - net_micro,
        tax_row=tax_row,
        tax_minor=tax_minor_half_up(net_minor, tax_row.tax_bps),
    )


def _total(lines: tuple[Line, ...], groups: Sequence[RatedUsage]) -> Bill:
    net_minor = sum(line.net_minor for line in lines)
    tax_minor = sum(line.tax_minor for line in lines)
    funded_micro = sum(group.funded_micro for group in groups)
    tender_minor = tender_minor_floor(funded_micro)
    return Bill(
        lines=lines,
        tax_shares=_shares(lines),
        net_minor=net_minor,
        tax_minor=tax_minor,
        total_minor=net_minor + tax_minor,
        tender_minor=tender_minor,
        due_minor=net_minor + tax_minor - tender_minor,
        funded_micro=funded_micro,
        receivable_micro=sum(group.receivable_micro for group in groups),
        unfunded_micro=sum(group.unfunded_micro for group in groups),
    )


def _shares(lines: Iterable[Line]) -> tuple[TaxShare, ...]:
    """Sum lines per tax row; the taxes of lines are summed, never computed again from a sum."""
    shares: dict[TaxRow, tuple[int, int]] = {}
    for line in lines:
        net_minor, tax_minor = shares.get(line.tax_row, (0, 0))
        shares[line.tax_row] = (net_minor + line.net_minor, tax_minor + line.tax_minor)
    in_order = sorted(shares, key=lambda row: (row.authority, row.hub))
    return tuple(TaxShare(row, *shares[row]) for row in in_order)


def _check(bill: Bill) -> None:
    """Hold a bill to its own sums, the rounded values it states (constraints say it again)."""
    exact_micro = sum(line.net_micro for line in bill.lines)
    residue_micro = sum(line.residue_micro for line in bill.lines)
    invariant(
        bill.net_minor * MICRO_PER_MINOR == exact_micro + residue_micro,
        "net = exact + residue",
    )
    invariant(bill.funded_micro + bill.receivable_micro == exact_micro, "funded + receivable")
    invariant(sum(share.net_minor for share in bill.tax_shares) == bill.net_minor, "Σ shares = net")
    invariant(sum(share.tax_minor for share in bill.tax_shares) == bill.tax_minor, "Σ shares = tax")
    invariant(bill.due_minor + bill.tender_minor == bill.total_minor, "due + tender = total")


@dataclass(frozen=True, slots=True)
class MonthFacts:
    """What a billing month's charges and documents come to, each figure read on its own.

    Charges come from the entries, the last two from the invoices as they were issued.
    """

    charged_micro: int
    non_commercial_micro: int
    """Charges of tenants who are never invoiced."""
    unfunded_micro: int
    """Billed tenants' charges that nothing pays for: never billed."""
    late_micro: int
    """Charges booked after their tenant's position at the close."""
    not_invoiced_micro: int
    """Charges whose month is not closed, or whose invoice has no number yet."""
    skipped_micro: int
    """Charges of zero bills."""
    residue_micro: int
    net_minor: int


@dataclass(frozen=True, slots=True)
class Step:
    """One named step of a waterfall; what it adds (or takes, when negative)."""

    step: str
    change_micro: int


def waterfall(facts: MonthFacts) -> tuple[Step, ...]:
    """Walk from what the ledger charged for a month to what its invoices say.

    The sum of the steps is the difference; it is 0 exactly when every charge is accounted for once.
    """
    return (
        Step("charged", facts.charged_micro),
        Step("non-commercial", -facts.non_commercial_micro),
        Step("unfunded", -facts.unfunded_micro),
        Step("late", -facts.late_micro),
        Step("not-invoiced", -facts.not_invoiced_micro),
        Step("skipped-zero-invoices", -facts.skipped_micro),
        Step("residue", facts.residue_micro),
        Step("invoiced", -facts.net_minor * MICRO_PER_MINOR),
    )


@dataclass(frozen=True, slots=True)
class ReceivableFacts:
    """What a month's invoices bill of the books, and what the ledger says it moved for them."""

    net_micro: int
    funded_micro: int
    moved_micro: int
    """`invoiced` entries of these documents, read back from the ledger's feed."""
    awaited_micro: int
    """Asked of the ledger, or still to be asked, and not yet seen in its feed."""


def receivable_waterfall(facts: ReceivableFacts) -> tuple[Step, ...]:
    """Walk from the exact net of a month's invoices to what the ledger moved to `invoiced`."""
    return (
        Step("net", facts.net_micro),
        Step("funded", -facts.funded_micro),
        Step("awaited", -facts.awaited_micro),
        Step("moved", -facts.moved_micro),
    )


def difference_micro(steps: Iterable[Step]) -> int:
    """Return what a waterfall leaves unexplained: 0, or something is wrong."""
    return sum(step.change_micro for step in steps)
