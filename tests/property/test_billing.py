"""A bill against an independent calculation with exact fractions, over random months."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from fractions import Fraction
from math import floor
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hisab_contracts.ids import HubCode, PriceClass, Sku
from hisab_contracts.units import month_bounds_ms, month_of
from invoicing.core.billing import Bill, RatedUsage, ZeroBill, bill
from invoicing.core.reconciliation import MonthFacts, difference_micro, waterfall
from invoicing.core.tax import TaxRow

AT = dt.date(2025, 7, 31)
steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no defect."""
HUBS = ("lhr", "khi", "isb")

amounts = st.integers(0, 2**63 - 1) | st.integers(0, 40_000)
usages = st.lists(
    st.builds(
        RatedUsage,
        st.sampled_from(HUBS).map(HubCode),
        st.sampled_from(("h100", "l40s")).map(Sku),
        st.sampled_from(("on_demand", "spot")).map(PriceClass),
        st.integers(0, 2**62),
        amounts,
        amounts,
        st.integers(0, 10) | st.just(0),
    ),
    max_size=20,
)
rates = st.tuples(*[st.integers(0, 10_000)] * 3).map(
    lambda bps: {
        HubCode(hub): TaxRow(n, HubCode(hub), f"authority-{n}", rate, dt.date(2025, 1, 1), "cited")
        for n, (hub, rate) in enumerate(zip(HUBS, bps, strict=True), start=1)
    }
)


CURRENCIES = (("PKR", 10_000), ("JPY", 1_000_000), ("KWD", 1_000))
"""Codes and the micro of their minor unit, by hand."""


def half_up(exact: Fraction) -> int:
    """Round as one is taught at school."""
    return floor(exact + Fraction(1, 2))


@steady
@given(usages, rates, st.randoms(use_true_random=False), st.sampled_from(CURRENCIES))
@pytest.mark.defect("I1", "I3", "I6", "F62")
def test_a_bill_equals_the_calculation_with_fractions(
    usage: list[RatedUsage],
    tax_rows: dict[HubCode, TaxRow],
    shuffler: Random,
    currency: tuple[str, int],
) -> None:
    """Lines, taxes, tender, due, residues, in minor units of 0, 2, 3 decimals; in any order."""
    code, micro = currency
    exact: dict[tuple[str, str, str], Fraction] = defaultdict(Fraction)
    used: dict[tuple[str, str, str], int] = defaultdict(int)
    shown: set[tuple[str, str, str]] = set()
    for item in usage:
        key = (item.hub, item.sku, item.price_class)
        exact[key] += Fraction(item.funded_micro + item.receivable_micro, micro)
        used[key] += item.used_gpu_ns
        if item.used_gpu_ns or item.funded_micro or item.receivable_micro or item.unfunded_micro:
            shown.add(key)
    net = {key: half_up(exact[key]) for key in sorted(shown)}
    tax = {
        key: half_up(Fraction(net[key] * tax_rows[HubCode(key[0])].tax_bps, 10_000)) for key in net
    }
    shuffled = list(usage)
    shuffler.shuffle(shuffled)
    month = bill(shuffled, tax_rows, AT, code)
    if not any(net.values()):
        assert isinstance(month, ZeroBill)
        return
    assert isinstance(month, Bill)
    assert list(net) == [(line.hub, line.sku, line.price_class) for line in month.lines]
    assert list(net.values()) == [line.net_minor for line in month.lines]
    assert list(tax.values()) == [line.tax_minor for line in month.lines]
    assert [used[key] // 10**6 for key in net] == [line.used_gpu_ms for line in month.lines]
    assert [net[key] * micro - exact[key] * micro for key in net] == [
        line.residue_micro for line in month.lines
    ]
    funded = floor(Fraction(sum(item.funded_micro for item in usage), micro))
    total = sum(net.values()) + sum(tax.values())
    assert (total, funded, total - funded) == (
        month.total_minor,
        month.tender_minor,
        month.due_minor,
    )
    assert sum(item.receivable_micro for item in usage) == month.receivable_micro


@steady
@given(usages, st.integers(1, 5))
@pytest.mark.defect("F61")
def test_how_charges_were_cut_cannot_change_a_bill(usage: list[RatedUsage], parts: int) -> None:
    """A charge booked in several entries bills as one."""
    rows = {
        HubCode(hub): TaxRow(n, HubCode(hub), hub, 1500, dt.date(2025, 1, 1), "cited")
        for n, hub in enumerate(HUBS)
    }
    cut = [
        RatedUsage(
            item.hub,
            item.sku,
            item.price_class,
            *(
                whole // parts + (whole % parts if part == 0 else 0)
                for whole in (
                    item.used_gpu_ns,
                    item.funded_micro,
                    item.receivable_micro,
                    item.unfunded_micro,
                )
            ),
        )
        for item in usage
        for part in range(parts)
    ]
    assert bill(usage, rows, AT, "PKR") == bill(cut, rows, AT, "PKR")


@steady
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["non-commercial", "late", "not-invoiced", "skipped", "set-aside", "billed"]
            ),
            st.integers(0, 2**63 - 1),
            st.integers(0, 9),
        ),
        max_size=20,
    ),
    st.integers(-(2**40), 2**40).filter(bool),
)
def test_the_waterfall_ends_at_zero_exactly_when_every_charge_is_somewhere(
    charges: list[tuple[str, int, int]], lost_micro: int
) -> None:
    """However charges are spread over the steps; and a lost micro-unit shows."""
    of = {
        place: sum(paid + free for where, paid, free in charges if where == place)
        for place in ("non-commercial", "late", "not-invoiced", "skipped", "set-aside")
    }
    net_micro = sum(paid for where, paid, _ in charges if where == "billed")
    net_minor = half_up(Fraction(net_micro, 10_000))
    facts = {
        "non_commercial_micro": of["non-commercial"],
        "unfunded_micro": sum(free for where, _, free in charges if where == "billed"),
        "late_micro": of["late"],
        "not_invoiced_micro": of["not-invoiced"],
        "skipped_micro": of["skipped"],
        "set_aside_micro": of["set-aside"],
        "residue_micro": net_minor * 10_000 - net_micro,
        "stated_micro": net_minor * 10_000,
    }
    charged = sum(paid + free for _, paid, free in charges)
    assert 0 == difference_micro(waterfall(MonthFacts(charged_micro=charged, **facts)))
    lost = MonthFacts(charged_micro=charged + lost_micro, **facts)
    assert lost_micro == difference_micro(waterfall(lost))


@steady
@given(st.integers(1_577_836_800_000, 4_102_444_799_999))
@pytest.mark.defect("F60", "I20", "M21")
def test_every_instant_lies_in_exactly_one_month(instant_ms: int) -> None:
    """Half-open months of Asia/Karachi: no instant is lost at an edge or counted twice."""
    from_ms, until_ms = month_bounds_ms(month_of(instant_ms))
    assert from_ms <= instant_ms < until_ms
    assert month_of(from_ms - 1) != month_of(from_ms) == month_of(instant_ms)
    assert month_of(until_ms) != month_of(until_ms - 1)
