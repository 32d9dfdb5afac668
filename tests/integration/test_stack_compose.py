"""The first steps of the compose file, taken as they stand there, lead to a system that works."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import httpx2
import pytest

import brokers
import compose_file
from compose_file import DEPLOY, ROOT, SERVICES, Unset
from integration.compose_processes import PATIENCE_S, ComposeProcesses, composed

TOOLS = ("curl", "openssl", "sed", "tr")
OLD_KEY = "0123456789abcdef" * 3
"""What the file once told its reader to make: `openssl rand -hex 24`."""


def folder_of(tmp_path: Path) -> Path:
    """Copy what the compose file's reader has in front of him."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"the first steps need {', '.join(missing)}")
    folder = tmp_path / "deploy"
    shutil.copytree(DEPLOY, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


async def take(steps: list[list[str]], processes: ComposeProcesses) -> None:
    """Run the commands of steps in one shell each; `docker compose up` is ours to do."""
    for step in steps:
        commands: list[str] = []
        for line in step:
            if line.startswith("docker compose up"):
                await run(commands, processes)
                commands = []
                await processes.up()
            else:
                commands.append(line)
        await run(commands, processes)


async def run(commands: list[str], processes: ComposeProcesses) -> None:
    """Run lines in the plainest shell there is, as they stand but for the published ports."""
    script = processes.mapped("\n".join(commands))
    shell = await asyncio.create_subprocess_exec(
        *("/bin/sh", "-eu", "-c", script),
        cwd=processes.folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"PATH": os.environ["PATH"]},
    )
    said, _ = await shell.communicate()
    assert (0, "") == (shell.returncode, said.decode()), script


async def status(client: httpx2.AsyncClient, url: str, key: str) -> int:
    """Ask one thing with a key."""
    headers = {"Authorization": f"Bearer {key}"}
    return (await client.get(f"{url}/v1/status", headers=headers)).status_code


@pytest.mark.slow
async def test_the_first_steps_of_the_compose_file_work_as_written(tmp_path: Path) -> None:
    """All three services are ready, take the first operator's key, and invoicing has its own.

    A key once made as the file said was refused, and the ledger ended again and again.
    """
    java = brokers.find_java()
    jars = brokers.resolve_jars(ROOT / ".hisab" / "cache") if java is not None else "no JVM 17"
    if java is None or isinstance(jars, str):
        pytest.skip(f"needs Apache Kafka, as the compose file does: {jars}")
    folder = folder_of(tmp_path)
    steps = compose_file.first_steps((folder / "compose.yaml").read_text(encoding="utf-8"))
    assert 3 == len(steps)
    assert ["docker compose up --detach --build --wait"] == steps[1]
    async with (
        composed(folder, java, jars) as processes,
        httpx2.AsyncClient(timeout=PATIENCE_S, trust_env=False) as client,
    ):
        await take(steps[:2], processes)
        variables = compose_file.read_variables(folder / ".env")
        assert 0o600 == (folder / ".env").stat().st_mode & 0o777
        operator = variables["LEDGER_BOOTSTRAP_KEY"]
        for name in SERVICES:
            ready = await client.get(f"{processes.url(name)}/readyz")
            assert (name, 200) == (name, ready.status_code), processes.log_of(name)
        assert 200 == await status(client, processes.url("ledger"), operator)

        await take(steps[2:], processes)
        finance = compose_file.read_variables(folder / ".env")["HISAB_LEDGER_KEY"]
        for name in SERVICES:
            for key in (operator, finance):
                async with asyncio.timeout(PATIENCE_S):
                    # A key is known elsewhere a moment after the ledger has made it.
                    while await status(client, processes.url(name), key) != 200:
                        processes.refuse_ended()
                        await asyncio.sleep(0.1)
        processes.refuse_ended()


def test_a_variable_that_is_missing_stops_the_start(tmp_path: Path) -> None:
    """Without step 1 nothing starts, and the first variable that is missing is named."""
    folder = folder_of(tmp_path)
    with pytest.raises(Unset, match="PASSWORD"):
        compose_file.services(folder, {})


def test_a_key_that_is_none_is_refused_in_one_sentence() -> None:
    """The ledger ends at once, before it connects to anything, and says how to make a good one."""
    done = subprocess.run(
        [compose_file.PYTHON, "-m", "ledger", "serve"],
        env={"HISAB_BOOTSTRAP_KEY": OLD_KEY},
        capture_output=True,
        text=True,
        check=False,
    )
    assert 1 == done.returncode
    [said] = done.stderr.splitlines()
    assert said.startswith("HISAB_BOOTSTRAP_KEY is no API key: a secret is hsb_ and 43 characters")
    # What it says to do is done, and leads past this check.
    command = said.partition("Make one with: ")[2]
    made = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    done = subprocess.run(
        [compose_file.PYTHON, "-m", "ledger", "serve"],
        env={"HISAB_BOOTSTRAP_KEY": made.stdout.strip()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "HISAB_HTTP_PORT is not set\n" == done.stderr
    assert OLD_KEY not in said
