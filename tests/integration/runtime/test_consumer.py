"""Consumer, outbox and relay between a real broker and a real database."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import asyncpg
import pytest

from e2e.outside import until
from integration.runtime.bare import Bare
from integration.runtime.raw import RawName, send_raw
from runtime import telemetry
from runtime.consumer import Batch, Consumer, Halted, Subscription
from runtime.database import transaction_on
from runtime.feed import Feed
from runtime.kafka import BrokerLost, Message, MessageTooLarge, Topic
from runtime.machine import Partition
from runtime.outbox import MESSAGES_COUNTED, Outbox, Relay, _lowest_messages
from runtime.records import Record
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection

TRACE = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Sink:
    """A handler that stores every record's place, and may refuse some."""

    def __init__(self) -> None:
        self.poison: set[bytes] = set()
        self.unread: list[int] = []
        self.batches: list[int] = []

    async def handle(self, batch: Batch, connection: Connection) -> None:
        self.batches.append(len(batch.records))
        if any(record.value in self.poison for record in batch.records):
            raise ValueError("poison")
        await connection.execute(
            "insert into sink select * from unnest($1::text[], $2::int[], $3::bigint[])",
            [record.topic for record in batch.records],
            [record.partition for record in batch.records],
            [record.offset for record in batch.records],
        )

    async def put_aside(self, batch: Batch, _connection: Connection) -> None:
        self.unread.extend(record.offset for record in batch.records)


async def make_sink(bare: Bare) -> None:
    admin = await bare.admin()
    await admin.execute(
        "create table sink (topic text, partition int, place bigint,"
        " primary key (topic, partition, place));"
        "grant select, insert on sink to metering_writer"
    )
    await admin.close()


async def stored(bare: Bare) -> list[tuple[str, int, int]]:
    admin = await bare.admin()
    rows = await admin.fetch("select topic, partition, place from sink")
    await admin.close()
    return sorted((row["topic"], row["partition"], row["place"]) for row in rows)


async def positions(bare: Bare) -> dict[Partition, int]:
    """The committed next offset of every partition that was ever claimed."""
    admin = await bare.admin()
    rows = await admin.fetch("select topic, partition, next_offset from consumer_progress")
    await admin.close()
    return {Partition(row["topic"], row["partition"]): row["next_offset"] for row in rows}


@contextlib.asynccontextmanager
async def running(part: Consumer | Relay) -> AsyncIterator[asyncio.Task[None]]:
    stop = asyncio.Event()
    task = asyncio.create_task(part.run(stop))
    try:
        yield task
    finally:
        stop.set()
        async with asyncio.timeout(600):
            await asyncio.gather(task, return_exceptions=True)


async def drained(consumer: Consumer) -> None:
    await until(consumer.lag_records, lambda lag: lag == 0)


async def published(kit: Kit, outbox: Outbox) -> None:
    async def depth() -> int:
        async with kit.writer.connection() as connection:
            return await outbox.depth(connection)

    await until(depth, lambda waiting: waiting == 0)


def numbered(topic: str, first: int, until: int) -> list[Message]:
    return [Message(topic, b"k%d" % (n % 7), b"%d" % n) for n in range(first, until)]


async def test_every_record_is_stored_once_and_the_hint_follows(
    bare: Bare, unique: Callable[[str], str]
) -> None:
    """Restarts, one lost position: the stored offset decides; lag tools see how far we are."""
    await make_sink(bare)
    topic, group = unique("in"), unique("group")
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 4)])
        places = await kit.kafka.publish(numbered(topic, 0, 500))
        consumer = Consumer(kit.kafka, kit.writer, Subscription(group, (topic,), Sink().handle))
        assert 500 == await consumer.lag_records()
        async with running(consumer):
            await drained(consumer)
            partitions = list(await positions(bare))
            await until(lambda: kit.kafka.group_offsets(f"{group}.hint", partitions), bool)
        places += await kit.kafka.publish(numbered(topic, 500, 600))
        async with running(consumer):
            # Not by its lag, which may be from before these.
            await until(lambda: stored(bare), lambda rows: len(rows) >= len(places))
        assert sorted((topic, *place) for place in places) == await stored(bare)
        offsets = await positions(bare)
        assert await kit.kafka.end_offsets([topic]) == offsets
        hints = await kit.kafka.group_offsets(f"{group}.hint", list(offsets))
        assert {} != hints
        assert {} == await kit.kafka.group_offsets(group, list(offsets))


@pytest.mark.defect("M7")
async def test_a_topic_added_while_running_is_read_from_its_first_record(
    bare: Bare, unique: Callable[[str], str]
) -> None:
    """The subscription grows; what was there before counts too."""
    await make_sink(bare)
    first, second = unique("in"), unique("in")
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(first, 4)])
        await kit.kafka.publish(numbered(first, 0, 10))
        subscription = Subscription(unique("group"), (first,), Sink().handle)
        consumer = Consumer(kit.kafka, kit.writer, subscription)
        async with running(consumer):
            await drained(consumer)
            await kit.kafka.create_topics([Topic(second, 4)])
            await kit.kafka.publish(numbered(second, 0, 10))
            consumer.extend([second])
            await drained(consumer)
        assert 20 == len(await stored(bare))


@pytest.mark.defect("M7")
async def test_a_topic_added_while_the_process_was_down_is_read_when_it_returns(
    bare: Bare, unique: Callable[[str], str]
) -> None:
    """A member that returns is not bound to what the group gave it before."""
    await make_sink(bare)
    first, second, group = unique("in"), unique("in"), unique("group")
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(first, 4), Topic(second, 4)])
        await kit.kafka.publish(numbered(first, 0, 10))
        await kit.kafka.publish(numbered(second, 0, 10))
        for topics in ((first,), (first, second)):
            consumer = Consumer(kit.kafka, kit.writer, Subscription(group, topics, Sink().handle))
            async with running(consumer):
                await drained(consumer)
        assert 20 == len(await stored(bare))


@pytest.mark.defect("M6", "M19", "F23")
async def test_a_record_the_handler_cannot_take_is_put_aside_and_the_rest_is_stored(
    bare: Bare, unique: Callable[[str], str]
) -> None:
    """1 of 200 raises: 199 are stored, one is handed over unread, the partition moves on."""
    await make_sink(bare)
    topic = unique("in")
    sink = Sink()
    sink.poison = {b"77"}
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 1)])
        places = await kit.kafka.publish(
            [Message(topic, b"k", b"%d" % n, partition=0) for n in range(200)]
        )
        subscription = Subscription(unique("group"), (topic,), sink.handle, sink.put_aside)
        consumer = Consumer(kit.kafka, kit.writer, subscription)
        async with running(consumer):
            await drained(consumer)
        assert [places[77][1]] == sink.unread
        assert 199 == len(await stored(bare))


@pytest.mark.defect("F16")
async def test_a_database_restored_to_an_older_state_halts_the_consumer(
    bare: Bare, unique: Callable[[str], str]
) -> None:
    """The hint in Kafka is ahead of the stored offset; an override on the record lets it go on."""
    await make_sink(bare)
    topic, group = unique("in"), unique("group")
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 1)])
        await kit.kafka.publish([Message(topic, None, b"x", partition=0) for _ in range(9)])
        consumer = Consumer(kit.kafka, kit.writer, Subscription(group, (topic,), Sink().handle))
        async with running(consumer):
            await drained(consumer)
            place = Partition(topic, 0)
            await until(
                lambda: kit.kafka.group_offsets(f"{group}.hint", [place]),
                lambda hints: hints.get(place) == 9,
            )
        admin = await bare.admin()
        await admin.execute("update consumer_progress set next_offset = 4")
        await admin.execute("delete from sink where place >= 4")
        with pytest.raises(Halted, match="ahead of the stored offset 4"):
            await consumer.run(asyncio.Event())
        await admin.execute(
            "insert into consumer_override (topic, partition, next_offset, accepted_by, reason)"
            " values ($1, 0, 4, 'operator', 'restored from backup')",
            topic,
        )
        await admin.close()
        async with running(consumer):
            await drained(consumer)
        assert 9 == len(await stored(bare))


@pytest.mark.defect("F46", "M5")
async def test_outbox_rows_leave_in_order_and_only_when_committed(
    bare: Bare, unique: Callable[[str], str]
) -> None:
    """Rolled back rows never leave; committed ones once, in order, with their headers."""
    topic = unique("out")
    outbox = Outbox((topic,))
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 1)])
        async with running(Relay(outbox, topic, kit.writer, kit.kafka)) as relaying:
            headers = telemetry.trace_headers(TRACE.decode())
            for start in range(0, 5000, 500):
                messages = [
                    Message(topic, b"k", b"%d" % n, headers, partition=0)
                    for n in range(start, start + 500)
                ]
                async with kit.api.transaction() as connection:
                    await outbox.write(connection, messages)
                with contextlib.suppress(ZeroDivisionError):
                    async with kit.api.transaction() as connection:
                        await outbox.write(connection, messages)
                        raise ZeroDivisionError
            await published(kit, outbox)
        await relaying
        seen = await read_all(kit, topic, unique("group"), 5000)
        assert [b"%d" % n for n in range(5000)] == [record.value for record in seen]
        assert {TRACE.decode()} == {telemetry.trace_of(record) for record in seen}


@pytest.mark.defect("F47", "L1")
async def test_a_row_that_commits_late_is_still_published(
    bare: Bare, unique: Callable[[str], str]
) -> None:
    """A transaction holds a low number open while later ones are published: nothing is skipped."""
    topic = unique("out")
    outbox = Outbox((topic,))
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 1)])
        async with running(Relay(outbox, topic, kit.writer, kit.kafka)) as relaying:
            async with kit.writer.connection() as held, transaction_on(held):
                await outbox.write(held, [Message(topic, b"late", b"late", partition=0)])
                for n in range(10):
                    async with kit.api.transaction() as connection:
                        await outbox.write(
                            connection, [Message(topic, b"k", b"%d" % n, partition=0)]
                        )
                    await asyncio.sleep(0.1)
            await published(kit, outbox)
        await relaying
        seen = await read_all(kit, topic, unique("group"), 11)
        assert [b"%d" % n for n in range(10)] + [b"late"] == [record.value for record in seen]


async def test_large_messages_leave_in_bounded_portions_and_in_order(
    bare: Bare, unique: Callable[[str], str]
) -> None:
    """30 of 900 KB: one poll holds 16 MiB, the relay takes several, nothing is left."""
    topic = unique("out")
    outbox = Outbox((topic,))
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 1)])
        messages = [Message(topic, b"%d" % n, bytes(900_000), partition=0) for n in range(30)]
        async with kit.writer.transaction() as connection:
            await outbox.write(connection, messages)
        async with kit.writer.connection() as connection:
            rows = await _lowest_messages(connection, topic, 0)
        assert (19, False) == (len(rows.messages), rows.are_all)
        async with running(Relay(outbox, topic, kit.writer, kit.kafka)):
            await published(kit, outbox)
        seen = await read_all(kit, topic, unique("group"), 30)
        assert [b"%d" % n for n in range(30)] == [record.key for record in seen]


async def test_a_message_of_900_kb_passes_and_a_larger_one_is_refused_before_anything_is_sent(
    bare: Bare, unique: Callable[[str], str]
) -> None:
    """What a topic takes by default goes through whole."""
    topic = unique("in")
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 1)])
        with pytest.raises(MessageTooLarge):
            await kit.kafka.publish([Message(topic, b"k", bytes(10_000_000))])
        await kit.kafka.publish([Message(topic, b"k", b"\xff" * 900_000)])
        (record,) = await read_all(kit, topic, unique("group"), 1)
        assert b"\xff" * 900_000 == record.value


@pytest.mark.defect("F6", "M17", "F23")
async def test_a_header_name_that_is_not_utf8_is_escaped_and_nothing_else_suffers(
    bare: Bare, unique: Callable[[str], str]
) -> None:
    """Records before, beside and after such ones arrive once, in order; those say what they are."""
    topic = unique("in")
    odd = {3, 4, 9}
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 2)])
        await kit.kafka.publish([Message(topic, b"k", b"other", partition=1) for _ in range(3)])
        names = {n: [RawName("x"), "plain"] if n in odd else ["plain"] for n in range(10)}
        for codec, start in enumerate((0, 5)):
            values = [(b"%d" % n, names[n]) for n in range(start, start + 5)]
            await send_raw(kit.kafka.bootstrap, topic, values, codec)
        await kit.kafka.publish([Message(topic, b"k", b"last", partition=0)])
        seen = await read_all(kit, topic, unique("group"), 14)
        mine = [record for record in seen if record.partition == 0]
        assert [*(b"%d" % n for n in range(10)), b"last"] == [record.value for record in mine]
        assert odd == {n for n, record in enumerate(mine) if record.is_escaped}
        assert (("\\xffx", b"1"), ("plain", b"1")) == mine[3].headers
        assert 3 == sum(record.partition == 1 for record in seen)


async def test_a_fetcher_that_has_died_is_a_lost_broker(
    bare: Bare, unique: Callable[[str], str]
) -> None:
    """aiokafka's ends without a word when assignments cross: we notice at the next fetch."""
    topic = unique("in")
    place = Partition(topic, 0)
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 1)])
        feed = Feed(kit.kafka, unique("group"))

        async def assigned() -> tuple[Partition, ...]:
            return feed.assigned()

        async def fetch() -> object:
            return await feed.fetch([place], wait_ms=100, max_records=1)

        try:
            await feed.open([topic])
            await until(assigned, lambda places: place in places)
            feed.seek(place, 0)
            await fetch()
            feed._consumer._fetcher._get_actions_per_node = None
            feed.seek(place, 0)
            with pytest.raises(BrokerLost):
                await until(fetch, lambda _: False)
        finally:
            await feed.close()
        connections = feed._consumer._client._conns.values()
        assert not any(connection.connected() for connection in connections)


async def read_all(kit: Kit, topic: str, group: str, count: int) -> list[Record]:
    """Read a topic with a consumer of ours until so many records have come."""
    seen: list[Record] = []

    async def handle(batch: Batch, _connection: Connection) -> None:
        seen.extend(batch.records)

    consumer = Consumer(kit.kafka, kit.writer, Subscription(group, (topic,), handle))
    async with running(consumer):
        await until(consumer.lag_records, lambda lag: lag == 0 and len(seen) >= count)
    return seen


async def test_long_batch_shows_the_watchdog_that_it_gets_on(
    bare: Bare, unique: Callable[[str], str]
) -> None:
    """Each write to the outbox counts as progress, long before the batch is committed."""
    topic, sent = unique("long"), unique("sent")
    outbox = Outbox((sent,))
    moves: list[int] = []

    async def handle(_batch: Batch, connection: Connection) -> None:
        for _ in range(3):
            await asyncio.sleep(0.01)
            await outbox.write(connection, [Message(sent, None, b"x")])
            moves.append(consumer._watch.moves_count)

    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 1)])
        await kit.kafka.publish([Message(topic, None, b"a batch of a month")])
        consumer = Consumer(kit.kafka, kit.writer, Subscription(unique("group"), (topic,), handle))
        async with running(consumer):
            await drained(consumer)
        async with kit.writer.connection() as connection:
            await connection.execute(
                "insert into outbox (topic) select $1 from generate_series(1, $2::int)",
                sent,
                MESSAGES_COUNTED,
            )
            assert MESSAGES_COUNTED == await outbox.depth(connection)
    first, second, third = moves
    assert first < second < third


async def test_an_idle_consumer_that_can_look_no_more_ends_and_says_why(
    bare: Bare, unique: Callable[[str], str]
) -> None:
    """Its watchdog would end the process half a minute later, and nobody would know of what."""
    topic = unique("in")
    async with bare.open_kit() as kit:
        await kit.kafka.create_topics([Topic(topic, 1)])
        consumer = Consumer(
            kit.kafka,
            kit.writer,
            Subscription(unique("group"), (topic,), Sink().handle),
            stuck_after_ms=3_600_000,
        )
        async with running(consumer) as reading:
            await until(lambda: positions(bare), lambda found: found == {Partition(topic, 0): 0})
            admin = await bare.admin()
            await admin.execute("alter table consumer_progress rename to consumer_progress_lost")
            await admin.close()
            with pytest.raises(asyncpg.UndefinedTableError, match="consumer_progress"):
                async with asyncio.timeout(120):
                    await asyncio.shield(reading)
