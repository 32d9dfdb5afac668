"""What is asked of the accounts: the reconciliation, and all that is known of an allocation.

What must add up is one statement, so that its parts belong to one instant: the reconciliation. The
drill-down takes several, each on what is committed when it runs. Both run on the `api` role:
row-level security shows a tenant's key only what is the tenant's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hisab_contracts.ids import HubCode

if TYPE_CHECKING:
    from runtime.database import Connection


@dataclass(frozen=True, slots=True)
class UsageSums:
    """The accounts of one hub (or all) in a window of usage time: GPU-ns, records, amounts."""

    reported_gpu_ns: int
    billed_gpu_ns: int
    duplicate_gpu_ns: int
    quarantined_gpu_ns: int
    read_records: int
    accepted_records: int
    duplicate_records: int
    quarantined_records: int
    buckets: int
    charge_micro: int


_SUMS = """
with counted as (
  select coalesce(sum(reported_gpu_ns), 0) as reported_gpu_ns,
         coalesce(sum(duplicate_gpu_ns), 0) as duplicate_gpu_ns,
         coalesce(sum(read_records), 0) as read_records,
         coalesce(sum(accepted_records), 0) as accepted_records,
         coalesce(sum(duplicate_records), 0) as duplicate_records
    from tallies
   where hub = any($1::text[]) and hour_ms >= $2 and hour_ms < $3
), billed as (
  select coalesce(sum(gpu_ns), 0) as gpu_ns, coalesce(sum(charge_micro), 0) as charge_micro,
         count(*) as buckets
    from buckets
   where hub = any($1::text[]) and hour_ms >= $2 and hour_ms < $3
), waiting as (
  select coalesce(sum(waiting_gpu_ns), 0) as gpu_ns
    from quarantine_time
   where hub = any($1::text[]) and hour_ms >= $2 and hour_ms < $3
), records as (
  select count(*) as quarantined
    from quarantine
   where hub = any($1::text[]) and hour_ms >= $2 and hour_ms < $3
     and counts and state <> 'released'
)
select c.reported_gpu_ns, b.gpu_ns as billed_gpu_ns, c.duplicate_gpu_ns,
       w.gpu_ns as quarantined_gpu_ns, c.read_records, c.accepted_records, c.duplicate_records,
       r.quarantined, b.buckets, b.charge_micro
  from counted c, billed b, waiting w, records r
"""


async def sum_usage(
    connection: Connection, hubs: Sequence[HubCode], from_ms: int, until_ms: int
) -> UsageSums:
    """Add up every account of hubs in `[from_ms, until_ms)` of usage time, at one instant."""
    row = await connection.fetchrow(_SUMS, hubs, from_ms, until_ms)
    if row is None:
        raise LookupError("an aggregate has one row")
    return UsageSums(*(int(value) for value in row.values()))


class CoveredStretch(NamedTuple):
    """A stretch of a slice that is sold to an allocation."""

    slice_uuid: str
    share_ppm: int
    start_ms: int
    end_ms: int


class BilledHour(NamedTuple):
    """One bucket of an allocation."""

    hour_ms: int
    node_id: str
    sku: str
    price_class: str
    revision: int
    gpu_ns: int
    charge_micro: int
    price_version: str


class AllocationQuarantine(NamedTuple):
    """A record of an allocation that is, or was, in quarantine."""

    quarantine_id: int
    reason: str
    state: str
    waiting_gpu_ns: int


@dataclass(frozen=True, slots=True)
class AllocationDetail:
    """All that is known of one allocation, as far as the caller may see it.

    The sums are of all there is; the lists are cut.
    """

    tenant_id: str
    intervals: list[CoveredStretch]
    billed_gpu_ns: int
    duplicate_gpu_ns: int
    quarantined: list[AllocationQuarantine]
    buckets: list[BilledHour]


# Whose an allocation is. A hub may err and name two tenants: the first by name is shown.
_OWNERS = """
select tenant_id from buckets where allocation_id = $2 and hub = $1
union
select tenant_id from allocations where allocation_id = $2 and hub = $1
union
select tenant_id from quarantine
 where allocation_id = $2 and hub = $1 and tenant_id is not null
 order by tenant_id
"""

# The billed time of all its buckets, and the nodes of all of them.
_BILLED_OF = """
select coalesce(sum(gpu_ns), 0) as billed_gpu_ns,
       coalesce(array_agg(distinct node_id), '{}') as nodes
  from buckets
 where hub = $1 and allocation_id = $2 and tenant_id = $3
"""

_BUCKETS_OF = """
select hour_ms, node_id, sku, price_class, revision, gpu_ns, charge_micro, price_version
  from buckets
 where hub = $1 and allocation_id = $2 and tenant_id = $3
 order by hour_ms, node_id, sku, price_class, price_version
 limit 10000
"""

_QUARANTINED_OF = """
select q.quarantine_id, q.reason, q.state,
       coalesce((select sum(t.waiting_gpu_ns) from quarantine_time t
                  where t.quarantine_id = q.quarantine_id), 0) as waiting_gpu_ns
  from quarantine q
 where q.hub = $1 and q.allocation_id = $2 and q.tenant_id = $3
 order by q.quarantine_id
 limit 10000
"""

_DUPLICATE_OF = """
select duplicate_gpu_ns from allocation_duplicates
 where hub = $1 and allocation_id = $2 and tenant_id = $3
"""

# Coverage has no index by allocation, so it is read by the nodes of its buckets.
_COVERED_BY = """
select c.slice_uuid, c.share_ppm, c.start_ms, c.end_ms
  from coverage c
 where c.hub = $1 and c.allocation_id = $2 and c.tenant_id = $3 and c.node_id = any($4::text[])
 order by c.slice_uuid, c.share_ppm, c.start_ms
 limit 100000
"""


async def find_allocation(
    connection: Connection, hub: HubCode, allocation_id: str
) -> AllocationDetail | None:
    """Look an allocation up; None when nothing of it is known to the caller."""
    owners = await connection.fetch(_OWNERS, hub, allocation_id)
    if not owners:
        return None
    tenant_id = owners[0][0]
    key = (hub, allocation_id, tenant_id)
    buckets = [BilledHour(*row.values()) for row in await connection.fetch(_BUCKETS_OF, *key)]
    quarantined = await connection.fetch(_QUARANTINED_OF, *key)
    duplicate_gpu_ns = await connection.fetchval(_DUPLICATE_OF, *key)
    billed = await connection.fetchrow(_BILLED_OF, *key)
    if billed is None:
        raise LookupError("an aggregate has one row")
    covered = await connection.fetch(_COVERED_BY, *key, billed["nodes"])
    return AllocationDetail(
        tenant_id=tenant_id,
        intervals=_join_days(CoveredStretch(*row.values()) for row in covered),
        billed_gpu_ns=int(billed["billed_gpu_ns"]),
        duplicate_gpu_ns=int(duplicate_gpu_ns or 0),
        quarantined=[
            AllocationQuarantine(row[0], row[1], row[2], int(row[3])) for row in quarantined
        ],
        buckets=buckets,
    )


def _join_days(pieces: Iterable[CoveredStretch]) -> list[CoveredStretch]:
    """Put stretches together that are stored in pieces because they were cut at midnights."""
    whole: list[CoveredStretch] = []
    for piece in pieces:
        last = whole[-1] if whole else None
        if last is not None and (*last[:2], last.end_ms) == piece[:3]:
            whole[-1] = last._replace(end_ms=piece.end_ms)
        else:
            whole.append(piece)
    return whole
