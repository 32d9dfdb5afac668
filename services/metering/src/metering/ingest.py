"""Ingest: a batch of a hub's records in, coverage, charges and quarantine out, in one transaction.

`meter_records` is the one way for all records: those new from Kafka come through `Ingest`, those
out of quarantine through `metering.replay`. It loads, has the engine decide, saves, and writes what
is published to the outbox: one `BucketTotal` per bucket that was filled, one notice per record that
is new in quarantine. A record that changes nothing leaves nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from hisab_contracts.ids import UNKNOWN_TOPIC, HubCode, TopicId
from hisab_contracts.topics import CHARGES, QUARANTINE, hub_of_topic
from metering.core import engine
from metering.core.batch import MeteredBucket, Reference, UsageRecord
from metering.core.quarantine import ESCAPED_HEADER, UNREAD_RECORD, undecodable_batch
from metering.store import quarantine, state
from metering.store.quarantine import OpenedQuarantine
from metering.store.state import ReferenceCache
from runtime.kafka import Message
from runtime.outbox import Outbox
from runtime.records import Record
from runtime.telemetry import trace_headers, trace_of

if TYPE_CHECKING:
    from runtime.consumer import Batch
    from runtime.database import Connection

T = TypeVar("T")

THREAD_ABOVE_RECORDS: Final = 500
"""Batches up to this size are decided on the event loop: they hold it for a few milliseconds."""


class QuarantineNotice(msgspec.Struct, frozen=True):
    """`metering.quarantine.v1`: a record was quarantined. Its bytes stay in our database."""

    quarantine_id: str
    reason: str
    hub: str
    topic: str
    partition: int
    offset: int
    value_sha256: str


class Ingest:
    """Handles batches of hub records. One per process."""

    def __init__(self, outbox: Outbox, *, max_rows: int = engine.MAX_ROWS) -> None:
        """Write what leaves to this outbox; meter at most so many rows at a time."""
        self._outbox = outbox
        self._max_rows = max_rows
        self._cache = ReferenceCache()

    async def handle(self, batch: Batch, connection: Connection) -> None:
        """Meter a batch of hub records."""
        records = _usage_records(batch.records, batch.topic_ids, unread=False)
        await self._ingest(connection, records, batch.moved)

    async def quarantine_unread(self, batch: Batch, connection: Connection) -> None:
        """Quarantine records that killed the process, without reading them."""
        records = _usage_records(batch.records, batch.topic_ids, unread=True)
        await self._ingest(connection, records, batch.moved)

    async def _ingest(
        self, connection: Connection, records: Sequence[UsageRecord], moved: Callable[[], None]
    ) -> None:
        seen, ranges = _places_of(records)
        reference = await state.load_reference(connection, self._cache)
        await state.note_seen(connection, seen)
        before = await state.quarantined_offsets(connection, ranges)
        # Offsets that come again although they were quarantined: what became of them there counts.
        # What was not quarantined needs no such look: coverage makes it a duplicate.
        if before:
            records = [record for record in records if not _is_among(record, before)]
        await meter_records(
            connection,
            self._outbox,
            self._cache,
            reference,
            records,
            max_rows=self._max_rows,
            moved=moved,
        )


async def meter_records(
    connection: Connection,
    outbox: Outbox,
    cache: ReferenceCache,
    reference: Reference,
    records: Sequence[UsageRecord],
    *,
    because: str = "",
    max_rows: int = engine.MAX_ROWS,
    moved: Callable[[], None] = lambda: None,
) -> None:
    """Meter records in order, in the caller's transaction, as many at a time as memory allows.

    A backfill takes many rounds and then longer than a consumer may stand still: `moved` is called
    after each step that cannot be divided.

    `reference` was loaded in this transaction, from the cache. `because` is why records out of
    quarantine are judged again. What becomes of each of them stands in the quarantine afterwards:
    it is released, or it stays open.
    """
    # All rounds in one transaction: progress is stored for the whole Kafka batch, so a part of it
    # that was stored alone would be read, and counted, again.
    while records:
        prepare = partial(engine.prepare, records, reference, max_rows=max_rows)
        batch = await _decide(prepare, len(records))
        if batch.unknown_tenants:
            more = await state.look_up_tenants(connection, cache, reference, batch.unknown_tenants)
            if more is not reference:
                reference = more
                continue  # Prepare again: what these tenants used can be rated now.
        moved()
        stored = await state.load_state(connection, batch)
        moved()
        changes = await _decide(partial(engine.meter, batch, stored), batch.record_count)
        moved()
        await state.save_changes(connection, changes)
        moved()
        messages = [_total_message(bucket) for bucket in changes.buckets]
        if changes.quarantined or changes.still_quarantined or changes.released_ids:
            opened = await quarantine.save_quarantine(
                connection, changes, reference.generation, because
            )
            messages += map(_notice_message, opened)
        await outbox.write(connection, messages)
        moved()
        records = records[batch.record_count :]


async def _decide(decide: Callable[[], T], record_count: int) -> T:
    """Run a pure step of the engine without keeping the event loop from its other work.

    A full batch takes 30 to 300 ms. Meanwhile this process must answer HTTP, fetch the next batch
    and publish. The steps are functions of values alone, so a thread may run them: Python then
    changes between the two every 5 ms. Nobody else touches these values until the step has ended.
    For small batches the change of threads would cost more than the step, and latency counts there.
    """
    if record_count <= THREAD_ABOVE_RECORDS:
        return decide()
    return await asyncio.to_thread(decide)


def _is_among(
    record: UsageRecord, before: Mapping[tuple[str, int, int], Sequence[tuple[str, str]]]
) -> bool:
    """Say whether it is one of these: the same log, if both are known, place and bytes."""
    same_place = before.get((record.topic, record.partition, record.offset), ())
    if not same_place:
        return False
    value_sha256 = hashlib.sha256(record.value or b"").hexdigest()
    return any(
        value_sha256 == other_sha256 and (record.topic_id == topic_id or not topic_id)
        for topic_id, other_sha256 in same_place
    )


def _usage_records(
    received: Sequence[Record], topic_ids: Mapping[str, TopicId], *, unread: bool
) -> Sequence[UsageRecord]:
    hubs: dict[str, HubCode] = {}
    own_trace = trace_headers()
    records = []
    for record in received:
        hub = hubs.get(record.topic)
        if hub is None:
            hub = hubs[record.topic] = _hub_of(record.topic)
        cause, trace = None, own_trace
        if unread:
            cause = UNREAD_RECORD  # Not even its headers are looked at.
        else:
            traceparent = trace_of(record)
            if traceparent is not None:
                trace = trace_headers(traceparent)
            if record.is_escaped:
                cause = ESCAPED_HEADER
            elif record.undecodable:
                cause = undecodable_batch(record.undecodable)
        records.append(
            UsageRecord(
                hub=hub,
                topic=record.topic,
                partition=record.partition,
                offset=record.offset,
                record_ms=record.timestamp_ms,
                key=record.key,
                value=record.value,
                headers=record.headers,
                trace=trace,
                cause=cause,
                topic_id=topic_ids.get(record.topic, UNKNOWN_TOPIC),
            )
        )
    return records


def _hub_of(topic: str) -> HubCode:
    hub = hub_of_topic(topic)
    if hub is None:
        raise ValueError(f"{topic} is not the topic of a hub")
    return hub


def _places_of(
    records: Sequence[UsageRecord],
) -> tuple[dict[tuple[HubCode, int], int], dict[tuple[str, int], tuple[int, int]]]:
    """Return, per partition, the latest Kafka timestamp, and the first and last offset."""
    seen: dict[tuple[HubCode, int], int] = {}
    ranges: dict[tuple[str, int], tuple[int, int]] = {}
    for record in records:
        hub_place = (record.hub, record.partition)
        seen[hub_place] = max(seen.get(hub_place, 0), record.record_ms)
        place = (record.topic, record.partition)
        first, _ = ranges.get(place, (record.offset, 0))
        ranges[place] = (first, record.offset)
    return seen, ranges


def _total_message(bucket: MeteredBucket) -> Message:
    total = bucket.total
    value = msgspec.json.encode(total)
    return Message(CHARGES, total.tenant_id.encode(), value, bucket.record.trace)


def _notice_message(opened: OpenedQuarantine) -> Message:
    record = opened.quarantined.record
    notice = QuarantineNotice(
        quarantine_id=str(opened.quarantine_id),
        reason=opened.quarantined.cause.reason,
        hub=record.hub,
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        value_sha256=opened.value_sha256,
    )
    return Message(QUARANTINE, record.hub.encode(), msgspec.json.encode(notice), record.trace)
