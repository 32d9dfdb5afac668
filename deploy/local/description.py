"""The files of a stack's folder: `stack.json` for outsiders, its lock, and the stop markers.

The file is private (it holds keys), replaced atomically, and updated whenever a process comes back.
Its shape is a published interface; `stack_id`, `dir` and `infrastructure` are neighbours that our
own tests use. The lock is shared by the supervisor and its sweeper: while it is held the stack, or
something of it, is still there. Only the standard library: the sweeper uses this module too.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

NAME: Final = "stack.json"
_LOCK: Final = "stack.lock"
_STOPPED: Final = "stopped"


@dataclass(frozen=True, slots=True)
class Process:
    """A process as it was seen: the start time tells it from a later one with the same number."""

    pid: int
    started: int

    def alive(self) -> bool:
        """Say whether it still runs; a zombie does not."""
        seen = _seen(self.pid)
        return seen is not None and seen == self.started


def process_of(pid: int) -> Process | None:
    """Return the running process of this number, or None."""
    started = _seen(pid)
    return None if started is None else Process(pid, started)


def _seen(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None when it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in {"Z", "X"} else int(fields[19])


def write(folder: Path, content: Mapping[str, object]) -> None:
    """Replace `stack.json` atomically, readable by its owner only."""
    unfinished = folder / f"{NAME}.unfinished"
    with contextlib.suppress(FileNotFoundError):
        unfinished.unlink()
    opened = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(opened, "w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    unfinished.replace(folder / NAME)


def read(folder: Path) -> dict[str, Any] | None:
    """Return what `stack.json` says, or None when there is no stack."""
    try:
        content = json.loads((folder / NAME).read_bytes())
    except FileNotFoundError:
        return None
    return content if isinstance(content, dict) else None


def remove(folder: Path, stack_id: str) -> None:
    """Remove `stack.json`, unless it describes another stack by now; never fails."""
    with contextlib.suppress(OSError, ValueError):
        content = read(folder)
        if content is not None and content.get("stack_id") == stack_id:
            (folder / NAME).unlink()


def stop_marker(folder: Path, name: str) -> Path:
    """Return the file that keeps a process of the stack down for as long as it exists."""
    return folder / _STOPPED / name


def stop_markers(folder: Path) -> list[Path]:
    """Return the markers that stand in a folder, an older stack's too."""
    return list((folder / _STOPPED).glob("*"))


def take_lock(folder: Path) -> IO[str] | None:
    """Take the stack's lock for this process and write down who has it; None when it is held."""
    file = (folder / _LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    # The start time stands beside the number: after a crash another process may get the number.
    me = process_of(os.getpid())
    file.truncate(0)
    file.write(f"{os.getpid()} {0 if me is None else me.started}\n")
    file.flush()
    return file


def holder(folder: Path) -> Process | None:
    """Return who took the stack's lock last, if the lock is held; it may have died meanwhile."""
    try:
        file = (folder / _LOCK).open("r+")
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid, _, started = file.read().partition(" ")
            return Process(int(pid or 0), int(started or 0))
    return None
