"""HTTP calls of the stack and the demo that are made again until they are answered.

Only for what may be made twice: reading, and commands that carry an idempotency key. A connection
that is lost, be it a kept one that the service closed in this moment, and an answer that says to
come later are met alike: the same call again, after a pause that doubles up to a bound or that the
answer asks for, until a deadline. A service that is killed and comes back is waited for so.

Refusals: `Unanswered` when the deadline passed and nobody answered. An answer that says to come
later is returned then as it is: it tells more than we could.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import httpx2

PATIENCE_S: Final = 600
"""A bound, not a measure: a busy machine takes its time, and giving up early adds to its load."""

ANSWER_PATIENCE_S: Final = 120
"""How long a client waits for one answer on one connection."""

LATER: Final = frozenset({429, 502, 503, 504})
"""Answers that say to send the same again."""

_SHORTEST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 2.0


class Unanswered(Exception):
    """Nobody answered a call until its deadline; the text says what happened the last time."""


async def call(
    send: Callable[[], Awaitable[httpx2.Response]],
    *,
    later: frozenset[int] = LATER,
    lost: Callable[[], object] = lambda: None,
    patience_s: float = PATIENCE_S,
) -> httpx2.Response:
    """Send until the answer is more than "later"; `lost` is called after each lost connection."""
    deadline = time.monotonic() + patience_s
    pause_s = _SHORTEST_PAUSE_S
    while True:
        asked_s = 0
        try:
            answer = await send()
        except httpx2.TransportError as error:
            if time.monotonic() > deadline:
                raise Unanswered(f"no answer within {patience_s} s, at last {error!r}") from error
            lost()
        else:
            if answer.status_code not in later or time.monotonic() > deadline:
                return answer
            asked_s = _retry_after(answer)
        await asyncio.sleep(max(pause_s, asked_s))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _retry_after(answer: httpx2.Response) -> int:
    """Return how many seconds an answer asks to wait; 0 when it does not, or gives a date."""
    value = answer.headers.get("retry-after", "")
    return int(value) if value.isdecimal() and len(value) < 4 else 0
