"""Partition counts and places of keys come from the broker: what does not fit halts, by name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from e2e.outside import until
from hisab_contracts.ids import UNKNOWN_TOPIC
from hisab_contracts.topics import partition_of
from infrastructure import Infrastructure
from integration.runtime.bare import Bare
from integration.runtime.test_consumer import Sink, drained, make_sink, running, stored
from runtime.consumer import Consumer, Halted, Subscription
from runtime.kafka import BrokerLost, Message, Topic
from runtime.placement import Placement
from runtime.records import Record
from runtime.topics import ExistingTopic, PartitionMismatch, require_equal_counts


async def add_partitions(bootstrap_servers: str, topic: str, count: int) -> None:
    """Do what an operator does with `kafka-topics.sh --alter --partitions`."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    await admin.start()
    try:
        await admin.create_partitions({topic: NewPartitions(count)})
    finally:
        await admin.close()


def test_topics_with_different_counts_are_named_with_what_to_do() -> None:
    """Equal ones pass, and one alone: the other may not have been made yet."""
    small, large = ExistingTopic(24, UNKNOWN_TOPIC), ExistingTopic(48, UNKNOWN_TOPIC)
    require_equal_counts({"charges": large, "entries": ExistingTopic(48, UNKNOWN_TOPIC)})
    require_equal_counts({"charges": large})
    with pytest.raises(PartitionMismatch, match="charges has 48 partitions and entries has 24"):
        require_equal_counts({"entries": small, "charges": large})


async def test_a_record_outside_its_keys_partition_halts_before_anything_of_it_is_done(
    bare: Bare, unique: Callable[[str], str]
) -> None:
    """What is without a key passes; a key in the wrong place is named, with its place."""
    await make_sink(bare)
    topic = unique("in")
    right = partition_of(b"tenant", 4)
    wrong = (right + 1) % 4
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 4)])
        subscription = Subscription(
            unique("group"), (topic,), Sink().handle, placed_by_key=True, max_records=1
        )
        consumer = Consumer(kit.kafka, kit.writer, subscription)
        await kit.kafka.publish(
            [
                Message(topic, b"tenant", b"v"),
                Message(topic, None, b"v", partition=wrong),
                Message(topic, b"tenant", b"v", partition=wrong),
            ]
        )
        with pytest.raises(
            Halted, match=rf"{topic}\[{wrong}\] offset 1: .* partition {right} of 4"
        ):
            async with asyncio.timeout(120):
                await consumer.run(asyncio.Event())
        assert (topic, wrong, 1) not in await stored(bare)


async def test_a_topic_that_the_broker_does_not_know_now_is_an_outage_and_not_misplaced(
    bare: Bare, unique: Callable[[str], str]
) -> None:
    """It is asked again later: nothing is known of the record's place."""
    record = Record(unique("in"), 0, 0, 0, b"tenant", b"v", ())
    async with bare.open_kit() as kit:
        with pytest.raises(BrokerLost, match=f"does not know now: .*{record.topic}"):
            await Placement(kit.kafka).refusal([record])


@pytest.mark.defect("F17")
async def test_partitions_that_are_added_are_read_and_placed_by_the_new_count(
    apache_kafka: Infrastructure, bare: Bare, unique: Callable[[str], str]
) -> None:
    """The consumer runs on; it notices by itself how many there are now."""
    await make_sink(bare)
    topic = unique("in")
    keys = [b"k%d" % number for number in range(40)]
    moved = [key for key in keys if partition_of(key, 2) != partition_of(key, 5)]
    assert moved
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 2)])
        subscription = Subscription(unique("group"), (topic,), Sink().handle, placed_by_key=True)
        consumer = Consumer(kit.kafka, kit.writer, subscription)
        async with running(consumer) as reading:
            await kit.kafka.publish(
                [Message(topic, key, b"v", partition=partition_of(key, 2)) for key in keys]
            )
            await drained(consumer)
            await add_partitions(kit.kafka.bootstrap, topic, 5)
            await until(
                lambda: kit.kafka.partition_count(topic), lambda count: count == 5, patience_s=120
            )
            await kit.kafka.publish(
                [Message(topic, key, b"v", partition=partition_of(key, 5)) for key in moved]
            )
            # Not by its lag, which may be from before these.
            await until(lambda: stored(bare), lambda rows: len(rows) >= len(keys) + len(moved))
            assert not reading.done()
        assert len(keys) + len(moved) == len(await stored(bare))


async def test_a_message_for_a_partition_that_does_not_exist_is_refused_by_name(
    bare: Bare, unique: Callable[[str], str]
) -> None:
    """Nothing is sent, and the publisher goes on."""
    topic = unique("out")
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 2)])
        messages = [Message(topic, None, b"v", partition=number) for number in (0, 1, 30)]
        with pytest.raises(PartitionMismatch, match=f"partition 30 of {topic}, which has 2"):
            await kit.kafka.publish(messages)
        await kit.kafka.publish(messages[:2])
        assert [1, 1] == list((await kit.kafka.end_offsets([topic])).values())


async def test_a_dropped_publisher_writes_nothing_more_even_when_it_could_not_be_stopped(
    bare: Bare, unique: Callable[[str], str]
) -> None:
    """What it still held would come behind what the fresh one has written."""
    topic = unique("out")
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 1)])
        await kit.kafka.publish([Message(topic, None, b"v", partition=0)])
        dropped = kit.kafka._producer
        assert dropped is not None
        # It waits for the answer of a request, which does not come.
        dropped._sender._muted_partitions.add(TopicPartition(topic, 0))
        await dropped.send(topic, b"late", partition=0)
        await kit.kafka._drop_producer()
        assert dropped._sender.sender_task.done()
        await kit.kafka.publish([Message(topic, None, b"v", partition=0)])
        assert [2] == list((await kit.kafka.end_offsets([topic])).values())
