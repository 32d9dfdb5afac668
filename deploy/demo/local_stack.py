"""The local stack as the demo uses it: started and ended by its command line, as a person would."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import description

_STACK = Path(__file__).resolve().parents[1] / "local" / "stack.py"


class StackNotStartedError(Exception):
    """The stack's command failed; the text is what it printed."""


@dataclass(frozen=True, slots=True)
class LocalStack:
    """A stack in its own folder. Unless it is kept, it ends when this process does."""

    folder: Path
    keep: bool

    @property
    def description(self) -> Path:
        """Where addresses and keys are written."""
        return self.folder / description.NAME

    @property
    def down_command(self) -> str:
        """What ends a stack that was kept."""
        return f"{sys.executable} {_STACK} down --dir {self.folder}"

    async def up(self, show: Callable[[str], None]) -> None:
        """Start it and show what it prints."""
        command = [sys.executable, str(_STACK), "up", "--dir", str(self.folder)]
        if not self.keep:
            command += ["--ends-with", str(os.getpid())]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        lines: list[str] = []
        if process.stdout is None:
            raise StackNotStartedError("no output to follow")
        async for line in process.stdout:
            lines.append(line.decode(errors="replace").rstrip())
            show(lines[-1])
        if await process.wait() != 0:
            raise StackNotStartedError("\n".join(lines))

    def down(self) -> None:
        """End it, and everything it started."""
        command = [sys.executable, str(_STACK), "down", "--dir", str(self.folder)]
        subprocess.run(command, check=False, capture_output=True)
