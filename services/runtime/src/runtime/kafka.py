"""The only module that sees aiokafka: a thin driver for `machine`, a publisher, topic questions.

Theory. `Consumer` owns one aiokafka consumer whose group never has committed offsets
(`auto_offset_reset=none`): a partition cannot be read before the machine has claimed and sought it.
The rebalance listener only raises a flag; everything else happens in the main loop. Each batch is
one PostgreSQL transaction: its first statement advances the progress rows, then the handler runs.
How far we are is committed as a hint for lag tools under `<group>.hint`, at most every second, by a
client of its own that never holds a batch up. A watchdog thread ends the process with status 70
when records wait and nothing has moved for 30 s, whatever the event loop does.

Refusals: `Halted` (see `machine`), after which the process must end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, assert_never

import msgspec
import structlog
from aiokafka import (  # type: ignore[import-untyped]
    AIOKafkaConsumer,
    AIOKafkaProducer,
    ConsumerRebalanceListener,
    TopicPartition,
)
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import KafkaError, OffsetOutOfRangeError, NoOffsetForPartitionError

from hisab_contracts.topics import partition_of
from runtime import database as store
from runtime import telemetry
from runtime.database import Database
from runtime.machine import (
    Action,
    Assigned,
    ClaimPartitions,
    Claimed,
    Committed,
    Event,
    Failed,
    Fenced,
    Fetched,
    Halt,
    Hint,
    Machine,
    OutOfRange,
    Partition,
    Pause,
    Process,
    Seek,
    Slice,
    Watch,
)

if TYPE_CHECKING:
    from runtime.database import Connection

Headers = Sequence[tuple[str, bytes]]

EXIT_STUCK: Final = 70
MAX_MESSAGE_BYTES: Final = 1_048_588
LAG_FRESH_S: Final = 0.25
HINT_EVERY_S: Final = 1.0
DISCOVER_EVERY_S: Final = 0.5

_log = structlog.get_logger("runtime.kafka")


class Record(msgspec.Struct, frozen=True, gc=False):
    """One message as the broker gave it. Bytes are not decoded and not checked."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    """The broker's time on hub topics (LogAppendTime), else the producer's."""
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one transaction takes: records grouped by partition, in offset order within each."""

    records: Sequence[Record]
    positions: Mapping[Partition, int]
    """Per partition, the next offset once this batch is committed."""


Handler = Callable[[Batch, "Connection"], Awaitable[None]]
UnreadHandler = Callable[[Record, "Connection"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Subscription:
    """What one consumer reads and who handles it."""

    group: str
    """The consuming group; it never commits. Hints go to `<group>.hint`."""
    topics: tuple[str, ...]
    handle: Handler
    """Runs inside the batch's transaction; raising rolls all of it back and tries again."""
    on_unread: UnreadHandler | None = None
    """Stores a record that killed the process, without decoding it. Without one it is tried
    again, one by one, for ever: loud, and nothing is lost."""
    compacted: bool = False
    """Reference data: begin at the first offset there is, whatever it is."""
    max_records: int = 2_000


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as its producing service creates it."""

    name: str
    partitions: int
    compacted: bool = False
    log_append_time: bool = False


class Halted(Exception):
    """The consumer must not go on; the message says why."""


class PublishFailed(Exception):
    """The broker did not acknowledge; what was sent may or may not be there."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message to publish. Without a partition the key decides (murmur2)."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    partition: int | None = None


class Kafka:
    """What a service asks of the cluster: topics, end offsets, consumers, a publisher."""

    def __init__(self, bootstrap: str, *, client: str, instance: str, replication: int = 1) -> None:
        """Describe the cluster; `instance` names this process within its groups, stably."""
        self.bootstrap = bootstrap
        self.client = client
        self.instance = instance
        self._replication = replication

    async def open(self) -> None:
        """Connect; waits until the broker answers."""

    async def close(self) -> None:
        """Close every client."""

    async def create_topics(self, topics: Sequence[Topic]) -> None:
        """Create what is missing; more partitions are added, never fewer."""

    async def partitions(self, topics: Iterable[str]) -> tuple[Partition, ...]:
        """Return every partition of the topics that exist now, without creating any."""
        raise NotImplementedError

    async def end_offsets(self, topics: Iterable[str]) -> dict[Partition, int]:
        """Return the end offset of every partition of these topics, as of now."""
        raise NotImplementedError

    async def publish(self, messages: Sequence[Message]) -> tuple[tuple[int, int], ...]:
        """Publish and wait for `acks=all`; returns (partition, offset) per message, in order.

        Raises `PublishFailed` when any is not acknowledged.
        """
        raise NotImplementedError


class Consumer:
    """Reads one subscription until it is stopped."""

    def __init__(self, kafka: Kafka, database: Database, subscription: Subscription) -> None:
        """Describe the consumer; nothing is read before `run`."""

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics it follows now."""
        raise NotImplementedError

    def extend(self, topics: Iterable[str]) -> None:
        """Follow more topics from now on, each from its first record."""

    async def run(self, stop: asyncio.Event) -> None:
        """Read and process until `stop`; finishes the transaction in flight, then returns."""

    async def lag_records(self) -> int:
        """Return how many records wait, over all partitions; end offsets at most 0.5 s old."""
        raise NotImplementedError

    async def positions(self) -> dict[Partition, int]:
        """Return the committed next offset of every partition of the topics it follows."""
        raise NotImplementedError
