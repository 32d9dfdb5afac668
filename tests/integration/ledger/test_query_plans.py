"""Every hot query uses an index: at ten million entries a scan would be an outage (L28)."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any
from uuid import UUID

import pytest

from integration.ledger.real import RealLedger
from ledger.store import books, directory, entries, queries

NOW = dt.datetime(2025, 7, 31, tzinfo=dt.UTC)
BUCKET = [UUID(int=1)]

QUERIES: list[tuple[str, str, tuple[object, ...]]] = [
    ("lock books", books._LOCK_BOOKS, (["a"],)),
    ("load lots", books._LOAD_LOTS, (["a"], False)),
    ("load buckets", books._LOAD_BUCKETS, (["a"], [NOW], BUCKET)),
    ("load holds", books._LOAD_HOLDS, (["a"], ["h"])),
    ("holds of allocations", books._LOAD_HOLDS_OF_ALLOCATIONS, (["a"], ["lhr"], ["x"])),
    ("holds that are over", books._FIND_DUE, (NOW, 10)),
    ("holds of books that are over", books._LOAD_DUE, (["a"], NOW)),
    ("entries after", entries._ENTRIES_AFTER, ("a", 5, 100)),
    ("window entries", entries._WINDOW_ENTRIES, ("1", "2", "", 0, 100)),
    ("unpublished", entries._UNPUBLISHED, ()),
    ("last window", entries._LAST_WINDOW, ()),
    ("balance", queries._BALANCE, ("a", NOW, 0)),
    ("hold", queries._HOLD_WITH_BOOK, ("h", NOW)),
    ("price lines", directory._PRICE_LINES_OF, ("PKR", "sku", "on_demand")),
]
BIG = {"entries", "buckets", "books", "lots", "holds", "sequence_windows", "price_lines", "grants"}


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
    async with ledger.writer.transaction() as connection:
        await connection.execute("set local enable_seqscan = off")
        text = await connection.fetchval(f"explain (format json) {query}", *values)
    (found,) = json.loads(text)
    assert set() == scanned(found["Plan"]) & BIG
