"""Hubs: the registry, their sources, and what is stated about them.

`view_hubs` runs several queries, each on what is committed when it runs. It reads sources before
the open time: whatever a source's watermark covers was committed with it or before it, so that none
of it is missed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from hisab_contracts.charges import HubWatermark, OpenQuarantine, ReconcileResult
from hisab_contracts.ids import HubCode, SourcePath, TenantId
from hisab_contracts.units import ms_of
from metering.core.sources import SourceProgress
from metering.core.watermarks import HubCompleteness, HubView
from metering.store.state import SELECT_SOURCES, SOURCE_COLUMNS, source_from_row

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection


# The registry.

_ADD_HUB = """
insert into hubs (hub, name, heartbeat_ms) values ($1, $2, $3) on conflict (hub) do nothing
"""


async def add_hub(connection: Connection, hub: HubCode, name: str, heartbeat_ms: int) -> bool:
    """Register a hub; False when it is registered already."""
    # The primary key decides between two who register at once, so the status is the answer.
    return str(await connection.execute(_ADD_HUB, hub, name, heartbeat_ms)) == "INSERT 0 1"


# Not `for update`: a new source or partition of the hub takes its key, and need not wait.
_LOCK_HUB = "select hub from hubs where hub = $1 for no key update"


async def lock_hub(connection: Connection, hub: HubCode) -> None:
    """Keep others from stating this hub until the transaction ends: revisions must only rise."""
    await connection.execute(_LOCK_HUB, hub)


_HUBS = "select hub from hubs order by hub"


async def list_hubs(connection: Connection) -> list[HubCode]:
    """Return every registered hub."""
    return [HubCode(row["hub"]) for row in await connection.fetch(_HUBS)]


_IS_HUB = "select exists (select from hubs where hub = $1)"


async def is_hub(connection: Connection, hub: HubCode) -> bool:
    """Say whether a hub is registered."""
    return bool(await connection.fetchval(_IS_HUB, hub))


_COMPLETENESS = """
select h.hub, h.watermark_ms, exists (select from sources s where s.hub = h.hub) as emitted
  from hubs h
 where $1::text is null or h.hub = $1
 order by h.hub
"""


async def list_completeness(
    connection: Connection, hub: HubCode | None = None
) -> list[HubCompleteness]:
    """Return up to when hubs are complete: of one hub, or of all."""
    rows = await connection.fetch(_COMPLETENESS, hub)
    return [_completeness_from_row(row) for row in rows]


def _completeness_from_row(row: Row) -> HubCompleteness:
    return HubCompleteness(
        hub=HubCode(row["hub"]), watermark_ms=row["watermark_ms"], emitted=row["emitted"]
    )


# Sources.

MAX_LISTED_BYTES: Final = 8_388_608
"""A page of sources ends before what it says may pass 8 MiB, after one at least."""

# A source may have a thousand gaps: the page is cut by their size before any of them is read. A gap
# has at least 20 characters here, and at most 90 in an answer.
_SOURCE_PAGE = (
    """
with wanted as (
  select hub, source, 5 * octet_length(beyond::text)::bigint + 400 as shown_bytes
    from sources
   where hub = $1 and source > $2
   order by source
   limit $3
), measured as (
  select hub, source, row_number() over (order by source) as place,
         sum(shown_bytes) over (order by source) as so_far_bytes
    from wanted
), page as (
  select hub as of_hub, source as of_source, (select count(*) from wanted) as wanted_count
    from measured
   where place = 1 or so_far_bytes <= $4
)
select wanted_count, """
    + SOURCE_COLUMNS
    + """
  from page
  join sources on hub = of_hub and source = of_source
 order by source
"""
)


async def list_sources(
    connection: Connection, hub: HubCode, after: str, most: int
) -> tuple[list[SourceProgress], bool]:
    """List at most so many sources of a hub by name, and say whether there are more."""
    rows = await connection.fetch(_SOURCE_PAGE, hub, after, most + 1, MAX_LISTED_BYTES)
    found = [source_from_row(row) for row in rows[:most]]
    return found, bool(rows) and rows[0]["wanted_count"] > len(found)


_SOURCES_NAMED = SELECT_SOURCES + " where hub = $1 and source = any($2::text[])"


async def find_sources(
    connection: Connection, hub: HubCode, paths: list[SourcePath]
) -> dict[SourcePath, SourceProgress]:
    """Return those of these sources that were ever seen."""
    rows = await connection.fetch(_SOURCES_NAMED, hub, paths)
    return {source.path: source for source in map(source_from_row, rows)}


_LOCK_SOURCE = SELECT_SOURCES + " where hub = $1 and source = $2 for update"


async def lock_source(
    connection: Connection, hub: HubCode, path: SourcePath
) -> SourceProgress | None:
    """Lock and read a source; None when it was never seen."""
    row = await connection.fetchrow(_LOCK_SOURCE, hub, path)
    return None if row is None else source_from_row(row)


_SAVE_RETIREMENT = """
update sources set standing = $3, retired_for = $4 where hub = $1 and source = $2
"""


async def save_retirement(connection: Connection, source: SourceProgress, because: str) -> None:
    """Store that a source, locked before, was retired, and why."""
    await connection.execute(_SAVE_RETIREMENT, source.hub, source.path, source.standing, because)


# What is stated downstream.

_BATCHES = "select coalesce(sum(batches), 0)::bigint from hub_partitions"


async def count_batches(connection: Connection) -> int:
    """Return a number that moves whenever records of any hub were taken in."""
    return int(await connection.fetchval(_BATCHES))


# What is stored of hubs. Two facts are taken here as they stand in the tables: a hub has emitted
# once it has a source, whatever became of that, and it was seen when its latest record was.
_VIEWS = """
select h.hub, h.heartbeat_ms, h.watermark_ms, h.statement, h.stated_ms, h.created_at,
       (select max(p.last_seen_ms) from hub_partitions p where p.hub = h.hub) as last_seen_ms,
       exists (select from sources s where s.hub = h.hub) as emitted,
       r.finished_at as reconciled_at, r.differences
  from hubs h
  left join (select finished_at, differences from reconcile_runs order by run_id desc limit 1) r
    on true
 where $1::text is null or h.hub = $1
 order by h.hub
"""


async def view_hubs(connection: Connection, hub: HubCode | None = None) -> list[HubView]:
    """Look at a hub, or at all of them: their active sources, then their open time."""
    rows = await connection.fetch(_VIEWS, hub)
    active = await _active_sources(connection, hub)
    open_time = await _open_time(connection, hub)
    return [
        _view_from_row(row, active.get(row["hub"], []), open_time.get(row["hub"], []))
        for row in rows
    ]


_WATERMARK: Final = msgspec.json.Decoder(HubWatermark)


def _view_from_row(
    row: Row, active: list[SourceProgress], open_time: list[OpenQuarantine]
) -> HubView:
    last_seen_ms: int | None = row["last_seen_ms"]
    return HubView(
        hub=HubCode(row["hub"]),
        heartbeat_ms=row["heartbeat_ms"],
        watermark_ms=row["watermark_ms"],
        # A hub that has sent nothing yet is silent from its registration on.
        last_seen_ms=ms_of(row["created_at"]) if last_seen_ms is None else last_seen_ms,
        sources=active,
        emitted=row["emitted"],
        ever_seen=last_seen_ms is not None,
        quarantined=open_time,
        last_statement=None if row["statement"] is None else _WATERMARK.decode(row["statement"]),
        stated_ms=row["stated_ms"],
        reconciled=None
        if row["reconciled_at"] is None
        else ReconcileResult(ms_of(row["reconciled_at"]), row["differences"]),
    )


# The sources that count for completeness, of one hub or of all.
_ACTIVE_SOURCES = (
    SELECT_SOURCES
    + """
 where standing = 'active' and ($1::text is null or hub = $1)
 order by hub, source
"""
)


async def _active_sources(
    connection: Connection, hub: HubCode | None
) -> dict[str, list[SourceProgress]]:
    found: dict[str, list[SourceProgress]] = {}
    for row in await connection.fetch(_ACTIVE_SOURCES, hub):
        found.setdefault(row["hub"], []).append(source_from_row(row))
    return found


# Open quarantined time per hub, tenant and billing month. Unknown tenants block nobody: nobody will
# be billed for their time, so no month has to stay open for it.
_OPEN_TIME = """
select o.hub, o.tenant_id, o.month, sum(o.waiting_gpu_ns) as quarantined_gpu_ns
  from open_time o
  join tenants known on known.tenant_id = o.tenant_id
 where $1::text is null or o.hub = $1
 group by o.hub, o.tenant_id, o.month
having sum(o.waiting_gpu_ns) <> 0
 order by o.hub, o.tenant_id, o.month
"""


async def _open_time(
    connection: Connection, hub: HubCode | None
) -> dict[str, list[OpenQuarantine]]:
    found: dict[str, list[OpenQuarantine]] = {}
    for row in await connection.fetch(_OPEN_TIME, hub):
        found.setdefault(row["hub"], []).append(_open_quarantine_from_row(row))
    return found


def _open_quarantine_from_row(row: Row) -> OpenQuarantine:
    return OpenQuarantine(
        tenant_id=TenantId(row["tenant_id"]),
        month=row["month"],
        quarantined_gpu_ns=int(row["quarantined_gpu_ns"]),
    )


# The comparison is a guard, not the decision (`metering.core.watermarks` never lowers it): a former
# holder of the lease that is late must not move the watermark back.
_SAVE_WATERMARK = """
update hubs set watermark_ms = $2 where hub = $1 and coalesce(watermark_ms < $2, true)
"""


async def save_watermark(connection: Connection, hub: HubCode, watermark_ms: int) -> None:
    """Store how far a hub is complete; never lower."""
    await connection.execute(_SAVE_WATERMARK, hub, watermark_ms)


_SAVE_STATEMENT = "update hubs set statement = $2::jsonb, stated_ms = $3 where hub = $1"


async def save_statement(connection: Connection, statement: HubWatermark, stated_ms: int) -> None:
    """Store what was stated downstream about a hub."""
    text = msgspec.json.encode(statement).decode()
    await connection.execute(_SAVE_STATEMENT, statement.hub, text, stated_ms)
