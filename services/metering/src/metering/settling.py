"""Settling: one reading, taken into the tables and stated downstream, in the caller's transaction.

Whoever meters comes through here, a batch from Kafka and a release from quarantine alike: the same
locks, the same decisions, the same statements. What leaves is written to the outbox with the facts:
one `BucketTotal` per bucket that was filled, one notice per record that begins to wait or now waits
for another reason. A record that changes nothing leaves nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from hisab_contracts.topics import CHARGES, QUARANTINE
from metering import store, waiting
from metering.accounts import Accounts, DeviceKey, Quarantined, total_of
from metering.coverage import DAY_MS, DeviceCoverage
from metering.hearing import hear
from metering.reading import Bucket, Job, Origin, Reading, device_spans, missing_tenants
from metering.waiting import Opened, Payload
from runtime.kafka import Headers, Message
from runtime.streams import Outbox

if TYPE_CHECKING:
    from runtime.database import Connection

R = TypeVar("R")

MAX_ROWS: Final = 20_000
"""Device-days and bucket-hours taken into memory at once."""

JOBS_PER_TURN: Final = 500
"""Jobs metered before other work of the process has its turn."""


@dataclass(frozen=True, slots=True)
class Paper:
    """What settling needs beside the reading: where records' bytes and traces are found."""

    payload_of: Callable[[Origin], Payload]
    trace_of: Callable[[Origin], Headers]
    """Headers that carry the trace of a record on."""
    generation: int
    """The newest price line the reading was judged by."""


class QuarantineNotice(msgspec.Struct, frozen=True):
    """`metering.quarantine.v1`: a record waits. Its bytes stay in metering's database."""

    quarantine_id: str
    reason: str
    hub: str
    topic: str
    partition: int
    offset: int
    value_sha256: str


async def settle_all(
    connection: Connection,
    known: store.Known,
    records: Sequence[R],
    read: Callable[[Sequence[R]], Awaitable[Reading]],
    outbox: Outbox,
    paper: Paper,
) -> set[int]:
    """Read records in order, as many as one reading holds, and settle them, until none is left.

    A reading that names tenants we do not know is read again once they have been looked up. Returns
    which of the records that were judged again still wait.
    """
    still: set[int] = set()
    while records:
        reading = await read(records)
        unknown = missing_tenants(reading)
        if unknown and await store.learn_tenants(connection, known, unknown):
            reading = await read(records)
        still |= await settle(connection, reading, outbox, paper)
        records = records[reading.records :]
    return still


async def settle(
    connection: Connection, reading: Reading, outbox: Outbox, paper: Paper
) -> set[int]:
    """Take a reading into the tables; the price lock is held already.

    Returns which of the records that were judged again still wait.
    """
    coverage: dict[DeviceKey, DeviceCoverage] = {}
    accounts = Accounts(reading.facts, coverage)
    await store.lock_nodes(
        connection, ((job.interval.hub, job.interval.node_id) for job in reading.jobs)
    )
    for jobs in _portions(reading.jobs):
        await _meter(connection, accounts, coverage, jobs)
    await _hear(connection, reading, accounts)
    for parked in reading.parked:
        accounts.park(parked)
    for origin, prior in reading.resolved:
        accounts.take_back(origin, prior)
    filled = [bucket for bucket in reading.buckets if bucket.filled_by is not None]
    await store.save_buckets(connection, filled)
    await store.add_tallies(connection, accounts.tallies)
    if accounts.duplicates:
        await store.add_duplicates(connection, accounts.duplicates)
    if reading.started:
        await waiting.save_started(connection, reading.started)
    if reading.ended:
        await waiting.save_ended(connection, reading.ended)
    notices = await _quarantine(connection, accounts.quarantined, paper)
    messages = [_total_message(bucket, paper.trace_of) for bucket in filled]
    await outbox.write(connection, [*messages, *notices])
    return {one.prior.quarantine_id for one in accounts.quarantined if one.prior is not None}


def _portions(jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
    """Cut jobs so that each portion touches a bounded number of rows."""
    first = rows = 0
    for at, job in enumerate(jobs):
        interval = job.interval
        days = (interval.end_ms - interval.start_ms) // DAY_MS + 2
        rows += len(interval.devices) * days + len(job.buckets)
        if rows > MAX_ROWS:
            yield jobs[first : at + 1]
            first, rows = at + 1, 0
    if first < len(jobs):
        yield jobs[first:]


async def _meter(
    connection: Connection,
    accounts: Accounts,
    coverage: dict[DeviceKey, DeviceCoverage],
    jobs: Sequence[Job],
) -> None:
    """Load what a portion touches, decide, and write the coverage."""
    coverage.clear()
    coverage.update(await store.load_coverage(connection, device_spans(jobs)))
    unread = {
        bucket.bucket_id: bucket for job in jobs for bucket in job.buckets if not bucket.loaded
    }
    await store.load_buckets(connection, unread)
    for at in range(0, len(jobs), JOBS_PER_TURN):
        for job in jobs[at : at + JOBS_PER_TURN]:
            accounts.meter(job)
        await asyncio.sleep(0)
    await store.save_coverage(connection, coverage)


async def _hear(connection: Connection, reading: Reading, accounts: Accounts) -> None:
    """Fold what sources said; a watermark that goes back waits."""
    if not reading.sources:
        return
    node_paths = (events.source.node_path for events in reading.sources.values())
    known = await waiting.lock_sources(connection, node_paths, reading.sources)
    heard = hear(reading, known)
    for parked in heard.parked:
        accounts.park(parked)
    for vouched in heard.accepted:
        accounts.take_back(vouched.origin, vouched.prior)
    await waiting.save_sources(connection, heard.changed)


async def _quarantine(
    connection: Connection, quarantined: Sequence[Quarantined], paper: Paper
) -> list[Message]:
    """Store what waits; return the notices of what begins to wait."""
    new = [one for one in quarantined if one.prior is None]
    kept = {one.prior.quarantine_id: one for one in quarantined if one.prior is not None}
    if kept:
        await waiting.keep_waiting(connection, kept, paper.generation)
    if not new:
        return []
    payloads = [paper.payload_of(one.origin) for one in new]
    opened = await waiting.open_quarantine(connection, new, payloads, paper.generation)
    return [_notice(one, paper.trace_of) for one in opened]


def _notice(opened: Opened, trace_of: Callable[[Origin], Headers]) -> Message:
    origin = opened.origin
    notice = QuarantineNotice(
        quarantine_id=str(opened.quarantine_id),
        reason=opened.reason,
        hub=origin.hub,
        topic=origin.topic,
        partition=origin.partition,
        offset=origin.offset,
        value_sha256=opened.value_sha256,
    )
    return Message(QUARANTINE, origin.hub.encode(), msgspec.json.encode(notice), trace_of(origin))


def _total_message(bucket: Bucket, trace_of: Callable[[Origin], Headers]) -> Message:
    """State the new total of a bucket."""
    total = total_of(bucket)
    headers = () if bucket.filled_by is None else trace_of(bucket.filled_by)
    return Message(CHARGES, total.tenant_id.encode(), msgspec.json.encode(total), headers)
