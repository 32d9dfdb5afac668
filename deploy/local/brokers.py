"""Kafka for the local stack: which one, and how it starts.

Taken from the first that works: the address in `HISAB_STACK_KAFKA`; Apache Kafka 4 in KRaft mode,
on a JVM 17 or later, with jars that Maven resolves once from `pom.xml`; librdkafka's in-memory
broker, which needs no JVM. `HISAB_KAFKA_PROVIDER` (`kraft`, `memory`) insists on one. The in-memory
broker keeps a few MiB per partition and forgets the rest: it proves nothing about durability,
rebalance or retention, and says so. `HISAB_KAFKA_JVM` is options for the JVM, separated by spaces:
a broker that lives for a minute is ready sooner, and costs half, with `-XX:TieredStopAtLevel=1`.

With `HISAB_STACK=docker` it is Apache Kafka in a container (see `containers.py`), unless an address
is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

import containers
from children import Program, first_line_of
from containers import Container

POM: Final = Path(__file__).with_name("pom.xml")
OLDEST_JAVA: Final = 17
PARTITIONS: Final = 4
_SETTINGS: Final[Mapping[str, object]] = {
    "process.roles": "broker,controller",
    "node.id": 1,
    "controller.listener.names": "CONTROLLER",
    "num.partitions": PARTITIONS,
    "auto.create.topics.enable": "false",
    "default.replication.factor": 1,
    "min.insync.replicas": 1,
    "offsets.topic.num.partitions": 4,
    "offsets.topic.replication.factor": 1,
    "transaction.state.log.num.partitions": 4,
    "transaction.state.log.replication.factor": 1,
    "transaction.state.log.min.isr": 1,
    "group.initial.rebalance.delay.ms": 0,
    # Nothing is ever deleted by age: a replayed trace carries last year's timestamps.
    "log.retention.ms": -1,
    "log.cleaner.dedupe.buffer.size": 16 * 1024 * 1024,
    "num.network.threads": 2,
    "num.io.threads": 4,
}
"""Of one node that is broker and controller, wherever it runs."""

_COPY_GOAL: Final = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
_MAVEN_PATIENCE_S: Final = 600
_ANSWER_PATIENCE_S: Final = 60


@dataclass(frozen=True, slots=True)
class Broker:
    """Where Kafka is, and what kind it is."""

    provider: str
    """`kraft`, `memory`, `docker` or `environment`."""
    bootstrap_servers: str


def find_java() -> Path | None:
    """Return a JVM of version 17 or later, or None."""
    home = os.environ.get("JAVA_HOME")
    named = None if home is None else shutil.which("java", path=str(Path(home, "bin")))
    java = named or shutil.which("java")
    if java is None:
        return None
    answer = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    match = re.search(r'version "(\d+)', answer.stderr)
    return Path(java) if match is not None and int(match[1]) >= OLDEST_JAVA else None


def jars_folder(cache: Path) -> Path:
    """Return where the jars of this `pom.xml` are kept."""
    return cache / f"kafka-{hashlib.sha256(POM.read_bytes()).hexdigest()[:12]}"


def resolve_jars(cache: Path) -> Path | str:
    """Return the folder of Kafka's jars, asking Maven once; or why they cannot be had."""
    folder = jars_folder(cache)
    if folder.is_dir():
        return folder
    maven = shutil.which("mvn")
    if maven is None:
        return "Maven (mvn) is not installed"
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "kafka.lock"):
        if folder.is_dir():  # Another stack resolved them while this one waited for the lock.
            return folder
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [maven, "-q", "-B", "-f", str(POM), _COPY_GOAL, "-DincludeScope=runtime"]
        command.append(f"-DoutputDirectory={unfinished}")
        if not os.access(Path.home(), os.W_OK):
            command.append(f"-Dmaven.repo.local={cache / 'm2'}")
        try:
            answer = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=_MAVEN_PATIENCE_S
            )
        except subprocess.TimeoutExpired:
            return f"Maven did not resolve the jars within {_MAVEN_PATIENCE_S} s"
        if answer.returncode != 0:
            lines = (answer.stdout + answer.stderr).strip().splitlines()
            return f"Maven could not resolve the jars: {lines[0] if lines else answer.returncode}"
        # Only a whole folder gets the final name: a Maven that was killed leaves nothing to trust.
        unfinished.rename(folder)
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock: two stacks that start at once ask Maven once."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare_kraft(
    java: Path, jars: Path, data: Path, logs: Path, env: Mapping[str, str], ports: Iterator[int]
) -> tuple[Program, Broker]:
    """Lay out a single-node cluster under `data` and return the program that serves it.

    A log folder is formatted by its `meta.properties` alone (the broker then begins at its own
    latest metadata version), which saves the second JVM that Kafka's StorageTool would need.
    """
    home = data / "kafka"
    log = home / "log"
    log.mkdir(parents=True, mode=0o700)
    cluster_id, directory_id = _new_kafka_id(), _new_kafka_id()
    (log / "meta.properties").write_text(
        f"version=1\ncluster.id={cluster_id}\nnode.id=1\ndirectory.id={directory_id}\n"
    )
    port, controller_port = next(ports), next(ports)
    properties = home / "server.properties"
    properties.write_text(_properties(log, port, controller_port))
    broker = Broker("kraft", f"127.0.0.1:{port}")

    async def is_ready() -> bool:
        return await first_line_of(port, b"") is not None and await is_answering(broker)

    program = Program(
        name="kafka",
        argv=(
            str(java),
            "-Xmx512m",
            "-XX:+UseSerialGC",
            *env.get("HISAB_KAFKA_JVM", "").split(),
            "-cp",
            f"{jars}/*",
            "kafka.Kafka",
            str(properties),
        ),
        log=logs / "kafka.log",
        env=env,
        cwd=home,
        is_ready=is_ready,
    )
    return program, broker


def _new_kafka_id() -> str:
    """Return a fresh id of a cluster or folder: 16 bytes in base64, not beginning with a dash."""
    return f"h{secrets.token_urlsafe(16)[1:21]}A"


def _properties(log: Path, port: int, controller_port: int) -> str:
    """Write the configuration of one node that is broker and controller."""
    settings = {
        **_SETTINGS,
        "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        "listeners": f"CLIENT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": f"CLIENT://127.0.0.1:{port}",
        "listener.security.protocol.map": "CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "CLIENT",
        "log.dirs": log,
    }
    return "".join(f"{name}={value}\n" for name, value in settings.items())


def prepare_contained(
    name: str, image: str, data: Path, logs: Path, env: Mapping[str, str], ports: Iterator[int]
) -> tuple[Program, Broker]:
    """Return the program that stands for a broker in a container.

    The broker speaks to itself by a listener inside: what it advertises to us is nowhere for it.
    """
    port = next(ports)
    log = "/var/lib/kafka/data"
    settings = {
        **_SETTINGS,
        "controller.quorum.voters": "1@localhost:9093",
        "listeners": "INSIDE://localhost:9094,CONTROLLER://localhost:9093,CLIENT://:9092",
        "advertised.listeners": f"INSIDE://localhost:9094,CLIENT://127.0.0.1:{port}",
        "listener.security.protocol.map": "INSIDE:PLAINTEXT,CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "INSIDE",
        "log.dirs": log,
    }
    container = Container(
        name=f"{name}-kafka",
        image=image,
        command=(),
        environment={
            f"KAFKA_{setting.upper().replace('.', '_')}": str(value)
            for setting, value in settings.items()
        },
        ports={"9092": port},
        data=log,
    )
    broker = Broker("docker", f"127.0.0.1:{port}")

    async def is_ready() -> bool:
        return await first_line_of(port, b"") is not None and await is_answering(broker)

    return containers.program(container, data, logs, env, is_ready), broker


def prepare_memory(data: Path, logs: Path, env: Mapping[str, str]) -> tuple[Program, Path]:
    """Return the program of the in-memory broker, and the file it will write its address to."""
    address_file = data / "kafka-address"

    async def is_ready() -> bool:
        return address_file.exists()

    program = Program(
        name="kafka",
        argv=(sys.executable, str(Path(__file__).with_name("mock_broker.py")), str(address_file)),
        log=logs / "kafka.log",
        env=env,
        cwd=data,
        is_ready=is_ready,
        restarts=False,
    )
    return program, address_file


async def topic_names(broker: Broker) -> set[str]:
    """Return the names of the topics that exist."""
    client = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    await client.start()
    try:
        return set(await client.list_topics())
    finally:
        await client.close()


async def delete_topics(broker: Broker, topics: set[str]) -> None:
    """Delete topics from a broker that outlives the stack."""
    client = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    await client.start()
    try:
        await client.delete_topics(sorted(topics))
    finally:
        await client.close()


async def is_answering(broker: Broker) -> bool:
    """Say whether the broker answers a metadata request."""
    # aiokafka logs each refused connection as an error; while a broker starts they are expected.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    try:
        await asyncio.wait_for(topic_names(broker), _ANSWER_PATIENCE_S)
    except (KafkaError, OSError, TimeoutError):
        return False
    return True
