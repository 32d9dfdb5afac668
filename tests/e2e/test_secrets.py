"""No secret is written down: not in a log, not in a database, not on a topic."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from typing import Any

import asyncpg
import httpx2
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

import services
from databases import SERVICES
from demo.api import Api
from e2e.outside import PATIENCE_S, until
from runtime.kafka import Kafka
from stack import Stack

pytestmark = pytest.mark.slow

WRONG_KEY = "hsb_" + "canary-of-a-key-that-nobody-was-given-00000"
"""Well-formed, unknown: what a caller sends by mistake is a secret of somebody's all the same."""


def secrets_of(content: Any, under: str = "") -> Iterator[str]:
    """Return every API key and every database password that stack.json names."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from secrets_of(value, under or (name if name in {"keys", "postgres"} else ""))
    elif under == "keys":
        yield str(content)
    elif under == "postgres":
        password = urllib.parse.urlsplit(str(content)).password
        if password:
            yield urllib.parse.unquote(password)


async def use_secrets(stack: Stack) -> str:
    """Use good keys and bad ones, have one minted, let a server die meanwhile; return the new."""
    async with Api(stack.folder / "stack.json") as api:
        minted = await api.post("ledger", "/v1/keys", "operator", {"role": "auditor"})
        for service in SERVICES:
            await api.get(service, "/v1/status", "auditor")
    killed = stack.kill("postgres")
    async with httpx2.AsyncClient(timeout=PATIENCE_S) as client:
        for service in SERVICES:
            for key in (WRONG_KEY, stack.key("operator")):
                headers = {"authorization": f"Bearer {key}"}
                await client.get(f"{stack.url(service)}/v1/status?key={WRONG_KEY}", headers=headers)
        stack.wait_back("postgres", killed)

        async def statuses() -> set[int]:
            headers = {"authorization": f"Bearer {minted['secret']}"}
            answers = [
                await client.get(f"{stack.url(service)}/v1/status", headers=headers)
                for service in SERVICES
            ]
            return {answer.status_code for answer in answers}

        await until(statuses, lambda seen: seen == {200})
    return str(minted["secret"])


async def tables_of(dsn: str) -> str:
    """Return every row of every table as text."""
    connection = await asyncpg.connect(dsn)
    try:
        names = await connection.fetch(
            "select format('%I.%I', schemaname, tablename) as name from pg_tables"
            " where schemaname not in ('pg_catalog', 'information_schema')"
        )
        rows = [
            str(row["text"])
            for name in names
            for row in await connection.fetch(f"select t::text as text from {name['name']} t")
        ]
    finally:
        await connection.close()
    return "\n".join(rows)


async def records_of(bootstrap: str) -> bytes:
    """Return the keys, values and headers of everything on the topics of the services."""
    kafka = Kafka(bootstrap, client="test", instance="test")
    try:
        topics = {n: c for n, c in (await kafka.topics()).items() if services.is_service_topic(n)}
    finally:
        await kafka.close()
    places = [
        TopicPartition(name, number)
        for name, topic in topics.items()
        for number in range(topic.partitions)
    ]
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    try:
        consumer.assign(places)
        ends = await consumer.end_offsets(places)
        seen: list[bytes] = []
        while any([await consumer.position(place) < ends[place] for place in places]):
            for records in (await consumer.getmany(timeout_ms=500)).values():
                seen.extend(repr((r.key, r.value, r.headers)).encode() for r in records)
    finally:
        await consumer.stop()
    return b"\n".join(seen)


@pytest.mark.defect("F72")
async def test_no_secret_is_in_a_log_a_table_or_a_topic(own_stack: Stack) -> None:
    """API keys, database passwords and what a stranger tried stay out of all that is kept."""
    minted = await use_secrets(own_stack)
    content = own_stack.content()
    secrets = {minted, WRONG_KEY, *secrets_of(content)}
    # All roles, hubs and tenants have keys; a database password may be empty, a key may not.
    assert len(secrets) > len(content["keys"]["tenant"]) + len(content["keys"]["hub"])

    kept = {
        log.name: log.read_text(errors="replace") for log in (own_stack.folder / "logs").glob("*")
    }
    for service in SERVICES:
        kept[f"database of {service}"] = await tables_of(own_stack.database(service, "owner"))
    kept["topics"] = (await records_of(own_stack.bootstrap_servers)).decode()
    # What was looked through is not empty: a search of nothing finds nothing.
    assert all(kept[f"{service}.log"] for service in SERVICES)
    assert "indus-foundry" in kept["database of ledger"]
    assert "indus-foundry" in kept["topics"]

    found = [
        (name, secret[:8]) for name, text in kept.items() for secret in secrets if secret in text
    ]
    assert found == []
