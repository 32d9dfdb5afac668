"""Usage reports: which sums are read for what is asked, so that every hour counts once.

Theory. Usage is kept added up per UTC hour and per day of Asia/Karachi (decision 0021). A report
over a window reads whole days from the sums of days, and what is left at both ends of the window,
less than a day each, from those of hours. Days begin at 19:00Z, a whole UTC hour, so that hours
and days never overlap by a part. A report by the hour reads hours only.

A line stands for one interval and one value of each key that is grouped by; its place orders it:
by interval, then by keys. A page of a report by interval reads as few intervals as fill it
(`page_windows`), so that a page costs the same however long the window is.

Refuses nothing: what is asked was read by `metering.api`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple, assert_never

from hisab_contracts.ids import HubCode, PriceClass, ProjectId, Sku, TenantId
from hisab_contracts.units import HOUR_MS, hour_floor_ms, month_bounds_ms, month_of

UsageKey = Literal["tenant_id", "hub", "project_id", "sku", "price_class"]
UsageInterval = Literal["hour", "day", "month"]

KEYS: Final[tuple[UsageKey, ...]] = ("tenant_id", "hub", "project_id", "sku", "price_class")
"""What usage can be grouped by, in the order of a line's place."""
INTERVALS: Final[tuple[UsageInterval, ...]] = ("hour", "day", "month")
DAY_MS: Final = 24 * HOUR_MS
KARACHI_AHEAD_MS: Final = 5 * HOUR_MS
WIDER: Final = 4
"""So many times as many intervals are read next when those read so far do not fill a page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageReport:
    """What is asked: whose usage, in which window, and grouped by what."""

    tenant_id: TenantId | None
    hub: HubCode | None
    project_id: ProjectId | None
    sku: Sku | None
    price_class: PriceClass | None
    from_ms: int
    until_ms: int
    """`[from, until)`, on whole UTC hours."""
    keys: frozenset[UsageKey]
    interval: UsageInterval | None


class UsagePlace(NamedTuple):
    """Where a line stands: what is not grouped by is empty, and the start that of the window."""

    start_ms: int
    tenant_id: TenantId
    hub: HubCode
    project_id: ProjectId
    sku: Sku
    price_class: PriceClass


class UsageLine(NamedTuple):
    """What was used in one interval under one value of each key."""

    place: UsagePlace
    gpu_ns: int
    charge_micro: int
    """As rated: before refunds."""
    refunded_micro: int
    voided_gpu_ns: int
    """Under the terms as they were reported."""


class UsagePlan(NamedTuple):
    """Which sums a report reads: `[day_from, day_until)` in whole days, the rest in hours."""

    day_from_ms: int
    day_until_ms: int
    """Equal where no whole day lies in the window."""
    unit_ms: int
    """The length of its intervals; 0 where they are those between `starts`."""
    starts_ms: tuple[int, ...]


def plan_of(report: UsageReport) -> UsagePlan:
    """Return which sums make up a report: together its window, each hour of it once."""
    from_ms, until_ms = report.from_ms, report.until_ms
    # The first day that begins in the window, and the one in which it ends.
    day_from_ms = interval_start_ms("day", from_ms + DAY_MS - 1)
    day_until_ms = interval_start_ms("day", until_ms)
    if report.interval == "hour" or day_from_ms >= day_until_ms:
        day_from_ms = day_until_ms = until_ms
    match report.interval:
        case None:
            return UsagePlan(day_from_ms, day_until_ms, 0, (from_ms,))
        case "hour":
            return UsagePlan(day_from_ms, day_until_ms, HOUR_MS, ())
        case "day":
            return UsagePlan(day_from_ms, day_until_ms, DAY_MS, ())
        case "month":
            starts = tuple(_month_starts(from_ms, until_ms))
            return UsagePlan(day_from_ms, day_until_ms, 0, starts)
        case _:
            assert_never(report.interval)


def page_windows(report: UsageReport, after: UsagePlace | None) -> Iterator[UsageReport]:
    """Cut a report into windows to be read one after another, until a page is full.

    They begin with the interval in which the last page ended, and grow: where there is much in
    every interval few are read, and where there is little few windows are.
    """
    interval, from_ms = report.interval, report.from_ms
    if interval is None:
        yield report
        return
    if after is not None:
        from_ms = max(from_ms, after.start_ms)
    count = 1
    while from_ms < report.until_ms:
        end_ms = min(interval_end_ms(interval, from_ms, count), report.until_ms)
        yield replace(report, from_ms=from_ms, until_ms=end_ms)
        from_ms, count = end_ms, count * WIDER


def interval_start_ms(interval: UsageInterval, instant_ms: int) -> int:
    """Return the start of the hour, or of the day or month of Karachi, that holds an instant."""
    match interval:
        case "hour":
            return hour_floor_ms(instant_ms)
        case "day":
            return instant_ms - (instant_ms + KARACHI_AHEAD_MS) % DAY_MS
        case "month":
            return month_bounds_ms(month_of(instant_ms))[0]
        case _:
            assert_never(interval)


def interval_end_ms(interval: UsageInterval, instant_ms: int, count: int) -> int:
    """Return the end of so many intervals, of which the first holds an instant."""
    match interval:
        case "hour":
            return hour_floor_ms(instant_ms) + count * HOUR_MS
        case "day":
            return interval_start_ms("day", instant_ms) + count * DAY_MS
        case "month":
            end_ms = instant_ms
            for _ in range(count):
                end_ms = month_bounds_ms(month_of(end_ms))[1]
            return end_ms
        case _:
            assert_never(interval)


def _month_starts(from_ms: int, until_ms: int) -> Iterator[int]:
    """Yield the start of every month of which a part lies in the window."""
    start_ms = interval_start_ms("month", from_ms)
    while start_ms < until_ms:
        yield start_ms
        start_ms = interval_end_ms("month", start_ms, 1)
