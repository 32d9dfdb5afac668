"""What was published, read back from its topic: how a service learns what it has said before.

Theory. A `Readback` reads chosen partitions of one topic from given offsets to the end that the
broker had when it was asked, outside any consuming group, and then stops. The end is that of
everything acknowledged: were it that of what is readable, an open transaction of somebody else
would hide what lies behind it. So such a transaction is waited for, and after 30 s without a step
forward it is named as an outage, never passed over. Offsets that hold no record (markers of
transactions, what compaction or retention has removed) are stepped over.

Refusals: `BrokerLost`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from runtime.clock import ticks_ms
from runtime.feed import PARTITION_FETCH_BYTES
from runtime.kafka import (
    CLOSE_TIMEOUT_S,
    METADATA_MAX_AGE_MS,
    REQUEST_TIMEOUT_MS,
    BrokerLost,
    Kafka,
    broker_errors,
    started,
)
from runtime.machine import Partition
from runtime.records import Record, record_of

CHUNK_RECORDS: Final = 1_000
FETCH_WAIT_MS: Final = 200
STANDSTILL_MS: Final = 30_000


@dataclass(frozen=True, slots=True)
class OffsetRange:
    """What the broker has of a partition: offsets in [first, end); equal, it has nothing."""

    first_offset: int
    end_offset: int


class Readback:
    """One topic that this service publishes, as the broker has it."""

    def __init__(self, kafka: Kafka, topic: str, *, standstill_ms: int = STANDSTILL_MS) -> None:
        """Name the topic; nothing is connected."""
        self._kafka = kafka
        self._standstill_ms = standstill_ms
        self.topic = topic

    async def ranges(self) -> dict[int, OffsetRange]:
        """Say what the broker has of every partition; nothing when there is no such topic."""
        partitions = await self._kafka.partitions((self.topic,))
        if not partitions:
            return {}
        wanted = [TopicPartition(*partition) for partition in partitions]
        async with self._consumer("read_uncommitted") as consumer:
            with broker_errors():
                first = await consumer.beginning_offsets(wanted)
                end = await consumer.end_offsets(wanted)
        return {where.partition: OffsetRange(first[where], end[where]) for where in wanted}

    async def read(
        self, begin: Mapping[int, int], ranges: Mapping[int, OffsetRange]
    ) -> AsyncIterator[Sequence[Record]]:
        """Give the records in [begin, the range's end) of these partitions, in order per partition.

        At most 1 000 at a time, all of one partition: memory does not grow with what is read.
        """
        ends = {
            TopicPartition(self.topic, number): ranges[number].end_offset
            for number, offset in begin.items()
            if offset < ranges[number].end_offset
        }
        if not ends:
            return
        async with self._consumer("read_committed") as consumer:
            with broker_errors():
                consumer.assign(list(ends))
                for where in ends:
                    consumer.seek(where, begin[where.partition])
            async for records in self._to_the_ends(consumer, ends):
                yield records

    async def _to_the_ends(
        self, consumer: AIOKafkaConsumer, ends: dict[TopicPartition, int]
    ) -> AsyncIterator[Sequence[Record]]:
        positions: dict[TopicPartition, int] = {}
        moved_ms = ticks_ms()
        while ends:
            with broker_errors():
                brought = await consumer.getmany(
                    *ends, timeout_ms=FETCH_WAIT_MS, max_records=CHUNK_RECORDS
                )
                now_at = {where: await consumer.position(where) for where in ends}
            for where, messages in brought.items():
                end = ends[where]
                records = [record_of(message) for message in messages if message.offset < end]
                if records:
                    yield records
            if now_at != positions:
                positions, moved_ms = now_at, ticks_ms()
            ends = {where: end for where, end in ends.items() if now_at[where] < end}
            if ends and ticks_ms() - moved_ms > self._standstill_ms:
                held = ", ".join(str(Partition(*where)) for where in ends)
                raise BrokerLost(f"a transaction stays open on {held}: its end cannot be read")

    @contextlib.asynccontextmanager
    async def _consumer(self, isolation: str) -> AsyncIterator[AIOKafkaConsumer]:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._kafka.bootstrap,
            client_id=self._kafka.client,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level=isolation,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
            metadata_max_age_ms=METADATA_MAX_AGE_MS,
            max_partition_fetch_bytes=PARTITION_FETCH_BYTES,
        )
        await started(consumer, consumer.stop)
        try:
            yield consumer
        finally:
            # Bounded, because aiokafka's `stop` can hang; what was read is read.
            with contextlib.suppress(KafkaError, TimeoutError, OSError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await consumer.stop()
