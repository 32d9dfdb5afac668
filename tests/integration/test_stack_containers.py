"""The local stack on containers, where an engine answers and has, or can pull, the two images."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import httpx2
import pytest

import containers
import stack as local_stack
from brokers import Broker, topic_names
from infrastructure import Infrastructure, run_apart
from stack import Stack

PATIENCE_S = 600
IMAGES = {
    "HISAB_POSTGRES_IMAGE": containers.POSTGRES_IMAGE,
    "HISAB_KAFKA_IMAGE": containers.KAFKA_IMAGE,
}


@pytest.fixture(scope="module")
def contained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A whole stack whose broker and database server are containers."""
    why_not = containers.why_no_engine()
    for setting, default in IMAGES.items():
        why_not = why_not or containers.why_no_image(os.environ.get(setting, default))
    if why_not is not None:
        pytest.skip(why_not)
    folder = tmp_path_factory.mktemp("contained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISAB_STACK", "docker")
        with local_stack.running(folder) as running:
            yield running


def named(what: str, stack_id: str) -> list[str]:
    """List containers or volumes that carry the stack's mark."""
    command = ["docker", what, "ls", "--quiet", "--filter", f"name=hisab-{stack_id}"]
    command += ["--all"] if what == "container" else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.slow
async def test_a_stack_on_containers_serves_and_is_seeded(contained: Stack) -> None:
    """stack.json says so; a seeded key opens all three services; the topics are there."""
    assert {"kafka": "docker", "postgres": "docker"} == contained.provider
    async with httpx2.AsyncClient(timeout=PATIENCE_S, trust_env=False) as client:
        headers = {"Authorization": f"Bearer {contained.key('auditor')}"}
        for service in ("metering", "ledger", "invoicing"):
            answer = await client.get(f"{contained.url(service)}/v1/status", headers=headers)
            assert 200 == answer.status_code
    topics = await topic_names(Broker("docker", contained.bootstrap_servers))
    assert "ledger.entries.v1" in topics


@pytest.mark.slow
def test_a_container_whose_process_is_killed_comes_back_with_its_data(contained: Stack) -> None:
    """The database is there again on the same port, with what was committed."""
    infrastructure = Infrastructure.of(contained)
    database = infrastructure.blank_database("ledger")
    killed = contained.kill("postgres")
    assert killed != contained.wait_back("postgres", killed)

    async def ask() -> object:
        connection = await asyncpg.connect(database.owner)
        try:
            return await connection.fetchval("select 1")
        finally:
            await connection.close()

    from e2e.outside import until

    async def answers() -> object:
        try:
            return await ask()
        except (OSError, asyncpg.PostgresError):
            return None

    assert 1 == run_apart(until(answers, lambda found: found == 1))


@pytest.mark.slow
def test_nothing_of_a_stack_on_containers_is_left(contained: Stack) -> None:
    """`down` removes both containers and their volumes."""
    stack_id = contained.content()["stack_id"]
    assert 2 == len(named("container", stack_id))
    local_stack.down(contained.folder)
    assert [] == named("container", stack_id) + named("volume", stack_id)


def test_without_an_engine_the_wish_is_refused_with_its_reason(tmp_path: Path) -> None:
    """Who asks for containers is not given something else without a word."""
    command = [sys.executable, local_stack.__file__, "up", "--dir", str(tmp_path)]
    done = subprocess.run(
        command,
        env=dict(os.environ) | {"HISAB_STACK": "docker", "PATH": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert 1 == done.returncode
    expected = "HISAB_STACK=docker needs a container engine: there is no docker command"
    assert f"the stack cannot start: {expected}\n" in done.stdout
