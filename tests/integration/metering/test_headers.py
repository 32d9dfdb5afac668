"""Whatever stands in a record's headers, the record is read or waits, and the others go on."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from infrastructure import run_apart
from integration.metering.service import Hub, eventually
from integration.runtime.bombs import MIB, of_value, send_bombs
from integration.runtime.raw import RawName, send_raw
from unit.metering.hub_events import HEADERS, HOUR_MS, NOON_MS, event, interval

MINUTE_MS = 60_000
Headers = list[tuple[str, str | bytes | None]]

BINARY: Headers = [
    ("ce_specversion", b"1.0"),
    ("ce_type", b"pk.hisab.usage.interval.v1"),
    ("ce_id", None),
    ("ce_sequence", b"1"),
]


def minute(hub: Hub, number: int) -> dict[str, Any]:
    """One minute of the hub's usage, by its number."""
    start_ms = NOON_MS + number * MINUTE_MS
    return interval(start_ms, start_ms + MINUTE_MS) | {"hub": hub.code}


def send(hub: Hub, value: bytes, headers: Headers) -> None:
    """Produce a record with headers of its own."""
    hub._producer.produce(hub.topic, value, f"/hubs/{hub.code}/nodes/n1", headers=headers)


def billed(said: dict[str, Any]) -> int:
    """The seconds that were billed."""
    return int(said["billed_gpu_ns"]) // 10**9


@pytest.mark.defect("F6", "M17", "F23")
def test_header_without_a_value_stops_nobody(hub: Hub) -> None:
    """Kafka lets a header be null: a trace is then absent, an attribute wrong, others ignored."""
    hub.say(minute(hub, 0))
    send(hub, event(minute(hub, 1), 2), [*HEADERS, ("traceparent", None)])
    send(hub, json.dumps(minute(hub, 2)).encode(), BINARY)
    send(hub, b"not JSON", [("traceparent", None), ("x-empty", None), ("x-full", b"1")])
    hub.say(minute(hub, 3), sequence=3)
    said = hub.accounts(5)
    assert 180 == billed(said)
    items = {item["reason"]: item for item in hub.quarantined(count=2)}
    assert {"schema", "undecodable"} == set(items)
    assert [
        {"name": "traceparent", "value_base64": None},
        {"name": "x-empty", "value_base64": None},
        {"name": "x-full", "value_base64": base64.b64encode(b"1").decode()},
    ] == items["undecodable"]["headers"]
    for item in items.values():
        path = f"/v1/quarantine/{item['quarantine_id']}/replay"
        assert 202 == hub.metering.request("POST", path).status_code


@pytest.mark.defect("F6", "M17", "F23")
def test_header_name_that_is_no_text_waits_and_can_be_replayed(hub: Hub) -> None:
    """Kafka takes any bytes as a name: the record waits whole, the others are billed."""
    servers = hub.metering.infrastructure.bootstrap_servers
    hub.say(minute(hub, 0))
    hub.flush()
    odd = event(minute(hub, 1), 2)
    good = event(minute(hub, 2), 3)
    content = "content-type"
    run_apart(send_raw(servers, hub.topic, [(odd, [content, RawName("x")]), (good, [content])]))
    hub.say(minute(hub, 3), sequence=4)
    assert 180 == billed(hub.accounts(4))
    [item] = hub.quarantined(count=1)
    assert ("undecodable", base64.b64encode(odd).decode()) == (
        item["reason"],
        item["payload_base64"],
    )
    assert [content, "\\xffx"] == [header["name"] for header in item["headers"]]
    path = f"/v1/quarantine/{item['quarantine_id']}/replay"
    assert 202 == hub.metering.request("POST", path).status_code
    assert 240 == eventually(lambda: billed(hub.reconcile()), lambda seconds: seconds == 240)


def test_a_batch_too_large_to_decode_is_quarantined_with_its_bytes_and_the_rest_is_metered(
    hub: Hub,
) -> None:
    """A few kilobytes stand for 70 MiB: one record says which offsets, and keeps what was sent."""
    hub.say(interval())
    hub.flush()
    bomb = of_value(70 * MIB)
    servers = hub.metering.infrastructure.bootstrap_servers
    run_apart(send_bombs(servers, hub.topic, [bomb]))
    hub.say(interval(NOON_MS + HOUR_MS, NOON_MS + 2 * HOUR_MS))
    records = hub.accounts(3)["records"]
    assert {"read": 3, "accepted": 2, "duplicate": 0, "quarantined": 1} == records
    [item] = hub.quarantined(count=1, reason="undecodable")
    assert "decoded, it has more than 67108864 bytes" in item["detail"]
