"""A service as its clients see it: it answers as planned, or loses the connection instead."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

LOST = None
"""The request was taken, and the connection ends without an answer."""
Answer = tuple[int, dict[str, str | None]]


@dataclass
class Service:
    """A service as its clients see it: it answers as planned, each request in its turn."""

    planned: list[Answer | None]
    url: str = ""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Method and path, and the idempotency key."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer on a kept connection until an answer is lost."""
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode().lower():
                lines = head.splitlines()
                headers = dict(line.split(": ", 1) for line in lines[1:] if line)
                await reader.readexactly(int(headers.get("content-length", "0")))
                what = " ".join(lines[0].split()[:2])
                self.asked.append((what, headers.get("idempotency-key")))
                answer = self.planned.pop(0)
                if answer is LOST:
                    return
                status, content = answer
                body = json.dumps(content)
                writer.write(
                    f"HTTP/1.1 {status} x\r\ncontent-type: application/json\r\n"
                    f"retry-after: 0\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
                )
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def service_of(planned: Sequence[Answer | None]) -> AsyncIterator[Service]:
    """Run a service on a port of its own."""
    service = Service(list(planned))
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
    service.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield service
    finally:
        server.close()
