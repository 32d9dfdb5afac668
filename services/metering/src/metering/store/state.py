"""All that metering one batch loads and saves, in the order of its locks.

Theory. Whoever meters takes locks in one order, so that no two wait for each other in a circle:

1. a replay: its quarantine rows, in the order of their ids (`metering.store.quarantine`); ingest
   never takes one, because it leaves records alone that are in quarantine already (those it adds
   itself it may replay at once, where that was decided: nobody else sees them yet);
2. the price lock: shared by all who rate, exclusive to whoever adds prices, so that no hour is
   rated by a line that is being cut short; who adds prices holds nothing else, and who takes up
   published ones (`metering.facts`) holds at most quarantine rows;
3. ingest: the rows of `hub_partitions` (`note_seen`), in the order of their keys;
4. the correction locks of its hubs: shared for usage, exclusive for corrections
   (`metering.store.corrections`);
5. the nodes of the batch, in the order of their keys;
6. its sources, in the order of theirs;
7. what is saved: coverage, buckets, tallies, duplicates, allocations, corrections, new quarantine
   rows.

Whoever holds a node's lock may change its coverage and buckets: what was loaded under it stays true
until the commit. Two take locks of hubs and nodes again after sources: a batch too large for one
`MeteringBatch`, and whoever applies decisions, once per record (`metering.decisions`). Should that
ever meet a replay
the other way round, PostgreSQL ends one of the two, and it is tried again.

Everything is read and written by sets, so that a batch needs a fixed number of statements.

These statements stand in one module because a reader follows a batch through all of them, in this
order. Deciding happens in `metering.core`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from hisab_contracts.charges import BucketTotal
from hisab_contracts.events import Correction
from hisab_contracts.ids import (
    BucketId,
    HoldId,
    HubCode,
    NodeId,
    SourcePath,
    TenantId,
)
from hisab_contracts.prices import PriceBook
from hisab_contracts.units import hour_floor_ms
from metering.core.allocations import AllocationKey
from metering.core.batch import (
    Changes,
    CorrectedState,
    DeviceSpan,
    MeteredBucket,
    MeteringBatch,
    MeteringState,
    RatedInterval,
    Reference,
    StoredBucket,
    Tally,
    TallyKey,
)
from metering.core.corrections import CorrectedAllocation
from metering.core.coverage import (
    CoverageChanges,
    CoveredInterval,
    DeviceKey,
)
from metering.core.sources import SequenceRange, SourceProgress
from metering.store import allocations, corrections, prices
from metering.store.corrections import (
    COVERAGE_COLUMNS,
    CorrectionFacts,
    covered_from_row,
)
from runtime.database import note_progress

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection

# Reference data: what is known beside the records.


@dataclass(slots=True)
class ReferenceCache:
    """What one user of it (a consumer, a task) remembers of tenants and prices between batches."""

    currencies: Mapping[TenantId, str] = field(default_factory=dict)
    book: PriceBook = field(default_factory=PriceBook)
    generation: int = 0
    """The newest price line in `book`."""


# Keeps prices as they are until the transaction ends; others may rate meanwhile.
_SHARE_PRICES = "select pg_advisory_xact_lock_shared($1, $2)"

# How far every hub is complete, and whether there are new price lines.
_HUBS_AND_GENERATION = """
select h.hub, h.watermark_ms,
       (select coalesce(max(generation), 0) from price_lines) as generation
  from hubs h
"""


async def load_reference(connection: Connection, cache: ReferenceCache) -> Reference:
    """Take the price lock, shared, and read what records are judged by.

    Prices are read again only when there are new ones: under the lock their generation tells.
    """
    await connection.execute(_SHARE_PRICES, *prices.PRICE_LOCK)
    rows = await connection.fetch(_HUBS_AND_GENERATION)
    generation = rows[0]["generation"] if rows else 0
    if generation != cache.generation:
        cache.book = PriceBook(await prices.load_price_lines(connection))
        cache.generation = generation
    watermarks = {HubCode(row["hub"]): row["watermark_ms"] for row in rows}
    return Reference(cache.currencies, cache.book, watermarks, cache.generation)


async def look_up_tenants(
    connection: Connection,
    cache: ReferenceCache,
    reference: Reference,
    tenants: Collection[TenantId],
) -> Reference:
    """Look tenants up that are not remembered; return the same reference if none of them exists.

    Tenants are remembered without a limit in time: a tenant never ceases to exist, and the currency
    of its book never changes.
    """
    found = await prices.currencies_of(connection, tenants)
    if not found:
        return reference
    cache.currencies = {**cache.currencies, **found}
    return replace(reference, currencies=cache.currencies)


class EarlierQuarantine(NamedTuple):
    """What of a range of offsets came to quarantine before."""

    quarantined: dict[tuple[str, int, int], list[tuple[str, str]]]
    """By (topic, partition, offset): the log a record was read from (a topic that was made anew has
    others there), and the SHA-256 of its value."""
    has_dismissed: bool
    """Operators dismissed some whole; after a restore their records may be gone here."""


_EARLIER_QUARANTINE = """
with k (topic, partition, first_offset, last_offset) as (
  select t, p, f, l
    from unnest($1::text[], $2::int[], $3::bigint[], $4::bigint[]) as r (t, p, f, l)
)
select q.topic, q.partition, q.record_offset, q.topic_id, q.value_sha256, false as is_decision
  from k
  join quarantine q
    on q.topic = k.topic and q.partition = k.partition
   and q.record_offset between k.first_offset and k.last_offset
 union all
select d.topic, d.partition, d.record_offset, '', d.value_sha256, true
  from k
  join quarantine_decisions d
    on d.topic = k.topic and d.partition = k.partition
   and d.record_offset between k.first_offset and k.last_offset
 where d.dismissed_reason is not null
"""


async def earlier_quarantine(
    connection: Connection, ranges: Mapping[tuple[str, int], tuple[int, int]]
) -> EarlierQuarantine:
    """Return what of these ranges of offsets came to quarantine before, whatever became of it.

    Metering that was restored, or set back, reads records again: the quarantined one counts.
    """
    columns = zip(*((*place, *offsets) for place, offsets in ranges.items()), strict=True)
    known = EarlierQuarantine({}, has_dismissed=False)
    for row in await connection.fetch(_EARLIER_QUARANTINE, *columns):
        if row["is_decision"]:
            known = known._replace(has_dismissed=True)
            continue
        place = (row["topic"], row["partition"], row["record_offset"])
        known.quarantined.setdefault(place, []).append((row["topic_id"], row["value_sha256"]))
    return known


# The latest of all records seen: after a restore older ones come again, and change nothing.
_NOTE_SEEN = """
insert into hub_partitions as p (hub, partition, last_seen_ms, batches)
select k.hub, k.partition, k.last_seen_ms, 1
  from unnest($1::text[], $2::int[], $3::bigint[]) as k (hub, partition, last_seen_ms)
 order by k.hub, k.partition
on conflict (hub, partition) do update
   set last_seen_ms = greatest(p.last_seen_ms, excluded.last_seen_ms), batches = p.batches + 1
"""


async def note_seen(connection: Connection, seen: Mapping[tuple[HubCode, int], int]) -> None:
    """Store the Kafka timestamp of the last record of each partition of a batch."""
    columns = zip(*((*place, seen_ms) for place, seen_ms in seen.items()), strict=True)
    await connection.execute(_NOTE_SEEN, *columns)


# What a batch is metered on.


async def load_state(connection: Connection, batch: MeteringBatch) -> MeteringState:
    """Lock and load all that a batch touches: first by hub, then by node, then by source."""
    named = batch.corrections
    spans = dict(batch.device_spans)
    coverage: dict[DeviceKey, list[CoveredInterval]] = {}
    buckets: dict[BucketId, StoredBucket] = {}
    corrected: CorrectedState | None = None
    if spans or named:
        hubs = {hub for hub, _, _ in spans}
        await corrections.lock_hubs(connection, hubs, {said.hub for said in named})
        if named:
            for key, span in await corrections.named_devices(connection, named):
                spans[key] = _joined(span, spans.get(key))
        known = await _load_known(connection, batch, hubs)
        if spans:
            await lock_nodes(connection, {(hub, node_id) for hub, node_id, _ in spans})
            coverage = await _load_coverage(connection, spans)
            buckets = await _load_buckets(connection, batch.bucket_ids)
        if named or known.known:
            corrected = await _load_corrected(connection, known, named, spans, coverage)
            buckets |= await _load_corrected_buckets(connection, batch, known)
            # Also those of which nothing is in the coverage any more, because all is freed.
            coverage |= {key: [] for key in spans if key not in coverage}
    sources = []
    if batch.reports:
        sources = await _lock_sources(connection, batch.node_paths, batch.reports)
    note_progress()
    return MeteringState(coverage, buckets, sources, corrected)


def _joined(span: DeviceSpan, other: DeviceSpan | None) -> DeviceSpan:
    if other is None:
        return span
    day_ms, from_ms, until_ms = zip(span, other, strict=True)
    return DeviceSpan(min(day_ms), min(from_ms), max(until_ms))


async def _load_known(
    connection: Connection, batch: MeteringBatch, hubs: Collection[HubCode]
) -> CorrectionFacts:
    """Read the corrections of the batch's allocations; most hubs have none at all."""
    named = batch.corrections
    allocations = {(said.hub, said.allocation_id) for said in named}
    corrected = await corrections.corrected_hubs(connection, hubs) if hubs else set()
    if corrected:
        allocations |= {
            (usage.interval.hub, usage.interval.allocation_id)
            for usage in batch.usages
            if isinstance(usage, RatedInterval) and usage.interval.hub in corrected
        }
    return await corrections.load_known(connection, allocations)


async def _load_corrected(
    connection: Connection,
    known: CorrectionFacts,
    named: Sequence[Correction],
    spans: Mapping[DeviceKey, DeviceSpan],
    coverage: Mapping[DeviceKey, Sequence[CoveredInterval]],
) -> CorrectedState:
    """Read what corrections have freed of the batch's devices, and the currencies they need."""
    freed = await corrections.load_freed(connection, spans)
    counting = [fact.correction for facts in known.known.values() for fact in facts]
    allocations = {(said.hub, said.allocation_id) for said in (*counting, *named)}
    tenants = {
        said.replacement.tenant_id
        for said in (*counting, *named)
        if said.replacement is not None and said.replacement.tenant_id is not None
    }
    tenants |= {
        row.claim.tenant_id
        for rows in (coverage, freed)
        for key, found in rows.items()
        for row in found
        if (key[0], row.claim.allocation_id) in allocations
    }
    currencies = await prices.currencies_of(connection, tenants)
    return CorrectedState(known.known, known.waiting_records, freed, currencies)


# All buckets of allocations in some hours: under which terms they are is known to the core alone.
_CORRECTED_BUCKETS = """
select b.bucket_id, b.gpu_ns, b.hold_id, b.revision, b.voided_gpu_ns
  from unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[])
       as k (of_hub, of_allocation, from_ms, until_ms)
  join buckets b
    on b.allocation_id = k.of_allocation and b.hub = k.of_hub
   and b.hour_ms >= k.from_ms and b.hour_ms < k.until_ms
"""


async def _load_corrected_buckets(
    connection: Connection, batch: MeteringBatch, known: CorrectionFacts
) -> dict[BucketId, StoredBucket]:
    concerned = {*known.known, *((said.hub, said.allocation_id) for said in batch.corrections)}
    hours: dict[CorrectedAllocation, tuple[int, int]] = {}
    for usage in batch.usages:
        said = usage.interval if isinstance(usage, RatedInterval) else usage.correction
        allocation = (said.hub, said.allocation_id)
        if allocation in concerned:
            from_ms, until_ms = hours.get(allocation, (said.start_ms, said.end_ms))
            hours[allocation] = (min(from_ms, said.start_ms), max(until_ms, said.end_ms))
    rows = [
        (*allocation, hour_floor_ms(from_ms), until_ms)
        for allocation, (from_ms, until_ms) in hours.items()
    ]
    found = await connection.fetch(_CORRECTED_BUCKETS, *zip(*rows, strict=True))
    return {BucketId(row["bucket_id"].hex): _bucket_from_row(row) for row in found}


_LOCK_NODES = """
select n.hub, n.node_id
  from nodes n
  join unnest($1::text[], $2::text[]) as k (hub, node_id)
    on n.hub = k.hub and n.node_id = k.node_id
 order by n.hub, n.node_id
   for update of n
"""

_ADD_NODES = """
insert into nodes (hub, node_id)
select k.hub, k.node_id from unnest($1::text[], $2::text[]) as k (hub, node_id)
 order by k.hub, k.node_id
on conflict do nothing
"""


async def lock_nodes(connection: Connection, nodes: Iterable[tuple[HubCode, NodeId]]) -> None:
    """Lock nodes in the order of their keys, making rows for new ones."""
    ordered = sorted(nodes)
    columns = list(zip(*ordered, strict=True))
    locked = await connection.fetch(_LOCK_NODES, *columns)
    if len(locked) < len(ordered):
        # New rows first, then all locks again: whoever adds the same node at the same time waits
        # for us in `on conflict`, and locks afterwards in the same order.
        await connection.execute(_ADD_NODES, *columns)
        await connection.fetch(_LOCK_NODES, *columns)


# What is covered of devices in, or touching, a span of each. A row lies within one day, so none
# that matters starts before the midnight before the span: the index is entered there.
_COVERAGE = (
    "select "
    + COVERAGE_COLUMNS
    + """
  from unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[])
       as k (of_hub, of_node, of_device, from_day_ms, from_ms, until_ms)
  join coverage c
    on c.hub = k.of_hub and c.node_id = k.of_node and c.device_uuid = k.of_device
   and c.start_ms between k.from_day_ms and k.until_ms and c.end_ms >= k.from_ms
"""
)


async def _load_coverage(
    connection: Connection, spans: Mapping[DeviceKey, DeviceSpan]
) -> dict[DeviceKey, list[CoveredInterval]]:
    columns = zip(*((*key, *span) for key, span in spans.items()), strict=True)
    found: dict[DeviceKey, list[CoveredInterval]] = {}
    for row in await connection.fetch(_COVERAGE, *columns):
        key = (row["hub"], row["node_id"], row["device_uuid"])
        found.setdefault(key, []).append(covered_from_row(row))
    return found


# The totals of buckets so far, their revisions, what is voided of them, and the hold each names.
_BUCKETS = """
select bucket_id, gpu_ns, hold_id, revision, voided_gpu_ns
  from buckets
 where bucket_id = any($1::uuid[])
"""


async def _load_buckets(
    connection: Connection, bucket_ids: Sequence[BucketId]
) -> dict[BucketId, StoredBucket]:
    rows = await connection.fetch(_BUCKETS, bucket_ids)
    return {BucketId(row["bucket_id"].hex): _bucket_from_row(row) for row in rows}


def _bucket_from_row(row: Row) -> StoredBucket:
    hold_id = row["hold_id"]
    held_by = None if hold_id is None else HoldId(hold_id)
    return StoredBucket(row["gpu_ns"], held_by, row["revision"], row["voided_gpu_ns"])


SOURCE_COLUMNS: Final = (
    "hub, source, node_path, contiguous, beyond, watermark_ms, standing, last_seen_ms"
)

# What `source_from_row` reads; whoever needs sources adds which.
SELECT_SOURCES: Final = "select " + SOURCE_COLUMNS + " from sources"

# The sources of a batch, and all active ones of the same nodes: a new epoch closes the older ones.
_LOCK_SOURCES = (
    SELECT_SOURCES
    + """
 where node_path = any($1::text[]) and (standing = 'active' or source = any($2::text[]))
 order by hub, source
   for update
"""
)


async def _lock_sources(
    connection: Connection, node_paths: Iterable[str], paths: Iterable[SourcePath]
) -> list[SourceProgress]:
    rows = await connection.fetch(_LOCK_SOURCES, sorted(node_paths), list(paths))
    return [source_from_row(row) for row in rows]


_BEYOND: Final = msgspec.json.Decoder(tuple[SequenceRange, ...])


def source_from_row(row: Row) -> SourceProgress:
    """Read a row of `sources`."""
    return SourceProgress(
        hub=HubCode(row["hub"]),
        path=SourcePath(row["source"]),
        node_path=row["node_path"],
        contiguous_sequence=row["contiguous"],
        beyond=_BEYOND.decode(row["beyond"]),
        watermark_ms=row["watermark_ms"],
        standing=row["standing"],
        last_seen_ms=row["last_seen_ms"],
    )


# What a batch changes.


async def save_changes(connection: Connection, changes: Changes) -> None:
    """Store what a batch changes, but for its quarantine, which `metering.store.quarantine` has."""
    # Each of these may take seconds for a batch of a month per record: none of them is being stuck.
    note_progress()
    await _save_coverage(connection, changes.coverage)
    note_progress()
    if changes.sources:
        await _save_sources(connection, changes.sources)
    await _save_buckets(connection, changes.buckets)
    note_progress()
    if changes.corrections is not None:
        await corrections.save_corrections(connection, changes.corrections)
    if changes.tallies:
        await _add_tallies(connection, changes.tallies)
    if changes.duplicates:
        await allocations.add_duplicates(connection, changes.duplicates)
    if changes.started:
        await allocations.save_started(connection, changes.started)
    if changes.ended:
        await allocations.save_ended(connection, changes.ended)
    if changes.buckets:
        billed = {
            AllocationKey(bucket.total.hub, bucket.total.allocation_id, bucket.total.tenant_id)
            for bucket in changes.buckets
        }
        await allocations.wake_billed(connection, billed)


# Rows that were merged into others.
_REMOVE_COVERAGE = """
delete from coverage c
 using unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[])
       as k (hub, node_id, device_uuid, slice_uuid, start_ms)
 where c.hub = k.hub and c.node_id = k.node_id and c.device_uuid = k.device_uuid
   and c.slice_uuid = k.slice_uuid and c.start_ms = k.start_ms
"""

# Rows that reach further than they did: nearly all of the changes.
_GROW_COVERAGE = """
update coverage c set end_ms = k.end_ms
  from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[])
       as k (hub, node_id, device_uuid, slice_uuid, start_ms, end_ms)
 where c.hub = k.hub and c.node_id = k.node_id and c.device_uuid = k.device_uuid
   and c.slice_uuid = k.slice_uuid and c.start_ms = k.start_ms
"""

# Rows that begin where none did.
_ADD_COVERAGE = (
    "insert into coverage ("
    + COVERAGE_COLUMNS
    + """)
select * from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[],
                     $7::text[], $8::text[], $9::text[], $10::text[], $11::text[], $12::int[])
"""
)


async def _save_coverage(
    connection: Connection, coverage: Mapping[DeviceKey, CoverageChanges]
) -> None:
    # Removed rows first: an added row may begin where a removed one did.
    removed = [(*key, *row) for key, changes in coverage.items() for row in changes.removed]
    grown = [(*key, *row) for key, changes in coverage.items() for row in changes.grown]
    added = [
        (*key, row.slice_uuid, row.start_ms, row.end_ms, *row.claim)
        for key, changes in coverage.items()
        for row in changes.added
    ]
    if removed:
        await connection.execute(_REMOVE_COVERAGE, *zip(*removed, strict=True))
    if grown:
        await connection.execute(_GROW_COVERAGE, *zip(*grown, strict=True))
    if added:
        await connection.execute(_ADD_COVERAGE, *zip(*added, strict=True))


# New sources are numbered in the order given: `arrival` orders the epochs of a node.
_SAVE_SOURCES = (
    "insert into sources ("
    + SOURCE_COLUMNS
    + ") select "
    + SOURCE_COLUMNS
    + """
  from unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::jsonb[], $6::bigint[],
              $7::text[], $8::bigint[]) with ordinality as k ("""
    + SOURCE_COLUMNS
    + """, place)
 order by place
on conflict (hub, source) do update
   set contiguous = excluded.contiguous, beyond = excluded.beyond,
       watermark_ms = excluded.watermark_ms, standing = excluded.standing,
       last_seen_ms = excluded.last_seen_ms
"""
)


async def _save_sources(connection: Connection, sources: Iterable[SourceProgress]) -> None:
    rows = [
        (
            source.hub,
            source.path,
            source.node_path,
            source.contiguous_sequence,
            msgspec.json.encode(source.beyond).decode(),
            source.watermark_ms,
            source.standing,
            source.last_seen_ms,
        )
        for source in sources
    ]
    await connection.execute(_SAVE_SOURCES, *zip(*rows, strict=True))


_BUCKET_TOTALS: Final = "bucket_id, gpu_ns, charge_micro, hold_id"
_BUCKET_NAMES: Final = (
    "tenant_id, project_id, allocation_id, hub, node_id, rate_line_id, price_version, sku, "
    "price_class, hour_ms"
)
"""What a bucket is named by: it never changes."""
BUCKET_COLUMNS: Final = _BUCKET_TOTALS + ", " + _BUCKET_NAMES
"""In the order of `bucket_row`; what else a bucket has is its revision."""

# New totals of buckets of which something was stored.
_UPDATE_BUCKETS = (
    """
update buckets b set gpu_ns = k.gpu_ns, charge_micro = k.charge_micro, hold_id = k.hold_id
  from unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::text[]) as k ("""
    + _BUCKET_TOTALS
    + """)
 where b.bucket_id = k.bucket_id
"""
)

# Buckets of which nothing was stored.
_ADD_BUCKETS = (
    "insert into buckets ("
    + BUCKET_COLUMNS
    + """)
select * from unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::text[],
                     $7::text[], $8::text[], $9::text[], $10::text[], $11::text[], $12::text[],
                     $13::text[], $14::bigint[])
"""
)


# Buckets that corrections have changed: more of them than their totals.
_SAVE_CORRECTED = (
    "insert into buckets ("
    + BUCKET_COLUMNS
    + """, revision, voided_gpu_ns)
select * from unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::text[],
                     $7::text[], $8::text[], $9::text[], $10::text[], $11::text[], $12::text[],
                     $13::text[], $14::bigint[], $15::bigint[], $16::bigint[])
on conflict (bucket_id) do update
   set gpu_ns = excluded.gpu_ns, charge_micro = excluded.charge_micro,
       hold_id = excluded.hold_id, revision = excluded.revision,
       voided_gpu_ns = excluded.voided_gpu_ns
"""
)


async def _save_buckets(connection: Connection, buckets: Sequence[MeteredBucket]) -> None:
    """Write the new totals of buckets: what changes in one comes first in its row."""
    rows = [(bucket, bucket_row(bucket.total, bucket.rate_line_id)) for bucket in buckets]
    plain = [(bucket.is_new, row) for bucket, row in rows if not bucket.is_corrected]
    updated = [row[:4] for is_new, row in plain if not is_new]
    added = [row for is_new, row in plain if is_new]
    corrected = [
        (*row, bucket.total.revision, bucket.voided_gpu_ns)
        for bucket, row in rows
        if bucket.is_corrected
    ]
    if updated:
        await connection.execute(_UPDATE_BUCKETS, *zip(*updated, strict=True))
    if added:
        await connection.execute(_ADD_BUCKETS, *zip(*added, strict=True))
    if corrected:
        await connection.execute(_SAVE_CORRECTED, *zip(*corrected, strict=True))


def bucket_row(total: BucketTotal, rate_line_id: str) -> tuple[object, ...]:
    """Return a bucket's row, rated by this line; what changes in one comes first."""
    return (
        total.bucket_id,
        total.total_gpu_ns,
        total.total_micro,
        total.hold_id,
        total.tenant_id,
        total.project_id,
        total.allocation_id,
        total.hub,
        total.node_id,
        rate_line_id,
        total.price_version,
        total.sku,
        total.price_class,
        total.hour_ms,
    )


_TALLY_KEY: Final = "hub, partition, hour_ms"
_TALLY_COUNTS: Final = (
    "reported_gpu_ns, duplicate_gpu_ns, read_records, accepted_records, duplicate_records"
)

# Locks tallies in the order of their primary key.
_LOCK_TALLIES = (
    "select "
    + _TALLY_KEY
    + """
  from tallies t
  join unnest($1::text[], $2::int[], $3::bigint[]) as k ("""
    + _TALLY_KEY
    + ") using ("
    + _TALLY_KEY
    + """)
 order by hub, hour_ms, partition
   for update of t
"""
)

# Makes the rows of new tallies, all counts at 0.
_BEGIN_TALLIES = (
    "insert into tallies ("
    + _TALLY_KEY
    + ", "
    + _TALLY_COUNTS
    + ") select "
    + _TALLY_KEY
    + """, 0, 0, 0, 0, 0
  from unnest($1::text[], $2::int[], $3::bigint[]) as k ("""
    + _TALLY_KEY
    + """)
 order by hub, hour_ms, partition
on conflict do nothing
"""
)

# Adds to each count.
_UPDATE_TALLIES = (
    """
update tallies t
   set reported_gpu_ns   = t.reported_gpu_ns + k.reported_gpu_ns::numeric,
       duplicate_gpu_ns  = t.duplicate_gpu_ns + k.duplicate_gpu_ns::numeric,
       read_records      = t.read_records + k.read_records,
       accepted_records  = t.accepted_records + k.accepted_records,
       duplicate_records = t.duplicate_records + k.duplicate_records
  from unnest($1::text[], $2::int[], $3::bigint[], $4::text[], $5::text[], $6::bigint[],
              $7::bigint[], $8::bigint[]) as k ("""
    + _TALLY_KEY
    + ", "
    + _TALLY_COUNTS
    + """)
 where t.hub = k.hub and t.partition = k.partition and t.hour_ms = k.hour_ms
"""
)


async def _add_tallies(connection: Connection, tallies: Mapping[TallyKey, Tally]) -> None:
    """Add to what was counted per hub, partition and hour."""
    # One upsert cannot do it: PostgreSQL holds the proposed row to the table's checks before it
    # finds the one that is there, and what a release undoes is below zero. So rows begin at 0.
    keys = list(zip(*tallies, strict=True))
    if len(await connection.fetch(_LOCK_TALLIES, *keys)) < len(tallies):
        await connection.execute(_BEGIN_TALLIES, *keys)
        await connection.fetch(_LOCK_TALLIES, *keys)
    # Sums of GPU time may pass 64 bits: they travel as text and become numeric there.
    rows = [
        (
            *key,
            str(tally.reported_gpu_ns),
            str(tally.duplicate_gpu_ns),
            tally.read_records,
            tally.accepted_records,
            tally.duplicate_records,
        )
        for key, tally in tallies.items()
    ]
    await connection.execute(_UPDATE_TALLIES, *zip(*rows, strict=True))
