"""Messages that leave with the facts: rows in the facts' transaction, one leased relay per topic.

Theory. `Outbox.write` inserts rows in the caller's transaction. The relay of a topic holds a lease,
reads the lowest rows first, publishes them in id order per partition, stops at the first failure,
and deletes after the broker's acknowledgement: a crash in between publishes twice, never zero times.
There is no cursor, so a row of a transaction that commits late is still found; polls start at a
floor below which no row can appear any more (every transaction that could have drawn such a number
has ended: each row's transaction has its id before it draws its number).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.database import Database
from runtime.kafka import Kafka, Message

if TYPE_CHECKING:
    from runtime.database import Connection


class Outbox:
    """What the service publishes with its facts. One per process."""

    def __init__(self, topics: Sequence[str]) -> None:
        """Name every topic that may be written; each needs a relay."""

    async def write(self, connection: Connection, messages: Sequence[Message]) -> None:
        """Insert messages in the caller's transaction, in order; the relay wakes after COMMIT."""

    async def depth(self, connection: Connection) -> int:
        """Count the messages committed and not yet acknowledged (an exact count)."""
        raise NotImplementedError


class Relay:
    """Publishes one topic's rows while it holds the topic's lease."""

    def __init__(self, outbox: Outbox, topic: str, database: Database, kafka: Kafka) -> None:
        """Describe the relay; nothing is read before `run`."""

    async def run(self, stop: asyncio.Event) -> None:
        """Relay until `stop`, then flush what is left within 5 s."""
