"""PostgreSQL and Kafka of the local stack in containers: asked for with `HISAB_STACK=docker`.

Only where an engine answers, and of images that are there or can be pulled; their names are
settings (`HISAB_POSTGRES_IMAGE`, `HISAB_KAFKA_IMAGE`). The stack itself knows programs only: so a
container has a process that stands for it, this file run with a description of the container.
testcontainers starts it there; the process copies the container's log to its own, ends when the
container ends, and stops it when it is told to stop.

Data lies in a named volume, so that what was killed comes back with it. When the stack ends,
however it ends, the sweeper removes what carries the stack's name; the reaper of testcontainers,
which needs an image of its own, is not used.

Refusals: `StackError` when no engine answers, or an image is not there and cannot be pulled.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from children import IsReady, Program, StackError

POSTGRES_IMAGE: Final = "postgres:18-bookworm"
KAFKA_IMAGE: Final = "apache/kafka:4.1.1"
"""The same as in `deploy/compose.yaml`."""

_PULL_PATIENCE_S: Final = 1800
_ANSWER_PATIENCE_S: Final = 120
_STOP_PATIENCE_S: Final = 30


@dataclass(frozen=True, slots=True)
class Container:
    """A container as the engine is asked for it."""

    name: str
    """Begins with the stack's own name: the sweeper finds it by that."""
    image: str
    command: Sequence[str]
    environment: Mapping[str, str]
    ports: Mapping[str, int]
    """Port inside to port of the loopback."""
    data: str
    """Where in the container its named volume is."""


def why_no_engine() -> str | None:
    """Say why no container engine can be used; None when one answers."""
    if shutil.which("docker") is None:
        return "needs a container engine: there is no docker command"
    if not _succeeds("info", _ANSWER_PATIENCE_S):
        return "needs a container engine: docker does not answer"
    return None


def why_no_image(name: str) -> str | None:
    """Say why an image cannot be had; None when it is here, or was pulled now."""
    if _succeeds("image inspect", _ANSWER_PATIENCE_S, name):
        return None
    if _succeeds("pull --quiet", _PULL_PATIENCE_S, name):
        return None
    return f"needs the image {name}, which is not here and cannot be pulled"


def _succeeds(command: str, patience_s: int, *arguments: str) -> bool:
    try:
        done = subprocess.run(
            ["docker", *command.split(), *arguments],
            capture_output=True,
            check=False,
            timeout=patience_s,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def require(image: str) -> None:
    """Raise `StackError` unless an engine answers and has the image, or can pull it."""
    why_not = why_no_engine() or why_no_image(image)
    if why_not is not None:
        raise StackError(f"HISAB_STACK=docker {why_not}")


def program(
    container: Container, data: Path, logs: Path, env: Mapping[str, str], is_ready: IsReady
) -> Program:
    """Return the program that stands for a container."""
    part = container.name.rpartition("-")[2]
    description = data / f"{part}-container.json"
    description.touch(mode=0o600)
    description.write_text(json.dumps(asdict(container)))
    return Program(
        name=part,
        argv=(sys.executable, str(Path(__file__)), str(description)),
        log=logs / f"{part}.log",
        env=dict(env) | {"TESTCONTAINERS_RYUK_DISABLED": "true"},
        cwd=data,
        is_ready=is_ready,
    )


def main() -> int:
    """Run the container that a file describes until it ends or a signal comes."""
    container = Container(**json.loads(Path(sys.argv[1]).read_bytes()))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, _end)
    # Left over where this process was killed with -9: its successor brings it back with its data.
    subprocess.run(["docker", "rm", "--force", container.name], capture_output=True, check=False)
    return _run(container)


def _run(container: Container) -> int:
    """Start the container, copy its log, and return the status it ends with."""
    # Imported by this process only: the supervisor and the sweeper do without.
    from docker.errors import APIError
    from testcontainers.core.container import DockerContainer

    described = DockerContainer(container.image, name=container.name).with_envs(
        **container.environment
    )
    described.with_volume_mapping(f"{container.name}-data", container.data, "rw")
    if container.command:
        described.with_command(list(container.command))
    # Not by `with_bind_ports`, which opens a port to every network this machine is in.
    published: dict[str, Any] = described.ports
    for inside, here in container.ports.items():
        published[f"{inside}/tcp"] = ("127.0.0.1", here)
    try:
        with described as running:
            wrapped = running.get_wrapped_container()
            try:
                for part in wrapped.logs(stream=True, follow=True):
                    os.write(sys.stdout.fileno(), part)
                return int(wrapped.wait()["StatusCode"])
            finally:
                # Gone already, where the sweeper was faster.
                with contextlib.suppress(APIError):
                    wrapped.stop(timeout=_STOP_PATIENCE_S)
    except SystemExit:
        return 0


def _end(_number: int, _frame: object) -> NoReturn:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
