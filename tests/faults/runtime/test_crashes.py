"""kill -9 of a consumer process: nothing lost, nothing twice; a killer record is put aside."""

from __future__ import annotations

import asyncio
import functools
import random
import sys
from asyncio.subprocess import Process
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest

from e2e.outside import until
from infrastructure import Database, Infrastructure
from runtime.kafka import Kafka, Message, Topic
from runtime.migrations import migrate

CHILD = Path(__file__).with_name("child.py")


async def _prepare(dsns: Database, folder: Path) -> None:
    await migrate("metering", folder, dsns.owner)
    admin = await asyncpg.connect(dsns.admin)
    await admin.execute(
        "create table sink (topic text, partition int, place bigint,"
        " primary key (topic, partition, place));"
        "grant select, insert on sink to metering_writer"
    )
    await admin.close()


async def _stored(dsns: Database, topic: str) -> list[tuple[int, int]]:
    admin = await asyncpg.connect(dsns.admin)
    rows = await admin.fetch("select partition, place from sink where topic = $1", topic)
    await admin.close()
    return sorted((row["partition"], row["place"]) for row in rows)


def _at_least(count: int) -> Callable[[list[tuple[int, int]]], bool]:
    return lambda found: len(found) >= count


async def _died_or_stored(child: Process, dsns: Database, topic: str) -> tuple[bool, int]:
    return child.returncode is not None, len(await _stored(dsns, topic))


@pytest.mark.slow
@pytest.mark.defect("M4", "F13", "F22")
async def test_a_consumer_killed_again_and_again_loses_and_doubles_nothing(
    apache_kafka: Infrastructure,
    blank: Callable[[str], Database],
    unique: Callable[[str], str],
    tmp_path: Path,
) -> None:
    """Five kills at random moments while records keep coming; the sink has each record once."""
    dsns, topic, group = blank("metering"), unique("in"), unique("group")
    await _prepare(dsns, tmp_path)
    kafka = Kafka(apache_kafka.bootstrap_servers, client="test", instance="t")
    await kafka.create_topics([Topic(topic, 4)])
    arguments = (sys.executable, str(CHILD), kafka.bootstrap, dsns.writer, topic, group)
    places: list[tuple[int, int]] = []
    dice = random.Random(7)
    for _ in range(5):
        child = await asyncio.create_subprocess_exec(*arguments)
        places += await kafka.publish([Message(topic, b"%d" % n, b"v") for n in range(3000)])
        # Somewhere in the middle, wherever the machine is by then.
        enough = len(await _stored(dsns, topic)) + dice.randrange(1, 3000)
        await until(lambda: _stored(dsns, topic), _at_least(enough), patience_s=1800)
        child.kill()
        await child.wait()
    child = await asyncio.create_subprocess_exec(*arguments)
    await until(
        lambda: _stored(dsns, topic), lambda found: len(found) >= len(places), patience_s=1800
    )
    child.kill()
    await child.wait()
    await kafka.close()
    assert sorted(places) == await _stored(dsns, topic)


@pytest.mark.slow
@pytest.mark.defect("M6")
async def test_a_record_that_kills_the_process_is_put_aside_unread(
    apache_kafka: Infrastructure,
    blank: Callable[[str], Database],
    unique: Callable[[str], str],
    tmp_path: Path,
) -> None:
    """The process dies of one record; a supervisor brings it back; the rest is stored."""
    dsns, topic, group = blank("metering"), unique("in"), unique("group")
    await _prepare(dsns, tmp_path)
    kafka = Kafka(apache_kafka.bootstrap_servers, client="test", instance="t")
    await kafka.create_topics([Topic(topic, 1)])
    values = [b"poison" if n == 70 else b"v" for n in range(120)]
    await kafka.publish([Message(topic, b"k", value, partition=0) for value in values])
    arguments = (sys.executable, str(CHILD), kafka.bootstrap, dsns.writer, topic, group)
    deaths = 0
    async with asyncio.timeout(1800):
        while True:
            child = await asyncio.create_subprocess_exec(*arguments)
            look = functools.partial(_died_or_stored, child, dsns, topic)
            died, _ = await until(look, lambda seen: seen[0] or seen[1] >= 119, patience_s=1800)
            if not died:
                break
            deaths += 1
    child.kill()
    await child.wait()
    await kafka.close()
    assert [(0, 70)] == await _stored(dsns, "unread")
    assert [(0, n) for n in range(120) if n != 70] == await _stored(dsns, topic)
    assert 3 <= deaths <= 5
