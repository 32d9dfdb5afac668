"""What a key of a hub or a tenant sees of metering; who may ask what is in the access matrix."""

from __future__ import annotations

import pytest

from integration.metering.service import Hub, Metering, secret, send_key
from unit.metering.hub_events import HOUR_MS, NOON_MS, interval


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
