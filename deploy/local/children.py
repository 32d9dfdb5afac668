"""Child processes of the local stack: what to run, as whom, and that it ends with its parent.

A `Program` is a fact: what is started and with which signal it stops. `spawn` starts it so that the
kernel ends it when the supervisor dies; the sweeper (see `sweeper.py`) ends what slips through.
Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import pwd
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

_PR_SET_PDEATHSIG: Final = 1
_POLL_S: Final = 0.1
_PORTS: Final = 12_000
_PORTS_OF_A_STACK: Final = 20
_ANSWER_PATIENCE_S: Final = 60
_OTHERS_MAY_PASS: Final = 0o001
_TEMPORARY: Final = ("/tmp", "/var/tmp")  # noqa: S108  # Tried after the user's own.


IsReady: TypeAlias = Callable[[], Awaitable[bool]]
"""Asks a program whether it serves already."""


class StackError(Exception):
    """The stack cannot be had; the text says why and what to do, for a person to read."""


@dataclass(frozen=True, slots=True)
class Account:
    """An unprivileged user that runs what refuses to run as root."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Program:
    """A process of the stack: how it starts, how it stops, and when it is ready."""

    name: str
    argv: Sequence[str]
    log: Path
    env: Mapping[str, str]
    """Its whole environment, the stack's mark included."""
    cwd: Path
    is_ready: IsReady | None = None
    """Whether it serves already; None for what runs to its end."""
    stop_signal: signal.Signals = signal.SIGTERM
    account: Account | None = None
    restarts: bool = True
    """Whether it can come back with what it held: not so for a broker in memory."""


def unprivileged_account() -> Account | None:
    """Return whom to run as what refuses root: None for an ordinary user, who runs it himself."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(name, entry.pw_uid, entry.pw_gid)
    raise StackError("PostgreSQL refuses to run as root, and there is no user postgres or nobody")


def make_data_folder(account: Account | None) -> Path:
    """Create a fresh folder for data, in the first temporary folder that the account can reach."""
    tried = dict.fromkeys((tempfile.gettempdir(), *_TEMPORARY))
    for parent in map(Path, tried):
        if not os.access(parent, os.W_OK | os.X_OK):
            continue
        if account is None or reachable_by_others(parent):
            data = Path(tempfile.mkdtemp(prefix="hisab-", dir=parent))
            data.chmod(0o711)
            return data
    raise StackError(
        f"no temporary folder is both writable and open to the user that runs PostgreSQL: "
        f"tried {', '.join(tried)}"
    )


def reachable_by_others(folder: Path) -> bool:
    """Say whether any user may pass through a folder and all folders above it."""
    folder = folder.resolve()
    return all(part.stat().st_mode & _OTHERS_MAY_PASS for part in (folder, *folder.parents))


def free_ports(number: int) -> Iterator[int]:
    """Yield free TCP ports of the loopback, below the range the kernel lends to clients.

    Ports of that range could be taken by an outgoing connection while a service restarts. `number`
    (the pid of who asks) says where to begin. Twenty ports in a row are the asker's alone for as
    long as it keeps this iterator: a port looks free while what listens on it is being started or
    brought back, and another stack of this machine must not take it then.
    """
    with contextlib.ExitStack() as claims:
        for step in range(_PORTS // _PORTS_OF_A_STACK):
            first = 20_000 + (number + step) * _PORTS_OF_A_STACK % _PORTS
            # An abstract name belongs to one process, and is free again however that one ends.
            claim = claims.enter_context(socket.socket(socket.AF_UNIX))
            try:
                claim.bind(f"\0hisab-ports-{first}")
            except OSError as taken:
                if taken.errno != errno.EADDRINUSE:
                    raise
                continue
            yield from filter(_is_free, range(first, first + _PORTS_OF_A_STACK))
    raise StackError("no free TCP port between 20000 and 32000 on 127.0.0.1")


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


async def spawn(program: Program) -> asyncio.subprocess.Process:
    """Start a program; its output goes to its log."""
    account = program.account
    with program.log.open("ab") as log:
        return await asyncio.create_subprocess_exec(
            *program.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=program.cwd,
            env=dict(program.env),
            user=None if account is None else account.uid,
            group=None if account is None else account.gid,
            extra_groups=None if account is None else [],
            preexec_fn=lambda: _end_with_parent(
                signal.SIGQUIT if program.stop_signal == signal.SIGQUIT else signal.SIGKILL
            ),
        )


def _end_with_parent(how: signal.Signals) -> None:
    """Ask the kernel for a signal when the parent dies.

    It runs between fork and exec, after the change of user, which would clear it. A parent that
    dies before this line is missed: the sweeper then ends the child by its mark.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, how.value, 0, 0, 0)


async def stop(process: asyncio.subprocess.Process, how: signal.Signals, patience_s: int) -> None:
    """Send a process its stop signal and wait; after `patience_s` it is killed."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(how)
    try:
        async with asyncio.timeout(patience_s):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def run_to_end(program: Program) -> None:
    """Run a program that ends by itself; `StackError` with the end of its log when it fails."""
    process = await spawn(program)
    try:
        if await process.wait() != 0:
            raise StackError(
                f"{program.name} failed with {process.returncode}:\n{log_tail(program.log)}"
            )
    finally:
        if process.returncode is None:
            await stop(process, signal.SIGKILL, 1)


async def wait_ready(
    program: Program, process: asyncio.subprocess.Process, patience_s: int
) -> None:
    """Wait until a program answers; `StackError` when it ends or takes longer than `patience_s`."""
    try:
        async with asyncio.timeout(patience_s):
            while program.is_ready is not None and not await program.is_ready():
                if process.returncode is not None:
                    raise StackError(
                        f"{program.name} ended with {process.returncode} before it was ready:\n"
                        f"{log_tail(program.log)}"
                    )
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise StackError(
            f"{program.name} was not ready after {patience_s} s:\n{log_tail(program.log)}"
        ) from None


def log_tail(log: Path, lines: int = 20) -> str:
    """Return the last lines of a log."""
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    return f"(no log at {log})"


async def first_line_of(port: int, request: bytes) -> bytes | None:
    """Send a request to a loopback port; return the first line of the answer, or None without one.

    By hand: this runs many times while services start, and a client costs more than the answer.
    """
    try:
        async with asyncio.timeout(_ANSWER_PATIENCE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(request)
                return await reader.readline() if request else b""
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None
