"""Batches: records in, coverage, charges and quarantine out, in the caller's transaction.

`meter_records` is the one way for all records: those new from Kafka come through `metering.ingest`,
those out of quarantine through `metering.replay`. It loads, has the engine decide, saves, and
writes what is published to the outbox: one `BucketTotal` per bucket whose total has changed, one
notice per record that is new in quarantine. A record that changes nothing leaves nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from hisab_contracts.ids import QuarantineId
from hisab_contracts.quarantine import QuarantineNotice
from hisab_contracts.topics import CHARGES, QUARANTINE
from metering.core import engine
from metering.core.batch import (
    CorrectionOrder,
    MeteredBucket,
    MeteringBatch,
    Reference,
    UsageRecord,
)
from metering.store import quarantine, state
from metering.store.quarantine import OpenedQuarantine
from metering.store.state import ReferenceCache
from runtime.kafka import Message
from runtime.outbox import Outbox

if TYPE_CHECKING:
    from runtime.database import Connection

T = TypeVar("T")

THREAD_ABOVE_RECORDS: Final = 500
"""Batches up to this size are decided on the event loop: they hold it for a few milliseconds."""


async def meter_records(
    connection: Connection,
    outbox: Outbox,
    cache: ReferenceCache,
    reference: Reference,
    records: Sequence[UsageRecord],
    *,
    because: str = "",
    max_rows: int = engine.MAX_ROWS,
) -> list[OpenedQuarantine]:
    """Meter records in order, in the caller's transaction, as many at a time as memory allows.

    `reference` was loaded in this transaction, from the cache. `because` is why records out of
    quarantine are judged again. What becomes of each of them stands in the quarantine afterwards:
    it is released, or it stays open. Returns the records that are new in quarantine.
    """
    all_opened: list[OpenedQuarantine] = []
    # All rounds in one transaction: progress is stored for the whole Kafka batch, so a part of it
    # that was stored alone would be read, and counted, again.
    while records:
        prepare = partial(engine.prepare, records, reference, max_rows=max_rows)
        batch = await _decide(prepare, len(records))
        if batch.unknown_tenants:
            more = await state.look_up_tenants(connection, cache, reference, batch.unknown_tenants)
            if more is not reference:
                reference = more
                continue  # Prepare again: what these tenants used can be rated now.
        all_opened += await _meter(connection, outbox, batch, because)
        records = records[batch.record_count :]
    return all_opened


async def meter_approved(
    connection: Connection,
    outbox: Outbox,
    cache: ReferenceCache,
    reference: Reference,
    approved: Sequence[CorrectionOrder],
) -> None:
    """Let corrections count that operators have approved, in the caller's transaction.

    What keeps one from counting stands where it is kept, afterwards.
    """
    batch = engine.prepare((), reference, approved=approved)
    if batch.unknown_tenants:
        more = await state.look_up_tenants(connection, cache, reference, batch.unknown_tenants)
        batch = engine.prepare((), more, approved=approved)
    await _meter(connection, outbox, batch, "")


async def _meter(
    connection: Connection, outbox: Outbox, batch: MeteringBatch, because: str
) -> list[OpenedQuarantine]:
    """Meter one prepared batch: load, decide, save, and write what is published."""
    stored = await state.load_state(connection, batch)
    changes = await _decide(partial(engine.meter, batch, stored), batch.record_count)
    await state.save_changes(connection, changes)
    messages = [_total_message(bucket) for bucket in changes.buckets if bucket.is_stated]
    opened: list[OpenedQuarantine] = []
    if changes.quarantined or changes.still_quarantined or changes.released_ids:
        generation = batch.reference.generation
        opened = await quarantine.save_quarantine(connection, changes, generation, because)
        messages += map(_notice_message, opened)
    await outbox.write(connection, messages)
    return opened


async def _decide(decide: Callable[[], T], record_count: int) -> T:
    """Run a pure step of the engine without keeping the event loop from its other work.

    A full batch takes 30 to 300 ms. Meanwhile this process must answer HTTP, fetch the next batch
    and publish. The steps are functions of values alone, so a thread may run them: Python then
    changes between the two every 5 ms. Nobody else touches these values until the step has ended.
    For small batches the change of threads would cost more than the step, and latency counts there.
    """
    if record_count <= THREAD_ABOVE_RECORDS:
        return decide()
    return await asyncio.to_thread(decide)


def _total_message(bucket: MeteredBucket) -> Message:
    total = bucket.total
    value = msgspec.json.encode(total)
    return Message(CHARGES, total.tenant_id.encode(), value, bucket.trace)


def _notice_message(opened: OpenedQuarantine) -> Message:
    record = opened.quarantined.record
    notice = QuarantineNotice(
        quarantine_id=QuarantineId(str(opened.quarantine_id)),
        reason=opened.quarantined.cause.reason,
        hub=record.hub,
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        value_sha256=opened.value_sha256,
    )
    return Message(QUARANTINE, record.hub.encode(), msgspec.json.encode(notice), record.trace)
