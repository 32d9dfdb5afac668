"""The image of each service is built as its Dockerfile says, and what it then runs answers.

Where no engine is, the steps of the build stage run here, in a scratch folder that stands for the
image's file system: what is copied is what `.dockerignore` lets through, paths of the image become
paths below the folder, and nothing else is changed. Where an engine answers it builds the image.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

import bootstrap
import containers
from compose_file import (
    DEPLOY,
    ROOT,
    SERVICES,
    Instruction,
    last_stage,
    read_dockerfile,
    set_by,
)

pytestmark = pytest.mark.slow

OUTSIDE = r"error sending request|dns error|timed out|NewConnectionError|ConnectTimeout"
TEMPORARY = "/tmp"  # noqa: S108  # Inside the container, as in the compose file.
PYTHON_IMAGE = os.environ.get("HISAB_PYTHON_IMAGE", "python:3.12-slim-bookworm")


def instructions() -> list[Instruction]:
    """Return the Dockerfile's instructions."""
    return read_dockerfile((DEPLOY / "Dockerfile").read_text(encoding="utf-8"))


def copy_context(source: str, target: Path) -> None:
    """Copy a path of the build context as COPY does, less what `.dockerignore` keeps out."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    dropped = [line.removeprefix("**/") for line in ignored if line.startswith("**/")]
    found = [ROOT / source] if (ROOT / source).is_file() else sorted((ROOT / source).rglob("*"))
    for path in found:
        inside = path.relative_to(ROOT)
        is_kept = any(inside.is_relative_to(name) for name in kept)
        is_dropped = any(fnmatch(part, name) for part in inside.parts for name in dropped)
        if path.is_file() and is_kept and not is_dropped:
            copied = target / (
                path.name if path == ROOT / source else path.relative_to(ROOT / source)
            )
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copied)


class Scratch:
    """A folder that stands for the file system of the build stage."""

    def __init__(self, folder: Path, service: str) -> None:
        self.folder = folder
        self.service = service
        self.work = folder
        tools = folder / "tools"
        tools.mkdir()
        (tools / "python").symlink_to(bootstrap._INTERPRETER)
        named = ("PIP_", "UV_", "SSL_", "HTTP", "http", "NO_PROXY", "no_proxy")
        settings = {name: value for name, value in os.environ.items() if name.startswith(named)}
        # What the machine says about package indexes holds for uv too, as in `bootstrap`.
        self.environment = settings | bootstrap._uv_settings_from_pip(os.environ)
        self.environment |= {"PATH": f"{tools}:/usr/bin:/bin", "SERVICE": service}

    def inside(self, text: str) -> str:
        """Return a text with the image's paths below this folder."""
        return re.sub(r"(?<![\w.}])/(opt|wheels|src)\b", rf"{self.folder}/\1", text)

    def take(self, step: Instruction) -> None:
        """Do one instruction of the build stage."""
        match step.keyword:
            case "ENV":
                self.environment |= set_by([step])
            case "WORKDIR":
                self.work = Path(self.inside(step.arguments))
                self.work.mkdir(parents=True)
            case "COPY":
                *sources, target = step.arguments.replace("${SERVICE}", self.service).split()
                for source in sources:
                    copy_context(source, self.work / target)
            case "RUN":
                done = subprocess.run(
                    ["/bin/sh", "-c", self.inside(step.arguments)],
                    cwd=self.work,
                    env=self.environment,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                said = done.stdout + done.stderr
                if done.returncode != 0 and re.search(OUTSIDE, said):
                    pytest.skip(f"the package index cannot be reached: {said[-160:]}")
                assert 0 == done.returncode, said
            case "FROM" | "ARG":
                pass
            case _:
                raise AssertionError(f"nothing here knows how to do {step.keyword}")


@pytest.mark.parametrize("service", SERVICES)
def test_the_build_stage_makes_a_service_that_runs(service: str, tmp_path: Path) -> None:
    """Every step as written; the last stage's command is there, and is the service named."""
    scratch = Scratch(tmp_path, service)
    for step in instructions():
        if step.stage == 0:
            scratch.take(step)
    image = last_stage(instructions())
    copies = [step.arguments for step in image if step.keyword == "COPY"]
    assert ["--from=build /opt/hisab /opt/hisab"] == copies
    command = [tmp_path / "opt/hisab/bin/service"]
    environment = {"PATH": "/usr/bin:/bin"}
    described = subprocess.run(
        [*command, "openapi"], env=environment, capture_output=True, text=True, check=True
    )
    assert (ROOT / f"contracts/openapi/{service}.json").read_text() == described.stdout
    refused = subprocess.run(
        [*command, "serve"], env=environment, capture_output=True, text=True, check=False
    )
    assert (1, "HISAB_HTTP_PORT is not set\n") == (refused.returncode, refused.stderr)


@pytest.mark.parametrize("service", SERVICES)
def test_an_engine_builds_the_image(service: str) -> None:
    """The whole Dockerfile by an engine; the image runs as nobody, and describes its API."""
    why_not = containers.why_no_engine() or containers.why_no_image(PYTHON_IMAGE)
    if why_not is not None:
        pytest.skip(why_not)
    name = f"hisab-test/{service}:{os.getpid()}"
    build = ["docker", "build", "--quiet", "--network", "host", "--tag", name]
    build += ["--file", str(DEPLOY / "Dockerfile"), "--build-arg", f"SERVICE={service}"]
    build += ["--build-arg", f"PYTHON_IMAGE={PYTHON_IMAGE}", str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    assert 0 == built.returncode, built.stdout + built.stderr
    try:
        run = ["docker", "run", "--rm", "--network", "none", "--read-only", "--tmpfs", TEMPORARY]
        run += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges:true"]
        described = subprocess.run([*run, name, "openapi"], capture_output=True, check=True)
        assert (ROOT / f"contracts/openapi/{service}.json").read_bytes() == described.stdout
        who = [*run, "--entrypoint", "id", name, "-u"]
        assert b"10001\n" == subprocess.run(who, capture_output=True, check=True).stdout
    finally:
        subprocess.run(["docker", "image", "rm", "--force", name], capture_output=True, check=True)
