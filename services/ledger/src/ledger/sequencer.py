"""The sequencer: committed entries get one global order and leave on `ledger.entries.v1` in it.

Theory. One process at a time (a lease) cuts *windows* of transaction ids. The horizon is the oldest
id that may still be running; a window ends there, so nothing can be committed into it later: no
entry is skipped, however late its transaction commits (fault 47). Where more entries wait than a
window takes it ends earlier, so that a day's backlog is published in as much memory as a second's.
A window is committed first and then published in (book, seq) order and marked; killed in between,
the same window is published again, and readers drop what they have by (tenant, seq). Where a window
ends depends on timing, the entries in it never change.

A watermark read from partition p of charges is stored in the transaction of its batch; it leaves to
partition p once everything up to its transaction is published: so after every entry booked before
it. Of those that are ready the newest leaves; one that is not ready never stands in front of an
older one that is, or with transactions that overlap for ever none would leave. Watermarks are facts
about completeness, not entries: they have no index, and one may come twice (readers ignore a
revision they know).

A tenant's charges and entries must have the same partition number, or a watermark would overtake
the entries it speaks of: before one leaves, both topics are asked how many partitions they have.

Refusals: `PartitionMismatch`, and the process ends.

Books of programmes are numbered like the others but not published: nobody downstream reads them
until funders' statements are built.

It wakes when this process commits, and polls for what other processes commit.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import msgspec

from hisab_contracts import topics
from hisab_contracts.entries import Entry
from ledger.core.book import PROGRAMME_BOOK
from ledger.store import sequence
from runtime.database import transaction_on
from runtime.kafka import Kafka, Message
from runtime.topics import require_equal_counts

if TYPE_CHECKING:
    from runtime.database import Connection

POLL_S: Final = 0.1
WINDOW_ENTRIES: Final = 5_000
"""Enough to share what a window costs, little enough to be held in memory and published at once."""
_ENCODER: Final = msgspec.json.Encoder()


class Sequencer:
    """Numbers and publishes entries while this process holds the lease."""

    def __init__(
        self,
        kafka: Kafka,
        *,
        topic: str = topics.ENTRIES,
        charges: str = topics.CHARGES,
        most: int = WINDOW_ENTRIES,
    ) -> None:
        """Publish to `topic` what was booked from `charges`, at most so many entries at a time."""
        self._kafka = kafka
        self._topic = topic
        self._charges = charges
        self._most = most
        self._committed = asyncio.Event()
        self._is_behind = False
        """The last window ended before the horizon: the next one is cut at once."""

    def wake(self) -> None:
        """Say that this process has committed something."""
        self._committed.set()

    async def run(self, connection: Connection) -> None:
        """Wait for a commit or the next poll, unless more waits already; then publish a window."""
        if not self._is_behind:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._committed.wait()
        self._committed.clear()
        await self.step(connection)

    async def step(self, connection: Connection) -> int:
        """Publish one window, its watermarks after it; returns how many entries it had."""
        last = await sequence.last_window(connection)
        if last is not None and not last.is_published:
            await self._publish(connection, last)
        horizon = await sequence.horizon_of(connection)
        from_xid = 0 if last is None else last.until_xid
        first_index = 0 if last is None else last.first_index + last.entries
        window = None
        if from_xid < horizon:
            async with transaction_on(connection):
                window = await sequence.cut_window(
                    connection, from_xid, horizon, first_index, self._most
                )
        if window is not None:
            await self._publish(connection, window)
        # Up to where everything is out: the horizon, or the end of a window that stopped short.
        until_xid = horizon if window is None else window.until_xid
        self._is_behind = until_xid < horizon
        await self._publish_watermarks(connection, until_xid)
        return 0 if window is None else window.entries

    async def _publish(self, connection: Connection, window: sequence.Window) -> None:
        """Publish a committed window in index order, then mark it."""
        messages = [
            message_of(entry, trace_id, self._topic)
            for entry, trace_id in await sequence.window_entries(connection, window)
            if not entry.tenant_id.startswith(PROGRAMME_BOOK)
        ]
        places = await self._kafka.publish(messages) if messages else ()
        async with transaction_on(connection):
            await sequence.mark_published(connection, window)
            await sequence.keep_positions(connection, self._topic, _behind(places))

    async def _publish_watermarks(self, connection: Connection, until_xid: int) -> None:
        """Publish the newest of these watermarks to its own partition, then forget it and older."""
        due = await sequence.due_watermarks(connection, until_xid)
        if not due:
            return
        path = {self._charges, self._topic}
        found = await self._kafka.topics(path)
        if len(found) < len(path):
            return  # One of them is being made: the watermarks stay due.
        require_equal_counts(found)
        places = await self._kafka.publish(
            [
                Message(self._topic, key=None, value=message, partition=partition)
                for partition, message in due
            ]
        )
        async with transaction_on(connection):
            await sequence.forget_watermarks(connection, until_xid)
            await sequence.keep_positions(connection, self._topic, _behind(places))


def _behind(places: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Return the offset behind the last of these (partition, offset), per partition."""
    until: dict[int, int] = {}
    for partition, offset in places:
        until[partition] = max(until.get(partition, 0), offset + 1)
    return until


def message_of(entry: Entry, trace_id: str | None, topic: str = topics.ENTRIES) -> Message:
    """Write an entry as it leaves: keyed by tenant, in the trace of what it came from.

    It has no null members, so that whoever reads it can hash what was hashed (decision 0009).
    """
    headers: tuple[tuple[str, bytes], ...] = ()
    if trace_id is not None:
        # The entry is a span of that trace; its hash names it.
        headers = (("traceparent", f"00-{trace_id}-{entry.hash[:16]}-01".encode()),)
    key, value = entry.tenant_id.encode(), _ENCODER.encode(entry)
    return Message(topic, key=key, value=value, headers=headers)
