"""Placement: whether records stand in the partitions of their keys.

Theory. Downstream, what is complete is stated per partition. A tenant's record in another partition
than its key's would be overtaken by a statement about its own. Counts are those that the broker
says; when partitions are added, records read from then on are placed by the new count.

Refusals: `BrokerLost`, when the broker does not say of a topic that records came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from hisab_contracts.topics import partition_of
from runtime.kafka import BrokerLost, Kafka
from runtime.records import Record
from runtime.topics import misplaced

KNOWN_KEYS: Final = 100_000


class Placement:
    """Checks that records stand in the partitions of their keys, by the counts that topics have."""

    def __init__(self, kafka: Kafka) -> None:
        """Ask this cluster for the counts."""
        self._kafka = kafka
        self._counts: dict[str, int] = {}
        self._numbers: dict[tuple[str, bytes], int] = {}

    async def refusal(self, records: Sequence[Record]) -> str | None:
        """Return what is wrong with the first record that stands elsewhere, if any does."""
        if self._misplaced(records) is None:
            return None
        # Nothing is known of this topic yet, or partitions were added since we asked.
        topics = {record.topic for record in records}
        known = await self._kafka.topics(topics)
        if topics - set(known):
            # A broker that has just started does not know of all there is.
            raise BrokerLost(f"the broker does not know now: {sorted(topics - set(known))}")
        self._counts |= {name: topic.partitions for name, topic in known.items()}
        self._numbers.clear()
        found = self._misplaced(records)
        if found is None:
            return None
        record, number = found
        count = self._counts.get(record.topic, 0)
        key = record.key or b""
        return misplaced(record.topic, record.partition, record.offset, key, number, count)

    def _misplaced(self, records: Sequence[Record]) -> tuple[Record, int] | None:
        for record in records:
            if record.key is None:
                continue  # A statement about the partition, placed there on purpose.
            number = self._number(record.topic, record.key)
            if number != record.partition:
                return record, number
        return None

    def _number(self, topic: str, key: bytes) -> int:
        """Return a key's partition: found once per key, murmur2 in Python costs as much as 20."""
        number = self._numbers.get((topic, key))
        if number is None:
            count = self._counts.get(topic)
            if count is None:
                return -1
            if len(self._numbers) >= KNOWN_KEYS:
                self._numbers.clear()
            number = self._numbers[topic, key] = partition_of(key, count)
        return number
