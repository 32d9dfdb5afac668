"""Lag: how many records wait for a consumer, which of them can be read, and of which logs they are.

Theory. What waits is counted up to the real end of every partition. An open transaction hides what
lies behind its first record from all readers; that is no work for us yet, but it waits, and when it
has hidden the same place for two looks in a row, it is said where and what ends it. Offsets are
compared within one log only: of a topic that was deleted and made again nothing has been read.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from runtime.clock import ticks_ms
from runtime.kafka import Kafka
from runtime.machine import Partition
from runtime.progress import StoredProgress, offsets_in_logs

LAG_FRESH_MS: Final = 250

StoredRows = Awaitable[Mapping[Partition, StoredProgress]]


@dataclass(frozen=True, slots=True)
class HiddenRecords:
    """Acknowledged records of a partition that no reader may see before a transaction ends."""

    first_offset: int
    end_offset: int

    def explain(self, partition: Partition) -> str:
        """Say what holds the partition up, and who can end it."""
        return (
            f"a transaction is open on {partition.topic}[{partition.number}]: offsets"
            f" {self.first_offset} to {self.end_offset - 1} are not read before its producer"
            " commits or aborts it; when that is gone, end it (kafka-transactions.sh"
            f" find-hanging, then abort --topic {partition.topic}"
            f" --partition {partition.number} --start-offset {self.first_offset})"
        )


class Lag:
    """How many records wait, from end offsets that are at most a quarter of a second old."""

    def __init__(self, kafka: Kafka, stored: Callable[[tuple[str, ...]], StoredRows]) -> None:
        """`stored` reads the progress of topics, as it is committed."""
        self._kafka = kafka
        self._stored = stored
        self._readable: dict[Partition, int] = {}
        self._hidden: dict[Partition, HiddenRecords] = {}
        self._hidden_before: dict[Partition, HiddenRecords] = {}
        self._topics: tuple[str, ...] = ()
        self._read_ms: int | None = None
        self._lock = asyncio.Lock()
        self.waiting = 0
        self.stored_total = 0
        self.held_up: Mapping[Partition, HiddenRecords] = {}
        self.counts: Mapping[str, int] = {}
        self.is_of_other_logs = False

    def readable(self, partitions: Iterable[Partition] | None = None) -> int:
        """Return how many records wait that can be read now: in these partitions, or in all."""
        if partitions is None:
            return sum(self._readable.values())
        return sum(self._readable.get(partition, 0) for partition in partitions)

    async def total(self, topics: tuple[str, ...]) -> int:
        """Return how many records of these topics wait, from ends that are fresh enough."""
        async with self._lock:
            is_old = self._read_ms is None or ticks_ms() - self._read_ms > LAG_FRESH_MS
            if is_old or self._topics != topics:
                await self._refresh(topics)
            return self.waiting

    async def observe(self, topics: tuple[str, ...]) -> None:
        """Look again, and compare what is hidden with the last time we observed."""
        async with self._lock:
            await self._refresh(topics)
        # A transaction that was open at one look only is the ordinary life of its producer.
        self.held_up = {
            partition: hidden
            for partition, hidden in self._hidden.items()
            if partition in self._hidden_before
            and self._hidden_before[partition].first_offset == hidden.first_offset
        }
        self._hidden_before = self._hidden

    async def _refresh(self, topics: tuple[str, ...]) -> None:
        read_ms = ticks_ms()
        # End offsets first, so that what was there then and is not stored yet is counted; the ids
        # after them, so that ends of a log that is no more are not taken for the new one's.
        ends = await self._kafka.end_offsets(topics)
        known = await self._kafka.topics(topics)
        rows = await self._stored(topics)
        # A topic that was made anew with fewer partitions leaves rows that no claim will ever mend.
        stored = {
            partition: offset
            for partition, offset in offsets_in_logs(rows, known).items()
            if partition in ends
        }
        self.is_of_other_logs = any(
            offset != rows[partition].next_offset for partition, offset in stored.items()
        )
        behind = {
            partition: end - stored.get(partition, 0)
            for partition, end in ends.items()
            if end > stored.get(partition, 0)
        }
        # Asked only where something waits: mostly nowhere.
        readable = await self._kafka.offsets_at("readable", tuple(behind))
        self._readable = {
            partition: max(0, until - stored.get(partition, 0))
            for partition, until in readable.items()
        }
        self._hidden = {
            partition: HiddenRecords(until, ends[partition])
            for partition, until in readable.items()
            if stored.get(partition, 0) >= until
        }
        self.counts = Counter(partition.topic for partition in ends)
        self.waiting = sum(behind.values())
        self.stored_total = sum(stored.values())
        self._topics, self._read_ms = topics, read_ms
