"""The clock: where the kit and the services read the time of day, measure, and wait.

What decides never reads it: time is an argument there (style rule 3). Two clocks, because they
answer two questions. The time of day is what facts are dated with; it may be set back. Ticks only
go forward, and say how long something took.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

Clock = Callable[[], int]
"""Whatever is read for the time of day, in milliseconds since 1970."""


def now_ms() -> int:
    """Return the present in milliseconds since 1970, UTC."""
    return time.time_ns() // 1_000_000


def ticks_ms() -> int:
    """Return milliseconds that only go forward, for measuring how long something takes."""
    return time.monotonic_ns() // 1_000_000


async def pause(stop: asyncio.Event, seconds: float) -> None:
    """Wait so long, or until `stop`.

    A plain sleep would keep a process that is told to end waiting for it.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()
