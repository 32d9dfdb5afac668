"""Quarantine: records kept, whole or in part, with their original bytes.

Theory. `metering.core.quarantine` says in which states a record can be. Beside it `quarantine_time`
has the GPU time that is open or was dismissed, per UTC hour; a release deletes those rows, because
the time is then billed or a duplicate. `open_time` adds up what is open per hub, tenant and billing
month: whoever changes `quarantine_time` inserts the difference there, which no lock can delay, and
a leased task puts the rows together. So stating the open time of a hub never reads record by
record.

No record is ever deleted. The bytes of one that was released are forgotten 90 days later: all of it
is billed or a duplicate by then, and its SHA-256, its place and all that was decided stay. What is
open or was dismissed keeps its bytes for ever.

The tables call GPU time in quarantine `waiting_gpu_ns`; everywhere else it is `quarantined_gpu_ns`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from hisab_contracts.events import Device
from hisab_contracts.ids import DeviceId, HubCode, SliceId
from hisab_contracts.units import optional_ms_of
from metering.core.batch import (
    Changes,
    EarlierVerdict,
    QuarantinedRecord,
    UsagePart,
    UsageRecord,
)
from metering.core.quarantine import QuarantineCause, QuarantineState

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection

MAX_LISTED_BYTES: Final = 8_388_608
"""A page of quarantined records ends before what it says may pass 8 MiB, after one at least."""

MAX_DETAIL_LENGTH: Final = 2_000


class OpenedQuarantine(NamedTuple):
    """A record that is new in quarantine, and the number it was given."""

    quarantine_id: int
    quarantined: QuarantinedRecord
    value_sha256: str


class LockedQuarantine(NamedTuple):
    """A quarantined record, locked, as it would be judged again."""

    quarantine_id: int
    record: UsageRecord
    state: QuarantineState


class ListedQuarantine(NamedTuple):
    """A quarantined record as operators see it."""

    quarantine_id: int
    topic: str
    partition: int
    offset: int
    reason: str
    detail: str
    state: QuarantineState
    payload: bytes | None
    headers: list[tuple[str, bytes | None]]
    forgotten_ms: int | None
    """When its bytes were forgotten: then there is neither payload nor header any more."""


@dataclass(frozen=True, slots=True)
class QuarantineFilter:
    """Which quarantined records are wanted; None is any."""

    hub: str | None
    reason: str | None
    state: str | None


# Metering a batch: records are quarantined, stay in quarantine, or are released.

_RECORD_COLUMNS: Final = (
    "hub, topic, partition, record_offset, record_ms, message_key, message_value, message_headers"
)
_VERDICT_COLUMNS: Final = (
    "reason, detail, tenant_id, allocation_id, counts, hour_ms, had_new, parts"
)


async def save_quarantine(
    connection: Connection, changes: Changes, generation: int, because: str
) -> list[OpenedQuarantine]:
    """Store what a batch changes in quarantine; return the records that are new in it.

    `generation` is the newest price line the batch was judged by: what lacks a price is released
    once there is a newer one. `because` says why records were judged again, if any were.
    """
    if changes.still_quarantined:
        await _keep_quarantined(connection, changes.still_quarantined, generation)
    opened = []
    if changes.quarantined:
        opened = await _open_quarantine(connection, changes.quarantined, generation)
    if changes.released_ids:
        await _release(connection, changes.released_ids, because)
    return opened


_OPENED_COLUMNS = _RECORD_COLUMNS + ", value_sha256, topic_id, " + _VERDICT_COLUMNS

_OPEN = (
    "insert into quarantine ("
    + _OPENED_COLUMNS
    + ", judged_generation) select "
    + _OPENED_COLUMNS
    + """, $19
  from unnest($1::text[], $2::text[], $3::int[], $4::bigint[], $5::bigint[], $6::bytea[],
              $7::bytea[], $8::bytea[], $9::text[], $10::text[], $11::text[], $12::text[],
              $13::text[], $14::text[], $15::boolean[], $16::bigint[], $17::boolean[],
              $18::jsonb[])
       with ordinality as k ("""
    + _OPENED_COLUMNS
    + """, place)
 order by place
on conflict (topic, partition, record_offset, topic_id, value_sha256) do update
   set state = 'open', closed_at = null, closed_because = null, forgotten_at = null,
       reason = excluded.reason, detail = excluded.detail, tenant_id = excluded.tenant_id,
       judged_generation = excluded.judged_generation, message_key = excluded.message_key,
       message_value = excluded.message_value, message_headers = excluded.message_headers
 where quarantine.state = 'released'
returning quarantine_id, topic, partition, record_offset
"""
)


async def _open_quarantine(
    connection: Connection, records: Sequence[QuarantinedRecord], generation: int
) -> list[OpenedQuarantine]:
    """Store records that are new in quarantine, with their bytes; number them in order.

    A correction that was released may come back: it waited for its usage, and needs an approval.
    """
    digests = [new.record.value_sha256() for new in records]
    rows = [
        (*_record_row(new.record), value_sha256, new.record.topic_id, *_verdict_row(new))
        for new, value_sha256 in zip(records, digests, strict=True)
    ]
    inserted = await connection.fetch(_OPEN, *zip(*rows, strict=True), generation)
    numbers = {
        (row["topic"], row["partition"], row["record_offset"]): row["quarantine_id"]
        for row in inserted
    }
    opened = [
        OpenedQuarantine(
            quarantine_id=numbers[new.record.topic, new.record.partition, new.record.offset],
            quarantined=new,
            value_sha256=value_sha256,
        )
        for new, value_sha256 in zip(records, digests, strict=True)
    ]
    await _add_time(connection, {new.quarantine_id: new.quarantined for new in opened})
    return opened


def _record_row(record: UsageRecord) -> tuple[object, ...]:
    return (
        record.hub,
        record.topic,
        record.partition,
        record.offset,
        record.record_ms,
        record.key,
        record.value,
        msgspec.msgpack.encode(list(record.headers)),
    )


def _verdict_row(quarantined: QuarantinedRecord) -> tuple[object, ...]:
    """Return what was decided about a record, in the order of its columns."""
    return (
        quarantined.cause.reason,
        _storable(quarantined.cause.detail),
        quarantined.tenant_id,
        quarantined.allocation_id,
        quarantined.counts,
        quarantined.hour_ms,
        quarantined.had_new,
        _parts_text(quarantined.parts),
    )


def _storable(detail: str) -> str:
    """Make a text of ours storable: what a hub sent may be quoted in it, NUL and half pairs too."""
    return detail.replace("\x00", "\\x00").encode("utf-8", "replace").decode()[:MAX_DETAIL_LENGTH]


def _parts_text(parts: Sequence[UsagePart] | None) -> str | None:
    if parts is None:
        return None
    rows = [
        (
            part.device.device_uuid,
            part.device.slice_uuid,
            part.device.share_ppm,
            part.start_ms,
            part.end_ms,
        )
        for part in parts
    ]
    return msgspec.json.encode(rows).decode()


# Deletes the time of records, and takes from the open time what of it was not dismissed. Time whose
# tenant could not be read blocks nobody's month, so it never was in the open time.
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

_KEEP = (
    """
update quarantine q
   set reason = k.reason, detail = k.detail, tenant_id = k.tenant_id,
       allocation_id = k.allocation_id, counts = k.counts, hour_ms = k.hour_ms,
       had_new = k.had_new, parts = k.parts, judged_generation = $10
  from unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::boolean[],
              $7::bigint[], $8::boolean[], $9::jsonb[]) as k (quarantine_id, """
    + _VERDICT_COLUMNS
    + """)
 where q.quarantine_id = k.quarantine_id
"""
)


async def _keep_quarantined(
    connection: Connection, records: Sequence[QuarantinedRecord], generation: int
) -> None:
    """Store the new reason and the parts that stay in quarantine, of records judged again."""
    kept = {
        earlier.quarantine_id: quarantined
        for quarantined in records
        if (earlier := quarantined.record.earlier) is not None
    }
    await connection.execute(_FORGET_TIME, list(kept))
    rows = [(number, *_verdict_row(quarantined)) for number, quarantined in kept.items()]
    await connection.execute(_KEEP, *zip(*rows, strict=True), generation)
    await _add_time(connection, kept)


_RELEASE = """
update quarantine
   set state = 'released', closed_at = clock_timestamp(), closed_because = $2
 where quarantine_id = any($1::bigint[])
"""


async def _release(connection: Connection, quarantine_ids: Sequence[int], because: str) -> None:
    """Store that these records are released: nothing of them is left in quarantine."""
    await connection.execute(_FORGET_TIME, quarantine_ids)
    await connection.execute(_RELEASE, quarantine_ids, because)


# Adds time of records, and to the open time of their tenants: what has no tenant blocks nobody.
_ADD_TIME = """
with added as (
  insert into quarantine_time (quarantine_id, hub, hour_ms, tenant_id, waiting_gpu_ns)
  select * from unnest($1::bigint[], $2::text[], $3::bigint[], $4::text[], $5::bigint[])
  returning hub, hour_ms, tenant_id, waiting_gpu_ns
)
insert into open_time (hub, tenant_id, month, waiting_gpu_ns)
select a.hub, a.tenant_id, billing_month(a.hour_ms), sum(a.waiting_gpu_ns)
  from added a
 where a.tenant_id is not null
 group by a.hub, a.tenant_id, billing_month(a.hour_ms)
"""


async def _add_time(connection: Connection, records: Mapping[int, QuarantinedRecord]) -> None:
    """Store the GPU time in quarantine per record and hour; add it to the open time."""
    rows = [
        (quarantine_id, quarantined.record.hub, hour_ms, quarantined.tenant_id, gpu_ns)
        for quarantine_id, quarantined in records.items()
        for hour_ms, gpu_ns in quarantined.quarantined_gpu_ns.items()
    ]
    if rows:
        await connection.execute(_ADD_TIME, *zip(*rows, strict=True))


# Records are judged again, or left for good.

_LOCK = (
    "select quarantine_id, state, counts, hour_ms, had_new, parts, "
    + _RECORD_COLUMNS
    + """
  from quarantine
 where quarantine_id = any($1::bigint[])
 order by quarantine_id
   for update
"""
)

_TIMES_OF = """
select quarantine_id, hour_ms, waiting_gpu_ns
  from quarantine_time
 where quarantine_id = any($1::bigint[])
 order by quarantine_id, hour_ms
"""


async def lock_quarantined(
    connection: Connection, quarantine_ids: Collection[int]
) -> list[LockedQuarantine]:
    """Lock and read quarantined records, in the order they were set aside."""
    rows = await connection.fetch(_LOCK, list(quarantine_ids))
    # Only after the lock: whoever held it before us has changed the time too, and a statement that
    # waits for a lock still sees other tables as they were when it began.
    quarantined_gpu_ns: dict[int, dict[int, int]] = {}
    for row in await connection.fetch(_TIMES_OF, list(quarantine_ids)):
        hours = quarantined_gpu_ns.setdefault(row["quarantine_id"], {})
        hours[row["hour_ms"]] = row["waiting_gpu_ns"]
    return [_locked_from_row(row, quarantined_gpu_ns.get(row["quarantine_id"], {})) for row in rows]


_PARTS: Final = msgspec.json.Decoder(list[tuple[str, str, int, int, int]] | None)
_HEADERS: Final = msgspec.msgpack.Decoder(list[tuple[str, bytes | None]])


def _locked_from_row(row: Row, quarantined_gpu_ns: Mapping[int, int]) -> LockedQuarantine:
    parts = None if row["parts"] is None else _PARTS.decode(row["parts"])
    earlier = EarlierVerdict(
        quarantine_id=row["quarantine_id"],
        parts=None
        if parts is None
        else tuple(
            UsagePart(Device(DeviceId(device), SliceId(part), share_ppm), start_ms, end_ms)
            for device, part, share_ppm, start_ms, end_ms in parts
        ),
        had_new=row["had_new"],
        counts=row["counts"],
        hour_ms=row["hour_ms"],
        quarantined_gpu_ns=quarantined_gpu_ns,
    )
    record = UsageRecord(
        hub=HubCode(row["hub"]),
        topic=row["topic"],
        partition=row["partition"],
        offset=row["record_offset"],
        record_ms=row["record_ms"],
        key=row["message_key"],
        value=row["message_value"],
        headers=_HEADERS.decode(row["message_headers"]),
        earlier=earlier,
    )
    return LockedQuarantine(row["quarantine_id"], record, row["state"])


_LOCK_STATE = "select state from quarantine where quarantine_id = $1 for update"


async def lock_state(connection: Connection, quarantine_id: int) -> QuarantineState:
    """Lock a record and return its state; it exists, because nothing is ever deleted."""
    state: QuarantineState = await connection.fetchval(_LOCK_STATE, quarantine_id)
    return state


_DISMISS = """
update quarantine set state = 'dismissed', closed_at = clock_timestamp(), closed_because = $2
 where quarantine_id = $1
"""

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


async def dismiss_quarantined(connection: Connection, quarantine_id: int, because: str) -> None:
    """Store that an open record, locked before, is dismissed: its time is open no longer."""
    # Two statements after the lock: each sees what whoever held the record before us has left.
    await connection.execute(_DISMISS, quarantine_id, because)
    await connection.execute(_DISMISS_TIME, quarantine_id)


# Which records the service may release. It is decided in SQL because finding them is the decision:
# the partial indexes on open records of each reason are what makes it cheap to ask twice a second.
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
    """Return open records whose missing fact may have arrived, oldest first."""
    rows = await connection.fetch(_RELEASABLE, most)
    return sorted(row["quarantine_id"] for row in rows)[:most]


class FreedPage(NamedTuple):
    """Where corrections may have ended conflicts, and the next records in conflict there."""

    freed_id: int
    quarantine_ids: list[int]


_NEXT_FREED = """
select freed_id, hub, start_ms, end_ms, after_id from freed_time order by freed_id limit 1
"""

# Intervals in conflict in that time, and corrections in conflict, of which no part is kept.
_CONFLICTS = """
select q.quarantine_id
  from quarantine q
 where q.hub = $1 and q.state = 'open' and q.reason = 'conflict' and q.quarantine_id > $4
   and (q.parts is null
        or exists (select from jsonb_array_elements(q.parts) p
                    where (p ->> 3)::bigint < $3 and (p ->> 4)::bigint > $2))
 order by q.quarantine_id
 limit $5
"""


async def next_freed(connection: Connection, most: int) -> FreedPage | None:
    """Return at most so many conflicts that are to be judged again; None when none are."""
    row = await connection.fetchrow(_NEXT_FREED)
    return None if row is None else await _freed_from_row(connection, row, most)


async def _freed_from_row(connection: Connection, row: Row, most: int) -> FreedPage:
    place = (row["hub"], row["start_ms"], row["end_ms"], row["after_id"])
    found = await connection.fetch(_CONFLICTS, *place, most)
    return FreedPage(row["freed_id"], [conflict["quarantine_id"] for conflict in found])


_ADVANCE_FREED = "update freed_time set after_id = $2 where freed_id = $1"
_END_FREED = "delete from freed_time where freed_id = $1"


async def advance_freed(connection: Connection, page: FreedPage, most: int) -> None:
    """Note that these conflicts were judged again; all of them, if there were fewer than `most`."""
    if len(page.quarantine_ids) < most:
        await connection.execute(_END_FREED, page.freed_id)
    else:
        await connection.execute(_ADVANCE_FREED, page.freed_id, page.quarantine_ids[-1])


_SAVE_CAUSE = "update quarantine set reason = $2, detail = $3 where quarantine_id = $1"


async def save_cause(connection: Connection, quarantine_id: int, cause: QuarantineCause) -> None:
    """Store a new cause of a record; all else that is stored of it stays."""
    detail = _storable(cause.detail)
    await connection.execute(_SAVE_CAUSE, quarantine_id, cause.reason, detail)


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


RETENTION_DAYS: Final = 90
"""How long a released record keeps its bytes."""

# Released is for ever, so what the inner look has found is still so when its lock is held. The
# headers become an empty list, as it is stored.
_FORGET = """
update quarantine
   set message_key = null, message_value = null, message_headers = '\\x90',
       forgotten_at = clock_timestamp()
 where quarantine_id in (
         select quarantine_id from quarantine
          where state = 'released' and forgotten_at is null
            and closed_at < statement_timestamp() - $2::int * interval '1 day'
          order by closed_at
          limit $1)
"""


async def forget_released(connection: Connection, most: int) -> int:
    """Forget the bytes of at most so many records that were released long ago; say of how many."""
    status = await connection.execute(_FORGET, most, RETENTION_DAYS)
    return int(status.removeprefix("UPDATE "))


# Operators and auditors look at it.

# A payload may have a megabyte, and so may headers: the page is cut by their sizes before any of
# them is read. They count as what they can become in an answer: base64 makes four bytes of three,
# a header without name and value has 3 bytes here and 33 there, an escaped character 6.
_LISTED = """
with wanted as (
  select q.quarantine_id,
         2 * coalesce(octet_length(q.message_value), 0)::bigint
         + 12 * octet_length(q.message_headers)::bigint
         + 6 * octet_length(q.detail)::bigint as shown_bytes
    from quarantine q
   where ($1::text is null or q.hub = $1) and ($2::text is null or q.reason = $2)
     and ($3::text is null or q.state = $3) and q.quarantine_id > $4
   order by q.quarantine_id
   limit $5
), measured as (
  select w.quarantine_id, sum(w.shown_bytes) over (order by w.quarantine_id) as so_far_bytes,
         row_number() over (order by w.quarantine_id) as place
    from wanted w
)
select q.quarantine_id, q.topic, q.partition, q.record_offset, q.reason, q.detail, q.state,
       q.message_value, q.message_headers, q.forgotten_at,
       (select count(*) from wanted) as wanted_count
  from measured m
  join quarantine q on q.quarantine_id = m.quarantine_id
 where m.place = 1 or m.so_far_bytes <= $6
 order by q.quarantine_id
"""


async def list_quarantined(
    connection: Connection, wanted: QuarantineFilter, after: int, most: int
) -> tuple[list[ListedQuarantine], bool]:
    """List at most so many quarantined records in order, and say whether there are more."""
    rows = await connection.fetch(
        _LISTED, wanted.hub, wanted.reason, wanted.state, after, most + 1, MAX_LISTED_BYTES
    )
    found = [_listed_from_row(row) for row in rows[:most]]
    return found, bool(rows) and rows[0]["wanted_count"] > len(found)


def _listed_from_row(row: Row) -> ListedQuarantine:
    return ListedQuarantine(
        quarantine_id=row["quarantine_id"],
        topic=row["topic"],
        partition=row["partition"],
        offset=row["record_offset"],
        reason=row["reason"],
        detail=row["detail"],
        state=row["state"],
        payload=row["message_value"],
        headers=_HEADERS.decode(row["message_headers"]),
        forgotten_ms=optional_ms_of(row["forgotten_at"]),
    )


_STATE = "select state from quarantine where quarantine_id = $1"


async def quarantine_state(connection: Connection, quarantine_id: int) -> QuarantineState | None:
    """Return the state of a record; None when there is no such record."""
    state: QuarantineState | None = await connection.fetchval(_STATE, quarantine_id)
    return state
