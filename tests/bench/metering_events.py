"""How many one-device events a second go from Kafka through coverage and rating to charges.

A hub of its own is registered, metering is stopped, a quarter of a day of one-minute intervals is
produced, and the same records are once fetched and decoded by a bare consumer: the baseline. Then
metering is started. The clock runs from the moment its stored offsets begin to move until nothing
waits any more and every charge is acknowledged by the broker; the events taken in before the clock
started do not count. The accounts must come out exact, or there is no figure.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx2
import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from confluent_kafka import Producer

from hisab_contracts.events import INTERVAL, Refused, read_event
from hisab_contracts.ids import HubCode
from stack import Stack

EVENTS = 330_000
EVENTS_OF_EIGHT = 240_000
NODES = 64
DEVICES_PER_NODE = 8
FIRST_MS = 1_751_310_000_000
MINUTE_MS = 60_000
TENANTS = ("indus-foundry", "khyber-media", "ravi-health", "sutlej-agri", "uni-hingol")
PATIENCE_S = 900


async def measure(stack: Stack) -> list[dict[str, Any]]:
    """Measure one-device events, then eight-device events, each at a hub of its own."""
    if stack.provider["kafka"] == "memory":
        print("metering.events: the in-memory broker keeps too little; needs Apache Kafka")
        return []
    figures = []
    for name, hub, devices, events in (
        ("metering.events", "bench-one", 1, EVENTS),
        ("metering.events_of_eight", "bench-eight", 8, EVENTS_OF_EIGHT),
    ):
        figures.append(await _measure(stack, name, HubCode(hub), devices, events))
    return figures


async def _measure(
    stack: Stack, name: str, hub: HubCode, devices: int, events: int
) -> dict[str, Any]:
    operator = {"Authorization": f"Bearer {stack.key('operator')}"}
    url = stack.url("metering")
    async with httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        answer = await client.post(
            "/v1/hubs",
            json={"hub": hub, "name": name, "heartbeat_ms": 60_000},
            headers=operator | {"Idempotency-Key": f"bench-{hub}"},
        )
        answer.raise_for_status()
    stack.stop("metering")
    topic = f"hub.{hub}.usage.v1"
    await asyncio.to_thread(_produce, stack.bootstrap_servers, hub, devices, events)
    bare = await _baseline(stack.bootstrap_servers, topic, hub, events)
    stack.start("metering")
    async with httpx2.AsyncClient(
        base_url=stack.url("metering"), timeout=60, trust_env=False, headers=operator
    ) as client:
        counted, seconds = await _drained(stack, client, topic, events)
        await _must_be_exact(client, hub, events * devices * MINUTE_MS * 1_000_000)
    return {
        "name": name,
        "value": round(counted / seconds),
        "unit": "1/s",
        "work": counted,
        "seconds": round(seconds, 2),
        "baseline": {"name": "getmany+decode", "value": round(bare)},
        "ratio": round(counted / seconds / bare, 3),
        "peak_rss_mib": peak_rss_mib(stack.pid("metering")),
    }


def _events(hub: str, devices: int, events: int) -> Iterator[tuple[str, bytes]]:
    """Yield (key, record): every device of every node reports minute after minute."""
    encode = msgspec.json.Encoder().encode
    groups = DEVICES_PER_NODE // devices
    for number in range(events):
        minute, place = divmod(number, NODES * groups)
        node, group = divmod(place, groups)
        names = [f"GPU-{node:02d}-{group * devices + device}" for device in range(devices)]
        key = f"/hubs/{hub}/nodes/n{node:02d}"
        start_ms = FIRST_MS + minute * MINUTE_MS
        yield (
            key,
            encode(
                {
                    "specversion": "1.0",
                    "type": INTERVAL,
                    "source": f"{key}/epochs/e1",
                    "id": f"{node}-{number}",
                    "time": "2025-06-30T19:01:00.000Z",
                    "sequence": f"{minute * groups + group + 1:020d}",
                    "datacontenttype": "application/json",
                    "data": {
                        "hub": hub,
                        "cluster": "c1",
                        "node_id": f"n{node:02d}",
                        "tenant_id": TENANTS[place % len(TENANTS)],
                        "project_id": "main",
                        "allocation_id": f"job-{place}",
                        "hold_id": None,
                        "sku": "h100-sxm-80",
                        "price_class": "on_demand",
                        "state": "running",
                        "devices": [
                            {"device_uuid": name, "slice_uuid": name, "share_ppm": 1_000_000}
                            for name in names
                        ],
                        "start_ms": start_ms,
                        "end_ms": start_ms + MINUTE_MS,
                        "energy_start_mj": None,
                        "energy_end_mj": None,
                    },
                }
            ),
        )


def _produce(bootstrap_servers: str, hub: str, devices: int, events: int) -> None:
    producer = Producer(
        {
            "bootstrap.servers": bootstrap_servers,
            "partitioner": "murmur2",
            "enable.idempotence": True,
            "linger.ms": 20,
            "queue.buffering.max.messages": 200_000,
        }
    )
    headers: dict[str, str | bytes | None] = {"content-type": b"application/cloudevents+json"}
    for key, value in _events(hub, devices, events):
        while True:
            try:
                producer.produce(f"hub.{hub}.usage.v1", value, key, headers=headers)
                break
            except BufferError:
                producer.poll(0.1)
    if producer.flush(PATIENCE_S):
        raise RuntimeError("the broker did not take every event")


async def _baseline(bootstrap_servers: str, topic: str, hub: HubCode, events: int) -> float:
    """Fetch and decode the same records with nothing behind it: records per second."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap_servers, enable_auto_commit=False, auto_offset_reset="earliest"
    )
    await consumer.start()
    try:
        partitions = sorted(await _partitions(consumer, topic))
        consumer.assign([TopicPartition(topic, number) for number in partitions])
        seen, began = 0, time.perf_counter()
        while seen < events:
            for records in (await consumer.getmany(timeout_ms=1_000, max_records=4_000)).values():
                for record in records:
                    if isinstance(read_event(record.value, record.headers, hub), Refused):
                        raise RuntimeError("an event of ours is refused")  # noqa: TRY004
                seen += len(records)
        return seen / (time.perf_counter() - began)
    finally:
        await consumer.stop()


async def _partitions(consumer: AIOKafkaConsumer, topic: str) -> set[int]:
    while True:
        await consumer._client.force_metadata_update()
        found = consumer.partitions_for_topic(topic)
        if found:
            return set(found)
        consumer._client.add_topic(topic)


async def _drained(
    stack: Stack, client: httpx2.AsyncClient, topic: str, events: int
) -> tuple[int, float]:
    """Wait until every event is metered and every charge acknowledged: events, seconds."""
    connection = await asyncpg.connect(stack.database("metering", "reader"))
    deadline = time.perf_counter() + PATIENCE_S
    try:
        before = 0
        while before == 0:
            before = await _taken_in(connection, topic, deadline)
            await asyncio.sleep(0.01)
        began = time.perf_counter()
        while await _taken_in(connection, topic, deadline) < events:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        while await _waiting(connection):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        seconds = time.perf_counter() - began
    finally:
        await connection.close()
    status = (await client.get("/v1/status")).json()
    if (status["lag_records"], status["outbox_depth"]) != (0, 0):
        raise RuntimeError(f"not drained: {status}")
    return events - before, seconds


_TAKEN_IN = "select coalesce(sum(next_offset), 0)::bigint from consumer_progress where topic = $1"


async def _taken_in(connection: asyncpg.Connection[Any], topic: str, deadline: float) -> int:
    if time.perf_counter() > deadline:
        raise RuntimeError("metering did not drain in time")
    return int(await connection.fetchval(_TAKEN_IN, topic))


_WAITING = "select exists (select from outbox where topic = 'metering.charges.v1')"


async def _waiting(connection: asyncpg.Connection[Any]) -> bool:
    return bool(await connection.fetchval(_WAITING))


async def _must_be_exact(client: httpx2.AsyncClient, hub: HubCode, expected_gpu_ns: int) -> None:
    said = (await client.get("/v1/reconciliation", params={"hub": hub})).json()
    found = (said["billed_gpu_ns"], said["reported_gpu_ns"], said["difference_gpu_ns"])
    if found != (str(expected_gpu_ns), str(expected_gpu_ns), "0"):
        raise RuntimeError(f"wrong accounts: {said}")


def peak_rss_mib(pid: int | None) -> int:
    """Return the most memory a running process has had."""
    if pid is None:
        raise RuntimeError("a measured service is down")
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    return 0
