"""What is asked of the accounts: the reconciliation, and all that is known of an allocation.

What must add up is one statement, so that its parts belong to one instant: the reconciliation. The
drill-down takes several, each on what is committed when it runs. Both run on the `api` role:
row-level security shows a tenant's key only what is the tenant's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from hisab_contracts.ids import HubCode
from metering.core.quarantine import QuarantineState

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection


MAX_OWNERS: Final = 1_000
"""Tenants that one answer about an allocation names at most."""


@dataclass(frozen=True, slots=True)
class UsageSums:
    """The accounts of one hub (or all) in a window of usage time: GPU-ns, records, amounts."""

    reported_gpu_ns: int
    billed_gpu_ns: int
    duplicate_gpu_ns: int
    quarantined_gpu_ns: int
    voided_gpu_ns: int
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
         coalesce(sum(voided_gpu_ns), 0) as voided_gpu_ns, count(*) as buckets
    from buckets
   where hub = any($1::text[]) and hour_ms >= $2 and hour_ms < $3
), quarantined_time as (
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
       q.gpu_ns as quarantined_gpu_ns, b.voided_gpu_ns, c.read_records, c.accepted_records,
       c.duplicate_records, r.quarantined as quarantined_records, b.buckets,
       b.charge_micro
  from counted c, billed b, quarantined_time q, records r
"""


async def sum_usage(
    connection: Connection, hubs: Sequence[HubCode], from_ms: int, until_ms: int
) -> UsageSums:
    """Add up every account of hubs in `[from_ms, until_ms)` of usage time, at one instant."""
    row = await connection.fetchrow(_SUMS, hubs, from_ms, until_ms)
    if row is None:
        raise LookupError("an aggregate has one row")
    return _sums_from_row(row)


def _sums_from_row(row: Row) -> UsageSums:
    return UsageSums(
        reported_gpu_ns=row["reported_gpu_ns"],
        billed_gpu_ns=row["billed_gpu_ns"],
        duplicate_gpu_ns=row["duplicate_gpu_ns"],
        quarantined_gpu_ns=row["quarantined_gpu_ns"],
        voided_gpu_ns=row["voided_gpu_ns"],
        read_records=row["read_records"],
        accepted_records=row["accepted_records"],
        duplicate_records=row["duplicate_records"],
        quarantined_records=row["quarantined_records"],
        buckets=row["buckets"],
        charge_micro=row["charge_micro"],
    )


@dataclass(frozen=True, slots=True)
class AllocationFilter:
    """Which allocation is wanted, and of which tenant; None is of all that the caller may see."""

    hub: HubCode
    allocation_id: str
    tenant_id: str | None


@dataclass(frozen=True, slots=True)
class AllocationSums:
    """Whose an allocation is, and all that there is of it, added up by the database."""

    owners: list[str]
    """Tenants that were billed for it, and known ones that hubs named as it started or ended."""
    claimants: list[str]
    """Tenants that records in quarantine name: at most two. They own nothing of it by that."""
    billed_gpu_ns: int
    duplicate_gpu_ns: int
    quarantined_gpu_ns: int
    voided_gpu_ns: int
    charge_micro: int


# Whose an allocation is. A scheduler gives job numbers out again, so there may be several; and a
# record in quarantine may name anybody, so it makes nobody an owner.
_OWNERS = """
select b.tenant_id
  from buckets b
 where b.allocation_id = $2 and b.hub = $1 and ($3::text is null or b.tenant_id = $3)
union
select a.tenant_id
  from allocations a
  join tenants known on known.tenant_id = a.tenant_id
 where a.allocation_id = $2 and a.hub = $1 and ($3::text is null or a.tenant_id = $3)
 order by tenant_id
 limit $4
"""

# Two are enough to say that there are several.
_CLAIMANTS = """
select distinct tenant_id
  from quarantine
 where allocation_id = $2 and hub = $1 and tenant_id is not null
   and ($3::text is null or tenant_id = $3)
 order by tenant_id
 limit 2
"""

_SUMS_OF = """
with billed as (
  select coalesce(sum(gpu_ns), 0) as gpu_ns, coalesce(sum(charge_micro), 0) as charge_micro,
         coalesce(sum(voided_gpu_ns), 0) as voided_gpu_ns
    from buckets
   where allocation_id = $2 and hub = $1 and ($3::text is null or tenant_id = $3)
), duplicate as (
  select coalesce(sum(duplicate_gpu_ns), 0) as gpu_ns
    from allocation_duplicates
   where allocation_id = $2 and hub = $1 and ($3::text is null or tenant_id = $3)
), quarantined as (
  select coalesce(sum(t.waiting_gpu_ns), 0) as gpu_ns
    from quarantine q
    join quarantine_time t on t.quarantine_id = q.quarantine_id
   where q.allocation_id = $2 and q.hub = $1 and ($3::text is null or q.tenant_id = $3)
)
select b.gpu_ns as billed_gpu_ns, b.charge_micro, d.gpu_ns as duplicate_gpu_ns,
       q.gpu_ns as quarantined_gpu_ns, b.voided_gpu_ns
  from billed b, duplicate d, quarantined q
"""


async def sum_allocation(connection: Connection, wanted: AllocationFilter) -> AllocationSums | None:
    """Add an allocation up; None when nothing of it is known to the caller."""
    key = (wanted.hub, wanted.allocation_id, wanted.tenant_id)
    owners = [row["tenant_id"] for row in await connection.fetch(_OWNERS, *key, MAX_OWNERS)]
    claimants = [row["tenant_id"] for row in await connection.fetch(_CLAIMANTS, *key)]
    if not owners and not claimants:
        return None
    row = await connection.fetchrow(_SUMS_OF, *key)
    if row is None:
        raise LookupError("an aggregate has one row")
    return AllocationSums(
        owners=owners,
        claimants=claimants,
        billed_gpu_ns=int(row["billed_gpu_ns"]),
        duplicate_gpu_ns=int(row["duplicate_gpu_ns"]),
        quarantined_gpu_ns=int(row["quarantined_gpu_ns"]),
        voided_gpu_ns=int(row["voided_gpu_ns"]),
        charge_micro=int(row["charge_micro"]),
    )


class BilledHour(NamedTuple):
    """One bucket of an allocation."""

    bucket_id: str
    tenant_id: str
    project_id: str
    hour_ms: int
    node_id: str
    sku: str
    price_class: str
    revision: int
    gpu_ns: int
    voided_gpu_ns: int
    charge_micro: int
    price_version: str

    @property
    def place(self) -> BucketPlace:
        """Where it stands in the list of buckets."""
        return BucketPlace(self.hour_ms, self.node_id, self.bucket_id)


class BucketPlace(NamedTuple):
    """A place in an allocation's list of buckets: by hour, then node."""

    hour_ms: int
    node_id: str
    bucket_id: str


# The id as text: what a cursor says need not be one.
_BUCKETS_OF = """
select bucket_id::text as bucket_id, tenant_id, project_id, hour_ms, node_id, sku, price_class,
       revision, gpu_ns, voided_gpu_ns, charge_micro, price_version
  from buckets
 where allocation_id = $2 and hub = $1 and ($3::text is null or tenant_id = $3)
   and ($4::bigint is null or (hour_ms, node_id, bucket_id::text) > ($4, $5, $6))
 order by hour_ms, node_id, bucket_id::text
 limit $7
"""


async def list_buckets(
    connection: Connection, wanted: AllocationFilter, after: BucketPlace | None, most: int
) -> list[BilledHour]:
    """List buckets of an allocation, by hour and node."""
    key = (wanted.hub, wanted.allocation_id, wanted.tenant_id)
    place = (None, None, None) if after is None else after
    rows = await connection.fetch(_BUCKETS_OF, *key, *place, most)
    return [_billed_hour_from_row(row) for row in rows]


def _billed_hour_from_row(row: Row) -> BilledHour:
    return BilledHour(
        bucket_id=row["bucket_id"],
        tenant_id=row["tenant_id"],
        project_id=row["project_id"],
        hour_ms=row["hour_ms"],
        node_id=row["node_id"],
        sku=row["sku"],
        price_class=row["price_class"],
        revision=row["revision"],
        gpu_ns=row["gpu_ns"],
        voided_gpu_ns=row["voided_gpu_ns"],
        charge_micro=row["charge_micro"],
        price_version=row["price_version"],
    )


class AllocationInterval(NamedTuple):
    """An interval of a slice that is covered by an allocation."""

    tenant_id: str
    node_id: str
    device_uuid: str
    slice_uuid: str
    share_ppm: int
    start_ms: int
    end_ms: int

    @property
    def place(self) -> IntervalPlace:
        """Where it stands in the list of intervals."""
        return IntervalPlace(
            self.tenant_id, self.node_id, self.device_uuid, self.slice_uuid, self.start_ms
        )


class IntervalPlace(NamedTuple):
    """A place in an allocation's list of intervals: by tenant, node, device, slice, start."""

    tenant_id: str
    node_id: str
    device_uuid: str
    slice_uuid: str
    start_ms: int


# Coverage is stored in pieces that end at midnight: pieces that touch are one interval again. Two
# nodes may have slices of one name, which are two slices.
_INTERVALS_OF = """
with pieces as (
  select tenant_id, node_id, device_uuid, slice_uuid, share_ppm, start_ms, end_ms,
         lag(end_ms) over slice is distinct from start_ms as begins
    from coverage
   where allocation_id = $2 and hub = $1 and ($3::text is null or tenant_id = $3)
  window slice as (
    partition by tenant_id, node_id, device_uuid, slice_uuid, share_ppm order by start_ms
  )
), runs as (
  select tenant_id, node_id, device_uuid, slice_uuid, share_ppm, start_ms, end_ms,
         count(*) filter (where begins) over (
           partition by tenant_id, node_id, device_uuid, slice_uuid, share_ppm order by start_ms
         ) as run
    from pieces
)
select tenant_id, node_id, device_uuid, slice_uuid, share_ppm,
       min(start_ms) as start_ms, max(end_ms) as end_ms
  from runs
 group by tenant_id, node_id, device_uuid, slice_uuid, share_ppm, run
having $4::text is null
    or (tenant_id, node_id, device_uuid, slice_uuid, min(start_ms)) > ($4, $5, $6, $7, $8)
 order by tenant_id, node_id, device_uuid, slice_uuid, min(start_ms)
 limit $9
"""


async def list_intervals(
    connection: Connection, wanted: AllocationFilter, after: IntervalPlace | None, most: int
) -> list[AllocationInterval]:
    """List what is covered by an allocation, slice by slice."""
    key = (wanted.hub, wanted.allocation_id, wanted.tenant_id)
    place = (None, None, None, None, None) if after is None else after
    rows = await connection.fetch(_INTERVALS_OF, *key, *place, most)
    return [_interval_from_row(row) for row in rows]


def _interval_from_row(row: Row) -> AllocationInterval:
    return AllocationInterval(
        tenant_id=row["tenant_id"],
        node_id=row["node_id"],
        device_uuid=row["device_uuid"],
        slice_uuid=row["slice_uuid"],
        share_ppm=row["share_ppm"],
        start_ms=row["start_ms"],
        end_ms=row["end_ms"],
    )


class AllocationQuarantine(NamedTuple):
    """A record of an allocation that is, or was, in quarantine."""

    quarantine_id: int
    tenant_id: str
    reason: str
    state: QuarantineState
    quarantined_gpu_ns: int


# The page is taken first, so that time is added up for its records only.
_QUARANTINED_OF = """
with page as (
  select quarantine_id, tenant_id, reason, state
    from quarantine
   where allocation_id = $2 and hub = $1 and tenant_id is not null
     and ($3::text is null or tenant_id = $3) and quarantine_id > $4
   order by quarantine_id
   limit $5
)
select p.quarantine_id, p.tenant_id, p.reason, p.state,
       (select coalesce(sum(t.waiting_gpu_ns), 0) from quarantine_time t
         where t.quarantine_id = p.quarantine_id) as quarantined_gpu_ns
  from page p
 order by p.quarantine_id
"""


async def list_quarantined_of(
    connection: Connection, wanted: AllocationFilter, after: int, most: int
) -> list[AllocationQuarantine]:
    """List records of an allocation that are, or were, in quarantine, in order."""
    key = (wanted.hub, wanted.allocation_id, wanted.tenant_id)
    rows = await connection.fetch(_QUARANTINED_OF, *key, after, most)
    return [_quarantine_from_row(row) for row in rows]


def _quarantine_from_row(row: Row) -> AllocationQuarantine:
    return AllocationQuarantine(
        quarantine_id=row["quarantine_id"],
        tenant_id=row["tenant_id"],
        reason=row["reason"],
        state=row["state"],
        quarantined_gpu_ns=int(row["quarantined_gpu_ns"]),
    )
