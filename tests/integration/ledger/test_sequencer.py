"""The sequencer: nothing is skipped, order is kept, watermarks come last, a restart repeats."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from hisab_contracts.entries import Entry, EntryWatermark, entry_hash, read_entry_message
from infrastructure import Infrastructure
from integration.ledger.real import RealLedger
from ledger.core.book import PROGRAMME_BOOK
from ledger.sequencer import Sequencer
from ledger.store import sequence
from runtime.kafka import Kafka, Message, Topic
from runtime.topics import PartitionMismatch
from unit.ledger.values import HOUR_MS, total, watermark


@dataclass
class Published:
    """What a reader of the topic finds, partition by partition."""

    infrastructure: Infrastructure
    topic: str

    async def read(self) -> dict[int, list[tuple[Entry | EntryWatermark, dict[str, bytes]]]]:
        """Read everything there is."""
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.infrastructure.bootstrap_servers,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        await consumer.start()
        try:
            await consumer._client.force_metadata_update()
            numbers = consumer.partitions_for_topic(self.topic) or set()
            partitions = [TopicPartition(self.topic, number) for number in sorted(numbers)]
            consumer.assign(partitions)
            ends = await consumer.end_offsets(partitions)
            found: dict[int, list[tuple[Entry | EntryWatermark, dict[str, bytes]]]] = {}
            async with asyncio.timeout(600):
                while sum(len(messages) for messages in found.values()) < sum(ends.values()):
                    for where, records in (await consumer.getmany(timeout_ms=500)).items():
                        found.setdefault(where.partition, []).extend(
                            (read_entry_message(record.value), dict(record.headers))
                            for record in records
                        )
        finally:
            await consumer.stop()
        return found

    async def entries(self) -> list[Entry]:
        """All entries, partition after partition."""
        found = await self.read()
        return [said for part in found.values() for said, _ in part if isinstance(said, Entry)]


@pytest.fixture
async def kafka(infrastructure: Infrastructure) -> AsyncIterator[Kafka]:
    """A client of the cluster."""
    kafka = Kafka(infrastructure.bootstrap_servers, client="test", instance="0")
    yield kafka
    await kafka.close()


@pytest.fixture
async def published(
    infrastructure: Infrastructure, kafka: Kafka, unique: Callable[[str], str]
) -> Published:
    """A topic of one's own."""
    published = Published(infrastructure, unique("entries"))
    await kafka.create_topics([Topic(published.topic, 4)])
    return published


async def drain(sequencer: Sequencer, ledger: RealLedger) -> None:
    """Step until nothing is left to publish."""
    async with ledger.writer.connection() as connection, asyncio.timeout(600):
        while True:
            await sequencer.step(connection)
            if await sequence.count_unpublished(connection) == 0:
                return
            await asyncio.sleep(0.02)


@pytest.mark.defect("L1", "F47")
async def test_a_transaction_that_commits_late_is_not_skipped(
    ledger: RealLedger, kafka: Kafka, published: Published
) -> None:
    """Nothing at or above an open transaction's id is published before it ends."""
    await ledger.tenant("late", limit_micro=100)
    await ledger.tenant("early", limit_micro=100)
    sequencer = Sequencer(kafka, topic=published.topic, charges=published.topic)
    await drain(sequencer, ledger)
    held = ledger.batch([total(1, bucket="1", tenant_id="late")])
    async with ledger.writer.transaction() as late:
        await ledger.consumer.book_charges(held, late)
        await ledger.book(total(1, tenant_id="early"))
        async with ledger.writer.connection() as connection:
            assert 0 == await sequencer.step(connection)
            assert 1 == await sequence.count_unpublished(connection)
    await ledger.book(total(2, bucket="1", tenant_id="late"))
    await drain(sequencer, ledger)
    found = [(entry.tenant_id, entry.seq) for entry in await published.entries()]
    assert [("early", 1), ("late", 1), ("late", 2)] == sorted(
        pair for pair in found if pair[0] in ("early", "late")
    )


async def test_entries_leave_whole_in_order_and_in_their_trace(
    ledger: RealLedger, kafka: Kafka, published: Published
) -> None:
    """What is published is what was hashed; the trace of the charge goes on."""
    await ledger.tenant("whole", limit_micro=1_000)
    await ledger.grant("whole", "gw", 5)
    await ledger.hold("whole", "hw", 3)
    for micro in (1, 2, 30):
        await ledger.book(total(micro, tenant_id="whole", hold_id="hw"))
    await drain(Sequencer(kafka, topic=published.topic, charges=published.topic), ledger)
    found = await published.read()
    mine = [
        (said, headers)
        for part in found.values()
        for said, headers in part
        if isinstance(said, Entry) and said.tenant_id == "whole"
    ]
    assert [1, 2, 3, 4, 5] == [entry.seq for entry, _ in mine]
    assert all(entry.hash == entry_hash(entry) for entry, _ in mine)
    traces = [headers.get("traceparent", b"").split(b"-")[1:2] for _, headers in mine]
    assert [[], [], *[[b"a" * 32]] * 3] == traces


async def test_a_watermark_follows_every_entry_booked_before_it(
    ledger: RealLedger, kafka: Kafka, published: Published
) -> None:
    """In the partition it came from; once per lease."""
    await ledger.tenant("marks", limit_micro=1_000)
    mark = watermark("lhr", 1, 1_753_920_000_000)
    for partition in range(4):
        await ledger.book(
            total(partition + 1, bucket=str(partition), tenant_id="marks"),
            mark,
            partition=partition,
        )
    sequencer = Sequencer(kafka, topic=published.topic, charges=published.topic)
    await drain(sequencer, ledger)
    await drain(sequencer, ledger)
    found = await published.read()
    assert [0, 1, 2, 3] == sorted(found)
    for part in found.values():
        kinds = [type(said) for said, _ in part]
        assert [*[Entry] * (len(kinds) - 1), EntryWatermark] == kinds


async def marks_of(published: Published, hub: str) -> list[int]:
    """The revisions of a hub's watermarks in the topic, in order."""
    found = await published.read()
    return [
        said.revision
        for part in found.values()
        for said, _ in part
        if isinstance(said, EntryWatermark) and said.hub == hub
    ]


async def test_a_watermark_is_published_once_whoever_holds_the_lease(
    ledger: RealLedger, kafka: Kafka, published: Published
) -> None:
    """Neither an idle sequencer nor the next holder of the lease says it again."""
    await ledger.book(watermark("isb", 1, 1_753_920_000_000))
    for _ in range(2):
        sequencer = Sequencer(kafka, topic=published.topic, charges=published.topic)
        async with ledger.writer.connection() as connection, asyncio.timeout(600):
            while not await marks_of(published, "isb"):
                await sequencer.run(connection)
            await sequencer.run(connection)
    assert [1] == await marks_of(published, "isb")


@pytest.mark.defect("F46")
async def test_a_watermark_that_was_sent_and_not_noted_is_sent_again(
    ledger: RealLedger, kafka: Kafka, published: Published
) -> None:
    """Killed between the broker's acknowledgement and the commit: twice, never zero times."""
    await ledger.book(watermark("skd", 1, 1_753_920_000_000))
    async with ledger.writer.connection() as connection, asyncio.timeout(600):
        due = await sequence.due_watermarks(connection, 2**62)
        await kafka.publish([Message(published.topic, None, value, (), 0) for _, value in due])
        sequencer = Sequencer(kafka, topic=published.topic, charges=published.topic)
        while await sequence.due_watermarks(connection, 2**62):
            await sequencer.step(connection)
    assert [1, 1] == await marks_of(published, "skd")


async def test_watermarks_leave_although_write_transactions_overlap_for_ever(
    ledger: RealLedger, kafka: Kafka, published: Published
) -> None:
    """At no look is the newest watermark below the horizon, and yet older ones leave."""
    await ledger.tenant("busy", limit_micro=1_000)
    sequencer = Sequencer(kafka, topic=published.topic, charges=published.topic)
    await drain(sequencer, ledger)
    async with ledger.writer.connection() as looking:
        # Each writer begins before the one before it ends, so that one is open at every look; and
        # what is booked then is younger than that one.
        writer = await writing(ledger)
        for revision in range(1, 6):
            await ledger.book(watermark("ovl", revision, 1_753_920_000_000 + revision * HOUR_MS))
            await sequencer.step(looking)
            younger = await writing(ledger)
            await writer.aclose()
            writer = younger
        waiting = await sequence.due_watermarks(looking, 2**62)
        await writer.aclose()
    assert 1 == len([message for _, message in waiting if b'"ovl"' in message])
    assert [1, 2, 3, 4] == await marks_of(published, "ovl")


async def writing(ledger: RealLedger) -> AsyncExitStack:
    """A transaction that has written, and stays open until it is closed."""
    stack = AsyncExitStack()
    connection = await stack.enter_async_context(ledger.admin.transaction())
    await connection.fetchval("select pg_current_xact_id()::text")
    return stack


async def test_a_backlog_is_cut_into_windows_that_keep_transactions_whole(
    ledger: RealLedger, kafka: Kafka, published: Published
) -> None:
    """Windows of at most 10; the one transaction that has 25 is one window; none is lost."""
    await drain(Sequencer(kafka, topic=published.topic, charges=published.topic), ledger)
    await ledger.tenant("backlog", limit_micro=10**9)
    for number in range(12):
        await ledger.book(*(total(1, bucket=f"{number}{n}", tenant_id="backlog") for n in range(4)))
    await ledger.book(*(total(1, bucket=f"99{n}", tenant_id="backlog") for n in range(25)))
    async with ledger.reader.connection() as connection:
        before = await sequence.last_window(connection)
    await drain(Sequencer(kafka, topic=published.topic, charges=published.topic, most=10), ledger)
    async with ledger.reader.connection() as connection:
        rows = await connection.fetch(
            "select entries from sequence_windows where window_id > $1 order by window_id",
            0 if before is None else before.window_id,
        )
    assert [8, 8, 8, 8, 8, 8, 25] == [row["entries"] for row in rows]
    found = [entry.seq for entry in await published.entries() if entry.tenant_id == "backlog"]
    assert list(range(1, 12 * 4 + 26)) == found


async def test_no_watermark_leaves_while_charges_and_entries_have_different_partitions(
    ledger: RealLedger, kafka: Kafka, published: Published, unique: Callable[[str], str]
) -> None:
    """48 charges and 24 entries would close months without half of the tenants: it halts."""
    charges = unique("charges")
    await kafka.create_topics([Topic(charges, 8)])
    await ledger.book(watermark("mismatched", 1, 1_753_920_000_000))
    sequencer = Sequencer(kafka, topic=published.topic, charges=charges)
    with pytest.raises(PartitionMismatch, match=f"{charges} has 8 partitions and"):
        await step_for_ever(sequencer, ledger)
    marks = [said for part in (await published.read()).values() for said, _ in part]
    assert not [said for said in marks if isinstance(said, EntryWatermark)]


async def step_for_ever(sequencer: Sequencer, ledger: RealLedger) -> None:
    """Step until it halts: as soon as the horizon has passed a watermark, that is due."""
    async with ledger.writer.connection() as connection, asyncio.timeout(600):
        while True:
            await sequencer.step(connection)


@pytest.mark.defect("L6", "F46")
async def test_a_window_not_marked_published_is_published_again(
    ledger: RealLedger, kafka: Kafka, published: Published
) -> None:
    """Killed in between: twice, never zero times; (tenant, seq) tells."""
    first = Sequencer(kafka, topic=published.topic, charges=published.topic)
    await drain(first, ledger)
    await ledger.tenant("twice", limit_micro=1_000)
    await ledger.book(*(total(1, bucket=str(n), tenant_id="twice") for n in range(5)))
    async with ledger.writer.connection() as connection:
        last = await sequence.last_window(connection)
        assert last is not None
        horizon = await sequence.horizon_of(connection)
        while (
            await sequence.cut_window(
                connection, last.until_xid, horizon, last.first_index + last.entries, 5_000
            )
            is None
        ):
            horizon = await sequence.horizon_of(connection)
        assert 5 == await sequence.count_unpublished(connection)
    await drain(Sequencer(kafka, topic=published.topic, charges=published.topic), ledger)
    found = [entry.seq for entry in await published.entries() if entry.tenant_id == "twice"]
    assert [1, 2, 3, 4, 5] == found


async def test_windows_number_every_entry_once_and_programmes_stay_at_home(
    ledger: RealLedger, kafka: Kafka, published: Published
) -> None:
    """The global index has no gap; a programme's book is in it and not in the topic."""
    await ledger.programme("quiet")
    await drain(Sequencer(kafka, topic=published.topic, charges=published.topic), ledger)
    async with ledger.reader.connection() as connection:
        windows = await connection.fetch(
            "select from_xid::text::bigint f, until_xid::text::bigint u, first_index, entries"
            " from sequence_windows order by window_id"
        )
        entries = await connection.fetchval("select count(*) from entries")
    assert entries == sum(row["entries"] for row in windows)
    for before, after in pairwise(windows):
        assert before["u"] == after["f"]
        assert before["first_index"] + before["entries"] == after["first_index"]
    books = {entry.tenant_id for entry in await published.entries()}
    assert not [book for book in books if book.startswith(PROGRAMME_BOOK)]
