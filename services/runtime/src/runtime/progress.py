"""Stored progress: how far each partition has been taken in, and who may move it on.

Theory. A progress row is advanced only in the transaction that does the work of the records before
it, and only from exactly the offset at which the fetch of these records began, under the epoch of
the owner that fetched them. Claiming a partition raises the epoch, so an owner that lost it can
write nothing more: its update finds no row (`FencedError`), and its whole transaction is undone.

An offset is a place in one log: the row says in which, by the id of the topic. When the topic is
deleted and made again, the claim finds another id and the consumer halts.

An operator's override is the one way past a stored offset. It is put on the record first, and the
next claim uses it up; with it the row is about the log that the broker has then.

Refusals: `FencedError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hisab_contracts.ids import UNKNOWN_TOPIC, TopicId
from runtime.database import Unavailable
from runtime.machine import Partition, PartitionClaim, Slice
from runtime.topics import ExistingTopic

if TYPE_CHECKING:
    from runtime.database import Connection


class FencedError(Unavailable):
    """A progress row no longer carries our epoch and offset: another owner has moved it."""


@dataclass(frozen=True, slots=True)
class PartitionRange:
    """What the broker says about a partition before it is claimed."""

    first_offset: int
    end_offset: int
    hint_offset: int | None
    topic_id: TopicId = UNKNOWN_TOPIC


_CLAIM = """
with overridden as (
  update consumer_override set used_at = clock_timestamp()
   where used_at is null
     and (topic, partition) in (select * from unnest($1::text[], $2::int[]))
  returning topic, partition, next_offset
), wanted as (
  select a.topic, a.partition, a.floor_offset, a.topic_id, o.next_offset as override_offset
    from unnest($1::text[], $2::int[], $3::bigint[], $4::text[])
         as a (topic, partition, floor_offset, topic_id)
    left join overridden o on o.topic = a.topic and o.partition = a.partition
), claimed as (
  insert into consumer_progress as p
         (topic, partition, owner_epoch, next_offset, attempt_offset, attempts, topic_id)
  select topic, partition, 1, coalesce(override_offset, floor_offset), -1, 0, topic_id
    from wanted
   order by topic, partition
  on conflict (topic, partition) do update
     set owner_epoch = p.owner_epoch + 1,
         next_offset = coalesce(
           (select a.override_offset from wanted a
             where a.topic = p.topic and a.partition = p.partition),
           greatest(p.next_offset, excluded.next_offset)),
         -- Kept when the log is another one, so that the consumer halts again and again.
         topic_id = case
           when p.topic_id = '' or exists (
             select from wanted a
              where a.topic = p.topic and a.partition = p.partition
                and a.override_offset is not null)
           then excluded.topic_id else p.topic_id end
  returning topic, partition, owner_epoch, next_offset, attempt_offset, attempts, topic_id
)
select c.topic, c.partition, c.owner_epoch, c.next_offset, c.topic_id,
       case when c.attempt_offset = c.next_offset then c.attempts else 0 end as attempts,
       a.override_offset is not null as overridden
  from claimed c
  join wanted a on a.topic = c.topic and a.partition = c.partition
 order by c.topic, c.partition
"""


async def claim(
    connection: Connection, ranges: dict[Partition, PartitionRange], *, compacted: bool
) -> tuple[PartitionClaim, ...]:
    """Raise the owner epoch of these progress rows (made when absent) and read their offsets.

    A new row begins at 0; on a compacted topic at the first offset the broker has, because there
    a removed record was replaced by a newer one. An operator's unused override wins and is marked.
    """
    # In one order for all, so that two processes that claim at once do not wait in a circle.
    wanted = sorted(ranges)
    floors = [ranges[p].first_offset if compacted else 0 for p in wanted]
    topics, numbers = [p.topic for p in wanted], [p.number for p in wanted]
    topic_ids = [ranges[p].topic_id for p in wanted]
    rows = await connection.fetch(_CLAIM, topics, numbers, floors, topic_ids)
    places = [Partition(row["topic"], row["partition"]) for row in rows]
    return tuple(
        PartitionClaim(
            partition=place,
            epoch=row["owner_epoch"],
            next_offset=row["next_offset"],
            attempts=row["attempts"],
            first_offset=ranges[place].first_offset,
            end_offset=ranges[place].end_offset,
            # The operator knows that the hint is ahead: that is what the override is for. And
            # whatever of a compacted topic is read again says nothing that does not hold.
            hint_offset=None if row["overridden"] or compacted else ranges[place].hint_offset,
            topic_id=ranges[place].topic_id,
            stored_topic_id=TopicId(row["topic_id"]),
        )
        for place, row in zip(places, rows, strict=True)
    )


_ADVANCE = """
update consumer_progress p set next_offset = b.until_offset
  from unnest($1::text[], $2::int[], $3::bigint[], $4::bigint[], $5::bigint[])
       as b (topic, partition, epoch, expected_offset, until_offset)
 where p.topic = b.topic and p.partition = b.partition
   and p.owner_epoch = b.epoch and p.next_offset = b.expected_offset
   and b.until_offset > b.expected_offset
"""


async def advance(connection: Connection, slices: Sequence[Slice]) -> None:
    """Move these progress rows to `until`; `FencedError` unless every one was as expected."""
    untils = [piece.until for piece in slices]
    _require_all(await connection.execute(_ADVANCE, *_expected_columns(slices), untils), slices)


_MARK_ATTEMPT = """
update consumer_progress p set attempt_offset = b.expected_offset, attempts = b.attempt
  from unnest($1::text[], $2::int[], $3::bigint[], $4::bigint[], $5::int[])
       as b (topic, partition, epoch, expected_offset, attempt)
 where p.topic = b.topic and p.partition = b.partition
   and p.owner_epoch = b.epoch and p.next_offset = b.expected_offset
"""


async def mark_attempt(connection: Connection, slices: Sequence[Slice]) -> None:
    """Store, before they are processed, that these slices are being attempted."""
    attempts = [piece.attempt for piece in slices]
    status = await connection.execute(_MARK_ATTEMPT, *_expected_columns(slices), attempts)
    _require_all(status, slices)


def _expected_columns(slices: Sequence[Slice]) -> tuple[list[str], list[int], list[int], list[int]]:
    """Return the columns that name progress rows as their owner left them."""
    return (
        [piece.partition.topic for piece in slices],
        [piece.partition.number for piece in slices],
        [piece.epoch for piece in slices],
        [piece.expected for piece in slices],
    )


def _require_all(status: str, slices: Sequence[Slice]) -> None:
    if status != f"UPDATE {len(slices)}":
        raise FencedError(f"{status} of {len(slices)} progress rows")


@dataclass(frozen=True, slots=True)
class StoredProgress:
    """How far a partition has been taken in, and of which log."""

    next_offset: int
    topic_id: TopicId

    def offset_in(self, topic_id: TopicId) -> int:
        """Return how far this log has been taken in: not at all, when the stored one is another."""
        is_other = topic_id != self.topic_id and "" not in {topic_id, self.topic_id}
        return 0 if is_other else self.next_offset


def offsets_in_logs(
    stored: Mapping[Partition, StoredProgress], logs: Mapping[str, ExistingTopic]
) -> dict[Partition, int]:
    """Return how far each partition has been taken in, of the log that its topic is now.

    A topic that the broker does not know at this moment is taken for the one that was stored.
    """
    return {
        place: row.offset_in(logs[place.topic].topic_id if place.topic in logs else UNKNOWN_TOPIC)
        for place, row in stored.items()
    }


_STORED_PROGRESS = """
select topic, partition, next_offset, topic_id
  from consumer_progress
 where topic = any($1::text[])
"""


async def stored_progress(
    connection: Connection, topics: Sequence[str]
) -> dict[Partition, StoredProgress]:
    """Return the progress of every partition of these topics that was ever claimed."""
    rows = await connection.fetch(_STORED_PROGRESS, list(topics))
    return {
        Partition(row["topic"], row["partition"]): StoredProgress(
            row["next_offset"], TopicId(row["topic_id"])
        )
        for row in rows
    }


@dataclass(frozen=True, slots=True)
class ProgressOverride:
    """An operator accepts that a partition is read on from another offset."""

    partition: Partition
    next_offset: int
    accepted_by: str
    reason: str


_OVERRIDE = """
insert into consumer_override (topic, partition, next_offset, accepted_by, reason)
values ($1, $2, $3, $4, $5)
"""


async def override_progress(connection: Connection, override: ProgressOverride) -> None:
    """Put an override on the record; the next claim of the partition uses it up."""
    await connection.execute(
        _OVERRIDE,
        override.partition.topic,
        override.partition.number,
        override.next_offset,
        override.accepted_by,
        override.reason,
    )


_ACCEPTED_OFFSETS = """
select partition, max(next_offset) as next_offset
  from consumer_override
 where topic = $1
 group by partition
"""


async def accepted_offsets(connection: Connection, topic: str) -> dict[int, int]:
    """Return from where an operator has said, on the record, that a topic of ours may be read."""
    rows = await connection.fetch(_ACCEPTED_OFFSETS, topic)
    return {row["partition"]: row["next_offset"] for row in rows}


async def accept_topic(connection: Connection, topic: str, *, accepted_by: str, reason: str) -> int:
    """Put on the record that a topic is read from its first record; return its partitions.

    An override that waits already stays, and is not counted: it is an operator's word as well.
    """
    stored = await stored_progress(connection, [topic])
    return await _accept(connection, dict.fromkeys(stored, 0), accepted_by, reason)


async def accept_stored_progress(
    connection: Connection, partitions: Sequence[Partition], accepted_by: str, reason: str
) -> int:
    """Accept, on the record, that these partitions are read on from where the database stands.

    It was restored from a backup, so lag tools were told of more, and perhaps of partitions that it
    has never heard of. Returns how many partitions.
    """
    stored = await stored_progress(connection, sorted({place.topic for place in partitions}))
    offsets = {place: stored[place].next_offset if place in stored else 0 for place in partitions}
    await _accept(connection, offsets, accepted_by, reason)
    return len(partitions)


# Where partitions are read on from; an override that waits already stays.
_ACCEPT = """
insert into consumer_override (topic, partition, next_offset, accepted_by, reason)
select topic, partition, next_offset, $4, $5
  from unnest($1::text[], $2::int[], $3::bigint[]) as k (topic, partition, next_offset)
 order by topic, partition
on conflict (topic, partition) where used_at is null do nothing
returning partition
"""


async def _accept(
    connection: Connection, offsets: Mapping[Partition, int], accepted_by: str, reason: str
) -> int:
    topics, numbers = [place.topic for place in offsets], [place.number for place in offsets]
    accepted = await connection.fetch(
        _ACCEPT, topics, numbers, list(offsets.values()), accepted_by, reason
    )
    return len(accepted)
