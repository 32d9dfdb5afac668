"""Rating: every hour of a bucket has one price, whatever lists were added, in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hisab_contracts.ids import PriceClass, Sku
from hisab_contracts.prices import PriceBook, PriceSeries
from metering.core.pricing import (
    ListedPrice,
    PriceList,
    displaced_lines,
    price_lines_of,
    reject_overlap,
    reject_rated,
)
from unit.metering.hub_events import HOUR_MS, NOON_MS

SERIES = PriceSeries("PKR", Sku("h100"), PriceClass("spot"))


@st.composite
def a_list(draw: st.DrawFn) -> PriceList:
    """A list of one price in a random window."""
    first = draw(st.integers(0, 20))
    length = draw(st.one_of(st.none(), st.integers(1, 8)))
    return PriceList(
        "PKR",
        NOON_MS + first * HOUR_MS,
        None if length is None else NOON_MS + (first + length) * HOUR_MS,
        (ListedPrice(SERIES.sku, SERIES.price_class, draw(st.integers(0, 10**12))),),
    )


def naive_price(taken: list[PriceList], hour_ms: int) -> int | None:
    """The price of an hour, by looking at every list."""
    ruling = [price_list for price_list in taken if price_list.valid_from_ms <= hour_ms]
    if not ruling:
        return None
    latest = max(ruling, key=lambda price_list: price_list.valid_from_ms)
    if latest.valid_until_ms is not None and hour_ms >= latest.valid_until_ms:
        return None
    return latest.prices[0].micro_per_gpu_hour


@pytest.mark.defect("M33", "F42")
@settings(max_examples=200, deadline=None)
@given(proposed=st.lists(a_list(), min_size=1, max_size=12), data=st.data())
def test_a_list_never_changes_the_price_of_an_hour_that_was_rated(
    proposed: list[PriceList], data: st.DataObject
) -> None:
    """Every hour rated before a list was added has the same price after it."""
    lines: list[object] = []
    taken: list[PriceList] = []
    rated: dict[int, tuple[str, int]] = {}
    for price_list in proposed:
        book = PriceBook(lines)  # type: ignore[arg-type]
        hour_ms = NOON_MS + data.draw(st.integers(-1, 28)) * HOUR_MS
        line = book.line_at(SERIES, hour_ms)
        assert naive_price(taken, hour_ms) == (None if line is None else line.micro_per_gpu_hour)
        if line is not None:
            rated[hour_ms] = (line.rate_line_id, line.micro_per_gpu_hour)
        new = price_lines_of(price_list)
        if reject_overlap(book, new) is not None:
            continue
        ended = displaced_lines(book, new)
        hours = {
            end.rate_line_id: hour
            for end in ended
            for hour, (line_id, _) in rated.items()
            if line_id == end.rate_line_id and hour >= end.from_ms
        }
        if reject_rated(hours, ended) is None:
            lines.extend(new)
            taken.append(price_list)
    book = PriceBook(lines)  # type: ignore[arg-type]
    for hour_ms, (line_id, micro) in rated.items():
        line = book.line_at(SERIES, hour_ms)
        assert line is not None
        assert (line_id, micro) == (line.rate_line_id, line.micro_per_gpu_hour)
