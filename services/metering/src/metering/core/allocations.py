"""Allocations: when one that has ended is final, and when it is looked at again if it is not.

Theory. `AllocationFinal` tells the ledger that nothing more will be reported for an allocation, so
that its hold may be released. Two things can show it: the GPU time billed is exactly what the end
event says was reserved, or the hub is complete past the end, whatever was billed. Nothing is final
for a tenant that nobody knows yet: its usage is in quarantine, and the ledger has no book of it.

Refuses nothing: an allocation that is not final is looked at again, later each time.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from hisab_contracts.ids import AllocationId, HubCode, TenantId
from hisab_contracts.units import floor_gpu_ms

LONGEST_CHECK_AFTER_MS: Final = 30_000


class AllocationKey(NamedTuple):
    """Who an allocation is. Its id is unique within a hub, but a hub may err about the tenant."""

    hub: HubCode
    allocation_id: AllocationId
    tenant_id: TenantId


class EndedAllocation(NamedTuple):
    """An allocation that has ended and is not final yet, with what decides about it."""

    key: AllocationKey
    ended_ms: int
    reserved_gpu_ms: int
    """The total that its end event states."""
    billed_gpu_ns: int
    """The sum of its buckets."""
    hub_watermark_ms: int | None
    tenant_is_known: bool
    check_count: int
    """How often it was looked at before."""


class AllocationCheck(NamedTuple):
    """What a look at an ended allocation decided."""

    key: AllocationKey
    ended_ms: int
    is_final: bool
    check_after_ms: int
    """How long from now until the next look, if it is not final."""


def check_allocation(allocation: EndedAllocation) -> AllocationCheck:
    """Decide whether an allocation is final, and when to look again if it is not.

    The next look comes after 1, 2, 4 … seconds, 30 at most: most are final within a second of
    their end, but a hub that has stopped for days must not make us add up the buckets of all its
    allocations twice a second.
    """
    check_after_ms = min(LONGEST_CHECK_AFTER_MS, 1_000 << min(allocation.check_count, 5))
    return AllocationCheck(
        key=allocation.key,
        ended_ms=allocation.ended_ms,
        is_final=_is_final(allocation),
        check_after_ms=check_after_ms,
    )


def _is_final(allocation: EndedAllocation) -> bool:
    if not allocation.tenant_is_known:
        return False
    watermark_ms = allocation.hub_watermark_ms
    if watermark_ms is not None and watermark_ms >= allocation.ended_ms:
        return True
    return floor_gpu_ms(allocation.billed_gpu_ns) == allocation.reserved_gpu_ms
