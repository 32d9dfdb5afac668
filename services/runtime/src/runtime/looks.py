"""Looks at how things are, shared by all who ask: whoever asks often costs no more than one.

Theory. `/readyz` needs no key and `/v1/status` any key, and both ask the database. If each call
took a connection of its own, whoever calls often would take them from those who work. So one look
runs at a time. Whoever asks while it runs shares the next one with all who wait: the one that runs
may have begun before what they did themselves, and a service that has not drained must not look
drained. Nothing is kept behind a look, so there is nothing stale; a look that fails fails for all
who waited for it, and the next is made as if nothing had happened.

A look takes 30 seconds at most, then it fails as an outage: it would hold up all others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

LOOK_S: Final = 30

T = TypeVar("T")


class SharedLook(Generic[T]):
    """One look at a time, for all who asked before it began."""

    def __init__(self, look: Callable[[], Awaitable[T]]) -> None:
        """Share what this finds."""
        self._look = look
        self._running = asyncio.Lock()
        self._next: asyncio.Task[T] | None = None

    async def take(self) -> T:
        """Return what a look finds that begins after this call; raises what it raises."""
        if self._next is None:
            self._next = asyncio.create_task(self._take_turn())
        # Whoever goes away takes the look from nobody else who waits for it.
        return await asyncio.shield(self._next)

    async def _take_turn(self) -> T:
        async with self._running:
            self._next = None
            async with asyncio.timeout(LOOK_S):
                return await self._look()
