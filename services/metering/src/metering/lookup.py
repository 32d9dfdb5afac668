"""What is asked of metering: hubs and their completeness, accounts, allocations, quarantine.

What must add up is one statement, so that its parts belong to one instant: the reconciliation.
Other questions take several, each on what is committed when it runs. `views` reads sources before
the time in quarantine: whatever a source's watermark covers was committed with it or before it, so
that none of it is missed. Questions about tenants' rows run on the `api` role: row-level security
shows a tenant's key only what is the tenant's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from hisab_contracts.charges import HubWatermark, OpenQuarantine
from hisab_contracts.ids import HubCode, SourcePath, TenantId
from metering.completeness import HubView
from metering.sources import Source
from metering.waiting import read_headers, source_from_row

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of a hub, and what was last told downstream about it."""

    view: HubView
    statement: HubWatermark | None
    stated_ms: int
    ever_seen: bool
    """Whether any record of it was ever read."""


_HUBS = "select hub from hubs order by hub"


async def hubs(connection: Connection) -> list[HubCode]:
    """Return every registered hub."""
    return [HubCode(row[0]) for row in await connection.fetch(_HUBS)]


_IS_HUB = "select exists (select from hubs where hub = $1)"


async def is_hub(connection: Connection, hub: HubCode) -> bool:
    """Say whether a hub is registered."""
    return bool(await connection.fetchval(_IS_HUB, hub))


class Complete(NamedTuple):
    """Up to when a hub is complete, and whether it counts: only once it has emitted."""

    hub: HubCode
    watermark_ms: int | None
    emitted: bool


_COMPLETE = """
select h.hub, h.watermark_ms, exists (select from sources s where s.hub = h.hub) as emitted
  from hubs h
 where $1::text is null or h.hub = $1
 order by h.hub
"""


async def completeness(connection: Connection, hub: HubCode | None = None) -> list[Complete]:
    """Return up to when hubs are complete."""
    return [Complete(*row.values()) for row in await connection.fetch(_COMPLETE, hub)]


_BATCHES = "select coalesce(sum(batches), 0)::bigint from hub_partitions"


async def batches(connection: Connection) -> int:
    """Return a number that moves whenever records of any hub were taken in."""
    return int(await connection.fetchval(_BATCHES))


_VIEWS = """
select h.hub, h.heartbeat_ms, h.watermark_ms, h.statement, h.stated_ms,
       coalesce((select max(p.last_seen_ms) from hub_partitions p where p.hub = h.hub),
                floor(extract(epoch from h.created_at) * 1000)::bigint) as last_seen_ms,
       exists (select from sources s where s.hub = h.hub) as emitted,
       exists (select from hub_partitions p where p.hub = h.hub) as ever_seen
  from hubs h
 where $1::text is null or h.hub = $1
 order by h.hub
"""


async def views(connection: Connection, hub: HubCode | None = None) -> list[Told]:
    """Look at hubs: their active sources, then their open quarantined time."""
    rows = await connection.fetch(_VIEWS, hub)
    active = await _active_sources(connection, hub)
    waiting = await _open_time(connection, hub)
    return [_told(row, active.get(row["hub"], []), waiting.get(row["hub"], [])) for row in rows]


_STATEMENT: Final = msgspec.json.Decoder(HubWatermark)


def _told(row: Row, active: list[Source], waiting: list[OpenQuarantine]) -> Told:
    view = HubView(
        hub=HubCode(row["hub"]),
        heartbeat_ms=row["heartbeat_ms"],
        watermark_ms=row["watermark_ms"],
        last_seen_ms=row["last_seen_ms"],
        sources=active,
        emitted=row["emitted"],
        quarantined=waiting,
    )
    statement = None if row["statement"] is None else _STATEMENT.decode(row["statement"])
    return Told(view, statement, row["stated_ms"], row["ever_seen"])


_ACTIVE = """
select s.hub, s.source, s.node_path, s.contiguous, s.beyond, s.watermark_ms, s.standing,
       s.last_seen_ms
  from sources s
 where s.standing = 'active' and ($1::text is null or s.hub = $1)
 order by s.hub, s.source
"""


async def _active_sources(connection: Connection, hub: HubCode | None) -> dict[str, list[Source]]:
    found: dict[str, list[Source]] = {}
    for row in await connection.fetch(_ACTIVE, hub):
        found.setdefault(row["hub"], []).append(source_from_row(row))
    return found


_OPEN_TIME = """
select o.hub, o.tenant_id, o.month, sum(o.waiting_gpu_ns) as waiting_gpu_ns
  from open_time o
  join tenants known on known.tenant_id = o.tenant_id
 where $1::text is null or o.hub = $1
 group by o.hub, o.tenant_id, o.month
having sum(o.waiting_gpu_ns) <> 0
 order by o.hub, o.tenant_id, o.month
"""


async def _open_time(
    connection: Connection, hub: HubCode | None
) -> dict[str, list[OpenQuarantine]]:
    """Return open quarantined time per hub, tenant we know, and billing month."""
    found: dict[str, list[OpenQuarantine]] = {}
    for row in await connection.fetch(_OPEN_TIME, hub):
        waiting = OpenQuarantine(
            TenantId(row["tenant_id"]), row["month"], int(row["waiting_gpu_ns"])
        )
        found.setdefault(row["hub"], []).append(waiting)
    return found


_SAVE_WATERMARK = """
update hubs set watermark_ms = $2 where hub = $1 and coalesce(watermark_ms < $2, true)
"""


async def save_watermark(connection: Connection, hub: HubCode, watermark_ms: int) -> None:
    """Note how far a hub is complete; never lower."""
    await connection.execute(_SAVE_WATERMARK, hub, watermark_ms)


_SAVE_STATEMENT = "update hubs set statement = $2::jsonb, stated_ms = $3 where hub = $1"


async def save_statement(connection: Connection, told: HubWatermark, stated_ms: int) -> None:
    """Note what was told downstream about a hub."""
    text = msgspec.json.encode(told).decode()
    await connection.execute(_SAVE_STATEMENT, told.hub, text, stated_ms)


_PROGRESS = "select partition, next_offset from consumer_progress where topic = $1"


async def progress(connection: Connection, topic: str) -> dict[int, int]:
    """Return how far each partition of a topic has been taken in."""
    return {row[0]: row[1] for row in await connection.fetch(_PROGRESS, topic)}


_SOURCES = """
select s.hub, s.source, s.node_path, s.contiguous, s.beyond, s.watermark_ms, s.standing,
       s.last_seen_ms
  from sources s
 where s.hub = $1 and s.source > $2
 order by s.source
 limit $3
"""


async def sources(connection: Connection, hub: HubCode, after: str, most: int) -> list[Source]:
    """Return sources of a hub by name, whatever their standing."""
    return [source_from_row(row) for row in await connection.fetch(_SOURCES, hub, after, most)]


_HAS_SEEN = """
select s.hub, s.source, s.node_path, s.contiguous, s.beyond, s.watermark_ms, s.standing,
       s.last_seen_ms
  from sources s
 where s.hub = $1 and s.source = any($2::text[])
"""


async def sources_named(
    connection: Connection, hub: HubCode, paths: list[SourcePath]
) -> dict[SourcePath, Source]:
    """Return those of these sources that were ever seen."""
    rows = await connection.fetch(_HAS_SEEN, hub, paths)
    return {source.path: source for source in map(source_from_row, rows)}


@dataclass(frozen=True, slots=True)
class Reconciliation:
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


_RECONCILE = """
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


async def reconcile(
    connection: Connection, of_hubs: list[HubCode], from_ms: int, until_ms: int
) -> Reconciliation:
    """Add up every account of hubs in `[from_ms, until_ms)` of usage time, at one instant."""
    row = await connection.fetchrow(_RECONCILE, of_hubs, from_ms, until_ms)
    if row is None:
        raise LookupError("an aggregate has one row")
    return Reconciliation(*(int(value) for value in row.values()))


class CoveredTime(NamedTuple):
    """A stretch of a slice that is sold to the allocation asked for."""

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


class HeldUp(NamedTuple):
    """A record of an allocation that is, or was, in quarantine."""

    quarantine_id: int
    reason: str
    state: str
    waiting_gpu_ns: int


@dataclass(frozen=True, slots=True)
class Allocation:
    """All that is known of one allocation, as far as the caller may see it."""

    tenant_id: str
    intervals: list[CoveredTime]
    duplicate_gpu_ns: int
    held_up: list[HeldUp]
    buckets: list[BilledHour]


async def allocation(connection: Connection, hub: HubCode, allocation_id: str) -> Allocation | None:
    """Look an allocation up; None when nothing of it is known to the caller."""
    owners = await _owners(connection, hub, allocation_id)
    if not owners:
        return None
    tenant_id = owners[0]
    buckets = await _buckets_of(connection, hub, allocation_id, tenant_id)
    who = (hub, allocation_id, tenant_id)
    nodes = sorted({bucket.node_id for bucket in buckets})
    return Allocation(
        tenant_id=tenant_id,
        intervals=await _covered_by(connection, *who, nodes),
        duplicate_gpu_ns=await _duplicate(connection, *who),
        held_up=await _held_up(connection, *who),
        buckets=buckets,
    )


_OWNERS = """
select tenant_id from buckets where allocation_id = $2 and hub = $1
union
select tenant_id from allocations where allocation_id = $2 and hub = $1
union
select tenant_id from quarantine
 where allocation_id = $2 and hub = $1 and tenant_id is not null
 order by tenant_id
"""


async def _owners(connection: Connection, hub: HubCode, allocation_id: str) -> list[str]:
    rows = await connection.fetch(_OWNERS, hub, allocation_id)
    return [row[0] for row in rows]


_BUCKETS_OF = """
select hour_ms, node_id, sku, price_class, revision, gpu_ns, charge_micro, price_version
  from buckets
 where allocation_id = $2 and hub = $1 and tenant_id = $3
 order by hour_ms, node_id, sku, price_class, price_version
 limit 10000
"""


async def _buckets_of(
    connection: Connection, hub: HubCode, allocation_id: str, tenant_id: str
) -> list[BilledHour]:
    rows = await connection.fetch(_BUCKETS_OF, hub, allocation_id, tenant_id)
    return [BilledHour(*row.values()) for row in rows]


_HELD_UP = """
select q.quarantine_id, q.reason, q.state,
       coalesce((select sum(t.waiting_gpu_ns) from quarantine_time t
                  where t.quarantine_id = q.quarantine_id), 0) as waiting_gpu_ns
  from quarantine q
 where q.allocation_id = $2 and q.hub = $1 and q.tenant_id = $3
 order by q.quarantine_id
 limit 10000
"""


async def _held_up(
    connection: Connection, hub: HubCode, allocation_id: str, tenant_id: str
) -> list[HeldUp]:
    rows = await connection.fetch(_HELD_UP, hub, allocation_id, tenant_id)
    return [HeldUp(row[0], row[1], row[2], int(row[3])) for row in rows]


_DUPLICATE = """
select duplicate_gpu_ns from allocation_duplicates
 where hub = $1 and allocation_id = $2 and tenant_id = $3
"""


async def _duplicate(
    connection: Connection, hub: HubCode, allocation_id: str, tenant_id: str
) -> int:
    found = await connection.fetchval(_DUPLICATE, hub, allocation_id, tenant_id)
    return 0 if found is None else int(found)


_COVERED_BY = """
select c.slice_uuid, c.share_ppm, c.start_ms, c.end_ms
  from coverage c
 where c.hub = $1 and c.node_id = any($4::text[]) and c.allocation_id = $2 and c.tenant_id = $3
 order by c.slice_uuid, c.share_ppm, c.start_ms
 limit 100000
"""


async def _covered_by(
    connection: Connection,
    hub: HubCode,
    allocation_id: str,
    tenant_id: str,
    nodes: list[str],
) -> list[CoveredTime]:
    """Return what is covered, rows that were cut at midnights put together again."""
    rows = await connection.fetch(_COVERED_BY, hub, allocation_id, tenant_id, nodes)
    whole: list[CoveredTime] = []
    for row in rows:
        piece = CoveredTime(*row.values())
        last = whole[-1] if whole else None
        if last is not None and (*last[:2], last.end_ms) == piece[:3]:
            whole[-1] = CoveredTime(*last[:3], piece.end_ms)
        else:
            whole.append(piece)
    return whole


class Item(NamedTuple):
    """A quarantined record as operators see it."""

    quarantine_id: int
    topic: str
    partition: int
    offset: int
    reason: str
    detail: str
    state: str
    payload: bytes | None
    headers: list[tuple[str, bytes | None]]


@dataclass(frozen=True, slots=True)
class Asked:
    """Which quarantined records are asked for; None is any."""

    hub: str | None
    reason: str | None
    state: str | None


MAX_LISTED_BYTES: Final = 8_388_608
"""A page of quarantined records ends before its payloads pass 8 MiB, after one at least."""

_LISTED = """
with asked as (
  select q.quarantine_id, coalesce(octet_length(q.message_value), 0) as value_bytes
    from quarantine q
   where ($1::text is null or q.hub = $1) and ($2::text is null or q.reason = $2)
     and ($3::text is null or q.state = $3) and q.quarantine_id > $4
   order by q.quarantine_id
   limit $5
), measured as (
  select a.quarantine_id, sum(a.value_bytes) over (order by a.quarantine_id) as so_far_bytes,
         row_number() over (order by a.quarantine_id) as place
    from asked a
)
select q.quarantine_id, q.topic, q.partition, q.record_offset, q.reason, q.detail, q.state,
       q.message_value, q.message_headers, (select count(*) from asked) as asked_count
  from measured m
  join quarantine q on q.quarantine_id = m.quarantine_id
 where m.place = 1 or m.so_far_bytes <= $6
 order by q.quarantine_id
"""


async def quarantined(
    connection: Connection, asked: Asked, after: int, most: int
) -> tuple[list[Item], bool]:
    """List at most so many quarantined records in order, and say whether there are more."""
    rows = await connection.fetch(
        _LISTED, asked.hub, asked.reason, asked.state, after, most + 1, MAX_LISTED_BYTES
    )
    items = [_item(row) for row in rows[:most]]
    return items, bool(rows) and rows[0]["asked_count"] > len(items)


def _item(row: Row) -> Item:
    return Item(
        quarantine_id=row["quarantine_id"],
        topic=row["topic"],
        partition=row["partition"],
        offset=row["record_offset"],
        reason=row["reason"],
        detail=row["detail"],
        state=row["state"],
        payload=row["message_value"],
        headers=read_headers(row["message_headers"]),
    )


_QUARANTINE_STATE = "select state from quarantine where quarantine_id = $1"


async def quarantine_state(connection: Connection, quarantine_id: int) -> str | None:
    """Return whether a record is open, released or dismissed; None when there is none."""
    state = await connection.fetchval(_QUARANTINE_STATE, quarantine_id)
    return None if state is None else str(state)
