"""HTTP as it is spoken with the outside: how long we wait for a client, and for how many at once.

Theory. A socket costs memory for as long as it is open, and whoever opens one decides how fast it
sends and reads. So every state that depends on the client has a deadline: until the head of a
request is there (from the connection, or from the first byte of a further request), until its body
is there, between two requests, and until an answer was taken. uvicorn knows only the third; the
others are added to its protocol here. One timer runs per connection, for what it waits for.

The number of connections is bounded as well, before anything is read. One connection runs one
request at a time, so the bound is that of the requests too, which is why uvicorn's own
`limit_concurrency` (whose answer is plain text) is not used.

What is left of a body behind its answer (401, 413) is taken apart, so that the connection can be
used again, for 64 KiB only: beyond that, nobody's chunks are worth the work.

Refusals, all of them problems, after which the connection ends: 408 `request-timeout`; 400
`bad-request` for what is no HTTP, or a head beyond 64 KiB; 503 `unavailable` beyond the bound.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import h11
import structlog
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from runtime.http import Problem, problem_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp
    from uvicorn.server import ServerState

MAX_HEAD_BYTES: Final = 65_536
MAX_UNREAD_BYTES: Final = 65_536
MAX_LINGERING: Final = 100
LINGER_S: Final = 2

_log = structlog.get_logger("runtime.server")


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """How long a client is waited for, and how many may be connected."""

    head_s: int = 10
    """Until the head of a request is there."""
    body_s: int = 60
    """Until the body is there too, from the end of the head."""
    idle_s: int = 75
    """Between two requests of a connection: longer than most clients keep one that is unused."""
    answer_s: int = 60
    """Until an answer was taken."""
    connections: int = 800
    """At once; below the 1 024 files that a process may usually have open."""


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: stopping is ours, in the order of the data."""

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        *,
        limits: ServerLimits = ServerLimits(),
        trusted_proxies: str = "",
        stop_s: int = 1,
    ) -> None:
        """Serve an application; a graceful stop takes `stop_s` at most.

        `trusted_proxies` are addresses, with commas, whose `X-Forwarded-For` is believed. An
        address counts (see `Access`), so nobody else may write one into a header.
        """
        config = _Config(
            app,
            host=host,
            port=port,
            http=_Connection,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            proxy_headers=bool(trusted_proxies),
            forwarded_allow_ips=trusted_proxies,
            server_header=False,
            timeout_keep_alive=limits.idle_s,
            timeout_graceful_shutdown=stop_s,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
        config.limits = limits
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Catch no signal."""
        yield


class _Config(uvicorn.Config):
    limits: ServerLimits


_Awaited = Literal["head", "body"]


class _Connection(H11Protocol):
    """One connection: uvicorn's protocol, and a deadline for whatever depends on the client."""

    config: _Config

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = self.config.limits
        self._refused = False
        self._unread_bytes = 0
        self._awaited: tuple[_Awaited, object] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._answer_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast("asyncio.Transport", transport))
        if len(self.connections) > self._limits.connections:
            self._refuse(Problem("unavailable", "too many connections; try again"))
        else:
            self._await_client()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._is_unread():
            self._unread_bytes += len(data)
            if self._unread_bytes > MAX_UNREAD_BYTES:
                self._linger()
                return
        super().data_received(data)
        self._await_client()

    def _is_unread(self) -> bool:
        """Say whether what comes is of a body whose request is answered already."""
        cycle = self._cycle()
        is_answered = cycle is not None and cycle.response_complete
        return is_answered and self.conn.their_state is h11.SEND_BODY

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._deadline, self._answer_deadline):
            if timer is not None:
                timer.cancel()
        # uvicorn leaves its own running when the connection breaks.
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._unread_bytes = 0
        super().on_response_complete()
        self._await_client()
        self._await_answer_taken()

    def _await_client(self) -> None:
        """Let the timer run for what the client owes now; a new one only for something new."""
        awaited = self._owed()
        if awaited == self._awaited or self._refused:
            return
        self._awaited = awaited
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if awaited is not None:
            wait_s = self._limits.head_s if awaited[0] == "head" else self._limits.body_s
            self._deadline = self.loop.call_later(wait_s, self._too_late)

    def _owed(self) -> tuple[_Awaited, object] | None:
        """Return what the client has still to send, and with which request; None for nothing."""
        if self.transport.is_closing():
            return None
        if self.conn.their_state is h11.SEND_BODY:
            # Also when it was answered before it was read: the rest of it has to come as well.
            return "body", self.cycle
        cycle = self._cycle()
        answered = cycle is None or cycle.response_complete
        idle = self.timeout_keep_alive_task is not None
        if self.conn.their_state is h11.IDLE and answered and not idle:
            return "head", self.cycle
        return None

    def _too_late(self) -> None:
        self._refuse(Problem("request-timeout", "send the request faster"))

    def _await_answer_taken(self) -> None:
        """Give up an answer that nobody reads: its bytes are ours to keep until it is taken."""
        if self._answer_deadline is not None:
            self._answer_deadline.cancel()
        self._answer_deadline = None
        if self.transport.get_write_buffer_size() > 0:
            self._answer_deadline = self.loop.call_later(self._limits.answer_s, self._give_up)

    def _give_up(self) -> None:
        if self.transport.get_write_buffer_size() > 0:
            _log.warning("answer not taken in time")
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        self._refuse(Problem("bad-request", msg))

    def _refuse(self, problem: Problem) -> None:
        """Answer with a problem, unless another answer has begun, and end the connection."""
        if self.transport.is_closing() or self._refused:
            return
        cycle = self._cycle()
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self.transport.write(_raw(problem))
        if cycle is not None and not cycle.response_complete:
            # Whoever waits for the rest of this request learns that it will not come.
            cycle.disconnected = True
            cycle.message_event.set()
        self._linger()

    def _linger(self) -> None:
        """Close our half, and read on for a moment without a look at what comes.

        A socket that is closed with bytes unread is reset, and the client never sees why. Where
        there are too many of them already, that is accepted.
        """
        if self._deadline is not None:
            self._deadline.cancel()
        if len(self.connections) > self._limits.connections + MAX_LINGERING:
            self.transport.close()
            self._await_answer_taken()
            return
        self._refused = True
        self._unset_keepalive_if_required()
        self.transport.write_eof()
        self.flow.resume_reading()
        self._deadline = self.loop.call_later(LINGER_S, self.transport.abort)

    def _cycle(self) -> RequestResponseCycle | None:
        """Return the request that is or was answered last; uvicorn says `None` in another way."""
        return cast("RequestResponseCycle | None", self.cycle)


def _raw(problem: Problem) -> bytes:
    """Write a problem as it goes over the wire, past a parser that may have given up."""
    answer = problem_response(problem)
    answer.headers["connection"] = "close"
    lines = [f"HTTP/1.1 {problem.kind.status} {problem.kind.code}".encode()]
    lines += [name + b": " + value for name, value in answer.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(answer.body)])
