"""Until when the usage of a tenant is complete: what the hubs' watermarks come to. SQL.

Every hub's watermarks come through each partition of charges, and a tenant's charges through one.
So what is complete is asked by partition; which hubs there are, any partition may have heard first.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from hisab_contracts.units import optional_ms_of
from ledger.core.balance import complete_until

if TYPE_CHECKING:
    from runtime.database import Connection

# A watermark for each hub that any partition has heard of: null where this one has not, or where
# the hub has stated none.
_OF_PARTITIONS = """
select p.partition,
       array(select w.watermark_at
               from (select distinct hub from hub_watermarks) h
               left join hub_watermarks w on w.hub = h.hub and w.partition = p.partition
            ) as watermarks
  from unnest($1::int[]) as p (partition)
"""
_BY_HUB = "select hub, watermark_at from hub_watermarks order by hub, partition"


async def complete_until_of(
    connection: Connection, partitions: Collection[int]
) -> dict[int, int | None]:
    """Say until when all usage that comes through each partition has been heard of; None: never."""
    rows = await connection.fetch(_OF_PARTITIONS, sorted(partitions))
    return {
        row["partition"]: complete_until(optional_ms_of(at) for at in row["watermarks"])
        for row in rows
    }


async def watermarks_by_hub(connection: Connection) -> dict[str, list[int | None]]:
    """Read each hub's watermarks, one per partition that has heard of it."""
    found: dict[str, list[int | None]] = {}
    for row in await connection.fetch(_BY_HUB):
        found.setdefault(row["hub"], []).append(optional_ms_of(row["watermark_at"]))
    return found
