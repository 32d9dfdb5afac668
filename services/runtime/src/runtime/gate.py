"""The gate before a service that may have been restored: nothing passes before it is found whole.

Theory. A database that was restored to an earlier point lacks what its service has published since.
Were it served, the same numbers would be given out a second time, and those downstream would drop
the second as a repeat of the first. So a service with something to lose gives a guard: it says what
was published and is not here, or None. Until it says None, at start, the gate is closed: `/healthz`
answers, `/readyz` does not, every call under `/v1/` is answered with a problem that says what to
do, and no consumer, relay or leased task runs. The guard is asked again every few seconds: a broker
that is down or an operator who recovers needs no restart here.

Refusals (`Problem`): `unavailable` before it could be said, `behind-published` afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import structlog

from runtime.clock import pause
from runtime.http import Problem, problem_response
from runtime.outages import is_outage

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

ASK_AGAIN_S: Final = 2
API_PREFIX: Final = "/v1/"

Guard = Callable[[], Awaitable[str | None]]
"""Says what was published and is not here, and what to do about it; None: all of it is here."""

_log = structlog.get_logger("runtime.gate")


class Gate:
    """Closed until the guard finds nothing missing. `problem` says why it is closed."""

    def __init__(self, guard: Guard | None) -> None:
        """Without a guard there is nothing to find, but what runs first at start runs first."""
        self._guard = guard
        self.problem: Problem | None = Problem(
            "unavailable", "starting: what is stored is compared with what was published"
        )

    async def open(self, stop: asyncio.Event, start: Callable[[], Awaitable[None]]) -> None:
        """Ask until nothing is missing, run `start`, and open; returns also when `stop` comes."""
        while not stop.is_set():
            try:
                refusal = None if self._guard is None else await self._guard()
                if refusal is None:
                    await start()
                    self.problem = None
                    return
            except Exception as error:
                if not is_outage(error):
                    raise
                _log.warning("not compared with what was published", error=repr(error))
                # Everybody may read it, without a key: what the error says of hosts is only logged.
                self.problem = Problem(
                    "unavailable",
                    "what was published cannot be compared now: the broker or the database does "
                    "not answer; it is tried again",
                )
            else:
                if self.problem is None or self.problem.detail != refusal:
                    _log.critical("refusing to serve", because=refusal)
                self.problem = Problem("behind-published", refusal)
            await pause(stop, ASK_AGAIN_S)


class Gated:
    """The application behind a gate."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an API call with the gate's problem while there is one."""
        problem = self._gate.problem
        if problem is not None and scope["type"] == "http" and scope["path"].startswith(API_PREFIX):
            await problem_response(problem)(scope, receive, send)
            return
        await self._app(scope, receive, send)
