"""The sequencer: committed entries get one global order and leave on `ledger.entries.v1` in it.

Theory. One process at a time (a lease) cuts *windows* of transaction ids. The horizon is the oldest
id that may still be running; a window ends there, so nothing can be committed into it later: no
entry is skipped, however late its transaction commits (fault 47). A window is committed first and
then published in (book, seq) order and marked; killed in between, the same window is published
again, and readers drop what they have by (tenant, seq). Where a window ends depends on timing, the
entries in it never change.

A watermark read from partition p of charges is stored in the transaction of its batch; it leaves to
partition p once its transaction lies below the horizon and everything before the horizon is
published: so after every entry booked before it. Watermarks are facts about completeness, not
entries: they have no index, and after a restart the newest are published again (readers ignore a
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
from typing import TYPE_CHECKING, Final

import msgspec

from hisab_contracts import topics
from hisab_contracts.entries import Entry
from ledger.core.book import PROGRAMME_BOOK
from ledger.store import entries
from runtime.database import transaction_on
from runtime.kafka import Kafka, Message
from runtime.topics import require_equal_counts

if TYPE_CHECKING:
    from runtime.database import Connection

POLL_S: Final = 0.1
PAGE: Final = 2_000
_ENCODER: Final = msgspec.json.Encoder()


class Sequencer:
    """Numbers and publishes entries while this process holds the lease."""

    def __init__(
        self, kafka: Kafka, *, topic: str = topics.ENTRIES, charges: str = topics.CHARGES
    ) -> None:
        """Publish to `topic` through this cluster what was booked from `charges`."""
        self._kafka = kafka
        self._topic = topic
        self._charges = charges
        self._committed = asyncio.Event()
        self._marked_until = 0
        """Watermarks of transactions below this id are out: they are never read again."""
        self._holder: object = None

    def wake(self) -> None:
        """Say that this process has committed something."""
        self._committed.set()

    async def run(self, connection: Connection) -> None:
        """Wait for a commit or the next poll, then publish all that is complete."""
        if self._holder is not connection:
            # A new lease: somebody else may have published less than we once did.
            self._holder = connection
            self._marked_until = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await self._committed.wait()
        self._committed.clear()
        await self.step(connection)

    async def step(self, connection: Connection) -> int:
        """Publish one window, its watermarks after it; returns how many entries it had."""
        last = await entries.last_window(connection)
        if last is not None and not last.is_published:
            await self._publish(connection, last)
        horizon = await entries.horizon_of(connection)
        from_xid = 0 if last is None else last.until_xid
        first_index = 0 if last is None else last.first_index + last.entries
        window = None
        if from_xid < horizon:
            async with transaction_on(connection):
                window = await entries.cut_window(connection, from_xid, horizon, first_index)
        if window is not None:
            await self._publish(connection, window)
        await self._publish_watermarks(connection, horizon)
        return 0 if window is None else window.entries

    async def _publish(self, connection: Connection, window: entries.Window) -> None:
        """Publish a committed window in index order, then mark it."""
        after = ("", 0)
        while True:
            page = await entries.window_entries(connection, window, after, PAGE)
            messages = [
                message_of(entry, trace_id, self._topic)
                for entry, trace_id in page
                if not entry.tenant_id.startswith(PROGRAMME_BOOK)
            ]
            if messages:
                await self._kafka.publish(messages)
            if len(page) < PAGE:
                break
            after = (page[-1][0].tenant_id, page[-1][0].seq)
        async with transaction_on(connection):
            await entries.mark_published(connection, window)

    async def _publish_watermarks(self, connection: Connection, until_xid: int) -> None:
        """Publish each watermark below the horizon to its own partition, once per lease."""
        if until_xid <= self._marked_until:
            return
        due = await entries.watermarks_between(connection, self._marked_until, until_xid)
        if due:
            path = {self._charges, self._topic}
            found = await self._kafka.topics(path)
            if len(found) < len(path):
                return  # One of them is being made: the watermarks stay due.
            require_equal_counts(found)
            await self._kafka.publish(
                [
                    Message(self._topic, key=None, value=message, partition=partition)
                    for partition, message in due
                ]
            )
        self._marked_until = until_xid


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
