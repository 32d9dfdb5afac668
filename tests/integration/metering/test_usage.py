"""From a hub's topic to charges: what is billed, what waits and why, and that accounts agree."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pytest

from integration.metering.service import Hub, charges, eventually, read_all, send_tenant
from unit.metering.hub_events import HOUR_MS, NOON_MS, device, ended, event, interval

MINUTE_MS = 60_000
HALF_HOUR_GPU_NS = 1_800_000_000_000


def records(said: dict[str, Any]) -> tuple[int, int, int, int]:
    """Read, accepted, duplicate, quarantined."""
    counts = said["records"]
    return (counts["read"], counts["accepted"], counts["duplicate"], counts["quarantined"])


def sides(said: dict[str, Any]) -> tuple[int, int, int, int]:
    """Reported, billed, duplicate and quarantined GPU-ns, whose difference must be zero."""
    assert "0" == said["difference_gpu_ns"]
    return tuple(  # type: ignore[return-value]
        int(said[f"{side}_gpu_ns"]) for side in ("reported", "billed", "duplicate", "quarantined")
    )


@pytest.mark.defect("M3", "M9", "M11", "M13", "F1", "F24")
def test_interval_is_billed_once_however_often_it_is_sent(hub: Hub) -> None:
    """Steps 3 and 4 of the worked example: 420 PKR, and duplicates that book nothing."""
    half = interval(NOON_MS, NOON_MS + 30 * MINUTE_MS, hold_id="hold-1")
    hub.say(half)
    for minute in (0, 10, 20):
        hub.say(
            half
            | {
                "start_ms": NOON_MS + minute * MINUTE_MS,
                "end_ms": NOON_MS + (minute + 10) * MINUTE_MS,
            }
        )
    said = hub.accounts(4)
    assert (4, 1, 3, 0) == records(said)
    assert (2 * HALF_HOUR_GPU_NS, HALF_HOUR_GPU_NS, HALF_HOUR_GPU_NS, 0) == sides(said)
    assert (1, "420000000") == (said["buckets"], said["charge_micro"])
    [total] = [
        message
        for message in charges(hub.metering.infrastructure, hub.code)
        if message["kind"] == "bucket"
    ]
    assert ("420000000", "hold-1", 0) == (
        str(total["total_micro"]),
        total["hold_id"],
        total["revision"],
    )
    found = hub.metering.get(f"/v1/allocations/{hub.code}/job-1")
    assert [
        {
            "start_ms": NOON_MS,
            "end_ms": NOON_MS + 30 * MINUTE_MS,
            "slice_uuid": "GPU-1",
            "share_ppm": 1_000_000,
            "tenant_id": "ravi-health",
            "node_id": "n1",
            "device_uuid": "GPU-1",
        }
    ] == found["intervals"]
    assert ("1800000", "1800000") == (found["billed_gpu_ms"], found["duplicate_gpu_ms"])


@pytest.mark.defect("M10", "F2", "F5")
def test_conflict_waits_only_where_it_overlaps_until_it_is_dismissed(hub: Hub) -> None:
    """Steps 6 and 7 of the worked example."""
    hub.say(interval(NOON_MS, NOON_MS + 30 * MINUTE_MS))
    hub.say(
        interval(
            NOON_MS + 20 * MINUTE_MS,
            NOON_MS + 40 * MINUTE_MS,
            tenant_id="indus-foundry",
            allocation_id="job-3",
        )
    )
    said = hub.accounts(2)
    assert (2, 1, 0, 1) == records(said)
    ten_minutes = 600_000_000_000
    assert (5 * ten_minutes, 4 * ten_minutes, 0, ten_minutes) == sides(said)
    [item] = hub.quarantined(count=1, reason="conflict")
    assert "job-1 of ravi-health" in item["detail"]
    path = f"/v1/quarantine/{item['quarantine_id']}"
    replayed = hub.metering.request("POST", f"{path}/replay", json={})
    assert (202, "open") == (replayed.status_code, replayed.json()["state"])
    assert sides(said) == sides(hub.reconcile())
    dismissed = hub.metering.request("POST", f"{path}/dismiss", json={"reason": "agreed"})
    assert (200, "dismissed") == (dismissed.status_code, dismissed.json()["state"])
    assert (said["records"], sides(said)) == (hub.reconcile()["records"], sides(hub.reconcile()))
    again = hub.metering.request("POST", f"{path}/replay", json={})
    assert (409, "quarantine-closed") == (again.status_code, again.json()["code"])


@pytest.mark.defect("M6", "M16", "M17", "M19", "F6", "F7", "F23", "F26", "F63")
def test_bad_records_wait_with_their_reason_and_block_nobody(hub: Hub) -> None:
    """Of a batch of 500 with every kind of bad record all good ones are billed."""
    good = [interval(NOON_MS + n * 1000, NOON_MS + (n + 1) * 1000) for n in range(488)]
    for data in good[:244]:
        hub.say(data)
    huge = b"\xfe" * 900_000
    future_ms = 4_000_000_000_000
    bad: dict[str, list[bytes | None]] = {
        "undecodable": [b"\xff\xff", None, huge],
        "unknown-type": [hub_event(hub, interval(), type="pk.hisab.usage.of-tomorrow.v1")],
        "schema": [
            hub_event(hub, interval(end_ms=NOON_MS)),
            hub_event(hub, interval(devices=[device(share_ppm=0)])),
            hub_event(hub, interval(start_ms=2**63)),
        ],
        "hub-mismatch": [event(interval(hub="elsewhere"), 1)],
        "unknown-tenant": [hub_event(hub, interval(tenant_id="nobody-yet"))],
        "unknown-sku": [hub_event(hub, interval(sku="b300-never"))],
        "no-price": [hub_event(hub, interval(price_class="gold"))],
        "clock-skew": [hub_event(hub, interval(future_ms, future_ms + 1))],
    }
    for values in bad.values():
        for value in values:
            hub.produce(value)
    for data in good[244:]:
        hub.say(data)
    said = hub.accounts(500)
    assert (500, 488, 0, 12) == records(said)
    assert 488_000_000_000 == sides(said)[1]
    items = hub.quarantined(count=12)
    found: dict[str, int] = {}
    for item in items:
        found[item["reason"]] = found.get(item["reason"], 0) + 1
        assert item["detail"]
    assert {reason: len(values) for reason, values in bad.items()} == found
    payloads = [item["payload_base64"] for item in items if item["reason"] == "undecodable"]
    assert [
        base64.b64encode(value).decode() if value else None for value in bad["undecodable"]
    ] == payloads
    notices = [
        json.loads(value)
        for value in read_all(hub.metering.infrastructure, "metering.quarantine.v1")
    ]
    sums = {notice["value_sha256"] for notice in notices if notice["hub"] == hub.code}
    assert hashlib.sha256(huge).hexdigest() in sums


def hub_event(hub: Hub, data: dict[str, Any], kind: str = "interval", **envelope: str) -> bytes:
    """An event of this hub by a source that counts nothing else."""
    return event(data | {"hub": hub.code, "node_id": "bad"}, 1, kind, **envelope)


@pytest.mark.defect("M18")
def test_record_is_released_once_its_tenant_and_price_are_known(hub: Hub) -> None:
    """Unknown tenant, then unknown SKU, then billed: by the service itself, exactly once."""
    tenant, sku = f"late-{hub.code}", f"sku-{hub.code}"
    hub.say(interval(tenant_id=tenant, sku=sku))
    hub.say(interval(tenant_id=tenant, sku=sku))
    said = hub.accounts(2)
    assert (2, 0, 0, 2) == records(said)
    send_tenant(hub.metering.infrastructure, tenant)
    assert 2 == len(hub.quarantined(count=2, reason="unknown-sku"))
    added = hub.metering.request(
        "POST",
        "/v1/price-lists",
        json={
            "currency": "PKR",
            "valid_from": "2025-01-01T00:00:00.000Z",
            "valid_until": None,
            "prices": [{"sku": sku, "price_class": "on_demand", "micro_per_gpu_hour": "1000000"}],
        },
    )
    assert 201 == added.status_code
    said = eventually(hub.reconcile, lambda accounts: accounts["records"]["quarantined"] == 0)
    assert (2, 1, 1, 0) == records(said)
    assert (2 * 2 * HALF_HOUR_GPU_NS, 2 * HALF_HOUR_GPU_NS, 2 * HALF_HOUR_GPU_NS, 0) == sides(said)
    assert "1000000" == said["charge_micro"]
    assert ["released", "released"] == [item["state"] for item in hub.quarantined(count=2)]


@pytest.mark.defect("M18")
def test_record_that_cannot_be_released_is_left_to_an_operator(hub: Hub) -> None:
    """Judging it again fails by itself: it stays open with what went wrong, others are released."""
    tenant = f"refused-{hub.code}"
    hub.say(interval(tenant_id=tenant))
    hub.say(interval(NOON_MS + HOUR_MS, NOON_MS + 2 * HOUR_MS, tenant_id=tenant))
    hub.accounts(2)
    hub.metering.rows(
        "alter table buckets add constraint refused check "
        f"(tenant_id <> '{tenant}' or hour_ms <> {NOON_MS})"
    )
    try:
        send_tenant(hub.metering.infrastructure, tenant)
        found = eventually(
            hub.quarantined,
            lambda items: (
                {"open", "released"} == {item["state"] for item in items}
                and any(item["reason"] == "killed-process" for item in items)
            ),
        )
    finally:
        hub.metering.rows("alter table buckets drop constraint refused")
    [item] = [item for item in found if item["state"] == "open"]
    assert "killed-process" == item["reason"]
    assert item["detail"].startswith("judging it again failed: CheckViolationError(")
    path = f"/v1/quarantine/{item['quarantine_id']}/replay"
    replayed = hub.metering.request("POST", path, json={})
    assert (202, "released") == (replayed.status_code, replayed.json()["state"])
    assert (2, 2, 0, 0) == records(hub.reconcile())


def test_sums_of_an_allocation_are_of_all_its_buckets_and_its_lists_come_in_pages(
    hub: Hub,
) -> None:
    """14 nodes for 31 days have 10 416 buckets: every page tells the sum of all of them."""
    hours, nodes = 31 * 24, 14
    for number in range(nodes):
        hub.say(
            interval(
                NOON_MS - hours * HOUR_MS,
                NOON_MS,
                node_id=f"n{number}",
                devices=[device("GPU-0")],
            )
        )
    assert nodes * hours == hub.accounts(nodes)["buckets"]
    path = f"/v1/allocations/{hub.code}/job-1"
    pages = [hub.metering.get(path)]
    while pages[-1]["next"] is not None:
        pages.append(hub.metering.get(path, cursor=pages[-1]["next"]))
    assert {str(nodes * hours * HOUR_MS)} == {page["billed_gpu_ms"] for page in pages}
    assert {str(nodes * hours * 840_000_000)} == {page["charge_micro"] for page in pages}
    assert [1_000] * 10 + [416] == [len(page["buckets"]) for page in pages]
    buckets = [bucket for page in pages for bucket in page["buckets"]]
    assert nodes * hours == len({(bucket["hour_at"], bucket["node_id"]) for bucket in buckets})
    # One slice name on 14 nodes is 14 slices; each was covered in one interval of 31 days.
    covered = [found for page in pages for found in page["intervals"]]
    assert {f"n{number}" for number in range(nodes)} == {found["node_id"] for found in covered}
    assert [31 * 24 * HOUR_MS] * nodes == [found["end_ms"] - found["start_ms"] for found in covered]


def test_pages_of_an_allocation_leave_nothing_out_whichever_list_is_the_longest(hub: Hub) -> None:
    """Pages of two: three buckets, five intervals and four quarantined records, each once."""
    for number in range(5):
        begin_ms = NOON_MS + number * 30 * MINUTE_MS
        hub.say(interval(begin_ms, begin_ms + MINUTE_MS))
    for number in range(4):
        begin_ms = NOON_MS + number * 30 * MINUTE_MS
        hub.say(interval(begin_ms, begin_ms + MINUTE_MS, tenant_id="indus-foundry"))
    hub.accounts(9)
    path, found = f"/v1/allocations/{hub.code}/job-1", []
    cursor: str | None = ""
    while cursor is not None:
        more = {"cursor": cursor} if cursor else {}
        found.append(hub.metering.get(path, limit="2", **more))
        cursor = found[-1]["next"]
    assert [2, 1, 0] == [len(page["buckets"]) for page in found]
    assert [2, 2, 1] == [len(page["intervals"]) for page in found]
    assert [2, 2, 0] == [len(page["quarantined"]) for page in found]
    starts = [covered["start_ms"] for page in found for covered in page["intervals"]]
    assert [NOON_MS + number * 30 * MINUTE_MS for number in range(5)] == starts
    waits = [record["quarantine_id"] for page in found for record in page["quarantined"]]
    assert 4 == len(set(waits))
    strange = hub.metering.request("GET", path, params={"cursor": "WzFd"})
    assert (422, "malformed") == (strange.status_code, strange.json()["code"])


@pytest.mark.defect("M12", "M14", "M21", "F60", "F61")
def test_interval_is_cut_at_hours_and_reconciled_by_usage_time(hub: Hub) -> None:
    """One millisecond on each side of an hour lands in its own bucket and window."""
    hub.say(interval(NOON_MS + HOUR_MS - 1, NOON_MS + HOUR_MS + 1))
    said = hub.accounts(1)
    assert (2, "466") == (said["buckets"], said["charge_micro"])
    first = hub.metering.get(
        "/v1/reconciliation",
        hub=hub.code,
        **{"from": "2025-07-31T10:00:00.000Z", "until": "2025-07-31T11:00:00.000Z"},
    )
    assert (1_000_000, 1_000_000, 0, 0) == sides(first)
    assert (1, 1, 0, 0) == records(first)
    off_the_hour = hub.metering.request(
        "GET", "/v1/reconciliation", params={"hub": hub.code, "from": "2025-07-31T10:30:00.000Z"}
    )
    assert (422, "malformed") == (off_the_hour.status_code, off_the_hour.json()["code"])


def test_final_is_stated_when_the_totals_match(hub: Hub) -> None:
    """After the charges it covers; without them only once the hub is complete past the end."""
    hub.say(interval(NOON_MS, NOON_MS + 30 * MINUTE_MS))
    hub.say(ended(NOON_MS + 30 * MINUTE_MS, 1_800_000), "ended")
    hub.say(ended(NOON_MS + 30 * MINUTE_MS, 1, allocation_id="short"), "ended")
    hub.accounts(1)

    def finals() -> list[str]:
        said = charges(hub.metering.infrastructure, hub.code)
        return [message["allocation_id"] for message in said if message["kind"] == "final"]

    assert ["job-1"] == eventually(finals, lambda found: len(found) > 0)
    hub.complete(NOON_MS + HOUR_MS)
    hub.flush()
    both = eventually(finals, lambda found: len(found) > 1)
    assert {"job-1", "short"} == set(both)


def test_end_of_an_unknown_tenants_allocation_is_final_once_the_tenant_is_known(hub: Hub) -> None:
    """Until then it is put off by minutes, and not looked at twice a second for ever."""
    tenant = f"late-end-{hub.code}"
    hub.say(interval(tenant_id=tenant))
    hub.say(ended(NOON_MS + HOUR_MS, 3_600_000, tenant_id=tenant), "ended")
    hub.accounts(1)

    def noted() -> tuple[bool, bool]:
        [(final, put_off)] = hub.metering.rows(
            "select final, check_at > clock_timestamp() + interval '5 minutes' "
            "from allocations where hub = $1",
            hub.code,
        )
        return final, put_off

    assert (False, True) == eventually(noted, lambda found: found[1])
    send_tenant(hub.metering.infrastructure, tenant)
    assert eventually(noted, lambda found: found[0])[0]


def test_end_far_in_the_future_waits_and_a_later_event_still_ends_the_allocation(hub: Hub) -> None:
    """The latest end counts: one in the year 2096 would keep its hold open until then."""
    hub.say(interval(NOON_MS, NOON_MS + 30 * MINUTE_MS))
    hub.say(ended(4_000_000_000_000, 1_800_000), "ended")
    hub.say(ended(NOON_MS + 30 * MINUTE_MS, 1_800_000), "ended")
    said = hub.accounts(1)
    [item] = hub.quarantined(count=1)
    assert "clock-skew" == item["reason"]
    assert item["detail"].startswith("ended_ms 2096-")
    assert (1, 1, 0, 0) == records(said)

    def finals() -> list[int]:
        told = charges(hub.metering.infrastructure, hub.code)
        return [message["ended_ms"] for message in told if message["kind"] == "final"]

    assert [NOON_MS + 30 * MINUTE_MS] == eventually(finals, lambda found: len(found) > 0)
