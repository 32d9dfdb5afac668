"""Pricing: which price lists may be added, and what a quote costs.

Theory. A price line gives (currency, SKU, price class) a price in a window of whole UTC hours.
Lines are immutable; a new price is a new line. An open line ends where the next line of its series
(same currency, SKU and class) begins. So that the price of an hour never changes once it was rated,
a line that would take such an hour away is refused. A SKU is known once a line names it. Which line
rates an hour is `hisab_contracts.prices.PriceBook`'s to say, because the ledger asks the same.

A list is added in two steps, because the second needs rows that only the first can name:
`reject_overlap` and `displaced_lines` look at the lines alone, then `reject_rated` at the hours
that are rated on the lines to be displaced.

Refusals of a price list (`PriceListRefused`), in order of precedence: `price-overlap` (a start that
the series has already, or windows with fixed ends that overlap), `price-past` (it begins before an
hour already rated on the line it would cut short). Of a quote: `NotPriced`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from hisab_contracts.canonical import Canonical, content_sha256
from hisab_contracts.ids import PriceClass, PriceVersion, Sku
from hisab_contracts.prices import PriceBook, PriceSeries, quote_micro, series_of
from hisab_contracts.reference import PriceLine
from hisab_contracts.units import instant_text

MAX_MICRO_PER_GPU_HOUR: Final = 10**12
"""A million units of currency: keeps every bucket's amount far inside 64 bits."""

DEFAULT_CURRENCY: Final = "PKR"
"""Of quotes for keys that are no tenant's: they have no book whose currency it could be."""


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
class PriceListRefused:
    """The list cannot be taken as it is."""

    code: Literal["price-overlap", "price-past"]
    detail: str


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What a job would take: whole devices of one SKU and class for a duration."""

    series: PriceSeries
    gpus: int
    duration_ms: int


class JobQuote(NamedTuple):
    """What a job would cost, and the price list that says so."""

    quoted_micro: int
    price_version: PriceVersion


@dataclass(frozen=True, slots=True)
class NotPriced:
    """A quote is refused: no line of the series is in force."""

    series: PriceSeries


@dataclass(frozen=True, slots=True)
class DisplacedLine:
    """An open line that a new line would end: no hour of it from `from_ms` may be rated yet."""

    rate_line_id: str
    from_ms: int


def price_lines_of(price_list: PriceList) -> list[PriceLine]:
    """Return the lines that a list stands for, under the version that its content gives it."""
    version = price_version(price_list)
    return [
        PriceLine(
            rate_line_id=rate_line_id(version, listed.sku, listed.price_class),
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


def rate_line_id(version: PriceVersion, sku: Sku, price_class: PriceClass) -> str:
    """Name the line of a list: 32 hexadecimal digits, from what an entry says of its charge, too.

    So whoever reads an entry knows the line that rated it, even if it has forgotten the list.
    """
    content = {"price_version": version, "sku": sku, "price_class": price_class}
    return content_sha256(content)[:32]


def reject_overlap(book: PriceBook, lines: Sequence[PriceLine]) -> PriceListRefused | None:
    """Refuse new lines that begin where another does, or whose fixed windows overlap."""
    seen: set[PriceSeries] = set()
    for line in lines:
        series = series_of(line)
        if series in seen:
            return PriceListRefused("price-overlap", f"the list prices {_name(line)} twice")
        seen.add(series)
        for other in book.lines_of(series):
            if _overlaps(line, other):
                detail = f"{_name(line)}: {_window(line)} overlaps {_window(other)}"
                return PriceListRefused("price-overlap", detail)
    return None


def displaced_lines(book: PriceBook, lines: Sequence[PriceLine]) -> list[DisplacedLine]:
    """Return the open lines that these lines would end: their later hours must be unrated."""
    displaced = []
    for line in lines:
        earlier = [
            other
            for other in book.lines_of(series_of(line))
            if other.valid_from_ms < line.valid_from_ms
        ]
        # Only the line just before the new one can be cut short: each of the others ends earlier.
        if earlier and earlier[-1].valid_until_ms is None:
            displaced.append(DisplacedLine(earlier[-1].rate_line_id, line.valid_from_ms))
    return displaced


def reject_rated(
    rated_hour_ms: Mapping[str, int], displaced: Sequence[DisplacedLine]
) -> PriceListRefused | None:
    """Refuse lines that would take away an hour that is rated already.

    `rated_hour_ms` gives, per displaced rate line, an hour from `from_ms` that is rated on it.
    """
    for line in displaced:
        hour_ms = rated_hour_ms.get(line.rate_line_id)
        if hour_ms is not None:
            detail = (
                f"the hour {instant_text(hour_ms)} is rated already on the line that would end "
                f"at {instant_text(line.from_ms)}"
            )
            return PriceListRefused("price-past", detail)
    return None


def quote_job(book: PriceBook, job: JobRequest, hour_ms: int) -> JobQuote | NotPriced:
    """Price a job at what is in force in the UTC hour that begins at `hour_ms`.

    It is what a single bucket of the whole job would cost, rounded down once.
    """
    line = book.line_at(job.series, hour_ms)
    if line is None:
        return NotPriced(job.series)
    return JobQuote(quote_micro(line, job.gpus, job.duration_ms), line.price_version)


def _overlaps(line: PriceLine, other: PriceLine) -> bool:
    if line.valid_from_ms == other.valid_from_ms:
        return True
    # An open window overlaps nothing: it ends where the later line of its series begins.
    first, second = sorted((line, other), key=_by_start)
    return first.valid_until_ms is not None and second.valid_from_ms < first.valid_until_ms


def _by_start(line: PriceLine) -> int:
    return line.valid_from_ms


def _name(line: PriceLine) -> str:
    return f"{line.sku}, {line.price_class} in {line.currency}"


def _window(line: PriceLine) -> str:
    until = "open" if line.valid_until_ms is None else instant_text(line.valid_until_ms)
    return f"the line from {instant_text(line.valid_from_ms)} until {until}"
