"""Every hot query uses an index: at ten million entries a scan would be an outage (L28)."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any
from uuid import UUID

import pytest

from integration.ledger.real import RealLedger
from ledger.store import (
    books,
    directory,
    entries,
    holds,
    outcomes,
    programmes,
    proposals,
    queries,
    sequence,
)

NOW = dt.datetime(2025, 7, 31, tzinfo=dt.UTC)
BUCKET = [UUID(int=1)]

QUERIES: list[tuple[str, str, tuple[object, ...]]] = [
    ("lock books", books._LOCK_BOOKS, (["a"],)),
    ("load lots", books._LOAD_LOTS, (["a"], False, NOW)),
    ("load buckets", books._LOAD_BUCKETS, (["a"], [NOW], BUCKET)),
    ("load holds", holds._LOAD_HOLDS, (["a"], ["h"])),
    ("holds of allocations", holds._LOAD_HOLDS_OF_ALLOCATIONS, (["a"], ["lhr"], ["x"])),
    ("holds that are over", holds._FIND_DUE, (NOW, 10)),
    ("holds of books that are over", holds._LOAD_DUE, (["a"], NOW)),
    ("holds of a job", holds._ANY_JOBS_AFTER, ("", None, "job", 100)),
    ("open holds", holds._OPEN_JOBS_AFTER, ("", None, None, 100, NOW)),
    ("ended holds", holds._ENDED_JOBS_AFTER, ("", None, None, 100, NOW)),
    ("holds on lots", holds._LOAD_HOLDS_ON, (["a"], ["lot:g"])),
    ("lots that are over", books._FIND_LOTS_OVER, (NOW, *books.FIRST_LOT, 10)),
    ("entries after", entries._ENTRIES_AFTER, ("a", 5, 100)),
    ("hashes", entries._HASHES_OF, (["a"], [1])),
    ("window end", sequence._WINDOW_END, ("1", "2", 100)),
    ("window entries", sequence._WINDOW_ENTRIES, ("1", "2")),
    ("unpublished", sequence._UNPUBLISHED, (100,)),
    ("last window", sequence._LAST_WINDOW, ()),
    ("ahead of the server", sequence._IS_AHEAD, ()),
    ("due watermarks", sequence._DUE_WATERMARKS, ("1",)),
    ("balance", queries._BALANCE, ("a", NOW, 0)),
    ("hold", queries._HOLD_WITH_BOOK, ("h", NOW)),
    ("proposal", proposals._FIND_PROPOSAL, ("p",)),
    ("proposals", proposals._LIST_PROPOSALS, (0, "proposed", None, None, 10)),
    ("proposals of a tenant", proposals._LIST_PROPOSALS, (0, None, None, "a", 10)),
    ("grants of a file", directory._GRANTS_OF_IDS, (["g1", "g2"],)),
    ("grants to decide", proposals._LIST_GRANTS, (0, ["proposed"], None, 10)),
    ("programmes", programmes._PROGRAMMES, (NOW, "", None, 10)),
    ("shares", programmes._SHARES, (NOW, ["p"], "", 10)),
    ("grants", programmes._LIST_GRANTS, (0, "a", None, None, None, None, 10)),
    ("grants of a programme", programmes._LIST_GRANTS, (0, None, "p", "approved", True, NOW, 10)),
    ("outcomes of a grant", outcomes._OUTCOMES_OF, ("g", 10)),
    ("outcomes to decide by", outcomes._LOCK_OUTCOMES, ("g", 10)),
    ("outcomes counted", outcomes._COUNT_OUTCOMES, ("g",)),
    ("costs of outcomes", outcomes._COSTS, ("", "", 10)),
    ("price lines", directory._PRICE_LINES_OF, ("PKR", "sku", "on_demand")),
]
BIG = {"entries", "buckets", "books", "lots", "holds", "sequence_windows", "price_lines", "grants"}
BIG |= {"unpublished_watermarks", "proposals", "accounts", "outcomes"}


def scanned(plan: dict[str, Any]) -> set[str]:
    """The tables read from end to end."""
    found = {plan["Relation Name"]} if plan["Node Type"] == "Seq Scan" else set()
    for part in plan.get("Plans", ()):
        found |= scanned(part)
    return found


@pytest.mark.defect("L28")
@pytest.mark.parametrize(("name", "query", "values"), QUERIES, ids=[query[0] for query in QUERIES])
async def test_a_hot_query_never_scans_a_big_table(
    ledger: RealLedger, name: str, query: str, values: tuple[object, ...]
) -> None:
    """With sequential scans made unattractive, as a big table makes them."""
    # By a role that may read every table: which of ours asks is no matter here.
    async with ledger.admin.transaction() as connection:
        await connection.execute("set local enable_seqscan = off")
        text = await connection.fetchval(f"explain (format json) {query}", *values)
    (found,) = json.loads(text)
    assert set() == scanned(found["Plan"]) & BIG
