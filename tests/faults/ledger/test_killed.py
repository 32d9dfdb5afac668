"""The ledger killed with -9 while charges stream in: nothing lost, nothing doubled."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import asyncpg
import msgspec
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from hisab_contracts.entries import Entry, read_entry_message
from hisab_contracts.topics import CHARGES, ENTRIES, partition_of
from stack import Stack
from unit.ledger.values import DAY_MS, HOUR_MS, total

TENANTS = ("indus-foundry", "ravi-health", "khyber-media", "uni-hingol")
CHARGES_SENT = 4_000
KILLS = 3


@pytest.mark.slow
@pytest.mark.defect("M29", "L5", "L6", "L18", "F46")
async def test_charges_survive_the_ledger_being_killed_again_and_again(own_stack: Stack) -> None:
    """Every charge is booked once and published; the books audit clean afterwards."""
    own_stack.stop("metering")
    producer = AIOKafkaProducer(bootstrap_servers=own_stack.bootstrap_servers, acks="all")
    await producer.start()
    partitions = len(await producer.partitions_for(CHARGES))
    try:
        for number in range(CHARGES_SENT):
            tenant_id = TENANTS[number % len(TENANTS)]
            said = total(
                number + 1,
                bucket=f"{number:x}",
                tenant_id=tenant_id,
                hour_ms=DAY_MS + number % 24 * HOUR_MS,
            )
            key = tenant_id.encode()
            await producer.send(
                CHARGES, msgspec.json.encode(said), key=key, partition=partition_of(key, partitions)
            )
            if number % (CHARGES_SENT // KILLS) == CHARGES_SENT // KILLS - 1:
                await producer.flush()
                killed = own_stack.kill("ledger")
                own_stack.wait_back("ledger", killed)
        await producer.flush()
    finally:
        await producer.stop()
    database = await asyncpg.connect(own_stack.database("ledger", "reader"))
    try:
        booked = 0
        async with asyncio.timeout(1800):
            while booked < CHARGES_SENT:
                booked = await database.fetchval("select count(*) from buckets")
                await asyncio.sleep(0.2)
        charged = await database.fetchval("select sum(charged_micro)::bigint from books")
        entries = await database.fetchval("select count(*) from entries where kind = 'charge'")
    finally:
        await database.close()
    assert (CHARGES_SENT, CHARGES_SENT * (CHARGES_SENT + 1) // 2) == (entries, charged)
    assert CHARGES_SENT == len(await published(own_stack, partitions))
    assert (0, "all books are sound\n") == audited(own_stack)


def audited(stack: Stack) -> tuple[int, str]:
    """What the audit command says."""
    audit = subprocess.run(
        [sys.executable, "-m", "ledger", "audit"],
        env=os.environ | {"HISAB_DB_READER": stack.database("ledger", "reader")},
        capture_output=True,
        text=True,
        check=False,
    )
    return audit.returncode, audit.stdout


async def published(stack: Stack, partitions: int) -> set[tuple[str, int]]:
    """Which charges a reader of the entries topic finds, duplicates dropped by (tenant, seq)."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=stack.bootstrap_servers,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    found: dict[tuple[str, int], str] = {}
    try:
        # As many as the charges have: a tenant keeps its partition number.
        consumer.assign([TopicPartition(ENTRIES, part) for part in range(partitions)])
        async with asyncio.timeout(1800):
            while len(found) < CHARGES_SENT:
                for records in (await consumer.getmany(timeout_ms=500)).values():
                    for record in records:
                        said = read_entry_message(record.value)
                        if isinstance(said, Entry) and said.charge is not None:
                            place = (said.tenant_id, said.seq)
                            assert found.setdefault(place, said.hash) == said.hash
    finally:
        await consumer.stop()
    return set(found)
