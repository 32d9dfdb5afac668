"""Corrections over HTTP and through a hub's topic, on the running service."""

from __future__ import annotations

from typing import Any

import pytest

from hisab_contracts.topics import DECISIONS
from integration.metering.service import Hub, Metering, charges, eventually, read_all, send_key
from unit.metering.hub_events import HOUR_MS, NOON_MS, correction, device, interval

TENANT, OTHER = "ravi-health", "indus-foundry"
HALF_MS = HOUR_MS // 2
HOUR_GPU_NS = 3_600_000_000_000
JOBS = 60


@pytest.fixture(scope="module")
def checker(metering: Metering) -> str:
    """The key of a second operator."""
    secret = send_key(metering.infrastructure, "operator", hub="second-operator")
    eventually(lambda: metering.get("/v1/status", secret), lambda answer: answer is not None)
    return secret


def body(hub: Hub, **members: Any) -> dict[str, Any]:
    """A proposal as an operator sends it."""
    said = correction(hub=hub.code, **members)
    return {name: value for name, value in said.items() if name not in {"revision", "approved_by"}}


def propose(hub: Hub, **members: Any) -> dict[str, Any]:
    """Propose a correction; return the answer."""
    answer = hub.metering.request("POST", "/v1/corrections", json=body(hub, **members))
    assert 202 == answer.status_code, answer.text
    found: dict[str, Any] = answer.json()
    return found


def decide(hub: Hub, proposed: dict[str, Any], what: str, key: str) -> tuple[int, Any]:
    """Approve or reject; return status and body."""
    path = f"/v1/corrections/{proposed['correction_id']}/{what}"
    answer = hub.metering.request("POST", path, key)
    return answer.status_code, answer.json()


def voided(hub: Hub, gpu_ns: int) -> dict[str, Any]:
    """Return the reconciliation, once this much is voided."""
    found: dict[str, Any] = eventually(
        hub.reconcile, lambda said: said["voided_gpu_ns"] == str(gpu_ns)
    )
    return found


def test_a_correction_takes_two_operators_and_is_decided_once(hub: Hub, checker: str) -> None:
    """Proposed, it changes nothing; its proposer cannot approve it; approved, it counts."""
    hub.say(interval())
    hub.accounts(1)
    proposed = propose(hub, end_ms=NOON_MS + HALF_MS)
    assert {"state": "proposed", "revision": None} == {
        name: proposed[name] for name in ("state", "revision")
    }
    status, own = decide(hub, proposed, "approve", "operator")
    assert (403, "maker-is-checker") == (status, own["code"])
    assert "0" == hub.reconcile()["voided_gpu_ns"]
    status, approved = decide(hub, proposed, "approve", checker)
    assert (200, proposed | {"state": "approved", "revision": 1}) == (status, approved)
    for what in ("approve", "reject"):
        status, again = decide(hub, proposed, what, checker)
        assert (409, "already-decided") == (status, again["code"])
    accounts = voided(hub, HOUR_GPU_NS // 2)
    assert ("0", str(HOUR_GPU_NS // 2)) == (
        accounts["difference_gpu_ns"],
        accounts["billed_gpu_ns"],
    )
    detail = hub.metering.get(f"/v1/allocations/{hub.code}/job-1")
    assert ("1800000", "1800000") == (detail["billed_gpu_ms"], detail["voided_gpu_ms"])
    assert [(1, str(HOUR_GPU_NS // 2), str(HOUR_GPU_NS // 2))] == [
        (bucket["revision"], bucket["gpu_ns"], bucket["voided_gpu_ns"])
        for bucket in detail["buckets"]
    ]
    stated = eventually(
        lambda: charges(hub.metering.infrastructure, hub.code), lambda found: len(found) > 1
    )
    buckets = [said for said in stated if said["kind"] == "bucket"]
    assert [(0, 840_000_000), (1, 420_000_000)] == [
        (said["revision"], said["total_micro"]) for said in buckets
    ]


def test_a_rejected_correction_never_counts(hub: Hub) -> None:
    """Who proposed it may take it back."""
    hub.say(interval())
    hub.accounts(1)
    status, rejected = decide(hub, propose(hub), "reject", "operator")
    assert (200, "rejected", None) == (status, rejected["state"], rejected["revision"])
    assert "0" == hub.reconcile()["voided_gpu_ns"]


def test_decisions_are_published_by_hub_and_kind(hub: Hub, checker: str) -> None:
    """Whole, so that a restored metering has them again."""
    proposed = propose(hub)
    decide(hub, proposed, "approve", checker)
    name = proposed["correction_id"].encode()
    found = eventually(
        lambda: [v for v in read_all(hub.metering.infrastructure, DECISIONS) if name in v],
        lambda values: values != [],
    )
    assert [True] == [b'"kind":"correction"' in value for value in found]


def test_corrections_of_hubs_and_operators_are_listed_in_order(hub: Hub, checker: str) -> None:
    """With whoever said them, and what they wait for."""
    hub.say(interval())
    hub.say(correction(node_id="n1"), "correction")
    hub.accounts(1)
    voided(hub, HOUR_GPU_NS)
    unknown = {"tenant_id": "nobody-yet"}
    proposed = propose(hub, replacement=unknown, reason="the wrong tenant")
    decide(hub, proposed, "approve", checker)
    listed = hub.metering.get("/v1/corrections", hub=hub.code, allocation_id="job-1")["items"]
    assert [("void", 1, None, None), ("replace", 2, "unknown-tenant", "key:key-operator")] == [
        (item["action"], item["revision"], item["waits_for"], item["proposed_by"])
        for item in listed
    ]
    assert [None, unknown] == [
        item["replacement"] and {"tenant_id": item["replacement"]["tenant_id"]} for item in listed
    ]
    assert [] == hub.metering.get("/v1/corrections", hub=hub.code, allocation_id="job-2")["items"]
    page = hub.metering.get("/v1/corrections", hub=hub.code, limit=1)
    further = hub.metering.get("/v1/corrections", hub=hub.code, limit=1, cursor=page["next"])
    assert listed == [*page["items"], *further["items"]]


def test_a_tenant_sees_its_own_corrections_and_no_other_tenants_terms(hub: Hub) -> None:
    """The old owner does not learn who has its time now; the new one learns nothing of the old."""
    hub.say(interval(tenant_id=TENANT))
    hub.say(correction(replacement={"tenant_id": OTHER, "sku": "h100-sxm-80"}), "correction")
    hub.accounts(1)
    eventually(
        lambda: hub.metering.get("/v1/corrections", hub=hub.code)["items"], lambda found: found
    )
    for tenant, shown in ((TENANT, None), (OTHER, OTHER)):
        secret = f"hsb_{tenant.ljust(43, '0')}"
        [item] = hub.metering.get("/v1/corrections", secret, hub=hub.code)["items"]
        assert shown == item["replacement"]["tenant_id"]
        assert item["waits_detail"] is None


def test_what_makes_no_sense_is_malformed(hub: Hub) -> None:
    """And says what is wrong; a hub that nobody registered is not found."""
    senseless: tuple[dict[str, Any], ...] = (
        {"end_ms": NOON_MS},
        {"end_ms": NOON_MS + 32 * 24 * HOUR_MS},
        {"action": "replace"},
        {"replacement": {}},
        {"replacement": {"tenant_id": OTHER}, "release": True},
        {"replacement": {"tenant_id": OTHER}, "action": "void"},
        {"slice_uuids": []},
        {"slice_uuids": ["GPU 1"]},
        {"reason": ""},
    )
    for members in senseless:
        answer = hub.metering.request("POST", "/v1/corrections", json=body(hub, **members))
        assert (422, "malformed") == (answer.status_code, answer.json()["code"]), members
        assert answer.json()["detail"]
    said = body(hub) | {"hub": "nowhere"}
    answer = hub.metering.request("POST", "/v1/corrections", json=said)
    assert (404, "not-found") == (answer.status_code, answer.json()["code"])
    status, missing = decide(hub, {"correction_id": "none"}, "approve", "operator")
    assert (404, "not-found") == (status, missing["code"])


def test_a_large_correction_of_a_hub_waits_for_an_operator_who_replays_it(hub: Hub) -> None:
    """Nothing is voided before; the replay is the approval."""
    devices = [device(f"GPU-{number}") for number in range(64)]
    hours = (NOON_MS, NOON_MS + 3 * HOUR_MS)
    hub.say(interval(*hours, devices=devices))
    hub.say(correction(*hours), "correction")
    hub.accounts(1)
    [waiting] = hub.quarantined(count=1, reason="needs-approval")
    assert "168" in waiting["detail"]
    assert "0" == hub.reconcile()["voided_gpu_ns"]
    path = f"/v1/quarantine/{waiting['quarantine_id']}/replay"
    assert "released" == hub.metering.request("POST", path).json()["state"]
    assert "0" == voided(hub, 192 * HOUR_GPU_NS)["difference_gpu_ns"]


def test_what_waited_in_conflict_is_taken_up_once_its_time_is_released(hub: Hub) -> None:
    """By the service itself; and a batch that comes again changes nothing."""
    batch = [interval(), interval(tenant_id=OTHER, allocation_id="guest")]
    void = correction(release=True)
    for data in batch:
        hub.say(data)
    hub.accounts(2)
    hub.quarantined(count=1, reason="conflict")
    hub.say(void, "correction")
    voided(hub, HOUR_GPU_NS)
    accounts = eventually(hub.reconcile, lambda said: said["quarantined_gpu_ns"] == "0")
    assert str(HOUR_GPU_NS) == accounts["billed_gpu_ns"]
    for data in batch:
        hub.say(data)
    hub.say(void, "correction")
    again = hub.accounts(4)
    kept = ("billed_gpu_ns", "voided_gpu_ns", "quarantined_gpu_ns", "difference_gpu_ns")
    assert {name: accounts[name] for name in kept} == {name: again[name] for name in kept}


@pytest.mark.slow
@pytest.mark.defect("M9")
def test_a_kill_in_mid_correction_voids_every_hour_once(metering: Metering, hub: Hub) -> None:
    """Twice killed with -9 while usage, voids and replays of both flow: every sum is exact."""
    kills = {JOBS // 3, 2 * JOBS // 3}
    for number in range(JOBS):
        used = interval(allocation_id=f"job-{number}", devices=[device(f"GPU-{number}")])
        void = correction(NOON_MS, NOON_MS + HALF_MS, allocation_id=f"job-{number}")
        hub.say(used)
        hub.say(void, "correction")
        hub.say(used)
        hub.say(void, "correction")
        hub.flush()
        if number in kills:
            eventually(hub.reconcile, lambda said: said["records"]["read"] > 0)
            metering.kill()
            metering.start()
    hub.accounts(2 * JOBS)
    accounts = voided(hub, JOBS * HOUR_GPU_NS // 2)
    assert ("0", "0", str(JOBS * HOUR_GPU_NS // 2), str(JOBS * HOUR_GPU_NS)) == tuple(
        accounts[f"{name}_gpu_ns"] for name in ("difference", "quarantined", "billed", "duplicate")
    )
    buckets = metering.rows(
        "select distinct gpu_ns, voided_gpu_ns from buckets where hub = $1", hub.code
    )
    assert [(HOUR_GPU_NS // 2, HOUR_GPU_NS // 2)] == buckets
