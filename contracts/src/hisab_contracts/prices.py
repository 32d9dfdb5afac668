"""Which price line rates an hour, and what a job costs at it: rules that two services ask.

A price line gives (currency, SKU, price class) a price in a window of whole UTC hours. The line
that began last rates an hour, or none does once that line has ended. So an open line ends where the
next line of its series begins, and does not come back when that one ends. Metering rates usage and
answers quotes by it and the ledger prices holds by it, so that a job is admitted at the price it is
charged at. Nobody decides it a second time: stores load all lines of a series and choose none.

Refuses nothing: an hour without a line has no price, and the caller says what that means.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hisab_contracts.ids import PriceClass, Sku
from hisab_contracts.reference import PriceLine
from hisab_contracts.units import WHOLE_DEVICE_PPM, rated_micro


class PriceSeries(NamedTuple):
    """What competes for an hour: lines of one currency, SKU and price class."""

    currency: str
    sku: Sku
    price_class: PriceClass


class PriceBook:
    """Price lines, ready to be asked for the one that rates an hour."""

    __slots__ = ("_by_series", "_skus")

    def __init__(self, lines: Iterable[PriceLine] = ()) -> None:
        """Take lines in any order; those of one series do not begin in the same hour."""
        by_series: dict[PriceSeries, list[PriceLine]] = {}
        for line in sorted(lines, key=_by_start):
            by_series.setdefault(series_of(line), []).append(line)
        self._by_series = {
            series: ([line.valid_from_ms for line in ordered], ordered)
            for series, ordered in by_series.items()
        }
        self._skus = frozenset(series.sku for series in by_series)

    def knows(self, sku: Sku) -> bool:
        """Say whether any line names this SKU."""
        return sku in self._skus

    def line_at(self, series: PriceSeries, hour_ms: int) -> PriceLine | None:
        """Return the line that rates the UTC hour that begins at `hour_ms`, if there is one."""
        starts, lines = self._by_series.get(series, ((), ()))
        position = bisect_right(starts, hour_ms) - 1
        if position < 0:
            return None
        line = lines[position]
        if line.valid_until_ms is not None and hour_ms >= line.valid_until_ms:
            return None
        return line

    def lines_of(self, series: PriceSeries) -> Sequence[PriceLine]:
        """Return the lines of one series by start."""
        return self._by_series.get(series, ((), ()))[1]


def quote_micro(line: PriceLine, gpus: int, duration_ms: int) -> int:
    """Price whole devices for a duration at one line: what a single bucket of it would cost."""
    return rated_micro(gpus * duration_ms * WHOLE_DEVICE_PPM, line.micro_per_gpu_hour)


def series_of(line: PriceLine) -> PriceSeries:
    """Return the series that a line belongs to."""
    return PriceSeries(line.currency, line.sku, line.price_class)


def _by_start(line: PriceLine) -> tuple[int, str]:
    # By name where two begin together, which metering refuses: an answer may never hang on the
    # order in which lines were loaded.
    return line.valid_from_ms, line.rate_line_id
