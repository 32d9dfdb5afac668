"""A real broker and a real database server for tests, and fresh databases made fast.

The fixtures are in `conftest.py`; the types are here, so that a test can name them. A service's
schema is migrated once per session into a template, by the service's own `migrate` command as its
owner role; every test that asks gets a copy of that template, with nothing in it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import asyncpg

from databases import Server
from runtime.outages import is_outage
from stack import Stack

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Database:
    """One database of a service: a DSN for each of its roles, and one of a superuser."""

    name: str
    owner: str
    api: str
    writer: str
    reader: str
    admin: str


@dataclass(frozen=True, slots=True)
class Infrastructure:
    """Kafka and PostgreSQL of this test session."""

    stack: Stack
    bootstrap_servers: str
    server: Server
    kafka_provider: str
    """`kraft`, `memory` or `environment`."""
    _templates: dict[str, str] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @classmethod
    def of(cls, stack: Stack) -> Infrastructure:
        """Read where a running stack has its broker and its server."""
        content = stack.content()
        postgres = content["infrastructure"]["postgres"]
        return cls(
            stack=stack,
            bootstrap_servers=content["kafka"]["bootstrap_servers"],
            server=Server(
                content["provider"]["postgres"], postgres["admin"], postgres["passwords"]
            ),
            kafka_provider=content["provider"]["kafka"],
        )

    def unique(self, stem: str) -> str:
        """Return a name that no other test of this machine uses, for topics, groups, databases."""
        return f"{stem}_{os.getpid()}_{next(self._numbers)}"

    def blank_database(self, service: str) -> Database:
        """Create an empty database that the service's owner role may migrate."""
        return self._create(service, None)

    def migrated_database(self, service: str) -> Database:
        """Create a database with the service's schema and nothing in it."""
        if service not in self._templates:
            template = self.blank_database(service)
            migrate(service, template)
            self._templates[service] = template.name
        return self._create(service, self._templates[service])

    def drop_database(self, database: Database) -> None:
        """Drop a database, whoever is still connected."""
        self._administer(f'drop database if exists "{database.name}" with (force)')

    def _create(self, service: str, template: str | None) -> Database:
        name = self.unique(f"test_{service}")
        copied = "" if template is None else f' template "{template}"'
        self._administer(f'create database "{name}" owner "{service}_owner"{copied}')
        parts = {
            part: self.server.dsn(f"{service}_{part}", name)
            for part in ("owner", "api", "writer", "reader")
        }
        return Database(name=name, admin=_other_database(self.server.admin, name), **parts)

    def _administer(self, command: str) -> None:
        async def run() -> None:
            connection = await asyncpg.connect(self.server.admin, timeout=300)
            try:
                await connection.execute(command)
            finally:
                await connection.close()

        run_apart(run())


def migrate(service: str, database: Database) -> None:
    """Bring a database to a service's schema, as a deployment does it."""
    answer = subprocess.run(
        [sys.executable, "-m", service, "migrate"],
        env=dict(os.environ) | {"HISAB_DB_OWNER": database.owner},
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode != 0:
        raise AssertionError(f"{service} migrate failed:\n{answer.stdout}{answer.stderr}")


async def through_outages(work: Callable[[], Awaitable[_T]]) -> _T:
    """Do as the services do what an outage may stop: again, for as long as it lasts.

    No connection free in time is one, and so is a lock that others hold too long: on a busy machine
    either may happen to any of many who work at once, and nothing was written.
    """
    while True:
        try:
            return await work()
        except Exception as error:
            if not is_outage(error):
                raise
            await asyncio.sleep(0.1)


def run_apart(work: Coroutine[object, object, _T]) -> _T:
    """Run a coroutine to its end in a loop of its own, whatever the calling thread is doing."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def _other_database(dsn: str, name: str) -> str:
    return f"{dsn.rpartition('/')[0]}/{name}"
