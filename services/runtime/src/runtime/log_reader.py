"""Reads partitions from stated offsets to stated ends, outside any consuming group.

Theory. A consumer shares its partitions with others and goes on for ever. Some work needs the other
kind of reading: all of a topic, or all up to what was there at one instant, whoever else reads it.
Where it begins and what it has done is the caller's to know; nothing is committed anywhere.

Refusals: `OutOfRangeError` (the broker no longer has what is asked for), `BrokerLost` (also when
nothing comes for too long although the end was not reached).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final

from runtime.clock import ticks_ms
from runtime.feed import Feed, Fetch
from runtime.kafka import BrokerLost, Kafka
from runtime.machine import Partition
from runtime.records import Record

MAX_RECORDS: Final = 2_000
WAIT_MS: Final = 500
STANDSTILL_MS: Final = 30_000


class LogReader:
    """An open reader of partitions."""

    def __init__(self, kafka: Kafka, offsets: Mapping[Partition, int]) -> None:
        """Read these partitions, each from its offset on."""
        self._feed = Feed(kafka, None)
        self._offsets = dict(offsets)

    async def open(self) -> None:
        """Connect, and seek each partition."""
        await self._feed.open({partition.topic for partition in self._offsets})
        for partition, offset in self._offsets.items():
            self._feed.seek(partition, offset)

    async def read(self, partitions: Sequence[Partition] | None = None) -> Sequence[Fetch]:
        """Return what has arrived in these partitions (all of them), after half a second if none.

        Pieces of one partition follow each other without a gap.
        """
        wanted = tuple(self._offsets) if partitions is None else partitions
        return await self._feed.fetch(wanted, wait_ms=WAIT_MS, max_records=MAX_RECORDS)

    async def close(self) -> None:
        """Disconnect."""
        await self._feed.close()


async def read_to_ends(
    kafka: Kafka,
    offsets: Mapping[Partition, int],
    ends: Mapping[Partition, int],
    *,
    standstill_ms: int = STANDSTILL_MS,
) -> AsyncIterator[Sequence[Record]]:
    """Yield the records of each partition in [offset, end), in order within a partition."""
    left = {part: offset for part, offset in offsets.items() if offset < ends[part]}
    if not left:
        return
    reader = LogReader(kafka, left)
    moved_ms = ticks_ms()
    try:
        await reader.open()
        while left:
            fetched = await reader.read(tuple(left))
            if fetched:
                moved_ms = ticks_ms()
            elif ticks_ms() - moved_ms > standstill_ms:
                held = ", ".join(str(partition) for partition in sorted(left))
                raise BrokerLost(
                    f"nothing more came of {held}: the broker does not answer, or a transaction "
                    "stays open there"
                )
            for piece in fetched:
                # More may have come since the ends were named; whoever asks again gets that.
                records = [r for r in piece.records if r.offset < ends[piece.partition]]
                if records:
                    yield records
                if piece.until >= ends[piece.partition]:
                    del left[piece.partition]
    finally:
        await reader.close()
