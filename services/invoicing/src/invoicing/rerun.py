"""A bill computed again, from the entries, by a process that knows nothing else.

`python -m invoicing.rerun` reads JSON lines: first what the invoice rests on (facts, tax rows, its
position), then single charges, some thousands a line. It computes the bill from those charges, one
by one, where the close let the database sum them: so a rerun is also a second computation. It
answers with the hashes of the content and of the PDF it arrives at.

A fresh process costs a second of a core and its memory, so a service has two at a time (`Reruns`);
who waits too long for a place is refused and asks again.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import BinaryIO, Final

import msgspec

from hisab_contracts.canonical import content_sha256
from invoicing.billing import Bill, RatedUsage, bill_of
from invoicing.document import Facts, draft_of, numbered
from invoicing.rendering import Press, RenderFailed
from invoicing.tax import TaxRow, rows_in_force

RERUN_TIMEOUT_S: Final = 120
RERUNS_AT_ONCE: Final = 2
RERUN_WAIT_S: Final = 10


class Ground(msgspec.Struct, frozen=True):
    """What an invoice rests on beside its charges."""

    facts: Facts
    tax_rows: list[TaxRow]
    position: int


class Rerun(msgspec.Struct, frozen=True):
    """What a fresh computation arrives at."""

    content_sha256: str
    pdf_sha256: str


class RerunBusy(Exception):
    """All places are taken, and none became free in time."""


class Reruns:
    """The reruns of a service: a few fresh processes at a time, a bounded wait for a place."""

    def __init__(self, wait_s: float = RERUN_WAIT_S) -> None:
        """Take turns in this process; nothing runs before the first rerun."""
        self._places = asyncio.Semaphore(RERUNS_AT_ONCE)
        self._wait_s = wait_s

    async def run(self, ground: Ground, charges: AsyncIterator[list[RatedUsage]]) -> Rerun:
        """Compute an invoice again; raises `RerunBusy`, and `RenderFailed` when it cannot."""
        try:
            async with asyncio.timeout(self._wait_s):
                await self._places.acquire()
        except TimeoutError as error:
            raise RerunBusy(f"{RERUNS_AT_ONCE} reruns are at work") from error
        try:
            return await rerun(ground, charges)
        finally:
            self._places.release()


async def rerun(ground: Ground, charges: AsyncIterator[list[RatedUsage]]) -> Rerun:
    """Compute an invoice again in a fresh process; raises `RenderFailed` when it cannot."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "invoicing.rerun", stdin=PIPE, stdout=PIPE
    )
    into, out = child.stdin, child.stdout
    if into is None or out is None:
        raise RenderFailed("the fresh process has no pipes")
    try:
        async with asyncio.timeout(RERUN_TIMEOUT_S):
            into.write(msgspec.json.encode(ground) + b"\n")
            async for some in charges:
                into.write(msgspec.json.encode(some) + b"\n")
                await into.drain()
            into.close()
            answer = await out.read()
            status = await child.wait()
    except (OSError, TimeoutError) as error:
        raise RenderFailed(f"the fresh process ended: {error!r}") from error
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if status != 0:
        raise RenderFailed("the fresh process failed; its reason is in the service's log")
    return msgspec.json.decode(answer, type=Rerun)


def compute(lines: Iterable[bytes]) -> Rerun:
    """Do the fresh process's work on its input lines."""
    ahead = iter(lines)
    ground = msgspec.json.decode(next(ahead), type=Ground)
    facts = ground.facts
    rows = rows_in_force(ground.tax_rows, facts.tax_point_on, facts.tax_version)
    bill = bill_of(_charges(ahead), rows, facts.tax_point_on)
    if not isinstance(bill, Bill):
        raise TypeError(f"an invoice was issued where there is none: {bill}")
    content = numbered(draft_of(facts, bill), facts.place(ground.position))
    pdf = Press().pdf_of(content)
    return Rerun(content_sha256(content), _sha256(pdf))


def _charges(lines: Iterator[bytes]) -> Iterator[RatedUsage]:
    for line in lines:
        yield from msgspec.json.decode(line, type=list[RatedUsage])


def _sha256(pdf: bytes) -> str:
    return hashlib.sha256(pdf).hexdigest()


def main(reading: BinaryIO, writing: BinaryIO) -> None:
    """Read the ground and the charges, answer with the hashes."""
    writing.write(msgspec.json.encode(compute(reading)))


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
