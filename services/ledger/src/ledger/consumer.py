"""Charges into books, and reference data: what the ledger does with what it hears.

Theory. One batch of `metering.charges.v1` is one transaction: the books it speaks of are locked in
id order, everything is loaded once, every message is decided in memory in the order in which it
came, and everything is written once. A redelivered batch books nothing, because totals that are not
newer enter nothing; progress is advanced in the same transaction.

A message that cannot be booked stops nobody: it is parked with its bytes and the reason, shown in
the log and by `python -m ledger audit`. Reasons: `unknown-tenant` (the ledger owns the tenants, so
metering cannot rate another), `out-of-range` (the book would pass 64 bits), `refund` (later issue).
A message that cannot be read is a defect between our own services: the consumer stops there.

The trace that a message carries is kept beside its entry as telemetry and leaves with it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, assert_never

import msgspec
import structlog

from hisab_contracts import topics
from hisab_contracts.charges import AllocationFinal, BucketTotal, HubWatermark, read_charge
from hisab_contracts.entries import EntryWatermark
from hisab_contracts.reference import PriceLine
from ledger import registry
from ledger.book import Bucket
from ledger.decisions import ReleaseHold
from ledger.feed import keep_watermarks
from ledger.store import OpenBooks, load_buckets, load_holds, load_holds_of_allocations, open_books
from runtime import telemetry
from runtime.database import after_commit

if TYPE_CHECKING:
    from runtime.database import Connection
    from runtime.records import Record
    from runtime.streams import Batch

_log = structlog.get_logger("ledger.consumer")


class Intake:
    """Books charges. `committed` is called after each batch that may have entered something."""

    def __init__(self, committed: Callable[[], None]) -> None:
        self._committed = committed

    async def charges(self, batch: Batch, connection: Connection) -> None:
        """Book one batch inside its transaction."""
        messages = [(record, read_charge(record.value or b"")) for record in batch.records]
        totals = [said for _, said in messages if isinstance(said, BucketTotal)]
        finals = [said for _, said in messages if isinstance(said, AllocationFinal)]
        books = await _open(connection, totals, finals)
        now_ms = time.time_ns() // 1_000_000
        parked: list[registry.Parked] = []
        watermarks: dict[tuple[int, str], EntryWatermark] = {}
        for record, said in messages:
            match said:
                case BucketTotal():
                    reason = _book_total(books, said, record, now_ms)
                    if reason is not None:
                        parked.append(_parked(record, reason))
                case AllocationFinal():
                    _end_holds(books, said, now_ms)
                case HubWatermark():
                    mark = _entry_watermark(said)
                    kept = watermarks.get((record.partition, said.hub))
                    if kept is None or kept.revision < mark.revision:
                        watermarks[record.partition, said.hub] = mark
                case _:
                    assert_never(said)
        await books.save(connection)
        await registry.park(connection, parked)
        await keep_watermarks(
            connection, [(partition, mark) for (partition, _), mark in watermarks.items()]
        )
        after_commit(self._committed)

    async def prices(self, batch: Batch, connection: Connection) -> None:
        """Keep a copy of the price lines: a hold may be asked for as GPUs and a duration."""
        lines = [
            msgspec.json.decode(record.value, type=PriceLine)
            for record in batch.records
            if record.value is not None
        ]
        await registry.keep_price_lines(connection, lines)


async def _open(
    connection: Connection, totals: list[BucketTotal], finals: list[AllocationFinal]
) -> OpenBooks:
    """Lock and load what a batch speaks of: books first, then what their locks protect."""
    tenants = {total.tenant_id for total in totals} | {final.tenant_id for final in finals}
    if not tenants:
        return OpenBooks({})
    books = await open_books(connection, tenants)
    buckets = await load_buckets(connection, totals)
    if any(_went_down(buckets, total) for total in totals):
        # Credit may return to a lot that is spent: this transaction holds the locks already.
        books = await open_books(connection, tenants, spent_lots=True)
    books.buckets = buckets
    books.holds = await load_holds(
        connection,
        [(total.tenant_id, total.hold_id) for total in totals if total.hold_id is not None],
    )
    ending = [(final.tenant_id, final.hub, final.allocation_id) for final in finals]
    for key, holds in (await load_holds_of_allocations(connection, ending)).items():
        books.holds |= {(key[0], hold.hold_id): hold for hold in holds}
        books.waiting[key] = [hold.hold_id for hold in holds]
    return books


def _went_down(buckets: Mapping[tuple[str, str], Bucket], total: BucketTotal) -> bool:
    bucket = buckets.get((total.tenant_id, total.bucket_id))
    return bucket is not None and total.revision > bucket.revision


def _book_total(books: OpenBooks, total: BucketTotal, record: Record, now_ms: int) -> str | None:
    """Enter one bucket's new total; return why it cannot be booked, if so."""
    if total.tenant_id not in books.books:
        return "unknown-tenant"
    if total.refunded_micro:
        return "refund"
    decided = books.enter(
        total.tenant_id,
        total,
        now_ms,
        bucket_id=total.bucket_id,
        hold_id=total.hold_id,
        trace_id=_trace_id(record),
    )
    return None if isinstance(decided, tuple) else "out-of-range"


def _trace_id(record: Record) -> str | None:
    """Return the id of the trace that a message carries: 32 hexadecimal digits."""
    traceparent = telemetry.trace_of(record) if record.headers else None
    return None if traceparent is None else traceparent.split("-")[1]


def _end_holds(books: OpenBooks, final: AllocationFinal, now_ms: int) -> None:
    """Release the open holds that waited for this allocation's end."""
    tenant_id = final.tenant_id
    for hold_id in books.waiting.get((tenant_id, final.hub, final.allocation_id), ()):
        if books.holds[tenant_id, hold_id].end is None:
            command = ReleaseHold("final", f"final:{final.hub}/{final.allocation_id}", "metering")
            books.enter(tenant_id, command, now_ms, hold_id=hold_id)


def _entry_watermark(said: HubWatermark) -> EntryWatermark:
    return EntryWatermark(
        hub=said.hub,
        revision=said.revision,
        watermark_ms=said.watermark_ms,
        silent=said.silent,
        quarantined=said.quarantined,
        behind=said.behind,
    )


def _parked(record: Record, reason: str) -> registry.Parked:
    _log.error(
        "charge parked",
        reason=reason,
        topic=record.topic or topics.CHARGES,
        partition=record.partition,
        offset=record.offset,
    )
    return registry.Parked(
        record.topic, record.partition, record.offset, reason, record.value or b""
    )
