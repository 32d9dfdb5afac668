"""What a service is made of, and what `python -m <service>` does with it.

Commands: `migrate`, `serve`, `openapi`, `override-progress`, `accept-topic`.

`serve` runs the HTTP server, the consumers, the relays and the leased tasks in one event loop. On
SIGTERM or SIGINT it stops taking requests, then lets the consumers finish the transaction in
flight, then lets the relays flush what that wrote, each within a deadline, and closes. If a part
ends by itself the process ends non-zero: a supervisor brings it back. Settings come from the
environment, which `__main__` hands over.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
import sys
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog
import uvloop
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from runtime import telemetry
from runtime.application import create_app
from runtime.auth import Access, AccessLimits
from runtime.clock import pause
from runtime.consumer import Consumer
from runtime.database import Database, Limits
from runtime.gate import Gate, Gated, Guard
from runtime.http import ANY_KEY, Resource, get, json_response
from runtime.idempotency import forget_refusals
from runtime.kafka import Kafka, Topic
from runtime.looks import SharedLook
from runtime.machine import Partition
from runtime.migrations import migrate
from runtime.openapi import openapi_document
from runtime.outages import is_outage
from runtime.outbox import Outbox, Relay
from runtime.progress import ProgressOverride, accept_topic, override_progress
from runtime.server import Server, ServerLimits

if TYPE_CHECKING:
    from runtime.database import Connection

HTTP_STOP_S: Final = 10
CONSUMER_STOP_S: Final = 30
RELAY_STOP_S: Final = 10
RETRY_S: Final = 1
API_CONNECTIONS: Final = 16
WRITER_CONNECTIONS: Final = 24
GARBAGE_THRESHOLDS: Final = (50_000, 20, 100)  # Batches make many objects and hardly a cycle.

_log = structlog.get_logger("runtime.service")


@dataclass(frozen=True, slots=True)
class Settings:
    """What every service is told by its environment (see `read_settings`)."""

    http_host: str
    http_port: int
    kafka: str
    partitions: int
    """With how many partitions our topics are made; how many they have, the broker says."""
    replication: int
    instance: str
    database_api: str = field(repr=False)
    database_writer: str = field(repr=False)
    otlp_endpoint: str | None
    server: ServerLimits = field(default_factory=ServerLimits)
    access: AccessLimits = field(default_factory=AccessLimits)
    trusted_proxies: str = ""
    extra: Mapping[str, str] = field(repr=False, default_factory=dict)
    """The service's own variables, by name; those that are not set are not here."""


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
    run: Callable[[Connection], Awaitable[None]]
    """Called with the connection that holds the lease, outside a transaction (`transaction_on`)."""


FORGET_REFUSALS: Final = Task("forget-refusals", 3_600_000, forget_refusals)


@dataclass(frozen=True, slots=True)
class Status:
    """What a service adds to `GET /v1/status`."""

    unpublished: int = 0
    """Facts committed and not yet published, beside the outbox."""
    complete_until: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a service is made of; `serve` runs it."""

    resources: Sequence[Resource] = ()
    topics: Sequence[Topic] = ()
    """The topics it produces; created when missing."""
    consumers: Sequence[Consumer] = ()
    outbox: Outbox | None = None
    """Every topic of it gets a relay."""
    tasks: Sequence[Task] = ()
    status: Callable[[], Awaitable[Status]] | None = None
    status_resource: Callable[[Service, Kit, Parts], StatusResource] | None = None
    """`GET /v1/status` where a service says more than all do; else the kit's own."""
    start: Callable[[], Awaitable[None]] | None = None
    """Runs once, after the guard has passed and before anything is served or read."""
    guard: Guard | None = None
    """Finds what was published and is not in the database: then nothing is served (`gate`)."""


@dataclass(frozen=True, slots=True)
class Service:
    """A service as its `__main__` declares it."""

    name: str
    version: str
    migrations: Traversable
    """The folder of its SQL files: `importlib.resources.files("<package>") / "migrations"`."""
    build: Callable[[Kit], Parts]
    """Pure wiring: makes the parts, connects to nothing."""
    roles: Collection[str]
    """The roles that an API key may have; a key of any other role opens nothing."""
    purpose: str = ""
    """A sentence that says what it is for."""
    extra_settings: Sequence[str] = ()
    """Names of environment variables the service reads beyond the common ones."""


class StatusAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `GET /v1/status`."""

    service: str
    version: str
    ready: bool
    lag_records: int
    outbox_depth: int
    blocked_by: list[str]
    """Where an open transaction keeps acknowledged records from being read."""
    complete_until: dict[str, str | None]


NOWHERE: Final = Settings("", 0, "", 1, 1, "0", "", "", None)
"""Settings that connect to nothing: enough to describe a service."""


def main(service: Service, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run a command and return the exit status."""
    parser = argparse.ArgumentParser(prog=service.name)
    commands = parser.add_subparsers(dest="command", required=True)
    migrating = commands.add_parser("migrate", help="bring the schema up to date")
    migrating.add_argument("--phase", choices=("pre", "post"), help="only these files")
    migrating.add_argument("--plan", action="store_true", help="only say what would be applied")
    commands.add_parser("serve", help="run the service until SIGTERM")
    commands.add_parser("openapi", help="print the OpenAPI document")
    overriding = commands.add_parser(
        "override-progress", help="accept, on the record, to read a partition from an offset"
    )
    for name, kind in (("topic", str), ("partition", int), ("next_offset", int)):
        overriding.add_argument(name, type=kind)
    accepting = commands.add_parser(
        "accept-topic", help="accept, on the record, to read a topic that was made anew"
    )
    accepting.add_argument("topic")
    for name in ("--accepted-by", "--reason"):
        overriding.add_argument(name, required=True)
        accepting.add_argument(name, required=True)
    chosen = parser.parse_args(arguments)
    match chosen.command:
        case "migrate":
            owner = _required(environ, "HISAB_DB_OWNER")
            done = uvloop.run(
                migrate(
                    service.name,
                    service.migrations,
                    owner,
                    phase=chosen.phase,
                    plan=chosen.plan,
                )
            )
            sys.stdout.writelines(f"{name}\n" for name in done)
        case "serve":
            gc.set_threshold(*GARBAGE_THRESHOLDS)
            return uvloop.run(serve(service, read_settings(service, environ)))
        case "openapi":
            kit = make_kit(service, NOWHERE)
            app = make_app(service, kit, service.build(kit))
            sys.stdout.buffer.write(openapi_document(app))
        case "accept-topic":
            return uvloop.run(_accept_topic(_required(environ, "HISAB_DB_OWNER"), chosen))
        case _:
            owner = _required(environ, "HISAB_DB_OWNER")
            override = ProgressOverride(
                Partition(chosen.topic, chosen.partition),
                chosen.next_offset,
                chosen.accepted_by,
                chosen.reason,
            )
            uvloop.run(_override(owner, override))
    return 0


def read_settings(service: Service, environ: Mapping[str, str]) -> Settings:
    """Read the environment; SystemExit names what is missing."""
    return Settings(
        http_host=environ.get("HISAB_HTTP_HOST", "127.0.0.1"),
        http_port=whole_setting(environ, "HISAB_HTTP_PORT"),
        server=ServerLimits(
            **{
                name: whole_setting(environ, f"HISAB_HTTP_{name.upper()}", default)
                for name, default in asdict(ServerLimits()).items()
            }
        ),
        access=AccessLimits(
            **{
                name: whole_setting(environ, f"HISAB_{name.upper()}", default)
                for name, default in asdict(AccessLimits()).items()
            }
        ),
        trusted_proxies=environ.get("HISAB_HTTP_PROXIES", ""),
        kafka=_required(environ, "HISAB_KAFKA"),
        partitions=whole_setting(environ, "HISAB_PARTITIONS", 24),
        replication=whole_setting(environ, "HISAB_REPLICATION", 3),
        instance=environ.get("HISAB_INSTANCE", "0"),
        database_api=_required(environ, "HISAB_DB_API"),
        database_writer=_required(environ, "HISAB_DB_WRITER"),
        otlp_endpoint=environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"),
        extra={name: environ[name] for name in service.extra_settings if name in environ},
    )


def _required(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "")
    if not value:
        raise SystemExit(f"{name} is not set")
    return value


def whole_setting(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Read a number that a setting gives: from 1 to 1 000 000; `SystemExit` says what is wrong."""
    text = _required(environ, name) if default is None else environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) <= 7 and 1 <= int(text) <= 1_000_000):
        raise SystemExit(f"{name} is a whole number from 1 to 1000000, got {text[:40]!r}")
    return int(text)


async def _override(dsn: str, override: ProgressOverride) -> None:
    database = Database(dsn, name="override-progress", limits=Limits(max_connections=1))
    await database.open()
    try:
        async with database.transaction() as connection:
            await override_progress(connection, override)
    finally:
        await database.close()


async def _accept_topic(dsn: str, chosen: argparse.Namespace) -> int:
    database = Database(dsn, name="accept-topic", limits=Limits(max_connections=1))
    await database.open()
    try:
        async with database.transaction() as connection:
            accepted = await accept_topic(
                connection, chosen.topic, accepted_by=chosen.accepted_by, reason=chosen.reason
            )
    finally:
        await database.close()
    sys.stdout.write(f"{chosen.topic}: {accepted} partitions are read from their first record\n")
    return 0 if accepted else 1


def make_kit(service: Service, settings: Settings) -> Kit:
    """Describe the pools and the cluster; nothing is connected."""

    def pool(dsn: str, role: str, connections: int) -> Database:
        limits = Limits(max_connections=connections)
        return Database(dsn, name=f"{service.name}-{role}", limits=limits)

    api = pool(settings.database_api, "api", API_CONNECTIONS)
    writer = pool(settings.database_writer, "writer", WRITER_CONNECTIONS)
    kafka = Kafka(
        settings.kafka,
        client=service.name,
        instance=settings.instance,
        replication=settings.replication,
    )
    return Kit(settings, kafka, api, writer, Access(api, service.roles, settings.access))


async def serve(service: Service, settings: Settings) -> int:
    """Run the service until SIGTERM or SIGINT; returns 0, or 1 when a part ended by itself."""
    telemetry.configure(service.name, service.version, otlp_endpoint=settings.otlp_endpoint)
    kit = make_kit(service, settings)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await kit.api.open()
        await kit.writer.open()
        return await run_parts(service, kit, service.build(kit), stop)
    finally:
        await kit.kafka.close()
        await kit.api.close()
        await kit.writer.close()


async def run_parts(service: Service, kit: Kit, parts: Parts, stop: asyncio.Event) -> int:
    """Run the parts on an open kit until `stop`, then end them in the order of the data."""
    gate = Gate(parts.guard)
    app = make_app(service, kit, parts, gate)
    settings = kit.settings
    server = Server(
        app,
        settings.http_host,
        settings.http_port,
        limits=settings.server,
        trusted_proxies=settings.trusted_proxies,
        stop_s=HTTP_STOP_S - 2,
    )
    stop_consuming, stop_relaying = asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(server.serve(), name="http")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    opening = _named("gate", gate.open(stop, parts.start or _nothing_first))
    watching = [
        _named("api database", kit.api.until_replaced()),
        _named("writer database", kit.writer.until_replaced()),
    ]
    running = [serving, *watching]
    consuming: list[asyncio.Task[None]] = []
    relaying: list[asyncio.Task[None]] = []
    await asyncio.wait([stopping, opening, *running], return_when=asyncio.FIRST_COMPLETED)
    if opening.done() and opening.exception() is None and not stop.is_set():
        consuming = _consuming(kit, parts, stop_consuming)
        relaying = _relaying(kit, parts, stop_relaying)
        running += [*consuming, *relaying]
        await asyncio.wait([stopping, *running], return_when=asyncio.FIRST_COMPLETED)
    elif opening.done() and opening.exception() is not None:
        running.append(opening)
    failed = _first_ended(running)
    for waiting in (stopping, opening, *watching):
        waiting.cancel()
    await asyncio.gather(stopping, opening, *watching, return_exceptions=True)
    _log.info("stopping", because=failed or "signal")
    # In the order of the data: no new requests, then no new records, then what they wrote is out.
    server.should_exit = True
    await _ended([serving], HTTP_STOP_S)
    stop_consuming.set()
    await _ended(consuming, CONSUMER_STOP_S)
    stop_relaying.set()
    await _ended(relaying, RELAY_STOP_S)
    return 0 if failed is None else 1


async def _nothing_first() -> None:
    """Stand for a service that has nothing to do at start."""


def _consuming(kit: Kit, parts: Parts, stop: asyncio.Event) -> list[asyncio.Task[None]]:
    """Start what reads and what works by itself."""
    return [
        *(_named(f"consumer {part.group}", part.run(stop)) for part in parts.consumers),
        *(
            _named(
                f"task {task.name}",
                kit.writer.run_leased(
                    f"task:{task.name}", task.run, interval_ms=task.interval_ms, stop=stop
                ),
            )
            for task in (*parts.tasks, FORGET_REFUSALS)
        ),
        _named("topics", _make_topics(kit.kafka, parts.topics, stop)),
    ]


def _relaying(kit: Kit, parts: Parts, stop: asyncio.Event) -> list[asyncio.Task[None]]:
    """Start a relay for each topic of the outbox."""
    outboxes = () if parts.outbox is None else (parts.outbox,)
    return [
        _named(f"relay {topic}", Relay(outbox, topic, kit.writer, kit.kafka).run(stop))
        for outbox in outboxes
        for topic in outbox.topics
    ]


def make_app(service: Service, kit: Kit, parts: Parts, gate: Gate | None = None) -> FastAPI:
    """Build the application of a service: its own resources and `GET /v1/status`.

    Without a gate everything is served at once.
    """

    async def ready() -> None:
        if gate is not None and gate.problem is not None:
            raise gate.problem
        await kit.api.ping()

    status_resource = parts.status_resource or StatusResource
    resources = (*parts.resources, status_resource(service, kit, parts))
    app = create_app(service.name, service.version, resources, ready=ready, purpose=service.purpose)
    # Behind the boundary, so that what the gate turns away is measured and traced like the rest.
    if gate is not None:
        app.user_middleware.append(Middleware(Gated, gate=gate))
    return app


class StatusResource(Resource):
    """`/v1/status`: how far the service is. A service may say more in a class of its own."""

    def __init__(self, service: Service, kit: Kit, parts: Parts) -> None:
        """Report on these parts."""
        self._service = service
        self._kit = kit
        self._parts = parts
        self._status: SharedLook[StatusAnswer] = SharedLook(self.look)

    @get("/v1/status", roles=ANY_KEY, answer=StatusAnswer)
    async def status(self, request: Request) -> Response:
        """How far the service is: drained when lag and depth are both 0."""
        await self._kit.access.authorise(request)
        return json_response(await self._status.take())

    async def look(self) -> StatusAnswer:
        """Look how far the service is; one call at a time."""
        parts = self._parts
        lag_records = sum([await consumer.lag_records() for consumer in parts.consumers])
        more = await parts.status() if parts.status is not None else Status()
        outbox_depth = more.unpublished
        if parts.outbox is not None:
            async with self._kit.writer.connection() as connection:
                outbox_depth += await parts.outbox.depth(connection)
        return StatusAnswer(
            service=self._service.name,
            version=self._service.version,
            ready=True,
            lag_records=lag_records,
            outbox_depth=outbox_depth,
            blocked_by=[
                records.explain(partition)
                for consumer in parts.consumers
                for partition, records in sorted(consumer.hidden().items())
            ],
            complete_until=dict(more.complete_until),
        )


def _named(name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    return asyncio.create_task(work, name=name)


def _first_ended(running: Sequence[asyncio.Task[None]]) -> str | None:
    """Return the part that ended by itself, if any, and log why."""
    for task in running:
        if task.done():
            _log.critical("part ended", part=task.get_name(), exc_info=task.exception())
            return task.get_name()
    return None


async def _ended(tasks: Sequence[asyncio.Task[None]], deadline_s: int) -> None:
    """Wait for tasks to end, then cancel what has not."""
    if not tasks:
        return
    _, late = await asyncio.wait(tasks, timeout=deadline_s)
    for task in late:
        _log.error("part did not end in time", part=task.get_name())
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _make_topics(kafka: Kafka, topics: Sequence[Topic], stop: asyncio.Event) -> None:
    """Create the service's topics as soon as the broker can be reached."""
    while not stop.is_set():
        try:
            await kafka.create_topics(topics)
        except Exception as error:
            if not is_outage(error):
                raise
            # Nothing can be published before there are topics; whoever publishes waits as well.
            _log.warning("topics not created", error=str(error))
            await pause(stop, RETRY_S)
        else:
            await stop.wait()
