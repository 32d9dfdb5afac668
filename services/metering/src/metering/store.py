"""The tables of metering, as whoever meters reads and writes them: a fixed number of statements.

Theory. Whoever changes coverage or buckets holds the locks of the nodes it touches, taken in the
order of their keys, so that what it loaded stays true until it commits. Rows of sources are locked
after nodes, in order too. The price lock is shared by all who rate and exclusive to whoever adds
prices, so that no hour is rated by a line that is being cut short. Everything is read and written
by sets; nothing here runs per record. Deciding happens elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hisab_contracts.ids import (
    AllocationId,
    BucketId,
    HoldId,
    HubCode,
    NodeId,
    PriceClass,
    PriceVersion,
    ProjectId,
    Sku,
    SliceId,
    SourcePath,
    TenantId,
)
from hisab_contracts.reference import PriceLine
from metering.accounts import DeviceKey, Tally, TallyKey, charge_micro
from metering.coverage import Claim, Covered, DeviceCoverage, day_floor_ms
from metering.rating import Displaced, PriceBook, Series
from metering.reading import AllocationKey, Bucket, Facts

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection

PRICE_LOCK: Final = (20_510, 1)
"""The two halves of the advisory lock on prices."""


@dataclass(slots=True)
class Known:
    """What this process remembers of tenants and prices between batches."""

    currencies: dict[TenantId, str] = field(default_factory=dict)
    book: PriceBook = field(default_factory=PriceBook)
    generation: int = 0
    """The newest price line in `book`."""


# Facts.

_SHARE_PRICES = "select pg_advisory_xact_lock_shared($1, $2)"


async def share_prices(connection: Connection) -> None:
    """Keep prices as they are until this transaction ends; others may rate meanwhile."""
    await connection.execute(_SHARE_PRICES, *PRICE_LOCK)


_HUBS_AND_GENERATION = """
select h.hub, h.watermark_ms,
       (select coalesce(max(generation), 0) from price_lines) as generation
  from hubs h
"""


async def load_facts(connection: Connection, known: Known) -> Facts:
    """Read how far hubs are complete, and new prices if there are any."""
    rows = await connection.fetch(_HUBS_AND_GENERATION)
    generation = rows[0]["generation"] if rows else 0
    if generation != known.generation:
        known.book = PriceBook(await load_price_lines(connection))
        known.generation = generation
    watermarks = {HubCode(row["hub"]): row["watermark_ms"] for row in rows}
    return Facts(known.currencies, known.book, watermarks)


_PRICE_LINES = """
select rate_line_id, price_version, currency, sku, price_class, micro_per_gpu_hour, valid_from_ms,
       valid_until_ms
  from price_lines
"""


async def load_price_lines(connection: Connection) -> list[PriceLine]:
    """Read every price line there is."""
    return [_price_line(row) for row in await connection.fetch(_PRICE_LINES)]


_LAST_PRICE_LINE = """
select rate_line_id, price_version, currency, sku, price_class, micro_per_gpu_hour, valid_from_ms,
       valid_until_ms
  from price_lines
 where currency = $1 and sku = $2 and price_class = $3 and valid_from_ms <= $4
 order by valid_from_ms desc
 limit 1
"""


async def last_price_line(connection: Connection, series: Series, at_ms: int) -> list[PriceLine]:
    """Read the line of a series that began last by then, if any: no other can rate that instant."""
    rows = await connection.fetch(_LAST_PRICE_LINE, *series, at_ms)
    return [_price_line(row) for row in rows]


def _price_line(row: Row) -> PriceLine:
    return PriceLine(
        rate_line_id=row["rate_line_id"],
        price_version=PriceVersion(row["price_version"]),
        currency=row["currency"],
        sku=Sku(row["sku"]),
        price_class=PriceClass(row["price_class"]),
        micro_per_gpu_hour=row["micro_per_gpu_hour"],
        valid_from_ms=row["valid_from_ms"],
        valid_until_ms=row["valid_until_ms"],
    )


_CURRENCIES = "select tenant_id, currency from tenants where tenant_id = any($1::text[])"


async def learn_tenants(connection: Connection, known: Known, asked: Collection[TenantId]) -> bool:
    """Look tenants up that this process does not know; say whether any of them exists."""
    rows = await connection.fetch(_CURRENCIES, list(asked))
    known.currencies.update((TenantId(row["tenant_id"]), row["currency"]) for row in rows)
    return bool(rows)


# Locks and what they protect.

_LOCK_NODES = """
select n.hub, n.node_id
  from nodes n
  join unnest($1::text[], $2::text[]) as k (hub, node_id)
    on n.hub = k.hub and n.node_id = k.node_id
 order by n.hub, n.node_id
   for update of n
"""


async def lock_nodes(connection: Connection, nodes: Iterable[tuple[HubCode, NodeId]]) -> None:
    """Lock nodes in the order of their keys, making rows for new ones."""
    ordered = sorted(set(nodes))
    keys = [hub for hub, _ in ordered], [node_id for _, node_id in ordered]
    locked = await connection.fetch(_LOCK_NODES, *keys)
    if len(locked) < len(ordered):
        await _add_nodes(connection, *keys)
        await connection.fetch(_LOCK_NODES, *keys)


_ADD_NODES = """
insert into nodes (hub, node_id)
select k.hub, k.node_id from unnest($1::text[], $2::text[]) as k (hub, node_id)
 order by k.hub, k.node_id
on conflict do nothing
"""


async def _add_nodes(connection: Connection, hubs: list[HubCode], nodes: list[NodeId]) -> None:
    await connection.execute(_ADD_NODES, hubs, nodes)


_COVERAGE = """
select c.hub, c.node_id, c.device_uuid, c.slice_uuid, c.start_ms, c.end_ms, c.tenant_id,
       c.project_id, c.allocation_id, c.sku, c.price_class, c.share_ppm
  from unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[])
       as k (hub, node_id, device_uuid, day_ms, from_ms, until_ms)
  join coverage c
    on c.hub = k.hub and c.node_id = k.node_id and c.device_uuid = k.device_uuid
   and c.start_ms between k.day_ms and k.until_ms and c.end_ms >= k.from_ms
"""


async def load_coverage(
    connection: Connection, spans: Mapping[DeviceKey, Sequence[int]]
) -> dict[DeviceKey, DeviceCoverage]:
    """Read what is covered of these devices in, or touching, `[from_ms, until_ms]` of each."""
    rows = await connection.fetch(
        _COVERAGE,
        [hub for hub, _, _ in spans],
        [node_id for _, node_id, _ in spans],
        [device_uuid for _, _, device_uuid in spans],
        [day_floor_ms(from_ms) for from_ms, _ in spans.values()],
        [from_ms for from_ms, _ in spans.values()],
        [until_ms for _, until_ms in spans.values()],
    )
    found: dict[DeviceKey, list[Covered]] = {}
    for row in rows:
        found.setdefault((row[0], row[1], row[2]), []).append(_covered(row))
    return {key: DeviceCoverage(key[2], found.get(key, ())) for key in spans}


def _covered(row: Row) -> Covered:
    """Read a row of coverage: (…, slice, start, end, claim) from the fourth column on."""
    claim = Claim(
        TenantId(row[6]),
        ProjectId(row[7]),
        AllocationId(row[8]),
        Sku(row[9]),
        PriceClass(row[10]),
        row[11],
    )
    return Covered(SliceId(row[3]), row[4], row[5], claim)


async def save_coverage(
    connection: Connection, coverage: Mapping[DeviceKey, DeviceCoverage]
) -> None:
    """Write what has changed: rows merged away, rows that grew, rows that are new."""
    removed: list[tuple[DeviceKey, SliceId, int]] = []
    grown: list[tuple[DeviceKey, SliceId, int, int]] = []
    added: list[tuple[DeviceKey, Covered]] = []
    for key, device in coverage.items():
        changes = device.changes()
        removed.extend((key, *row) for row in changes.removed)
        grown.extend((key, *row) for row in changes.grown)
        added.extend((key, row) for row in changes.added)
    if removed:
        await _remove_coverage(connection, removed)
    if grown:
        await _grow_coverage(connection, grown)
    if added:
        await _add_coverage(connection, added)


_REMOVE_COVERAGE = """
delete from coverage c
 using unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[])
       as k (hub, node_id, device_uuid, slice_uuid, start_ms)
 where c.hub = k.hub and c.node_id = k.node_id and c.device_uuid = k.device_uuid
   and c.slice_uuid = k.slice_uuid and c.start_ms = k.start_ms
"""


async def _remove_coverage(
    connection: Connection, rows: Sequence[tuple[DeviceKey, SliceId, int]]
) -> None:
    await connection.execute(
        _REMOVE_COVERAGE,
        [key[0] for key, _, _ in rows],
        [key[1] for key, _, _ in rows],
        [key[2] for key, _, _ in rows],
        [slice_uuid for _, slice_uuid, _ in rows],
        [start_ms for _, _, start_ms in rows],
    )


_GROW_COVERAGE = """
update coverage c set end_ms = k.end_ms
  from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[])
       as k (hub, node_id, device_uuid, slice_uuid, start_ms, end_ms)
 where c.hub = k.hub and c.node_id = k.node_id and c.device_uuid = k.device_uuid
   and c.slice_uuid = k.slice_uuid and c.start_ms = k.start_ms
"""


async def _grow_coverage(
    connection: Connection, rows: Sequence[tuple[DeviceKey, SliceId, int, int]]
) -> None:
    await connection.execute(
        _GROW_COVERAGE,
        [key[0] for key, _, _, _ in rows],
        [key[1] for key, _, _, _ in rows],
        [key[2] for key, _, _, _ in rows],
        [slice_uuid for _, slice_uuid, _, _ in rows],
        [start_ms for _, _, start_ms, _ in rows],
        [end_ms for _, _, _, end_ms in rows],
    )


_ADD_COVERAGE = """
insert into coverage (hub, node_id, device_uuid, slice_uuid, start_ms, end_ms, tenant_id,
                      project_id, allocation_id, sku, price_class, share_ppm)
select k.hub, k.node_id, k.device_uuid, k.slice_uuid, k.start_ms, k.end_ms, k.tenant_id,
       k.project_id, k.allocation_id, k.sku, k.price_class, k.share_ppm
  from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[],
              $7::text[], $8::text[], $9::text[], $10::text[], $11::text[], $12::int[])
       as k (hub, node_id, device_uuid, slice_uuid, start_ms, end_ms, tenant_id, project_id,
             allocation_id, sku, price_class, share_ppm)
"""


async def _add_coverage(connection: Connection, rows: Sequence[tuple[DeviceKey, Covered]]) -> None:
    claims = [row.claim for _, row in rows]
    await connection.execute(
        _ADD_COVERAGE,
        [key[0] for key, _ in rows],
        [key[1] for key, _ in rows],
        [key[2] for key, _ in rows],
        [row.slice_uuid for _, row in rows],
        [row.start_ms for _, row in rows],
        [row.end_ms for _, row in rows],
        [claim.tenant_id for claim in claims],
        [claim.project_id for claim in claims],
        [claim.allocation_id for claim in claims],
        [claim.sku for claim in claims],
        [claim.price_class for claim in claims],
        [claim.share_ppm for claim in claims],
    )


# Buckets.

_BUCKETS = """
select bucket_id, gpu_ns, hold_id from buckets where bucket_id = any($1::uuid[])
"""


async def load_buckets(connection: Connection, buckets: Mapping[BucketId, Bucket]) -> None:
    """Fill working buckets with what is stored of them."""
    for row in await connection.fetch(_BUCKETS, list(buckets)):
        bucket = buckets[BucketId(row[0].hex)]
        bucket.stored = True
        bucket.gpu_ns = row[1]
        bucket.hold_id = None if row[2] is None else HoldId(row[2])
    for bucket in buckets.values():
        bucket.loaded = True


async def save_buckets(connection: Connection, filled: Sequence[Bucket]) -> None:
    """Write the new totals of buckets that were filled."""
    known = [bucket for bucket in filled if bucket.stored]
    new = [bucket for bucket in filled if not bucket.stored]
    if known:
        await _update_buckets(connection, known)
    if new:
        await _insert_buckets(connection, new)


_UPDATE_BUCKETS = """
update buckets b set gpu_ns = k.gpu_ns, charge_micro = k.charge_micro, hold_id = k.hold_id
  from unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::text[])
       as k (bucket_id, gpu_ns, charge_micro, hold_id)
 where b.bucket_id = k.bucket_id
"""


async def _update_buckets(connection: Connection, buckets: Sequence[Bucket]) -> None:
    await connection.execute(
        _UPDATE_BUCKETS,
        [bucket.bucket_id for bucket in buckets],
        [bucket.gpu_ns for bucket in buckets],
        [charge_micro(bucket) for bucket in buckets],
        [bucket.hold_id for bucket in buckets],
    )


_INSERT_BUCKETS = """
insert into buckets (bucket_id, tenant_id, project_id, allocation_id, hold_id, hub, node_id,
                     rate_line_id, price_version, sku, price_class, hour_ms, gpu_ns, charge_micro)
select k.bucket_id, k.tenant_id, k.project_id, k.allocation_id, k.hold_id, k.hub, k.node_id,
       k.rate_line_id, k.price_version, k.sku, k.price_class, k.hour_ms, k.gpu_ns, k.charge_micro
  from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[],
              $8::text[], $9::text[], $10::text[], $11::text[], $12::bigint[], $13::bigint[],
              $14::bigint[])
       as k (bucket_id, tenant_id, project_id, allocation_id, hold_id, hub, node_id, rate_line_id,
             price_version, sku, price_class, hour_ms, gpu_ns, charge_micro)
"""


async def _insert_buckets(connection: Connection, buckets: Sequence[Bucket]) -> None:
    usages = [bucket.interval for bucket in buckets]
    await connection.execute(
        _INSERT_BUCKETS,
        [bucket.bucket_id for bucket in buckets],
        [usage.tenant_id for usage in usages],
        [usage.project_id for usage in usages],
        [usage.allocation_id for usage in usages],
        [bucket.hold_id for bucket in buckets],
        [usage.hub for usage in usages],
        [usage.node_id for usage in usages],
        [bucket.line.rate_line_id for bucket in buckets],
        [bucket.line.price_version for bucket in buckets],
        [usage.sku for usage in usages],
        [usage.price_class for usage in usages],
        [bucket.hour_ms for bucket in buckets],
        [bucket.gpu_ns for bucket in buckets],
        [charge_micro(bucket) for bucket in buckets],
    )


# What is counted.

_LOCK_TALLIES = """
select t.hub, t.partition, t.hour_ms
  from tallies t
  join unnest($1::text[], $2::int[], $3::bigint[]) as k (hub, partition, hour_ms)
    on t.hub = k.hub and t.partition = k.partition and t.hour_ms = k.hour_ms
 order by t.hub, t.hour_ms, t.partition
   for update of t
"""


async def add_tallies(connection: Connection, tallies: Mapping[TallyKey, Tally]) -> None:
    """Add to what was counted per hub, partition and hour."""
    changed = {key: tally for key, tally in tallies.items() if tally != Tally()}
    if not changed:
        return
    keys = (
        [key.hub for key in changed],
        [key.partition for key in changed],
        [key.hour_ms for key in changed],
    )
    if len(await connection.fetch(_LOCK_TALLIES, *keys)) < len(changed):
        await _begin_tallies(connection, keys)
        await connection.fetch(_LOCK_TALLIES, *keys)
    await _update_tallies(connection, keys, list(changed.values()))


_TallyKeys = tuple[list[HubCode], list[int], list[int]]

_BEGIN_TALLIES = """
insert into tallies (hub, partition, hour_ms, reported_gpu_ns, duplicate_gpu_ns, read_records,
                     accepted_records, duplicate_records)
select k.hub, k.partition, k.hour_ms, 0, 0, 0, 0, 0
  from unnest($1::text[], $2::int[], $3::bigint[]) as k (hub, partition, hour_ms)
 order by k.hub, k.hour_ms, k.partition
on conflict do nothing
"""


async def _begin_tallies(connection: Connection, keys: _TallyKeys) -> None:
    await connection.execute(_BEGIN_TALLIES, *keys)


_UPDATE_TALLIES = """
update tallies t
   set reported_gpu_ns   = t.reported_gpu_ns + k.reported_gpu_ns::numeric,
       duplicate_gpu_ns  = t.duplicate_gpu_ns + k.duplicate_gpu_ns::numeric,
       read_records      = t.read_records + k.read_records,
       accepted_records  = t.accepted_records + k.accepted_records,
       duplicate_records = t.duplicate_records + k.duplicate_records
  from unnest($1::text[], $2::int[], $3::bigint[], $4::text[], $5::text[], $6::bigint[],
              $7::bigint[], $8::bigint[])
       as k (hub, partition, hour_ms, reported_gpu_ns, duplicate_gpu_ns, read_records,
             accepted_records, duplicate_records)
 where t.hub = k.hub and t.partition = k.partition and t.hour_ms = k.hour_ms
"""


async def _update_tallies(
    connection: Connection, keys: _TallyKeys, changes: Sequence[Tally]
) -> None:
    # Sums may pass 64 bits: they travel as text and become numeric there.
    await connection.execute(
        _UPDATE_TALLIES,
        *keys,
        [str(tally.reported_gpu_ns) for tally in changes],
        [str(tally.duplicate_gpu_ns) for tally in changes],
        [tally.read_records for tally in changes],
        [tally.accepted_records for tally in changes],
        [tally.duplicate_records for tally in changes],
    )


_ADD_DUPLICATES = """
insert into allocation_duplicates as d (hub, allocation_id, tenant_id, duplicate_gpu_ns)
select k.hub, k.allocation_id, k.tenant_id, k.duplicate_gpu_ns::numeric
  from unnest($1::text[], $2::text[], $3::text[], $4::text[])
       as k (hub, allocation_id, tenant_id, duplicate_gpu_ns)
 order by k.hub, k.allocation_id, k.tenant_id
on conflict (hub, allocation_id, tenant_id) do update
   set duplicate_gpu_ns = d.duplicate_gpu_ns + excluded.duplicate_gpu_ns
"""


async def add_duplicates(connection: Connection, duplicates: Mapping[AllocationKey, int]) -> None:
    """Add to what was reported twice per allocation."""
    await connection.execute(
        _ADD_DUPLICATES,
        [key.hub for key in duplicates],
        [key.allocation_id for key in duplicates],
        [key.tenant_id for key in duplicates],
        [str(gpu_ns) for gpu_ns in duplicates.values()],
    )


_SAVE_TENANTS = """
insert into tenants as t (tenant_id, currency)
select k.tenant_id, k.currency from unnest($1::text[], $2::text[]) as k (tenant_id, currency)
 order by k.tenant_id
on conflict (tenant_id) do nothing
"""


async def save_tenants(connection: Connection, currencies: Mapping[TenantId, str]) -> None:
    """Keep which tenants exist; the currency of a book never changes."""
    await connection.execute(_SAVE_TENANTS, list(currencies), list(currencies.values()))


# The registry and prices: commands of operators.

_ADD_HUB = """
insert into hubs (hub, name, heartbeat_ms) values ($1, $2, $3) on conflict (hub) do nothing
"""


async def add_hub(connection: Connection, hub: HubCode, name: str, heartbeat_ms: int) -> bool:
    """Register a hub; False when it is registered already."""
    return str(await connection.execute(_ADD_HUB, hub, name, heartbeat_ms)) == "INSERT 0 1"


_RETIRE = """
update sources set standing = 'retired', retired_for = $3
 where hub = $1 and source = $2 and standing = 'active'
"""


async def retire_source(
    connection: Connection, hub: HubCode, source: SourcePath, reason: str
) -> bool:
    """Have a source count no longer; False unless it was active."""
    return str(await connection.execute(_RETIRE, hub, source, reason)) == "UPDATE 1"


_CLOSE_PRICES = "select pg_advisory_xact_lock($1, $2)"


async def close_prices(connection: Connection) -> None:
    """Wait for all who rate and keep them out until this transaction ends."""
    await connection.execute(_CLOSE_PRICES, *PRICE_LOCK)


_RATED = """
select k.rate_line_id,
       (select b.hour_ms from buckets b
         where b.hub = any(array(select hub from hubs)) and b.hour_ms >= k.from_ms
           and b.rate_line_id = k.rate_line_id
         limit 1) as hour_ms
  from unnest($1::text[], $2::bigint[]) as k (rate_line_id, from_ms)
"""


async def rated_hours(connection: Connection, ended: Sequence[Displaced]) -> dict[str, int]:
    """Return an hour, per line that would end, that is rated on it from that end on."""
    rows = await connection.fetch(
        _RATED, [one.rate_line_id for one in ended], [one.from_ms for one in ended]
    )
    return {row[0]: row[1] for row in rows if row[1] is not None}


_ADD_LIST = """
insert into price_lists (price_version, currency, valid_from_ms, valid_until_ms, added_by)
values ($1, $2, $3, $4, $5)
"""


async def add_price_list(connection: Connection, lines: Sequence[PriceLine], added_by: str) -> None:
    """Add a list and its lines; the price lock is held exclusively."""
    first = lines[0]
    await connection.execute(
        _ADD_LIST,
        first.price_version,
        first.currency,
        first.valid_from_ms,
        first.valid_until_ms,
        added_by,
    )
    await _add_price_lines(connection, lines)


_ADD_LINES = """
insert into price_lines (rate_line_id, price_version, currency, sku, price_class,
                         micro_per_gpu_hour, valid_from_ms, valid_until_ms)
select k.rate_line_id, $1, $2, k.sku, k.price_class, k.micro_per_gpu_hour, $3, $4
  from unnest($5::text[], $6::text[], $7::text[], $8::bigint[])
       as k (rate_line_id, sku, price_class, micro_per_gpu_hour)
"""


async def _add_price_lines(connection: Connection, lines: Sequence[PriceLine]) -> None:
    first = lines[0]
    await connection.execute(
        _ADD_LINES,
        first.price_version,
        first.currency,
        first.valid_from_ms,
        first.valid_until_ms,
        [line.rate_line_id for line in lines],
        [line.sku for line in lines],
        [line.price_class for line in lines],
        [line.micro_per_gpu_hour for line in lines],
    )


_CURRENCY = "select currency from tenants where tenant_id = $1"


async def currency_of(connection: Connection, tenant_id: str | None) -> str | None:
    """Return the currency of a tenant's book, if there is such a tenant."""
    currency = await connection.fetchval(_CURRENCY, tenant_id)
    return None if currency is None else str(currency)
