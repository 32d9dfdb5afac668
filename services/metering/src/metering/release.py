"""Release: quarantined records are judged again, by the service or by an operator.

What waited for a fact (a tenant, a price line) is judged again by the service when the fact has
arrived; an operator may have any open record judged again, and vouches then that what it says of
the future has come to pass. Both go the way every record goes (`settling`), so a release is safe
beside the consumers: coverage decides, and whatever was billed meanwhile is a duplicate. Lateness
is judged once, when a record first arrives: a release is never too late.

Refusals: `Closed` when a record is no longer open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from metering import store, waiting
from metering.reading import Facts, Origin, Reading
from metering.settling import Paper, settle_all
from metering.store import Known
from metering.waiting import Payload, Stored
from runtime.kafka import Headers
from runtime.streams import Outbox
from runtime.telemetry import TRACEPARENT

if TYPE_CHECKING:
    from runtime.database import Connection


@dataclass(frozen=True, slots=True)
class Closed:
    """The record was released or dismissed before."""

    quarantine_id: int
    state: str


async def judge_again(
    connection: Connection,
    outbox: Outbox,
    known: Known,
    quarantine_ids: Sequence[int],
    because: str,
    vouched_ms: int | None = None,
) -> list[Closed]:
    """Judge quarantined records again in this transaction; return those that were not open.

    `vouched_ms` is the present, when an operator vouches for what the records say of the future.
    """
    stored = await waiting.lock_quarantined(connection, quarantine_ids)
    closed = [Closed(one.prior.quarantine_id, one.state) for one in stored if one.state != "open"]
    records = [one for one in stored if one.state == "open"]
    await store.share_prices(connection)
    facts = await store.load_facts(connection, known)
    read = partial(_read, facts, vouched_ms)
    paper = _paper(records, known.generation)
    still = await settle_all(connection, known, records, read, outbox, paper)
    released = [one.prior.quarantine_id for one in records if one.prior.quarantine_id not in still]
    if released:
        await waiting.release(connection, released, because)
    return closed


async def _read(facts: Facts, vouched_ms: int | None, records: Sequence[Stored]) -> Reading:
    reading = Reading(facts)
    for one in records:
        spoken_ms = one.origin.record_ms
        if vouched_ms is not None:
            spoken_ms = max(spoken_ms, vouched_ms)
        reading.take(one.origin, one.payload.value, one.payload.headers, one.prior, spoken_ms)
        if reading.is_full:
            break
    return reading


def _paper(records: Sequence[Stored], generation: int) -> Paper:
    by_place = {one.origin: one.payload for one in records}

    def payload_of(origin: Origin) -> Payload:
        return by_place[origin]

    def traced(origin: Origin) -> Headers:
        return [header for header in by_place[origin].headers if header[0] == TRACEPARENT][:1]

    return Paper(payload_of, traced, generation)
