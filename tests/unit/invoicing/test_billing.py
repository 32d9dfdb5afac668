"""A month's usage becomes lines, tax and totals: each figure worked by hand."""

from __future__ import annotations

import datetime as dt

import pytest

from hisab_contracts.ids import HubCode, PriceClass, Sku
from invoicing.core.billing import Bill, CurrencyUnknown, RatedUsage, ZeroBill, bill
from invoicing.core.tax import TaxMissing, TaxRow

LHR, KHI = HubCode("lhr"), HubCode("khi")
H100 = Sku("h100-sxm-80")
AT = dt.date(2025, 7, 31)
PRA = TaxRow(1, LHR, "PRA", 1600, dt.date(2025, 1, 1), "Punjab")
SRB = TaxRow(2, KHI, "SRB", 1500, dt.date(2025, 1, 1), "Sindh")
ROWS = {LHR: PRA, KHI: SRB}


def usage(
    hub: HubCode = LHR,
    *,
    receivable_micro: int = 0,
    funded_micro: int = 0,
    unfunded_micro: int = 0,
    used_gpu_ns: int = 1_000_000,
    price_class: str = "on_demand",
) -> RatedUsage:
    return RatedUsage(
        hub,
        H100,
        PriceClass(price_class),
        used_gpu_ns,
        funded_micro,
        receivable_micro,
        unfunded_micro,
    )


def billed(*items: RatedUsage) -> Bill:
    month = bill(items, ROWS, AT, "PKR")
    assert isinstance(month, Bill)
    return month


def test_worked_example_gives_tenant_a_its_invoice() -> None:
    """Steps 5, 6 and 11: khi 840.00 + 126.00, lhr 140.00 + 22.40, total 1 128.40."""
    month = billed(
        usage(KHI, receivable_micro=630_000_000, used_gpu_ns=2_700_000_000_000),
        usage(KHI, receivable_micro=210_000_000, used_gpu_ns=900_000_000_000),
        usage(LHR, receivable_micro=140_000_000, used_gpu_ns=600_000_000_000),
    )
    shown = [
        (line.hub, line.used_gpu_ms, line.net_minor, line.tax_minor, line.residue_micro)
        for line in month.lines
    ]
    assert [
        ("khi", 3_600_000, 84_000, 12_600, 0),
        ("lhr", 600_000, 14_000, 2_240, 0),
    ] == shown
    assert (98_000, 14_840, 112_840) == (month.net_minor, month.tax_minor, month.total_minor)
    assert (0, 112_840) == (month.tender_minor, month.due_minor)
    assert 980_000_000 == month.receivable_micro


@pytest.mark.parametrize(
    ("receivable_micro", "net_minor", "residue_micro"),
    [
        (14_999, 1, -4_999),
        (15_000, 2, 5_000),
        (5_000, 1, 5_000),
        (10_000, 1, 0),
        (9_223_372_036_854_775_807, 922_337_203_685_478, 4_193),
    ],
)
@pytest.mark.defect("I5", "F62")
def test_a_line_is_rounded_once_half_up_and_keeps_its_residue(
    receivable_micro: int, net_minor: int, residue_micro: int
) -> None:
    """Half a minor unit goes up; the residue says what rounding added or took."""
    (line,) = billed(usage(receivable_micro=receivable_micro)).lines
    assert (net_minor, residue_micro) == (line.net_minor, line.residue_micro)


@pytest.mark.defect("I1", "I4")
def test_many_small_charges_are_summed_before_they_are_rounded() -> None:
    """Three charges of 0.4 paisa are 1.2 paisa: one, never three times nothing."""
    month = billed(*[usage(receivable_micro=4_000)] * 3)
    assert (1, -2_000) == (month.net_minor, month.lines[0].residue_micro)


@pytest.mark.defect("I2", "I3")
def test_tax_is_taken_per_line_from_the_rounded_net_and_only_summed_after() -> None:
    """16 % of 0.03 twice is 0.00 + 0.00, although 16 % of 0.06 would round to 0.01."""
    month = billed(
        usage(receivable_micro=30_000),
        usage(receivable_micro=30_000, price_class="spot"),
    )
    assert [0, 0] == [line.tax_minor for line in month.lines]
    assert 0 == month.tax_minor == sum(share.tax_minor for share in month.tax_shares)


@pytest.mark.defect("I2")
def test_tax_half_a_minor_unit_goes_up() -> None:
    """15 % of 334.90 is 50.235: 50.24."""
    (line,) = billed(usage(KHI, receivable_micro=334_900_000)).lines
    assert 5_024 == line.tax_minor


@pytest.mark.defect("I7")
def test_a_bill_of_ten_to_the_fifteen_rupees_is_exact() -> None:
    """No column or word is too narrow: 128 lots of nearly 2^63 micro-units on one line."""
    largest_micro = 2**63 - 1
    month = billed(*[usage(receivable_micro=largest_micro, used_gpu_ns=2**62)] * 128)
    (line,) = month.lines
    assert 128 * largest_micro == line.net_micro
    assert line.net_minor * 10_000 == line.net_micro + line.residue_micro
    assert 118_059_162_071_741_130 == line.net_minor


def test_grants_are_tender_and_leave_the_taxable_base_whole() -> None:
    """500.00 granted of 840.00: tax on 840.00; due = total less what the grant tenders."""
    month = billed(usage(KHI, funded_micro=500_000_000), usage(KHI, receivable_micro=340_000_000))
    assert (84_000, 12_600) == (month.net_minor, month.tax_minor)
    assert (50_000, 46_600) == (month.tender_minor, month.due_minor)
    assert 340_000_000 == month.receivable_micro


def test_tender_is_floored_once_for_the_month() -> None:
    """0.9 and 0.9 paisa funded are 1.8: one whole paisa."""
    month = billed(
        usage(funded_micro=9_000, receivable_micro=1_000_000),
        usage(KHI, funded_micro=9_000),
    )
    assert 1 == month.tender_minor


def test_what_is_unfunded_is_never_billed() -> None:
    """GPU time is shown, the amount is not on the line."""
    (line,) = billed(usage(receivable_micro=10_000, unfunded_micro=70_000)).lines
    assert 10_000 == line.net_micro


@pytest.mark.defect("I19", "I26")
def test_lines_partition_the_usage_in_a_total_order() -> None:
    """One line per (hub, SKU, price class), sorted, whatever order usage comes in."""
    items = [
        usage(LHR, receivable_micro=10_000, price_class="spot"),
        usage(KHI, receivable_micro=20_000),
        usage(LHR, receivable_micro=40_000),
        usage(LHR, receivable_micro=80_000, price_class="spot"),
    ]
    expected = [("khi", "on_demand", 2), ("lhr", "on_demand", 4), ("lhr", "spot", 9)]
    for order in (items, items[::-1]):
        lines = billed(*order).lines
        assert expected == [(line.hub, line.price_class, line.net_minor) for line in lines]


def test_free_usage_is_shown_and_what_was_wholly_undone_is_not() -> None:
    """Reserved time at price zero is a line of 0.00; a charge and its reversal leave none."""
    month = billed(
        usage(LHR, receivable_micro=50_000),
        usage(LHR, used_gpu_ns=7_000_000, price_class="reserved"),
        usage(KHI, receivable_micro=50_000),
        usage(KHI, receivable_micro=-50_000, used_gpu_ns=-1_000_000),
    )
    assert [("on_demand", 5), ("reserved", 0)] == [
        (line.price_class, line.net_minor) for line in month.lines
    ]


def test_tax_is_shown_per_authority() -> None:
    """The shares are the sums of the lines, ordered by authority."""
    month = billed(
        usage(LHR, receivable_micro=1_000_000),
        usage(KHI, receivable_micro=2_000_000),
        usage(LHR, receivable_micro=3_000_000, price_class="spot"),
    )
    assert [("PRA", 400, 64), ("SRB", 200, 30)] == [
        (share.tax_row.authority, share.net_minor, share.tax_minor) for share in month.tax_shares
    ]


def test_a_hub_without_a_tax_row_is_refused() -> None:
    """Nobody guesses a rate: the first such hub is named."""
    missing = bill([usage(HubCode("pew"), receivable_micro=1), usage(KHI)], ROWS, AT, "PKR")
    assert TaxMissing(HubCode("pew"), AT) == missing


@pytest.mark.parametrize("receivable_micro", [0, 1, 4_999])
def test_a_bill_below_half_a_minor_unit_is_skipped(receivable_micro: int) -> None:
    """A zero invoice burns no number."""
    assert ZeroBill() == bill([usage(receivable_micro=receivable_micro)], ROWS, AT, "PKR")


@pytest.mark.parametrize(
    ("currency", "net_minor", "residue_micro", "tender_minor"),
    [("JPY", 1_935, -480_000, 1), ("KWD", 1_935_480, 0, 1_999), ("PKR", 193_548, 0, 199)],
)
def test_an_amount_is_rounded_to_the_minor_unit_of_its_currency(
    currency: str, net_minor: int, residue_micro: int, tender_minor: int
) -> None:
    """1 935.48 units: whole yen, thousandths of a dinar, paisa; 1.999999 of it paid by a grant."""
    used = usage(funded_micro=1_999_999, receivable_micro=1_935_480_000 - 1_999_999)
    month = bill([used], ROWS, AT, currency)
    assert isinstance(month, Bill)
    assert (net_minor, tender_minor) == (month.net_minor, month.tender_minor)
    assert [residue_micro] == [line.residue_micro for line in month.lines]
    assert 1_935_480_000 + residue_micro == month.net_minor * month.micro_per_minor


@pytest.mark.parametrize("currency", ["XTS", "XAU", "ABC", "pkr", ""])
def test_a_currency_without_a_minor_unit_is_refused_before_anything_else(currency: str) -> None:
    """Also where a tax row is missing: nobody may guess how it is rounded."""
    assert CurrencyUnknown(currency) == bill([usage(HubCode("pew"))], ROWS, AT, currency)


def test_nothing_used_is_a_zero_bill() -> None:
    """Without usage there is no line."""
    assert ZeroBill() == bill([], ROWS, AT, "PKR")


def test_a_whole_charge_is_its_three_parts() -> None:
    """What was charged was funded, receivable or unfunded."""
    assert 111 == usage(funded_micro=1, receivable_micro=10, unfunded_micro=100).charge_micro
