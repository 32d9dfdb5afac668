"""The long-lived process of a stack: starts everything, brings back what dies, ends all together.

`stack.py up` starts it, in a session of its own and with none of its caller's file descriptors:

    supervisor.py --dir FOLDER [--infrastructure] --started-by PID [--ends-with PID]

It ends on SIGTERM or SIGINT, with the process that `--ends-with` names, with its caller as long as
the stack is not ready, or when something cannot be brought back. A process that dies is started
again after a moment, every time. A file `FOLDER/stopped/<name>` keeps that process down for as long
as it exists (`stack.py stop`, `start`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import brokers
import children
import containers
import databases
import description
import services
import sweeper
from children import Program, StackError
from hisab_contracts.reference import Role
from seeder import Seeder, SeedingFailed

_READY_PATIENCE_S: Final = 600
_STOP_PATIENCE_S: Final = 60
_TICK_S: Final = 0.2
_PAUSE_BEFORE_RESTART_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Settings:
    """What a stack shall be, from the command line and the environment."""

    stack_id: str
    folder: Path
    """Where stack.json and the logs are."""
    infrastructure_only: bool
    started_by: description.Process
    ends_with: description.Process | None
    kafka_address: str | None
    kafka_provider: str | None
    postgres_address: str | None
    postgres_provider: str | None
    cache: Path
    env: Mapping[str, str]
    """The environment of every child."""

    @property
    def in_containers(self) -> bool:
        """Whether what the services stand on shall run in containers."""
        return self.env.get("HISAB_STACK") == "docker"

    @property
    def container_name(self) -> str:
        """How the names of this stack's containers begin."""
        return f"{sweeper.CONTAINERS}{self.stack_id}"


class Supervisor:
    """Holds the running processes of one stack and its description."""

    def __init__(self, settings: Settings, data: Path) -> None:
        self._settings = settings
        self._data = data
        self._logs = settings.folder / "logs"
        self._ports = children.free_ports(os.getpid())
        self._pids: dict[str, int | None] = {}
        self._content: dict[str, Any] | None = None
        self._stopping = asyncio.Event()
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._given_kafka: brokers.Broker | None = None
        self._given_postgres: databases.Server | None = None

    def stop(self) -> None:
        """Begin the end of the stack."""
        self._stopping.set()

    async def run(self) -> None:
        """Start the stack, stay until `stop` or a signal, and end it."""
        watch = asyncio.create_task(self._watch_companion())
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                await self._stopping.wait()
        finally:
            self._stopping.set()
            for task in (starting, watch):
                task.cancel()
            await asyncio.gather(starting, watch, stopping, return_exceptions=True)
            say("stopping")
            await asyncio.gather(*self._keepers.values(), return_exceptions=True)
            await self._clean_given()

    async def _watch_companion(self) -> None:
        """Stop when a process ends that this stack ends with."""
        # By polling: neither is a child of this process, so nobody reports its end.
        starter, companion = self._settings.started_by, self._settings.ends_with
        while not self._stopping.is_set():
            for process in (companion, starter if self._content is None else None):
                if process is not None and not process.alive():
                    say(f"process {process.pid} ended, and the stack ends with it")
                    self.stop()
            await asyncio.sleep(_TICK_S)

    async def _start(self) -> None:
        """Start all parts at once; when one cannot start, the others are given up too."""
        async with asyncio.TaskGroup() as group:
            kafka = group.create_task(self._start_kafka())
            postgres = group.create_task(self._start_postgres())
            if not self._settings.infrastructure_only:
                group.create_task(self._start_services(group, kafka, postgres))
        if self._settings.infrastructure_only:
            with self._blaming("postgres"):
                await databases.create_roles(postgres.result())
            await self._describe(kafka.result(), postgres.result(), {}, None)
        say("ready")

    async def _start_services(
        self,
        group: asyncio.TaskGroup,
        kafka: asyncio.Task[brokers.Broker],
        postgres: asyncio.Task[databases.Server],
    ) -> None:
        """Bring up the services: all need their schema and the broker; invoicing a finance key.

        The ledger comes first, because it makes the key that invoicing commands it with; metering
        starts beside it.
        """
        server = await postgres
        with self._blaming("postgres"):
            await databases.create_databases(server)
        plan = services.Plan.new(server, self._settings.env, self._logs, self._ports)
        migrations = [
            group.create_task(children.run_to_end(plan.migration(service)))
            for service in databases.SERVICES
        ]
        # A failed migration is raised by the group; here it only matters that all have ended.
        await asyncio.wait(migrations)
        say("schemas migrated")
        broker = await kafka
        with self._blaming("kafka"):
            await self._refuse_leftovers(broker)
        operator = services.new_secret()
        urls = plan.urls()
        metering = group.create_task(self._run(plan.metering(broker)))
        await self._run(plan.ledger(broker, operator))
        say(f"ledger: {urls['ledger']}")
        try:
            async with Seeder.at(urls, operator) as seeder:
                finance = await seeder.make_key({"role": Role.FINANCE}, "invoicing")
                invoicing = group.create_task(self._run(plan.invoicing(broker, finance)))
                await metering
                say(f"metering: {urls['metering']}")
                keys = await seeder.seed_metering_and_ledger()
                await invoicing
                say(f"invoicing: {urls['invoicing']}")
                await seeder.seed_invoicing()
                await seeder.wait_until_keys_work(keys)
        except SeedingFailed as failure:
            raise self._failure_of(failure.service, failure) from failure
        await self._describe(broker, server, urls, keys)

    @contextlib.contextmanager
    def _blaming(self, part: str) -> Iterator[None]:
        """Say of an error which part of the stack did not do what it was asked."""
        try:
            yield
        except StackError:
            raise
        except Exception as error:
            raise self._failure_of(part, error) from error

    def _failure_of(self, part: str, error: Exception) -> StackError:
        """Name the part that failed; with the end of its log, where the stack runs it."""
        log = self._logs / f"{part}.log"
        tail = f":\n{children.log_tail(log)}" if log.exists() else ""
        return StackError(f"{part} failed: {str(error) or repr(error)}{tail}")

    async def _start_kafka(self) -> brokers.Broker:
        settings = self._settings
        wanted = settings.kafka_provider
        if settings.kafka_address is not None:
            broker = self._given_kafka = brokers.Broker("environment", settings.kafka_address)
            if not await brokers.is_answering(broker):
                raise StackError(f"no Kafka broker answers at {settings.kafka_address}")
            say(f"kafka: environment, {broker.bootstrap_servers}")
            return broker
        if settings.in_containers:
            image = settings.env.get("HISAB_KAFKA_IMAGE", containers.KAFKA_IMAGE)
            await asyncio.to_thread(containers.require, image)
            program, broker = brokers.prepare_contained(
                settings.container_name, image, self._data, self._logs, settings.env, self._ports
            )
            await self._run(program)
            say(f"kafka: docker ({image}), {broker.bootstrap_servers}")
            return broker
        java = None if wanted == "memory" else brokers.find_java()
        why = "no JVM 17 or later"
        if java is not None:
            if not brokers.jars_folder(settings.cache).is_dir():
                say("kafka: Maven resolves the jars of Apache Kafka (once)")
            jars = await asyncio.to_thread(brokers.resolve_jars, settings.cache)
            if isinstance(jars, Path):
                program, broker = brokers.prepare_kraft(
                    java, jars, self._data, self._logs, settings.env, self._ports
                )
                await self._run(program)
                say(f"kafka: kraft, {broker.bootstrap_servers}")
                return broker
            why = jars
        if wanted == "kraft":
            raise StackError(f"Apache Kafka was asked for: {why}")
        program, address_file = brokers.prepare_memory(self._data, self._logs, settings.env)
        await self._run(program)
        broker = brokers.Broker("memory", address_file.read_text())
        reason = "asked for" if wanted == "memory" else why
        say(f"kafka: memory ({reason}), {broker.bootstrap_servers}: no durability, no retention")
        return broker

    async def _start_postgres(self) -> databases.Server:
        settings = self._settings
        if settings.postgres_address is not None:
            server = self._given_postgres = databases.describe_given(settings.postgres_address)
            say("postgres: environment")
            return server
        if settings.in_containers:
            image = settings.env.get("HISAB_POSTGRES_IMAGE", containers.POSTGRES_IMAGE)
            await asyncio.to_thread(containers.require, image)
            program, server = databases.prepare_contained(
                settings.container_name, image, self._data, self._logs, settings.env, self._ports
            )
            await self._run(program)
            say(f"postgres: docker ({image})")
            return server
        binaries = databases.find_binaries(settings.postgres_provider)
        account = children.unprivileged_account()
        program, server = await databases.prepare_server(
            binaries, self._data, self._logs, account, settings.env, self._ports
        )
        await self._run(program)
        who = "" if account is None else f", as user {account.name}"
        say(f"postgres: {server.provider}{who}")
        return server

    async def _refuse_leftovers(self, broker: brokers.Broker) -> None:
        """Refuse a given broker that already holds topics of ours: a stack starts empty."""
        if self._given_kafka is None:
            return
        found = {
            name for name in await brokers.topic_names(broker) if services.is_service_topic(name)
        }
        if found and self._settings.env.get("HISAB_STACK_RESET") != "1":
            self._given_kafka = None  # Nothing in it is this stack's to delete when it ends.
            raise StackError(
                f"the given Kafka already has {', '.join(sorted(found)[:5])}: a stack starts from "
                f"empty topics. HISAB_STACK_RESET=1 deletes them"
            )
        if found:
            await brokers.delete_topics(broker, found)

    async def _clean_given(self) -> None:
        """Leave a given server as it was found; ours go with their data folder."""
        if self._settings.infrastructure_only:
            return
        try:
            if self._given_kafka is not None:
                names = await brokers.topic_names(self._given_kafka)
                await brokers.delete_topics(
                    self._given_kafka, {name for name in names if services.is_service_topic(name)}
                )
            if self._given_postgres is not None:
                await databases.drop_databases(self._given_postgres)
        except Exception:  # noqa: BLE001  # The stack ends all the same; the log says what is left.
            traceback.print_exc()

    async def _run(self, program: Program) -> None:
        """Start a program, keep it running from now on, and wait until it is ready."""
        process = await children.spawn(program)
        self._pids[program.name] = process.pid
        self._keepers[program.name] = asyncio.create_task(self._keep(program, process))
        await children.wait_ready(program, process, _READY_PATIENCE_S)

    async def _keep(self, program: Program, process: asyncio.subprocess.Process) -> None:
        """Bring a program back whenever it ends, until the stack stops; then stop it."""
        stop_marker = description.stop_marker(self._settings.folder, program.name)
        while not self._stopping.is_set():
            # Not longer than a tick: a stop marker may appear while the process is well.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await process.wait()
            if stop_marker.exists():
                if process.returncode is None:
                    await children.stop(process, program.stop_signal, _STOP_PATIENCE_S)
                    self._set_pid(program.name, None)
                await asyncio.sleep(_TICK_S)
                continue
            if process.returncode is None or self._stopping.is_set():
                continue
            if not program.restarts:
                say(f"{program.name} ended with {process.returncode} and cannot be brought back")
                self.stop()
                continue
            say(f"{program.name} ended with {process.returncode}: starting it again")
            # A program that dies at once must not keep the machine busy with its restarts.
            await asyncio.sleep(_PAUSE_BEFORE_RESTART_S)
            process = await children.spawn(program)
            self._set_pid(program.name, process.pid)
        if program.name not in databases.SERVICES:
            # What the services stand on goes last: they have work to finish and leases to return.
            above = [self._keepers[name] for name in databases.SERVICES if name in self._keepers]
            await asyncio.gather(*above, return_exceptions=True)
        await children.stop(process, program.stop_signal, _STOP_PATIENCE_S)

    def _set_pid(self, name: str, pid: int | None) -> None:
        """Note a process's number, in stack.json too once there is one."""
        self._pids[name] = pid
        content = self._content
        if content is None:
            return
        if name in content["services"]:
            content["services"][name]["pid"] = pid
        else:
            content["infrastructure"][name]["pid"] = pid
        description.write(self._settings.folder, content)

    async def _describe(
        self,
        broker: brokers.Broker,
        server: databases.Server,
        urls: Mapping[str, str],
        keys: Mapping[str, object] | None,
    ) -> None:
        """Write stack.json for the first time: from now on outsiders may use the stack."""
        names = list(urls)
        self._content = {
            "format": 1,
            "stack_id": self._settings.stack_id,
            "dir": str(self._settings.folder),
            "supervisor_pid": os.getpid(),
            "provider": {"kafka": broker.provider, "postgres": server.provider},
            "kafka": {"bootstrap_servers": broker.bootstrap_servers},
            "topics": services.topics_of_outsiders(),
            "services": {n: {"url": urls[n], "pid": self._pids[n]} for n in names},
            "postgres": {
                name: {
                    part: server.dsn(f"{name}_{part}", name)
                    for part in ("reader", "writer", "owner")
                }
                for name in names
            },
            "keys": {} if keys is None else keys,
            "infrastructure": {
                "kafka": {"pid": self._pids.get("kafka")},
                "postgres": {
                    "pid": self._pids.get("postgres"),
                    "admin": server.admin,
                    "passwords": dict(server.passwords),
                },
                "data": str(self._data),
            },
        }
        description.write(self._settings.folder, self._content)


def say(line: str) -> None:
    """Write one line of progress: `stack.py up` shows it, the log keeps it."""
    print(line, flush=True)


def start_sweeper(settings: Settings, data: Path, lock: IO[str]) -> subprocess.Popen[bytes]:
    """Start the process that cleans up whatever becomes of this one; it shares the stack's lock."""
    return subprocess.Popen(
        [
            sys.executable,
            "-S",
            str(Path(sweeper.__file__)),
            settings.stack_id,
            str(settings.folder),
            str(data),
        ],
        stdin=subprocess.PIPE,
        pass_fds=(lock.fileno(),),
        start_new_session=True,
    )


def main() -> int:
    """Run a stack from beginning to end."""
    parser = argparse.ArgumentParser(description="Runs a local stack (see stack.py).")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--infrastructure", action="store_true")
    parser.add_argument("--started-by", type=int, required=True)
    parser.add_argument("--ends-with", type=int)
    arguments = parser.parse_args()
    env = dict(os.environ)
    folder: Path = arguments.dir
    settings = Settings(
        stack_id=env[sweeper.MARK],
        folder=folder,
        infrastructure_only=arguments.infrastructure,
        started_by=_companion(arguments.started_by),
        ends_with=None if arguments.ends_with is None else _companion(arguments.ends_with),
        kafka_address=env.get("HISAB_STACK_KAFKA"),
        kafka_provider=env.get("HISAB_KAFKA_PROVIDER"),
        postgres_address=env.get("HISAB_STACK_POSTGRES"),
        postgres_provider=env.get("HISAB_POSTGRES_PROVIDER"),
        cache=Path(__file__).resolve().parents[2] / ".hisab" / "cache",
        env=env,
    )
    lock = description.take_lock(folder)
    if lock is None:
        say("another stack already runs in this folder")
        return 1
    data = children.make_data_folder(children.unprivileged_account())
    keeper = start_sweeper(settings, data, lock)
    try:
        return asyncio.run(_run(settings, data))
    finally:
        lock.close()
        if keeper.stdin is not None:
            keeper.stdin.close()


def _companion(pid: int) -> description.Process:
    """Describe the process to end with; one that is gone already counts as ended."""
    return description.process_of(pid) or description.Process(pid, -1)


async def _run(settings: Settings, data: Path) -> int:
    supervisor = Supervisor(settings, data)
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, supervisor.stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # The stack outlives the terminal of `make up`.
    refused = False
    try:
        await supervisor.run()
    except* StackError as refusals:
        refused = True
        for refusal in dict.fromkeys(map(str, refusals.exceptions)):
            say(f"the stack cannot start: {refusal}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
