"""Whatever dies, is resent or replayed: nothing is lost, nothing is doubled."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import pytest

import oracle
from databases import SERVICES
from demo.api import Json
from e2e.outside import HOUR, PATIENCE_S, Outside, at, outside_of, until
from stack import Stack

pytestmark = pytest.mark.slow


@pytest.fixture
async def outside(stack: Stack) -> AsyncIterator[Outside]:
    """Somebody outside of the shared stack."""
    async with outside_of(stack) as somebody:
        yield somebody


def a_busy_day(outside: Outside, hub: str, tenants: list[str], seed: int) -> list[Json]:
    """Make two hundred intervals of twenty allocations on four nodes, some of them twice."""
    dice = random.Random(seed)
    said: list[Json] = []
    for number in range(20):
        node, tenant = f"n{number % 4}", tenants[number % len(tenants)]
        start = at("00:00") + dice.randrange(HOUR)
        for _ in range(10):
            end = start + dice.randrange(60_000, 2 * HOUR)
            sku = ("h100-sxm-80", "l40s-48")[number % 2]
            said.append(outside.usage(hub, node, tenant, f"run-{number}", start, end, sku=sku))
            if dice.randrange(10) == 0:
                said.append(outside.usage(hub, node, tenant, f"run-{number}", start, end, sku=sku))
            start = end + dice.randrange(2) * 1000
    return said


def expected_charges(said: list[Json]) -> dict[str, int]:
    """Ask the oracle what each tenant must be charged."""
    charges: defaultdict[str, int] = defaultdict(int)
    for bucket, micro in oracle.rate(oracle.meter(data(said)).buckets).items():
        charges[bucket.tenant_id] += micro
    return dict(charges)


def data(said: list[Json]) -> list[dict[str, Any]]:
    """Return what events say."""
    return [event["data"] for event in said]


async def check_books(outside: Outside, hub: str, said: list[Json]) -> None:
    """Compare metering and every book with the oracle, bucket by bucket."""
    metered = oracle.meter(data(said))
    accounts = await outside.read(hub, len(said))
    assert (metered.reported_gpu_ns, sum(metered.buckets.values()), metered.duplicate_gpu_ns) == (
        int(accounts["reported_gpu_ns"]),
        int(accounts["billed_gpu_ns"]),
        int(accounts["duplicate_gpu_ns"]),
    )
    for tenant, micro in expected_charges(said).items():
        await outside.charged(tenant, micro)
    booked: defaultdict[tuple[str, int], int] = defaultdict(int)
    for tenant in expected_charges(said):
        book = await outside.entries(tenant)
        assert list(range(1, len(book) + 1)) == [int(entry["seq"]) for entry in book]
        for entry in book:
            if entry["kind"] == "charge":
                charge = entry["charge"]
                booked[charge["allocation_id"], charge["hour_at"]] += int(charge["gpu_ns"])
    expected: defaultdict[tuple[str, int], int] = defaultdict(int)
    for bucket, gpu_ns in metered.buckets.items():
        expected[bucket.allocation_id, _hour_text(bucket.hour_ms)] += gpu_ns  # type: ignore[index]
    assert dict(expected) == dict(booked)


def _hour_text(hour_ms: int) -> str:
    day, hour = divmod(hour_ms - at("00:00"), 24 * HOUR)
    return f"2025-{'07-31' if day == 0 else '08-01'}T{hour // HOUR:02d}:00:00.000Z"


@pytest.mark.defect("M1")
@pytest.mark.parametrize("victim", SERVICES)
async def test_a_service_killed_mid_stream_loses_and_doubles_nothing(
    outside: Outside, victim: str
) -> None:
    """kill -9 in the middle of two hundred events; the oracle agrees bucket by bucket."""
    hub = await outside.hub()
    tenants = [await outside.tenant(), await outside.tenant("startup", 0)]
    await outside.grant(tenants[1], 5_000_000_000)
    said = a_busy_day(outside, hub, tenants, seed=len(victim))
    half = len(said) // 2
    await outside.say(*said[:half])
    killed = outside.stack.kill(victim)
    await outside.say(*said[half:])
    outside.stack.wait_back(victim, killed)
    await check_books(outside, hub, said)
    ready = await until(
        lambda: outside.api.get(victim, "/v1/status", "auditor"), lambda s: bool(s["ready"])
    )
    assert victim == ready["service"]


async def test_a_day_that_is_sent_again_adds_nothing(outside: Outside) -> None:
    """Every record once more, in another order: duplicates only, and not one entry."""
    hub, tenant = await outside.hub(), await outside.tenant()
    said = a_busy_day(outside, hub, [tenant], seed=5)
    await outside.say(*said)
    await check_books(outside, hub, said)
    entries = len(await outside.entries(tenant))
    again = list(said)
    random.Random(1).shuffle(again)
    await outside.say(*again)
    accounts = await outside.read(hub, 2 * len(said))
    metered = oracle.meter(data(said))
    assert metered.reported_gpu_ns * 2 == int(accounts["reported_gpu_ns"])
    assert sum(metered.buckets.values()) == int(accounts["billed_gpu_ns"])
    assert "0" == accounts["difference_gpu_ns"]
    await until(
        lambda: outside.api.get("ledger", "/v1/status", "auditor"),
        lambda s: s["lag_records"] == 0 and s["outbox_depth"] == 0,
    )
    assert entries == len(await outside.entries(tenant))


async def test_a_fourth_hub_counts_from_its_first_event(outside: Outside) -> None:
    """Registered while everything runs: its topic is read, billed, and counts for completeness."""
    hub, tenant = await outside.hub(), await outside.tenant()
    await outside.say(outside.usage(hub, "n1", tenant, "first", at("10:00"), at("11:00")))
    await outside.charged(tenant, 840_000_000)
    state = await outside.api.get("metering", f"/v1/hubs/{hub}", "auditor")
    assert state["complete_until"] is None
    assert [f"/hubs/{hub}/nodes/n1/epochs/e1"] == [
        blocker["source"] for blocker in state["blocked_by"]
    ]
    await outside.say(outside.watermark(hub, "n1", at("11:00")))
    eleven = "2025-07-31T11:00:00.000Z"
    await until(
        lambda: outside.api.get("metering", f"/v1/hubs/{hub}", "auditor"),
        lambda answer: answer["complete_until"] == eleven,
    )
    await until(
        lambda: outside.api.get("ledger", "/v1/status", "auditor"),
        lambda answer: answer["complete_until"].get(hub) == eleven,
    )


async def test_with_metering_stopped_the_others_still_answer(outside: Outside) -> None:
    """Balances, holds and invoices; and what was sent meanwhile is billed afterwards."""
    hub, tenant = await outside.hub(), await outside.tenant()
    outside.stack.stop("metering")
    try:
        await outside.say(outside.usage(hub, "n1", tenant, "waits", at("10:00"), at("11:00")))
        assert "0" == (await outside.balance(tenant))["charged_micro"]
        hold = {
            "tenant_id": tenant,
            "project_id": "main",
            "job_ref": "j",
            "allocation_id": None,
            "hub": hub,
            "sku": "h100-sxm-80",
            "hold_micro": "1000000",
            "expires_at": "2030-01-01T00:00:00.000Z",
        }
        placed = await outside.api.post("ledger", "/v1/holds", "scheduler", hold)
        assert "open" == placed["state"]
        assert isinstance(
            await outside.api.items("invoicing", "/v1/invoices", "finance", period="2025-07"), list
        )
        assert (
            "2025-07"
            == (await outside.api.get("invoicing", "/v1/periods/2025-07", "finance"))["period"]
        )
    finally:
        outside.stack.start("metering")
    await outside.charged(tenant, 840_000_000)


async def test_a_trace_id_leads_from_an_event_to_its_entry(outside: Outside) -> None:
    """The `traceparent` that an agent sends comes out with the entry that its usage caused."""
    hub, tenant = await outside.hub(), await outside.tenant()
    trace_id = f"{random.Random(hub).getrandbits(128):032x}"
    usage = outside.usage(hub, "n1", tenant, "traced", at("10:00"), at("11:00"))
    await outside.say(usage, headers=[("traceparent", f"00-{trace_id}-{'1' * 16}-01".encode())])
    await outside.charged(tenant, 840_000_000)
    found = await traces_of(outside, tenant)
    assert trace_id in found


async def traces_of(outside: Outside, tenant: str) -> set[str]:
    """Read the trace ids that the entries of a tenant carry on `ledger.entries.v1`."""
    import json

    from aiokafka import AIOKafkaConsumer

    consumer = AIOKafkaConsumer(
        "ledger.entries.v1",
        bootstrap_servers=outside.stack.bootstrap_servers,
        auto_offset_reset="earliest",
        group_id=None,
    )
    await consumer.start()
    found: set[str] = set()
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not found and time.monotonic() < deadline:
            for records in (await consumer.getmany(timeout_ms=500)).values():
                for record in records:
                    if json.loads(record.value).get("tenant_id") != tenant:
                        continue
                    said = dict(record.headers).get("traceparent", b"").decode()
                    found |= {said.split("-")[1]} if said else set()
    finally:
        await consumer.stop()
    return found
