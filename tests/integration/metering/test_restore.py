"""A restored database takes up what was published since, before anything is rated.

To forget is played by deleting rows from a database of the test's own, as a restore does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest

import stack as local_stack
from contract.examples import EXAMPLES
from hisab_contracts.topics import CHARGES, DECISIONS, ENTRIES, HUBS, PRICES
from infrastructure import Infrastructure, run_apart
from integration.metering.service import (
    JULY_END_MS,
    Hub,
    Metering,
    eventually,
    producer,
    read_all,
    running,
)
from metering.reconcile import Reconcile
from runtime.database import Database
from runtime.kafka import Kafka, Topic
from unit.metering.hub_events import HOUR_MS, NOON_MS, device, interval

TENANT = "ravi-health"
DAY_MS = 24 * HOUR_MS


@pytest.fixture(scope="module")
def alone(
    apache_kafka: Infrastructure, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Metering]:
    """A process with a database that may be damaged, and a broker where nobody else publishes.

    Metering follows what it publishes itself: a second one on the same broker would follow it, too.
    """
    with local_stack.running(infrastructure_only=True) as stack:
        log = tmp_path_factory.mktemp("alone") / "log"
        with running(Infrastructure.of(stack), log) as found:
            yield found


def forget(metering: Metering, *statements: str) -> None:
    """Take from the database what a backup would not have."""

    async def work() -> None:
        connection = await asyncpg.connect(metering.database.admin)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    run_apart(work())


def decisions_of(metering: Metering, hub: Hub) -> list[dict[str, Any]]:
    """What was published of decisions on a hub's records."""
    values = read_all(metering.infrastructure, DECISIONS)
    return [said for said in map(json.loads, values) if said["hub"] == hub.code]


def say_of_july_and_later(hub: Hub) -> None:
    """Push the hub's watermark on, so that what comes afterwards is too late."""
    hub.complete(JULY_END_MS + 4 * DAY_MS)
    hub.flush()
    hub.complete_until("2025-08-04T19:00:00.000Z")


def late(hub: Hub, name: str) -> None:
    """Say an hour that comes too late."""
    hub.say(interval(allocation_id=name, devices=[device(name)]))


def waiting(hub: Hub, reason: str, count: int) -> list[dict[str, Any]]:
    """List what waits for a reason."""
    return hub.quarantined(count=count, reason=reason)


def test_forgotten_prices_and_hubs_are_taken_up_before_anything_is_rated(
    alone: Metering,
) -> None:
    """The line as it was published, its author included; the same again is nothing."""
    hub = alone.add_hub()
    body = {
        "currency": "PKR",
        "valid_from": "2025-07-31T11:00:00.000Z",
        "valid_until": None,
        "prices": [
            {"sku": "h100-sxm-80", "price_class": "on_demand", "micro_per_gpu_hour": "999000000"}
        ],
    }
    assert 201 == alone.request("POST", "/v1/price-lists", json=body).status_code
    columns = "rate_line_id, price_version, currency, sku, price_class, micro_per_gpu_hour, "
    lines = f"select {columns} valid_from_ms, valid_until_ms from price_lines order by rate_line_id"
    lists = "select price_version, currency, valid_from_ms, added_by from price_lists order by 1"
    hubs = "select hub, name, heartbeat_ms from hubs order by hub"
    eventually(lambda: alone.rows("select * from outbox"), lambda rows: rows == [])
    before = [alone.rows(lines), alone.rows(lists), alone.rows(hubs)]
    alone.stop()
    forget(
        alone,
        "delete from price_lines where valid_from_ms > 1753956000000",
        "delete from price_lists where valid_from_ms > 1753956000000",
        f"delete from hubs where hub = '{hub.code}'",
        f"delete from consumer_progress where topic in ('{PRICES}', '{HUBS}')",
    )
    assert before != [alone.rows(lines), alone.rows(lists), alone.rows(hubs)]
    alone.start()
    assert before == [alone.rows(lines), alone.rows(lists), alone.rows(hubs)]
    hub.say(interval(NOON_MS + HOUR_MS, NOON_MS + 2 * HOUR_MS))
    hub.accounts(1)
    [(charge_micro,)] = alone.rows("select charge_micro from buckets where hub = $1", hub.code)
    assert 999_000_000 == charge_micro


def test_what_operators_decided_is_applied_when_the_record_comes_again(alone: Metering) -> None:
    """Dismissed stays dismissed although it is in time now; replayed is billed although late."""
    hub = alone.add_hub()
    say_of_july_and_later(hub)
    late(hub, "job-dismissed")
    late(hub, "job-replayed")
    hub.flush()
    numbers = {
        item["payload_base64"]: item["quarantine_id"] for item in waiting(hub, "too-late", 2)
    }
    first, second = sorted(numbers.values(), key=int)
    dismiss = f"/v1/quarantine/{first}/dismiss"
    assert 200 == alone.request("POST", dismiss, json={"reason": "never ran"}).status_code
    assert 202 == alone.request("POST", f"/v1/quarantine/{second}/replay", json={}).status_code
    said = eventually(lambda: decisions_of(alone, hub), lambda found: len(found) == 2)
    assert ["too-late", None] == [decision.get("dismissed_reason") for decision in said]
    accounts = hub.reconcile()
    alone.stop()
    # A backup from before the two records: also their decisions, and how far the topics were read.
    code = hub.code
    forget(
        alone,
        f"delete from quarantine_time where hub = '{code}'",
        f"delete from quarantine where hub = '{code}'",
        f"delete from open_time where hub = '{code}'",
        f"delete from coverage where hub = '{code}'",
        f"delete from buckets where hub = '{code}'",
        f"delete from tallies where hub = '{code}'",
        f"delete from sources where hub = '{code}'",
        f"update hubs set watermark_ms = null where hub = '{code}'",
        "delete from quarantine_decisions",
        f"update consumer_progress set next_offset = 0 where topic = '{hub.topic}'",
        f"delete from consumer_progress where topic = '{DECISIONS}'",
    )
    done = accept(alone)
    assert 0 == done, "accept-restore"
    alone.start()
    assert accounts == eventually(hub.reconcile, lambda found: found == accounts)
    states = {item["state"] for item in waiting(hub, "too-late", 1)}
    assert "dismissed" in states
    assert "open" not in states


def test_an_old_message_that_is_published_again_does_not_hide_the_newer_one(
    alone: Metering,
) -> None:
    """The last message of a record is put right by whoever knows more."""
    hub = alone.add_hub()
    hub.produce(b"no event")
    hub.flush()
    [item] = waiting(hub, "undecodable", 1)
    path = f"/v1/quarantine/{item['quarantine_id']}"
    assert 202 == alone.request("POST", f"{path}/replay", json={}).status_code
    body = {"reason": "nobody knows what it was"}
    assert 200 == alone.request("POST", f"{path}/dismiss", json=body).status_code
    said = eventually(lambda: decisions_of(alone, hub), lambda found: len(found) >= 2)
    old = producer(alone.infrastructure)
    key = "/".join((hub.code, "quarantine", said[0]["topic"], "0"))
    old.produce(DECISIONS, json.dumps(said[0]), key)
    old.flush(60)
    last = eventually(
        lambda: decisions_of(alone, hub)[-1], lambda said: said["dismissed_ms"] is not None
    )
    assert "nobody knows what it was" in last["dismissed_because"]
    assert last["replayed_ms"] is not None


async def test_reconcile_finds_what_was_booked_before_a_restore_to_the_very_beginning(
    alone: Metering,
) -> None:
    """No hub has said anything to this database; the ledger has booked a charge of one."""
    servers = alone.infrastructure.bootstrap_servers
    kafka = Kafka(servers, client="test", instance="0", replication=1)
    pool = Database(alone.infrastructure.migrated_database("metering").writer, name="test")
    await pool.open()
    try:
        # As many partitions as charges have: the service of this broker compares the two.
        count = await kafka.partition_count(CHARGES)
        await kafka.create_topics([Topic(ENTRIES, count)])
        entry = json.loads((EXAMPLES / "valid/ledger.entries.v1/3-charge.json").read_text())
        said = producer(alone.infrastructure)
        said.produce(ENTRIES, json.dumps(entry | {"seq": 1}), entry["tenant_id"])
        said.flush(60)
        printed: list[str] = []
        async with pool.connection() as connection:
            run = Reconcile(kafka, connection, printed.append)
            outcome = await run.run(since_ms=0, restate=False)
        assert (1, 1) == (outcome.found_count, outcome.left_count)
        assert "booked 60000000000 GPU-ns" in printed[0]
    finally:
        await pool.close()
        await kafka.close()


def accept(metering: Metering) -> int:
    """Run `accept-restore` as the README says, with the addresses in the environment."""
    environ = dict(os.environ) | {
        "HISAB_KAFKA": metering.infrastructure.bootstrap_servers,
        "HISAB_DB_WRITER": metering.database.writer,
    }
    command = ["accept-restore", "--accepted-by", "operator", "--reason", "a backup was restored"]
    return subprocess.run(
        [sys.executable, "-m", "metering", *command], env=environ, check=False, timeout=300
    ).returncode
