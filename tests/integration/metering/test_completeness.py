"""Up to when a hub is complete: gaps, sources, epochs, retirement, silence, and what is told."""

from __future__ import annotations

import json

import pytest
from confluent_kafka import Producer

from hisab_contracts.topics import partition_of
from hisab_contracts.units import month_of
from integration.metering.service import JULY_END_MS, Hub, Metering, charges, eventually
from unit.metering.hub_events import HOUR_MS, NOON_MS, device, interval

JULY_END = "2025-07-31T19:00:00.000Z"
NOON = "2025-07-31T10:00:00.000Z"


@pytest.mark.defect("M22", "M31", "F4")
def test_gap_delays_completeness_never_billing(hub: Hub) -> None:
    """With sequence 2 missing the usage is billed and the watermark waits for it."""
    hub.say(interval(), sequence=1)
    hub.say(interval(NOON_MS + HOUR_MS, NOON_MS + 2 * HOUR_MS), sequence=3)
    said = hub.accounts(2)
    assert 2 == said["records"]["accepted"]
    hub.say({"node_id": "n1", "watermark_ms": JULY_END_MS}, "watermark", sequence=4)
    hub.flush()
    state = eventually(hub.state, lambda state: bool(state["blocked_by"]))
    assert state["complete_until"] is None
    assert ["gap: sequence 2 is missing"] == [blocked["reason"] for blocked in state["blocked_by"]]
    hub.say(interval(NOON_MS, NOON_MS + 1), sequence=2)
    hub.flush()
    assert JULY_END == hub.complete_until(JULY_END)
    [source] = hub.metering.get(f"/v1/hubs/{hub.code}/sources")["items"]
    assert ("4", JULY_END, []) == (
        source["committed_sequence"],
        source["watermark_at"],
        source["gaps"],
    )


def test_slowest_source_decides_until_it_is_retired(hub: Hub) -> None:
    """The minimum over active sources; what was retired counts no longer."""
    hub.complete(JULY_END_MS, "n1")
    hub.complete(NOON_MS, "n2")
    hub.flush()
    assert NOON == hub.complete_until(NOON)
    path = f"/v1/hubs/{hub.code}/sources/retire"
    body = {"source": f"/hubs/{hub.code}/nodes/n2/epochs/e1", "reason": "burnt down"}
    assert 200 == hub.metering.request("POST", path, json=body).status_code
    assert JULY_END == hub.complete_until(JULY_END)
    again = hub.metering.request("POST", path, json=body)
    assert (409, "source-unknown") == (again.status_code, again.json()["code"])


def test_new_epoch_closes_the_older_and_its_gap_is_listed(hub: Hub) -> None:
    """The old epoch's usage is still billed; its gap no longer holds the hub."""
    hub.say(interval(), sequence=1)
    hub.say(interval(NOON_MS + HOUR_MS, NOON_MS + 2 * HOUR_MS), sequence=3)
    hub.complete(JULY_END_MS, epoch="e2")
    hub.flush()
    assert JULY_END == hub.complete_until(JULY_END)
    hub.say(interval(NOON_MS + 2 * HOUR_MS, NOON_MS + 3 * HOUR_MS), sequence=4)
    assert 3 == hub.accounts(3)["records"]["accepted"]
    sources = hub.metering.get(f"/v1/hubs/{hub.code}/sources")["items"]
    assert [("closed", [{"first_sequence": "2", "last_sequence": "2"}]), ("active", [])] == [
        (source["standing"], source["gaps"]) for source in sources
    ]


def test_watermark_is_told_in_every_partition_with_the_open_quarantine(hub: Hub) -> None:
    """After the charges it covers, and again when a dismissal frees the month."""
    hub.say(interval())
    hub.say(interval(allocation_id="other"))
    hub.complete(JULY_END_MS)
    hub.flush()
    assert JULY_END == hub.complete_until(JULY_END)

    def told() -> list[dict[str, object]]:
        said = charges(hub.metering.infrastructure, hub.code)
        return [statement for statement in said if statement["kind"] == "watermark"]

    waiting = [
        {"tenant_id": "ravi-health", "month": "2025-07", "quarantined_gpu_ns": 3_600_000_000_000}
    ]
    final = eventually(told, lambda found: any(statement["watermark_ms"] for statement in found))
    last = max(final, key=lambda statement: int(str(statement["revision"])))
    assert (JULY_END_MS, waiting) == (last["watermark_ms"], last["quarantined"])
    assert 4 == len([statement for statement in final if statement["revision"] == last["revision"]])
    [item] = hub.quarantined(count=1)
    path = f"/v1/quarantine/{item['quarantine_id']}/dismiss"
    assert 200 == hub.metering.request("POST", path, json={"reason": "agreed"}).status_code
    freed = eventually(
        told,
        lambda found: any(
            not statement["quarantined"] and statement["watermark_ms"] for statement in found
        ),
    )
    assert [] == max(freed, key=lambda statement: int(str(statement["revision"])))["quarantined"]


def test_late_beyond_the_horizon_waits_and_a_replay_is_a_duplicate(hub: Hub) -> None:
    """72 hours behind the hub's watermark new time waits; what is covered is a duplicate."""
    hub.say(interval())
    hub.complete(NOON_MS + 80 * HOUR_MS)
    hub.flush()
    until = "2025-08-03T18:00:00.000Z"
    assert until == hub.complete_until(until)
    hub.say(interval())
    hub.say(interval(NOON_MS + HOUR_MS, NOON_MS + 2 * HOUR_MS))
    said = hub.accounts(3)
    assert {"read": 3, "accepted": 1, "duplicate": 1, "quarantined": 1} == said["records"]
    [item] = hub.quarantined(count=1, reason="too-late")
    replayed = hub.metering.request(
        "POST", f"/v1/quarantine/{item['quarantine_id']}/replay", json={}
    )
    assert "released" == replayed.json()["state"]
    said = hub.reconcile()
    assert {"read": 3, "accepted": 2, "duplicate": 1, "quarantined": 0} == said["records"]
    assert "0" == said["difference_gpu_ns"]


def test_silent_hub_says_so(metering: Metering) -> None:
    """Nothing for two heartbeats."""
    hub = metering.add_hub(heartbeat_ms=1_000)
    hub.complete(NOON_MS)
    hub.flush()
    state = eventually(hub.state, lambda state: state["silent"] and state["complete_until"])
    assert (True, NOON) == (state["silent"], state["complete_until"])
    assert state["blocked_by"][0]["reason"].startswith("silent since")


def test_open_time_is_what_waits_in_each_billing_month(hub: Hub) -> None:
    """Kept beside the records: across the end of a month, a conflict, a dismissal, a release."""
    sku = f"open-{hub.code}"
    hub.say(interval(JULY_END_MS - HOUR_MS, JULY_END_MS + HOUR_MS, sku=sku))
    hub.say(interval(NOON_MS, NOON_MS + HOUR_MS, allocation_id="first"))
    hub.say(interval(NOON_MS, NOON_MS + 2 * HOUR_MS, allocation_id="second"))
    hub.accounts(3)
    hour_gpu_ns = 3_600_000_000_000
    assert {"2025-07": 2 * hour_gpu_ns, "2025-08": hour_gpu_ns} == open_time(hub)
    [conflict] = hub.quarantined(count=1, reason="conflict")
    path = f"/v1/quarantine/{conflict['quarantine_id']}"
    assert "open" == hub.metering.request("POST", f"{path}/replay", json={}).json()["state"]
    assert {"2025-07": 2 * hour_gpu_ns, "2025-08": hour_gpu_ns} == open_time(hub)
    hub.metering.request("POST", f"{path}/dismiss", json={"reason": "agreed"})
    assert {"2025-07": hour_gpu_ns, "2025-08": hour_gpu_ns} == open_time(hub)
    prices = [{"sku": sku, "price_class": "on_demand", "micro_per_gpu_hour": "1"}]
    body = {"currency": "PKR", "valid_from": None, "valid_until": None, "prices": prices}
    assert 201 == hub.metering.request("POST", "/v1/price-lists", json=body).status_code
    assert {} == eventually(lambda: open_time(hub), lambda found: not found)

    def changes() -> list[tuple[int]]:
        query = "select waiting_gpu_ns from open_time where hub = $1"
        return hub.metering.rows(query, hub.code)

    assert [] == eventually(changes, lambda found: not found)


def open_time(hub: Hub) -> dict[str, int]:
    """What is open per month of the only tenant, which must be what its records say."""
    [(kept, records)] = hub.metering.rows(
        """select (select json_object_agg(month, gpu_ns)
                     from (select month, sum(waiting_gpu_ns) as gpu_ns from open_time
                            where hub = $1 group by month having sum(waiting_gpu_ns) <> 0) o),
                  (select json_agg(json_build_array(hour_ms, waiting_gpu_ns))
                     from quarantine_time where hub = $1 and not dismissed)""",
        hub.code,
    )
    sums: dict[str, int] = {}
    for hour_ms, gpu_ns in json.loads(records or "[]"):
        sums[month_of(hour_ms)] = sums.get(month_of(hour_ms), 0) + gpu_ns
    assert sums == json.loads(kept or "{}")
    return sums


def test_nothing_is_complete_before_hours_that_an_open_transaction_hides_are_read(
    hub: Hub,
) -> None:
    """An acknowledged hour stands behind a foreign transaction: the hub waits, and says for what.

    The watermark of the other node would otherwise close the month without that hour.
    """
    seen, unseen = nodes_of_two_partitions(hub)
    number = partition_of(f"/hubs/{hub.code}/nodes/{unseen}".encode(), 4)
    foreign = Producer(
        {
            "bootstrap.servers": hub.metering.infrastructure.bootstrap_servers,
            "transactional.id": f"foreign-{hub.code}",
            "transaction.timeout.ms": 600_000,
        }
    )
    foreign.init_transactions()
    foreign.begin_transaction()
    foreign.produce(hub.topic, b"never ended", partition=number)
    foreign.flush()
    hub.say(interval(node_id=unseen))
    hub.complete(NOON_MS, unseen)
    hub.flush()
    hub.say(interval(node_id=seen, devices=[device("GPU-2")]))
    hub.complete(JULY_END_MS, seen)
    hub.flush()
    state = eventually(hub.state, lambda state: bool(state["blocked_by"]))
    assert state["complete_until"] is None
    [blocked] = state["blocked_by"]
    assert f"partition {number}" == blocked["source"]
    assert "a transaction is open on" in blocked["reason"]
    status = hub.metering.get("/v1/status")
    assert status["lag_records"] >= 2
    assert any(hub.topic in reason for reason in status["blocked_by"])
    foreign.abort_transaction()
    assert NOON == hub.complete_until(NOON)
    assert 2 == hub.accounts(2)["records"]["accepted"]


def nodes_of_two_partitions(hub: Hub) -> tuple[str, str]:
    """Two nodes of a hub whose keys stand in different partitions."""
    by_partition = {
        partition_of(f"/hubs/{hub.code}/nodes/n{number}".encode(), 4): f"n{number}"
        for number in range(50)
    }
    first, second, *_ = by_partition.values()
    return first, second
