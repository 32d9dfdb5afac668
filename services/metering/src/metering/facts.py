"""Facts: metering follows what it has itself published: price lists, hubs, operators' decisions.

Theory. All of these are in the database when they are published, so in a healthy life nothing here
changes anything. A database that was restored from a backup has forgotten what was published since,
and would rate an hour on the old price line: another bucket, everything charged twice. So before
metering reads a hub or answers a request it reads these compacted topics to their end
(`Facts.catch_up`), prices and hubs first, because a decision may have a record rated. From then on
it keeps following them (`Facts.keep`).

Everything is idempotent: a price line is immutable and named by its content, a hub by its code,
decisions are added up (`core.decisions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from hisab_contracts.quarantine import (
    CorrectionDecision,
    QuarantineDecision,
    read_decision,
)
from hisab_contracts.reference import HubRecord, PriceLine
from hisab_contracts.topics import DECISIONS, HUBS, PRICES
from metering.core.decisions import name_of
from metering.corrections import take_decided
from metering.decisions import take_decisions
from metering.store import hubs, prices
from metering.store.decisions import lock_open
from metering.store.state import ReferenceCache
from runtime.consumer import Batch
from runtime.database import Database
from runtime.kafka import Kafka
from runtime.log_reader import read_to_ends
from runtime.outbox import Outbox
from runtime.progress import offsets_in_logs, stored_progress
from runtime.records import Record

if TYPE_CHECKING:
    from runtime.database import Connection

TOPICS: Final = (PRICES, HUBS, DECISIONS)

_LINE: Final = msgspec.json.Decoder(PriceLine)
_HUB: Final = msgspec.json.Decoder(HubRecord)

_log = structlog.get_logger("metering.facts")


class Facts:
    """Takes up published facts. One per process."""

    def __init__(self, outbox: Outbox) -> None:
        """Write to this outbox what a decision, applied again, states."""
        self._outbox = outbox
        self._cache = ReferenceCache()

    async def catch_up(self, kafka: Kafka, database: Database) -> None:
        """Read what was published to its end; returns once all of it is in the database.

        An outage is raised. Whoever calls asks again: a service at its gate for as long as it runs.
        """
        for topics in ((PRICES, HUBS), (DECISIONS,)):
            await self._read(kafka, database, topics)

    async def _read(self, kafka: Kafka, database: Database, topics: Sequence[str]) -> None:
        partitions = await kafka.partitions(topics)
        first = await kafka.offsets_at("beginning", partitions)
        ends = await kafka.offsets_at("end", partitions)
        logs = await kafka.topics(topics)
        async with database.connection() as connection:
            stored = await stored_progress(connection, topics)
        # From where following goes on: in a restored database that lies before what it forgot.
        taken = offsets_in_logs(stored, logs)
        offsets = {part: max(first[part], taken.get(part, 0)) for part in partitions}
        async for records in read_to_ends(kafka, offsets, ends):
            async with database.transaction() as connection:
                await self.take(connection, records)

    async def keep(self, batch: Batch, connection: Connection) -> None:
        """Take up a batch of published facts."""
        await self.take(connection, batch.records)

    async def take(self, connection: Connection, records: Sequence[Record]) -> None:
        """Take up published facts in the caller's transaction; what is known changes nothing."""
        values = [(record.topic, record.value) for record in records if record.value is not None]
        read = [read_decision(value) for topic, value in values if topic == DECISIONS]
        decided = [said for said in read if isinstance(said, QuarantineDecision)]
        # In the order of locks: quarantined records, then prices (see `store.state`).
        numbers = await lock_open(connection, {name_of(decision) for decision in decided})
        await self._take_prices(
            connection, [_LINE.decode(value) for topic, value in values if topic == PRICES]
        )
        for record in (_HUB.decode(value) for topic, value in values if topic == HUBS):
            await hubs.add_hub(
                connection, record.hub, record.name or record.hub, record.heartbeat_ms
            )
        corrected = [said for said in read if isinstance(said, CorrectionDecision)]
        if decided:
            await take_decisions(connection, self._outbox, self._cache, decided, numbers)
        if corrected:
            await take_decided(connection, self._outbox, self._cache, corrected)

    async def _take_prices(self, connection: Connection, lines: Sequence[PriceLine]) -> None:
        if not lines or not await prices.unknown_lines(connection, lines):
            return
        # Nobody rates from here on, as when a list is added.
        await prices.lock_prices(connection)
        forgotten = await prices.unknown_lines(connection, lines)
        if forgotten:
            _log.warning("forgotten price lines taken up", lines=len(forgotten))
            await prices.keep_published(connection, forgotten)
