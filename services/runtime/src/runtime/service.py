"""What `python -m <service>` does: `migrate`, `serve`, `openapi`, `override-progress`.

Theory. Migrations are numbered files `NNNN_name.(pre|post).sql`, the kit's own first, forward-only:
each is applied once, in its own transaction, under an advisory lock, with `lock_timeout` 4 s; its
SHA-256 is recorded and edited history is refused. `:service` in a file stands for the service, so
that `:service_writer` names its role.

`serve` runs the HTTP server, the consumers, the relays and the leased tasks in one event loop. On
SIGTERM or SIGINT it stops taking requests, then lets the consumers finish the transaction in
flight, then lets the relays flush what that wrote, each within a deadline, and closes. If a part
ends by itself the process ends non-zero: a supervisor brings it back. Settings come from the
environment, which `__main__` hands over.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import hashlib
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any, Final

import asyncpg
import msgspec
import structlog
import uvicorn
import uvloop
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.requests import Request
from starlette.responses import Response

from hisab_contracts.problems import PROBLEMS
from runtime import database as store
from runtime import telemetry
from runtime.auth import Access
from runtime.database import Database, Limits, pause
from runtime.http import (
    Operation,
    ProblemDocument,
    create_app,
    forget_refusals,
    json_response,
    operation,
)
from runtime.kafka import Kafka, Topic
from runtime.machine import Partition
from runtime.streams import Consumer, Outbox, Relay

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
    hub_partitions: int
    replication: int
    instance: str
    database_api: str = field(repr=False)
    database_writer: str = field(repr=False)
    otlp_endpoint: str | None
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

    router: APIRouter
    topics: Sequence[Topic] = ()
    """The topics it produces; created when missing."""
    consumers: Sequence[Consumer] = ()
    outbox: Outbox | None = None
    """Every topic of it gets a relay."""
    tasks: Sequence[Task] = ()
    status: Callable[[], Awaitable[Status]] | None = None
    start: Callable[[], Awaitable[None]] | None = None
    """Runs once, after the databases are open and before anything is served or read."""


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


class StatusAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `GET /v1/status`."""

    service: str
    version: str
    ready: bool
    lag_records: int
    outbox_depth: int
    complete_until: dict[str, str | None]


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
    for name in ("--accepted-by", "--reason"):
        overriding.add_argument(name, required=True)
    chosen = parser.parse_args(arguments)
    match chosen.command:
        case "migrate":
            owner = _required(environ, "HISAB_DB_OWNER")
            done = uvloop.run(migrate(service, owner, phase=chosen.phase, plan=chosen.plan))
            sys.stdout.writelines(f"{name}\n" for name in done)
        case "serve":
            gc.set_threshold(*GARBAGE_THRESHOLDS)
            return uvloop.run(serve(service, read_settings(service, environ)))
        case "openapi":
            sys.stdout.buffer.write(openapi_document(service))
        case _:
            owner = _required(environ, "HISAB_DB_OWNER")
            partition = Partition(chosen.topic, chosen.partition)
            said = (chosen.next_offset, chosen.accepted_by, chosen.reason)
            uvloop.run(_override(owner, store.Override(partition, *said)))
    return 0


def read_settings(service: Service, environ: Mapping[str, str]) -> Settings:
    """Read the environment; SystemExit names what is missing."""
    return Settings(
        http_host=environ.get("HISAB_HTTP_HOST", "127.0.0.1"),
        http_port=int(_required(environ, "HISAB_HTTP_PORT")),
        kafka=_required(environ, "HISAB_KAFKA"),
        partitions=int(environ.get("HISAB_PARTITIONS", "24")),
        hub_partitions=int(environ.get("HISAB_HUB_PARTITIONS", "12")),
        replication=int(environ.get("HISAB_REPLICATION", "3")),
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


# Migrations.


@dataclass(frozen=True, slots=True)
class Migration:
    """One file: where it comes from, what it says, and the hash that history keeps."""

    origin: str
    name: str
    phase: str
    sql: str
    sha256: str


class EditedHistory(Exception):
    """An applied migration was changed or removed; write a new one instead."""


_FILE_NAME = re.compile(r"(\d{4})_[a-z0-9_]+\.(pre|post)\.sql")


def migrations_of(service: Service) -> tuple[Migration, ...]:
    """Return the kit's files, then the service's, each in the order of their numbers."""
    return (
        *_read_folder("runtime", files("runtime") / "migrations", service.name),
        *_read_folder(service.name, service.migrations, service.name),
    )


def _read_folder(origin: str, folder: Traversable, service: str) -> Iterator[Migration]:
    numbers: set[str] = set()
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if not file.name.endswith(".sql"):
            continue
        match = _FILE_NAME.fullmatch(file.name)
        if match is None or match[1] in numbers:
            raise ValueError(f"{origin}/{file.name}: want a new number, NNNN_name.(pre|post).sql")
        numbers.add(match[1])
        text = file.read_text(encoding="utf-8")
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        yield Migration(origin, file.name, match[2], text.replace(":service", service), sha256)


_MIGRATION_LOCK = "select pg_advisory_lock(hashtextextended('schema_migrations', 0))"
_HISTORY = """
create table if not exists schema_migrations (
  origin     text        not null,
  name       text        not null,
  sha256     text        not null,
  applied_at timestamptz not null default clock_timestamp(),
  primary key (origin, name)
)
"""
_APPLIED = "select origin, name, sha256 from schema_migrations"
_RECORD = "insert into schema_migrations (origin, name, sha256) values ($1, $2, $3)"


async def migrate(
    service: Service, dsn: str, *, phase: str | None = None, plan: bool = False
) -> list[str]:
    """Apply what is missing, as the owner role; returns the names applied (or planned)."""
    known = migrations_of(service)
    connection = await asyncpg.connect(
        dsn, server_settings={"lock_timeout": "4s", "application_name": f"{service.name}-migrate"}
    )
    try:
        await connection.execute(_MIGRATION_LOCK)
        await connection.execute(_HISTORY)
        rows = await connection.fetch(_APPLIED)
        history = {(row["origin"], row["name"]): row["sha256"] for row in rows}
        missing = _missing(known, history, phase)
        if not plan:
            for migration in missing:
                async with connection.transaction():
                    await connection.execute(migration.sql)
                    await connection.execute(
                        _RECORD, migration.origin, migration.name, migration.sha256
                    )
        return [f"{migration.origin}/{migration.name}" for migration in missing]
    finally:
        await connection.close()


def _missing(
    known: Sequence[Migration], history: Mapping[tuple[str, str], str], phase: str | None
) -> list[Migration]:
    hashes = {(migration.origin, migration.name): migration.sha256 for migration in known}
    for applied, sha256 in sorted(history.items()):
        if hashes.get(applied) != sha256:
            raise EditedHistory("/".join(applied))
    return [
        migration
        for migration in known
        if (migration.origin, migration.name) not in history and phase in (None, migration.phase)
    ]


async def _override(dsn: str, override: store.Override) -> None:
    database = Database(dsn, name="override-progress", limits=Limits(max_connections=1))
    await database.open()
    try:
        async with database.transaction() as connection:
            await store.override_progress(connection, override)
    finally:
        await database.close()


# Serving.


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
    return Kit(settings, kafka, api, writer, Access(api))


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
    if parts.start is not None:
        await parts.start()
    app = make_app(service, kit, parts)
    server = _Server(
        uvicorn.Config(
            app,
            host=kit.settings.http_host,
            port=kit.settings.http_port,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=HTTP_STOP_S - 2,
        )
    )
    stop_reading, stop_relaying = asyncio.Event(), asyncio.Event()
    outboxes = () if parts.outbox is None else (parts.outbox,)
    serving = asyncio.create_task(server.serve(), name="http")
    reading = [
        *(_named(f"consumer {part.group}", part.run(stop_reading)) for part in parts.consumers),
        *(
            _named(
                f"task {task.name}",
                kit.writer.run_leased(
                    f"task:{task.name}", task.run, interval_ms=task.interval_ms, stop=stop_reading
                ),
            )
            for task in (*parts.tasks, FORGET_REFUSALS)
        ),
        _named("topics", _make_topics(kit.kafka, parts.topics, stop_reading)),
    ]
    relaying = [
        _named(f"relay {topic}", Relay(outbox, topic, kit.writer, kit.kafka).run(stop_relaying))
        for outbox in outboxes
        for topic in outbox.topics
    ]
    stopping = asyncio.create_task(stop.wait(), name="stop")
    running = [serving, *reading, *relaying]
    await asyncio.wait([stopping, *running], return_when=asyncio.FIRST_COMPLETED)
    failed = _first_ended(running)
    stopping.cancel()
    _log.info("stopping", because=failed or "signal")
    server.should_exit = True
    await _ended([serving], HTTP_STOP_S)
    stop_reading.set()
    await _ended(reading, CONSUMER_STOP_S)
    stop_relaying.set()
    await _ended(relaying, RELAY_STOP_S)
    return 0 if failed is None else 1


_ANSWERS = "select 1"


def make_app(service: Service, kit: Kit, parts: Parts) -> FastAPI:
    """Build the application of a service: its own routes and `GET /v1/status`."""
    router = APIRouter()

    async def ready() -> None:
        async with kit.api.connection() as connection:
            await connection.fetchval(_ANSWERS)

    @router.get("/v1/status", **operation(answer=StatusAnswer))
    async def status(request: Request) -> Response:
        """How far the service is: drained when lag and depth are both 0."""
        await kit.access.authorise(request)
        lag_records = sum([await consumer.lag_records() for consumer in parts.consumers])
        more = await parts.status() if parts.status is not None else Status()
        outbox_depth = more.unpublished
        if parts.outbox is not None:
            async with kit.writer.connection() as connection:
                outbox_depth += await parts.outbox.depth(connection)
        return json_response(
            StatusAnswer(
                service=service.name,
                version=service.version,
                ready=True,
                lag_records=lag_records,
                outbox_depth=outbox_depth,
                complete_until=dict(more.complete_until),
            )
        )

    return create_app(service.name, service.version, (parts.router, router), ready=ready)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: stopping is ours, in the order of the data."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


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
            if not store.is_infrastructure(error):
                raise
            _log.warning("topics not created", error=str(error))
            await pause(stop, RETRY_S)
        else:
            await stop.wait()


# The generated document.


_ALWAYS: Final = ("unauthenticated", "forbidden", "too-many-requests", "internal", "unavailable")
_WITH_BODY: Final = ("bad-request", "too-large", "unsupported-media-type", "malformed")
_WITH_KEY: Final = (
    "idempotency-key-missing",
    "idempotency-key-reused",
    "idempotency-key-in-flight",
)


def openapi_document(service: Service) -> bytes:
    """Return the service's OpenAPI 3.1 document in its committed form (sorted, indented)."""
    nowhere = Settings("", 0, "", 1, 1, 1, "0", "", "", None)
    kit = make_kit(service, nowhere)
    app = make_app(service, kit, service.build(kit))
    said = [
        (route, route.openapi_extra["operation"])
        for route in (context.original_route for context in iter_route_contexts(app.routes))
        if isinstance(route, APIRoute) and route.openapi_extra
    ]
    named = {model for _, one in said for model in (one.answer, one.body) if model is not None}
    models = sorted(named | {ProblemDocument}, key=lambda model: model.__name__)
    found, components = msgspec.json.schema_components(
        models, ref_template="#/components/schemas/{name}"
    )
    schemas = dict(zip(models, found, strict=True))
    paths: dict[str, dict[str, object]] = {}
    for route, one in said:
        for method in sorted(route.methods or ()):
            paths.setdefault(route.path, {})[method.lower()] = _described(route, one, schemas)
    document = {
        "openapi": "3.1.0",
        "info": {"title": service.name, "version": service.version},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }
    encoded = msgspec.json.encode(document, order="sorted")
    return msgspec.json.format(encoded, indent=2) + b"\n"


Schemas = Mapping[type[msgspec.Struct], Mapping[str, object]]


def _described(route: APIRoute, one: Operation, schemas: Schemas) -> dict[str, object]:
    in_path = re.findall(r"\{(\w+)", route.path)
    query = [*one.query, *(("limit", "cursor") if one.paged else ())]
    header = ["Idempotency-Key"] if one.idempotent else []
    codes = {*_ALWAYS, *one.problems}
    codes.update(["not-found"] if in_path else [], ["malformed"] if query else [])
    codes.update(_WITH_BODY if one.body is not None else (), _WITH_KEY if header else ())
    described: dict[str, object] = {
        "operationId": route.name,
        "summary": (route.endpoint.__doc__ or route.name).strip().splitlines()[0],
        "parameters": [
            {"name": name, "in": place, "required": place != "query", "schema": {"type": "string"}}
            for place, names in (("path", in_path), ("query", query), ("header", header))
            for name in names
        ],
        "responses": {
            str(one.status): {"description": "Done", "content": _answer(one, schemas)},
            **_refusals(sorted(codes), schemas),
        },
    }
    if one.body is not None:
        content = {"application/json": {"schema": schemas[one.body]}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _answer(one: Operation, schemas: Schemas) -> dict[str, object]:
    if one.answer is None:
        return {}
    schema = schemas[one.answer]
    if one.paged:
        members = {
            "items": {"type": "array", "items": schema},
            "next": {"type": ["string", "null"]},
        }
        schema = {"type": "object", "properties": members, "required": sorted(members)}
    return {"application/json": {"schema": schema}}


def _refusals(codes: Sequence[str], schemas: Schemas) -> dict[str, object]:
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(PROBLEMS[code].status, []).append(code)
    content = {"application/problem+json": {"schema": schemas[ProblemDocument]}}
    return {
        str(status): {"description": ", ".join(named), "content": content}
        for status, named in by_status.items()
    }
