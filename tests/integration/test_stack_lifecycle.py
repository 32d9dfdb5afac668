"""The local stack as outsiders meet it: what it leaves behind, brings back, says."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import description
import stack as local_stack
from stack import Stack
from sweeper import marked_pids

_STACK_PY = Path(local_stack.__file__)
_PATIENCE_S = 600


def _up(folder: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `stack.py up` for a broker in memory and a database server, as a person would."""
    return subprocess.run(
        [sys.executable, str(_STACK_PY), "up", "--infrastructure", "--dir", str(folder), *more],
        env=dict(os.environ) | {"HISAB_KAFKA_PROVIDER": "memory"} | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
    )


def _wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not until():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def _gone(stack: Stack, stack_id: str, data: Path) -> bool:
    """Say whether nothing of a stack is left: no process, no data, no description, no lock."""
    return (
        not marked_pids(stack_id)
        and not data.exists()
        and not (stack.folder / "stack.json").exists()
        and description.holder(stack.folder) is None
    )


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Stack]:
    """A broker and a database server in a folder with a space in its name."""
    folder = tmp_path / "a folder"
    answer = _up(folder)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    yield Stack(folder)
    local_stack.down(folder)


def test_the_description_is_private(small: Stack) -> None:
    """stack.json, which holds keys, is readable by its owner alone."""
    mode = stat.S_IMODE((small.folder / "stack.json").stat().st_mode)
    assert oct(0o600) == oct(mode)


@pytest.mark.defect("F7")
def test_nothing_is_left_after_the_supervisor_is_killed(small: Stack) -> None:
    """Kill -9 of the supervisor ends all it started and removes the data."""
    content = small.content()
    os.kill(content["supervisor_pid"], signal.SIGKILL)
    data = Path(content["infrastructure"]["data"])
    _wait(lambda: _gone(small, content["stack_id"], data))


def test_nothing_is_left_after_down(small: Stack) -> None:
    """When `down` returns there is no process, no data and no description."""
    content = small.content()
    assert local_stack.down(small.folder)
    assert _gone(small, content["stack_id"], Path(content["infrastructure"]["data"]))


def test_a_stack_ends_with_the_process_it_was_tied_to(tmp_path: Path) -> None:
    """A stack tied to a process ends when that process is killed with -9."""
    companion = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    answer = _up(tmp_path, "--ends-with", str(companion.pid))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    stack = Stack(tmp_path)
    content = stack.content()
    companion.kill()
    companion.wait()
    data = Path(content["infrastructure"]["data"])
    _wait(lambda: _gone(stack, content["stack_id"], data))


def test_a_second_up_replaces_the_first(small: Stack) -> None:
    """In one folder there is one stack: the second ends the first, says so, and starts empty."""
    first = small.content()
    answer = _up(small.folder)
    assert "ending it first" in answer.stdout
    second = small.content()
    assert first["stack_id"] != second["stack_id"]
    assert [] == marked_pids(first["stack_id"])


def test_two_stacks_run_side_by_side(small: Stack, tmp_path: Path) -> None:
    """A stack in another folder has its own broker and server, and ending it leaves the first."""
    with local_stack.running(tmp_path / "b", infrastructure_only=True) as other:
        assert small.bootstrap_servers != other.bootstrap_servers
        assert small.pid("postgres") != other.pid("postgres")
    assert small.pid("postgres") in marked_pids(small.content()["stack_id"])


def test_a_killed_database_server_comes_back_with_its_data(small: Stack) -> None:
    """PostgreSQL killed with -9 recovers on the same port, with what was committed."""
    from infrastructure import Infrastructure

    infrastructure = Infrastructure.of(small)
    database = infrastructure.blank_database("ledger")
    killed = small.kill("postgres")
    assert killed != small.wait_back("postgres", killed, _PATIENCE_S)
    _wait(lambda: _answers(database.owner))


def _answers(dsn: str) -> bool:
    import asyncpg

    from infrastructure import run_apart

    async def ask() -> bool:
        try:
            connection = await asyncpg.connect(dsn)
        except (OSError, asyncpg.PostgresError):
            return False
        await connection.close()
        return True

    return run_apart(ask())


def test_a_wrong_order_is_refused_with_its_reason(tmp_path: Path) -> None:
    """What cannot be had is said, and nothing stays behind."""
    answer = _up(tmp_path, HISAB_POSTGRES_PROVIDER="wheel-9")
    assert answer.returncode == 1
    assert "no PostgreSQL 15 or later of the kind 'wheel-9'" in answer.stdout
    assert description.holder(tmp_path) is None


def test_a_broker_that_dies_at_its_start_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    """Which part failed and what it said last; one line of a log nobody has to look for."""
    java = tmp_path / "jdk" / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(
        '#!/bin/sh\n[ "$1" = -version ] && { echo \'openjdk version "21.0.1"\' >&2; exit 0; }\n'
        "echo 'There is insufficient memory for the Java Runtime Environment'\nexit 3\n"
    )
    java.chmod(0o755)
    folder = tmp_path / "stack"
    answer = _up(folder, HISAB_KAFKA_PROVIDER="kraft", JAVA_HOME=str(java.parents[1]))
    if "could not resolve" in answer.stdout or "Maven (mvn)" in answer.stdout:
        pytest.skip("the jars of Apache Kafka cannot be had here")
    assert 1 == answer.returncode
    refusal = answer.stdout.partition("the stack cannot start: ")[2]
    assert refusal.startswith(
        "kafka ended with 3 before it was ready:\nThere is insufficient memory"
    )


def test_a_service_that_dies_at_its_start_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    """The ledger ends as soon as it should serve; what it printed is what is shown."""
    package = tmp_path / "broken" / "ledger"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import sys\nif sys.argv[1] == 'serve':\n    sys.exit('the disk is full')\n"
    )
    answer = subprocess.run(
        [sys.executable, str(_STACK_PY), "up", "--dir", str(tmp_path / "stack")],
        env=dict(os.environ)
        | {"HISAB_KAFKA_PROVIDER": "memory", "PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert 1 == answer.returncode
    refusal = answer.stdout.partition("the stack cannot start: ")[2]
    assert refusal.startswith("ledger ended with 1 before it was ready:\nthe disk is full")


def test_a_given_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    """PostgreSQL by its part and the reason; its password is not printed."""
    answer = _up(tmp_path, HISAB_STACK_POSTGRES="postgresql://me:hush@127.0.0.1:9/postgres")
    assert 1 == answer.returncode
    refusal = answer.stdout.partition("the stack cannot start: ")[2]
    assert refusal.startswith("postgres failed: ")
    assert "refused" in refusal.lower() or "connect call failed" in refusal.lower()
    assert "hush" not in answer.stdout + answer.stderr


def test_the_caller_keeps_its_file_descriptors(small: Stack) -> None:
    """The supervisor is in a session of its own and holds nothing of its caller's."""
    pid = small.content()["supervisor_pid"]
    assert pid == os.getsid(pid)
    held = {str(Path(f"/proc/{pid}/fd/{n}").readlink()) for n in (0, 1, 2)}
    assert {"/dev/null", str(small.folder / "logs" / "supervisor.log")} == held


def test_status_names_what_runs(small: Stack) -> None:
    """`status` lists each process with its number and succeeds only while a stack runs."""
    command = [sys.executable, str(_STACK_PY), "status", "--dir", str(small.folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0
    assert f"memory, pid {small.pid('kafka')}" in answer.stdout
    local_stack.down(small.folder)
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1


def test_json_of_an_unfinished_write_is_never_seen(tmp_path: Path) -> None:
    """The description is replaced in one step: a reader sees the old one or the new one."""
    for number in range(50):
        description.write(tmp_path, {"number": number, "filler": "x" * 10_000})
        assert number == json.loads((tmp_path / "stack.json").read_text())["number"]
    assert ["stack.json"] == [path.name for path in tmp_path.iterdir()]
