"""What `python -m <service>` does: `migrate`, `serve`, `openapi`, `override-progress`.

Theory. Migrations are numbered files `NNNN_name.(pre|post).sql`, the kit's own first, forward-only:
each is applied once, in its own transaction, under an advisory lock, with `lock_timeout` 4 s; its
SHA-256 is recorded and edited history is refused. `:service` in a file stands for the service.

`serve` runs the HTTP server, the consumers, the relays and the leased tasks in one event loop. On
SIGTERM or SIGINT it stops taking requests, finishes the transactions in flight, flushes the relays
within a deadline and closes. If a part ends by itself the process ends non-zero: a supervisor brings
it back. Settings come from the environment and are read here only, on behalf of `__main__`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.abc import Traversable

from fastapi import APIRouter

from runtime.auth import Access
from runtime.database import Database
from runtime.kafka import Consumer, Kafka, Topic
from runtime.outbox import Outbox, Relay


@dataclass(frozen=True, slots=True)
class Settings:
    """What every service is told by its environment (see `read_settings`)."""

    http_host: str
    http_port: int
    kafka: str
    partitions: int
    hub_partitions: int
    replication: int
    instance: str
    database_api: str
    database_writer: str
    otlp_endpoint: str | None
    extra: Mapping[str, str] = field(repr=False, default_factory=dict)
    """The service's own variables, by name."""


@dataclass(frozen=True, slots=True)
class Kit:
    """What a service builds itself from."""

    settings: Settings
    kafka: Kafka
    api: Database
    """The pool of the `api` role: row-level security by tenant."""
    writer: Database
    """The pool of the `writer` role: consumers, relays, leased tasks."""
    access: Access


@dataclass(frozen=True, slots=True)
class Task:
    """Work that one process of the service does, again and again, while it holds the lease."""

    name: str
    interval_ms: int
    run: Callable[..., Awaitable[None]]
    """Called with the lease's connection, outside a transaction."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a service is made of; `serve` runs it."""

    router: APIRouter
    topics: Sequence[Topic] = ()
    consumers: Sequence[Consumer] = ()
    relays: Sequence[Relay] = ()
    tasks: Sequence[Task] = ()


@dataclass(frozen=True, slots=True)
class Service:
    """A service as its `__main__` declares it."""

    name: str
    version: str
    migrations: Traversable
    """The folder of its SQL files: `importlib.resources.files("<package>") / "migrations"`."""
    build: Callable[[Kit], Parts]
    """Pure wiring: makes the parts, connects to nothing."""
    extra_settings: Sequence[str] = ()
    """Names of environment variables the service reads beyond the common ones."""


def main(service: Service, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run a command and return the exit status."""
    raise NotImplementedError
