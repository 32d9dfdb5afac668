"""Holds in PostgreSQL: loaded for decisions, and written. Nothing is decided here.

A hold's row says where it stands (`Hold`) and, in columns that no decision changes, what was said
when it was placed: which job, and what for. Whoever loads holds to decide on them has locked their
books before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from msgspec.structs import replace

from hisab_contracts.charges import AllocationFinal
from hisab_contracts.ids import (
    AllocationId,
    HoldId,
    HubCode,
    PriceClass,
    ProjectId,
    Sku,
    TenantId,
)
from hisab_contracts.units import moment_of, ms_of
from ledger.core.holds import Hold, PlaceHold
from ledger.core.lots import UsageTerms
from ledger.store.entries import pg_array
from runtime.database import check_clock

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.clock import Clock
    from runtime.database import Connection

_HOLD_SCALARS: Final = "tenant_id, hold_id, hold_micro, allocation_id, expires_at, ended"
_HOLD_COLUMNS: Final = _HOLD_SCALARS + ", places, reserved, placed_seq, short_micro, drawn_micro"
"""The column `ended` is what the core calls `ended_by`."""
SELECT_HOLD: Final = "select " + _HOLD_COLUMNS
_HOLD_FACTS: Final = "project_id, job_ref, hub, sku, price_class"
"""What was said when a hold was placed: what it is for."""

_LOAD_HOLDS = (
    SELECT_HOLD
    + """
  from unnest($1::text[], $2::text[]) as n (of_tenant, of_hold)
  join holds h on h.tenant_id = n.of_tenant and h.hold_id = n.of_hold
"""
)
_LOAD_HOLDS_OF_ALLOCATIONS = (
    SELECT_HOLD
    + """, hub
  from unnest($1::text[], $2::text[], $3::text[]) as n (of_tenant, of_hub, of_allocation)
  join holds h
    on h.tenant_id = n.of_tenant and h.hub = n.of_hub and h.allocation_id = n.of_allocation
   and h.ended is null
 order by tenant_id, hold_id
"""
)
# Writes holds that were placed: what was said of them, and what they reserve.
_INSERT_HOLDS = (
    "insert into holds ("
    + _HOLD_COLUMNS
    + ", "
    + _HOLD_FACTS
    + ") select "
    + _HOLD_SCALARS
    + ", places::text[], reserved::bigint[], placed_seq, short_micro, drawn_micro, "
    + _HOLD_FACTS
    + """
  from unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::timestamptz[], $6::text[],
              $7::text[], $8::text[], $9::bigint[], $10::bigint[], $11::bigint[],
              $12::text[], $13::text[], $14::text[], $15::text[], $16::text[])
    as n ("""
    + _HOLD_COLUMNS
    + ", "
    + _HOLD_FACTS
    + ")"
)
# Writes how older holds stand; what was said when they were placed never changes.
_UPDATE_HOLDS = (
    """
update holds h
   set hold_micro = n.hold_micro, expires_at = n.expires_at, ended = n.ended,
       places = n.places::text[], reserved = n.reserved::bigint[],
       short_micro = n.short_micro, drawn_micro = n.drawn_micro
  from unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::timestamptz[], $6::text[],
              $7::text[], $8::text[], $9::bigint[], $10::bigint[], $11::bigint[]) as n ("""
    + _HOLD_COLUMNS
    + """)
 where h.tenant_id = n.tenant_id and h.hold_id = n.hold_id
"""
)
# Looked at without locks; the core asks again once they are held (`release_expired`).
_FIND_DUE = """
select tenant_id, hold_id from holds where ended is null and expires_at <= $1
 order by expires_at limit $2
"""
# The server's clock, and the open holds of these books that are over. One row without a hold where
# there is none: the clock is always answered. All of them, as no entry may stand on what one of
# them still reserves; what bounds them is the sweep (`jobs`).
_LOAD_DUE = (
    "select clock_at, "
    + _HOLD_COLUMNS
    + """
  from (select clock_timestamp() as clock_at) server
  left join holds on tenant_id = any($1::text[]) and ended is null and expires_at <= $2
 order by expires_at, hold_id
"""
)


async def find_due(
    connection: Connection, now_ms: int, limit: int
) -> list[tuple[TenantId, HoldId]]:
    """Name open holds that are over, the oldest first. Lock their books before acting."""
    rows = await connection.fetch(_FIND_DUE, moment_of(now_ms), limit)
    return [(TenantId(row["tenant_id"]), HoldId(row["hold_id"])) for row in rows]


async def load_due(
    connection: Connection, tenant_ids: Sequence[str], clock: Clock
) -> tuple[int, list[tuple[str, Hold]]]:
    """Read the clock, and load the open holds of these books that are over by then, by tenant.

    Raises `ClockStep` when the reading is too far from the server's clock: whatever it would end
    would be ended for good.
    """
    now_ms = clock()
    rows = await connection.fetch(_LOAD_DUE, tenant_ids, moment_of(now_ms))
    check_clock(now_ms, rows[0]["clock_at"])
    found = [row for row in rows if row["hold_id"] is not None]
    return now_ms, [(row["tenant_id"], hold_from_row(row)) for row in found]


async def load_holds(
    connection: Connection, hold_ids: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], Hold]:
    """Load holds by (tenant, hold); unknown ones are left out."""
    wanted = sorted(set(hold_ids))
    if not wanted:
        return {}
    tenant_ids, names = [tenant for tenant, _ in wanted], [hold for _, hold in wanted]
    rows = await connection.fetch(_LOAD_HOLDS, tenant_ids, names)
    return {(row["tenant_id"], row["hold_id"]): hold_from_row(row) for row in rows}


async def load_holds_of_allocations(
    connection: Connection, finals: Iterable[AllocationFinal]
) -> dict[tuple[str, str, str], list[Hold]]:
    """Load the open holds that one of these finals ends, by (tenant, hub, allocation)."""
    wanted = sorted({(final.tenant_id, final.hub, final.allocation_id) for final in finals})
    if not wanted:
        return {}
    rows = await connection.fetch(
        _LOAD_HOLDS_OF_ALLOCATIONS,
        [tenant_id for tenant_id, _, _ in wanted],
        [hub for _, hub, _ in wanted],
        [allocation_id for _, _, allocation_id in wanted],
    )
    found: dict[tuple[str, str, str], list[Hold]] = {}
    for row in rows:
        key = row["tenant_id"], row["hub"], row["allocation_id"]
        found.setdefault(key, []).append(hold_from_row(row))
    return found


# Who reserves on lots that are about to expire, and what for.
_LOAD_HOLDS_ON = (
    SELECT_HOLD
    + ", "
    + _HOLD_FACTS
    + """
  from holds
 where tenant_id = any($1::text[]) and ended is null and places && $2::text[]
"""
)


async def load_holds_on(
    connection: Connection, tenant_ids: Sequence[str], accounts: Sequence[str]
) -> dict[tuple[str, str], tuple[Hold, UsageTerms]]:
    """Load the open holds of these tenants that reserve on one of these lots, by (tenant, hold)."""
    return {
        (row["tenant_id"], row["hold_id"]): (hold_from_row(row), _terms_from_row(row))
        for row in await connection.fetch(_LOAD_HOLDS_ON, tenant_ids, accounts)
    }


def _terms_from_row(row: Row) -> UsageTerms:
    price_class = row["price_class"]
    return UsageTerms(
        hub=HubCode(row["hub"]),
        sku=Sku(row["sku"]),
        project_id=ProjectId(row["project_id"]),
        price_class=None if price_class is None else PriceClass(price_class),
    )


async def insert_holds(
    connection: Connection, placed: Sequence[tuple[str, PlaceHold, Hold]]
) -> None:
    """Write holds that were placed: (tenant, what was asked, what it reserves)."""
    await connection.execute(
        _INSERT_HOLDS,
        *_columns_of_holds([(tenant_id, hold) for tenant_id, _, hold in placed]),
        [command.project_id for _, command, _ in placed],
        [command.job_ref for _, command, _ in placed],
        [command.hub for _, command, _ in placed],
        [command.sku for _, command, _ in placed],
        [command.price_class for _, command, _ in placed],
    )


async def update_holds(connection: Connection, holds: Sequence[tuple[str, Hold]]) -> None:
    """Write how older holds stand."""
    await connection.execute(_UPDATE_HOLDS, *_columns_of_holds(holds))


def hold_from_row(row: Row) -> Hold:
    """Read one hold.

    Release 1 did not count what a hold drew: until new code has, it is what it gave up.
    """
    allocation_id, drawn_micro = row["allocation_id"], row["drawn_micro"]
    hold = Hold(
        hold_id=HoldId(row["hold_id"]),
        hold_micro=row["hold_micro"],
        allocation_id=None if allocation_id is None else AllocationId(allocation_id),
        expires_ms=ms_of(row["expires_at"]),
        ended_by=row["ended"],
        reserved=tuple(zip(row["places"], row["reserved"], strict=True)),
        placed_seq=row["placed_seq"] or 0,
        short_micro=row["short_micro"],
        drawn_micro=drawn_micro or 0,
    )
    return hold if drawn_micro is not None else replace(hold, drawn_micro=hold.given_up_micro)


def _columns_of_holds(holds: Sequence[tuple[str, Hold]]) -> tuple[list[object], ...]:
    return (
        [tenant_id for tenant_id, _ in holds],
        [hold.hold_id for _, hold in holds],
        [hold.hold_micro for _, hold in holds],
        [hold.allocation_id for _, hold in holds],
        [moment_of(hold.expires_ms) for _, hold in holds],
        [hold.ended_by for _, hold in holds],
        [pg_array(place for place, _ in hold.reserved) for _, hold in holds],
        [pg_array(str(micro) for _, micro in hold.reserved) for _, hold in holds],
        [hold.placed_seq for _, hold in holds],
        [hold.short_micro for _, hold in holds],
        [hold.drawn_micro for _, hold in holds],
    )


class PlacedJob(Struct, frozen=True, kw_only=True):
    """A hold with what was said of its job when it was placed."""

    tenant_id: TenantId
    hold: Hold
    terms: UsageTerms
    job_ref: str


_SELECT_JOBS = SELECT_HOLD + ", " + _HOLD_FACTS + " from holds"
_JOB_OF = _SELECT_JOBS + " where hold_id = $1"
# In the order of their ids, so that a page ends where the next begins whatever happens between.
_JOBS_AFTER = (
    _SELECT_JOBS
    + """
 where hold_id > $1
   and ($2::text is null or tenant_id = $2)
   and ($3::text is null or job_ref = $3)
"""
)
_IN_ORDER = " order by hold_id limit $4"
_ANY_JOBS_AFTER = _JOBS_AFTER + _IN_ORDER
# Few holds are open of all that ever were, and an index has those. What is over by the clock is not
# open, whatever is written.
_OPEN_JOBS_AFTER = _JOBS_AFTER + " and ended is null and expires_at > $5" + _IN_ORDER
_ENDED_JOBS_AFTER = _JOBS_AFTER + " and (ended is not null or expires_at <= $5)" + _IN_ORDER


async def job_of(connection: Connection, hold_id: str) -> PlacedJob | None:
    """Find a hold that this transaction may see, with what it is for."""
    row = await connection.fetchrow(_JOB_OF, hold_id)
    return None if row is None else _job_from_row(row)


async def jobs_after(
    connection: Connection,
    after: str,
    limit: int,
    *,
    now_ms: int,
    is_open: bool | None,
    tenant_id: str | None,
    job_ref: str | None,
) -> list[PlacedJob]:
    """List holds that this transaction may see, in order of their ids, after one."""
    asked = after, tenant_id, job_ref, limit
    if is_open is None:
        rows = await connection.fetch(_ANY_JOBS_AFTER, *asked)
    else:
        found = _OPEN_JOBS_AFTER if is_open else _ENDED_JOBS_AFTER
        rows = await connection.fetch(found, *asked, moment_of(now_ms))
    return list(map(_job_from_row, rows))


def _job_from_row(row: Row) -> PlacedJob:
    return PlacedJob(
        tenant_id=TenantId(row["tenant_id"]),
        hold=hold_from_row(row),
        terms=_terms_from_row(row),
        job_ref=row["job_ref"],
    )
