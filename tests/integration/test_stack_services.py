"""The seeded stack: what stack.json promises outsiders, and services that come back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import asyncpg
import httpx2
import pytest

import databases
import seed
import stack as local_stack
from brokers import Broker, topic_names
from databases import SERVICES
from e2e.outside import at, outside_of
from infrastructure import run_apart
from stack import Stack

_PATIENCE_S = 600


@pytest.fixture(scope="module")
def stack_to_break() -> Iterator[Stack]:
    """A stack of this module's own, whose services are killed."""
    with local_stack.running() as running:
        yield running


def test_stack_json_has_the_published_shape(stack: Stack) -> None:
    """Every member that outsiders are promised is there, with all hubs and all twelve tenants."""
    content = stack.content()
    promised = {"format", "supervisor_pid", "provider", "kafka", "topics", "services"}
    assert promised | {"postgres", "keys"} <= set(content)
    assert 1 == content["format"]
    assert {hub: f"hub.{hub}.usage.v1" for hub in seed.HUBS} == content["topics"]["hub"]
    assert set(SERVICES) == set(content["services"])
    assert {"url", "pid"} == set(content["services"]["ledger"])
    assert {"reader", "owner", "writer"} == set(content["postgres"]["ledger"])
    assert {"operator", *seed.STAFF, "hub", "tenant"} == set(content["keys"])
    assert set(seed.TENANTS) == set(content["keys"]["tenant"])


async def test_the_topics_exist(stack: Stack) -> None:
    """Every topic that stack.json names can be produced to when `up` has returned."""
    content = stack.content()
    if content["provider"]["kafka"] == "memory":
        pytest.skip("the in-memory broker makes topics on first use")
    wanted = set(content["topics"]["hub"].values()) | {content["topics"]["entries"]}
    found = await topic_names(Broker("kraft", stack.bootstrap_servers))
    assert set() == wanted - found


@pytest.mark.parametrize("service", SERVICES)
async def test_one_key_works_at_all_three_services(stack: Stack, service: str) -> None:
    """Keys of every role are known everywhere as soon as the stack is ready."""
    keys = [stack.key(role) for role in seed.STAFF]
    keys += [stack.key("hub", "khi"), stack.key("tenant", "crop-watch")]
    async with httpx2.AsyncClient(timeout=_PATIENCE_S, trust_env=False) as client:
        answers = [
            await client.get(
                f"{stack.url(service)}/v1/status", headers={"Authorization": f"Bearer {key}"}
            )
            for key in keys
        ]
    assert [200] * len(keys) == [answer.status_code for answer in answers]


@pytest.mark.parametrize("tenant", ["indus-foundry", "ravi-health"])
async def test_a_seeded_tenant_has_its_limit_and_nothing_else(stack: Stack, tenant: str) -> None:
    """A commercial tenant has credit, a startup none; nobody has grants or charges."""
    async with httpx2.AsyncClient(timeout=_PATIENCE_S, trust_env=False) as client:
        answer = await client.get(
            f"{stack.url('ledger')}/v1/tenants/{tenant}/balance",
            headers={"Authorization": f"Bearer {stack.key('tenant', tenant)}"},
        )
    balance = answer.json()
    limit = 10**15 if tenant == "indus-foundry" else 0
    assert str(limit) == balance["credit_limit_micro"]
    assert str(limit) == balance["available_micro"]
    assert [] == balance["lots"]


@pytest.mark.slow
@pytest.mark.parametrize("service", SERVICES)
async def test_a_killed_service_is_back_by_itself(stack_to_break: Stack, service: str) -> None:
    """Killed with -9, three times in a row, a service runs again and stack.json has its number.

    How soon is a figure of `make demo`, not of a test: it depends on the machine.
    """
    stack = stack_to_break
    for _ in range(3):
        killed = stack.kill(service)
        assert killed != stack.wait_back(service, killed)
        await _answers(f"{stack.url(service)}/readyz")


async def _answers(url: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    async with httpx2.AsyncClient(timeout=_PATIENCE_S, trust_env=False) as client:
        while True:
            try:
                if (await client.get(url)).status_code == httpx2.codes.OK:
                    return
            except httpx2.HTTPError:
                pass
            assert time.monotonic() < deadline, f"{url} did not answer"
            await anyio.sleep(0.1)


@pytest.mark.slow
def test_a_stack_runs_on_the_servers_given_in_the_environment(tmp_path: Path) -> None:
    """Addresses come first: nothing else is started, and the given servers are left as found."""
    with local_stack.running(tmp_path / "given", infrastructure_only=True) as given:
        admin = str(given.content()["infrastructure"]["postgres"]["admin"])
        environment = {
            "HISAB_STACK_KAFKA": given.bootstrap_servers,
            "HISAB_STACK_POSTGRES": admin,
        }
        command = [sys.executable, local_stack.__file__, "up", "--dir", str(tmp_path / "on it")]
        done = subprocess.run(
            command, env=dict(os.environ) | environment, capture_output=True, text=True, check=False
        )
        assert 0 == done.returncode, done.stdout + done.stderr
        stack = Stack(tmp_path / "on it")
        provider = stack.provider
        local_stack.down(stack.folder)
        names = run_apart(database_names(admin))
    assert {"kafka": "environment", "postgres": "environment"} == provider
    assert set() == names & set(SERVICES)


@pytest.mark.slow
async def test_the_stack_runs_on_the_oldest_postgresql_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PostgreSQL 15 is the floor: schemas, roles and seeding work on it as on the newest."""
    found = databases.list_binaries()
    oldest = min(found, key=lambda binaries: binaries.major)
    if oldest.major == found[0].major:
        pytest.skip(f"no older PostgreSQL than {found[0].provider} is here, which all tests use")
    monkeypatch.setenv("HISAB_POSTGRES_PROVIDER", oldest.provider)
    with local_stack.running() as stack:
        assert oldest.provider == stack.provider["postgres"]
        async with outside_of(stack) as outside:
            hub, tenant = await outside.hub(), await outside.tenant("startup", 0)
            await outside.grant(tenant, 10**12)
            await outside.say(outside.usage(hub, "n1", tenant, "job", at("10:00"), at("11:00")))
            balance = await outside.charged(tenant, 840_000_000)
    assert "840000000" == balance["funded_micro"]


async def database_names(admin: str) -> set[str]:
    """Return the databases of a server."""
    connection = await asyncpg.connect(admin)
    try:
        return {row["datname"] for row in await connection.fetch("select datname from pg_database")}
    finally:
        await connection.close()
