"""What was published, read back to its true end: transactions, compaction and empty partitions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from aiokafka import AIOKafkaProducer

from infrastructure import Infrastructure
from runtime.kafka import BrokerLost, Kafka, Message, Topic
from runtime.readback import OffsetRange, Readback


@pytest.fixture
async def kafka(apache_kafka: Infrastructure) -> AsyncIterator[Kafka]:
    """A client of a real broker: the in-memory one has neither transactions nor compaction."""
    kafka = Kafka(apache_kafka.bootstrap_servers, client="test", instance="0")
    yield kafka
    await kafka.close()


@pytest.fixture
async def topic(kafka: Kafka, unique: Callable[[str], str]) -> str:
    """A topic of one's own with two partitions, the second of which stays empty."""
    name = unique("published")
    await kafka.create_topics([Topic(name, 2, compacted=True)])
    return name


async def publish(kafka: Kafka, topic: str, *values: bytes) -> None:
    """Publish values to the first partition."""
    await kafka.publish([Message(topic, b"k", value, (), 0) for value in values])


async def values_of(readback: Readback, begin: int = 0) -> list[bytes | None]:
    """Everything in the topic from an offset on."""
    ranges = await readback.ranges()
    chunks = readback.read(dict.fromkeys(ranges, begin), ranges)
    return [record.value async for records in chunks for record in records]


async def transactional(kafka: Kafka, unique: Callable[[str], str]) -> AIOKafkaProducer:
    """A producer of somebody else, in the middle of a transaction."""
    producer = AIOKafkaProducer(
        bootstrap_servers=kafka.bootstrap, transactional_id=unique("foreign")
    )
    await producer.start()
    await producer.begin_transaction()
    return producer


async def test_a_topic_that_is_not_there_has_nothing(
    kafka: Kafka, unique: Callable[[str], str]
) -> None:
    """Before the first publication there is none, and asking makes none."""
    readback = Readback(kafka, unique("never"))
    assert {} == await readback.ranges()
    assert [] == await values_of(readback)
    assert readback.topic not in await kafka.topics()


async def test_what_was_published_is_read_from_an_offset_to_the_end_of_that_moment(
    kafka: Kafka, topic: str
) -> None:
    """An empty partition has nothing; what comes later is left for later."""
    readback = Readback(kafka, topic)
    assert {0: OffsetRange(0, 0), 1: OffsetRange(0, 0)} == await readback.ranges()
    assert [] == await values_of(readback)
    await publish(kafka, topic, b"1", b"2", b"3")
    assert [b"2", b"3"] == await values_of(readback, 1)
    ranges = await readback.ranges()
    await publish(kafka, topic, b"4")
    chunks = readback.read({0: 0}, ranges)
    assert [b"1", b"2", b"3"] == [record.value async for found in chunks for record in found]


async def test_markers_and_aborted_records_are_stepped_over(
    kafka: Kafka, topic: str, unique: Callable[[str], str]
) -> None:
    """Somebody else's transactions: committed ones count, aborted ones do not, none stops us."""
    await publish(kafka, topic, b"1")
    for value, ended in ((b"aborted", "abort"), (b"committed", "commit")):
        producer = await transactional(kafka, unique)
        await producer.send_and_wait(topic, value, key=b"k", partition=0)
        await getattr(producer, f"{ended}_transaction")()
        await producer.stop()
    assert [b"1", b"committed"] == await values_of(Readback(kafka, topic))


async def test_an_open_transaction_never_hides_what_lies_behind_it(
    kafka: Kafka, topic: str, unique: Callable[[str], str]
) -> None:
    """Nothing is taken for the end that is not: an outage says so, until it ends."""
    await publish(kafka, topic, b"1")
    producer = await transactional(kafka, unique)
    await producer.send_and_wait(topic, b"open", key=b"k", partition=0)
    await publish(kafka, topic, b"2")
    readback = Readback(kafka, topic, standstill_ms=500)
    with pytest.raises(BrokerLost, match="a transaction stays open there"):
        await values_of(readback)
    await producer.commit_transaction()
    await producer.stop()
    assert [b"1", b"open", b"2"] == await values_of(readback)
