"""What we ask of Kafka, through aiokafka: topics, offsets, a publisher.

Theory. `Kafka` is what one process asks of the cluster. Its publisher is idempotent with `acks=all`
and places keys by murmur2; after any failure it begins with a fresh producer, because an idempotent
one does not always recover. A partition has two ends: the *real* one behind the last record that
was acknowledged, and the *readable* one, which an open transaction holds back: a record behind it
is acknowledged and will count unless its transaction is aborted, so lag and barriers go by the real
end although we read only what is committed. What is read is in `runtime.feed`.

Refusals: `PublishFailed` (unknown outcome: send again), `MessageTooLarge` (nothing was sent),
`PartitionMismatch`, `BrokerLost` for whatever else goes wrong between us and the broker.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol, TypeVar

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, NoError, TopicAlreadyExistsError, for_code

from hisab_contracts.topics import partition_of
from runtime.machine import Partition
from runtime.outages import Outage
from runtime.topics import ExistingTopic, PartitionMismatch, describe_topics

Headers = Sequence[tuple[str, bytes | None]]

MAX_MESSAGE_BYTES: Final = 1_048_588
"""What a topic takes by default, as a record batch of one."""

IN_MEMORY_CLUSTER: Final = "mockCluster"
"""How librdkafka's in-memory broker names itself."""

FEW_MESSAGES: Final = 32
PRODUCE_BATCH_BYTES: Final = 262_144
METADATA_MAX_AGE_MS: Final = 1_000
REQUEST_TIMEOUT_MS: Final = 10_000
CLOSE_TIMEOUT_S: Final = 5


@dataclass(frozen=True, slots=True)
class Message:
    """One message to publish. Without a partition the key decides (murmur2)."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    partition: int | None = None


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as its producing service creates it."""

    name: str
    partitions: int
    compacted: bool = False
    log_append_time: bool = False
    kept_for_ever: bool = False
    """Facts that a restored service compares itself with, or takes back."""


class PublishFailed(Outage):
    """The broker did not acknowledge; what was sent may or may not be there."""


class MessageTooLarge(Exception):
    """A message is larger than a topic takes; nothing was sent."""


class BrokerLost(Outage):
    """The broker could not be asked, or refused; the cause says why."""


@contextlib.contextmanager
def broker_errors() -> Iterator[None]:
    """Let no aiokafka error leave the modules that know aiokafka."""
    try:
        yield
    except (KafkaError, OSError) as error:
        raise BrokerLost(repr(error)) from error


class Kafka:
    """What a service asks of the cluster: topics, end offsets, a publisher. One per process."""

    def __init__(self, bootstrap: str, *, client: str, instance: str, replication: int = 1) -> None:
        """Describe the cluster; `instance` names this process within its groups, stably."""
        self.bootstrap = bootstrap
        self.client = client
        self.instance = instance
        self._replication = replication
        self._in_memory: bool | None = None
        self._admin: AIOKafkaAdminClient | None = None
        self._probes: dict[str, AIOKafkaConsumer] = {}
        self._producer: AIOKafkaProducer | None = None
        self._connecting = asyncio.Lock()

    async def close(self) -> None:
        """Close every client; bounded, because `stop` can hang."""
        clients = [
            *([self._producer.stop()] if self._producer else []),
            *(probe.stop() for probe in self._probes.values()),
            *([self._admin.close()] if self._admin else []),
        ]
        self._producer, self._probes, self._admin = None, {}, None
        with contextlib.suppress(KafkaError, TimeoutError, OSError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await asyncio.gather(*clients, return_exceptions=True)

    async def topics(self, names: Iterable[str] | None = None) -> dict[str, ExistingTopic]:
        """Return those of these topics that exist, or all there are, without creating any."""
        wanted = None if names is None else sorted(set(names))
        # The in-memory broker makes a topic when it is asked about by name.
        asked = None if await self.is_in_memory() else wanted
        with broker_errors():
            found = await describe_topics(await self._open_admin(), asked)
        if wanted is None:
            return found
        return {name: found[name] for name in wanted if name in found}

    async def partition_count(self, topic: str) -> int:
        """Return how many partitions a topic has now; 0 while it does not exist."""
        found = await self.topics([topic])
        return found[topic].partitions if topic in found else 0

    async def create_topics(self, topics: Sequence[Topic]) -> None:
        """Create what is missing. What exists is left as it is."""
        existing = await self.topics(topic.name for topic in topics)
        missing = [topic for topic in topics if topic.name not in existing]
        if not missing:
            return
        with broker_errors():
            admin = await self._open_admin()
            if await self.is_in_memory():
                # It cannot create topics, but makes one when it is asked about.
                await admin.describe_topics([topic.name for topic in missing])
                return
            answer = await admin.create_topics([self._new_topic(topic) for topic in missing])
            for name, code, *_ in answer.topic_errors:
                error = for_code(code)
                if error not in (NoError, TopicAlreadyExistsError):
                    raise error(f"topic {name} was not created")

    async def is_in_memory(self) -> bool:
        """Say whether the cluster is librdkafka's in-memory one, which lacks some abilities."""
        if self._in_memory is None:
            with broker_errors():
                cluster = await (await self._open_admin()).describe_cluster()
            self._in_memory = str(cluster["cluster_id"]).startswith(IN_MEMORY_CLUSTER)
        return self._in_memory

    def _new_topic(self, topic: Topic) -> NewTopic:
        configs = {"min.insync.replicas": str(max(1, self._replication - 1))}
        if topic.compacted:
            configs["cleanup.policy"] = "compact"
        if topic.kept_for_ever:
            configs["retention.ms"] = "-1"
        if topic.log_append_time:
            configs["message.timestamp.type"] = "LogAppendTime"
        return NewTopic(topic.name, topic.partitions, self._replication, topic_configs=configs)

    async def partitions(self, topics: Iterable[str]) -> tuple[Partition, ...]:
        """Return every partition of those of these topics that exist now."""
        return tuple(
            Partition(name, number)
            for name, topic in (await self.topics(topics)).items()
            for number in range(topic.partitions)
        )

    async def end_offsets(self, topics: Iterable[str]) -> dict[Partition, int]:
        """Return the real end of every partition of these topics, as of now."""
        return await self.offsets_at("end", await self.partitions(topics))

    async def offsets_at(
        self, place: Literal["beginning", "end", "readable"], partitions: Sequence[Partition]
    ) -> dict[Partition, int]:
        """Return the first offsets the broker has, the real ends, or how far can be read now.

        What is readable ends before the first record of the oldest transaction that is open.
        """
        if not partitions:
            return {}
        wanted = [TopicPartition(*partition) for partition in partitions]
        with broker_errors():
            probe = await self._open_probe(
                "read_committed" if place == "readable" else "read_uncommitted"
            )
            ask = probe.beginning_offsets if place == "beginning" else probe.end_offsets
            found = await ask(wanted)
        return {Partition(*partition): offset for partition, offset in found.items()}

    async def group_offsets(
        self, group: str, partitions: Sequence[Partition]
    ) -> dict[Partition, int]:
        """Return what a group has committed; partitions without a commit are left out."""
        wanted = [TopicPartition(*partition) for partition in partitions]
        with broker_errors():
            admin = await self._open_admin()
            found = await admin.list_consumer_group_offsets(group, partitions=wanted)
        return {Partition(*where): what.offset for where, what in found.items() if what.offset >= 0}

    async def publish(self, messages: Sequence[Message]) -> tuple[tuple[int, int], ...]:
        """Publish and wait for `acks=all`; returns (partition, offset) per message, in order.

        Messages of one partition keep their order. Raises `MessageTooLarge` before anything is
        sent, `PublishFailed` when any is not acknowledged: resend all of them. Raises
        `PartitionMismatch`, before anything is sent, for a partition that a topic does not have.
        """
        # Before anything is sent: half a batch in the topic would have to be explained.
        for message in messages:
            if _size(message) > MAX_MESSAGE_BYTES:
                raise MessageTooLarge(f"{_size(message)} bytes for {message.topic}")
        try:
            producer = await self._open_producer()
            await _require_partitions(producer, messages)
            if len(messages) <= FEW_MESSAGES:
                return await _publish_few(producer, messages)
            return await _publish_many(producer, messages)
        except (KafkaError, BrokerLost, OSError) as error:
            await self._drop_producer()
            raise PublishFailed(str(error) or type(error).__name__) from error

    async def _drop_producer(self) -> None:
        """Begin with a fresh producer: an idempotent one does not always recover from an error."""
        producer, self._producer = self._producer, None
        if producer is None:
            return
        with contextlib.suppress(KafkaError, TimeoutError, OSError):
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await producer.stop()
            finally:
                # `stop` waits for what is not sent yet. Cut off there, it leaves a sender that may
                # write after the fresh producer did.
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    try:
                        await producer._sender.close()  # noqa: SLF001 - aiokafka has no door
                    finally:
                        await producer.client.close()

    async def _open_producer(self) -> AIOKafkaProducer:
        async with self._connecting:
            if self._producer is None:
                producer = AIOKafkaProducer(
                    bootstrap_servers=self.bootstrap,
                    client_id=self.client,
                    enable_idempotence=True,
                    max_batch_size=PRODUCE_BATCH_BYTES,
                    max_request_size=2 * MAX_MESSAGE_BYTES,
                    metadata_max_age_ms=METADATA_MAX_AGE_MS,
                )
                self._producer = await started(producer, producer.stop)
            return self._producer

    async def _open_admin(self) -> AIOKafkaAdminClient:
        async with self._connecting:
            if self._admin is None:
                admin = AIOKafkaAdminClient(
                    bootstrap_servers=self.bootstrap,
                    client_id=self.client,
                    request_timeout_ms=REQUEST_TIMEOUT_MS,
                    metadata_max_age_ms=METADATA_MAX_AGE_MS,
                )
                self._admin = await started(admin, admin.close)
            return self._admin

    async def _open_probe(
        self, isolation: Literal["read_committed", "read_uncommitted"]
    ) -> AIOKafkaConsumer:
        async with self._connecting:
            if isolation not in self._probes:
                probe = AIOKafkaConsumer(
                    bootstrap_servers=self.bootstrap,
                    client_id=self.client,
                    isolation_level=isolation,
                    request_timeout_ms=REQUEST_TIMEOUT_MS,
                    metadata_max_age_ms=METADATA_MAX_AGE_MS,
                    enable_auto_commit=False,
                )
                self._probes[isolation] = await started(probe, probe.stop)
            return self._probes[isolation]


class _Startable(Protocol):
    """What we ask of a client of aiokafka, which has no types, before it is used."""

    async def start(self) -> None: ...


Client = TypeVar("Client", bound=_Startable)


async def started(client: Client, close: Callable[[], Awaitable[None]]) -> Client:
    """Start an aiokafka client, or close it and say why not."""
    try:
        with broker_errors():
            await client.start()
    except BaseException:
        await close()
        raise
    return client


async def _require_partitions(producer: AIOKafkaProducer, messages: Sequence[Message]) -> None:
    """Refuse a partition that its topic does not have: aiokafka takes it for a defect of ours."""
    highest: dict[str, int] = {}
    for message in messages:
        if message.partition is not None:
            highest[message.topic] = max(highest.get(message.topic, 0), message.partition)
    for topic, number in highest.items():
        count = len(await producer.partitions_for(topic))
        if number >= count:
            # What it knows may be a second old, and partitions were added since.
            await producer.client.force_metadata_update()
            count = len(await producer.partitions_for(topic))
        if number >= count:
            raise PartitionMismatch(
                f"a message waits for partition {number} of {topic}, which has {count} partitions:"
                f" the topic was made anew with fewer. Add partitions until there are {number + 1}"
                " (kafka-topics.sh --alter --partitions), then start again"
            )


async def _publish_few(
    producer: AIOKafkaProducer, messages: Sequence[Message]
) -> tuple[tuple[int, int], ...]:
    """Let the producer coalesce messages of concurrent callers."""
    sent = [
        await producer.send(
            message.topic,
            value=message.value,
            key=message.key,
            partition=message.partition,
            headers=list(message.headers),
        )
        for message in messages
    ]
    answers = await asyncio.gather(*sent)
    return tuple((answer.partition, answer.offset) for answer in answers)


class _Acknowledged(Protocol):
    """The broker's answer: where a message, or the first of a batch, stands."""

    partition: int
    offset: int


class _BatchBuilder(Protocol):
    """A batch that is being built; `append` says None when it is full."""

    def append(
        self,
        *,
        key: bytes | None,
        value: bytes | None,
        timestamp: int | None,
        headers: list[tuple[str, bytes | None]],
    ) -> object | None: ...


class _OpenBatch(NamedTuple):
    """A batch of one partition, and which messages it holds, in order."""

    where: tuple[str, int]
    """Topic and partition number."""
    builder: _BatchBuilder
    indexes: list[int]


async def _publish_many(
    producer: AIOKafkaProducer, messages: Sequence[Message]
) -> tuple[tuple[int, int], ...]:
    """Build whole batches per partition: one future per batch, not per message."""
    # Found once per topic and key: murmur2 in Python is most of what publishing would cost.
    numbers = await _partition_numbers(producer, messages)
    open_batches: dict[tuple[str, int], _OpenBatch] = {}
    batches: list[_OpenBatch] = []
    for index, (message, number) in enumerate(zip(messages, numbers, strict=True)):
        where = (message.topic, number)
        batch = open_batches.get(where)
        if batch is None or not _appended(batch.builder, message):
            batch = open_batches[where] = _OpenBatch(where, producer.create_batch(), [])
            batches.append(batch)
            # An empty batch takes any message that is no larger than a topic takes.
            _appended(batch.builder, message)
        batch.indexes.append(index)
    # Batches of one partition are sent in the order in which they were begun.
    sending = [
        await producer.send_batch(batch.builder, batch.where[0], partition=batch.where[1])
        for batch in batches
    ]
    answers: list[_Acknowledged] = await asyncio.gather(*sending)
    places: list[tuple[int, int]] = [(-1, -1)] * len(messages)
    for answer, batch in zip(answers, batches, strict=True):
        for place, index in enumerate(batch.indexes):
            places[index] = (answer.partition, answer.offset + place)
    return tuple(places)


async def _partition_numbers(producer: AIOKafkaProducer, messages: Sequence[Message]) -> list[int]:
    """Return the partition of each message: the one it names, or that of its key."""
    counts: dict[str, int] = {}
    of_key: dict[tuple[str, bytes | None], int] = {}
    numbers = []
    for message in messages:
        number = message.partition
        if number is None:
            number = of_key.get((message.topic, message.key))
        if number is None:
            topic = message.topic
            if topic not in counts:
                counts[topic] = len(await producer.partitions_for(topic))
            number = partition_of(message.key or b"", counts[topic])
            of_key[topic, message.key] = number
        numbers.append(number)
    return numbers


def _appended(batch: _BatchBuilder, message: Message) -> bool:
    appended = batch.append(
        key=message.key, value=message.value, timestamp=None, headers=list(message.headers)
    )
    return appended is not None


def _size(message: Message) -> int:
    """Bound the bytes a message takes as a record batch of its own."""
    headers = sum(len(name) + len(value or b"") + 16 for name, value in message.headers)
    return len(message.key or b"") + len(message.value or b"") + headers + 128
