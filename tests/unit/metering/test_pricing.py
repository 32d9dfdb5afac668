"""Rating: the line of an hour, which lists are refused, quotes."""

from __future__ import annotations

import pytest

from hisab_contracts.ids import PriceClass, Sku
from hisab_contracts.prices import PriceBook, PriceSeries, quote_micro
from hisab_contracts.units import HOUR_MS
from metering.core.coverage import hours_of
from metering.core.pricing import (
    DisplacedLine,
    JobQuote,
    JobRequest,
    ListedPrice,
    NotPriced,
    PriceList,
    displaced_lines,
    price_lines_of,
    price_version,
    quote_job,
    reject_overlap,
    reject_rated,
)
from unit.metering.hub_events import NOON_MS

SKU, CLASS = Sku("h100-sxm-80"), PriceClass("on_demand")
SERIES = PriceSeries("PKR", SKU, CLASS)


def listed(first: int, until: int | None, micro: int = 840_000_000) -> PriceList:
    """A list of one price from the `first` hour to before the `until` hour after noon."""
    end_ms = None if until is None else NOON_MS + until * HOUR_MS
    return PriceList("PKR", NOON_MS + first * HOUR_MS, end_ms, (ListedPrice(SKU, CLASS, micro),))


def book(*lists: PriceList) -> PriceBook:
    """A book of these lists."""
    return PriceBook([line for price_list in lists for line in price_lines_of(price_list)])


def test_open_line_ends_where_the_next_begins() -> None:
    """The price of an hour is the line that began last, unless it has ended."""
    prices = book(listed(0, None, 1), listed(5, 8, 2))
    found = [prices.line_at(SERIES, NOON_MS + hour * HOUR_MS) for hour in (-1, 0, 4, 5, 7, 8)]
    assert [None, 1, 1, 2, 2, None] == [line and line.micro_per_gpu_hour for line in found]
    assert prices.line_at(PriceSeries("USD", SKU, CLASS), NOON_MS) is None
    assert (True, False) == (prices.knows(SKU), prices.knows(Sku("b300")))


@pytest.mark.parametrize(
    ("new", "refused"),
    [
        (listed(0, None), True),
        (listed(0, 1), True),
        (listed(-3, 1), True),
        (listed(-3, 0), False),
        (listed(-3, None), False),
        (listed(5, None), True),
        (listed(9, None), True),
        (listed(10, 12), False),
    ],
)
def test_equal_starts_and_overlapping_fixed_windows_are_refused(
    new: PriceList, refused: bool
) -> None:
    """Beside a line in hours 0 to 10 of noon."""
    found = reject_overlap(book(listed(0, 10)), price_lines_of(new))
    assert refused == (found is not None and found.code == "price-overlap")


def test_list_that_prices_a_line_twice_is_refused() -> None:
    """The same SKU and class twice in one list."""
    twice = PriceList(
        "PKR", NOON_MS, None, (ListedPrice(SKU, CLASS, 1), ListedPrice(SKU, CLASS, 2))
    )
    assert reject_overlap(book(), price_lines_of(twice)) is not None


@pytest.mark.defect("M33")
def test_line_that_takes_a_rated_hour_away_is_refused() -> None:
    """An open line may be ended only where nothing is rated on it yet."""
    open_line = price_lines_of(listed(0, None))[0]
    ended = displaced_lines(book(listed(0, None)), price_lines_of(listed(5, None)))
    assert [DisplacedLine(open_line.rate_line_id, NOON_MS + 5 * HOUR_MS)] == ended
    refused = reject_rated({open_line.rate_line_id: NOON_MS + 6 * HOUR_MS}, ended)
    assert refused is not None
    assert "price-past" == refused.code
    assert reject_rated({}, ended) is None
    assert [] == displaced_lines(book(listed(0, 4)), price_lines_of(listed(5, None)))
    assert [] == displaced_lines(book(listed(5, None)), price_lines_of(listed(0, None)))
    assert "open" in str(reject_overlap(book(listed(0, None)), price_lines_of(listed(0, 3))))


def test_version_is_the_hash_of_the_content() -> None:
    """The order of prices does not matter, any value does."""
    one, other = ListedPrice(SKU, CLASS, 1), ListedPrice(Sku("l40s-48"), CLASS, 2)
    forwards = PriceList("PKR", NOON_MS, None, (one, other))
    backwards = PriceList("PKR", NOON_MS, None, (other, one))
    assert price_version(forwards) == price_version(backwards)
    assert price_version(forwards) != price_version(PriceList("USD", NOON_MS, None, (one, other)))


def test_quote_is_what_one_bucket_would_cost() -> None:
    """Eight H100 for an hour at 840 PKR each; a millisecond rounds down."""
    line = price_lines_of(listed(0, None))[0]
    assert 6_720_000_000 == quote_micro(line, 8, HOUR_MS)
    assert 233 == quote_micro(line, 1, 1)


def test_job_is_quoted_at_the_line_in_force_or_not_at_all() -> None:
    """The price list that says so is named; an hour without a line has no price."""
    prices = book(listed(0, 5))
    job = JobRequest(SERIES, gpus=8, duration_ms=HOUR_MS)
    version = price_version(listed(0, 5))
    assert JobQuote(6_720_000_000, version) == quote_job(prices, job, NOON_MS)
    assert NotPriced(SERIES) == quote_job(prices, job, NOON_MS + 5 * HOUR_MS)


def test_hours_of_an_interval_are_those_it_touches() -> None:
    """Half-open: an interval that ends on the hour does not touch the next."""
    assert [NOON_MS] == list(hours_of(NOON_MS, NOON_MS + HOUR_MS))
    assert [NOON_MS, NOON_MS + HOUR_MS] == list(hours_of(NOON_MS + 1, NOON_MS + HOUR_MS + 1))
