"""`ledger.charges`, `_hot`, `_terms`: charges from Kafka until booked and committed.

300 000 charges are produced while the ledger is down; then it starts, and what is timed begins
when the first of them is booked: reading, deciding, lots, postings, buckets, hashes, commits, with
the sequencer publishing meanwhile. Spread: 2 000 tenants, each with a lot that pays part of it.
Hot: one tenant. Terms: as many tenants with lots that pay for all: a subsidy of 40 % at one hub and
a lot for one project and class behind it, against the same two lots without scope and share; a
charge then has one posting more. The baseline of the first inserts the same rows, 1 000 at a time,
into a table without checks, in the same minute on the same server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import asyncpg
import httpx2
import msgspec
from aiokafka import AIOKafkaProducer
from metering_events import peak_rss_mib

from hisab_contracts.charges import BucketTotal
from hisab_contracts.entries import Entry
from hisab_contracts.ids import (
    AllocationId,
    HubCode,
    NodeId,
    PriceClass,
    PriceVersion,
    ProjectId,
    Sku,
    TenantId,
    bucket_id,
)
from hisab_contracts.topics import CHARGES, partition_of
from ledger.store.entries import entries_after, insert_entries
from stack import Stack

HOUR_MS = 3_600_000
FROM_MS = 1_751_310_000_000
LIMIT_MICRO = 10**15
LOT_MICRO = 10**11
_SMALL = {"grant_micro": str(LOT_MICRO // 100)}
"""Pays for the first charge of a tenant and some of the second."""
_ALL = {"grant_micro": str(LOT_MICRO)}
_SUBSIDY = _ALL | {"scope": {"hubs": ["lhr"]}, "coverage_bps": 4_000}
_REST = _ALL | {"scope": {"projects": ["main"], "price_classes": ["on_demand"]}}
PROGRAMME = "bench"
"""With a budget for all of them; a repeat with its key opens it once."""
BASELINE_ROWS = 60_000
ROWS_AT_ONCE = 1_000
AT_ONCE = 32


async def measure(
    stack: Stack, *, charges: int = 300_000, tenants: int = 2_000
) -> list[dict[str, Any]]:
    """Return both figures; needs a running, seeded stack of its own."""
    for other in ("metering", "invoicing"):
        stack.stop(other)
    spread = [f"bench-{number:04d}" for number in range(tenants)]
    await open_tenants(stack, [*spread, "bench-hot"])
    plain = [f"plain-{number:04d}" for number in range(tenants)]
    terms = [f"terms-{number:04d}" for number in range(tenants)]
    await open_tenants(stack, plain, lots=[_ALL, _ALL])
    await open_tenants(stack, terms, lots=[_SUBSIDY, _REST])
    partitions = len(await _partitions(stack))
    database = await asyncpg.connect(stack.database("ledger", "reader"))
    try:
        figure = await _booked(stack, database, _charges(spread, charges), partitions)
        bare = await _bare_insert(stack, spread)
        hot = await _booked(stack, database, _charges(["bench-hot"], charges), partitions)
        whole = await _booked(stack, database, _charges(plain, charges // 2), partitions)
        scoped = await _booked(stack, database, _charges(terms, charges // 2), partitions)
        bytes_per_entry = await database.fetchval(
            "select pg_total_relation_size('entries') / count(*) from entries"
        )
    finally:
        await database.close()
    return [
        {
            "name": "ledger.charges",
            **figure,
            "baseline": {"name": "bare multi-row insert", "value": bare},
            "ratio": round(figure["value"] / bare, 3),
            "bytes_per_entry": bytes_per_entry,
        },
        {
            "name": "ledger.charges_hot",
            **hot,
            "baseline": {"name": "ledger.charges", "value": figure["value"]},
            "ratio": round(hot["value"] / figure["value"], 3),
        },
        {
            "name": "ledger.charges_terms",
            **scoped,
            "baseline": {"name": "the same lots without terms", "value": whole["value"]},
            "ratio": round(scoped["value"] / whole["value"], 3),
        },
    ]


async def open_tenants(
    stack: Stack, names: Sequence[str], *, lots: Sequence[Mapping[str, Any]] = (_SMALL,)
) -> None:
    """Register commercial tenants, each with these lots in order, through the API."""
    gate = asyncio.Semaphore(AT_ONCE)
    async with httpx2.AsyncClient(
        base_url=stack.url("ledger"), timeout=60, trust_env=False
    ) as client:

        async def post(path: str, body: dict[str, Any], role: str, key: str) -> dict[str, Any]:
            answer = await client.post(
                path,
                json=body,
                headers={
                    "authorization": f"Bearer {stack.key(role)}",
                    "idempotency-key": f"bench:{key}",
                },
            )
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
            return found

        async def open_one(name: str) -> None:
            async with gate:
                tenant = {
                    "tenant_id": name,
                    "name": name,
                    "kind": "commercial",
                    "currency": "PKR",
                    "credit_limit_micro": str(LIMIT_MICRO),
                }
                await post("/v1/tenants", tenant, "operator", name)
                for priority, terms in enumerate(lots):
                    grant = {
                        "tenant_id": name,
                        "programme_id": PROGRAMME,
                        "priority": priority,
                        "effective_at": "2025-01-01T00:00:00.000Z",
                        "expires_at": None,
                        **terms,
                    }
                    lot = f"{name}:{priority}"
                    proposed = await post("/v1/grants", grant, "officer", f"grant:{lot}")
                    path = f"/v1/grants/{proposed['grant_id']}/approve"
                    await post(path, {}, "approver", f"approve:{lot}")

        budget = {"programme_id": PROGRAMME, "name": "Bench", "budget_micro": str(10**16)}
        await post("/v1/programmes", budget, "operator", PROGRAMME)
        await asyncio.gather(*(open_one(name) for name in names))


async def _partitions(stack: Stack) -> set[int]:
    producer = AIOKafkaProducer(bootstrap_servers=stack.bootstrap_servers)
    await producer.start()
    try:
        found: set[int] = await producer.partitions_for(CHARGES)
        return found
    finally:
        await producer.stop()


def _charges(tenants: Sequence[str], count: int) -> list[BucketTotal]:
    """Write one message per bucket, tenant by tenant within an hour, as metering would."""
    return [charge_of(tenants[number % len(tenants)], number) for number in range(count)]


def charge_of(tenant: str, number: int) -> BucketTotal:
    """Write the message of one bucket; each number is a bucket of its own."""
    tenant_id, project_id = TenantId(tenant), ProjectId("main")
    hub, node_id = HubCode("lhr"), NodeId(f"n{number % 16:02d}")
    allocation_id = AllocationId(f"job-{number % 20_000}")
    hour_ms = FROM_MS + number // 20_000 * HOUR_MS
    return BucketTotal(
        tenant_id=tenant_id,
        bucket_id=bucket_id(
            tenant_id=tenant_id,
            project_id=project_id,
            allocation_id=allocation_id,
            hub=hub,
            node_id=node_id,
            rate_line_id="bench",
            hour_ms=hour_ms,
        ),
        project_id=project_id,
        allocation_id=allocation_id,
        hold_id=None,
        hub=hub,
        node_id=node_id,
        sku=Sku("h100-sxm-80"),
        price_class=PriceClass("on_demand"),
        price_version=PriceVersion("b" * 64),
        hour_ms=hour_ms,
        revision=0,
        total_gpu_ns=3_600_000_000_000 - number,
        total_micro=840_000_000 - number,
    )


_BOOKED = "select sum(seq)::bigint from books"


async def _booked(
    stack: Stack,
    database: asyncpg.Connection[asyncpg.Record],
    messages: Sequence[BucketTotal],
    partitions: int,
) -> dict[str, Any]:
    """Produce while the ledger is down, start it, and time from the first booked to the last."""
    before = int(await database.fetchval(_BOOKED))
    stack.stop("ledger")
    await _produce(stack, messages, partitions)
    stack.start("ledger")
    first = before
    while first == before:
        await asyncio.sleep(0.01)
        first = int(await database.fetchval(_BOOKED))
    started_s = time.perf_counter()
    done = first
    while done < before + len(messages):
        await asyncio.sleep(0.05)
        done = int(await database.fetchval(_BOOKED))
    seconds = time.perf_counter() - started_s
    work = done - first
    return {
        "value": round(work / seconds),
        "unit": "1/s",
        "work": work,
        "seconds": round(seconds, 2),
        "peak_rss_mib": peak_rss_mib(stack.pid("ledger")),
    }


async def _produce(stack: Stack, messages: Sequence[BucketTotal], partitions: int) -> None:
    producer = AIOKafkaProducer(
        bootstrap_servers=stack.bootstrap_servers, linger_ms=20, max_batch_size=256 * 1024
    )
    await producer.start()
    try:
        for begin in range(0, len(messages), 5_000):
            sent = [
                await producer.send(
                    CHARGES,
                    msgspec.json.encode(message),
                    key=message.tenant_id.encode(),
                    partition=partition_of(message.tenant_id.encode(), partitions),
                )
                for message in messages[begin : begin + 5_000]
            ]
            await asyncio.gather(*sent)
    finally:
        await producer.stop()


async def _bare_insert(stack: Stack, tenants: Sequence[str]) -> int:
    """Insert the same rows into a table like `entries` but without checks and triggers; rows/s."""
    admin = stack.content()["infrastructure"]["postgres"]["admin"]
    connection = await asyncpg.connect(on_database(admin, stack.database("ledger", "reader")))
    try:
        entries: list[Entry] = []
        for tenant in tenants:
            entries += await entries_after(connection, tenant, 0, BASELINE_ROWS)  # type: ignore[arg-type]
            if len(entries) >= BASELINE_ROWS:
                break
        await connection.execute("drop schema if exists bench cascade")
        await connection.execute("create schema bench")
        await connection.execute(
            "create table bench.entries (like public.entries including defaults including indexes)"
        )
        await connection.execute("set search_path = bench, public")
        started_s = time.perf_counter()
        for begin in range(0, len(entries), ROWS_AT_ONCE):
            rows = entries[begin : begin + ROWS_AT_ONCE]
            await insert_entries(connection, rows, [None] * len(rows))  # type: ignore[arg-type]
        seconds = time.perf_counter() - started_s
        await connection.execute("drop schema bench cascade")
    finally:
        await connection.close()
    return round(len(entries) / seconds)


def on_database(admin: str, like: str) -> str:
    """Return the superuser's DSN on the database that another DSN names."""
    database = like.rpartition("/")[2].partition("?")[0]
    head, _, tail = admin.rpartition("/")
    query = tail.partition("?")[2]
    return f"{head}/{database}" + (f"?{query}" if query else "")
