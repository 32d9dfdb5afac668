"""A consumer process for the crash tests: stores what it reads; dies of one value."""

from __future__ import annotations

import asyncio
import os
import resource
import sys
from typing import TYPE_CHECKING

import uvloop

from runtime.consumer import Batch, Consumer, Subscription
from runtime.database import Database
from runtime.kafka import Kafka

if TYPE_CHECKING:
    from runtime.database import Connection


async def main(bootstrap: str, dsn: str, topic: str, group: str, memory_bytes: str = "-1") -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_bytes), int(memory_bytes)))

    async def handle(batch: Batch, connection: Connection) -> None:
        if any(record.value == b"poison" for record in batch.records):
            os._exit(9)
        await connection.execute(
            "insert into sink select * from unnest($1::text[], $2::int[], $3::bigint[])",
            ["undecodable" if record.undecodable else record.topic for record in batch.records],
            [record.partition for record in batch.records],
            [record.offset for record in batch.records],
        )

    async def put_aside(batch: Batch, connection: Connection) -> None:
        [record] = batch.records
        await connection.execute("insert into sink values ('unread', $1, $2)", 0, record.offset)

    database = Database(dsn, name="child")
    await database.open()
    kafka = Kafka(bootstrap, client="child", instance="0")
    subscription = Subscription(group, (topic,), handle, put_aside, max_records=50)
    await Consumer(kafka, database, subscription).run(asyncio.Event())


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
