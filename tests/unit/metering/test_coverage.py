"""Coverage: rows are cut at UTC midnight, and what that means for loading them."""

from __future__ import annotations

from hisab_contracts.ids import (
    AllocationId,
    DeviceId,
    PriceClass,
    ProjectId,
    Sku,
    SliceId,
    TenantId,
)
from metering.core.coverage import (
    DAY_MS,
    Claim,
    DeviceCoverage,
    day_floor_ms,
    days_touched_count,
)
from unit.metering.hub_events import HOUR_MS, NOON_MS

MIDNIGHT_MS = NOON_MS - 10 * HOUR_MS
WHOLE = SliceId("GPU-1")
CLAIM = Claim(
    TenantId("ravi-health"),
    ProjectId("main"),
    AllocationId("job-1"),
    Sku("h100-sxm-80"),
    PriceClass("on_demand"),
    1_000_000,
)


def test_row_that_holds_an_instant_starts_at_its_midnight_or_later() -> None:
    """So whoever loads from the midnight before an interval finds all that can touch it."""
    assert MIDNIGHT_MS == day_floor_ms(MIDNIGHT_MS) == day_floor_ms(NOON_MS)
    coverage = DeviceCoverage(DeviceId("GPU-1"))
    coverage.cover(WHOLE, MIDNIGHT_MS - 1, MIDNIGHT_MS + DAY_MS + 1, CLAIM)
    added = coverage.changes().added
    assert [MIDNIGHT_MS - 1, MIDNIGHT_MS, MIDNIGHT_MS + DAY_MS] == [row.start_ms for row in added]
    assert len(added) == days_touched_count(MIDNIGHT_MS - 1, MIDNIGHT_MS + DAY_MS + 1)


def test_days_touched_are_those_of_a_half_open_interval() -> None:
    """One that ends at midnight does not touch the next day."""
    assert 1 == days_touched_count(MIDNIGHT_MS, MIDNIGHT_MS + DAY_MS)
    assert 2 == days_touched_count(MIDNIGHT_MS, MIDNIGHT_MS + DAY_MS + 1)
