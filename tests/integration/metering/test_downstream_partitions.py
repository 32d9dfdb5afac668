"""Watermarks are stated in the partitions that there are, whatever a setting says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import asyncpg
import pytest

from infrastructure import Database, Infrastructure
from integration.runtime.test_partitions import add_partitions
from metering.jobs import Watermarks
from runtime.database import Database as Pool
from runtime.kafka import Kafka, Message, Topic
from runtime.outbox import Outbox
from runtime.topics import PartitionMismatch

HUB = """
insert into hubs (hub, name, heartbeat_ms, watermark_ms) values ('lhr', 'Lahore', 60000, 3600000);
insert into sources (hub, source, node_path, contiguous, beyond, watermark_ms, standing,
                     last_seen_ms)
values ('lhr', 'n1', 'n1', 1, '[]', 3600000, 'active', 0);
"""


@dataclass(frozen=True)
class Stated:
    """A hub with a watermark, topics of the test's own, and what waits to be published."""

    writer: Pool
    kafka: Kafka
    charges: str
    entries: str
    admin: str

    def job(self) -> Watermarks:
        outbox = Outbox((self.charges,))
        return Watermarks(self.kafka, outbox, charges=self.charges, entries=self.entries)

    async def look(self, job: Watermarks) -> list[int]:
        """Have the job look once; return the partitions to which it has stated something."""
        async with self.writer.connection() as connection:
            await job.run(connection)
            rows = await connection.fetch(
                "delete from outbox where topic = $1 returning partition", self.charges
            )
        return sorted(row["partition"] for row in rows)


@pytest.fixture
async def stated(
    apache_kafka: Infrastructure,
    migrated: Callable[[str], Database],
    unique: Callable[[str], str],
) -> AsyncIterator[Stated]:
    """The hub `lhr`, complete until an hour; no topic is made yet."""
    database = migrated("metering")
    admin = await asyncpg.connect(database.admin)
    await admin.execute(HUB)
    await admin.close()
    writer = Pool(database.writer, name="test")
    await writer.open()
    kafka = Kafka(apache_kafka.bootstrap_servers, client="test", instance="0")
    yield Stated(writer, kafka, unique("charges"), unique("entries"), database.admin)
    await kafka.close()
    await writer.close()


async def test_watermarks_go_to_every_partition_there_is_and_anew_when_there_are_more(
    stated: Stated,
) -> None:
    """The topic has 3; later 5: the two new ones are told what the others know."""
    job = stated.job()
    assert [] == await stated.look(job)
    await stated.kafka.create_topics([Topic(stated.charges, 3)])
    job = stated.job()
    assert [0, 1, 2] == await stated.look(job)
    job._looked_ms = 0  # An idle one looks once a second.
    assert [] == await stated.look(job)
    await add_partitions(stated.kafka.bootstrap, stated.charges, 5)
    job._looked_ms = 0
    assert [0, 1, 2, 3, 4] == await stated.look(job)


async def test_a_barrier_is_never_passed_by_progress_in_another_log(stated: Stated) -> None:
    """The hub's topic was made anew; what was read of the old one says nothing of the new one."""
    topic = "hub.lhr.usage.v1"
    await stated.kafka.create_topics([Topic(topic, 1), Topic(stated.charges, 1)])
    topic_id = (await stated.kafka.topics([topic]))[topic].topic_id
    admin = await asyncpg.connect(stated.admin)
    await admin.execute(
        "insert into consumer_progress values ($1, 0, 1, 1000000000, -1, 0, 'another')", topic
    )
    await admin.execute("update sources set watermark_ms = 7200000")
    await stated.kafka.publish([Message(topic, None, b"unread", partition=0)])
    job = stated.job()
    await stated.look(job)
    await stated.look(job)
    assert 3_600_000 == await admin.fetchval("select watermark_ms from hubs")
    await admin.execute("update consumer_progress set topic_id = $1", topic_id)
    await stated.look(job)
    assert 7_200_000 == await admin.fetchval("select watermark_ms from hubs")
    await admin.close()


async def test_nothing_is_stated_while_charges_and_entries_have_different_partitions(
    stated: Stated,
) -> None:
    """The job ends by name, and the process with it; nothing was written."""
    await stated.kafka.create_topics([Topic(stated.charges, 4), Topic(stated.entries, 2)])
    job = stated.job()
    with pytest.raises(PartitionMismatch, match="has 4 partitions and"):
        await stated.look(job)
    async with stated.writer.connection() as connection:
        assert 0 == await connection.fetchval("select count(*) from outbox")
        assert await connection.fetchval("select statement is null from hubs")
