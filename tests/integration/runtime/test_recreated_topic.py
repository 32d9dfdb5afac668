"""A topic that is deleted and made again is another log: nothing of it is taken for the old one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from e2e.outside import until
from hisab_contracts.ids import TopicId
from infrastructure import Infrastructure
from integration.runtime.bare import Bare
from integration.runtime.test_consumer import Sink, drained, make_sink, running, stored
from runtime.consumer import Consumer, Halted, Subscription
from runtime.kafka import Kafka, Message, Topic
from runtime.lag import Lag
from runtime.machine import Partition
from runtime.progress import StoredProgress, accept_topic
from runtime.topics import ExistingTopic


async def make_anew(kafka: Kafka, topic: str) -> None:
    """Delete a topic and make it again, as an operator would."""
    before = (await kafka.topics([topic]))[topic].topic_id
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    try:
        await admin.delete_topics([topic])
    finally:
        await admin.close()
    await until(lambda: kafka.partition_count(topic), lambda count: count == 0, patience_s=120)

    async def made() -> dict[str, ExistingTopic]:
        await kafka.create_topics([Topic(topic, 1)])
        return await kafka.topics([topic])

    await until(
        made, lambda found: topic in found and found[topic].topic_id != before, patience_s=120
    )
    # A publisher that knew the old one would be told so at its first try.
    await kafka._drop_producer()


def numbered(topic: str, count: int) -> list[Message]:
    return [Message(topic, None, b"%d" % number, partition=0) for number in range(count)]


@pytest.mark.defect("F18")
async def test_a_topic_made_anew_halts_until_an_operator_accepts_it_from_its_first_record(
    apache_kafka: Infrastructure, bare: Bare, unique: Callable[[str], str]
) -> None:
    """The new log is longer than the old one was read: its first records would be skipped."""
    await make_sink(bare)
    topic = unique("in")
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 1)])
        await kit.kafka.publish(numbered(topic, 10))
        consumer = Consumer(
            kit.kafka, kit.writer, Subscription(unique("group"), (topic,), Sink().handle)
        )
        async with running(consumer):
            await drained(consumer)
        await make_anew(kit.kafka, topic)
        await kit.kafka.publish(numbered(topic, 20))
        # A look that is fresh enough may be of the old log still, on a machine that is fast.
        assert 20 == await until(consumer.lag_records, lambda lag: lag == 20)
        for _ in range(2):
            with pytest.raises(Halted, match=f"deleted and made again.*accept-topic {topic} "):
                async with asyncio.timeout(120):
                    await consumer.run(asyncio.Event())
        admin = await bare.admin()
        await admin.execute("delete from sink")
        await admin.close()
        async with kit.writer.transaction() as connection:
            accepted = await accept_topic(
                connection, topic, accepted_by="operator", reason="made anew"
            )
        assert 1 == accepted
        async with running(consumer):
            await drained(consumer)
        assert [(topic, 0, offset) for offset in range(20)] == await stored(bare)


async def test_what_is_stored_of_partitions_that_are_no_more_is_of_no_other_log(
    apache_kafka: Infrastructure, bare: Bare, unique: Callable[[str], str]
) -> None:
    """Made anew with fewer of them and accepted: a consumer would claim again for ever."""
    topic = unique("in")
    here, gone = Partition(topic, 0), Partition(topic, 1)
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 1)])
        now = (await kit.kafka.topics([topic]))[topic].topic_id
        before = TopicId("another")
        for of_here, is_of_other_logs, total in ((now, False, 5), (before, True, 0)):
            rows = {here: StoredProgress(5, of_here), gone: StoredProgress(7, before)}

            async def stored(
                _topics: tuple[str, ...], rows: dict[Partition, StoredProgress] = rows
            ) -> dict[Partition, StoredProgress]:
                return rows

            lag = Lag(kit.kafka, stored)
            await lag.observe((topic,))
            assert (is_of_other_logs, total) == (lag.is_of_other_logs, lag.stored_total)


@pytest.mark.defect("F18")
async def test_a_consumer_notices_while_it_runs(
    apache_kafka: Infrastructure, bare: Bare, unique: Callable[[str], str]
) -> None:
    """It does not read on in the new log where it was in the old one."""
    await make_sink(bare)
    topic = unique("in")
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 1)])
        await kit.kafka.publish(numbered(topic, 3))
        consumer = Consumer(
            kit.kafka, kit.writer, Subscription(unique("group"), (topic,), Sink().handle)
        )
        reading = asyncio.create_task(consumer.run(asyncio.Event()))
        await drained(consumer)
        await make_anew(kit.kafka, topic)
        with pytest.raises(Halted, match=r"deleted and made again|out of the broker's range"):
            async with asyncio.timeout(240):
                await reading
