"""Runs `deploy/compose.yaml` where no engine is: each container as the process that it would run.

What is kept to the letter: the variables (the file's, the image's, and no other), the commands and
entry points, the order, the health checks, PostgreSQL's init scripts, Kafka's settings. What an
engine would give and a process cannot have is mapped: names of hosts become the loopback, ports
become free ones, and mounted paths become the files that are mounted.

A service that ends is a failure here, with the end of its log: an engine would start it again and
again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import brokers
import children
import databases
from children import Program
from compose_file import (
    DEPLOY,
    ROOT,
    ComposeService,
    health_command,
    last_stage,
    read_dockerfile,
    read_variables,
    services,
    set_by,
)

PATIENCE_S = 600
STOP_PATIENCE_S = 60
_POSTGRES_PORT = 5432
_SERVICE_PORT = 8080
_SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass
class ComposeProcesses:
    """The containers of a compose file as processes; `up` as often as its user says so."""

    folder: Path
    """A copy of `deploy/`, where the first steps write `.env`."""
    data: Path
    jars: Path
    java: Path
    _free_ports: Iterator[int] = field(default_factory=lambda: children.free_ports(os.getpid()))
    _ports: dict[tuple[str, int], int] = field(default_factory=dict)
    _running: dict[str, tuple[ComposeService, Program, asyncio.subprocess.Process]] = field(
        default_factory=dict
    )

    async def up(self) -> None:
        """Start what does not run, or runs with other variables than `.env` says by now."""
        composed = services(self.folder, read_variables(self.folder / ".env"))
        self._choose_ports(composed)
        for service in composed:
            if service.name in self._running:
                before, program, process = self._running[service.name]
                if before == service:
                    continue
                await children.stop(process, program.stop_signal, STOP_PATIENCE_S)
            program = await self._program_of(service)
            process = await children.spawn(program)
            self._running[service.name] = (service, program, process)
            await children.wait_ready(program, process, PATIENCE_S)
            if service.name == "postgres":
                await self._run_init_scripts(service)
        self.refuse_ended()

    async def down(self) -> None:
        """Stop everything, what was started last first."""
        for _, program, process in reversed(self._running.values()):
            await children.stop(process, program.stop_signal, STOP_PATIENCE_S)

    def refuse_ended(self) -> None:
        """Fail when a process has ended: in a container it would be a crash loop."""
        for name, (_, program, process) in self._running.items():
            if process.returncode is not None:
                tail = children.log_tail(program.log)
                raise AssertionError(f"{name} ended with {process.returncode}:\n{tail}")

    def log_of(self, name: str) -> str:
        """Return all that a process has written, over all its starts."""
        return self._running[name][1].log.read_text(errors="replace")

    def url(self, name: str) -> str:
        """Return where a service answers."""
        return f"http://127.0.0.1:{self._ports[name, _SERVICE_PORT]}"

    def mapped(self, text: str) -> str:
        """Return commands for a shell on the host, with the published ports of this run."""
        for service, _, _ in self._running.values():
            for here, inside in service.ports.items():
                real = self._ports[service.name, inside]
                text = text.replace(f"127.0.0.1:{here}", f"127.0.0.1:{real}")
        return text

    def _choose_ports(self, composed: Sequence[ComposeService]) -> None:
        """Give every port inside a container one of this machine, for as long as the run lasts."""
        for service in composed:
            listening = (
                {_POSTGRES_PORT} if service.name == "postgres" else set(service.ports.values())
            )
            for value in service.environment.values() if service.name == "kafka" else ():
                listening |= {int(port) for port in re.findall(r":(\d{4})\b", value)}
            for port in sorted(listening):
                if (service.name, port) not in self._ports:
                    self._ports[service.name, port] = next(self._free_ports)

    def _outside(self, value: str) -> str:
        """Replace the names of containers, where a value names a host, by the loopback."""
        for (name, port), real in self._ports.items():
            given = f":{port}" if name != "postgres" else f"(?::{port})?"
            host = rf"(?:(?<=//)|(?<=@)|(?<=,)|^){name}{given}(?=[/,]|$)"
            value = re.sub(host, f"127.0.0.1:{real}", value)
        return value

    async def _program_of(self, service: ComposeService) -> Program:
        match service.name:
            case "postgres":
                return await self._postgres(service)
            case "kafka":
                return self._kafka(service)
            case _:
                return self._service(service)

    async def _postgres(self, service: ComposeService) -> Program:
        """Do as the image does on an empty volume: make a cluster, then run the command on it."""
        account = children.unprivileged_account()
        home = self.data / "postgres"
        home.mkdir()
        binaries = await databases.install_for(
            account, databases.find_binaries(None), home / "installation"
        )
        password = home / "password"
        password.write_text(service.environment["POSTGRES_PASSWORD"])
        cluster = home / "cluster"
        if account is not None:
            for path in (home, password):
                os.chown(path, account.uid, account.gid)
        environment = {"PATH": f"{binaries.bin}:{_SYSTEM_PATH}", "LC_ALL": "C.UTF-8"}

        def program(name: str, argv: Sequence[str]) -> Program:
            return Program(
                name=name,
                argv=argv,
                log=self.data / f"{name}.log",
                env=environment,
                cwd=home,
                is_ready=None if name == "initdb" else self._healthy(service, environment),
                stop_signal=signal.SIGINT,
                account=account,
            )

        initdb = (
            *(str(binaries.bin / "initdb"), f"--username={service.environment['POSTGRES_USER']}"),
            *(f"--pwfile={password}", f"--pgdata={cluster}"),
            # As in the image: the socket is trusted, whoever comes by TCP shows a password.
            *("--auth-local=trust", "--auth-host=scram-sha-256", "--no-sync"),
            *service.environment.get("POSTGRES_INITDB_ARGS", "").split(),
        )
        await children.run_to_end(program("initdb", initdb))
        mapped = ("-D", str(cluster), "-k", str(home), "-p", str(self._ports["postgres", 5432]))
        return program(
            "postgres", (str(binaries.bin / service.command[0]), *mapped, *service.command[1:])
        )

    async def _run_init_scripts(self, service: ComposeService) -> None:
        """Run what is mounted for the image to run once, over the server's socket."""
        if (self.data / "initialised").exists():
            return
        for where, script in service.mounts.items():
            if not where.startswith("/docker-entrypoint-initdb.d/"):
                continue
            text = script.read_text(encoding="utf-8")
            for inside, here in service.mounts.items():
                text = text.replace(inside, str(here))
            copy = self.data / script.name
            copy.write_text(text, encoding="utf-8")
            copy.chmod(0o755)
            await children.run_to_end(
                Program(
                    name=script.name,
                    argv=(str(copy),),
                    log=self.data / f"{script.name}.log",
                    env={
                        **service.environment,
                        "PATH": f"{databases.find_binaries(None).bin}:{_SYSTEM_PATH}",
                        "PGHOST": str(self.data / "postgres"),
                        "PGPORT": str(self._ports["postgres", _POSTGRES_PORT]),
                    },
                    cwd=self.data,
                )
            )
        (self.data / "initialised").touch()

    def _kafka(self, service: ComposeService) -> Program:
        """Do as the image does: each variable KAFKA_A_B is the broker's setting a.b."""
        own = {port: real for (name, port), real in self._ports.items() if name == "kafka"}
        settings = {
            name.removeprefix("KAFKA_").lower().replace("_", "."): value
            for name, value in service.environment.items()
        }
        log = self.data / "kafka-log"
        settings["log.dirs"] = str(log)
        for name in ("listeners", "advertised.listeners", "controller.quorum.voters"):
            value = (
                settings[name].replace("//:", "//127.0.0.1:").replace("//kafka:", "//127.0.0.1:")
            )
            settings[name] = re.sub(r":(\d+)(?=,|$)", lambda m: f":{own[int(m[1])]}", value)
        log.mkdir()
        (log / "meta.properties").write_text(
            f"version=1\ncluster.id=h{secrets.token_hex(10)}A\nnode.id={settings['node.id']}\n"
        )
        properties = self.data / "server.properties"
        properties.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        broker = brokers.Broker("kraft", self._outside("kafka:9092"))

        async def is_ready() -> bool:
            # The image's own health check is a script of Kafka's; it asks the same question.
            return await brokers.is_answering(broker)

        java = (str(self.java), "-Xmx512m", "-XX:+UseSerialGC", "-cp", f"{self.jars}/*")
        return Program(
            name="kafka",
            argv=(*java, "kafka.Kafka", str(properties)),
            log=self.data / "kafka.log",
            env={"PATH": _SYSTEM_PATH},
            cwd=self.data,
            is_ready=is_ready,
        )

    def _service(self, service: ComposeService) -> Program:
        """Run the entry point with the image's variables under the file's, and nothing else."""
        image = last_stage(read_dockerfile((DEPLOY / "Dockerfile").read_text(encoding="utf-8")))
        programs = self.data / "bin" / service.name
        programs.mkdir(parents=True, exist_ok=True)
        for name, what in (("service", f"-m {service.name} "), ("python", "")):
            # `service` is what the Dockerfile prints; the interpreter is this environment's.
            (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {what}"$@"\n')
            (programs / name).chmod(0o755)
        environment = set_by(image) | {
            name: self._outside(value) for name, value in service.environment.items()
        }
        environment["PATH"] = f"{programs}:{_SYSTEM_PATH}"
        assert environment["HISAB_HTTP_PORT"] == str(_SERVICE_PORT)
        port = self._ports[service.name, _SERVICE_PORT]
        environment |= {"HISAB_HTTP_PORT": str(port), "HISAB_HTTP_HOST": "127.0.0.1"}
        check = [
            word.replace(f"127.0.0.1:{_SERVICE_PORT}", f"127.0.0.1:{port}")
            for word in health_command(image)
        ]
        return Program(
            name=service.name,
            argv=tuple(service.entrypoint),
            log=self.data / f"{service.name}.log",
            env=environment,
            cwd=ROOT,
            is_ready=lambda: self._succeeds(check, environment),
        )

    def _healthy(self, service: ComposeService, environment: Mapping[str, str]) -> children.IsReady:
        """Return the health check of a service: its command, told the port of this run."""
        port = {"PGPORT": str(self._ports["postgres", _POSTGRES_PORT])}
        return lambda: self._succeeds(service.healthcheck[1:], {**environment, **port})

    async def _succeeds(self, command: Sequence[str], environment: Mapping[str, str]) -> bool:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=dict(environment),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        return await process.wait() == 0


@contextlib.asynccontextmanager
async def composed(folder: Path, java: Path, jars: Path) -> AsyncIterator[ComposeProcesses]:
    """Give a compose file's processes a data folder, and end them with the block."""
    data = children.make_data_folder(children.unprivileged_account())
    processes = ComposeProcesses(folder, data, jars, java)
    try:
        yield processes
    finally:
        await processes.down()
        shutil.rmtree(data, ignore_errors=True)
