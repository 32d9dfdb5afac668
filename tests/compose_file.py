"""What `deploy/compose.yaml` and `deploy/Dockerfile` say, read as the tools read them.

Of the compose file: its services with their variables resolved, the order in which they start, and
the first steps that its opening comment tells a person to take, as the commands that they are. Of
the Dockerfile: what it copies, runs and sets, by stage. Who wants more of either format than these
files use adds it here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
SERVICES = ("metering", "ledger", "invoicing")
PYTHON = sys.executable

_CODE = "#        "
_STEP = re.compile(r"#   \d+\. ")
_VARIABLE = re.compile(r"\$(?:\$|\{([A-Z_]+)(?::(-|\?)([^}]*))?\})")


class Unset(Exception):
    """A variable that must be set is not: the tool stops before it starts anything."""


@dataclass(frozen=True, slots=True)
class ComposeService:
    """One service of the file; what it does not say is empty."""

    name: str
    environment: Mapping[str, str]
    command: list[str]
    entrypoint: list[str]
    healthcheck: list[str]
    mounts: Mapping[str, Path]
    """What is mounted from this checkout: path in the container to file or folder here."""
    ports: Mapping[int, int]
    """Published on the loopback: port here to port in the container."""


def load(folder: Path = DEPLOY) -> dict[str, Any]:
    """Return the compose file as it is, anchors and merges resolved."""
    with (folder / "compose.yaml").open(encoding="utf-8") as file:
        loaded: dict[str, Any] = YAML(typ="safe").load(file)
    return loaded


def first_steps(text: str) -> list[list[str]]:
    """Return the commands of each numbered step of the opening comment, line by line."""
    steps: list[list[str]] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if _STEP.match(line):
            steps.append([])
        elif steps and line.startswith(_CODE):
            steps[-1].append(line.removeprefix(_CODE))
    return steps


def read_variables(env_file: Path) -> dict[str, str]:
    """Return what a `.env` file sets: plain lines of NAME=value, the last of a name wins."""
    lines = env_file.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line)


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """Put variables into a value of the file; `Unset` where `${NAME:?}` finds nothing."""

    def value_of(match: re.Match[str]) -> str:
        name, how, otherwise = match.groups()
        if name is None:
            return "$"
        value = variables.get(name, "")
        if value or how is None:
            return value
        if how == "?":
            raise Unset(f"required variable {name} is missing a value: {otherwise}")
        return str(otherwise)

    return _VARIABLE.sub(value_of, text)


def services(folder: Path, variables: Mapping[str, str]) -> list[ComposeService]:
    """Return the services in the order in which they start, everything resolved."""
    content = load(folder)["services"]
    graph = {name: set(service.get("depends_on", ())) for name, service in content.items()}
    return [
        _service_of(name, content[name], folder, variables)
        for name in TopologicalSorter(graph).static_order()
    ]


def _service_of(
    name: str, content: Mapping[str, Any], folder: Path, variables: Mapping[str, str]
) -> ComposeService:
    environment = {}
    for key, value in content["environment"].items():
        if value is not None:
            environment[key] = interpolate(str(value), variables)
        elif key in variables:  # A name alone hands a variable on, if it is set.
            environment[key] = variables[key]
    mounted = [volume.split(":") for volume in content.get("volumes", ()) if volume[0] == "."]
    published = [port.split(":") for port in content.get("ports", ())]
    return ComposeService(
        name=name,
        environment=environment,
        command=list(content.get("command", ())),
        entrypoint=list(content.get("entrypoint", ())),
        healthcheck=list(content.get("healthcheck", {}).get("test", ())),
        mounts={parts[1]: folder / parts[0] for parts in mounted},
        ports={int(here): int(inside) for _, here, inside in published},
    )


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a Dockerfile, its continuation lines joined."""

    stage: int
    keyword: str
    arguments: str


def read_dockerfile(text: str) -> list[Instruction]:
    """Return the instructions of a Dockerfile in order; stages count from 0."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found: list[Instruction] = []
    stage = -1
    for line in joined.splitlines():
        keyword, _, arguments = line.partition(" ")
        stage += keyword == "FROM"
        found.append(Instruction(stage, keyword, re.sub(r" {2,}", " ", arguments.strip())))
    return found


def last_stage(instructions: list[Instruction]) -> list[Instruction]:
    """Return the instructions of the stage that becomes the image."""
    return [found for found in instructions if found.stage == instructions[-1].stage]


def set_by(instructions: list[Instruction]) -> dict[str, str]:
    """Return the environment that these instructions set."""
    lines = [found.arguments for found in instructions if found.keyword == "ENV"]
    return dict(word.split("=", 1) for line in lines for word in line.split())


def health_command(instructions: list[Instruction]) -> list[str]:
    """Return the command of the HEALTHCHECK, which is in its exec form."""
    [check] = [found.arguments for found in instructions if found.keyword == "HEALTHCHECK"]
    command: list[str] = json.loads(check.partition("CMD ")[2])
    return command
