"""The sequencer: nothing is skipped, order is kept, watermarks come last, a restart repeats."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from hisab_contracts.entries import Entry, EntryWatermark, entry_hash, read_entry_message
from infrastructure import Infrastructure
from integration.ledger.real import RealLedger
from ledger.core.book import PROGRAMME_BOOK
from ledger.sequencer import Sequencer
from ledger.store import entries
from runtime.kafka import Kafka, Topic
from unit.ledger.values import total, watermark


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
            if await entries.count_unpublished(connection) == 0:
                return
            await asyncio.sleep(0.02)


@pytest.mark.defect("L1", "F47")
async def test_a_transaction_that_commits_late_is_not_skipped(
    ledger: RealLedger, kafka: Kafka, published: Published
) -> None:
    """Nothing at or above an open transaction's id is published before it ends."""
    await ledger.tenant("late", limit_micro=100)
    await ledger.tenant("early", limit_micro=100)
    sequencer = Sequencer(kafka, topic=published.topic)
    await drain(sequencer, ledger)
    held = ledger.batch([total(1, bucket="1", tenant_id="late")])
    async with ledger.writer.transaction() as late:
        await ledger.consumer.book_charges(held, late)
        await ledger.book(total(1, tenant_id="early"))
        async with ledger.writer.connection() as connection:
            assert 0 == await sequencer.step(connection)
            assert 1 == await entries.count_unpublished(connection)
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
    await drain(Sequencer(kafka, topic=published.topic), ledger)
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
    sequencer = Sequencer(kafka, topic=published.topic)
    await drain(sequencer, ledger)
    await drain(sequencer, ledger)
    found = await published.read()
    assert [0, 1, 2, 3] == sorted(found)
    for part in found.values():
        kinds = [type(said) for said, _ in part]
        assert [*[Entry] * (len(kinds) - 1), EntryWatermark] == kinds


async def test_a_new_lease_publishes_watermarks_again_and_an_idle_one_never(
    ledger: RealLedger, kafka: Kafka, published: Published
) -> None:
    """What was published is not even read again, until the lease changes hands."""
    mark = watermark("isb", 1, 1_753_920_000_000)
    await ledger.book(mark)
    sequencer = Sequencer(kafka, topic=published.topic)

    async def published_marks() -> int:
        found = await published.read()
        marks = [said for part in found.values() for said, _ in part]
        return sum(isinstance(said, EntryWatermark) and said.hub == "isb" for said in marks)

    async with ledger.writer.connection() as first, ledger.writer.connection() as second:
        for times, holder in enumerate((first, second), start=1):
            async with asyncio.timeout(600):
                while await published_marks() < times:
                    await sequencer.run(holder)
            horizon = await entries.horizon_of(holder)
            assert [] == await entries.watermarks_between(holder, horizon, 2**62)
            await sequencer.run(holder)
            assert times == await published_marks()


@pytest.mark.defect("L6", "F46")
async def test_a_window_not_marked_published_is_published_again(
    ledger: RealLedger, kafka: Kafka, published: Published
) -> None:
    """Killed in between: twice, never zero times; (tenant, seq) tells."""
    first = Sequencer(kafka, topic=published.topic)
    await drain(first, ledger)
    await ledger.tenant("twice", limit_micro=1_000)
    await ledger.book(*(total(1, bucket=str(n), tenant_id="twice") for n in range(5)))
    async with ledger.writer.connection() as connection:
        last = await entries.last_window(connection)
        assert last is not None
        horizon = await entries.horizon_of(connection)
        while (
            await entries.cut_window(
                connection, last.until_xid, horizon, last.first_index + last.entries
            )
            is None
        ):
            horizon = await entries.horizon_of(connection)
        assert 5 == await entries.count_unpublished(connection)
    await drain(Sequencer(kafka, topic=published.topic), ledger)
    found = [entry.seq for entry in await published.entries() if entry.tenant_id == "twice"]
    assert [1, 2, 3, 4, 5] == found


async def test_windows_number_every_entry_once_and_programmes_stay_at_home(
    ledger: RealLedger, kafka: Kafka, published: Published
) -> None:
    """The global index has no gap; a programme's book is in it and not in the topic."""
    await ledger.programme("quiet")
    await drain(Sequencer(kafka, topic=published.topic), ledger)
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
