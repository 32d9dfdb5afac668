"""Which partition of charges is a tenant's: its usage comes through no other.

What a tenant's usage is complete until hangs on it (`store/completeness`): a balance says it, a lot
expires by it, and a grant that is over is refused by it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from hisab_contracts import topics

UNKNOWN: Final = -1
"""No partition: it has no watermark, so nothing that comes through it is complete."""


class TenantPartitions:
    """Knows partitions by tenant, as soon as the broker has said how many there are."""

    def __init__(self, count: Callable[[], int | None]) -> None:
        """`count` is how many partitions charges have; None before the broker was asked."""
        self._count = count

    def of(self, tenant_id: str) -> int:
        """Return the partition of a tenant's charges."""
        count = self._count()
        return UNKNOWN if count is None else topics.partition_of(tenant_id.encode(), count)

    def all(self) -> Collection[int]:
        """Return every partition of charges; none before the broker was asked."""
        return range(self._count() or 0)
