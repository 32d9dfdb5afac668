"""Replay: quarantined records are judged again, by the service or by an operator, or dismissed.

What waited for a fact (a tenant, a price line) is judged again by the service when the fact has
arrived; an operator may have any open record judged again, and vouches then that what it says of
the future has come to pass. Both go the way every record goes (`ingest.meter_records`), so a replay
is safe beside the consumers: coverage decides, and whatever was billed meanwhile is a duplicate.
Lateness is judged once, when a record first arrives: a replay is never too late.

Refusals: `QuarantineClosed` when a record is no longer open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from metering.core.batch import UsageRecord
from metering.ingest import meter_records
from metering.store import quarantine, state
from metering.store.state import ReferenceCache
from runtime.outbox import Outbox
from runtime.telemetry import TRACEPARENT

if TYPE_CHECKING:
    from runtime.database import Connection

OPEN: Final = "open"


@dataclass(frozen=True, slots=True)
class QuarantineClosed:
    """The record was released or dismissed before."""

    quarantine_id: int
    state: str


async def replay_quarantined(
    connection: Connection,
    outbox: Outbox,
    cache: ReferenceCache,
    quarantine_ids: Sequence[int],
    because: str,
    vouched_ms: int | None = None,
) -> list[QuarantineClosed]:
    """Judge quarantined records again in this transaction; return those that were not open.

    `vouched_ms` is the present, when an operator vouches for what the records say of the future.
    """
    # Locked before they are judged: a second replay waits here, and then finds them closed.
    locked = await quarantine.lock_quarantined(connection, quarantine_ids)
    records = [_requeued(found.record, vouched_ms) for found in locked if found.state == OPEN]
    reference = await state.load_reference(connection, cache)
    await meter_records(connection, outbox, cache, reference, records, because=because)
    return [
        QuarantineClosed(found.quarantine_id, found.state)
        for found in locked
        if found.state != OPEN
    ]


async def dismiss_quarantined(
    connection: Connection, quarantine_id: int, because: str
) -> QuarantineClosed | None:
    """Leave an open record in quarantine for good; its time blocks no period any more."""
    found = await quarantine.lock_state(connection, quarantine_id)
    if found != OPEN:
        return QuarantineClosed(quarantine_id, found)
    await quarantine.dismiss_quarantined(connection, quarantine_id, because)
    return None


def _requeued(record: UsageRecord, vouched_ms: int | None) -> UsageRecord:
    # The trace of who produced it, not of who replays it: one trace leads from event to charge.
    trace = [header for header in record.headers if header[0] == TRACEPARENT][:1]
    return replace(record, trace=trace, vouched_ms=vouched_ms)
