"""Ingest: what a hub's topic brings is metered, in the transaction that notes how far it was read.

A record that was quarantined before, and comes again because progress was set back or a backup was
restored, is left alone while its quarantine row is there. Where the row was lost too, the record
comes to quarantine again, and what operators had decided on it is applied again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace

from hisab_contracts.ids import UNKNOWN_TOPIC, HubCode, TopicId
from hisab_contracts.quarantine import QuarantineDecision
from hisab_contracts.topics import hub_of_topic
from metering.batches import meter_records
from metering.core import engine
from metering.core.batch import UsageRecord
from metering.core.decisions import cause_of_dismissal, decision_on, name_of
from metering.core.quarantine import ESCAPED_HEADER, UNREAD_RECORD, undecodable_batch
from metering.decisions import apply_to, record_name_of
from metering.store import state
from metering.store.decisions import dismissed_whole
from metering.store.state import ReferenceCache
from runtime.outbox import Outbox
from runtime.records import Record
from runtime.telemetry import trace_headers, trace_of

if TYPE_CHECKING:
    from runtime.consumer import Batch
    from runtime.database import Connection


class Ingest:
    """Handles batches of hub records. One per process."""

    def __init__(self, outbox: Outbox, *, max_rows: int = engine.MAX_ROWS) -> None:
        """Write what leaves to this outbox; meter at most so many rows at a time."""
        self._outbox = outbox
        self._max_rows = max_rows
        self._cache = ReferenceCache()

    async def handle(self, batch: Batch, connection: Connection) -> None:
        """Meter a batch of hub records."""
        await self._ingest(connection, batch, unread=False)

    async def quarantine_unread(self, batch: Batch, connection: Connection) -> None:
        """Quarantine records that killed the process, without reading them."""
        await self._ingest(connection, batch, unread=True)

    async def _ingest(self, connection: Connection, received: Batch, *, unread: bool) -> None:
        records = _usage_records(received.records, received.topic_ids, unread=unread)
        seen, ranges = _places_of(records)
        reference = await state.load_reference(connection, self._cache)
        await state.note_seen(connection, seen)
        earlier = await state.earlier_quarantine(connection, ranges)
        # Offsets that come again although they were quarantined: what became of them there counts.
        # What was not quarantined needs no such look: coverage makes it a duplicate.
        if earlier.quarantined:
            records = [record for record in records if not _is_among(record, earlier.quarantined)]
        if earlier.has_dismissed and not unread:
            records = _as_dismissed(records, await dismissed_whole(connection, ranges))
        opened = await meter_records(
            connection, self._outbox, self._cache, reference, records, max_rows=self._max_rows
        )
        if opened:
            # Never read again here what has killed the process: a replay that was decided would.
            await apply_to(connection, self._outbox, self._cache, opened, replays=not unread)


def _as_dismissed(
    records: Sequence[UsageRecord], decided: Sequence[QuarantineDecision]
) -> Sequence[UsageRecord]:
    """Mark those records that operators dismissed whole before the database was restored."""
    known = {name_of(decision): decision for decision in decided}
    places = {(name.topic, name.partition, name.offset) for name in known}
    marked = []
    for record in records:
        decision = None
        if (record.topic, record.partition, record.offset) in places:
            decision = decision_on(record_name_of(record, record.value_sha256()), known)
        cause = None if decision is None else cause_of_dismissal(decision)
        if cause is not None and cause.reason == UNREAD_RECORD.reason:
            # It killed processes: neither is it read now.
            marked.append(replace(record, cause=cause))
        else:
            marked.append(replace(record, dismissed=cause) if cause is not None else record)
    return marked


def _is_among(
    record: UsageRecord, before: Mapping[tuple[str, int, int], Sequence[tuple[str, str]]]
) -> bool:
    """Say whether it is one of these: the same log, if both are known, place and bytes."""
    same_place = before.get((record.topic, record.partition, record.offset), ())
    if not same_place:
        return False
    value_sha256 = record.value_sha256()
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
