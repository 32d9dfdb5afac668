"""Replay: quarantined records are judged again, by the service or by an operator.

A record that lacked a fact (a tenant, a price line) is judged again by the service when the fact
has arrived; an operator may have any open record judged again, and vouches then that what it says
of the future has come to pass. Both go the way every record goes (`batches.meter_records`), so a
replay is safe beside the consumers: coverage decides, and whatever was billed meanwhile is a
duplicate. Lateness is judged once, when a record first arrives: a replay is never too late.

Refusals: `QuarantineClosed` for each record that is no longer open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace

from metering.batches import meter_records
from metering.core.batch import UsageRecord
from metering.core.quarantine import QuarantineClosed, refuse_closed
from metering.store import quarantine, state
from metering.store.state import ReferenceCache
from runtime.outbox import Outbox
from runtime.telemetry import TRACEPARENT

if TYPE_CHECKING:
    from runtime.database import Connection


async def replay_quarantined(
    connection: Connection,
    outbox: Outbox,
    cache: ReferenceCache,
    quarantine_ids: Sequence[int],
    because: str,
    replayed_ms: int | None = None,
) -> list[QuarantineClosed]:
    """Judge quarantined records again in this transaction; return those that were not open.

    `replayed_ms` is the present when an operator replays them; None when the service releases them.
    """
    # Locked before they are judged: a second replay waits here, and then finds them closed.
    locked = await quarantine.lock_quarantined(connection, quarantine_ids)
    closed = [
        refused
        for found in locked
        if (refused := refuse_closed(found.quarantine_id, found.state)) is not None
    ]
    closed_ids = {refused.quarantine_id for refused in closed}
    records = [
        _requeued(found.record, replayed_ms)
        for found in locked
        if found.quarantine_id not in closed_ids
    ]
    reference = await state.load_reference(connection, cache)
    await meter_records(connection, outbox, cache, reference, records, because=because)
    return closed


def _requeued(record: UsageRecord, replayed_ms: int | None) -> UsageRecord:
    # The trace of who produced it, not of who replays it: one trace leads from event to charge.
    trace = [header for header in record.headers if header[0] == TRACEPARENT][:1]
    return replace(record, trace=trace, replayed_ms=replayed_ms)
