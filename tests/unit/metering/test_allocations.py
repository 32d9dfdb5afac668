"""Allocations: when one that has ended is final, and what it is looked at again for."""

from __future__ import annotations

import pytest

from hisab_contracts.ids import AllocationId, HubCode, TenantId
from metering.core.allocations import AllocationKey, EndedAllocation, check_allocation
from unit.metering.hub_events import NOON_MS

KEY = AllocationKey(HubCode("lhr"), AllocationId("job-1"), TenantId("ravi-health"))


def ended(
    *,
    covered_gpu_ns: int = 0,
    watermark_ms: int | None = None,
    known: bool = True,
    checked: bool = False,
) -> EndedAllocation:
    """job-1 ended at noon and says that it reserved a second of a device."""
    return EndedAllocation(KEY, NOON_MS, 1_000, covered_gpu_ns, watermark_ms, known, checked)


@pytest.mark.parametrize(
    ("allocation", "final"),
    [
        (ended(), False),
        (ended(covered_gpu_ns=1_000_000_000), True),
        (ended(covered_gpu_ns=1_000_999_999), True),
        (ended(covered_gpu_ns=1_001_000_000), False),
        (ended(watermark_ms=NOON_MS - 1), False),
        (ended(watermark_ms=NOON_MS), True),
        (ended(watermark_ms=NOON_MS, covered_gpu_ns=5), True),
        (ended(watermark_ms=NOON_MS, known=False), False),
        (ended(covered_gpu_ns=1_000_000_000, known=False), False),
    ],
)
def test_allocation_is_final_when_totals_match_or_its_hub_is_complete(
    allocation: EndedAllocation, final: bool
) -> None:
    """Either shows that nothing more comes; for a tenant that nobody knows nothing does."""
    check = check_allocation(allocation)
    assert (KEY, NOON_MS, final) == (check.key, check.ended_ms, check.is_final)


def test_allocation_that_is_not_final_rests_until_something_of_it_changes() -> None:
    """Only for a tenant that nobody knows the next look has a time, ten minutes from now."""
    assert check_allocation(ended(checked=True)).check_after_ms is None
    assert 600_000 == check_allocation(ended(known=False)).check_after_ms
    assert 600_000 == check_allocation(ended(known=False, checked=True)).check_after_ms


def test_first_look_is_followed_by_a_second_because_billing_may_have_been_under_way() -> None:
    """Who billed before the end was committed woke nobody: a minute later it is looked at again."""
    assert 60_000 == check_allocation(ended()).check_after_ms
    assert check_allocation(ended(covered_gpu_ns=1_000_000_000, checked=True)).is_final
