"""Rating: what a GPU-hour costs at an hour, and which price lists may be added.

Theory. A price line gives (currency, SKU, price class) a price in a window of whole UTC hours.
Lines are immutable; a new price is a new line. An open line ends where the next line of its series
(same currency, SKU and class) begins. So that the price of an hour never changes once it was rated,
a line that would take such an hour away is refused. A SKU is known once a line names it.

A bucket (tenant, project, allocation, hub, node, rate line, UTC hour) is rated as a whole
(`hisab_contracts.units.rated_micro`); as windows lie on whole hours it has one price.

Refusals of a price list, in order of precedence: `price-overlap` (a start that the series has
already, or windows with fixed ends that overlap), `price-past` (it begins before an hour already
rated on the line it would cut short).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from hisab_contracts.canonical import Canonical, content_sha256
from hisab_contracts.ids import PriceClass, PriceVersion, Sku
from hisab_contracts.reference import PriceLine
from hisab_contracts.units import HOUR_MS, hour_floor_ms, instant_text, rated_micro

MAX_MICRO_PER_GPU_HOUR: Final = 10**12
"""A million units of currency: keeps every bucket's amount far inside 64 bits."""


class Series(NamedTuple):
    """What competes for an hour: lines of one currency, SKU and price class."""

    currency: str
    sku: Sku
    price_class: PriceClass


class ListedPrice(NamedTuple):
    """One price of a list as its author wrote it."""

    sku: Sku
    price_class: PriceClass
    micro_per_gpu_hour: int


@dataclass(frozen=True, slots=True)
class PriceList:
    """A list that is proposed: one window and currency for all of its prices."""

    currency: str
    valid_from_ms: int
    """On a whole UTC hour."""
    valid_until_ms: int | None
    """On a later whole UTC hour; None is open-ended."""
    prices: tuple[ListedPrice, ...]


@dataclass(frozen=True, slots=True)
class PriceRefused:
    """The list cannot be taken as it is."""

    code: Literal["price-overlap", "price-past"]
    detail: str


@dataclass(frozen=True, slots=True)
class Displaced:
    """An open line that a new line would end: no hour of it from `from_ms` may be rated yet."""

    rate_line_id: str
    from_ms: int


class PriceBook:
    """All price lines, ready to be asked for the one that rates an hour."""

    __slots__ = ("_by_series", "_skus")

    def __init__(self, lines: Iterable[PriceLine] = ()) -> None:
        """Take lines that do not overlap, in any order."""
        by_series: dict[Series, list[PriceLine]] = {}
        for line in sorted(lines, key=_by_start):
            series = Series(line.currency, line.sku, line.price_class)
            by_series.setdefault(series, []).append(line)
        self._by_series = {
            series: ([line.valid_from_ms for line in ordered], ordered)
            for series, ordered in by_series.items()
        }
        self._skus = frozenset(series.sku for series in by_series)

    def knows(self, sku: Sku) -> bool:
        """Say whether any line names this SKU."""
        return sku in self._skus

    def line_at(self, series: Series, hour_ms: int) -> PriceLine | None:
        """Return the line that rates the UTC hour that begins at `hour_ms`, if there is one."""
        starts, lines = self._by_series.get(series, ((), ()))
        at = bisect_right(starts, hour_ms) - 1
        if at < 0:
            return None
        line = lines[at]
        if line.valid_until_ms is not None and hour_ms >= line.valid_until_ms:
            return None
        return line

    def series(self, series: Series) -> Sequence[PriceLine]:
        """Return the lines of one series by start."""
        return self._by_series.get(series, ((), ()))[1]


def lines_of(price_list: PriceList) -> list[PriceLine]:
    """Return the lines that a list stands for, under the version that its content gives it."""
    version = price_version(price_list)
    return [
        PriceLine(
            rate_line_id=_rate_line_id(version, listed),
            price_version=version,
            currency=price_list.currency,
            sku=listed.sku,
            price_class=listed.price_class,
            micro_per_gpu_hour=listed.micro_per_gpu_hour,
            valid_from_ms=price_list.valid_from_ms,
            valid_until_ms=price_list.valid_until_ms,
        )
        for listed in sorted(price_list.prices)
    ]


def price_version(price_list: PriceList) -> PriceVersion:
    """Return the content hash of a list; the order of its prices does not matter."""
    content: dict[str, Canonical] = {
        "currency": price_list.currency,
        "valid_from_ms": price_list.valid_from_ms,
        "valid_until_ms": price_list.valid_until_ms,
        "prices": [list(listed) for listed in sorted(price_list.prices)],
    }
    return PriceVersion(content_sha256(content))


def overlap(book: PriceBook, lines: Sequence[PriceLine]) -> PriceRefused | None:
    """Refuse new lines that begin where another does, or whose fixed windows overlap."""
    seen: set[Series] = set()
    for line in lines:
        series = Series(line.currency, line.sku, line.price_class)
        if series in seen:
            return PriceRefused("price-overlap", f"the list prices {_name(line)} twice")
        seen.add(series)
        for other in book.series(series):
            if _overlaps(line, other):
                detail = f"{_name(line)}: {_window(line)} overlaps {_window(other)}"
                return PriceRefused("price-overlap", detail)
    return None


def displaced(book: PriceBook, lines: Sequence[PriceLine]) -> list[Displaced]:
    """Return the open lines that these lines would end: their later hours must be unrated."""
    ended = []
    for line in lines:
        series = Series(line.currency, line.sku, line.price_class)
        earlier = [o for o in book.series(series) if o.valid_from_ms < line.valid_from_ms]
        if earlier and earlier[-1].valid_until_ms is None:
            ended.append(Displaced(earlier[-1].rate_line_id, line.valid_from_ms))
    return ended


def past(rated_hour_ms: Mapping[str, int], ended: Sequence[Displaced]) -> PriceRefused | None:
    """Refuse lines that would take away an hour that is rated already.

    `rated_hour_ms` gives, per displaced rate line, an hour from `from_ms` that is rated on it.
    """
    for line in ended:
        hour_ms = rated_hour_ms.get(line.rate_line_id)
        if hour_ms is not None:
            detail = (
                f"the hour {instant_text(hour_ms)} is rated already on the line that would end "
                f"at {instant_text(line.from_ms)}"
            )
            return PriceRefused("price-past", detail)
    return None


def hours_of(start_ms: int, end_ms: int) -> range:
    """Return the starts of the UTC hours that `[start_ms, end_ms)` touches."""
    return range(hour_floor_ms(start_ms), end_ms, HOUR_MS)


def quote_micro(line: PriceLine, gpus: int, duration_ms: int) -> int:
    """Price whole devices for a duration at one line: what a single bucket of it would cost."""
    return rated_micro(gpus * duration_ms * 1_000_000, line.micro_per_gpu_hour)


def _rate_line_id(version: PriceVersion, listed: ListedPrice) -> str:
    content = {"price_version": version, "sku": listed.sku, "price_class": listed.price_class}
    return content_sha256(content)[:32]


def _overlaps(line: PriceLine, other: PriceLine) -> bool:
    if line.valid_from_ms == other.valid_from_ms:
        return True
    first, second = sorted((line, other), key=_by_start)
    return first.valid_until_ms is not None and second.valid_from_ms < first.valid_until_ms


def _by_start(line: PriceLine) -> int:
    return line.valid_from_ms


def _name(line: PriceLine) -> str:
    return f"{line.sku}, {line.price_class} in {line.currency}"


def _window(line: PriceLine) -> str:
    until = "open" if line.valid_until_ms is None else instant_text(line.valid_until_ms)
    return f"the line from {instant_text(line.valid_from_ms)} until {until}"
