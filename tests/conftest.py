"""What every test may ask for: a real broker and database server, a whole stack, fresh databases.

Everything starts when the first test asks for it, once per session (per worker under xdist), says
which kind was taken, and ends with the session however that ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import stack as local_stack
from infrastructure import Database, Infrastructure
from stack import Stack

pytest_plugins = ["plugins.defects", "plugins.properties"]

_PROVIDERS = pytest.StashKey[dict[str, list[str]]]()
"""By name of what was started: the kinds that were taken, each once."""


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run asynchronous tests on asyncio, as the services do."""
    return "asyncio"


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the list of what was started, and say how the brokers of the tests are run."""
    config.stash[_PROVIDERS] = {}
    # Dozens of brokers live for a minute or two each: not long enough to be compiled twice.
    os.environ.setdefault("HISAB_KAFKA_JVM", "-XX:TieredStopAtLevel=1")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say which broker and which database server the tests ran on."""
    for name, kinds in sorted(config.stash[_PROVIDERS].items()):
        terminalreporter.write_line(f"{name}: {'; or '.join(kinds)}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand on what a worker started: the process that reports sees nothing else of it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["providers"] = session.config.stash[_PROVIDERS]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take over what a worker started, where tests run in several; one that died says nothing."""
    for name, kinds in getattr(node, "workeroutput", {}).get("providers", {}).items():
        _take(node.config, name, kinds)


def _note(request: pytest.FixtureRequest, name: str, running: Stack) -> None:
    kinds = ", ".join(f"{part} {kind}" for part, kind in running.provider.items())
    _take(request.config, name, [kinds])


def _take(config: pytest.Config, name: str, kinds: list[str]) -> None:
    noted = config.stash[_PROVIDERS].setdefault(name, [])
    noted.extend(kind for kind in kinds if kind not in noted)


@pytest.fixture(scope="session")
def infrastructure(request: pytest.FixtureRequest) -> Iterator[Infrastructure]:
    """Kafka and PostgreSQL with the services' roles, without the services."""
    with local_stack.running(infrastructure_only=True) as running:
        _note(request, "infrastructure", running)
        yield Infrastructure.of(running)


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """The whole stack, seeded, for tests that leave it whole."""
    with local_stack.running() as running:
        _note(request, "stack", running)
        yield running


@pytest.fixture
def own_stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """A seeded stack for one test that breaks things."""
    with local_stack.running() as running:
        _note(request, "own stacks", running)
        yield running


@pytest.fixture(scope="session")
def apache_kafka(infrastructure: Infrastructure) -> Infrastructure:
    """The infrastructure, when its broker is Apache Kafka; otherwise the test is skipped."""
    if infrastructure.kafka_provider == "memory":
        pytest.skip(
            "needs Apache Kafka (a JVM 17 and Maven): the in-memory broker proves nothing here"
        )
    return infrastructure


@pytest.fixture
def migrated(infrastructure: Infrastructure) -> Iterator[Callable[[str], Database]]:
    """Make fresh databases with a service's schema: `migrated("ledger")`; dropped afterwards."""
    made: list[Database] = []

    def make(service: str) -> Database:
        made.append(infrastructure.migrated_database(service))
        return made[-1]

    yield make
    for database in made:
        infrastructure.drop_database(database)


@pytest.fixture
def blank(infrastructure: Infrastructure) -> Iterator[Callable[[str], Database]]:
    """Make empty databases which a service's owner role may migrate; dropped afterwards."""
    made: list[Database] = []

    def make(service: str) -> Database:
        made.append(infrastructure.blank_database(service))
        return made[-1]

    yield make
    for database in made:
        infrastructure.drop_database(database)


@pytest.fixture
def unique(infrastructure: Infrastructure) -> Callable[[str], str]:
    """Make names of topics and groups that no other test uses: `unique("charges")`."""
    return infrastructure.unique
