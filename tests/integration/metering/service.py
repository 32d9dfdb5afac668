"""Metering alone: the real process on a real broker and database, and the outside played by tests.

The ledger is outside here: its two reference topics are written by the test, as their contract
says. Every test takes a hub of its own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import httpx2
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from children import free_ports
from infrastructure import Database, Infrastructure, run_apart
from unit.metering.hub_events import HEADERS, HOUR_MS, NOON_MS, event, watermark

T = TypeVar("T")

PATIENCE_S = 600
TENANTS = ("ravi-health", "indus-foundry")
PRICES = [
    {"sku": "h100-sxm-80", "price_class": "on_demand", "micro_per_gpu_hour": "840000000"},
    {"sku": "l40s-48", "price_class": "spot", "micro_per_gpu_hour": "130000000"},
]


def eventually(ask: Callable[[], T], holds: Callable[[T], bool]) -> T:
    """Ask until what is answered holds; the last answer otherwise, for the assertion to show."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = ask()
        if holds(found) or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


@dataclass
class Metering:
    """A running process of metering, and what its neighbours need."""

    infrastructure: Infrastructure
    database: Database
    port: int
    instance: str = "0"
    process: subprocess.Popen[bytes] | None = None
    log: Path = Path(os.devnull)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def start(self) -> None:
        """Start the process and wait until it answers."""
        environ = dict(os.environ) | {
            "HISAB_HTTP_PORT": str(self.port),
            "HISAB_KAFKA": self.infrastructure.bootstrap_servers,
            "HISAB_PARTITIONS": "4",
            "HISAB_HUB_PARTITIONS": "4",
            "HISAB_REPLICATION": "1",
            "HISAB_INSTANCE": self.instance,
            "HISAB_DB_API": self.database.api,
            "HISAB_DB_WRITER": self.database.writer,
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "metering", "serve"], env=environ, stderr=log
            )
        eventually(lambda: self.get("/v1/status"), lambda answer: answer is not None)

    def stop(self) -> int:
        """Stop it as an operator would."""
        if self.process is None:
            return 0
        self.process.terminate()
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        """Kill it with -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def request(self, method: str, path: str, key: str = "operator", **more: Any) -> Any:
        """Ask with a key: the name of a role, or a secret."""
        headers = {"Authorization": f"Bearer {secret(key)}"} | more.pop("headers", {})
        if method == "POST":
            headers.setdefault("Idempotency-Key", f"{time.time_ns()}-{next(self._numbers)}")
        url = f"http://127.0.0.1:{self.port}{path}"
        return httpx2.request(
            method, url, headers=headers, timeout=PATIENCE_S, trust_env=False, **more
        )

    def get(self, path: str, key: str = "operator", **query: Any) -> Any:
        """Return the JSON of an answer; None while nobody answers or knows the key."""
        try:
            answer = self.request("GET", path, key, params=query)
        except httpx2.TransportError:
            return None
        return None if answer.status_code in {401, 503} else answer.json()

    def rows(self, query: str, *values: Any) -> list[Any]:
        """Look into its tables."""

        async def ask() -> list[Any]:
            connection = await asyncpg.connect(self.database.admin)
            try:
                return [tuple(row) for row in await connection.fetch(query, *values)]
            finally:
                await connection.close()

        return run_apart(ask())

    def add_hub(self, heartbeat_ms: int = 60_000) -> Hub:
        """Register a hub that no other test uses."""
        code = f"t{os.getpid()}-{time.time_ns() % 10**9}"
        body = {"hub": code, "name": code, "heartbeat_ms": heartbeat_ms}
        answer = self.request("POST", "/v1/hubs", json=body)
        if answer.status_code != 201:
            raise AssertionError(answer.text)
        send_key(self.infrastructure, "hub", hub=code)
        return Hub(self, code)


class Hub:
    """A hub's agent: one source per node, each counting its own events."""

    def __init__(self, metering: Metering, code: str) -> None:
        """Speak for this hub."""
        self.metering = metering
        self.code = code
        self.topic = f"hub.{code}.usage.v1"
        self._sequences: dict[tuple[str, str], Iterator[int]] = {}
        self._producer = producer(metering.infrastructure)

    def say(
        self,
        data: dict[str, Any],
        kind: str = "interval",
        epoch: str = "e1",
        sequence: int | None = None,
    ) -> bytes:
        """Produce an event of a node with its next sequence; not flushed."""
        said = data | {"hub": self.code}
        node = str(said["node_id"])
        if sequence is None:
            counter = self._sequences.setdefault((node, epoch), itertools.count(1))
            sequence = next(counter)
        value = event(said, sequence, kind, epoch)
        self.produce(value, node)
        return value

    def complete(self, until_ms: int, node: str = "n1", epoch: str = "e1") -> None:
        """Say a watermark."""
        self.say(watermark(until_ms, node_id=node), "watermark", epoch)

    def produce(self, value: bytes | None, node: str = "n1") -> None:
        """Produce any bytes under the key of a node."""
        key = f"/hubs/{self.code}/nodes/{node}"
        self._producer.produce(self.topic, value, key, headers=[*HEADERS])

    def flush(self) -> None:
        """Wait until the broker has everything."""
        if self._producer.flush(PATIENCE_S):
            raise AssertionError("the broker did not take every event")

    def accounts(self, records: int) -> dict[str, Any]:
        """Return the reconciliation once this many records were read."""
        self.flush()
        return eventually(self.reconcile, lambda said: said["records"]["read"] >= records)

    def reconcile(self) -> dict[str, Any]:
        """Return the reconciliation as it is."""
        found: dict[str, Any] = self.metering.get("/v1/reconciliation", hub=self.code)
        return found

    def quarantined(self, *, count: int = 0, **query: str) -> list[dict[str, Any]]:
        """List the hub's quarantine, once it has this many."""

        def ask() -> list[dict[str, Any]]:
            items: list[dict[str, Any]] = self.metering.get(
                "/v1/quarantine", hub=self.code, **query
            )["items"]
            return items

        return eventually(ask, lambda items: len(items) >= count)

    def state(self) -> dict[str, Any]:
        """Return what is known of the hub."""
        found: dict[str, Any] = self.metering.get(f"/v1/hubs/{self.code}")
        return found

    def complete_until(self, expected: str | None) -> str | None:
        """Return up to when the hub is complete, once it is `expected`."""
        found: str | None = eventually(
            lambda: self.state()["complete_until"], lambda said: said == expected
        )
        return found


def secret(key: str) -> str:
    """The secret of a role's key, or the secret itself."""
    return key if key.startswith("hsb_") else f"hsb_{key.ljust(43, '0')}"


def producer(infrastructure: Infrastructure) -> Producer:
    """A producer as the contract asks for it."""
    return Producer(
        {"bootstrap.servers": infrastructure.bootstrap_servers, "partitioner": "murmur2"}
    )


def make_topics(infrastructure: Infrastructure, *names: str) -> None:
    """Create what a neighbour would create; what is there stays."""
    admin = AdminClient({"bootstrap.servers": infrastructure.bootstrap_servers})
    compact = {"cleanup.policy": "compact"}
    for made in admin.create_topics(
        [NewTopic(name, 4, 1, config=compact) for name in names]
    ).values():
        try:
            made.result(PATIENCE_S)
        except KafkaException as refused:
            if refused.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise


def send_key(
    infrastructure: Infrastructure, role: str, tenant: str | None = None, hub: str | None = None
) -> str:
    """Publish an API key as the ledger does; its secret is named by whom it is for."""
    name = tenant or hub or role
    key_id = f"key-{name}"
    record = {
        "key_id": key_id,
        "sha256": hashlib.sha256(secret(name).encode()).hexdigest(),
        "role": role,
        "tenant_id": tenant,
        "hub": hub,
        "expires_at_ms": None,
        "revoked": False,
    }
    said = producer(infrastructure)
    said.produce("ledger.access.v1", json.dumps(record), key_id)
    said.flush(PATIENCE_S)
    return secret(name)


def send_tenant(infrastructure: Infrastructure, tenant: str) -> None:
    """Publish a tenant as the ledger does."""
    record = {
        "tenant_id": tenant,
        "kind": "startup",
        "currency": "PKR",
        "credit_limit_micro": 0,
        "projects": ["main"],
    }
    said = producer(infrastructure)
    said.produce("ledger.tenants.v1", json.dumps(record), tenant)
    said.flush(PATIENCE_S)


def charges(infrastructure: Infrastructure, hub: str) -> list[dict[str, Any]]:
    """Read what was stated downstream about a hub so far, in order per partition."""
    return [
        said
        for said in (json.loads(value) for value in read_all(infrastructure, "metering.charges.v1"))
        if said["hub"] == hub
    ]


def read_all(infrastructure: Infrastructure, topic: str) -> list[bytes]:
    """Read a topic from its beginning to its present end."""
    consumer = Consumer(
        {
            "bootstrap.servers": infrastructure.bootstrap_servers,
            "group.id": f"test-{time.time_ns()}",
            "auto.offset.reset": "earliest",
            "enable.partition.eof": True,
            "enable.auto.commit": False,
        }
    )
    partitions = set(consumer.list_topics(topic, timeout=PATIENCE_S).topics[topic].partitions)
    consumer.subscribe([topic])
    values: list[bytes] = []
    ended: set[int | None] = set()
    while ended != partitions:
        message = consumer.poll(PATIENCE_S)
        if message is None:
            raise AssertionError(f"{topic} could not be read to its end")
        error = message.error()
        if error is None:
            values.append(message.value() or b"")
        elif error.code() == KafkaError._PARTITION_EOF:
            ended.add(message.partition())
    consumer.close()
    return values


@contextmanager
def running(infrastructure: Infrastructure, log: Path) -> Iterator[Metering]:
    """Metering alone, with two tenants, a price list, and a key per role."""
    database = infrastructure.migrated_database("metering")
    ports = free_ports(os.getpid())  # Kept to the end: the process is stopped and started again.
    make_topics(infrastructure, "ledger.access.v1", "ledger.tenants.v1")
    for role in ("operator", "auditor", "scheduler", "finance", "officer"):
        send_key(infrastructure, role)
    for tenant in TENANTS:
        send_tenant(infrastructure, tenant)
        send_key(infrastructure, "tenant", tenant=tenant)
    metering = Metering(infrastructure, database, next(ports), log=log)
    try:
        metering.start()
        eventually(
            lambda: metering.request("GET", "/v1/status").status_code, lambda status: status == 200
        )
        answer = metering.request(
            "POST",
            "/v1/price-lists",
            json={
                "currency": "PKR",
                "valid_from": "2025-01-01T00:00:00.000Z",
                "valid_until": None,
                "prices": PRICES,
            },
        )
        if answer.status_code != 201:
            raise AssertionError(answer.text)
        yield metering
    finally:
        metering.stop()
        infrastructure.drop_database(database)


JULY_END_MS = NOON_MS + 9 * HOUR_MS
"""19:00Z: the end of July in Karachi."""
