"""Answers that are sent as they are made: whole lists, in bounded memory.

Theory. A list is made piece by piece, and the next piece is made when the last one was taken. What
fails before the first piece is there is still answered with a problem; later only a broken
connection can say so, and the reader of a chunked answer sees that its end is missing. Whoever does
not take a piece within `TAKE_S` loses the connection: what makes the list may hold a snapshot of
the database, which ends a transaction that stands idle for longer. So few streams run at a time.

Refusals: `Problem` 429 beyond `MAX_STREAMS`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from starlette.requests import Request
from starlette.responses import Response

from runtime.http import Problem

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

TAKE_S: Final = 10
"""How long a client may take for one piece: less than a transaction may stand idle."""
MAX_STREAMS: Final = 4
"""How many lists one resource sends at a time: fewer than its pool has connections."""

CSV: Final = "text/csv"
LINES: Final = "application/x-ndjson"


def accepted_form(request: Request, forms: Sequence[str]) -> str | None:
    """Return the first of the forms that the request accepts by name; None: none of them."""
    accepted = {
        entry.partition(";")[0].strip().lower()
        for entry in request.headers.get("accept", "").split(",")
    }
    return next((form for form in forms if form in accepted), None)


class Streams:
    """The lists that one resource sends at a time."""

    def __init__(self, *, take_s: int = TAKE_S) -> None:
        """None runs yet; a client has `take_s` to take a piece."""
        self._running = 0
        self._take_s = take_s

    def response(
        self, pieces: AsyncGenerator[bytes, None], media_type: str, headers: Mapping[str, str]
    ) -> Response:
        """Answer with these pieces, one after another, or with `Problem` 429."""
        return _StreamResponse(self._counted(pieces), media_type, headers, self._take_s)

    async def _counted(self, pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        if self._running >= MAX_STREAMS:
            raise Problem(
                "too-many-requests", f"{MAX_STREAMS} lists are being sent; ask again, or by page"
            )
        self._running += 1
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    yield piece
        finally:
            self._running -= 1


class _StreamResponse(Response):
    """A response whose body is made while it is sent."""

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        media_type: str,
        headers: Mapping[str, str],
        take_s: int,
    ) -> None:
        super().__init__(headers=headers, media_type=media_type)
        # Its length is not known: it is sent in chunks.
        del self.headers["content-length"]
        self._pieces = pieces
        self._take_s = take_s

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_gone(receive))
        try:
            async with contextlib.aclosing(self._pieces):
                # Made before anything is sent: until then a failure is a problem.
                first = await anext(self._pieces, b"")
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
                async for piece in _after(first, self._pieces):
                    if gone.done():
                        return
                    async with asyncio.timeout(self._take_s):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()


async def _gone(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def _after(first: bytes, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in pieces:
        yield piece
