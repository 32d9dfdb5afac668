"""The consumer's handlers: a batch of a hub's records in, and reference data from the ledger.

Everything of a batch happens in the transaction that advances the stored offsets. What this process
knows of tenants and prices is remembered between batches and checked in every transaction: prices
by their generation under the price lock, tenants whenever one seems to be unknown. A batch that
touches very many hours is read and settled in portions, one after another in its transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from hisab_contracts.ids import HubCode
from hisab_contracts.reference import TenantRecord
from hisab_contracts.topics import TENANTS, hub_of_topic
from metering import store, waiting
from metering.reading import MAX_HOURS, Facts, Origin, Reading, Waits
from metering.settling import Paper, settle_all
from metering.waiting import Payload
from runtime.auth import keep_access_keys
from runtime.kafka import Headers
from runtime.records import Record
from runtime.streams import Batch, Outbox
from runtime.telemetry import trace_headers, trace_of

if TYPE_CHECKING:
    from runtime.database import Connection

RECORDS_PER_TURN: Final = 500
"""Records read before other work of the process has its turn."""
ESCAPED: Final = Waits("undecodable", "a header's name is not UTF-8; it is shown escaped")

_TENANT: Final = msgspec.json.Decoder(TenantRecord)


class Intake:
    """Handles batches. One per process."""

    def __init__(self, outbox: Outbox, *, max_hours: int = MAX_HOURS) -> None:
        """Write what leaves to this outbox; settle after so many hours of usage at the latest."""
        self._outbox = outbox
        self._max_hours = max_hours
        self._known = store.Known()

    async def handle(self, batch: Batch, connection: Connection) -> None:
        """Meter a batch of hub records."""
        await self._take(connection, batch.records, unread=False)

    async def set_aside(self, record: Record, connection: Connection) -> None:
        """Quarantine a record that killed the process, without reading it."""
        await self._take(connection, (record,), unread=True)

    async def keep_reference(self, batch: Batch, connection: Connection) -> None:
        """Keep our own copy of tenants and API keys."""
        await keep_access_keys(batch, connection)
        tenants = [
            _TENANT.decode(record.value)
            for record in batch.records
            if record.topic == TENANTS and record.value is not None
        ]
        if tenants:
            await store.save_tenants(connection, {one.tenant_id: one.currency for one in tenants})

    async def _take(
        self, connection: Connection, records: Sequence[Record], *, unread: bool
    ) -> None:
        origins = _origins_of(records)
        await store.share_prices(connection)
        facts = await store.load_facts(connection, self._known)
        before = await waiting.quarantined_before(connection, _ranges_of(origins))
        fresh = [
            (origin, record)
            for origin, record in zip(origins, records, strict=True)
            if not before or origin[1:4] not in before
        ]
        read = partial(self._read, facts, unread=unread)
        paper = _paper(fresh, self._known.generation, unread=unread)
        await settle_all(connection, self._known, fresh, read, self._outbox, paper)
        seen: dict[tuple[HubCode, int], int] = {}
        for origin in origins:
            place = (origin.hub, origin.partition)
            seen[place] = max(seen.get(place, 0), origin.record_ms)
        await waiting.note_seen(connection, seen)

    async def _read(
        self, facts: Facts, records: Sequence[tuple[Origin, Record]], *, unread: bool
    ) -> Reading:
        """Read records in order, as many as one reading holds."""
        reading = Reading(facts, self._max_hours)
        for at in range(0, len(records), RECORDS_PER_TURN):
            for origin, record in records[at : at + RECORDS_PER_TURN]:
                if unread:
                    reading.take_unread(origin)
                elif record.is_escaped:
                    reading.take_unread(origin, ESCAPED)
                else:
                    reading.take(origin, record.value, record.headers)
                if reading.is_full:
                    return reading
            await asyncio.sleep(0)
        return reading


def _origins_of(records: Sequence[Record]) -> list[Origin]:
    hubs: dict[str, HubCode] = {}
    origins = []
    for record in records:
        hub = hubs.get(record.topic)
        if hub is None:
            found = hub_of_topic(record.topic)
            if found is None:
                raise ValueError(f"{record.topic} is not the topic of a hub")
            hub = hubs[record.topic] = found
        origins.append(
            Origin(hub, record.topic, record.partition, record.offset, record.timestamp_ms)
        )
    return origins


def _ranges_of(origins: Sequence[Origin]) -> dict[tuple[str, int], tuple[int, int]]:
    ranges: dict[tuple[str, int], tuple[int, int]] = {}
    for origin in origins:
        place = (origin.topic, origin.partition)
        known = ranges.get(place)
        first = origin.offset if known is None else known[0]
        ranges[place] = (first, origin.offset)
    return ranges


def _paper(records: Sequence[tuple[Origin, Record]], generation: int, *, unread: bool) -> Paper:
    by_place = {origin[1:4]: record for origin, record in records}

    def payload_of(origin: Origin) -> Payload:
        record = by_place[origin[1:4]]
        return Payload(record.key, record.value, record.headers)

    def traced(origin: Origin) -> Headers:
        return trace_headers(None if unread else trace_of(by_place[origin[1:4]]))

    return Paper(payload_of, traced, generation)
