"""Ends what a stack started and removes its data, whatever became of its supervisor.

The supervisor starts one sweeper and holds the other end of its standard input. When that pipe
closes, by an orderly end or by kill -9, the sweeper kills every process that carries the stack's
mark in its environment, removes the stack's description and its data folder, and releases the
stack's lock, which it shares with the supervisor: a free lock means that nothing is left.

Containers of the stack, and their volumes, carry the mark in their names and are removed too.

Only the standard library, and Linux's /proc. It touches nothing without the mark.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import description

MARK: Final = "HISAB_STACK_ID"
"""Every process of a stack carries this in its environment."""

CONTAINERS: Final = "hisab-"
"""How the names of all containers of all stacks begin; the stack's id follows."""

PATIENCE_S: Final = 120
"""How long killed processes may take to vanish before their data is removed all the same."""


def marked_pids(stack_id: str) -> list[int]:
    """Return the processes that carry this stack's mark, this process excepted."""
    wanted = f"{MARK}={stack_id}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def kill_marked(stack_id: str) -> None:
    """Kill what carries the mark until none is left.

    SIGQUIT first: PostgreSQL then frees its shared memory, and nothing else needs more time.
    """
    deadline = time.monotonic() + PATIENCE_S
    how = signal.SIGQUIT
    while (pids := marked_pids(stack_id)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
        time.sleep(0.3 if how is signal.SIGQUIT else 0.05)
        how = signal.SIGKILL


def remove_containers(stack_id: str) -> None:
    """Remove the containers whose names carry this stack's mark, and their data."""
    named = f"name={CONTAINERS}{stack_id}"
    for what in ("container", "volume"):
        listing = ["docker", what, "ls", "--quiet", "--filter", named]
        listing += ["--all"] if what == "container" else []
        # An engine that does not answer has nothing of ours that we could remove.
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            found = subprocess.run(
                listing, capture_output=True, text=True, check=False, timeout=PATIENCE_S
            ).stdout.split()
            if found:
                subprocess.run(
                    ["docker", what, "rm", "--force", *found],
                    capture_output=True,
                    check=False,
                    timeout=PATIENCE_S,
                )


def main() -> None:
    """Wait for the supervisor's end, then sweep: `sweeper.py <stack id> <folder> <data>`."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(ignored, signal.SIG_IGN)
    stack_id, folder, data = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    sys.stdin.buffer.read()
    kill_marked(stack_id)
    if os.environ.get("HISAB_STACK") == "docker":
        remove_containers(stack_id)
    description.remove(folder, stack_id)
    shutil.rmtree(data, ignore_errors=True)


if __name__ == "__main__":
    main()
