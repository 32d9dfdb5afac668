"""Topic names, keys and the partitioner that emitters must use.

The key of a hub topic is the source without its epoch; downstream the key is the tenant. Both are
placed by Kafka's murmur2 partitioner (the Java client's default; librdkafka's differs: set
`partitioner=murmur2` there).
"""

from __future__ import annotations

import re
from typing import Final

from hisab_contracts.ids import HUB_PATTERN, HubCode

CHARGES: Final = "metering.charges.v1"
QUARANTINE: Final = "metering.quarantine.v1"
PRICES: Final = "metering.prices.v1"
HUBS: Final = "metering.hubs.v1"
DECISIONS: Final = "metering.decisions.v1"
ENTRIES: Final = "ledger.entries.v1"
ALERTS: Final = "ledger.alerts.v1"
TENANTS: Final = "ledger.tenants.v1"
ACCESS: Final = "ledger.access.v1"
DOCUMENTS: Final = "invoicing.documents.v1"

_HUB_TOPIC = re.compile(rf"hub\.({HUB_PATTERN})\.usage\.v1")


def hub_topic(hub: HubCode) -> str:
    """Return the topic a hub writes its usage to."""
    return f"hub.{hub}.usage.v1"


def hub_of_topic(topic: str) -> HubCode | None:
    """Return the hub that writes a topic, or None when it is not a hub's topic."""
    match = _HUB_TOPIC.fullmatch(topic)
    return None if match is None else HubCode(match[1])


def partition_of(key: bytes, partitions: int) -> int:
    """Return the partition that Kafka's default partitioner gives a key."""
    return (_murmur2(key) & 0x7FFFFFFF) % partitions


def _murmur2(data: bytes) -> int:
    """Murmur2 with Kafka's seed, 32 bits (org.apache.kafka.common.utils.Utils.murmur2)."""
    m, mask, length = 0x5BD1E995, 0xFFFFFFFF, len(data)
    h = 0x9747B28C ^ length
    for start in range(0, length - length % 4, 4):
        k = int.from_bytes(data[start : start + 4], "little")
        k = (k * m) & mask
        k ^= k >> 24
        h = ((h * m) & mask) ^ ((k * m) & mask)
    tail = data[length - length % 4 :]
    if tail:
        h = ((h ^ int.from_bytes(tail, "little")) * m) & mask
    h ^= h >> 13
    h = (h * m) & mask
    return h ^ (h >> 15)
