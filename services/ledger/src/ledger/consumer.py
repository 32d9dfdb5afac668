"""Charges into books, and price lines: what the ledger does with what it reads from Kafka.

Theory. One batch of `metering.charges.v1` is one transaction: the books it speaks of are locked in
id order, everything is loaded once, every message is decided in memory in the order in which it
came, and everything is written once. A redelivered batch books nothing, because totals that are not
newer enter nothing; progress is advanced in the same transaction.

A message that cannot be booked stops nobody: it is parked with its bytes and the reason, shown in
the log and by `python -m ledger audit`. Reasons: `unknown-tenant` (the ledger owns the tenants, so
metering cannot rate another), `refund` (more than the bucket costs), `out-of-range` (the book would
pass 64 bits). A message that cannot be read is a defect between our own services: the consumer
stops there.

The trace that a message carries is kept beside its entry as telemetry and leaves with it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

import msgspec
import structlog

from hisab_contracts import topics
from hisab_contracts.charges import AllocationFinal, BucketTotal, HubWatermark, read_charge
from hisab_contracts.entries import EntryWatermark
from hisab_contracts.invariants import InvariantBroken
from hisab_contracts.reference import PriceLine
from ledger.core.charges import RefundAboveTotal, TotalOutOfRange
from ledger.core.decisions import BookRefusal, NotFound
from ledger.store import books, directory, entries, sequence
from ledger.store.entries import ParkedCharge
from runtime import telemetry
from runtime.clock import now_ms
from runtime.database import after_commit

if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.clock import Clock
    from runtime.consumer import Batch
    from runtime.database import Connection
    from runtime.records import Record

_log = structlog.get_logger("ledger.consumer")


class ChargeConsumer:
    """Books charges. `committed` is called after each batch that may have entered something."""

    def __init__(self, committed: Callable[[], None], clock: Clock = now_ms) -> None:
        self._committed = committed
        self._clock = clock

    async def book_charges(self, batch: Batch, connection: Connection) -> None:
        """Book one batch inside its transaction."""
        messages = [(record, read_charge(record.value or b"")) for record in batch.records]
        totals = [message for _, message in messages if isinstance(message, BucketTotal)]
        finals = [message for _, message in messages if isinstance(message, AllocationFinal)]
        # Placed by key: a tenant's messages come through one partition.
        partitions: dict[str, int] = {
            message.tenant_id: record.partition
            for record, message in messages
            if not isinstance(message, HubWatermark)
        }
        unit = await books.open_for_charges(connection, totals, finals, self._clock, partitions)
        parked: list[ParkedCharge] = []
        watermarks: dict[tuple[int, str], EntryWatermark] = {}
        for record, message in messages:
            match message:
                case BucketTotal():
                    entered = unit.enter(message.tenant_id, message, trace_id=_trace_id(record))
                    if not isinstance(entered, tuple):
                        parked.append(_parked(record, _reason_of(entered)))
                case AllocationFinal():
                    unit.release_final(message)
                case HubWatermark():
                    # Only the newest of each hub counts: it says all that older ones did.
                    kept = watermarks.get((record.partition, message.hub))
                    if kept is None or kept.revision < message.revision:
                        watermarks[record.partition, message.hub] = _entry_watermark(message)
                case _:
                    assert_never(message)
        await books.save(connection, unit.changes())
        await entries.park_charges(connection, parked)
        await sequence.keep_watermarks(
            connection,
            [(partition, watermark) for (partition, _), watermark in watermarks.items()],
        )
        # Also where nothing was entered: a watermark alone has to leave as soon.
        after_commit(self._committed)


async def keep_prices(batch: Batch, connection: Connection) -> None:
    """Keep a copy of the price lines: a hold may be asked for as GPUs and a duration."""
    lines = [
        msgspec.json.decode(record.value, type=PriceLine)
        for record in batch.records
        if record.value is not None
    ]
    await directory.keep_price_lines(connection, lines)


def _trace_id(record: Record) -> str | None:
    """Return the id of the trace that a message carries: 32 hexadecimal digits."""
    traceparent = telemetry.trace_of(record) if record.headers else None
    return None if traceparent is None else traceparent.split("-")[1]


def _entry_watermark(watermark: HubWatermark) -> EntryWatermark:
    return EntryWatermark(
        hub=watermark.hub,
        revision=watermark.revision,
        watermark_ms=watermark.watermark_ms,
        silent=watermark.silent,
        quarantined=watermark.quarantined,
        behind=watermark.behind,
        reconciled=watermark.reconciled,
    )


def _reason_of(refusal: BookRefusal) -> str:
    match refusal:
        case NotFound():
            return "unknown-tenant"
        case RefundAboveTotal():
            return "refund"
        case TotalOutOfRange():
            return "out-of-range"
        case _:
            raise InvariantBroken(f"a charge is never refused so: {refusal}")


def _parked(record: Record, reason: str) -> ParkedCharge:
    _log.error(
        "charge parked",
        reason=reason,
        topic=record.topic or topics.CHARGES,
        partition=record.partition,
        offset=record.offset,
    )
    return ParkedCharge(
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        reason=reason,
        message=record.value or b"",
    )
