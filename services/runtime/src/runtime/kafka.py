"""What we ask of Kafka, through aiokafka: topics and offsets, a publisher, a feed of records.

Theory. `Kafka` is what one process asks of the cluster. Its publisher is idempotent with `acks=all`
and places keys by murmur2; after any failure it begins with a fresh producer, because an idempotent
one does not always recover. A `Feed` is one member of a consuming group that never has committed
offsets (`auto_offset_reset=none`): a partition gives nothing before it was sought. The rebalance
listener only counts; whoever drives the feed looks at `rebalances`. How far we are is committed for
lag tools under a second group (`Hints`), at most every second, by a client of its own.

Refusals: `PublishFailed` (unknown outcome: send again), `MessageTooLarge` (nothing was sent),
`BrokerLost` for whatever else goes wrong between us and the broker, `OutOfRangeError`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol, TypeVar

import structlog
from aiokafka import (
    AIOKafkaConsumer,
    AIOKafkaProducer,
    ConsumerRebalanceListener,
    TopicPartition,
)
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import (
    IllegalStateError,
    KafkaError,
    NoError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    TopicAlreadyExistsError,
    for_code,
)

from hisab_contracts.topics import partition_of
from runtime.machine import Partition
from runtime.outages import Outage
from runtime.records import RawMessage, Record, Reread, record_of, reread

Headers = Sequence[tuple[str, bytes | None]]

MAX_MESSAGE_BYTES: Final = 1_048_588
"""What a topic takes by default, as a record batch of one."""

IN_MEMORY_CLUSTER: Final = "mockCluster"
"""How librdkafka's in-memory broker names itself."""

FEW_MESSAGES: Final = 32
PRODUCE_BATCH_BYTES: Final = 262_144
METADATA_MAX_AGE_MS: Final = 1_000
REQUEST_TIMEOUT_MS: Final = 10_000
SETTLE_S: Final = 0.02
SESSION_TIMEOUT_MS: Final = 45_000
REBALANCE_TIMEOUT_MS: Final = 60_000
FETCH_WAIT_MS: Final = 100
PARTITION_FETCH_BYTES: Final = 4 * 1024 * 1024
FETCH_BYTES: Final = 16 * 1024 * 1024
HINT_EVERY_S: Final = 1.0
HINT_TIMEOUT_S: Final = 5
CLOSE_TIMEOUT_S: Final = 5

_log = structlog.get_logger("runtime.kafka")


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


class PublishFailed(Outage):
    """The broker did not acknowledge; what was sent may or may not be there."""


class MessageTooLarge(Exception):
    """A message is larger than a topic takes; nothing was sent."""


class BrokerLost(Outage):
    """The broker could not be asked, or refused; the cause says why."""


class OutOfRangeError(Exception):
    """The broker does not have the offset that was sought in this partition."""

    def __init__(self, partition: Partition) -> None:
        """Name the partition."""
        super().__init__(partition)
        self.partition = partition


@contextlib.contextmanager
def _broker_errors() -> Iterator[None]:
    """Let no aiokafka error leave this module."""
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
        self._probe: AIOKafkaConsumer | None = None
        self._producer: AIOKafkaProducer | None = None
        self._connecting = asyncio.Lock()

    async def close(self) -> None:
        """Close every client; bounded, because `stop` can hang."""
        clients = [
            *([self._producer.stop()] if self._producer else []),
            *([self._probe.stop()] if self._probe else []),
            *([self._admin.close()] if self._admin else []),
        ]
        self._producer = self._probe = self._admin = None
        with contextlib.suppress(KafkaError, TimeoutError, OSError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await asyncio.gather(*clients, return_exceptions=True)

    async def topics(self) -> dict[str, int]:
        """Return the partition count of every topic there is, without creating any."""
        with _broker_errors():
            admin = await self._open_admin()
            described = await admin.describe_topics(None)
        return {
            row["topic"]: len(row["partitions"])
            for row in described
            if row["error_code"] == 0 and row["partitions"]
        }

    async def create_topics(self, topics: Sequence[Topic]) -> None:
        """Create what is missing. What exists is left as it is."""
        existing = await self.topics()
        missing = [topic for topic in topics if topic.name not in existing]
        if not missing:
            return
        with _broker_errors():
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
            with _broker_errors():
                cluster = await (await self._open_admin()).describe_cluster()
            self._in_memory = str(cluster["cluster_id"]).startswith(IN_MEMORY_CLUSTER)
        return self._in_memory

    def _new_topic(self, topic: Topic) -> NewTopic:
        configs = {"min.insync.replicas": str(max(1, self._replication - 1))}
        if topic.compacted:
            configs["cleanup.policy"] = "compact"
        if topic.log_append_time:
            configs["message.timestamp.type"] = "LogAppendTime"
        return NewTopic(topic.name, topic.partitions, self._replication, topic_configs=configs)

    async def partitions(self, topics: Iterable[str]) -> tuple[Partition, ...]:
        """Return every partition of those of these topics that exist now."""
        known = await self.topics()
        return tuple(
            Partition(topic, number)
            for topic in sorted(set(topics))
            for number in range(known.get(topic, 0))
        )

    async def end_offsets(self, topics: Iterable[str]) -> dict[Partition, int]:
        """Return the end offset of every partition of these topics, as of now."""
        return await self.offsets_at("end", await self.partitions(topics))

    async def offsets_at(
        self, place: Literal["beginning", "end"], partitions: Sequence[Partition]
    ) -> dict[Partition, int]:
        """Return the first offsets the broker has, or those after the last readable record."""
        if not partitions:
            return {}
        wanted = [TopicPartition(*partition) for partition in partitions]
        with _broker_errors():
            probe = await self._open_probe()
            ask = probe.end_offsets if place == "end" else probe.beginning_offsets
            found = await ask(wanted)
        return {Partition(*partition): offset for partition, offset in found.items()}

    async def group_offsets(
        self, group: str, partitions: Sequence[Partition]
    ) -> dict[Partition, int]:
        """Return what a group has committed; partitions without a commit are left out."""
        wanted = [TopicPartition(*partition) for partition in partitions]
        with _broker_errors():
            admin = await self._open_admin()
            found = await admin.list_consumer_group_offsets(group, partitions=wanted)
        return {Partition(*where): what.offset for where, what in found.items() if what.offset >= 0}

    async def publish(self, messages: Sequence[Message]) -> tuple[tuple[int, int], ...]:
        """Publish and wait for `acks=all`; returns (partition, offset) per message, in order.

        Messages of one partition keep their order. Raises `MessageTooLarge` before anything is
        sent, `PublishFailed` when any is not acknowledged: resend all of them.
        """
        # Before anything is sent: half a batch in the topic would have to be explained.
        for message in messages:
            if _size(message) > MAX_MESSAGE_BYTES:
                raise MessageTooLarge(f"{_size(message)} bytes for {message.topic}")
        try:
            producer = await self._open_producer()
            if len(messages) <= FEW_MESSAGES:
                return await _publish_few(producer, messages)
            return await _publish_many(producer, messages)
        except (KafkaError, BrokerLost, OSError) as error:
            await self._drop_producer()
            raise PublishFailed(str(error) or type(error).__name__) from error

    async def _drop_producer(self) -> None:
        """Begin with a fresh producer: an idempotent one does not always recover from an error."""
        producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(KafkaError, TimeoutError, OSError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await producer.stop()

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
                self._producer = await _started(producer, producer.stop)
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
                self._admin = await _started(admin, admin.close)
            return self._admin

    async def _open_probe(self) -> AIOKafkaConsumer:
        async with self._connecting:
            if self._probe is None:
                probe = AIOKafkaConsumer(
                    bootstrap_servers=self.bootstrap,
                    client_id=self.client,
                    isolation_level="read_committed",
                    request_timeout_ms=REQUEST_TIMEOUT_MS,
                    metadata_max_age_ms=METADATA_MAX_AGE_MS,
                    enable_auto_commit=False,
                )
                self._probe = await _started(probe, probe.stop)
            return self._probe


class _Startable(Protocol):
    """What we ask of a client of aiokafka, which has no types, before it is used."""

    async def start(self) -> None: ...


Client = TypeVar("Client", bound=_Startable)


async def _started(client: Client, close: Callable[[], Awaitable[None]]) -> Client:
    """Start an aiokafka client, or close it and say why not."""
    try:
        with _broker_errors():
            await client.start()
    except BaseException:
        await close()
        raise
    return client


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


@ConsumerRebalanceListener.register
class _Flag:
    """Counts rebalances; whatever must be done about one is done by who drives the feed."""

    def __init__(self) -> None:
        self.rebalances = 0

    def on_partitions_revoked(self, _revoked: object) -> None:
        self.rebalances += 1

    def on_partitions_assigned(self, _assigned: object) -> None:
        self.rebalances += 1


@dataclass(frozen=True, slots=True)
class Fetch:
    """What one fetch brought of one partition: every record in [begun_offset, until)."""

    partition: Partition
    begun_offset: int
    until: int
    records: Sequence[Record]


class Feed:
    """One member of a consuming group. Nothing comes from a partition before it was sought."""

    def __init__(self, kafka: Kafka, group: str | None) -> None:
        """Describe the member; `open` joins the group. Without one it reads all partitions."""
        self._kafka = kafka
        self._is_alone = group is None
        self._flag = _Flag()
        self._positions: dict[Partition, int] = {}
        self._refused: set[TopicPartition] = set()
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=kafka.bootstrap,
            client_id=kafka.client,
            group_id=group,
            group_instance_id=None if group is None else f"{group}-{kafka.instance}",
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            partition_assignment_strategy=(StickyPartitionAssignor,),
            session_timeout_ms=SESSION_TIMEOUT_MS,
            rebalance_timeout_ms=REBALANCE_TIMEOUT_MS,
            metadata_max_age_ms=METADATA_MAX_AGE_MS,
            fetch_max_wait_ms=FETCH_WAIT_MS,
            max_partition_fetch_bytes=PARTITION_FETCH_BYTES,
            fetch_max_bytes=FETCH_BYTES,
        )

    @property
    def rebalances(self) -> int:
        """Counts up whenever partitions were taken or given: what was fetched before is void."""
        return self._flag.rebalances

    async def open(self, topics: Iterable[str]) -> None:
        """Join the group; returns once partitions are assigned.

        It joins twice: a static member that returns is given what it had before, whatever it asks
        for now; only the second time does the broker look at its topics.
        """
        self._is_alone = self._is_alone or await self._kafka.is_in_memory()
        if not self._is_alone:
            await self.follow(topics)
        with _broker_errors():
            await self._consumer.start()
        # aiokafka's fetcher wakes for the first assignment and must find it still standing.
        await asyncio.sleep(SETTLE_S)
        await self.follow(topics)

    async def follow(self, topics: Iterable[str]) -> None:
        """Read exactly these topics (they must exist) from now on."""
        if self._is_alone:
            # In no group; or in one of the in-memory broker, which needs most of a session's length
            # to rebalance a group of one.
            partitions = await self._kafka.partitions(topics)
            self._consumer.assign([TopicPartition(*partition) for partition in partitions])
            self._flag.rebalances += 1
        else:
            self._consumer.subscribe(sorted(topics), listener=self._flag)

    async def close(self) -> None:
        """Leave; bounded, because aiokafka's `stop` can hang."""
        with contextlib.suppress(KafkaError, TimeoutError, OSError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                try:
                    await self._consumer.stop()
                finally:
                    # `stop` does not come to this when its fetcher has died.
                    await self._consumer._client.close()  # noqa: SLF001

    def assigned(self) -> tuple[Partition, ...]:
        """Return the partitions the group has given us."""
        return tuple(sorted(Partition(*where) for where in self._consumer.assignment()))

    def seek(self, partition: Partition, offset: int) -> None:
        """Go on at this offset; whatever was prefetched is thrown away."""
        self._positions[partition] = offset
        # An unassigned partition is not ours any more: `rebalances` says so.
        with contextlib.suppress(IllegalStateError):
            self._consumer.seek(TopicPartition(*partition), offset)

    async def fetch(
        self, partitions: Iterable[Partition], *, wait_ms: int, max_records: int
    ) -> tuple[Fetch, ...]:
        """Return what has arrived in these (sought) partitions; may be cancelled without loss."""
        wanted = [TopicPartition(*partition) for partition in partitions]
        fetched = []
        before = self._flag.rebalances
        if self._consumer._fetcher.error_future.done():  # noqa: SLF001 - it dies without a word
            raise BrokerLost("aiokafka's fetcher has ended")
        with _broker_errors():
            try:
                again = await self._reread(wanted, max_records)
                brought = await self._brought(wanted, 0 if again else wait_ms, max_records)
                if self._flag.rebalances != before:
                    return ()
                for where in wanted:
                    partition = Partition(*where)
                    begun_offset = self._positions.get(partition, -1)
                    if where in again:
                        until, records = again[where].until, again[where].records
                        self._consumer.seek(where, until)
                    else:
                        until = await self._consumer.position(where)
                        records = [record_of(message) for message in brought.get(where, ())]
                    if until != begun_offset:
                        self._positions[partition] = until
                        fetched.append(Fetch(partition, begun_offset, until, records))
            except OffsetOutOfRangeError as error:
                raise OutOfRangeError(Partition(*next(iter(error.args[0])))) from error
            except (NoOffsetForPartitionError, IllegalStateError):
                # The group has moved on; `rebalances` says so, or is about to.
                return ()
        return tuple(fetched)

    async def _brought(
        self, wanted: Sequence[TopicPartition], wait_ms: int, max_records: int
    ) -> Mapping[TopicPartition, Sequence[RawMessage]]:
        """Return what aiokafka has fetched; what it refuses to read is left for `_reread`."""
        plain = [where for where in wanted if where not in self._refused]
        if not plain:
            return {}
        try:
            brought: Mapping[TopicPartition, Sequence[RawMessage]] = await self._consumer.getmany(
                *plain, timeout_ms=wait_ms, max_records=max_records
            )
        except UnicodeDecodeError:
            # It does not say in which partition, and has lost what it took from the others.
            for where in plain:
                self._consumer.seek(where, self._positions[Partition(*where)])
            self._refused.update(plain)
            return {}
        return brought

    async def _reread(
        self, wanted: Sequence[TopicPartition], max_records: int
    ) -> dict[TopicPartition, Reread]:
        """Read refused partitions past aiokafka; those that prove readable are refused no more."""
        refused = [where for where in wanted if where in self._refused]
        found: dict[TopicPartition, Reread] = {}
        for where in refused:
            offset, most = self._positions[Partition(*where)], max_records // len(refused) + 1
            found[where] = await reread(self._consumer, where, offset, max_records=most)
            if not any(record.is_escaped for record in found[where].records):
                self._refused.discard(where)
        return found


class Hints:
    """Tells lag tools how far we are, under a second group; never waited for."""

    def __init__(self, kafka: Kafka, group: str) -> None:
        """Commit under `group`, which nobody consumes with."""
        self._kafka = kafka
        self._group = group
        self._offsets: dict[TopicPartition, int] = {}

    def note(self, offsets: Mapping[Partition, int]) -> None:
        """Remember how far we are; returns at once."""
        self._offsets.update({TopicPartition(*where): at for where, at in offsets.items()})

    async def run(self) -> None:
        """Commit what is noted, once a second, until cancelled; a failure is tried again."""
        while True:
            consumer = AIOKafkaConsumer(
                bootstrap_servers=self._kafka.bootstrap,
                client_id=self._kafka.client,
                group_id=self._group,
                enable_auto_commit=False,
                auto_offset_reset="none",
            )
            try:
                await consumer.start()
                while True:
                    await asyncio.sleep(HINT_EVERY_S)
                    await _to_its_end(self._commit(consumer))
            except (KafkaError, OSError) as error:
                _log.debug("no hints", group=self._group, error=repr(error))
                await asyncio.sleep(HINT_EVERY_S)
            finally:
                with contextlib.suppress(KafkaError, TimeoutError, OSError):
                    async with asyncio.timeout(CLOSE_TIMEOUT_S):
                        await consumer.stop()

    async def _commit(self, consumer: AIOKafkaConsumer) -> None:
        offsets, self._offsets = self._offsets, {}
        if not offsets:
            return
        assigned = consumer.assignment() | set(offsets)
        if assigned != consumer.assignment():
            consumer.assign(sorted(assigned))
            consumer.pause(*assigned)
        try:
            async with asyncio.timeout(HINT_TIMEOUT_S):
                await consumer.commit(offsets)
        except (KafkaError, TimeoutError, OSError) as error:
            self._offsets = offsets | self._offsets
            _log.debug("hint not committed", group=self._group, error=repr(error))


async def _to_its_end(work: Coroutine[None, None, None]) -> None:
    """Wait for bounded work even when cancelled, and be cancelled then.

    aiokafka commits in a task of its own. Were the consumer stopped below it, that task would fail
    with nobody to hear, and asyncio would log it as an error of ours in the middle of a good stop.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
