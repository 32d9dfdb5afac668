"""Large batches of honest producers are read whole; what cannot be taken apart is put aside."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from aiokafka.record.default_records import DefaultRecordBase

from infrastructure import Infrastructure
from integration.runtime.bare import Bare
from integration.runtime.bombs import MIB, Bomb, of_records, of_value, plain_records, send_bombs
from integration.runtime.test_consumer import Sink, read_all
from runtime.consumer import Consumer, Halted, Subscription
from runtime.kafka import Message, Topic
from runtime.records import MOST_RECORDS, _Batches


async def test_a_batch_of_20_mib_of_honest_records_is_read_whole(
    apache_kafka: Infrastructure, bare: Bare, unique: Callable[[str], str]
) -> None:
    """More than one look may decode: it is read in portions, each record once and in order."""
    topic = unique("in")
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 1)])
        await send_bombs(kit.kafka.bootstrap, topic, [of_records(40_000, 500)])
        await kit.kafka.publish([Message(topic, b"k", b"last", partition=0)])
        seen = await read_all(kit, topic, unique("group"), 40_001)
        assert list(range(40_001)) == [record.offset for record in seen]
        assert all(record.is_as_sent for record in seen)
        assert bytes(500) == seen[0].value
        assert b"last" == seen[-1].value


async def test_who_cannot_put_a_bomb_aside_halts_and_says_how_to_go_on(
    apache_kafka: Infrastructure, bare: Bare, unique: Callable[[str], str]
) -> None:
    """Our own topics never have one; an operator passes it on the record."""
    topic = unique("in")
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 1)])
        await send_bombs(kit.kafka.bootstrap, topic, [of_value(70 * MIB)])
        subscription = Subscription(unique("group"), (topic,), Sink().handle)
        consumer = Consumer(kit.kafka, kit.writer, subscription)
        with pytest.raises(Halted, match=f"override-progress {topic} 0 1 "):
            async with asyncio.timeout(120):
                await consumer.run(asyncio.Event())


def test_a_batch_that_is_garbage_inside_keeps_its_bytes_and_the_records_before_the_garbage() -> (
    None
):
    """The checksum is right, the records are not: one record stands for what is left."""
    good = b"".join(plain_records(2, 3))
    for inside, kept in ((b"\x7f" * 40, 0), (good + b"\x7f" * 40, 2)):
        raw = bytes(Bomb(DefaultRecordBase.CODEC_NONE, inside, records=5).build())
        batches = _Batches(raw)
        assert batches.has_next()
        *whole, aside = list(batches.next_batch())
        assert kept == len(whole)
        assert 4 == aside.offset
        assert raw == aside.value
        assert "offsets 0 to 4" in getattr(aside.value, "because", "")
        assert not batches.has_next()


def test_a_batch_of_too_many_records_is_put_aside_before_any_is_taken_apart() -> None:
    """Millions of tiny records are legal; to pass over them at each look would take a minute."""
    for records, because in (
        (MOST_RECORDS, "cannot be told apart"),
        (MOST_RECORDS + 1, f"it has more than {MOST_RECORDS} records"),
    ):
        raw = bytes(Bomb(DefaultRecordBase.CODEC_NONE, b"\x7f" * 40, records=records).build())
        [aside] = list(_Batches(raw).next_batch())
        assert records - 1 == aside.offset
        assert raw == aside.value
        assert because in getattr(aside.value, "because", "")
