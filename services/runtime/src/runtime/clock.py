"""The clock: the only place where the kit and the services read the time of day.

What decides never reads it: time is an argument there (style rule 3).
"""

from __future__ import annotations

import time


def now_ms() -> int:
    """Return the present in milliseconds since 1970, UTC."""
    return time.time_ns() // 1_000_000


def ticks_ms() -> int:
    """Return milliseconds that only go forward, for measuring how long something takes."""
    return time.monotonic_ns() // 1_000_000
