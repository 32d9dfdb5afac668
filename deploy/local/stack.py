"""The local stack, from the command line and from Python.

    python deploy/local/stack.py up [--dir FOLDER] [--infrastructure] [--ends-with PID]
    python deploy/local/stack.py down | status [--dir FOLDER]
    python deploy/local/stack.py stop | start NAME [--dir FOLDER]

`up` starts a broker, a database server and the three services, seeds them, and returns when all are
ready; `FOLDER/stack.json` (default `.hisab`) then says where everything is. A stack that already
runs in that folder is ended first: every `up` starts from empty databases and topics. `down` ends
the stack and removes its data; the logs stay in `FOLDER/logs`. With `--infrastructure` there are
only the broker, the server and the roles. With `--ends-with` the stack ends when that process does,
however it dies. `stop` keeps one process down (`metering`, `kafka`, ...) until `start`.

From Python, `running()` is a stack for as long as a block runs, and `Stack` reads its description.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import description
import sweeper

ROOT: Final = Path(__file__).resolve().parents[2]
DEFAULT_FOLDER: Final = ROOT / ".hisab"
_HERE: Final = Path(__file__).resolve().parent
_TERM_PATIENCE_S: Final = 300
_DOWN_PATIENCE_S: Final = 600
_PATIENCE_S: Final = 600
"""Bounds and no measures: a busy machine takes its time."""
_POLL_S: Final = 0.1


class StackFailed(Exception):
    """The stack could not be started or ended; the text says why."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A running stack, as its stack.json describes it at this moment."""

    folder: Path

    def content(self) -> dict[str, Any]:
        """Return stack.json as it is now; `StackFailed` when the stack is gone."""
        content = description.read(self.folder)
        if content is None:
            raise StackFailed(f"no stack runs in {self.folder}")
        return content

    @property
    def bootstrap_servers(self) -> str:
        """Where Kafka is."""
        return str(self.content()["kafka"]["bootstrap_servers"])

    @property
    def provider(self) -> dict[str, str]:
        """Which Kafka and which PostgreSQL were taken."""
        return dict(self.content()["provider"])

    def url(self, service: str) -> str:
        """Where a service answers; it stays the same when the service restarts."""
        return str(self.content()["services"][service]["url"])

    def key(self, role: str, name: str | None = None) -> str:
        """Return an API key: `key("operator")`, `key("hub", "lhr")`, `key("tenant", "…")`."""
        keys = self.content()["keys"]
        return str(keys[role] if name is None else keys[role][name])

    def pid(self, name: str) -> int | None:
        """Return the process of a service, of `kafka` or of `postgres`; None while it is down."""
        content = self.content()
        found = content["services"].get(name) or content["infrastructure"][name]
        pid = found["pid"]
        return None if pid is None else int(pid)

    def database(self, service: str, part: str) -> str:
        """Return the DSN of a service's `reader`, `writer` or `owner`."""
        return str(self.content()["postgres"][service][part])

    def kill(self, name: str) -> int:
        """Kill a process with -9, as a crash would; return its number. It comes back."""
        pid = self.pid(name)
        if pid is None:
            raise StackFailed(f"{name} is not running")
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_back(self, name: str, killed_pid: int, patience_s: int = _PATIENCE_S) -> int:
        """Wait until a process that was killed has a successor; return the new number."""
        deadline = time.monotonic() + patience_s
        while (pid := self.pid(name)) in {None, killed_pid}:
            if time.monotonic() > deadline:
                raise StackFailed(f"{name} was not back after {patience_s} s")
            time.sleep(_POLL_S)
        return int(pid or 0)

    def stop(self, name: str, patience_s: int = _PATIENCE_S) -> None:
        """Stop a process and keep it down until `start`."""
        marker = description.stop_marker(self.folder, name)
        marker.parent.mkdir(exist_ok=True)
        marker.touch()
        self._wait(name, patience_s, down=True)

    def start(self, name: str, patience_s: int = _PATIENCE_S) -> None:
        """Let a stopped process run again; returns when it was started, ready or not."""
        description.stop_marker(self.folder, name).unlink(missing_ok=True)
        self._wait(name, patience_s, down=False)

    def _wait(self, name: str, patience_s: int, *, down: bool) -> None:
        deadline = time.monotonic() + patience_s
        while (self.pid(name) is None) is not down:
            if time.monotonic() > deadline:
                raise StackFailed(f"{name} did not {'stop' if down else 'start'}")
            time.sleep(_POLL_S)


@contextlib.contextmanager
def running(folder: Path | None = None, *, infrastructure_only: bool = False) -> Iterator[Stack]:
    """Run a separate stack for the length of a block; it also ends with this process.

    Without a folder it lives in a temporary one, beside any other stack of this machine.
    """
    with contextlib.ExitStack() as cleanup:
        if folder is None:
            folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="hisab-")))
        command = [sys.executable, str(_HERE / "stack.py"), "up", "--dir", str(folder)]
        command += ["--ends-with", str(os.getpid())]
        if infrastructure_only:
            command.append("--infrastructure")
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            raise StackFailed(answer.stdout + answer.stderr)
        cleanup.callback(down, folder)
        yield Stack(folder)


def up(folder: Path, *, infrastructure_only: bool, ends_with: int | None) -> None:
    """Start a stack and return when it is ready; one that runs in this folder is ended first."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if description.holder(folder) is not None:
            print("a stack already runs here: ending it first", flush=True)
            down(folder)
        for marker in description.stop_markers(folder):
            marker.unlink()
        _start(folder, infrastructure_only=infrastructure_only, ends_with=ends_with)


def _start(folder: Path, *, infrastructure_only: bool, ends_with: int | None) -> None:
    """Start the supervisor and follow its log until the stack is ready or it gave up."""
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    for old in logs.glob("*.log"):
        old.unlink()
    stack_id = secrets.token_hex(16)
    command = [sys.executable, str(_HERE / "supervisor.py"), "--dir", str(folder)]
    command += ["--started-by", str(os.getpid())]
    command += ["--infrastructure"] if infrastructure_only else []
    command += [] if ends_with is None else ["--ends-with", str(ends_with)]
    log = logs / "supervisor.log"
    with log.open("ab") as output:
        supervisor = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=ROOT,
            env=dict(os.environ) | {sweeper.MARK: stack_id},
            start_new_session=True,
        )
    with log.open() as progress:
        while not _is_described(folder, stack_id):
            print(progress.read(), end="", flush=True)
            if supervisor.poll() is not None:
                print(progress.read(), end="", flush=True)
                down(folder)  # The sweeper may still be at work: nothing stays behind.
                raise StackFailed(f"the stack did not start; its logs are in {logs}")
            time.sleep(_POLL_S)
        print(progress.read(), end="", flush=True)


def _is_described(folder: Path, stack_id: str) -> bool:
    content = description.read(folder)
    return content is not None and content["stack_id"] == stack_id


def down(folder: Path) -> bool:
    """End the stack of a folder and remove its data; False when none was running."""
    holder = description.holder(folder)
    if holder is None:
        return False
    begun = time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        os.kill(holder.pid, signal.SIGTERM)
    while description.holder(folder) is not None:
        if holder.alive() and time.monotonic() > begun + _TERM_PATIENCE_S:
            os.kill(holder.pid, signal.SIGKILL)
        if time.monotonic() > begun + _DOWN_PATIENCE_S:
            raise StackFailed(f"the stack in {folder} did not end; process {holder.pid}")
        time.sleep(_POLL_S)
    return True


def status(folder: Path) -> bool:
    """Print what runs in a folder; False when nothing does."""
    content = description.read(folder)
    if content is None or description.holder(folder) is None:
        print(f"no stack runs in {folder}")
        return False
    print(f"supervisor  pid {content['supervisor_pid']}")
    for name, kind in content["provider"].items():
        print(f"{name:<11} {kind}, pid {content['infrastructure'][name]['pid']}")
    for name, service in content["services"].items():
        print(f"{name:<11} {service['url']}, pid {service['pid']}")
    return True


def main() -> int:
    """Read the command and do it."""
    parser = argparse.ArgumentParser(prog="stack.py", description="The local stack of Hisab.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("up", "start a stack and return when it is ready"),
        ("down", "end the stack and remove its data"),
        ("status", "say what runs"),
        ("stop", "keep one process down"),
        ("start", "let a stopped process run again"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--dir", type=Path, default=DEFAULT_FOLDER)
        if name == "up":
            command.add_argument("--infrastructure", action="store_true")
            command.add_argument("--ends-with", type=int)
        if name in {"stop", "start"}:
            command.add_argument("name")
    arguments = parser.parse_args()
    folder = arguments.dir.resolve()
    try:
        match arguments.command:
            case "up":
                up(
                    folder,
                    infrastructure_only=arguments.infrastructure,
                    ends_with=arguments.ends_with,
                )
            case "down":
                print("ended" if down(folder) else f"no stack runs in {folder}")
            case "status":
                return 0 if status(folder) else 1
            case "stop":
                Stack(folder).stop(arguments.name)
            case _:
                Stack(folder).start(arguments.name)
    except StackFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
