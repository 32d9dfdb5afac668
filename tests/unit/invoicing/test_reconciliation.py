"""Where each charge of a month is, and that the steps from charges to invoices end at zero."""

from __future__ import annotations

import pytest

from hisab_contracts.reference import TenantKind
from invoicing.core.document import BillState
from invoicing.core.reconciliation import (
    ChargePlace,
    ChargeSums,
    DocumentSums,
    MonthFacts,
    ReceivableFacts,
    difference_micro,
    month_facts,
    place_of,
    receivable_waterfall,
    waterfall,
)


@pytest.mark.parametrize(
    ("tenant_kind", "bill_state", "before_cut", "closed", "expected"),
    [
        ("startup", None, False, True, "non-commercial"),
        ("university", None, False, False, "non-commercial"),
        (None, None, False, True, "not-invoiced"),
        ("commercial", None, False, False, "not-invoiced"),
        ("commercial", "pending", True, True, "not-invoiced"),
        ("commercial", "computed", True, True, "not-invoiced"),
        ("commercial", None, False, True, "late"),
        ("commercial", "numbered", False, True, "late"),
        ("commercial", "skipped", False, True, "late"),
        ("commercial", "skipped", True, True, "skipped"),
        ("commercial", "set_aside", True, True, "set-aside"),
        ("commercial", "set_aside", False, True, "late"),
        ("commercial", "numbered", True, True, "invoiced"),
    ],
)
def test_every_charge_is_in_exactly_one_place(
    tenant_kind: TenantKind | None,
    bill_state: BillState | None,
    before_cut: bool,
    closed: bool,
    expected: ChargePlace,
) -> None:
    """A startup is never late, an unknown tenant never skipped, a late charge never invoiced."""
    sums = ChargeSums(tenant_kind, bill_state, before_cut, 1, 0)
    assert expected == place_of(sums, closed=closed)


def test_a_months_charges_are_put_in_their_places() -> None:
    """By hand: only what was billed counts as unfunded, and everything was charged."""
    charges = [
        ChargeSums("startup", None, False, 300, 30),
        ChargeSums("university", None, False, 50, 0),
        ChargeSums("commercial", "numbered", True, 900, 5),
        ChargeSums("commercial", "numbered", False, 40, 40),
        ChargeSums("commercial", "skipped", True, 4, 4),
        ChargeSums("commercial", "set_aside", True, 6, 0),
        ChargeSums(None, None, False, 10, 0),
    ]
    assert MonthFacts(
        charged_micro=1310,
        non_commercial_micro=350,
        unfunded_micro=5,
        late_micro=40,
        not_invoiced_micro=10,
        skipped_micro=4,
        set_aside_micro=6,
        residue_micro=7,
        stated_micro=9,
    ) == month_facts(charges, DocumentSums(residue_micro=7, stated_micro=9), closed=True)
    assert MonthFacts(0, 0, 0, 0, 0, 0, 0, 0, 0) == month_facts(
        (), DocumentSums(0, 0), closed=False
    )


def test_the_waterfall_of_a_month_ends_at_zero() -> None:
    """By hand: 1 000.00 charged, of which 300.00 startups', 5.00 unfunded, 40.00 late …"""
    steps = waterfall(
        MonthFacts(
            charged_micro=1_000_000_000,
            non_commercial_micro=300_000_000,
            unfunded_micro=5_000_000,
            late_micro=40_000_000,
            not_invoiced_micro=10_000_000,
            skipped_micro=4_000,
            set_aside_micro=45_000_000,
            residue_micro=4_000,
            stated_micro=600_000_000,
        )
    )
    assert ["charged", "non-commercial", "unfunded", "late"] == [step.step for step in steps[:4]]
    assert 0 == difference_micro(steps)


def test_the_waterfall_shows_a_missing_charge() -> None:
    """One micro-unit too few on the invoices is a difference of one."""
    steps = waterfall(MonthFacts(10_001, 0, 0, 0, 0, 0, 0, 0, 10_000))
    assert 1 == difference_micro(steps)


def test_the_receivable_waterfall_ends_at_zero_once_the_ledger_has_moved_it_all() -> None:
    """Net less what lots funded is what the ledger moved, or is still asked to move."""
    assert 0 == difference_micro(receivable_waterfall(ReceivableFacts(980, 100, 500, 380)))
    assert 1 == difference_micro(receivable_waterfall(ReceivableFacts(980, 100, 879, 0)))
