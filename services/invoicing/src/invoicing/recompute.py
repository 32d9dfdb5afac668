"""A bill computed again, from the entries, by a process that knows nothing else.

`python -m invoicing.recompute` reads JSON lines: first what the invoice rests on (facts, tax rows,
its position), then single charges, some thousands a line. It computes the bill from those charges,
one by one, where the close let the database sum them: so it is also a second computation. It
answers with the content it arrives at and the hash of its PDF, or says why there is no bill: that
an invoice cannot be computed any more is an answer too, and no failure (`core.differences`).

A fresh process costs a second of a core and its memory, so a service has two at a time
(`RecomputePool`); who waits too long for a place is refused and asks again.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import BinaryIO, Final

import msgspec

from invoicing.core.billing import BillRefused, CurrencyUnknown, RatedUsage, ZeroBill
from invoicing.core.differences import RecomputedDocument
from invoicing.core.document import (
    Content,
    Draft,
    InvoiceFacts,
    SeriesPosition,
    draft_of,
    number_draft,
)
from invoicing.core.tax import TaxMissing, TaxRow
from invoicing.pdf import RenderFailed, Typesetter, pdf_sha256

RECOMPUTE_TIMEOUT_S: Final = 120
RECOMPUTED_AT_ONCE: Final = 2
PLACE_WAIT_S: Final = 10


class RecomputeInput(msgspec.Struct, frozen=True):
    """What an invoice rests on beside its charges."""

    facts: InvoiceFacts
    first_seq: int
    tax_rows: list[TaxRow]
    position: int


class NoInvoice(msgspec.Struct, frozen=True):
    """Why a fresh computation arrives at no invoice: one of these."""

    untaxed: TaxMissing | None
    currency: CurrencyUnknown | None


class Recomputation(msgspec.Struct, frozen=True):
    """What a fresh computation arrives at: a content and its PDF, or why there is none."""

    content: Content | None
    pdf_sha256: str | None
    refused: NoInvoice | None

    def document(self) -> RecomputedDocument | BillRefused:
        """Return what was computed, or the refusal of the bill."""
        if self.content is not None and self.pdf_sha256 is not None:
            return RecomputedDocument(self.content, self.pdf_sha256)
        if self.refused is None:
            raise TypeError("a recomputation comes to a document or to a refusal")
        return self.refused.untaxed or self.refused.currency or ZeroBill()


class RecomputeBusy(Exception):
    """All places are taken, and none became free in time."""


class RecomputePool:
    """The recomputations of a service: a few fresh processes, a bounded wait for a place."""

    def __init__(self, wait_s: float = PLACE_WAIT_S) -> None:
        """Take turns in this process; nothing runs before the first one."""
        self._places = asyncio.Semaphore(RECOMPUTED_AT_ONCE)
        self._wait_s = wait_s

    async def run(
        self, basis: RecomputeInput, charges: AsyncIterator[list[RatedUsage]]
    ) -> Recomputation:
        """Compute an invoice again; raises `RecomputeBusy`, and `RenderFailed` when it cannot."""
        try:
            async with asyncio.timeout(self._wait_s):
                await self._places.acquire()
        except TimeoutError as error:
            raise RecomputeBusy(f"{RECOMPUTED_AT_ONCE} reruns are at work") from error
        try:
            return await recompute(basis, charges)
        finally:
            self._places.release()


async def recompute(
    basis: RecomputeInput, charges: AsyncIterator[list[RatedUsage]]
) -> Recomputation:
    """Compute an invoice again in a fresh process; raises `RenderFailed` when it cannot."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "invoicing.recompute", stdin=PIPE, stdout=PIPE
    )
    into, out = child.stdin, child.stdout
    if into is None or out is None:
        raise RenderFailed("the fresh process has no pipes")
    try:
        async with asyncio.timeout(RECOMPUTE_TIMEOUT_S):
            into.write(msgspec.json.encode(basis) + b"\n")
            async for some in charges:
                into.write(msgspec.json.encode(some) + b"\n")
                # Waits while the child is behind: a month of charges is never held here as a whole.
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
    return msgspec.json.decode(answer, type=Recomputation)


def compute(lines: Iterable[bytes]) -> Recomputation:
    """Do the fresh process's work on its input lines."""
    ahead = iter(lines)
    basis = msgspec.json.decode(next(ahead), type=RecomputeInput)
    facts = basis.facts
    draft = draft_of(facts, basis.first_seq, _charges(ahead), basis.tax_rows)
    if not isinstance(draft, Draft):
        untaxed = draft if isinstance(draft, TaxMissing) else None
        currency = draft if isinstance(draft, CurrencyUnknown) else None
        return Recomputation(None, None, NoInvoice(untaxed, currency))
    at = SeriesPosition(facts.number_series, basis.position)
    content = number_draft(draft, at, facts.issued_on)
    return Recomputation(content, pdf_sha256(Typesetter().pdf_of(content)), None)


def _charges(lines: Iterator[bytes]) -> Iterator[RatedUsage]:
    for line in lines:
        yield from msgspec.json.decode(line, type=list[RatedUsage])


def main(lines: BinaryIO, answer: BinaryIO) -> None:
    """Read what the invoice rests on and its charges, answer with what they come to."""
    answer.write(msgspec.json.encode(compute(lines)))


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
