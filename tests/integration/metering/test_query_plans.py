"""Every hot query of metering uses an index: what it stores grows for years."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from infrastructure import Infrastructure, run_apart
from metering import lookup, store, waiting

NODE = (["lhr"], ["n1"])
QUERIES: list[tuple[str, str, tuple[object, ...]]] = [
    ("lock nodes", store._LOCK_NODES, NODE),
    ("coverage", store._COVERAGE, (*NODE, ["GPU-1"], [0], [0], [1])),
    ("buckets", store._BUCKETS, ([UUID(int=1)],)),
    ("tallies", store._LOCK_TALLIES, (["lhr"], [0], [0])),
    ("last price line", store._LAST_PRICE_LINE, ("PKR", "h100", "spot", 0)),
    ("sources of nodes", waiting._SOURCES, (["/hubs/lhr/nodes/n1"], [])),
    ("quarantined before", waiting._ALREADY, (["t"], [0], [0], [9])),
    ("stored", waiting._STORED, ([1],)),
    ("forget time", waiting._FORGET_TIME, ([1],)),
    ("releasable", waiting._RELEASABLE, (500,)),
    ("endings", waiting._ENDINGS, (500,)),
    ("is hub", lookup._IS_HUB, ("lhr",)),
    ("completeness", lookup._COMPLETE, (None,)),
    ("views", lookup._VIEWS, (None,)),
    ("active sources", lookup._ACTIVE, (None,)),
    ("open time", lookup._OPEN_TIME, (None,)),
    ("sources named", lookup._HAS_SEEN, ("lhr", ["/hubs/lhr/nodes/n1/epochs/e1"])),
    ("reconciliation", lookup._RECONCILE, (["lhr"], 0, 3_600_000)),
    ("buckets of an allocation", lookup._BUCKETS_OF, ("lhr", "job-1", "ravi-health")),
]
BIG = {
    "allocations",
    "buckets",
    "coverage",
    "nodes",
    "price_lines",
    "quarantine",
    "quarantine_time",
    "sources",
    "tallies",
}


@pytest.fixture(scope="module")
def dsn(infrastructure: Infrastructure) -> Iterator[str]:
    """An empty database with metering's schema."""
    database = infrastructure.migrated_database("metering")
    yield database.admin
    infrastructure.drop_database(database)


def scanned(plan: dict[str, Any]) -> set[str]:
    """The tables read from end to end."""
    found = {plan["Relation Name"]} if plan["Node Type"] == "Seq Scan" else set()
    for part in plan.get("Plans", ()):
        found |= scanned(part)
    return found


@pytest.mark.parametrize(("name", "query", "values"), QUERIES, ids=[each[0] for each in QUERIES])
def test_a_hot_query_of_metering_never_scans_a_big_table(
    dsn: str, name: str, query: str, values: tuple[object, ...]
) -> None:
    """With sequential scans made unattractive, as a big table makes them."""

    async def plan() -> str:
        connection = await asyncpg.connect(dsn)
        try:
            await connection.execute("set enable_seqscan = off")
            return str(await connection.fetchval(f"explain (format json) {query}", *values))
        finally:
            await connection.close()

    (found,) = json.loads(run_apart(plan()))
    assert set() == scanned(found["Plan"]) & BIG, name
