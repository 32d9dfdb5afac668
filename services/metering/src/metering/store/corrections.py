"""Corrections: those that count, what is covered of whom they name, and what they free.

Whoever meters usage of a hub holds its *correction lock*, shared; whoever has a correction of it
count, exclusive. So no usage is covered without the corrections of its allocation, and none of it
is missed by a correction that comes at the same time, on whatever node it is. The lock comes after
the rows of `hub_partitions` and before the nodes (`metering.store.state` has the order of all).
Hubs without corrections pay for the lock and one look.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from hisab_contracts.events import Correction, Replacement
from hisab_contracts.ids import (
    AllocationId,
    DeviceId,
    HubCode,
    NodeId,
    PriceClass,
    ProjectId,
    Sku,
    SliceId,
    TenantId,
    TopicId,
)
from metering.core.batch import (
    CorrectionChanges,
    CountedCorrection,
    DeviceSpan,
    UsageRecord,
)
from metering.core.corrected import FreedKey
from metering.core.corrections import CorrectedAllocation, CorrectionFact
from metering.core.coverage import (
    Claim,
    CoverageChanges,
    CoveredInterval,
    DeviceKey,
    day_floor_ms,
)

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection

CORRECTION_LOCK: Final = 20_511
"""The first half of the advisory lock on a hub's corrections; the other is made from its code."""

_SHARE_HUB = "select pg_advisory_xact_lock_shared($1, hashtext($2))"
_LOCK_HUB = "select pg_advisory_xact_lock($1, hashtext($2))"


async def lock_hubs(
    connection: Connection, metered: Iterable[HubCode], corrected: Collection[HubCode]
) -> None:
    """Take the correction locks of hubs: exclusive where a correction is to count."""
    for hub in sorted({*metered, *corrected}):
        lock = _LOCK_HUB if hub in corrected else _SHARE_HUB
        await connection.execute(lock, CORRECTION_LOCK, hub)


# Which of these hubs have corrections at all.
_CORRECTED_HUBS = """
select k.hub from unnest($1::text[]) as k (hub)
 where exists (select from corrections c where c.hub = k.hub)
"""


async def corrected_hubs(connection: Connection, hubs: Iterable[HubCode]) -> set[HubCode]:
    """Return those of these hubs that have corrections; their locks are held."""
    rows = await connection.fetch(_CORRECTED_HUBS, list(hubs))
    return {HubCode(row["hub"]) for row in rows}


# What counts.

SAID_COLUMNS: Final = (
    "hub, node_id, allocation_id, slice_uuids, start_ms, end_ms, revision, action, release, "
    "replacement, reason, approved_by"
)
"""What a correction says, in the order of `said_row`."""
_RECORD_COLUMNS: Final = (
    "topic, topic_id, partition, record_offset, record_ms, message_key, message_value, "
    "message_headers"
)

_KNOWN = """
select c.counted_seq, c.waits, c.hub, c.node_id, c.allocation_id, c.slice_uuids, c.start_ms,
       c.end_ms, c.revision, c.action, c.release, c.replacement, c.reason, c.approved_by, c.topic,
       c.topic_id, c.partition, c.record_offset, c.record_ms, c.message_key, c.message_value,
       c.message_headers
  from unnest($1::text[], $2::text[]) as k (of_hub, of_allocation)
  join corrections c on c.hub = k.of_hub and c.allocation_id = k.of_allocation
 where c.counts
 order by c.counted_seq
"""


# The hub's lock is shared by all who meter usage, and each of them may end the waiting of one.
_LOCK_WAITING = """
select c.counted_seq, c.waits from corrections c where c.counted_seq = any($1::bigint[])
 order by c.counted_seq
   for update of c
"""


class CorrectionFacts(NamedTuple):
    """The corrections of some allocations that count."""

    known: dict[CorrectedAllocation, list[CorrectionFact]]
    waiting_records: dict[int, UsageRecord]
    """By `counted_seq`, the records of those that wait for their usage."""


async def load_known(
    connection: Connection, allocations: Collection[CorrectedAllocation]
) -> CorrectionFacts:
    """Read the corrections of allocations that count, in the order in which they began to."""
    found = CorrectionFacts({}, {})
    if not allocations:
        return found
    rows = await connection.fetch(_KNOWN, *zip(*allocations, strict=True))
    waiting = [row["counted_seq"] for row in rows if row["waits"]]
    locked = await connection.fetch(_LOCK_WAITING, waiting)
    still = {row["counted_seq"]: row["waits"] for row in locked}
    for row in rows:
        waits = row["waits"] and still.get(row["counted_seq"])
        if waits is None:
            continue  # Somebody has found meanwhile that it needs an approval.
        correction = correction_from_row(row)
        fact = CorrectionFact(row["counted_seq"], correction, waits)
        found.known.setdefault((correction.hub, correction.allocation_id), []).append(fact)
        if fact.waits:
            found.waiting_records[fact.counted_seq] = _record_from_row(row)
    return found


_REPLACEMENT: Final = msgspec.json.Decoder(Replacement)
_HEADERS: Final = msgspec.msgpack.Decoder(list[tuple[str, bytes | None]])


def correction_from_row(row: Row) -> Correction:
    """Read what a correction says; of one that is only proposed the revision is 1."""
    replacement = row["replacement"]
    slices = row["slice_uuids"]
    node_id = row["node_id"]
    return Correction(
        hub=HubCode(row["hub"]),
        allocation_id=AllocationId(row["allocation_id"]),
        start_ms=row["start_ms"],
        end_ms=row["end_ms"],
        revision=row["revision"] or 1,
        action=row["action"],
        reason=row["reason"],
        node_id=None if node_id is None else NodeId(node_id),
        slice_uuids=None if slices is None else [SliceId(name) for name in slices],
        release=row["release"],
        replacement=None if replacement is None else _REPLACEMENT.decode(replacement),
        approved_by=row["approved_by"],
    )


def said_row(correction: Correction, revision: int | None) -> tuple[object, ...]:
    """Return what a correction says, in the order of its columns."""
    other = correction.replacement
    return (
        correction.hub,
        correction.node_id,
        correction.allocation_id,
        correction.slice_uuids,
        correction.start_ms,
        correction.end_ms,
        revision,
        correction.action,
        correction.release,
        None if other is None else msgspec.json.encode(other).decode(),
        correction.reason,
        correction.approved_by,
    )


def _record_from_row(row: Row) -> UsageRecord:
    return UsageRecord(
        hub=HubCode(row["hub"]),
        topic=row["topic"],
        partition=row["partition"],
        offset=row["record_offset"],
        record_ms=row["record_ms"],
        key=row["message_key"],
        value=row["message_value"],
        headers=_HEADERS.decode(row["message_headers"]),
        topic_id=TopicId(row["topic_id"]),
    )


# What is covered of whom they name.

# The devices on which something of what a correction names is covered. A row lies within one day,
# so none that matters starts before the midnight before it: the index is entered there.
_NAMED_DEVICES = """
select c.hub, c.node_id, c.device_uuid, min(k.from_ms) as from_ms, max(k.until_ms) as until_ms
  from unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[])
       as k (of_hub, of_node, of_allocation, from_day_ms, from_ms, until_ms)
  join coverage c
    on c.allocation_id = k.of_allocation and c.hub = k.of_hub
   and c.start_ms >= k.from_day_ms and c.start_ms < k.until_ms and c.end_ms > k.from_ms
   and c.node_id = coalesce(k.of_node, c.node_id)
 group by c.hub, c.node_id, c.device_uuid
 union all
select f.hub, f.node_id, f.device_uuid, min(k.from_ms), max(k.until_ms)
  from unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[])
       as k (of_hub, of_node, of_allocation, from_day_ms, from_ms, until_ms)
  join freed_coverage f
    on f.allocation_id = k.of_allocation and f.hub = k.of_hub
   and f.start_ms >= k.from_day_ms and f.start_ms < k.until_ms and f.end_ms > k.from_ms
   and f.node_id = coalesce(k.of_node, f.node_id)
 group by f.hub, f.node_id, f.device_uuid
"""


async def named_devices(
    connection: Connection, corrections: Sequence[Correction]
) -> list[tuple[DeviceKey, DeviceSpan]]:
    """Return the devices of which corrections name what is covered, and the span they speak of."""
    rows = await connection.fetch(
        _NAMED_DEVICES,
        *zip(
            *(
                (
                    said.hub,
                    said.node_id,
                    said.allocation_id,
                    day_floor_ms(said.start_ms),
                    said.start_ms,
                    said.end_ms,
                )
                for said in corrections
            ),
            strict=True,
        ),
    )
    return [_named_from_row(row) for row in rows]


def _named_from_row(row: Row) -> tuple[DeviceKey, DeviceSpan]:
    key = (HubCode(row["hub"]), NodeId(row["node_id"]), DeviceId(row["device_uuid"]))
    return key, DeviceSpan(day_floor_ms(row["from_ms"]), row["from_ms"], row["until_ms"])


COVERAGE_COLUMNS: Final = (
    "hub, node_id, device_uuid, slice_uuid, start_ms, end_ms, tenant_id, project_id, "
    "allocation_id, sku, price_class, share_ppm"
)

# Freed time of devices in, or touching, a span of each, as their coverage is read.
_FREED = (
    "select "
    + COVERAGE_COLUMNS
    + """
  from unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[])
       as k (of_hub, of_node, of_device, from_day_ms, from_ms, until_ms)
  join freed_coverage f
    on f.hub = k.of_hub and f.node_id = k.of_node and f.device_uuid = k.of_device
   and f.start_ms between k.from_day_ms and k.until_ms and f.end_ms >= k.from_ms
"""
)


async def load_freed(
    connection: Connection, spans: Mapping[DeviceKey, DeviceSpan]
) -> dict[DeviceKey, list[CoveredInterval]]:
    """Read the freed time of devices, each in its span."""
    found: dict[DeviceKey, list[CoveredInterval]] = {}
    if not spans:
        return found
    columns = zip(*((*key, *span) for key, span in spans.items()), strict=True)
    for row in await connection.fetch(_FREED, *columns):
        key = (row["hub"], row["node_id"], row["device_uuid"])
        found.setdefault(key, []).append(covered_from_row(row))
    return found


def covered_from_row(row: Row) -> CoveredInterval:
    """Read a row of coverage, freed or not."""
    claim = Claim(
        tenant_id=TenantId(row["tenant_id"]),
        project_id=ProjectId(row["project_id"]),
        allocation_id=AllocationId(row["allocation_id"]),
        sku=Sku(row["sku"]),
        price_class=PriceClass(row["price_class"]),
        share_ppm=row["share_ppm"],
    )
    return CoveredInterval(SliceId(row["slice_uuid"]), row["start_ms"], row["end_ms"], claim)


# What changes.


_PARK = "delete from corrections where counted_seq = any($1::bigint[])"
_BEGIN = "update corrections set waits = false where counted_seq = any($1::bigint[])"

# An operator's correction counts, everywhere or but for what `_WAIT` says: after all that count.
_COUNT = """
update corrections set counts = true, counted_seq = default, waits_for = null, waits_detail = null
 where correction_id = $1
"""

_WAIT = """
update corrections c set waits_for = k.waits_for, waits_detail = k.waits_detail
  from unnest($1::text[], $2::text[], $3::text[]) as k (correction_id, waits_for, waits_detail)
 where c.correction_id = k.correction_id
"""

# Corrections of hubs count from the first: they are approved where they are made.
_ADD = (
    "insert into corrections (correction_id, waits, "
    + SAID_COLUMNS
    + ", "
    + _RECORD_COLUMNS
    + """, state, counts, proposed_ms, decided_ms)
select correction_id, waits, hub, node_id, allocation_id, """
    "string_to_array(slice_uuids, ' '), start_ms, end_ms, revision, action, release, "
    "replacement, reason, approved_by, "
    + _RECORD_COLUMNS
    + """, 'approved', true, record_ms, record_ms
  from unnest($1::text[], $2::boolean[], $3::text[], $4::text[], $5::text[], $6::text[],
              $7::bigint[], $8::bigint[], $9::bigint[], $10::text[], $11::boolean[], $12::jsonb[],
              $13::text[], $14::text[], $15::text[], $16::text[], $17::int[], $18::bigint[],
              $19::bigint[], $20::bytea[], $21::bytea[], $22::bytea[])
       with ordinality as k (correction_id, waits, """
    + SAID_COLUMNS
    + ", "
    + _RECORD_COLUMNS
    + """, place)
 order by place
"""
)


def _counted_row(counted: CountedCorrection) -> tuple[object, ...]:
    """Return the row of a hub's correction; slices as one text, because arrays do not nest."""
    order, record = counted.order, counted.order.record
    if record is None:
        raise LookupError("an operator's correction has its row already")
    said = list(said_row(order.correction, order.correction.revision))
    slices = order.correction.slice_uuids
    said[3] = None if slices is None else " ".join(slices)
    return (
        order.correction_id,
        counted.waits,
        *said,
        record.topic,
        record.topic_id,
        record.partition,
        record.offset,
        record.record_ms,
        record.key,
        record.value,
        msgspec.msgpack.encode(list(record.headers)),
    )


_RELEASE = """
insert into freed_time (hub, start_ms, end_ms)
select k.hub, k.start_ms, k.end_ms
  from unnest($1::text[], $2::bigint[], $3::bigint[]) as k (hub, start_ms, end_ms)
"""


async def save_corrections(connection: Connection, changes: CorrectionChanges) -> None:
    """Store what becomes of corrections, and of the time that they release."""
    if changes.parked:
        await connection.execute(_PARK, changes.parked)
    if changes.begun:
        await connection.execute(_BEGIN, changes.begun)
    hubs_own = [counted for counted in changes.counted if counted.order.record is not None]
    approved = [
        counted.order.correction_id for counted in changes.counted if counted.order.record is None
    ]
    if hubs_own:
        rows = [_counted_row(counted) for counted in hubs_own]
        await connection.execute(_ADD, *zip(*rows, strict=True))
    for correction_id in approved:
        # One by one: a single statement would number them in any order.
        await connection.execute(_COUNT, correction_id)
    if changes.waiting:
        rows = [(name, *cause) for name, cause in changes.waiting.items()]
        await connection.execute(_WAIT, *zip(*rows, strict=True))
    if changes.freed:
        await _save_freed(connection, changes.freed)
    if changes.released:
        await connection.execute(_RELEASE, *zip(*changes.released, strict=True))


_REMOVE_FREED = """
delete from freed_coverage f
 using unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[])
       as k (hub, node_id, device_uuid, allocation_id, slice_uuid, start_ms)
 where f.hub = k.hub and f.node_id = k.node_id and f.device_uuid = k.device_uuid
   and f.slice_uuid = k.slice_uuid and f.start_ms = k.start_ms
   and f.allocation_id = k.allocation_id
"""

_GROW_FREED = """
update freed_coverage f set end_ms = k.end_ms
  from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[],
              $7::bigint[])
       as k (hub, node_id, device_uuid, allocation_id, slice_uuid, start_ms, end_ms)
 where f.hub = k.hub and f.node_id = k.node_id and f.device_uuid = k.device_uuid
   and f.slice_uuid = k.slice_uuid and f.start_ms = k.start_ms
   and f.allocation_id = k.allocation_id
"""

_ADD_FREED = (
    "insert into freed_coverage ("
    + COVERAGE_COLUMNS
    + """)
select * from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[],
                     $7::text[], $8::text[], $9::text[], $10::text[], $11::text[], $12::int[])
"""
)


async def _save_freed(connection: Connection, freed: Mapping[FreedKey, CoverageChanges]) -> None:
    """Change the rows of freed time: removed ones first, because others may begin there."""
    removed, grown, added = [], [], []
    for (key, allocation_id), changes in freed.items():
        removed += [(*key, allocation_id, *row) for row in changes.removed]
        grown += [(*key, allocation_id, *row) for row in changes.grown]
        added += [
            (*key, row.slice_uuid, row.start_ms, row.end_ms, *row.claim) for row in changes.added
        ]
    if removed:
        await connection.execute(_REMOVE_FREED, *zip(*removed, strict=True))
    if grown:
        await connection.execute(_GROW_FREED, *zip(*grown, strict=True))
    if added:
        await connection.execute(_ADD_FREED, *zip(*added, strict=True))
