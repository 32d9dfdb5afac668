"""The tables about those who speak and about what waits: sources, allocations, quarantine.

The same rules as in `store`: everything by sets, rows locked in the order of their keys, and after
the locks of nodes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from hisab_contracts.events import Device, Ended, Started
from hisab_contracts.ids import DeviceId, HubCode, SliceId, SourcePath
from metering.accounts import Quarantined
from metering.reading import AllocationKey, Origin, Part, Prior
from metering.sources import Seen, Source

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection


class Payload(NamedTuple):
    """A record's bytes as they were received."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]


class Stored(NamedTuple):
    """A quarantined record as it is stored, ready to be judged again."""

    origin: Origin
    payload: Payload
    prior: Prior
    reason: str
    detail: str
    state: str


class Opened(NamedTuple):
    """A record that has just begun to wait."""

    quarantine_id: int
    origin: Origin
    reason: str
    value_sha256: str


# Sources.

_SOURCES = """
select s.hub, s.source, s.node_path, s.contiguous, s.beyond, s.watermark_ms, s.standing,
       s.last_seen_ms
  from sources s
 where s.node_path = any($1::text[]) and (s.standing = 'active' or s.source = any($2::text[]))
 order by s.hub, s.source
   for update
"""


async def lock_sources(
    connection: Connection, node_paths: Iterable[str], paths: Iterable[SourcePath]
) -> list[Source]:
    """Lock and read these sources, and all active ones of the same nodes."""
    rows = await connection.fetch(_SOURCES, sorted(set(node_paths)), list(paths))
    return [source_from_row(row) for row in rows]


_BEYOND: Final = msgspec.json.Decoder(tuple[Seen, ...])


def source_from_row(row: Row) -> Source:
    """Read a row of `sources`."""
    return Source(
        hub=HubCode(row["hub"]),
        path=SourcePath(row["source"]),
        node_path=row["node_path"],
        contiguous_sequence=row["contiguous"],
        beyond=_BEYOND.decode(row["beyond"]),
        watermark_ms=row["watermark_ms"],
        standing=row["standing"],
        last_seen_ms=row["last_seen_ms"],
    )


_SAVE_SOURCES = """
insert into sources as s (hub, source, node_path, contiguous, beyond, watermark_ms, standing,
                          last_seen_ms)
select k.hub, k.source, k.node_path, k.contiguous, k.beyond::jsonb, k.watermark_ms, k.standing,
       k.last_seen_ms
  from unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::text[], $6::bigint[],
              $7::text[], $8::bigint[]) with ordinality
       as k (hub, source, node_path, contiguous, beyond, watermark_ms, standing, last_seen_ms,
             place)
 order by k.place
on conflict (hub, source) do update
   set contiguous = excluded.contiguous, beyond = excluded.beyond,
       watermark_ms = excluded.watermark_ms, standing = excluded.standing,
       last_seen_ms = excluded.last_seen_ms
"""


async def save_sources(connection: Connection, sources: Sequence[Source]) -> None:
    """Write sources; new ones arrive in the order given."""
    await connection.execute(
        _SAVE_SOURCES,
        [source.hub for source in sources],
        [source.path for source in sources],
        [source.node_path for source in sources],
        [source.contiguous_sequence for source in sources],
        [msgspec.json.encode(source.beyond).decode() for source in sources],
        [source.watermark_ms for source in sources],
        [source.standing for source in sources],
        [source.last_seen_ms for source in sources],
    )


_SEEN = """
insert into hub_partitions as p (hub, partition, last_seen_ms, batches)
select k.hub, k.partition, k.last_seen_ms, 1
  from unnest($1::text[], $2::int[], $3::bigint[]) as k (hub, partition, last_seen_ms)
 order by k.hub, k.partition
on conflict (hub, partition) do update
   set last_seen_ms = greatest(p.last_seen_ms, excluded.last_seen_ms), batches = p.batches + 1
"""


async def note_seen(connection: Connection, seen: Mapping[tuple[HubCode, int], int]) -> None:
    """Note the Kafka timestamp of the last record of each partition of a batch."""
    await connection.execute(
        _SEEN,
        [hub for hub, _ in seen],
        [partition for _, partition in seen],
        list(seen.values()),
    )


# Allocations.

_SAVE_STARTED = """
insert into allocations as a (hub, allocation_id, tenant_id, project_id, started_ms)
select k.hub, k.allocation_id, k.tenant_id, k.project_id, k.started_ms
  from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[])
       as k (hub, allocation_id, tenant_id, project_id, started_ms)
 order by k.hub, k.allocation_id, k.tenant_id
on conflict (hub, allocation_id, tenant_id) do update
   set started_ms = least(a.started_ms, excluded.started_ms)
"""


async def save_started(connection: Connection, started: Mapping[AllocationKey, Started]) -> None:
    """Note when allocations began: the earliest that was said."""
    await connection.execute(
        _SAVE_STARTED,
        [key.hub for key in started],
        [key.allocation_id for key in started],
        [key.tenant_id for key in started],
        [data.project_id for data in started.values()],
        [data.started_ms for data in started.values()],
    )


_SAVE_ENDED = """
insert into allocations as a (hub, allocation_id, tenant_id, project_id, ended_ms, cause,
                              reserved_gpu_ms)
select k.hub, k.allocation_id, k.tenant_id, k.project_id, k.ended_ms, k.cause, k.reserved_gpu_ms
  from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[],
              $7::bigint[])
       as k (hub, allocation_id, tenant_id, project_id, ended_ms, cause, reserved_gpu_ms)
 order by k.hub, k.allocation_id, k.tenant_id
on conflict (hub, allocation_id, tenant_id) do update
   set ended_ms = excluded.ended_ms, cause = excluded.cause,
       reserved_gpu_ms = excluded.reserved_gpu_ms, checks = 0, check_at = clock_timestamp()
 where a.ended_ms is null or a.ended_ms <= excluded.ended_ms
"""


async def save_ended(connection: Connection, ended: Mapping[AllocationKey, Ended]) -> None:
    """Note how allocations ended: the latest end that was said."""
    await connection.execute(
        _SAVE_ENDED,
        [key.hub for key in ended],
        [key.allocation_id for key in ended],
        [key.tenant_id for key in ended],
        [data.project_id for data in ended.values()],
        [data.ended_ms for data in ended.values()],
        [data.cause for data in ended.values()],
        [data.reserved_gpu_ms for data in ended.values()],
    )


# Quarantine.

_ALREADY = """
select q.topic, q.partition, q.record_offset
  from unnest($1::text[], $2::int[], $3::bigint[], $4::bigint[])
       as k (topic, partition, first_offset, last_offset)
  join quarantine q
    on q.topic = k.topic and q.partition = k.partition
   and q.record_offset between k.first_offset and k.last_offset
"""


async def quarantined_before(
    connection: Connection, ranges: Mapping[tuple[str, int], tuple[int, int]]
) -> set[tuple[str, int, int]]:
    """Return which offsets of these ranges are in quarantine, whatever became of them."""
    rows = await connection.fetch(
        _ALREADY,
        [topic for topic, _ in ranges],
        [partition for _, partition in ranges],
        [first for first, _ in ranges.values()],
        [last for _, last in ranges.values()],
    )
    return {(row[0], row[1], row[2]) for row in rows}


_OPEN = """
insert into quarantine (hub, topic, partition, record_offset, record_ms, reason, detail, tenant_id,
                        allocation_id, counts, hour_ms, had_new, parts, judged_generation,
                        message_key, message_value, message_headers, value_sha256)
select k.hub, k.topic, k.partition, k.record_offset, k.record_ms, k.reason, k.detail, k.tenant_id,
       k.allocation_id, k.counts, k.hour_ms, k.had_new, k.parts::jsonb, $19, k.message_key,
       k.message_value, k.message_headers, k.value_sha256
  from unnest($1::text[], $2::text[], $3::int[], $4::bigint[], $5::bigint[], $6::text[],
              $7::text[], $8::text[], $9::text[], $10::boolean[], $11::bigint[], $12::boolean[],
              $13::text[], $14::bytea[], $15::bytea[], $16::bytea[], $17::text[], $18::int[])
       as k (hub, topic, partition, record_offset, record_ms, reason, detail, tenant_id,
             allocation_id, counts, hour_ms, had_new, parts, message_key, message_value,
             message_headers, value_sha256, place)
 order by k.place
returning quarantine_id, topic, partition, record_offset
"""


async def open_quarantine(
    connection: Connection,
    waiting: Sequence[Quarantined],
    payloads: Sequence[Payload],
    generation: int,
) -> list[Opened]:
    """Store records that begin to wait, with their original bytes; number them in order."""
    sums = [hashlib.sha256(payload.value or b"").hexdigest() for payload in payloads]
    rows = await connection.fetch(
        _OPEN,
        [one.origin.hub for one in waiting],
        [one.origin.topic for one in waiting],
        [one.origin.partition for one in waiting],
        [one.origin.offset for one in waiting],
        [one.origin.record_ms for one in waiting],
        [one.waits.reason for one in waiting],
        [_storable(one.waits.detail) for one in waiting],
        [one.tenant_id for one in waiting],
        [one.allocation_id for one in waiting],
        [one.counts for one in waiting],
        [one.hour_ms for one in waiting],
        [one.had_new for one in waiting],
        [_parts_text(one.parts) for one in waiting],
        [payload.key for payload in payloads],
        [payload.value for payload in payloads],
        [msgspec.msgpack.encode(list(payload.headers)) for payload in payloads],
        sums,
        list(range(len(waiting))),
        generation,
    )
    numbers = {(row[1], row[2], row[3]): row[0] for row in rows}
    opened = [
        Opened(numbers[one.origin[1:4]], one.origin, one.waits.reason, value_sha256)
        for one, value_sha256 in zip(waiting, sums, strict=True)
    ]
    await add_waiting_time(
        connection, {one.quarantine_id: each for one, each in zip(opened, waiting, strict=True)}
    )
    return opened


def _storable(detail: str) -> str:
    """Make a text of ours storable: what a hub sent may be quoted in it."""
    return detail.replace("\x00", "\\x00").encode("utf-8", "replace").decode()[:2_000]


def _parts_text(parts: Sequence[Part] | None) -> str | None:
    if parts is None:
        return None
    rows = [
        (part.device.device_uuid, part.device.slice_uuid, part.device.share_ppm, *part[1:])
        for part in parts
    ]
    return msgspec.json.encode(rows).decode()


_ADD_TIME = """
with added as (
  insert into quarantine_time (quarantine_id, hub, hour_ms, tenant_id, waiting_gpu_ns)
  select k.quarantine_id, k.hub, k.hour_ms, k.tenant_id, k.waiting_gpu_ns
    from unnest($1::bigint[], $2::text[], $3::bigint[], $4::text[], $5::bigint[])
         as k (quarantine_id, hub, hour_ms, tenant_id, waiting_gpu_ns)
  returning hub, hour_ms, tenant_id, waiting_gpu_ns
)
insert into open_time (hub, tenant_id, month, waiting_gpu_ns)
select a.hub, a.tenant_id, billing_month(a.hour_ms), sum(a.waiting_gpu_ns)
  from added a
 where a.tenant_id is not null
 group by a.hub, a.tenant_id, billing_month(a.hour_ms)
"""


async def add_waiting_time(connection: Connection, waiting: Mapping[int, Quarantined]) -> None:
    """Write the GPU time that waits, per record and hour; it is open per tenant and month."""
    rows = [
        (quarantine_id, one.origin.hub, hour_ms, one.tenant_id, gpu_ns)
        for quarantine_id, one in waiting.items()
        for hour_ms, gpu_ns in one.waiting_gpu_ns.items()
    ]
    if rows:
        await connection.execute(_ADD_TIME, *(list(column) for column in zip(*rows, strict=True)))


_STORED = """
select q.quarantine_id, q.hub, q.topic, q.partition, q.record_offset, q.record_ms, q.reason,
       q.detail, q.state, q.counts, q.hour_ms, q.had_new, q.parts, q.message_key, q.message_value,
       q.message_headers,
       (select coalesce(array_agg(t.hour_ms order by t.hour_ms), '{}') from quarantine_time t
         where t.quarantine_id = q.quarantine_id) as hours_ms,
       (select coalesce(array_agg(t.waiting_gpu_ns order by t.hour_ms), '{}')
          from quarantine_time t where t.quarantine_id = q.quarantine_id) as waiting_gpu_ns
  from quarantine q
 where q.quarantine_id = any($1::bigint[])
 order by q.quarantine_id
   for update of q
"""


async def lock_quarantined(connection: Connection, quarantine_ids: Sequence[int]) -> list[Stored]:
    """Lock and read quarantined records."""
    return [_stored(row) for row in await connection.fetch(_STORED, list(quarantine_ids))]


_PARTS: Final = msgspec.json.Decoder(list[tuple[str, str, int, int, int]] | None)
_HEADERS: Final = msgspec.msgpack.Decoder(list[tuple[str, bytes | None]])


def _stored(row: Row) -> Stored:
    parts = None if row["parts"] is None else _PARTS.decode(row["parts"])
    prior = Prior(
        quarantine_id=row["quarantine_id"],
        parts=None
        if parts is None
        else tuple(
            Part(Device(DeviceId(device), SliceId(part), share_ppm), start_ms, end_ms)
            for device, part, share_ppm, start_ms, end_ms in parts
        ),
        had_new=row["had_new"],
        counts=row["counts"],
        hour_ms=row["hour_ms"],
        waiting_gpu_ns=dict(zip(row["hours_ms"], row["waiting_gpu_ns"], strict=True)),
    )
    origin = Origin(
        HubCode(row["hub"]), row["topic"], row["partition"], row["record_offset"], row["record_ms"]
    )
    headers = read_headers(row["message_headers"])
    payload = Payload(row["message_key"], row["message_value"], headers)
    return Stored(origin, payload, prior, row["reason"], row["detail"], row["state"])


def read_headers(stored: bytes) -> list[tuple[str, bytes | None]]:
    """Read a record's headers as they were stored with it."""
    return _HEADERS.decode(stored)


_KEEP = """
update quarantine q
   set reason = k.reason, detail = k.detail, tenant_id = k.tenant_id,
       allocation_id = k.allocation_id, counts = k.counts, hour_ms = k.hour_ms,
       had_new = k.had_new, parts = k.parts::jsonb, judged_generation = $10
  from unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::boolean[],
              $7::bigint[], $8::boolean[], $9::text[])
       as k (quarantine_id, reason, detail, tenant_id, allocation_id, counts, hour_ms, had_new,
             parts)
 where q.quarantine_id = k.quarantine_id
"""


async def keep_waiting(
    connection: Connection, waiting: Mapping[int, Quarantined], generation: int
) -> None:
    """Note what still waits of records that were judged again, and why."""
    await _forget_time(connection, list(waiting))
    kept = list(waiting.values())
    await connection.execute(
        _KEEP,
        list(waiting),
        [one.waits.reason for one in kept],
        [_storable(one.waits.detail) for one in kept],
        [one.tenant_id for one in kept],
        [one.allocation_id for one in kept],
        [one.counts for one in kept],
        [one.hour_ms for one in kept],
        [one.had_new for one in kept],
        [_parts_text(one.parts) for one in kept],
        generation,
    )
    await add_waiting_time(connection, waiting)


_FORGET_TIME = """
with removed as (
  delete from quarantine_time where quarantine_id = any($1::bigint[])
  returning hub, hour_ms, tenant_id, waiting_gpu_ns, dismissed
)
insert into open_time (hub, tenant_id, month, waiting_gpu_ns)
select r.hub, r.tenant_id, billing_month(r.hour_ms), -sum(r.waiting_gpu_ns)
  from removed r
 where not r.dismissed and r.tenant_id is not null
 group by r.hub, r.tenant_id, billing_month(r.hour_ms)
"""


async def _forget_time(connection: Connection, quarantine_ids: list[int]) -> None:
    await connection.execute(_FORGET_TIME, quarantine_ids)


_RELEASE = """
update quarantine
   set state = 'released', closed_at = clock_timestamp(), closed_because = $2
 where quarantine_id = any($1::bigint[])
"""


async def release(connection: Connection, quarantine_ids: Sequence[int], because: str) -> None:
    """Note that nothing of these records waits any more."""
    await _forget_time(connection, list(quarantine_ids))
    await connection.execute(_RELEASE, list(quarantine_ids), because)


_DISMISS = """
update quarantine set state = 'dismissed', closed_at = clock_timestamp(), closed_because = $2
 where quarantine_id = $1 and state = 'open'
"""


async def dismiss(connection: Connection, quarantine_id: int, because: str) -> bool:
    """Have a record stay in quarantine for good, blocking nobody; False unless it was open."""
    if str(await connection.execute(_DISMISS, quarantine_id, because)) != "UPDATE 1":
        return False
    # A statement of its own: it sees what whoever held the record before us has left of its time.
    await _dismiss_time(connection, quarantine_id)
    return True


_DISMISS_TIME = """
with dismissed as (
  update quarantine_time set dismissed = true where quarantine_id = $1 and not dismissed
  returning hub, hour_ms, tenant_id, waiting_gpu_ns
)
insert into open_time (hub, tenant_id, month, waiting_gpu_ns)
select d.hub, d.tenant_id, billing_month(d.hour_ms), -sum(d.waiting_gpu_ns)
  from dismissed d
 where d.tenant_id is not null
 group by d.hub, d.tenant_id, billing_month(d.hour_ms)
"""


async def _dismiss_time(connection: Connection, quarantine_id: int) -> None:
    await connection.execute(_DISMISS_TIME, quarantine_id)


_FOLD_OPEN_TIME = """
with changed as (
  select hub, tenant_id, month from open_time group by hub, tenant_id, month having count(*) > 1
), taken as (
  delete from open_time o using changed c
   where o.hub = c.hub and o.tenant_id = c.tenant_id and o.month = c.month
  returning o.hub, o.tenant_id, o.month, o.waiting_gpu_ns
)
insert into open_time (hub, tenant_id, month, waiting_gpu_ns)
select t.hub, t.tenant_id, t.month, sum(t.waiting_gpu_ns)
  from taken t
 group by t.hub, t.tenant_id, t.month
having sum(t.waiting_gpu_ns) <> 0
"""


async def fold_open_time(connection: Connection) -> None:
    """Put the changes of open time together: one row per hub, tenant and month, none for zero."""
    await connection.execute(_FOLD_OPEN_TIME)


_RELEASABLE = """
(select q.quarantine_id
   from tenants t
   join quarantine q on q.tenant_id = t.tenant_id
  where q.state = 'open' and q.reason = 'unknown-tenant'
  limit $1)
union all
(select q.quarantine_id
   from quarantine q
  where q.state = 'open' and q.reason in ('unknown-sku', 'no-price')
    and q.judged_generation < (select coalesce(max(generation), 0) from price_lines)
  order by q.judged_generation
  limit $1)
"""


async def releasable(connection: Connection, most: int) -> list[int]:
    """Return open records whose fact may have arrived, oldest first."""
    return sorted(row[0] for row in await connection.fetch(_RELEASABLE, most))[:most]


_GIVE_UP = "update quarantine set reason = 'killed-process', detail = $2 where quarantine_id = $1"


async def give_up(connection: Connection, quarantine_id: int, detail: str) -> None:
    """Leave a record that we fail to judge again to an operator."""
    await connection.execute(_GIVE_UP, quarantine_id, _storable(detail))


# Ends of allocations.


class Ending(NamedTuple):
    """An allocation that has ended and may be final now."""

    key: AllocationKey
    ended_ms: int


_ENDINGS = """
with due as (
  select a.hub, a.allocation_id, a.tenant_id, a.ended_ms, a.reserved_gpu_ms, h.watermark_ms,
         exists (select from tenants t where t.tenant_id = a.tenant_id) as is_known
    from allocations a
    join hubs h on h.hub = a.hub
   where a.ended_ms is not null and not a.final and a.check_at <= clock_timestamp()
   order by a.check_at
   limit $1
     for update of a skip locked
), judged as (
  select d.hub, d.allocation_id, d.tenant_id, d.ended_ms,
         d.is_known
         and (coalesce(d.watermark_ms >= d.ended_ms, false)
              or div((select coalesce(sum(b.gpu_ns), 0) from buckets b
                       where b.allocation_id = d.allocation_id and b.hub = d.hub
                         and b.tenant_id = d.tenant_id), 1000000) = d.reserved_gpu_ms) as is_final
    from due d
), noted as (
  update allocations a
     set final = j.is_final, checks = a.checks + 1,
         check_at = clock_timestamp() + least(30, 2 ^ least(a.checks, 5)) * interval '1 second'
    from judged j
   where a.hub = j.hub and a.allocation_id = j.allocation_id and a.tenant_id = j.tenant_id
)
select j.hub, j.allocation_id, j.tenant_id, j.ended_ms from judged j where j.is_final
 order by j.hub, j.allocation_id, j.tenant_id
"""


async def take_endings(connection: Connection, most: int) -> list[Ending]:
    """Mark allocations final whose totals match or whose hub is complete past their end.

    Those that are not final yet, or whose tenant nobody knows, are looked at later and later.
    """
    return [
        Ending(AllocationKey(row["hub"], row["allocation_id"], row["tenant_id"]), row["ended_ms"])
        for row in await connection.fetch(_ENDINGS, most)
    ]
