"""`path.freshness`: event accepted by Kafka until visible in the tenant's balance (P9).

Open loop at a stated rate of one-device events over all tenants and hubs; ten probes a second are
timed from the broker's acknowledgement until `charged_micro` of the balance has reached what the
probe adds. Probes of one tenant overtake nothing: they are awaited in order.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import httpx2
import msgspec
from aiokafka import AIOKafkaProducer
from metering_events import peak_rss_mib

from hisab_contracts.topics import hub_topic

HEADERS = [("content-type", b"application/cloudevents+json")]
PROBE_TENANT = "makran-logistics"


def interval(
    hub: str, node: str, sequence: int, tenant: str, allocation: str, start_ms: int, end_ms: int
) -> bytes:
    """Write one interval event of one device in structured mode."""
    return msgspec.json.encode(
        {
            "specversion": "1.0",
            "type": "pk.hisab.usage.interval.v1",
            "source": f"/hubs/{hub}/nodes/{node}/epochs/bench",
            "id": f"{allocation}-{start_ms}",
            "sequence": f"{sequence:020d}",
            "data": {
                "hub": hub,
                "node_id": node,
                "tenant_id": tenant,
                "project_id": "main",
                "allocation_id": allocation,
                "sku": "h100-sxm-80",
                "price_class": "on_demand",
                "state": "running",
                "devices": [
                    {
                        "device_uuid": f"{allocation}/0",
                        "slice_uuid": f"{allocation}/0",
                        "share_ppm": 1_000_000,
                    }
                ],
                "start_ms": start_ms,
                "end_ms": end_ms,
            },
        }
    )


async def measure(
    stack: Mapping[str, Any], *, rate: int = 1000, duration_s: int = 25
) -> dict[str, Any]:
    """Return the figure; needs a running, seeded stack (`stack.json` as a mapping)."""
    producer = AIOKafkaProducer(
        bootstrap_servers=stack["kafka"]["bootstrap_servers"], acks="all", linger_ms=2
    )
    await producer.start()
    try:
        stop = asyncio.Event()
        load = asyncio.create_task(_load(producer, stack, rate - 10, stop))
        await asyncio.sleep(2)
        samples = await _probe(producer, stack, duration_s)
        stop.set()
        sent = await load
    finally:
        await producer.stop()
    samples.sort()
    return {
        "name": "path.freshness",
        "value": samples[len(samples) * 99 // 100],
        "unit": "ms",
        "rate": rate,
        "p50_ms": samples[len(samples) // 2],
        "p99_ms": samples[len(samples) * 99 // 100],
        "work": sent + len(samples),
        "seconds": duration_s + 2,
        "samples": len(samples),
        "baseline": None,
        "ratio": None,
        "peak_rss_mib": peak_rss_mib(stack["services"]["metering"]["pid"]),
    }


async def _load(
    producer: AIOKafkaProducer, stack: Mapping[str, Any], rate: int, stop: asyncio.Event
) -> int:
    """Emit `rate` events a second, each growing its allocation by one second of usage."""
    hubs = list(stack["topics"]["hub"])
    tenants = [name for name in stack["keys"]["tenant"] if name != PROBE_TENANT]
    origin_ms = int(time.time() * 1000) - 6 * 3_600_000
    sent, began = 0, time.monotonic()
    while not stop.is_set():
        due = int((time.monotonic() - began) * rate)
        while sent < due:
            lane, turn = sent % 600, sent // 600
            hub, node = hubs[lane % len(hubs)], f"load{lane % 24:02d}"
            event = interval(
                hub,
                node,
                turn * 25 + lane // 24 + 1,
                tenants[lane % len(tenants)],
                f"load-{lane}",
                origin_ms + turn * 1000,
                origin_ms + (turn + 1) * 1000,
            )
            key = f"/hubs/{hub}/nodes/{node}".encode()
            await producer.send(hub_topic(hub), event, key=key, headers=HEADERS)
            sent += 1
        await asyncio.sleep(0.005)
    return sent


async def _probe(
    producer: AIOKafkaProducer, stack: Mapping[str, Any], duration_s: int
) -> list[int]:
    """Time probes one after another, at most ten a second; milliseconds each."""
    hub = next(iter(stack["topics"]["hub"]))
    url = f"{stack['services']['ledger']['url']}/v1/tenants/{PROBE_TENANT}/balance"
    headers = {"authorization": f"Bearer {stack['keys']['tenant'][PROBE_TENANT]}"}
    samples: list[int] = []
    async with httpx2.AsyncClient(headers=headers, timeout=10) as client:
        charged = await _charged(client, url)
        origin_ms = int(time.time() * 1000) - 6 * 3_600_000
        origin_ms -= origin_ms % 3_600_000
        ends = time.monotonic() + duration_s
        while time.monotonic() < ends:
            number = len(samples)
            start_ms = origin_ms + number * 3000
            event = interval(
                hub,
                "probe",
                number + 1,
                PROBE_TENANT,
                f"probe-{origin_ms}",
                start_ms,
                start_ms + 3000,
            )
            key = f"/hubs/{hub}/nodes/probe".encode()
            await producer.send_and_wait(hub_topic(hub), event, key=key, headers=HEADERS)
            accepted = time.monotonic()
            before = charged
            while charged <= before:
                if time.monotonic() - accepted > 30:
                    raise TimeoutError("a probe was not visible in the balance after 30 s")
                await asyncio.sleep(0.004)
                charged = await _charged(client, url)
            seen = time.monotonic()
            samples.append(int((seen - accepted) * 1000))
            await asyncio.sleep(max(0.0, 0.1 - (seen - accepted)))
    return samples


async def _charged(client: httpx2.AsyncClient, url: str) -> int:
    answer = await client.get(url)
    answer.raise_for_status()
    return int(answer.json()["charged_micro"])
