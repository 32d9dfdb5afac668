"""`GET /v1/usage` of the running service: pages and whole lists, and what a key sees of them."""

from __future__ import annotations

import csv
import json
from typing import Any

import pytest

from integration.metering.service import Hub, Metering, eventually, secret
from unit.metering.hub_events import HOUR_MS, NOON_MS, device, interval

TENANTS = ("indus-foundry", "ravi-health")


def use(hub: Hub) -> dict[str, Any]:
    """Three hours of two tenants around 19:00Z, where a day and July end in Karachi."""
    for number, tenant_id in enumerate(TENANTS):
        hub.say(
            interval(
                NOON_MS + 7 * HOUR_MS + 1_800_000,
                NOON_MS + 10 * HOUR_MS + 1_800_000,
                tenant_id=tenant_id,
                allocation_id=f"job-{number}",
                devices=[device(f"GPU-{number}", share_ppm=333_333)],
            )
        )
    hub.complete(NOON_MS + 12 * HOUR_MS)
    hub.flush()
    hub.complete_until("2025-07-31T22:00:00.000Z")
    return hub.accounts(2)


def pages(metering: Metering, key: str = "operator", **query: str) -> list[dict[str, Any]]:
    """Every page of a report."""
    found = [metering.get("/v1/usage", key, **query)]
    while found[-1]["next"] is not None:
        found.append(metering.get("/v1/usage", key, cursor=found[-1]["next"], **query))
    return found


def sums_of(items: list[dict[str, Any]]) -> tuple[str, str]:
    """GPU time and charge of all items."""
    return (
        str(sum(int(item["gpu_ns"]) for item in items)),
        str(sum(int(item["charge_micro"]) for item in items)),
    )


@pytest.mark.defect("M12", "M14", "M21", "F60", "F61")
def test_every_grouping_of_a_hub_comes_to_its_reconciliation(hub: Hub) -> None:
    """In pages of one, as CSV and as lines: the same items, and the same sums."""
    accounts = use(hub)
    expected = (accounts["billed_gpu_ns"], accounts["charge_micro"])
    for group_by in ("", "tenant_id", "hub,sku,price_class,month", "tenant_id,project_id,day"):
        query = {"hub": hub.code, "group_by": group_by}
        found = pages(hub.metering, limit="1", **query)
        items = [item for page in found for item in page["items"]]
        assert {"2025-07-31T22:00:00.000Z"} == {page["complete_until"] for page in found}
        assert expected == sums_of(items), group_by
        for item in items:
            assert int(item["gpu_ns"]) // 1_000_000 == int(item["gpu_ms"])
            assert ("0", "0", "0") == (
                item["refunded_micro"],
                item["voided_gpu_ns"],
                item["voided_gpu_ms"],
            )
        lines, rows = lists(hub.metering, **query)
        shown = [item | {"complete_until": "2025-07-31T22:00:00.000Z"} for item in items]
        assert [shown, shown] == [lines, rows], group_by


def lists(metering: Metering, key: str = "operator", **query: str) -> tuple[Any, Any]:
    """A whole report as lines of JSON, and as rows of CSV."""
    answers = [
        metering.request("GET", "/v1/usage", key, params=query, headers={"Accept": form})
        for form in ("application/x-ndjson", "text/csv, */*;q=0.1")
    ]
    assert [200, 200] == [answer.status_code for answer in answers]
    assert ["application/x-ndjson", "text/csv; charset=utf-8"] == [
        answer.headers["content-type"] for answer in answers
    ]
    lines, rows = (answer.text for answer in answers)
    return (
        [json.loads(line) for line in lines.splitlines()],
        list(csv.DictReader(rows.splitlines())),
    )


def test_days_and_months_are_those_of_karachi(hub: Hub) -> None:
    """Half an hour of July and two and a half of August; hours as they are."""
    use(hub)
    query = {"hub": hub.code, "group_by": "hub", "tenant_id": "ravi-health"}
    share = 333_333

    def found(name: str, **more: str) -> list[tuple[str, str]]:
        [page] = pages(hub.metering, **query, **more)
        return [(item[name], item["gpu_ns"]) for item in page["items"]]

    july, august = str(share * 5_400_000), str(share * 5_400_000)
    assert [("2025-07", july), ("2025-08", august)] == found("month", interval="month")
    assert [("2025-07-31", july), ("2025-08-01", august)] == found("on", interval="day")
    assert [
        ("2025-07-31T17:00:00.000Z", str(share * 1_800_000)),
        ("2025-07-31T18:00:00.000Z", str(share * 3_600_000)),
        ("2025-07-31T19:00:00.000Z", str(share * 3_600_000)),
        ("2025-07-31T20:00:00.000Z", str(share * 1_800_000)),
    ] == found("hour_at", interval="hour")
    cut = {"from": "2025-07-31T18:00:00.000Z", "until": "2025-07-31T20:00:00.000Z"}
    assert [("2025-07", str(share * 3_600_000)), ("2025-08", str(share * 3_600_000))] == found(
        "month", interval="month", **cut
    )
    assert {"month", "hub", "gpu_ns", "gpu_ms", "charge_micro"} <= set(
        pages(hub.metering, **query, interval="month")[0]["items"][0]
    )


def test_sums_are_folded_by_the_service_itself(hub: Hub) -> None:
    """What was written down as changed is gone after a while, and the report is the same."""
    use(hub)
    query = {"hub": hub.code, "group_by": "tenant_id", "interval": "hour"}
    before = pages(hub.metering, **query)
    waiting = "select from usage_changes where hub = $1"
    assert [] == eventually(lambda: hub.metering.rows(waiting, hub.code), lambda rows: rows == [])
    assert before == pages(hub.metering, **query)
    [(days, hours)] = hub.metering.rows(
        "select (select count(*) from usage_days where hub = $1), "
        "(select count(*) from usage_hours where hub = $1)",
        hub.code,
    )
    assert (4, 8) == (days, hours)


@pytest.mark.defect("F64", "M36")
def test_a_key_sees_its_own_usage_only(hub: Hub) -> None:
    """A tenant what is its own, in every form; a hub its own, of all tenants."""
    use(hub)
    metering = hub.metering
    for tenant_id in TENANTS:
        [page] = pages(metering, tenant_id, hub=hub.code)
        lines, rows = lists(metering, tenant_id, hub=hub.code, tenant_id=tenant_id)
        for items in (page["items"], lines, rows):
            assert [tenant_id] == [item["tenant_id"] for item in items]
    other = metering.add_hub()
    [own] = pages(metering, secret(hub.code))
    assert {(hub.code, tenant_id) for tenant_id in TENANTS} == {
        (item["hub"], item["tenant_id"]) for item in own["items"]
    }
    assert [] == pages(metering, secret(other.code))[0]["items"]
    for key, query, status in (
        ("ravi-health", {"tenant_id": "indus-foundry"}, 404),
        ("ravi-health", {"tenant_id": "nobody"}, 404),
        ("operator", {"tenant_id": "nobody"}, 404),
        ("operator", {"hub": "nowhere"}, 404),
        (secret(hub.code), {"hub": other.code}, 403),
        ("finance", {}, 403),
    ):
        answer = metering.request("GET", "/v1/usage", key, params=query)
        assert status == answer.status_code, (key, query)


def test_what_makes_no_sense_is_malformed(metering: Metering) -> None:
    """Each with a sentence that says what is taken."""
    for query, said in (
        ({"from": "2025-07-31T10:30:00.000Z"}, "from must be a whole UTC hour"),
        ({"until": "yesterday"}, "until: write an instant"),
        ({"from": "2025-07-31T10:00:00.000Z", "until": "2025-07-31T10:00:00.000Z"}, "until must"),
        ({"group_by": "hub,node_id"}, "'node_id' is none of tenant_id, hub"),
        ({"interval": "week"}, "interval is one of hour, day, month"),
        ({"group_by": "day", "interval": "month"}, "group by one interval"),
        ({"limit": "0"}, "limit is a whole number"),
        ({"cursor": "WzFd"}, "cursor is not one"),
    ):
        answer = metering.request("GET", "/v1/usage", params=query)
        found = answer.json()
        assert (422, "malformed") == (answer.status_code, found["code"]), query
        assert said in found["detail"], query
    answer = metering.request(
        "GET", "/v1/usage", params={"limit": "1"}, headers={"Accept": "text/csv"}
    )
    assert (422, "text/csv is the whole list: it has no limit, no cursor") == (
        answer.status_code,
        answer.json()["detail"],
    )
