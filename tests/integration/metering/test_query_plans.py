"""Every hot query of metering uses an index: what it stores grows for years."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from infrastructure import Infrastructure, run_apart
from metering.store import (
    allocations,
    corrections,
    hubs,
    prices,
    proposals,
    quarantine,
    queries,
    state,
    usage_reports,
)

NODE = (["lhr"], ["n1"])
JOB = ("lhr", "job-1", "ravi-health")
HOURS = (0, 86_400_000, 0, 86_400_000)
EVERYTHING: tuple[object, ...] = (3_600_000, [], [], None, None, None, None, None, None, 1_001)
OF_HUB = ("lhr", 0, 86_400_000)
QUERIES: list[tuple[str, str, tuple[object, ...]]] = [
    ("lock nodes", state._LOCK_NODES, NODE),
    ("coverage", state._COVERAGE, (*NODE, ["GPU-1"], [0], [0], [1])),
    ("buckets", state._BUCKETS, ([UUID(int=1)],)),
    ("buckets of corrected", state._CORRECTED_BUCKETS, (["lhr"], ["job-1"], [0], [1])),
    ("corrected hubs", corrections._CORRECTED_HUBS, (["lhr"],)),
    ("known corrections", corrections._KNOWN, (["lhr"], ["job-1"])),
    ("waiting corrections", corrections._LOCK_WAITING, ([1],)),
    (
        "devices that corrections name",
        corrections._NAMED_DEVICES,
        (["lhr"], [None], ["job-1"], [0], [0], [1]),
    ),
    ("freed coverage", corrections._FREED, (*NODE, ["GPU-1"], [0], [0], [1])),
    ("lock a proposal", proposals._LOCK, ("c",)),
    ("approved corrections", proposals._APPROVED, ("lhr", "job-1")),
    ("corrections that do not count", proposals._NOT_COUNTING, (10,)),
    ("corrections of an allocation", proposals._LISTED, ("lhr", "job-1", 0, 10)),
    ("corrections of any", proposals._LISTED, (None, None, 0, 10)),
    ("conflicts", quarantine._CONFLICTS, ("lhr", 0, 1, 0, 500)),
    ("tallies", state._LOCK_TALLIES, (["lhr"], [0], [0])),
    ("price lines", prices._LINES_OF, ("PKR", "h100", "spot")),
    ("sources of nodes", state._LOCK_SOURCES, (["/hubs/lhr/nodes/n1"], [])),
    ("quarantined before", state._EARLIER_QUARANTINE, (["t"], [0], [0], [9])),
    ("lock quarantined", quarantine._LOCK, ([1],)),
    ("quarantine of any kind", quarantine._LISTED, (None, None, None, 0, 10, 1)),
    ("quarantine of a hub", quarantine._LISTED, ("lhr", None, None, 0, 10, 1)),
    ("quarantine of a reason", quarantine._LISTED, (None, "conflict", None, 0, 10, 1)),
    ("open quarantine", quarantine._LISTED, ("lhr", None, "open", 0, 10, 1)),
    ("dismissed quarantine", quarantine._LISTED, (None, None, "dismissed", 0, 10, 1)),
    ("times of quarantined", quarantine._TIMES_OF, ([1],)),
    ("forget time", quarantine._FORGET_TIME, ([1],)),
    ("releasable", quarantine._RELEASABLE, (500,)),
    ("due allocations", allocations._DUE, (["lhr"], 500)),
    ("passed allocations", allocations._PASSED, (["lhr"], [1], 500)),
    ("deciding about allocations", allocations._DECIDING, (["lhr"], ["job-1"], ["t"])),
    ("lock ended", allocations._LOCK_ENDED, (["lhr"], ["job-1"], ["t"])),
    ("wake tenants", allocations._WAKE_TENANTS, (["t"],)),
    ("is hub", hubs._IS_HUB, ("lhr",)),
    ("completeness", hubs._COMPLETENESS, (None,)),
    ("views", hubs._VIEWS, (None,)),
    ("active sources", hubs._ACTIVE_SOURCES, (None,)),
    ("open time", hubs._OPEN_TIME, (None,)),
    ("sources named", hubs._SOURCES_NAMED, ("lhr", ["/hubs/lhr/nodes/n1/epochs/e1"])),
    ("page of sources", hubs._SOURCE_PAGE, ("lhr", "", 10, 1)),
    ("lock a source", hubs._LOCK_SOURCE, ("lhr", "/hubs/lhr/nodes/n1/epochs/e1")),
    ("reconciliation", queries._SUMS, (["lhr"], 0, 3_600_000)),
    ("owners of an allocation", queries._OWNERS, (*JOB, 1)),
    ("claimants of an allocation", queries._CLAIMANTS, JOB),
    ("sums of an allocation", queries._SUMS_OF, JOB),
    ("buckets of an allocation", queries._BUCKETS_OF, (*JOB, 0, "n1", "", 1)),
    ("intervals of an allocation", queries._INTERVALS_OF, (*JOB, "t", "n1", "g", "g", 0, 1)),
    ("usage of all", usage_reports._REPORT, (*HOURS, *[None] * 5, *EVERYTHING)),
    ("usage of a hub", usage_reports._REPORT, (*HOURS, None, "lhr", *[None] * 3, *EVERYTHING)),
    ("usage of a tenant", usage_reports._REPORT, (*HOURS, "t", *[None] * 4, *EVERYTHING)),
    ("folded usage", usage_reports._FOLD, (1,)),
    ("wrong sums of usage", usage_reports._COUNT_MISSING, OF_HUB),
    ("mended sums of usage", usage_reports._MEND, OF_HUB),
    ("hours used", usage_reports._HOURS_OF_HUB, ("lhr",)),
    ("quarantined of an allocation", queries._QUARANTINED_OF, (*JOB, 0, 1)),
]
BIG = {
    "allocation_duplicates",
    "allocations",
    "buckets",
    "corrections",
    "coverage",
    "freed_coverage",
    "nodes",
    "price_lines",
    "quarantine",
    "quarantine_time",
    "sources",
    "tallies",
    "usage_days",
    "usage_hours",
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


@pytest.mark.parametrize(("name", "query", "values"), QUERIES, ids=[case[0] for case in QUERIES])
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
