"""Allocations that have ended: which are due to be looked at, and what was decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hisab_contracts.ids import AllocationId, HubCode, TenantId
from metering.core.allocations import AllocationCheck, AllocationKey, EndedAllocation

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection

# Rows that another process looks at are skipped: it decides about them. The sums are taken after
# the limit, of the due ones only.
_DUE = """
with due as (
  select a.hub, a.allocation_id, a.tenant_id, a.ended_ms, a.reserved_gpu_ms, a.checks,
         h.watermark_ms
    from allocations a
    join hubs h on h.hub = a.hub
   where a.ended_ms is not null and not a.final and a.check_at <= clock_timestamp()
   order by a.check_at
   limit $1
     for update of a skip locked
)
select d.hub, d.allocation_id, d.tenant_id, d.ended_ms, d.reserved_gpu_ms, d.checks, d.watermark_ms,
       (select coalesce(sum(b.gpu_ns), 0) from buckets b
         where b.allocation_id = d.allocation_id and b.hub = d.hub
           and b.tenant_id = d.tenant_id) as billed_gpu_ns,
       exists (select from tenants t where t.tenant_id = d.tenant_id) as tenant_is_known
  from due d
 order by d.hub, d.allocation_id, d.tenant_id
"""


async def lock_due_allocations(connection: Connection, most: int) -> list[EndedAllocation]:
    """Lock and read allocations that have ended, are not final and are due to be looked at."""
    return [_ended_from_row(row) for row in await connection.fetch(_DUE, most)]


def _ended_from_row(row: Row) -> EndedAllocation:
    return EndedAllocation(
        key=AllocationKey(
            HubCode(row["hub"]), AllocationId(row["allocation_id"]), TenantId(row["tenant_id"])
        ),
        ended_ms=row["ended_ms"],
        reserved_gpu_ms=row["reserved_gpu_ms"],
        billed_gpu_ns=int(row["billed_gpu_ns"]),
        hub_watermark_ms=row["watermark_ms"],
        tenant_is_known=row["tenant_is_known"],
        check_count=row["checks"],
    )


# The next look is counted from the database's clock, because it also decides what is due.
_SAVE_CHECKS = """
update allocations a
   set final = k.final, checks = a.checks + 1,
       check_at = clock_timestamp() + k.wait_ms * interval '1 millisecond'
  from unnest($1::text[], $2::text[], $3::text[], $4::boolean[], $5::bigint[])
       as k (hub, allocation_id, tenant_id, final, wait_ms)
 where a.hub = k.hub and a.allocation_id = k.allocation_id and a.tenant_id = k.tenant_id
"""


async def save_checks(connection: Connection, checks: Sequence[AllocationCheck]) -> None:
    """Store what was decided about allocations that were looked at, and when to look again."""
    rows = [(*check.key, check.is_final, check.next_check_ms) for check in checks]
    await connection.execute(_SAVE_CHECKS, *zip(*rows, strict=True))
