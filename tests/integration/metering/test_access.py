"""What a key of a hub or a tenant sees of metering; who may ask what is in the access matrix."""

from __future__ import annotations

import json

import pytest

from integration.metering.service import Hub, Metering, secret, send_key
from unit.metering.hub_events import HOUR_MS, NOON_MS, ended, interval


def test_hub_key_asks_for_no_other_hub_wherever_it_is_named(metering: Metering, hub: Hub) -> None:
    """Reconciliation and quarantine without `hub` are the key's own."""
    other = metering.add_hub()
    hub.produce(b"garbage")
    assert 1 == hub.accounts(1)["records"]["read"]
    own = metering.get("/v1/reconciliation", secret(hub.code))
    assert 1 == own["records"]["read"]
    assert 1 == len(metering.get("/v1/quarantine", secret(hub.code))["items"])
    assert 0 == metering.get("/v1/reconciliation", secret(other.code))["records"]["read"]
    assert [] == metering.get("/v1/quarantine", secret(other.code))["items"]


@pytest.mark.defect("F64")
def test_allocation_of_another_tenant_does_not_exist_for_a_tenant(hub: Hub) -> None:
    """404 like one that nobody ever heard of."""
    hub.say(interval(tenant_id="indus-foundry"))
    hub.accounts(1)
    for name in ("job-1", "never"):
        answer = hub.metering.request("GET", f"/v1/allocations/{hub.code}/{name}", "ravi-health")
        assert (404, "not-found") == (answer.status_code, answer.json()["code"])


@pytest.mark.defect("F64")
def test_tenant_sees_its_own_time_of_an_allocation_id_that_two_tenants_use(hub: Hub) -> None:
    """Coverage, buckets, duplicates and what waits: of each only the caller's rows."""
    hub.say(interval())
    hub.say(interval())
    later = {"start_ms": NOON_MS + HOUR_MS, "end_ms": NOON_MS + 3 * HOUR_MS}
    hub.say(interval(tenant_id="indus-foundry", **later))
    hub.say(interval(tenant_id="indus-foundry"))
    hub.accounts(4)
    path = f"/v1/allocations/{hub.code}/job-1"
    ravi, indus = (hub.metering.get(path, key) for key in ("ravi-health", "indus-foundry"))
    assert ["ravi-health", "indus-foundry"] == [ravi["tenant_id"], indus["tenant_id"]]
    assert [1, 2] == [len(detail["buckets"]) for detail in (ravi, indus)]
    assert [[NOON_MS], [NOON_MS + HOUR_MS]] == [
        [covered["start_ms"] for covered in detail["intervals"]] for detail in (ravi, indus)
    ]
    assert ["3600000", "0"] == [detail["duplicate_gpu_ms"] for detail in (ravi, indus)]
    assert [[], ["conflict"]] == [
        [waits["reason"] for waits in detail["quarantined"]] for detail in (ravi, indus)
    ]


def test_job_number_that_two_tenants_had_is_shown_for_both(hub: Hub) -> None:
    """Operators and the hub see both owners and the sum; each can be asked for alone."""
    hub.say(interval())
    later = {"start_ms": NOON_MS + HOUR_MS, "end_ms": NOON_MS + 3 * HOUR_MS}
    hub.say(interval(tenant_id="indus-foundry", project_id="second", **later))
    hub.accounts(2)
    path = f"/v1/allocations/{hub.code}/job-1"
    for key in ("operator", "auditor", secret(hub.code)):
        found = hub.metering.get(path, key)
        assert [None, ["indus-foundry", "ravi-health"]] == [found["tenant_id"], found["owners"]]
        assert str(3 * HOUR_MS) == found["billed_gpu_ms"]
        assert [("ravi-health", "main"), *[("indus-foundry", "second")] * 2] == [
            (bucket["tenant_id"], bucket["project_id"]) for bucket in found["buckets"]
        ]
        alone = hub.metering.get(path, key, tenant_id="indus-foundry")
        assert ["indus-foundry", ["indus-foundry"]] == [alone["tenant_id"], alone["owners"]]
        assert str(2 * HOUR_MS) == alone["billed_gpu_ms"]
        assert {"indus-foundry"} == {covered["tenant_id"] for covered in alone["intervals"]}
    own = hub.metering.get(path, "ravi-health")
    assert ["ravi-health", ["ravi-health"]] == [own["tenant_id"], own["owners"]]
    assert [("ravi-health", "main")] == [
        (bucket["tenant_id"], bucket["project_id"]) for bucket in own["buckets"]
    ]
    for key, tenant in (("ravi-health", "indus-foundry"), ("operator", "flood-watch")):
        answer = hub.metering.request("GET", path, key, params={"tenant_id": tenant})
        assert (404, "not-found") == (answer.status_code, answer.json()["code"])


def test_quarantined_claim_hides_nothing_of_an_allocation(hub: Hub) -> None:
    """A record naming `0-nobody` stands beside the billed hour, and makes nobody an owner."""
    hub.say(interval(tenant_id="0-nobody", node_id="n2"))
    hub.accounts(1)
    path = f"/v1/allocations/{hub.code}/job-1"
    before = hub.metering.get(path)
    assert ["0-nobody", [], "0"] == [
        before["tenant_id"],
        before["owners"],
        before["billed_gpu_ms"],
    ]
    hub.say(interval())
    hub.say(interval(tenant_id="indus-foundry"))
    hub.say(ended(NOON_MS + HOUR_MS, HOUR_MS, tenant_id="0-nobody"), "ended")
    hub.accounts(3)
    found = hub.metering.get(path)
    assert ["ravi-health", ["ravi-health"], str(HOUR_MS), str(2 * HOUR_MS)] == [
        found["tenant_id"],
        found["owners"],
        found["billed_gpu_ms"],
        found["quarantined_gpu_ms"],
    ]
    assert [("0-nobody", "unknown-tenant"), ("indus-foundry", "conflict")] == [
        (record["tenant_id"], record["reason"]) for record in found["quarantined"]
    ]
    # Of a conflict each tenant sees its own claim, and nothing that names the other.
    own = hub.metering.get(path, "indus-foundry")
    assert ["indus-foundry", [], ["conflict"]] == [
        own["tenant_id"],
        own["owners"],
        [record["reason"] for record in own["quarantined"]],
    ]
    assert "ravi-health" not in json.dumps(own)
    assert "indus-foundry" not in json.dumps(hub.metering.get(path, "ravi-health"))


def test_hub_that_nobody_registered_does_not_exist(metering: Metering) -> None:
    """Its key may be older than its registration: 404, and its events are not taken."""
    key = send_key(metering.infrastructure, "hub", hub="nowhere")
    paths = ("/v1/hubs/nowhere", "/v1/hubs/nowhere/sources", "/v1/reconciliation?hub=nowhere")
    for path in paths:
        assert 404 == metering.request("GET", path).status_code
    body = {"source": "/hubs/nowhere/nodes/n1/epochs/e1", "reason": "gone"}
    retired = metering.request("POST", "/v1/hubs/nowhere/sources/retire", json=body)
    assert 404 == retired.status_code
    events = metering.request("POST", "/v1/events", key, json=[{"id": "1"}])
    assert (404, "not-found") == (events.status_code, events.json()["code"])


def test_quote_is_at_the_price_in_force_now(metering: Metering) -> None:
    """A line that has ended or is yet to begin prices nothing; amounts are text."""
    asked = {"sku": "h100-sxm-80", "price_class": "on_demand", "gpus": 2, "duration_ms": HOUR_MS}
    for key in ("ravi-health", "scheduler"):
        said = metering.request("POST", "/v1/quotes", key, json=asked).json()
        assert "1680000000" == said["quote_micro"]
    windows = {
        "ended-sku": ("2025-01-01T00:00:00.000Z", "2025-02-01T00:00:00.000Z"),
        "later-sku": ("2099-01-01T00:00:00.000Z", None),
    }
    for sku, (valid_from, valid_until) in windows.items():
        prices = [{"sku": sku, "price_class": "on_demand", "micro_per_gpu_hour": "1"}]
        body = {"currency": "PKR", "valid_from": valid_from, "valid_until": valid_until}
        added = metering.request("POST", "/v1/price-lists", json=body | {"prices": prices})
        assert 201 == added.status_code
        answer = metering.request("POST", "/v1/quotes", json=asked | {"sku": sku})
        assert (409, "no-price") == (answer.status_code, answer.json()["code"])
