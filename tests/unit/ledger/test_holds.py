"""How a hold is priced, how it shrinks by what its charges draw, and what entries say of it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from hisab_contracts.ids import PriceClass, PriceVersion, Sku
from hisab_contracts.invariants import InvariantBroken
from hisab_contracts.prices import PriceBook, PriceSeries
from hisab_contracts.reference import PriceLine
from hisab_contracts.units import MAX_MICRO
from ledger.core.holds import (
    LIMIT,
    Hold,
    NoPrice,
    PriceOutOfRange,
    detail_of,
    grow_hold,
    hold_after,
    hold_after_charge,
    placed_detail,
    price_hold,
    shrink_hold,
)
from unit.ledger.values import HOUR_MS, at, held
from unit.ledger.values import hold as ask

SERIES = PriceSeries("PKR", Sku("h100-sxm-80"), PriceClass("on_demand"))


def hold(*reserved: tuple[str, int]) -> Hold:
    return held("h", 100, *reserved, allocation_id="a", expires_ms=5)


def test_a_draw_shrinks_the_reservation_where_it_drew() -> None:
    """Same lot first."""
    changes = shrink_hold(hold(("lot:a", 4), ("lot:b", 4)), [("lot:a", 3)])
    assert [("lot:a", -3)] == changes


def test_a_draw_elsewhere_shrinks_the_last_reservations_the_limit_first() -> None:
    """Then the last in order: the limit, then the last lot."""
    before = hold(("lot:a", 4), ("lot:b", 4), (LIMIT, 4))
    changes = shrink_hold(before, [("lot:c", 6)])
    assert [("lot:b", -2), (LIMIT, -4)] == changes
    after = hold_after_charge(before, 6, changes, {"lot:a": 0, "lot:b": 1})
    assert (("lot:a", 4), ("lot:b", 2)) == after.reserved
    assert 6 == after.drawn_micro


def test_a_draw_beyond_the_hold_leaves_it_empty_and_open() -> None:
    """It gives up what it has; only an end closes it."""
    before = hold(("lot:a", 4))
    changes = shrink_hold(before, [("lot:a", 9)])
    assert [("lot:a", -4)] == changes
    after = hold_after_charge(before, 9, changes, {"lot:a": 0})
    assert ((), 0, None, 9) == (after.reserved, after.open_micro, after.ended_by, after.drawn_micro)


def test_what_returns_makes_good_what_was_drawn_past_a_hold_and_then_grows_it_there() -> None:
    """Of 12 drawn under a hold of 10 that is empty, 2 lay past it; it grows by no more than 10."""
    empty = held("h", 10, drawn_micro=12)
    assert ([], 0) == grow_hold(empty, [(LIMIT, 2)], ())
    assert ([("lot:a", 3)], 0) == grow_hold(empty, [(LIMIT, 2), ("lot:a", 3)], ())
    assert ([("lot:a", 10)], 0) == grow_hold(empty, [("lot:a", 9), ("lot:a", 9)], ())
    # What nothing can be reserved on makes good first, and makes the hold short after that.
    returns = [("lot:a", 3), ("unfunded", 5)]
    assert ([("lot:a", 3)], 3) == grow_hold(empty, returns, ("unfunded",))
    after = hold_after_charge(empty, -5, [("lot:b", 1), ("lot:a", 2)], {"lot:a": 0, "lot:b": 1})
    assert (("lot:a", 2), ("lot:b", 1)) == after.reserved
    assert 7 == after.drawn_micro


def test_entries_describe_a_hold_and_its_end() -> None:
    """Placed and ended holds are read back from their entries."""
    asked = ask("h", 5, allocation_id="a", expires_ms=9)
    standing = hold_after(placed_detail(asked, [("lot:a", 4), (LIMIT, 1)]), None, 7)
    opened = held("h", 5, ("lot:a", 4), (LIMIT, 1), allocation_id="a", expires_ms=9, placed_seq=7)
    assert opened == standing
    detail = detail_of(standing, "final")
    assert (5, [("lot:a", 4), (LIMIT, 1)]) == (detail.open_micro, detail.reserved)
    ended = held("h", 5, allocation_id="a", expires_ms=9, ended_by="final", placed_seq=7)
    assert ended == hold_after(detail, standing, 8)


def test_a_moved_hold_is_read_back_with_what_it_lost() -> None:
    """Where it reserves from now on, and what nothing guarantees any more."""
    before = held("h", 5, ("lot:a", 4), (LIMIT, 1), placed_seq=7)
    moved = held("h", 5, ("lot:b", 2), (LIMIT, 1), placed_seq=7, short_micro=2)
    detail = detail_of(moved, "moved")
    assert ("moved", 3, 2) == (detail.cause, detail.open_micro, detail.short_micro)
    assert moved == hold_after(detail, before, 9)
    with pytest.raises(InvariantBroken, match="not placed"):
        hold_after(detail, None, 9)


def test_a_cause_that_is_neither_placing_nor_an_end_is_a_defect_of_ours() -> None:
    """Taken for open, the hold would reserve for ever."""
    placed = placed_detail(ask("h", 5), [(LIMIT, 5)])
    with pytest.raises(InvariantBroken, match="mislaid"):
        hold_after(replace(placed, cause="mislaid"), held("h", 5), 2)


def line(name: str, price: int, valid_from_ms: int, valid_until_ms: int | None) -> PriceLine:
    return PriceLine(
        rate_line_id=name,
        price_version=PriceVersion("v1"),
        currency=SERIES.currency,
        sku=SERIES.sku,
        price_class=SERIES.price_class,
        micro_per_gpu_hour=price,
        valid_from_ms=valid_from_ms,
        valid_until_ms=valid_until_ms,
    )


OPEN_FROM_8 = line("open", 100, at(8), None)
FROM_10_UNTIL_12 = line("later", 70, at(10), at(12))


@pytest.mark.parametrize(
    ("now_ms", "priced"),
    [
        (at(7, 59), NoPrice(SERIES)),
        (at(8), 200),
        (at(9, 59), 200),
        (at(10), 140),
        (at(11, 59), 140),
        (at(12), NoPrice(SERIES)),
    ],
)
def test_a_hold_is_priced_by_the_line_that_rates_the_hour(now_ms: int, priced: object) -> None:
    """An open line ends where the next begins: it does not come back when that one has ended."""
    prices = PriceBook([FROM_10_UNTIL_12, OPEN_FROM_8])
    asked = price_hold(prices, SERIES, gpus=4, duration_ms=HOUR_MS // 2, now_ms=now_ms)
    assert priced == asked


def test_a_hold_is_priced_within_64_bits_or_refused() -> None:
    """A million GPUs for years are asked for by mistake, and no column could hold them."""
    prices = PriceBook([line("dear", 10**12, at(8), None)])
    most = MAX_MICRO // 10**12
    priced = [
        price_hold(prices, SERIES, gpus=gpus, duration_ms=HOUR_MS, now_ms=at(9))
        for gpus in (most, most + 1)
    ]
    assert [most * 10**12, PriceOutOfRange((most + 1) * 10**12)] == priced


def test_a_hold_is_priced_in_its_own_currency_and_class() -> None:
    """Another series has no say."""
    spot = SERIES._replace(price_class=PriceClass("spot"))
    prices = PriceBook([OPEN_FROM_8])
    assert NoPrice(spot) == price_hold(prices, spot, gpus=1, duration_ms=1, now_ms=at(9))
