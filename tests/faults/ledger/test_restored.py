"""The ledger restored to an earlier point under traffic: it refuses, and goes on once recovered."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import httpx2
import msgspec
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from e2e.outside import Outside, outside_of, until
from faults.backup import Backup
from hisab_contracts.entries import Entry, read_entry_message
from hisab_contracts.topics import CHARGES, ENTRIES, partition_of
from retries import ANSWER_PATIENCE_S
from stack import Stack
from unit.ledger.values import DAY_MS, HOUR_MS, total

TENANTS = ("indus-foundry", "ravi-health", "khyber-media", "uni-hingol")
PAUSE_S = 0.01


@asynccontextmanager
async def traffic(stack: Stack) -> AsyncIterator[None]:
    """Charges that never end, as long as the block lasts."""
    producer = AIOKafkaProducer(bootstrap_servers=stack.bootstrap_servers, acks="all")
    await producer.start()
    partitions = len(await producer.partitions_for(CHARGES))

    async def send() -> None:
        for number in itertools.count():
            tenant_id = TENANTS[number % len(TENANTS)]
            key = tenant_id.encode()
            said = total(
                number + 1,
                bucket=f"{number:x}",
                tenant_id=tenant_id,
                hour_ms=DAY_MS + number % 24 * HOUR_MS,
            )
            await producer.send_and_wait(
                CHARGES, msgspec.json.encode(said), key=key, partition=partition_of(key, partitions)
            )
            await asyncio.sleep(PAUSE_S)

    sending = asyncio.create_task(send())
    try:
        yield
    finally:
        sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending
        await producer.stop()


async def heads(stack: Stack) -> dict[str, int]:
    """How far each tenant's book is."""
    connection = await asyncpg.connect(stack.database("ledger", "reader"))
    try:
        rows = await connection.fetch("select tenant_id, seq from books where kind <> 'fund'")
    finally:
        await connection.close()
    return {row["tenant_id"]: row["seq"] for row in rows}


async def published(stack: Stack) -> dict[tuple[str, int], set[str]]:
    """Every hash that was ever published for a place in a book."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=stack.bootstrap_servers,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    found: dict[tuple[str, int], set[str]] = {}
    try:
        await consumer._client.force_metadata_update()
        numbers = consumer.partitions_for_topic(ENTRIES) or set()
        where = [TopicPartition(ENTRIES, number) for number in numbers]
        consumer.assign(where)
        ends = await consumer.end_offsets(where)
        async with asyncio.timeout(120):
            while any([await consumer.position(part) < ends[part] for part in where]):
                for records in (await consumer.getmany(timeout_ms=500)).values():
                    for record in records:
                        said = read_entry_message(record.value)
                        if isinstance(said, Entry):
                            found.setdefault((said.tenant_id, said.seq), set()).add(said.hash)
    finally:
        await consumer.stop()
    return found


async def answers(stack: Stack, path: str) -> tuple[int, dict[str, Any]]:
    """Status and body of an answer of the ledger; 0 while it is down."""
    headers = {"authorization": f"Bearer {stack.key('operator')}"}
    async with httpx2.AsyncClient(timeout=ANSWER_PATIENCE_S, trust_env=False) as client:
        try:
            answer = await client.get(stack.url("ledger") + path, headers=headers)
        except httpx2.HTTPError:
            return 0, {}
    return answer.status_code, answer.json()


def ledger(stack: Stack, *arguments: str) -> tuple[int, str]:
    """Run a command of the ledger as an operator does."""
    writer = Backup.of(stack, "ledger").dsn("ledger_writer")
    done = subprocess.run(
        [sys.executable, "-m", "ledger", *arguments],
        env=os.environ
        | {
            "HISAB_DB_WRITER": writer,
            "HISAB_DB_READER": stack.database("ledger", "reader"),
            "HISAB_KAFKA": stack.bootstrap_servers,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


async def acknowledged_later(outside: Outside, stack: Stack) -> dict[str, Any]:
    """What only the API can bring, and no charge brings again: all of it acknowledged."""
    tenant_id = await outside.tenant("startup", limit_micro=0)
    await outside.grant(tenant_id, 5_000_000)
    hold = {
        "tenant_id": tenant_id,
        "project_id": "main",
        "job_ref": "slurm-1",
        "allocation_id": None,
        "hub": "lhr",
        "sku": "h100-sxm-80",
        "hold_micro": "2000000",
        "expires_at": "2099-01-01T00:00:00.000Z",
    }
    placed = await outside.api.post("ledger", "/v1/holds", "scheduler", hold)
    key = {"role": "auditor", "tenant_id": None}
    made = await outside.api.post("ledger", "/v1/keys", "operator", key)
    await outside.api.post("ledger", f"/v1/keys/{made['key_id']}/revoke", "operator", {})
    return {"tenant_id": tenant_id, "hold_id": placed["hold_id"], "secret": made["secret"]}


@pytest.mark.slow
async def test_a_ledger_restored_under_traffic_refuses_and_recovers_what_it_published(
    own_stack: Stack, apache_kafka: object
) -> None:
    """No place in a book ever has two entries; what was acknowledged and published is back."""
    own_stack.stop("metering")
    backup = Backup.of(own_stack, "ledger")
    async with traffic(own_stack), outside_of(own_stack) as outside:
        await until(lambda: heads(own_stack), lambda x: sum(x.values()) > 60)
        own_stack.stop("ledger")
        await backup.take()
        saved = await heads(own_stack)
        own_stack.start("ledger")
        await until(lambda: answers(own_stack, "/readyz"), lambda x: x[0] == 200)
        later = await acknowledged_later(outside, own_stack)
        await until(lambda: heads(own_stack), lambda x: sum(x.values()) > sum(saved.values()) + 60)
        await until(lambda: published(own_stack), lambda x: (later["tenant_id"], 2) in x)
        before = await published(own_stack)
        # Under the running ledger: it must notice by itself that this is another database.
        await backup.restore()
        _, problem = await until(
            lambda: answers(own_stack, "/v1/status"),
            lambda x: x[1].get("code") == "behind-published",
        )
        assert "ledger recover" in problem["detail"]
        assert (503, 503, 200) == (
            problem["status"],
            (await answers(own_stack, "/readyz"))[0],
            (await answers(own_stack, "/healthz"))[0],
        )
        assert saved == await heads(own_stack)
        code, said = ledger(own_stack, "recover", "--accepted-by", "ops", "--reason", "disk lost")
        assert (0, True) == (code, f"tenant {later['tenant_id']} taken back" in said), said
        await until(lambda: answers(own_stack, "/readyz"), lambda x: x[0] == 200)
        balance = await outside.api.get(
            "ledger", f"/v1/tenants/{later['tenant_id']}/balance", "operator"
        )
        assert ("3000000", "2000000") == (balance["available_micro"], balance["held_micro"])
        async with httpx2.AsyncClient(timeout=ANSWER_PATIENCE_S, trust_env=False) as client:
            refused = await client.get(
                own_stack.url("ledger") + "/v1/status",
                headers={"authorization": f"Bearer {later['secret']}"},
            )
        assert 401 == refused.status_code
        recovered = await heads(own_stack)
        await until(
            lambda: heads(own_stack), lambda x: sum(x.values()) > sum(recovered.values()) + 50
        )
    await until(lambda: answers(own_stack, "/v1/status"), lambda x: x[1].get("outbox_depth") == 0)
    after = await published(own_stack)
    assert [] == [place for place, hashes in after.items() if len(hashes) != 1]
    assert before == {place: after[place] for place in before}
    code, said = ledger(own_stack, "audit")
    assert (0, "all books are sound\n") == (code, said)
