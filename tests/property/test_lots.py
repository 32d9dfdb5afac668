"""Properties of the draw order and of the waterfall over lots."""

from __future__ import annotations

from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hisab_contracts.ids import GrantId, HubCode, ProgrammeId, ProjectId, Sku
from ledger.core.lots import (
    Lot,
    UsageTerms,
    draw_order,
    fitting_lots,
    in_draw_order,
    largest_hold,
    take_from_lots,
)

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
HOURS = st.integers(0, 6)
TERMS = UsageTerms(
    hub=HubCode("lhr"), sku=Sku("h100"), project_id=ProjectId("main"), price_class=None
)


@st.composite
def lots(draw: st.DrawFn) -> list[Lot]:
    """A few lots with distinct ids and whatever terms."""
    found = []
    for number in range(draw(st.integers(0, 5))):
        effective = draw(HOURS)
        length = draw(st.none() | st.integers(1, 4))
        remaining_micro = draw(st.integers(0, 30))
        found.append(
            Lot(
                grant_id=GrantId(f"g{number}"),
                programme_id=ProgrammeId("p"),
                priority=draw(st.integers(-1, 1)),
                effective_ms=effective,
                expires_ms=None if length is None else effective + length,
                granted_micro=30,
                remaining_micro=remaining_micro,
                reserved_micro=draw(st.integers(0, remaining_micro)),
            )
        )
    return found


@PATIENT
@given(lots(), st.integers())
def test_the_draw_order_depends_on_the_terms_alone(some: list[Lot], seed: int) -> None:
    """Whatever order lots are loaded in, one order comes out, and it is total."""
    shuffled = list(some)
    Random(seed).shuffle(shuffled)
    assert in_draw_order(some) == in_draw_order(shuffled)
    assert len(some) == len({draw_order(lot) for lot in some})
    assert fitting_lots(some, 3, TERMS) == fitting_lots(shuffled, 3, TERMS)


@PATIENT
@given(lots(), HOURS, st.integers(0, 100))
def test_the_waterfall_conserves_and_leaves_no_earlier_lot_with_anything_to_give(
    some: list[Lot], instant_ms: int, wanted_micro: int
) -> None:
    """Taken + left = wanted; no lot gives more than is free; a later pays after an earlier."""
    opened = fitting_lots(some, instant_ms, TERMS)
    taken, left_micro = take_from_lots(opened, wanted_micro, total_micro=wanted_micro)
    assert wanted_micro == sum(micro for _, micro in taken) + left_micro
    given_by = dict(taken)
    assert len(given_by) == len(taken)
    for lot in some:
        given_micro = given_by.get(lot.account, 0)
        assert 0 <= given_micro <= (lot.free_micro if lot.is_open(instant_ms) else 0)
    for place, lot in enumerate(opened):
        later_pay = any(after.account in given_by for after in opened[place + 1 :])
        if later_pay or left_micro:
            assert lot.free_micro == given_by.get(lot.account, 0)


@PATIENT
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 10_000)), max_size=4),
    st.integers(0, 40),
)
def test_the_largest_hold_is_the_largest_that_would_be_placed(
    shares: list[tuple[int, int]], limit_micro: int
) -> None:
    """By trying every amount there could be."""
    some = [
        Lot(
            grant_id=GrantId(f"g{number}"),
            programme_id=ProgrammeId("p"),
            priority=0,
            effective_ms=0,
            expires_ms=None,
            granted_micro=free_micro,
            remaining_micro=free_micro,
            coverage_bps=bps,
        )
        for number, (free_micro, bps) in enumerate(shares)
    ]
    most_micro = limit_micro + sum(free_micro for free_micro, _ in shares)
    placed = [
        hold_micro
        for hold_micro in range(most_micro + 1)
        if take_from_lots(some, hold_micro, total_micro=hold_micro)[1] <= limit_micro
    ]
    assert max(placed) == largest_hold(some, limit_micro)
