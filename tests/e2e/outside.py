"""Somebody outside: says events through Kafka, asks over HTTP, and knows nothing of our insides.

Each test makes tenants, hubs and allocations of its own, so that one running stack serves many.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiokafka import AIOKafkaProducer

from demo.api import Api, Json
from stack import Stack

T = TypeVar("T")
PATIENCE_S = 600
STRUCTURED = [("content-type", b"application/cloudevents+json")]
INTERVAL = "pk.hisab.usage.interval.v1"
WATERMARK = "pk.hisab.hub.watermark.v1"
ENDED = "pk.hisab.allocation.ended.v1"
JULY_31 = 1_753_920_000_000
HOUR = 3_600_000
MINUTE = 60_000
_numbers = itertools.count(1)


def unique(stem: str) -> str:
    """Return a name that no other test uses."""
    return f"{stem}-{os.getpid()}-{next(_numbers)}"


def at(clock: str) -> int:
    """Return an instant of 31 July 2025, UTC: `at("10:30")`."""
    hours, minutes = clock.split(":")
    return JULY_31 + int(hours) * HOUR + int(minutes) * MINUTE


@dataclass
class Outside:
    """What a test holds in its hands."""

    stack: Stack
    api: Api
    producer: AIOKafkaProducer
    _sequences: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    async def tenant(self, kind: str = "commercial", limit_micro: int = 10**15) -> str:
        """Open a tenant of one's own."""
        tenant_id = unique(kind)
        body = {
            "tenant_id": tenant_id,
            "name": tenant_id,
            "kind": kind,
            "currency": "PKR",
            "credit_limit_micro": str(limit_micro),
        }
        await self.api.post("ledger", "/v1/tenants", "operator", body)
        return tenant_id

    async def hub(self) -> str:
        """Register a hub of one's own and wait until its topic is there."""
        code = unique("hub")
        body = {"hub": code, "name": code, "heartbeat_ms": 60_000}
        await self.api.post("metering", "/v1/hubs", "operator", body)
        return code

    async def grant(self, tenant_id: str, micro: int) -> str:
        """Have an officer propose and an approver approve a lot from 2025 to 2030."""
        body = {
            "tenant_id": tenant_id,
            "programme_id": "ignite",
            "grant_micro": str(micro),
            "priority": 100,
            "effective_at": "2025-01-01T00:00:00.000Z",
            "expires_at": "2030-01-01T00:00:00.000Z",
            "scope": {},
            "coverage_bps": 10000,
            "tax_effect": "tender",
        }
        proposed = await self.api.post("ledger", "/v1/grants", "officer", body)
        grant_id = str(proposed["grant_id"])
        await self.api.post("ledger", f"/v1/grants/{grant_id}/approve", "approver", {})
        return grant_id

    def event(self, kind: str, hub: str, node: str, data: Mapping[str, Any]) -> Json:
        """Make the next event of a node."""
        source = f"/hubs/{hub}/nodes/{node}/epochs/e1"
        self._sequences[source] += 1
        number = self._sequences[source]
        return {
            "specversion": "1.0",
            "type": kind,
            "source": source,
            "id": f"{node}-{number}",
            "sequence": f"{number:020d}",
            "datacontenttype": "application/json",
            "data": {"hub": hub, "node_id": node, **data},
        }

    def usage(
        self,
        hub: str,
        node: str,
        tenant_id: str,
        allocation_id: str,
        start_ms: int,
        end_ms: int,
        **changed: Any,
    ) -> Json:
        """Make an interval of one whole device, but for what is changed."""
        device = changed.pop("device", f"{allocation_id}/0")
        data = {
            "tenant_id": tenant_id,
            "project_id": "main",
            "allocation_id": allocation_id,
            "hold_id": None,
            "sku": "h100-sxm-80",
            "price_class": "on_demand",
            "state": "running",
            "devices": [{"device_uuid": device, "slice_uuid": device, "share_ppm": 1_000_000}],
            "start_ms": start_ms,
            "end_ms": end_ms,
        }
        return self.event(INTERVAL, hub, node, data | changed)

    def watermark(self, hub: str, node: str, watermark_ms: int) -> Json:
        """Make a watermark."""
        return self.event(WATERMARK, hub, node, {"watermark_ms": watermark_ms})

    async def say(self, *events: Json, headers: Sequence[tuple[str, bytes]] = ()) -> None:
        """Write events to their hubs' topics as agents do, and wait for the broker."""
        for event in events:
            source = str(event["source"])
            await self.raw(
                source.split("/")[2],
                json.dumps(event).encode(),
                key=source.rpartition("/epochs/")[0].encode(),
                headers=[*STRUCTURED, *headers],
            )

    async def raw(
        self,
        hub: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> tuple[int, int]:
        """Write any bytes to a hub's topic; return partition and offset."""
        topic = f"hub.{hub}.usage.v1"
        written = await self.producer.send_and_wait(topic, value, key=key, headers=list(headers))
        return written.partition, written.offset

    async def balance(self, tenant_id: str) -> Json:
        """Read a balance."""
        return await self.api.get("ledger", f"/v1/tenants/{tenant_id}/balance", "auditor")

    async def entries(self, tenant_id: str) -> list[Json]:
        """Read a whole book."""
        return await self.api.items("ledger", f"/v1/tenants/{tenant_id}/entries", "auditor")

    async def accounts(self, hub: str) -> Json:
        """Read a hub's reconciliation."""
        return await self.api.get("metering", "/v1/reconciliation", "auditor", hub=hub)

    async def quarantined(self, hub: str) -> list[Json]:
        """Read a hub's quarantine."""
        return await self.api.items("metering", "/v1/quarantine", "operator", hub=hub)

    async def charged(self, tenant_id: str, micro: int) -> Json:
        """Wait until a tenant has been charged this much; return its balance."""
        return await until(
            lambda: self.balance(tenant_id), lambda b: int(b["charged_micro"]) == micro
        )

    async def read(self, hub: str, records: int) -> Json:
        """Wait until metering has read this many records of a hub; return its accounts."""
        return await until(lambda: self.accounts(hub), lambda a: a["records"]["read"] == records)


async def until(
    look: Callable[[], Awaitable[T]], wanted: Callable[[T], bool], patience_s: float = PATIENCE_S
) -> T:
    """Look again and again until what is seen is as wanted; AssertionError shows the last look."""
    deadline = time.monotonic() + patience_s
    while True:
        seen = await look()
        if wanted(seen):
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"not so within {patience_s} s; last seen: {seen}")
        await asyncio.sleep(0.1)


@asynccontextmanager
async def outside_of(stack: Stack) -> AsyncIterator[Outside]:
    """Connect to a stack by its stack.json, as anybody would."""
    producer = AIOKafkaProducer(
        bootstrap_servers=stack.bootstrap_servers,
        acks="all",
        max_request_size=64 * 1024 * 1024,
        request_timeout_ms=PATIENCE_S * 1000,
    )
    await producer.start()
    try:
        async with Api(stack.folder / "stack.json") as api:
            yield Outside(stack, api, producer)
    finally:
        await producer.stop()
