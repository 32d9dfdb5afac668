"""Does everything add up: the named steps from what the ledger charged to what invoices say.

A *waterfall* starts at one figure, takes off each known difference by name, and ends at exactly 0,
or something is wrong. There are two: from a month's charges to its invoices (`waterfall`), and from
the exact net of those invoices to what the ledger moved to `invoiced` (`receivable_waterfall`).
Each figure is read on its own, from the entries or from the documents, never computed from another:
a waterfall whose last step is "the rest" would always end at 0 and prove nothing.

Every charge of a month is in exactly one place (`place_of`). The database sums charges by what
decides about the place; which place that is, is decided here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from hisab_contracts.reference import TenantKind
from invoicing.core.document import BillState

ChargePlace = Literal["non-commercial", "not-invoiced", "late", "skipped", "set-aside", "invoiced"]
"""Where a charge is, once its month is closed or not; each charge is in exactly one place."""


@dataclass(frozen=True, slots=True)
class ChargeSums:
    """The sums of those charges of a month that agree in what decides about their place."""

    tenant_kind: TenantKind | None
    """None while nothing says yet who the tenant is."""
    bill_state: BillState | None
    """None where the close made no bill for the tenant."""
    before_cut: bool
    """The charge lies at or before the bill's position: it was booked before the close."""
    charge_micro: int
    unfunded_micro: int


@dataclass(frozen=True, slots=True)
class DocumentSums:
    """What a month's invoices say, as they were issued."""

    residue_micro: int
    stated_micro: int
    """Their nets in whole minor units, as micro: each by the M of its own currency."""


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
    set_aside_micro: int
    """Charges of bills that could not be computed and were set aside by an override."""
    residue_micro: int
    stated_micro: int


WaterfallStepName = Literal[
    "charged",
    "non-commercial",
    "unfunded",
    "late",
    "not-invoiced",
    "skipped-zero-invoices",
    "set-aside",
    "residue",
    "invoiced",
    "net",
    "funded",
    "awaited",
    "moved",
]
"""The steps of both waterfalls, as the API names them."""


@dataclass(frozen=True, slots=True)
class WaterfallStep:
    """One named step of a waterfall; what it adds (or takes, when negative)."""

    step: WaterfallStepName
    change_micro: int


def place_of(sums: ChargeSums, *, closed: bool) -> ChargePlace:
    """Say where charges are. `closed`: finance has asked to close their month.

    The order decides: a startup's charge is never late, and a late one stays late whatever became
    of the bill that it missed.
    """
    if sums.tenant_kind not in (None, "commercial"):
        return "non-commercial"
    if sums.tenant_kind is None or not closed:
        return "not-invoiced"
    if sums.bill_state is None or not sums.before_cut:
        return "late"
    if sums.bill_state == "skipped":
        return "skipped"
    if sums.bill_state == "set_aside":
        return "set-aside"
    return "invoiced" if sums.bill_state == "numbered" else "not-invoiced"


def month_facts(
    charges: Iterable[ChargeSums], documents: DocumentSums, *, closed: bool
) -> MonthFacts:
    """Put a month's charges in their places, beside what its documents say."""
    charged_micro = unfunded_micro = 0
    in_place: dict[ChargePlace, int] = {}
    for sums in charges:
        place = place_of(sums, closed=closed)
        charged_micro += sums.charge_micro
        in_place[place] = in_place.get(place, 0) + sums.charge_micro
        if place == "invoiced":
            unfunded_micro += sums.unfunded_micro
    return MonthFacts(
        charged_micro=charged_micro,
        non_commercial_micro=in_place.get("non-commercial", 0),
        unfunded_micro=unfunded_micro,
        late_micro=in_place.get("late", 0),
        not_invoiced_micro=in_place.get("not-invoiced", 0),
        skipped_micro=in_place.get("skipped", 0),
        set_aside_micro=in_place.get("set-aside", 0),
        residue_micro=documents.residue_micro,
        stated_micro=documents.stated_micro,
    )


def waterfall(facts: MonthFacts) -> tuple[WaterfallStep, ...]:
    """Walk from what the ledger charged for a month to what its invoices say.

    The sum of the steps is the difference; it is 0 exactly when every charge is accounted for once.
    """
    return (
        WaterfallStep("charged", facts.charged_micro),
        WaterfallStep("non-commercial", -facts.non_commercial_micro),
        WaterfallStep("unfunded", -facts.unfunded_micro),
        WaterfallStep("late", -facts.late_micro),
        WaterfallStep("not-invoiced", -facts.not_invoiced_micro),
        WaterfallStep("skipped-zero-invoices", -facts.skipped_micro),
        WaterfallStep("set-aside", -facts.set_aside_micro),
        WaterfallStep("residue", facts.residue_micro),
        WaterfallStep("invoiced", -facts.stated_micro),
    )


@dataclass(frozen=True, slots=True)
class ReceivableFacts:
    """What a month's invoices bill of the books, and what the ledger says it moved for them."""

    net_micro: int
    funded_micro: int
    moved_micro: int
    """What the `invoiced` entries of these documents say, as the ledger published them."""
    awaited_micro: int
    """Asked of the ledger, or still to be asked, while its entry is not here yet."""


def receivable_waterfall(facts: ReceivableFacts) -> tuple[WaterfallStep, ...]:
    """Walk from the exact net of a month's invoices to what the ledger moved to `invoiced`."""
    return (
        WaterfallStep("net", facts.net_micro),
        WaterfallStep("funded", -facts.funded_micro),
        WaterfallStep("awaited", -facts.awaited_micro),
        WaterfallStep("moved", -facts.moved_micro),
    )


def difference_micro(steps: Iterable[WaterfallStep]) -> int:
    """Return what a waterfall leaves unexplained: 0, or something is wrong."""
    return sum(step.change_micro for step in steps)


@dataclass(frozen=True, slots=True)
class MonthTotals:
    """What a month's invoices in one currency add up to."""

    currency: str
    invoices_count: int
    net_minor: int
    tax_minor: int
    total_minor: int
    tender_minor: int
    due_minor: int
