"""The price book: one line or none rates an hour, however the lines were loaded."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hisab_contracts.ids import PriceClass, PriceVersion, Sku
from hisab_contracts.prices import PriceBook, PriceSeries, series_of
from hisab_contracts.reference import PriceLine
from hisab_contracts.units import HOUR_MS

SERIES = [
    PriceSeries(currency, Sku(sku), PriceClass("spot"))
    for currency in ("PKR", "USD")
    for sku in ("h100", "l40s")
]


@st.composite
def a_line(draw: st.DrawFn) -> PriceLine:
    """A line of one of the series, in a random window; any two may overlap."""
    series = draw(st.sampled_from(SERIES))
    first = draw(st.integers(0, 20))
    length = draw(st.none() | st.integers(1, 8))
    return PriceLine(
        rate_line_id=draw(st.uuids()).hex,
        price_version=PriceVersion("v"),
        currency=series.currency,
        sku=series.sku,
        price_class=series.price_class,
        micro_per_gpu_hour=draw(st.integers(0, 10**12)),
        valid_from_ms=first * HOUR_MS,
        valid_until_ms=None if length is None else (first + length) * HOUR_MS,
    )


@pytest.mark.defect("M33", "F42")
@settings(deadline=None)
@given(st.lists(a_line(), max_size=12), st.randoms(use_true_random=False))
def test_the_line_that_began_last_rates_an_hour_unless_it_has_ended(
    lines: list[PriceLine], order: Random
) -> None:
    """An open line under a fixed one does not come back; the order of loading has no say."""
    shuffled = list(lines)
    order.shuffle(shuffled)
    book = PriceBook(shuffled)
    for series in SERIES:
        for hour in range(-1, 30):
            begun = [
                line
                for line in lines
                if series_of(line) == series and line.valid_from_ms <= hour * HOUR_MS
            ]
            last = max(
                begun, key=lambda line: (line.valid_from_ms, line.rate_line_id), default=None
            )
            if last is not None and last.valid_until_ms is not None:
                last = last if hour * HOUR_MS < last.valid_until_ms else None
            assert last == book.line_at(series, hour * HOUR_MS)
