"""Usage added up: the sums that reports read, and how changes of buckets get into them.

A trigger writes down in `usage_changes` what every statement changed of buckets, in the writer's
transaction; only ever inserted, so that no writer waits for another. The leased task moves them
into `usage_hours` and `usage_days`. A report reads sums and changes in one statement, so it is
exact at every instant, whatever was moved meanwhile (decision 0021). Reports run on the `api` role:
row-level security shows a tenant's key only what is the tenant's.

What a line adds up: `gpu_ns` and `charge_micro` of buckets, as they are stated to the ledger;
`buckets.refunded_micro`, what refunds gave back of it; `buckets.voided_gpu_ns`, the time that
corrections took out of a bucket, under the terms by which it was reported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hisab_contracts.ids import HubCode, PriceClass, ProjectId, Sku, TenantId
from metering.core.usage_reports import (
    UsageLine,
    UsagePlace,
    UsageReport,
    page_windows,
    plan_of,
)

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection

_TERMS: Final = "tenant_id, hub, project_id, sku, price_class"
_SUMS: Final = "gpu_ns, charge_micro, refunded_micro, voided_gpu_ns"
_SOMETHING: Final = """
having sum(gpu_ns) <> 0 or sum(charge_micro) <> 0
    or sum(refunded_micro) <> 0 or sum(voided_gpu_ns) <> 0
"""
_ADDED_UP: Final = """sum(gpu_ns) as gpu_ns, sum(charge_micro) as charge_micro,
       sum(refunded_micro) as refunded_micro, sum(voided_gpu_ns) as voided_gpu_ns
"""

# Reports.

_WANTED: Final = """
     and ($5::text is null or tenant_id = $5) and ($6::text is null or hub = $6)
     and ($7::text is null or project_id = $7) and ($8::text is null or sku = $8)
     and ($9::text is null or price_class = $9)
"""

# Whole days, the hours before and after them, and what is not yet in either. A key that is not
# grouped by is empty, so that one statement has every grouping; a line in which nothing is left,
# like that of a bucket which was repaired away, is none.
_REPORT = (
    "with chosen as (select day_ms as start_ms, "
    + _TERMS
    + ", "
    + _SUMS
    + " from usage_days where day_ms >= $3 and day_ms < $4"
    + _WANTED
    + "union all select hour_ms, "
    + _TERMS
    + ", "
    + _SUMS
    + " from usage_hours where hour_ms >= $1 and hour_ms < least($2, $3)"
    + _WANTED
    + "union all select hour_ms, "
    + _TERMS
    + ", "
    + _SUMS
    + " from usage_hours where hour_ms >= $4 and hour_ms < $2"
    + _WANTED
    + "union all select hour_ms, "
    + _TERMS
    + ", "
    + _SUMS
    + " from usage_changes where hour_ms >= $1 and hour_ms < $2"
    + _WANTED
    + """), placed as (
  select case when $10::bigint > 0 then start_ms - (start_ms + 18000000) % $10
              else ($11::bigint[])[width_bucket(start_ms, $11)] end as start_ms,
         case when 'tenant_id' = any($12::text[]) then tenant_id else '' end as tenant_id,
         case when 'hub' = any($12) then hub else '' end as hub,
         case when 'project_id' = any($12) then project_id else '' end as project_id,
         case when 'sku' = any($12) then sku else '' end as sku,
         case when 'price_class' = any($12) then price_class else '' end as price_class, """
    + _SUMS
    + """
    from chosen
)
select start_ms, """
    + _TERMS
    + ", "
    + _ADDED_UP
    + """  from placed
 where $13::bigint is null
    or (start_ms, tenant_id, hub, project_id, sku, price_class) > ($13, $14, $15, $16, $17, $18)
 group by start_ms, """
    + _TERMS
    + _SOMETHING
    + " order by start_ms, "
    + _TERMS
    + " limit $19"
)


async def list_usage(
    connection: Connection, report: UsageReport, after: UsagePlace | None, most: int
) -> list[UsageLine]:
    """List lines of a report in order, at most so many; fewer are all that there are.

    Each window is a statement: together they are of one instant only in one snapshot.
    """
    lines: list[UsageLine] = []
    for window in page_windows(report, after):
        lines += await _read_window(connection, window, after, most - len(lines))
        if len(lines) == most:
            break
    return lines


async def _read_window(
    connection: Connection, report: UsageReport, after: UsagePlace | None, most: int
) -> list[UsageLine]:
    plan = plan_of(report)
    rows = await connection.fetch(
        _REPORT,
        report.from_ms,
        report.until_ms,
        plan.day_from_ms,
        plan.day_until_ms,
        report.tenant_id,
        report.hub,
        report.project_id,
        report.sku,
        report.price_class,
        plan.unit_ms,
        plan.starts_ms,
        list(report.keys),
        *((None,) * len(UsagePlace._fields) if after is None else after),
        most,
    )
    return [_line_from_row(row) for row in rows]


def _line_from_row(row: Row) -> UsageLine:
    return UsageLine(
        place=UsagePlace(
            start_ms=row["start_ms"],
            tenant_id=TenantId(row["tenant_id"]),
            hub=HubCode(row["hub"]),
            project_id=ProjectId(row["project_id"]),
            sku=Sku(row["sku"]),
            price_class=PriceClass(row["price_class"]),
        ),
        gpu_ns=row["gpu_ns"],
        charge_micro=row["charge_micro"],
        refunded_micro=row["refunded_micro"],
        voided_gpu_ns=row["voided_gpu_ns"],
    )


# Adding changes to the sums.

_MORE: Final = """
   set gpu_ns = s.gpu_ns + k.gpu_ns, charge_micro = s.charge_micro + k.charge_micro,
       refunded_micro = s.refunded_micro + k.refunded_micro,
       voided_gpu_ns = s.voided_gpu_ns + k.voided_gpu_ns
"""
_OR_MORE: Final = """ do update
   set gpu_ns = s.gpu_ns + excluded.gpu_ns, charge_micro = s.charge_micro + excluded.charge_micro,
       refunded_micro = s.refunded_micro + excluded.refunded_micro,
       voided_gpu_ns = s.voided_gpu_ns + excluded.voided_gpu_ns
"""
_SAME_TERMS: Final = """ s.tenant_id = k.tenant_id and s.hub = k.hub
   and s.project_id = k.project_id and s.sku = k.sku and s.price_class = k.price_class
"""
_NOTHING_LESS: Final = (
    " gpu_ns >= 0 and charge_micro >= 0 and refunded_micro >= 0 and voided_gpu_ns >= 0 "
)
_SOMETHING_LESS: Final = (
    " (k.gpu_ns < 0 or k.charge_micro < 0 or k.refunded_micro < 0 or k.voided_gpu_ns < 0) and"
)

# Adds what `hourly` and `daily` say to the sums, or takes it away. What takes away finds a row,
# since nothing is below zero; it may not be proposed as a new one, because PostgreSQL holds that
# to the table's checks before it looks for the row.
_ADD: Final = (
    ", more_hours as (insert into usage_hours as s (hour_ms, "
    + _TERMS
    + ", "
    + _SUMS
    + ") select hour_ms, "
    + _TERMS
    + ", "
    + _SUMS
    + " from hourly where"
    + _NOTHING_LESS
    + "order by tenant_id, hour_ms, hub, project_id, sku, price_class on conflict"
    + " (tenant_id, hour_ms, hub, project_id, sku, price_class)"
    + _OR_MORE
    + "), less_hours as (update usage_hours s"
    + _MORE
    + " from hourly k where"
    + _SOMETHING_LESS
    + " s.hour_ms = k.hour_ms and"
    + _SAME_TERMS
    + "), more_days as (insert into usage_days as s (day_ms, "
    + _TERMS
    + ", "
    + _SUMS
    + ") select day_ms, "
    + _TERMS
    + ", "
    + _SUMS
    + " from daily where"
    + _NOTHING_LESS
    + "order by tenant_id, day_ms, hub, project_id, sku, price_class on conflict"
    + " (tenant_id, day_ms, hub, project_id, sku, price_class)"
    + _OR_MORE
    + "), less_days as (update usage_days s"
    + _MORE
    + " from daily k where"
    + _SOMETHING_LESS
    + " s.day_ms = k.day_ms and"
    + _SAME_TERMS
    + ")"
)

# The last of the oldest changes.
_OLDEST = """
select max(change) from (select change from usage_changes order by change limit $1) oldest
"""

# In one statement, so that a report sees a change in one place, once. The hours are marked, to be
# compared with what the ledger has booked.
_FOLD = (
    "with taken as (delete from usage_changes where change <= $1 returning hour_ms, "
    + _TERMS
    + ", "
    + _SUMS
    + "), hourly as (select hour_ms, "
    + _TERMS
    + ", "
    + _ADDED_UP
    + " from taken group by hour_ms, "
    + _TERMS
    + "), daily as (select hour_ms - (hour_ms + 18000000) % 86400000 as day_ms, "
    + _TERMS
    + ", "
    + _ADDED_UP
    + " from hourly group by 1, "
    + _TERMS
    + ")"
    + _ADD
    + """, marked as (
  insert into changed_hours as c (hub, hour_ms)
  select distinct hub, hour_ms from hourly order by hub, hour_ms
  on conflict (hub, hour_ms) do update set marks = c.marks + 1
) select count(*) from taken"""
)


async def fold_changes(connection: Connection, most: int) -> int:
    """Add the oldest changes to the sums, about so many; return how many there were.

    Whoever takes from a bucket has waited for whoever filled it, and so has a later change: in
    their order no sum is below zero. A change that is committed late is taken up next time.
    """
    last_change = await connection.fetchval(_OLDEST, most)
    return 0 if last_change is None else int(await connection.fetchval(_FOLD, last_change))


# Holding the sums against the buckets.

_OF_HUB: Final = " where hub = $1 and hour_ms >= $2 and hour_ms < $3"
_TAKEN_AWAY: Final = "-gpu_ns, -charge_micro, -refunded_micro, -voided_gpu_ns"

# What buckets have more than sums and changes, hour by hour. It stays the same whoever writes or
# folds meanwhile: both sides of it change together.
_MISSING_IN_HOURS = (
    "select hour_ms, "
    + _TERMS
    + ", "
    + _ADDED_UP
    + " from (select hour_ms, "
    + _TERMS
    + ", "
    + _SUMS
    + " from buckets"
    + _OF_HUB
    + " union all select hour_ms, "
    + _TERMS
    + ", "
    + _TAKEN_AWAY
    + " from usage_hours"
    + _OF_HUB
    + " union all select hour_ms, "
    + _TERMS
    + ", "
    + _TAKEN_AWAY
    + " from usage_changes"
    + _OF_HUB
    + ") compared group by hour_ms, "
    + _TERMS
    + _SOMETHING
)
_MISSING_IN_DAYS = (
    "select day_ms, "
    + _TERMS
    + ", "
    + _ADDED_UP
    + " from (select hour_ms - (hour_ms + 18000000) % 86400000 as day_ms, "
    + _TERMS
    + ", "
    + _SUMS
    + " from buckets"
    + _OF_HUB
    + " union all select day_ms, "
    + _TERMS
    + ", "
    + _TAKEN_AWAY
    + " from usage_days where hub = $1 and day_ms >= $2 and day_ms < $3"
    + " union all select hour_ms - (hour_ms + 18000000) % 86400000, "
    + _TERMS
    + ", "
    + _TAKEN_AWAY
    + " from usage_changes"
    + _OF_HUB
    + ") compared group by day_ms, "
    + _TERMS
    + _SOMETHING
)
_COUNT_MISSING = (
    "select (select count(*) from ("
    + _MISSING_IN_HOURS
    + ") h) + (select count(*) from ("
    + _MISSING_IN_DAYS
    + ") d)"
)
_MEND = (
    "with hourly as ("
    + _MISSING_IN_HOURS
    + "), daily as ("
    + _MISSING_IN_DAYS
    + ")"
    + _ADD
    + " select (select count(*) from hourly) + (select count(*) from daily)"
)


async def count_wrong_sums(
    connection: Connection, hub: HubCode, from_ms: int, until_ms: int
) -> int:
    """Count sums of hours and days of a hub that are not what its buckets come to: 0 is right.

    `[from, until)` in whole days of Karachi, as in `mend_sums`.
    """
    return int(await connection.fetchval(_COUNT_MISSING, hub, from_ms, until_ms))


async def mend_sums(connection: Connection, hub: HubCode, from_ms: int, until_ms: int) -> int:
    """Add to the sums of a hub what its buckets have more, or less; return how many were wrong.

    Others may write meanwhile.
    """
    return int(await connection.fetchval(_MEND, hub, from_ms, until_ms))


# Also where sums are left without a bucket.
_HOURS_OF_HUB = """
select least((select min(hour_ms) from buckets where hub = $1),
             (select min(hour_ms) from usage_hours where hub = $1)) as first_hour_ms,
       greatest((select max(hour_ms) from buckets where hub = $1),
                (select max(hour_ms) from usage_hours where hub = $1)) as last_hour_ms
"""


async def hours_used(connection: Connection, hub: HubCode) -> tuple[int, int] | None:
    """Return the first and the last hour of a hub with a bucket or a sum; None: it has none."""
    row = await connection.fetchrow(_HOURS_OF_HUB, hub)
    if row is None or row["first_hour_ms"] is None:
        return None
    return row["first_hour_ms"], row["last_hour_ms"]
