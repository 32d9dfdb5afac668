"""What the ledger has booked of each bucket, and where that differs from our own.

`ledger.entries.v1` is added up per bucket, each entry once: `booked_books` remembers up to which
entry of a book, because entries may be published twice. Both tables are written by `reconcile`
alone, in the transaction that notes how far the topic was read, so that a run goes on where the
last one ended, and a restored database where its backup ended.

Buckets are compared in ranges of their ids, which are hashes: every range is a small, equal part
of all of them, so that no statement grows with the whole. By itself metering compares only hours
in which something has changed on either side: `changed_hours`, marked when changes of buckets are
folded (`metering.store.usage_reports`) and when entries are added up here. What looks different is
kept as it stood then; whether it is a difference decides `metering.core.repair`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple
from uuid import UUID

from hisab_contracts.charges import BucketTotal
from hisab_contracts.entries import ChargeDetail
from hisab_contracts.ids import (
    AllocationId,
    BucketId,
    HoldId,
    HubCode,
    NodeId,
    PriceClass,
    PriceVersion,
    ProjectId,
    Sku,
    TenantId,
)
from hisab_contracts.units import ms_of
from metering.core.pricing import rate_line_id
from metering.core.repair import BucketState, ComparedBucket
from metering.store.state import BUCKET_COLUMNS, bucket_row

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection

RANGES: Final = 256
"""Into so many ranges all bucket ids are cut: of ten million buckets each has forty thousand."""


# Adding up what is booked.


class BookedCharges(NamedTuple):
    """What entries add to one bucket."""

    tenant_id: TenantId
    detail: ChargeDetail
    """Of the last of these entries: its revision is the highest, and terms never change."""
    gpu_ns: int
    charge_micro: int


_SEQUENCES = "select tenant_id, seq from booked_books where tenant_id = any($1::text[])"


async def booked_sequences(
    connection: Connection, tenants: Sequence[TenantId]
) -> dict[TenantId, int]:
    """Return up to which entry each of these books was added up."""
    rows = await connection.fetch(_SEQUENCES, tenants)
    return {TenantId(row["tenant_id"]): row["seq"] for row in rows}


_SAVE_SEQUENCES = """
insert into booked_books (tenant_id, seq)
select k.tenant_id, k.seq from unnest($1::text[], $2::bigint[]) as k (tenant_id, seq)
 order by k.tenant_id
on conflict (tenant_id) do update set seq = excluded.seq
"""

_TERMS: Final = (
    "tenant_id, project_id, allocation_id, hold_id, hub, node_id, sku, price_class, "
    "price_version, hour_ms"
)

_ADD_BOOKED = (
    "insert into booked_buckets as b (bucket_id, revision, gpu_ns, charge_micro, "
    + _TERMS
    + """)
select * from unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::bigint[], $5::text[], $6::text[],
                     $7::text[], $8::text[], $9::text[], $10::text[], $11::text[], $12::text[],
                     $13::text[], $14::bigint[])
on conflict (bucket_id) do update
   set revision = greatest(b.revision, excluded.revision), gpu_ns = b.gpu_ns + excluded.gpu_ns,
       charge_micro = b.charge_micro + excluded.charge_micro,
       hold_id = coalesce(b.hold_id, excluded.hold_id)
"""
)


_MARK_HOURS = """
insert into changed_hours as c (hub, hour_ms)
select k.hub, k.hour_ms from unnest($1::text[], $2::bigint[]) as k (hub, hour_ms)
 order by k.hub, k.hour_ms
on conflict (hub, hour_ms) do update set marks = c.marks + 1
"""


async def add_booked(
    connection: Connection,
    sequences: Mapping[TenantId, int],
    charges: Mapping[BucketId, BookedCharges],
) -> None:
    """Add entries to what is booked, and store up to where each book is in it."""
    if sequences:
        await connection.execute(_SAVE_SEQUENCES, list(sequences.keys()), list(sequences.values()))
    rows = [
        (
            bucket_id,
            booked.detail.revision,
            booked.gpu_ns,
            booked.charge_micro,
            booked.tenant_id,
            booked.detail.project_id,
            booked.detail.allocation_id,
            booked.detail.hold_id,
            booked.detail.hub,
            booked.detail.node_id,
            booked.detail.sku,
            booked.detail.price_class,
            booked.detail.price_version,
            booked.detail.hour_ms,
        )
        for bucket_id, booked in charges.items()
    ]
    if rows:
        await connection.execute(_ADD_BOOKED, *zip(*rows, strict=True))
        hours = sorted({(b.detail.hub, b.detail.hour_ms) for b in charges.values()})
        await connection.execute(_MARK_HOURS, *zip(*hours, strict=True))


# Comparing.

_FORGET_DIFFERENCES = "delete from bucket_differences"


async def forget_differences(connection: Connection) -> None:
    """Begin a run: what an earlier one found counts no more."""
    await connection.execute(_FORGET_DIFFERENCES)


_KEEP: Final = """
insert into bucket_differences (bucket_id, revision, gpu_ns, charge_micro)
select coalesce(m.bucket_id, b.bucket_id), coalesce(m.revision, 0), coalesce(m.gpu_ns, 0),
       coalesce(m.charge_micro, 0)
"""
_THAT_DIFFER: Final = """
    on b.bucket_id = m.bucket_id
 where coalesce(m.gpu_ns, 0) <> coalesce(b.gpu_ns, 0)
    or coalesce(m.charge_micro, 0) <> coalesce(b.charge_micro, 0)
    or coalesce(m.revision, 0) < coalesce(b.revision, 0)
"""

# Buckets of a range that differ in any way, as they stand on our side; not known is all 0.
_FIND = (
    _KEEP
    + """
  from (select bucket_id, revision, gpu_ns, charge_micro
          from buckets where bucket_id between $1 and $2 and hour_ms >= $3) m
  full join (select bucket_id, revision, gpu_ns, charge_micro
               from booked_buckets where bucket_id between $1 and $2 and hour_ms >= $3) b
"""
    + _THAT_DIFFER
)


async def find_differences(connection: Connection, place: int, since_ms: int) -> None:
    """Keep what looks different in one of the `RANGES`, from an hour on."""
    width = 2**128 // RANGES
    first, last = UUID(int=place * width), UUID(int=(place + 1) * width - 1)
    await connection.execute(_FIND, first, last, since_ms)


# The same of some hours of hubs.
_FIND_IN_HOURS = (
    _KEEP
    + """
  from (select u.bucket_id, u.revision, u.gpu_ns, u.charge_micro
          from unnest($1::text[], $2::bigint[]) as k (of_hub, of_hour_ms)
          join buckets u on u.hub = k.of_hub and u.hour_ms = k.of_hour_ms) m
  full join (select u.bucket_id, u.revision, u.gpu_ns, u.charge_micro
               from unnest($1::text[], $2::bigint[]) as k (of_hub, of_hour_ms)
               join booked_buckets u on u.hub = k.of_hub and u.hour_ms = k.of_hour_ms) b
"""
    + _THAT_DIFFER
)


class ChangedHour(NamedTuple):
    """An hour of a hub in which something has changed, and how often it was marked so far."""

    hub: HubCode
    hour_ms: int
    mark_count: int


async def find_differences_in(connection: Connection, hours: Sequence[ChangedHour]) -> None:
    """Keep what looks different in these hours."""
    columns = ([hour.hub for hour in hours], [hour.hour_ms for hour in hours])
    await connection.execute(_FIND_IN_HOURS, *columns)


# Those that were compared longest ago first, so that none waits behind those that differ for long.
_CHANGED_HOURS = """
select hub, hour_ms, marks from changed_hours order by compared_run, hub, hour_ms limit $1
"""


async def changed_hours(connection: Connection, most: int) -> list[ChangedHour]:
    """Return at most so many hours that are to be compared."""
    rows = await connection.fetch(_CHANGED_HOURS, most)
    return [ChangedHour(HubCode(row["hub"]), row["hour_ms"], row["marks"]) for row in rows]


_FORGET_HOURS = """
delete from changed_hours c
 using unnest($1::text[], $2::bigint[], $3::bigint[]) as k (hub, hour_ms, marks)
 where c.hub = k.hub and c.hour_ms = k.hour_ms and c.marks = k.marks
"""

_NOTE_COMPARED = """
update changed_hours c set compared_run = $3, differences = k.differences
  from unnest($1::text[], $2::bigint[], $4::bigint[]) as k (hub, hour_ms, differences)
 where c.hub = k.hub and c.hour_ms = k.hour_ms
"""

_LAST_RUN_ID = "select coalesce(max(run_id), 0) from reconcile_runs"

_STANDING = "select coalesce(sum(differences), 0) from changed_hours"


async def note_compared(
    connection: Connection,
    hours: Sequence[ChangedHour],
    differences: Mapping[tuple[HubCode, int], int],
) -> int:
    """Note how many buckets differ in each of these hours; return how many differ in all hours.

    Hours that agree are forgotten, but for those that were marked again since they were read.
    """
    run_id = int(await connection.fetchval(_LAST_RUN_ID)) + 1
    counts = [differences.get((hour.hub, hour.hour_ms), 0) for hour in hours]
    keys = ([hour.hub for hour in hours], [hour.hour_ms for hour in hours])
    await connection.execute(_NOTE_COMPARED, *keys, run_id, counts)
    agreeing = [hour for hour, count in zip(hours, counts, strict=True) if not count]
    if agreeing:
        await connection.execute(_FORGET_HOURS, *zip(*agreeing, strict=True))
    return int(await connection.fetchval(_STANDING))


# What was found, as it stands on both sides now, with the terms of whichever side knows it.
_COMPARED = """
select d.bucket_id, d.revision as before_revision, d.gpu_ns as before_gpu_ns,
       d.charge_micro as before_micro, coalesce(b.revision, 0) as booked_revision,
       coalesce(b.gpu_ns, 0) as booked_gpu_ns, coalesce(b.charge_micro, 0) as booked_micro,
       coalesce(m.revision, 0) as revision, coalesce(m.gpu_ns, 0) as gpu_ns,
       coalesce(m.charge_micro, 0) as charge_micro,
       coalesce(m.hold_id, b.hold_id) as hold_id, coalesce(m.tenant_id, b.tenant_id) as tenant_id,
       coalesce(m.project_id, b.project_id) as project_id,
       coalesce(m.allocation_id, b.allocation_id) as allocation_id, coalesce(m.hub, b.hub) as hub,
       coalesce(m.node_id, b.node_id) as node_id, coalesce(m.sku, b.sku) as sku,
       coalesce(m.price_class, b.price_class) as price_class,
       coalesce(m.price_version, b.price_version) as price_version,
       coalesce(m.hour_ms, b.hour_ms) as hour_ms
  from bucket_differences d
  left join buckets m on m.bucket_id = d.bucket_id
  left join booked_buckets b on b.bucket_id = d.bucket_id
"""

_COMPARED_PAGE = _COMPARED + " where d.bucket_id > $1 order by d.bucket_id limit $2"
_COMPARED_NAMED = _COMPARED + " where d.bucket_id = any($1::uuid[]) order by d.bucket_id"

FIRST_BUCKET: Final = BucketId("0" * 32)
"""Comes before every bucket."""


async def compared_after(
    connection: Connection, after: BucketId, most: int
) -> list[ComparedBucket]:
    """Return a page of what was found, in the order of ids."""
    rows = await connection.fetch(_COMPARED_PAGE, UUID(after), most)
    return [_compared_from_row(row) for row in rows]


async def compared_buckets(
    connection: Connection, bucket_ids: Sequence[BucketId]
) -> list[ComparedBucket]:
    """Return these of what was found; their nodes are locked, so our side stays as it is."""
    rows = await connection.fetch(_COMPARED_NAMED, list(bucket_ids))
    return [_compared_from_row(row) for row in rows]


def _compared_from_row(row: Row) -> ComparedBucket:
    hold_id = row["hold_id"]
    total = BucketTotal(
        tenant_id=TenantId(row["tenant_id"]),
        bucket_id=BucketId(row["bucket_id"].hex),
        project_id=ProjectId(row["project_id"]),
        allocation_id=AllocationId(row["allocation_id"]),
        hold_id=None if hold_id is None else HoldId(hold_id),
        hub=HubCode(row["hub"]),
        node_id=NodeId(row["node_id"]),
        sku=Sku(row["sku"]),
        price_class=PriceClass(row["price_class"]),
        price_version=PriceVersion(row["price_version"]),
        hour_ms=row["hour_ms"],
        revision=row["revision"],
        total_gpu_ns=row["gpu_ns"],
        total_micro=row["charge_micro"],
    )
    before = BucketState(row["before_revision"], row["before_gpu_ns"], row["before_micro"])
    booked = BucketState(row["booked_revision"], row["booked_gpu_ns"], row["booked_micro"])
    return ComparedBucket(total, before, booked)


# Repairing.

# A bucket that is not known here is kept as 0, so that its revision is remembered.
_SAVE_REPAIRED = (
    "insert into buckets ("
    + BUCKET_COLUMNS
    + """, revision)
select * from unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::text[],
                     $7::text[], $8::text[], $9::text[], $10::text[], $11::text[], $12::text[],
                     $13::text[], $14::bigint[], $15::bigint[])
on conflict (bucket_id) do update set revision = excluded.revision
"""
)


async def save_repaired(connection: Connection, totals: Sequence[BucketTotal]) -> None:
    """Store the revisions at which buckets are stated anew; their nodes are locked."""
    rows = [
        (
            *bucket_row(total, rate_line_id(total.price_version, total.sku, total.price_class)),
            total.revision,
        )
        for total in totals
    ]
    await connection.execute(_SAVE_REPAIRED, *zip(*rows, strict=True))


# Runs.


class ReconcileRun(NamedTuple):
    """A run that has ended."""

    finished_ms: int
    difference_count: int
    """What was left at its end."""
    complete_until_ms: int | None
    """Up to when usage was complete as it began."""


_SAVE_RUN = """
insert into reconcile_runs (since_ms, found, differences, complete_until_ms)
values ($1, $2, $3, $4)
"""


async def save_run(
    connection: Connection,
    *,
    since_ms: int,
    found: int,
    differences: int,
    complete_until_ms: int | None,
) -> None:
    """Store what a run found, and what was left at its end."""
    await connection.execute(_SAVE_RUN, since_ms, found, differences, complete_until_ms)


_LAST_RUN = """
select finished_at, differences, complete_until_ms
  from reconcile_runs
 order by run_id desc
 limit 1
"""


async def last_run(connection: Connection) -> ReconcileRun | None:
    """Return the last run; None before the first."""
    row = await connection.fetchrow(_LAST_RUN)
    return None if row is None else _run_from_row(row)


def _run_from_row(row: Row) -> ReconcileRun:
    return ReconcileRun(ms_of(row["finished_at"]), row["differences"], row["complete_until_ms"])
