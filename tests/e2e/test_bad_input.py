"""Bad input at the outside surface: each has a clear reason, blocks nobody, and loses nothing."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest
from aiokafka.errors import KafkaError

from demo.api import Json, RefusedError
from e2e.outside import PATIENCE_S, STRUCTURED, Outside, at, outside_of, until
from faults.hostile.doors import shapes
from stack import Stack

pytestmark = pytest.mark.slow

Spoil = Callable[[dict[str, Any]], object]

BAD_EVENTS: dict[str, tuple[str, Spoil]] = {
    "end before start": ("schema", lambda d: d.update(end_ms=d["start_ms"] - 1)),
    "end at start": ("schema", lambda d: d.update(end_ms=d["start_ms"])),
    "seconds instead of milliseconds": (
        "schema",
        lambda d: d.update(start_ms=d["start_ms"] // 1000, end_ms=d["end_ms"] // 1000),
    ),
    "a fraction of a millisecond": ("schema", lambda d: d.update(end_ms=d["end_ms"] + 0.5)),
    "an amount of 2^63": ("schema", lambda d: d.update(energy_start_mj=2**63)),
    "a time of 2^63": ("schema", lambda d: d.update(end_ms=2**63)),
    "a share beyond the device": (
        "schema",
        lambda d: d["devices"][0].update(share_ppm=1_000_001),
    ),
    "a share of nothing": ("schema", lambda d: d["devices"][0].update(share_ppm=0)),
    "no device": ("schema", lambda d: d.update(devices=[])),
    "a number as text": ("schema", lambda d: d.update(start_ms=str(d["start_ms"]))),
    "longer than 31 days": ("schema", lambda d: d.update(start_ms=d["end_ms"] - 32 * 86_400_000)),
    "another hub's data": ("hub-mismatch", lambda d: d.update(hub="lhr")),
    "an unknown tenant": ("unknown-tenant", lambda d: d.update(tenant_id="nobody-knows")),
    "an unknown SKU": ("unknown-sku", lambda d: d.update(sku="abacus-1")),
    "a class without a price": ("no-price", lambda d: d.update(price_class="gold")),
    "usage in the year 2099": (
        "clock-skew",
        lambda d: d.update(start_ms=4_070_908_800_000, end_ms=4_070_908_860_000),
    ),
}


@pytest.fixture
async def outside(stack: Stack) -> AsyncIterator[Outside]:
    """Somebody outside of the shared stack."""
    async with outside_of(stack) as somebody:
        yield somebody


async def test_each_bad_event_is_quarantined_with_its_reason_and_blocks_nobody(
    outside: Outside,
) -> None:
    """Good events of the same node before, between and after them are billed."""
    hub, tenant = await outside.hub(), await outside.tenant()
    expected: dict[str, str] = {}
    for number, (reason, spoil) in enumerate(BAD_EVENTS.values()):
        minute = at("00:00") + number * 120_000
        bad = outside.usage(hub, "n1", tenant, f"bad-{number}", minute, minute + 60_000)
        spoil(bad["data"])
        expected[str(bad["id"])] = reason
        good = outside.usage(hub, "n1", tenant, "good", minute, minute + 60_000)
        await outside.say(bad, good)
    accounts = await outside.read(hub, 2 * len(BAD_EVENTS))
    found = {
        json.loads(base64.b64decode(item["payload_base64"]))["id"]: item["reason"]
        for item in await outside.quarantined(hub)
    }
    assert expected == found
    assert len(BAD_EVENTS) == accounts["records"]["accepted"]
    await outside.charged(tenant, len(BAD_EVENTS) * 14_000_000)
    assert "0" == accounts["difference_gpu_ns"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"\xff\xfe\x00 not an event", "undecodable"),
        (b"", "undecodable"),
        (None, "undecodable"),
        (b'{"specversion": "1.0", "data": NaN}', "undecodable"),
        (b"[" * 50_000, "undecodable"),
        (b'"a string"', "schema"),
        (b"{}", "schema"),
    ],
)
async def test_bytes_that_are_no_event_are_kept_as_they_came(
    outside: Outside, value: bytes | None, reason: str
) -> None:
    """With topic, partition, offset, headers and reason; a null value has no payload."""
    hub = await outside.hub()
    partition, offset = await outside.raw(hub, value, key=b"n1", headers=[("x-from", b"a test")])
    await outside.read(hub, 1)
    (item,) = await outside.quarantined(hub)
    payload = None if value is None else base64.b64encode(value).decode()
    assert (f"hub.{hub}.usage.v1", partition, offset, reason, payload, "open") == tuple(
        item[name] for name in ("topic", "partition", "offset", "reason", "payload_base64", "state")
    )


async def test_an_undecodable_message_of_900_kilobytes_reaches_quarantine_whole(
    outside: Outside,
) -> None:
    """Every byte of it can be read back."""
    hub, value = await outside.hub(), os.urandom(900_000)
    await outside.raw(hub, value)
    await outside.read(hub, 1)
    (item,) = await outside.quarantined(hub)
    assert value == base64.b64decode(item["payload_base64"])


async def test_a_message_of_ten_megabytes_is_refused_with_a_reason(outside: Outside) -> None:
    """By the broker on Kafka, and by the gateway with 413 `too-large`."""
    hub, value = "lhr", b"x" * 10_000_000
    if outside.stack.provider["kafka"] != "memory":
        with pytest.raises(KafkaError) as refused:
            await outside.raw(hub, value)
        assert "large" in str(refused.value).lower() or "size" in str(refused.value).lower()
    async with httpx2.AsyncClient(timeout=PATIENCE_S) as client:
        answer = await client.post(
            outside.api.url("metering", "/v1/events"),
            content=value,
            headers={
                "authorization": f"Bearer {outside.api.secret('hub:lhr')}",
                "content-type": "application/cloudevents+json",
            },
        )
    assert (413, "too-large") == (answer.status_code, answer.json()["code"])


async def test_an_amount_of_two_to_the_63_is_malformed(outside: Outside) -> None:
    """A grant, a hold and a credit limit beyond 64 bits are 422, with the bound in the answer."""
    tenant = await outside.tenant()
    hold = {
        "tenant_id": tenant,
        "project_id": "main",
        "job_ref": "j",
        "allocation_id": None,
        "hub": "lhr",
        "sku": "h100-sxm-80",
        "hold_micro": str(2**63),
        "expires_at": "2030-01-01T00:00:00.000Z",
    }
    with pytest.raises(RefusedError) as refused:
        await outside.api.post("ledger", "/v1/holds", "scheduler", hold)
    assert (422, "malformed") == (refused.value.status, refused.value.problem["code"])
    for wrong in (float("nan"), 1.5, 840, "8e8", "-1"):
        with pytest.raises((RefusedError, ValueError)) as unread:
            await outside.api.post("ledger", "/v1/holds", "scheduler", hold | {"hold_micro": wrong})
        if isinstance(unread.value, RefusedError):
            assert unread.value.status == 422


async def test_the_gateway_answers_each_event_of_a_batch(outside: Outside) -> None:
    """Accepted is durable; another hub's event is rejected with `hub-mismatch`; both are told."""
    tenant = await outside.tenant()
    good = outside.usage("lhr", "gate", tenant, "gated", at("01:00"), at("02:00"))
    other = outside.usage("khi", "gate", tenant, "gated", at("01:00"), at("02:00"))
    answer = await events(outside, [good, other])
    assert 200 == answer.status_code
    outcomes = [
        (result["id"], result["outcome"], (result["problem"] or {}).get("code"))
        for result in answer.json()["results"]
    ]
    assert [(good["id"], "accepted", None), (other["id"], "rejected", "hub-mismatch")] == outcomes
    await outside.charged(tenant, 840_000_000)


async def test_a_bad_line_is_rejected_alone(outside: Outside) -> None:
    """A text without an end, brackets without an end: the lines around them are taken."""
    tenant = await outside.tenant()
    first = outside.usage("lhr", "lines", tenant, "lined", at("01:00"), at("02:00"))
    last = outside.usage("lhr", "lines", tenant, "lined", at("02:00"), at("03:00"))
    lines = [json.dumps(first), '{"a', "[" * 5_000, "", '"\\"', json.dumps(last)]
    async with httpx2.AsyncClient(timeout=PATIENCE_S) as client:
        answer = await client.post(
            outside.api.url("metering", "/v1/events"),
            content="\n".join(lines).encode(),
            headers={
                "authorization": f"Bearer {outside.api.secret('hub:lhr')}",
                "content-type": "application/x-ndjson",
            },
        )
    outcomes = [result["outcome"] for result in answer.json()["results"]]
    assert ["accepted", "rejected", "rejected", "rejected", "accepted"] == outcomes
    await outside.charged(tenant, 2 * 840_000_000)


@pytest.mark.slow
async def test_hostile_bytes_leave_the_services_answering(outside: Outside) -> None:
    """1 MiB of each shape to a command, a quote and the gateway: refused, and nobody stands still.

    The bound on processor time is held by `tests/faults/hostile`; here are the running services.
    """
    doors = (
        ("ledger", "/v1/holds", "scheduler", "application/json"),
        ("metering", "/v1/quotes", "tenant:indus-foundry", "application/json"),
        ("metering", "/v1/events", "hub:lhr", "application/x-ndjson"),
        ("metering", "/v1/events", "hub:lhr", "application/json"),
    )
    async with httpx2.AsyncClient(timeout=60) as client:
        for number, (shape, hostile) in enumerate(shapes()):
            service, path, key, media_type = doors[number % len(doors)]
            headers = {
                "authorization": f"Bearer {outside.api.secret(key)}",
                "content-type": media_type,
                "idempotency-key": f"hostile-{number}",
            }
            url = outside.api.url(service, path)
            answer = await client.post(url, content=hostile, headers=headers)
            rejected = answer.status_code == 200 and "accepted" not in answer.text
            assert answer.status_code in {413, 422} or rejected, (shape, answer.status_code)
        for service in outside.api.services:
            await outside.api.get(service, "/v1/status", "operator")


@pytest.mark.parametrize("secret", ["", "hsb_wrong"])
async def test_the_gateway_knows_no_event_without_a_key(outside: Outside, secret: str) -> None:
    """401 before anything of the body is looked at."""
    async with httpx2.AsyncClient(timeout=PATIENCE_S) as client:
        answer = await client.post(
            outside.api.url("metering", "/v1/events"),
            content=b"{",
            headers={"authorization": f"Bearer {secret}"} if secret else {},
        )
    assert (401, "unauthenticated") == (answer.status_code, answer.json()["code"])


async def events(outside: Outside, batch: list[Json]) -> httpx2.Response:
    """Post a batch with the key of Lahore."""
    async with httpx2.AsyncClient(timeout=PATIENCE_S) as client:
        return await client.post(
            outside.api.url("metering", "/v1/events"),
            json=batch,
            headers={"authorization": f"Bearer {outside.api.secret('hub:lhr')}"},
        )


async def test_a_dismissed_record_is_closed_for_good(outside: Outside) -> None:
    """It stays counted as quarantined; a replay of it is 409 `quarantine-closed`."""
    hub = await outside.hub()
    await outside.raw(hub, b"{", headers=STRUCTURED)
    await outside.read(hub, 1)
    (item,) = await outside.quarantined(hub)
    path = f"/v1/quarantine/{item['quarantine_id']}"
    await outside.api.post("metering", f"{path}/dismiss", "operator", {"reason": "noise"})
    with pytest.raises(RefusedError) as refused:
        await outside.api.post("metering", f"{path}/replay", "operator", {})
    assert (409, "quarantine-closed") == (refused.value.status, refused.value.problem["code"])
    accounts = await until(
        lambda: outside.accounts(hub), lambda a: a["records"]["quarantined"] == 1
    )
    assert 1 == accounts["records"]["read"]
