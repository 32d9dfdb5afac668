"""What a batch of entries costs while its book has a gap, by how many entries came behind the gap.

The consumer looks at what is behind a gap with every batch, in case the batch fills it. However
many entries wait there, it reads no further than one statement past the gap: `growth` is the cost
per batch at the larger size over that at the smaller one, and stays near 1.
"""

from __future__ import annotations

import time
from typing import Any

from infrastructure import Infrastructure
from integration.invoicing.months import Books, books_in, charge
from stack import Stack

SIZES = (10_000, 300_000)
BATCHES = 400
BATCH = 50
KEPT_AT_ONCE = 5_000


async def measure(stack: Stack) -> list[dict[str, Any]]:
    """Measure both sizes, each in a database of its own on the stack's server."""
    small, large = [await _batches_per_s(Infrastructure.of(stack), size) for size in SIZES]
    return [
        {
            "name": "invoicing.gap_scan",
            "value": round(large, 1),
            "unit": "batches/s",
            "work": BATCHES,
            "seconds": round(BATCHES / large, 2),
            "entries_behind_gap": SIZES[1],
            "baseline": {"name": f"{SIZES[0]} entries behind the gap", "value": round(small, 1)},
            "ratio": round(large / small, 3),
            "growth": round(small / large, 3),
        }
    ]


async def _batches_per_s(infrastructure: Infrastructure, behind: int) -> float:
    database = infrastructure.migrated_database("invoicing")
    try:
        async with books_in(database) as books:
            await _keep(books, 3, behind, KEPT_AT_ONCE)
            begun = time.perf_counter()
            await _keep(books, 3 + behind, BATCHES * BATCH, BATCH)
            return BATCHES / (time.perf_counter() - begun)
    finally:
        infrastructure.drop_database(database)


async def _keep(books: Books, first: int, count: int, at_once: int) -> None:
    """Keep charges of one book from a seq on; the entry before them is missing for good."""
    for start in range(first, first + count, at_once):
        await books.keep(*(charge("a", seq, 1) for seq in range(start, start + at_once)))
