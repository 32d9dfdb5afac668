"""Which sums a usage report reads: every hour of its window once, however it is cut."""

from __future__ import annotations

import datetime as dt
from itertools import pairwise
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hisab_contracts.ids import HubCode, PriceClass, ProjectId, Sku, TenantId
from hisab_contracts.units import HOUR_MS, KARACHI, moment_of, ms_of
from metering.core.usage_reports import (
    DAY_MS,
    INTERVALS,
    UsageInterval,
    UsagePlace,
    UsageReport,
    interval_end_ms,
    interval_start_ms,
    page_windows,
    plan_of,
)

FIRST_HOUR: Final = ms_of(dt.datetime(2020, 1, 1, tzinfo=dt.UTC)) // HOUR_MS
HOURS = st.integers(min_value=FIRST_HOUR, max_value=FIRST_HOUR + 24 * 900).map(
    lambda hour: hour * HOUR_MS
)
NOTHING = (TenantId(""), HubCode(""), ProjectId(""), Sku(""), PriceClass(""))
EVERY = st.sampled_from((None, *INTERVALS))


def report_of(from_ms: int, until_ms: int, every: UsageInterval | None) -> UsageReport:
    """A report of everything in a window."""
    return UsageReport(
        tenant_id=None,
        hub=None,
        project_id=None,
        sku=None,
        price_class=None,
        from_ms=from_ms,
        until_ms=until_ms,
        keys=frozenset(),
        interval=every,
    )


@given(HOURS, st.integers(min_value=1, max_value=24 * 100), EVERY)
def test_days_and_hours_that_are_read_make_up_the_window(
    from_ms: int, length: int, every: UsageInterval | None
) -> None:
    """Whole days of Karachi inside it, and at each end less than a day of hours."""
    until_ms = from_ms + length * HOUR_MS
    plan = plan_of(report_of(from_ms, until_ms, every))
    assert from_ms <= plan.day_from_ms <= plan.day_until_ms <= until_ms
    days_ms = plan.day_until_ms - plan.day_from_ms
    assert 0 == days_ms % DAY_MS
    if days_ms:
        assert 0 == moment_of(plan.day_from_ms).astimezone(KARACHI).hour
        assert plan.day_from_ms - from_ms < DAY_MS
        assert until_ms - plan.day_until_ms < DAY_MS
    elif every != "hour":
        assert until_ms - from_ms < 2 * DAY_MS


@given(HOURS, st.integers(min_value=1, max_value=24 * 100), EVERY)
def test_every_hour_lies_in_an_interval_that_its_calendar_gives(
    from_ms: int, length: int, every: UsageInterval | None
) -> None:
    """Units of hours and days, or starts of months; without an interval all is one."""
    until_ms = from_ms + length * HOUR_MS
    plan = plan_of(report_of(from_ms, until_ms, every))
    match every:
        case None:
            assert (0, (from_ms,)) == (plan.unit_ms, plan.starts_ms)
        case "hour":
            assert (HOUR_MS, ()) == (plan.unit_ms, plan.starts_ms)
        case "day":
            assert (DAY_MS, ()) == (plan.unit_ms, plan.starts_ms)
        case "month":
            starts = [moment_of(start_ms).astimezone(KARACHI) for start_ms in plan.starts_ms]
            assert {(1, 0)} == {(start.day, start.hour) for start in starts}
            assert plan.starts_ms[0] <= from_ms
            hours = range(from_ms, until_ms, HOUR_MS)
            months = [moment_of(hour_ms).astimezone(KARACHI) for hour_ms in hours]
            assert {(at.year, at.month) for at in months} == {(s.year, s.month) for s in starts}


@given(HOURS, st.integers(min_value=1, max_value=24 * 400), EVERY, st.data())
def test_windows_of_a_page_follow_each_other_to_the_end(
    from_ms: int, length: int, every: UsageInterval | None, data: st.DataObject
) -> None:
    """From the interval where the last page ended; cut only where an interval begins."""
    until_ms = from_ms + length * HOUR_MS
    report = report_of(from_ms, until_ms, every)
    ended = data.draw(st.none() | st.integers(min_value=0, max_value=length - 1))
    after = None
    begin_ms = from_ms
    if ended is not None and every is not None:
        start_ms = interval_start_ms(every, from_ms + ended * HOUR_MS)
        after = UsagePlace(start_ms, *NOTHING)
        begin_ms = max(from_ms, start_ms)
    windows = list(page_windows(report, after))
    assert begin_ms == windows[0].from_ms
    assert until_ms == windows[-1].until_ms
    for earlier, later in pairwise(windows):
        assert earlier.until_ms == later.from_ms
        assert every is not None
        assert later.from_ms == interval_start_ms(every, later.from_ms)
    assert len(windows) <= 8


@pytest.mark.parametrize(
    ("every", "count", "expected"),
    [
        ("hour", 1, "2025-06-30T20:00:00+00:00"),
        ("day", 1, "2025-07-01T19:00:00+00:00"),
        ("day", 31, "2025-07-31T19:00:00+00:00"),
        ("month", 1, "2025-07-31T19:00:00+00:00"),
        ("month", 6, "2025-12-31T19:00:00+00:00"),
    ],
)
def test_intervals_end_by_the_calendar_of_karachi(
    every: UsageInterval, count: int, expected: str
) -> None:
    """July begins at 19:00Z of the 30th of June."""
    july_ms = ms_of(dt.datetime(2025, 7, 1, tzinfo=KARACHI))
    for instant_ms in (july_ms, july_ms + HOUR_MS // 2):
        assert july_ms == interval_start_ms(every, instant_ms)
        assert expected == moment_of(interval_end_ms(every, instant_ms, count)).isoformat()
