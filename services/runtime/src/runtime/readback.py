"""What was published, read back from its topic: how a service learns what it has said before.

Theory. A `Readback` reads chosen partitions of one topic from given offsets to the end that the
broker had when it was asked, outside any consuming group, and then stops. The end is that of
everything acknowledged: were it that of what is readable, an open transaction of somebody else
would hide what lies behind it. So such a transaction is waited for, and after 30 s without a step
forward it is named as an outage, never passed over. Offsets that hold no record (markers of
transactions, what compaction or retention has removed) are stepped over.

Refusals: `BrokerLost`, `OutOfRangeError`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from runtime.kafka import Kafka
from runtime.log_reader import STANDSTILL_MS, read_to_ends
from runtime.machine import Partition
from runtime.records import Record


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
        first = await self._kafka.offsets_at("beginning", partitions)
        ends = await self._kafka.offsets_at("end", partitions)
        return {part.number: OffsetRange(first[part], ends[part]) for part in partitions}

    def read(
        self, begin: Mapping[int, int], ranges: Mapping[int, OffsetRange]
    ) -> AsyncIterator[Sequence[Record]]:
        """Give the records in [begin, the range's end) of these partitions, in order per partition.

        A portion at a time, all of one partition: memory does not grow with what is read.
        """
        return read_to_ends(
            self._kafka,
            {Partition(self.topic, number): offset for number, offset in begin.items()},
            {Partition(self.topic, number): ranges[number].end_offset for number in begin},
            standstill_ms=self._standstill_ms,
        )
