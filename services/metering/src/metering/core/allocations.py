"""Allocations: when one that has ended is final, and what it is looked at again for if it is not.

Theory. `AllocationFinal` tells the ledger that nothing more will be reported for an allocation, so
that its hold may be released. Two things can show it: the GPU time covered, billed or voided, is
exactly what the end event says was reserved, or the hub is complete past the end. Nothing is final
for a tenant that nobody knows yet: its usage is in quarantine, and the ledger has no book of it.

An allocation that is not final is looked at once more, and then *rests*: nobody looks at it until
something of it is billed, its hub is complete past its end, or its tenant becomes known. So those
that never become final, of a hub that has stopped for weeks, cost nothing and delay no other.

Refuses nothing.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from hisab_contracts.ids import AllocationId, HubCode, TenantId
from hisab_contracts.units import floor_gpu_ms

UNKNOWN_TENANT_CHECK_MS: Final = 600_000
"""Its tenant wakes it as it arrives. Should that have been at the very moment of the look, each of
the two could have missed the other: so it is looked at now and then."""


SECOND_LOOK_MS: Final = 60_000
"""Whoever bills wakes an allocation that has ended; what was billed while its end was not committed
yet woke nobody, and the first look may have come before that billing was. A minute later it is."""


class AllocationKey(NamedTuple):
    """Who an allocation is. A scheduler may give its id out again, to another tenant too."""

    hub: HubCode
    allocation_id: AllocationId
    tenant_id: TenantId


class EndedAllocation(NamedTuple):
    """An allocation that has ended and is not final yet, with what decides about it."""

    key: AllocationKey
    ended_ms: int
    reserved_gpu_ms: int
    """The total that its end event states."""
    covered_gpu_ns: int
    """The sum of its buckets, with what corrections voided of them: that was reserved, too."""
    hub_watermark_ms: int | None
    tenant_is_known: bool
    was_checked: bool
    """Whether it was looked at since it ended."""


class AllocationCheck(NamedTuple):
    """What a look at an ended allocation decided."""

    key: AllocationKey
    ended_ms: int
    is_final: bool
    check_after_ms: int | None
    """How long from now until the next look, if it is not final; None: it rests."""


def check_allocation(allocation: EndedAllocation) -> AllocationCheck:
    """Decide whether an allocation is final, and when to look again if it is not."""
    return AllocationCheck(
        key=allocation.key,
        ended_ms=allocation.ended_ms,
        is_final=_is_final(allocation),
        check_after_ms=_next_look_ms(allocation),
    )


def _next_look_ms(allocation: EndedAllocation) -> int | None:
    if not allocation.tenant_is_known:
        return UNKNOWN_TENANT_CHECK_MS
    return None if allocation.was_checked else SECOND_LOOK_MS


def _is_final(allocation: EndedAllocation) -> bool:
    if not allocation.tenant_is_known:
        return False
    watermark_ms = allocation.hub_watermark_ms
    if watermark_ms is not None and watermark_ms >= allocation.ended_ms:
        return True
    return floor_gpu_ms(allocation.covered_gpu_ns) == allocation.reserved_gpu_ms
