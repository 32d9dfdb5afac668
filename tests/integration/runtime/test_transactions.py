"""Transactional producers on a topic we read: committed, aborted, open, on a real broker."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

from aiokafka import AIOKafkaProducer

from e2e.outside import until
from infrastructure import Infrastructure
from integration.runtime.bare import Bare
from integration.runtime.test_consumer import Sink, drained, make_sink, positions, running, stored
from runtime.consumer import Consumer, Subscription
from runtime.kafka import Message, Topic
from runtime.machine import Partition


@contextlib.asynccontextmanager
async def transactional(
    bootstrap_servers: str, transactional_id: str
) -> AsyncIterator[AIOKafkaProducer]:
    """A producer of a foreign program that writes in transactions."""
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap_servers,
        transactional_id=transactional_id,
        transaction_timeout_ms=600_000,
    )
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def test_committed_records_are_stored_and_aborted_ones_passed_up_to_the_real_end(
    apache_kafka: Infrastructure, bare: Bare, unique: Callable[[str], str]
) -> None:
    """Markers and aborted records leave no lag: the stored offset is the end of the log."""
    await make_sink(bare)
    topic = unique("in")
    place = Partition(topic, 0)
    async with (
        bare.open_kit() as kit,
        transactional(kit.kafka.bootstrap, unique("tx")) as producer,
    ):
        await kit.kafka.create_topics([Topic(topic, 1)])
        consumer = Consumer(
            kit.kafka, kit.writer, Subscription(unique("group"), (topic,), Sink().handle)
        )
        kept = []
        async with running(consumer):
            for abort in (False, True, False, True, True):
                await producer.begin_transaction()
                for _ in range(3):
                    sent = await producer.send_and_wait(topic, b"v", partition=0)
                    if not abort:
                        kept.append((topic, 0, sent.offset))
                if abort:
                    await producer.abort_transaction()
                else:
                    await producer.commit_transaction()
            await drained(consumer)
            assert {place: 20} == await kit.kafka.end_offsets([topic])
            assert {place: 20} == await positions(bare)
        assert kept == await stored(bare)


async def test_what_an_open_transaction_hides_is_lag_and_is_said_and_is_not_being_stuck(
    apache_kafka: Infrastructure, bare: Bare, unique: Callable[[str], str]
) -> None:
    """50 acknowledged records wait behind it; they are counted, explained, and read when it ends.

    The watchdog is content meanwhile: it would end the process (status 70) for nothing.
    """
    await make_sink(bare)
    topic = unique("in")
    place = Partition(topic, 0)
    async with (
        bare.open_kit() as kit,
        transactional(kit.kafka.bootstrap, unique("tx")) as producer,
    ):
        await kit.kafka.create_topics([Topic(topic, 1)])
        consumer = Consumer(
            kit.kafka, kit.writer, Subscription(unique("group"), (topic,), Sink().handle)
        )
        await kit.kafka.publish([Message(topic, None, b"v", partition=0)])
        await producer.begin_transaction()
        await producer.send_and_wait(topic, b"open", partition=0)
        await kit.kafka.publish([Message(topic, None, b"v", partition=0) for _ in range(50)])
        async with running(consumer):

            async def hidden() -> list[tuple[int, int]]:
                return [
                    (found.first_offset, found.end_offset) for found in consumer.hidden().values()
                ]

            async def moves() -> int:
                return consumer._watch.moves_count

            assert [(1, 52)] == await until(hidden, bool, patience_s=120)
            assert 51 == await consumer.lag_records()
            assert "kafka-transactions.sh" in consumer.hidden()[place].explain(place)
            for _ in range(2):
                before = await moves()
                await until(moves, before.__lt__, patience_s=120)
            await producer.abort_transaction()
            await drained(consumer)
            await until(hidden, lambda found: not found, patience_s=120)
        assert [(topic, 0, offset) for offset in range(52) if offset != 1] == await stored(bare)
