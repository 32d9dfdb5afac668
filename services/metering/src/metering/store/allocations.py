"""Allocations: what lifecycle events say of them, which are due to be looked at, what was decided.

Whoever meters writes here last, in the order of the keys (`metering.store.state` has the order of
all locks).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from hisab_contracts.events import Ended, Started
from hisab_contracts.ids import AllocationId, HubCode, TenantId
from metering.core.allocations import AllocationCheck, AllocationKey, EndedAllocation

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection

# What a batch says of allocations.

_STARTED_COLUMNS: Final = "hub, allocation_id, tenant_id, project_id, started_ms"
_ENDED_COLUMNS: Final = (
    "hub, allocation_id, tenant_id, project_id, ended_ms, cause, reserved_gpu_ms"
)

# GPU time that was reported twice, per allocation: sums may pass 64 bits and travel as text.
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
    """Add to the GPU time that was reported twice."""
    rows = [(*key, str(gpu_ns)) for key, gpu_ns in duplicates.items()]
    await connection.execute(_ADD_DUPLICATES, *zip(*rows, strict=True))


# The earliest start that was reported counts.
_SAVE_STARTED = (
    "insert into allocations as a ("
    + _STARTED_COLUMNS
    + ") select "
    + _STARTED_COLUMNS
    + """
  from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[]) as k ("""
    + _STARTED_COLUMNS
    + """)
 order by hub, allocation_id, tenant_id
on conflict (hub, allocation_id, tenant_id) do update
   set started_ms = least(a.started_ms, excluded.started_ms)
"""
)


async def save_started(connection: Connection, started: Mapping[AllocationKey, Started]) -> None:
    """Store when allocations started."""
    rows = [(*key, data.project_id, data.started_ms) for key, data in started.items()]
    await connection.execute(_SAVE_STARTED, *zip(*rows, strict=True))


# The latest end that was reported counts, and is looked at at once. It stays in SQL, like the
# earliest start, because a rule of one comparison needs no look at the row beforehand.
_SAVE_ENDED = (
    "insert into allocations as a ("
    + _ENDED_COLUMNS
    + ") select "
    + _ENDED_COLUMNS
    + """
  from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[],
              $7::bigint[]) as k ("""
    + _ENDED_COLUMNS
    + """)
 order by hub, allocation_id, tenant_id
on conflict (hub, allocation_id, tenant_id) do update
   set ended_ms = excluded.ended_ms, cause = excluded.cause,
       reserved_gpu_ms = excluded.reserved_gpu_ms, checks = 0, check_at = clock_timestamp()
 where a.ended_ms is null or a.ended_ms <= excluded.ended_ms
"""
)


async def save_ended(connection: Connection, ended: Mapping[AllocationKey, Ended]) -> None:
    """Store how allocations ended; each is looked at at once."""
    rows = [
        (*key, data.project_id, data.ended_ms, data.cause, data.reserved_gpu_ms)
        for key, data in ended.items()
    ]
    await connection.execute(_SAVE_ENDED, *zip(*rows, strict=True))


# Which have ended, and are final.

_WAITS: Final = " a.ended_ms is not null and not a.final"
"""Of an allocation that has ended and is not final: so the partial indexes know it."""

# In the order of the keys. What is being looked at now is waited for: it was looked at without what
# is billed here, so it must be looked at again.
_LOCK_ENDED = (
    """
select a.hub, a.allocation_id, a.tenant_id
  from allocations a
  join unnest($1::text[], $2::text[], $3::text[]) as k (hub, allocation_id, tenant_id)
    on a.hub = k.hub and a.allocation_id = k.allocation_id and a.tenant_id = k.tenant_id
 where"""
    + _WAITS
    + """
 order by a.hub, a.allocation_id, a.tenant_id
   for update of a
"""
)

_WAKE = """
update allocations a set check_at = clock_timestamp()
  from unnest($1::text[], $2::text[], $3::text[]) as k (hub, allocation_id, tenant_id)
 where a.hub = k.hub and a.allocation_id = k.allocation_id and a.tenant_id = k.tenant_id
"""


async def wake_billed(connection: Connection, keys: Collection[AllocationKey]) -> None:
    """Have those of these allocations looked at that have ended: something of them was billed."""
    rows = await connection.fetch(_LOCK_ENDED, *zip(*sorted(keys), strict=True))
    if rows:
        found = [_key_from_row(row) for row in rows]
        await connection.execute(_WAKE, *zip(*found, strict=True))


_WAKE_TENANTS = (
    """
update allocations a set check_at = clock_timestamp()
 where a.tenant_id = any($1::text[]) and"""
    + _WAITS
)


async def wake_tenants(connection: Connection, tenants: Collection[TenantId]) -> None:
    """Have the ended allocations of tenants looked at that have just become known."""
    await connection.execute(_WAKE_TENANTS, list(tenants))


# At most so many of each hub, whose turn has come; `statement_timestamp()` and not the clock,
# because an index takes no value that changes from row to row. Rows that another process looks at
# are skipped: it decides about them.
_DUE = (
    """
select d.hub, d.allocation_id, d.tenant_id, d.ended_ms, d.reserved_gpu_ms, d.checks
  from unnest($1::text[]) as k (of_hub)
 cross join lateral (
       select a.hub, a.allocation_id, a.tenant_id, a.ended_ms, a.reserved_gpu_ms, a.checks
         from allocations a
        where a.hub = k.of_hub and a.check_at <= statement_timestamp() and"""
    + _WAITS
    + """
        order by a.check_at
        limit $2
          for update skip locked) as d
"""
)

# At most so many of each hub that rest, or wait for their second look, although the hub is complete
# past their end.
_PASSED = (
    """
select d.hub, d.allocation_id, d.tenant_id, d.ended_ms, d.reserved_gpu_ms, d.checks
  from unnest($1::text[], $2::bigint[]) as k (of_hub, watermark_ms)
 cross join lateral (
       select a.hub, a.allocation_id, a.tenant_id, a.ended_ms, a.reserved_gpu_ms, a.checks
         from allocations a
        where a.hub = k.of_hub and a.ended_ms <= k.watermark_ms
          and a.check_at > statement_timestamp()
          and (a.check_at = 'infinity' or a.checks = 1) and"""
    + _WAITS
    + """
        order by a.ended_ms
        limit $3
          for update skip locked) as d
"""
)

# What decides about them, read once they are locked.
_DECIDING = """
select k.hub, k.allocation_id, k.tenant_id,
       (select coalesce(sum(b.gpu_ns + b.voided_gpu_ns), 0) from buckets b
         where b.allocation_id = k.allocation_id and b.hub = k.hub
           and b.tenant_id = k.tenant_id) as covered_gpu_ns,
       exists (select from tenants t where t.tenant_id = k.tenant_id) as tenant_is_known
  from unnest($1::text[], $2::text[], $3::text[]) as k (hub, allocation_id, tenant_id)
"""


async def lock_due_allocations(
    connection: Connection, watermarks: Mapping[HubCode, int | None], most: int
) -> list[EndedAllocation]:
    """Lock and read ended allocations whose turn has come, at most so many of each hub.

    `watermarks` says of every hub up to when it is complete.
    """
    rows = await connection.fetch(_DUE, list(watermarks), most)
    complete = {hub: until_ms for hub, until_ms in watermarks.items() if until_ms is not None}
    if complete:
        rows += await connection.fetch(_PASSED, list(complete), list(complete.values()), most)
    if not rows:
        return []
    keys = [_key_from_row(row) for row in rows]
    deciding = {
        _key_from_row(row): row
        for row in await connection.fetch(_DECIDING, *zip(*keys, strict=True))
    }
    return [
        _ended_from_row(row, deciding[key], watermarks[key.hub])
        for key, row in zip(keys, rows, strict=True)
    ]


def _key_from_row(row: Row) -> AllocationKey:
    return AllocationKey(
        HubCode(row["hub"]), AllocationId(row["allocation_id"]), TenantId(row["tenant_id"])
    )


def _ended_from_row(row: Row, deciding: Row, watermark_ms: int | None) -> EndedAllocation:
    return EndedAllocation(
        key=_key_from_row(row),
        ended_ms=row["ended_ms"],
        reserved_gpu_ms=row["reserved_gpu_ms"],
        covered_gpu_ns=int(deciding["covered_gpu_ns"]),
        hub_watermark_ms=watermark_ms,
        tenant_is_known=deciding["tenant_is_known"],
        was_checked=row["checks"] > 0,
    )


# The next look is counted from the database's clock, because it also decides what is due.
_SAVE_CHECKS = """
update allocations a
   set final = k.final, checks = a.checks + 1,
       check_at = coalesce(
         clock_timestamp() + k.check_after_ms * interval '1 millisecond', 'infinity')
  from unnest($1::text[], $2::text[], $3::text[], $4::boolean[], $5::bigint[])
       as k (hub, allocation_id, tenant_id, final, check_after_ms)
 where a.hub = k.hub and a.allocation_id = k.allocation_id and a.tenant_id = k.tenant_id
"""


async def save_checks(connection: Connection, checks: Sequence[AllocationCheck]) -> None:
    """Store what was decided about allocations that were looked at, and when to look again."""
    rows = [(*check.key, check.is_final, check.check_after_ms) for check in checks]
    await connection.execute(_SAVE_CHECKS, *zip(*rows, strict=True))
