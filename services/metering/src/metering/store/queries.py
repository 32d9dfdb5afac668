"""What is asked of the accounts: the reconciliation, and all that is known of an allocation.

What must add up is one statement, so that its parts belong to one instant: the reconciliation. The
drill-down takes several, each on what is committed when it runs. Both run on the `api` role:
row-level security shows a tenant's key only what is the tenant's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from hisab_contracts.ids import HubCode
from metering.core.quarantine import QuarantineState

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection


MAX_LISTED: Final = 10_000
"""Buckets, and quarantined records, that one answer about an allocation lists at most."""

MAX_INTERVALS: Final = 100_000
"""Rows of coverage that one answer about an allocation is made from at most."""


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
       q.gpu_ns as quarantined_gpu_ns, c.read_records, c.accepted_records, c.duplicate_records,
       r.quarantined as quarantined_records, b.buckets, b.charge_micro
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
        read_records=row["read_records"],
        accepted_records=row["accepted_records"],
        duplicate_records=row["duplicate_records"],
        quarantined_records=row["quarantined_records"],
        buckets=row["buckets"],
        charge_micro=row["charge_micro"],
    )


class AllocationInterval(NamedTuple):
    """An interval of a slice that is covered by an allocation."""

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
    state: QuarantineState
    quarantined_gpu_ns: int


@dataclass(frozen=True, slots=True)
class AllocationDetail:
    """All that is known of one allocation, as far as the caller may see it.

    The sums are of all there is; the lists end after `MAX_LISTED` items, or `MAX_INTERVALS` rows of
    coverage, because one answer must stay inside the memory of a process.
    """

    tenant_id: str
    intervals: list[AllocationInterval]
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
 limit $4
"""

_QUARANTINED_OF = """
select q.quarantine_id, q.reason, q.state,
       coalesce((select sum(t.waiting_gpu_ns) from quarantine_time t
                  where t.quarantine_id = q.quarantine_id), 0) as quarantined_gpu_ns
  from quarantine q
 where q.hub = $1 and q.allocation_id = $2 and q.tenant_id = $3
 order by q.quarantine_id
 limit $4
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
 limit $5
"""


async def find_allocation(
    connection: Connection, hub: HubCode, allocation_id: str
) -> AllocationDetail | None:
    """Look an allocation up; None when nothing of it is known to the caller."""
    owner = await connection.fetchrow(_OWNERS, hub, allocation_id)
    if owner is None:
        return None
    tenant_id = owner["tenant_id"]
    key = (hub, allocation_id, tenant_id)
    billed = await connection.fetchrow(_BILLED_OF, *key)
    if billed is None:
        raise LookupError("an aggregate has one row")
    buckets = await connection.fetch(_BUCKETS_OF, *key, MAX_LISTED)
    quarantined = await connection.fetch(_QUARANTINED_OF, *key, MAX_LISTED)
    duplicate_gpu_ns = await connection.fetchval(_DUPLICATE_OF, *key)
    covered = await connection.fetch(_COVERED_BY, *key, billed["nodes"], MAX_INTERVALS)
    return AllocationDetail(
        tenant_id=tenant_id,
        intervals=_join_days(_interval_from_row(row) for row in covered),
        billed_gpu_ns=int(billed["billed_gpu_ns"]),
        duplicate_gpu_ns=int(duplicate_gpu_ns or 0),
        quarantined=[_quarantine_from_row(row) for row in quarantined],
        buckets=[_billed_hour_from_row(row) for row in buckets],
    )


def _interval_from_row(row: Row) -> AllocationInterval:
    return AllocationInterval(
        slice_uuid=row["slice_uuid"],
        share_ppm=row["share_ppm"],
        start_ms=row["start_ms"],
        end_ms=row["end_ms"],
    )


def _quarantine_from_row(row: Row) -> AllocationQuarantine:
    return AllocationQuarantine(
        quarantine_id=row["quarantine_id"],
        reason=row["reason"],
        state=row["state"],
        quarantined_gpu_ns=row["quarantined_gpu_ns"],
    )


def _billed_hour_from_row(row: Row) -> BilledHour:
    return BilledHour(
        hour_ms=row["hour_ms"],
        node_id=row["node_id"],
        sku=row["sku"],
        price_class=row["price_class"],
        revision=row["revision"],
        gpu_ns=row["gpu_ns"],
        charge_micro=row["charge_micro"],
        price_version=row["price_version"],
    )


def _join_days(pieces: Iterable[AllocationInterval]) -> list[AllocationInterval]:
    """Join intervals that are stored in pieces because they were cut at midnights."""
    joined: list[AllocationInterval] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if (
            last is not None
            and (last.slice_uuid, last.share_ppm) == (piece.slice_uuid, piece.share_ppm)
            and last.end_ms == piece.start_ms
        ):
            joined[-1] = last._replace(end_ms=piece.end_ms)
        else:
            joined.append(piece)
    return joined
