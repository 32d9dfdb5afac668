"""Every page of metering is bounded in bytes, by the database, before anything is read."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from hisab_contracts.ids import SourcePath
from infrastructure import Database as Addresses
from integration.metering.stored import LHR, opened
from metering.api.quarantine import quarantine_item
from metering.api.sources import source_view
from metering.store import hubs
from metering.store.quarantine import (
    MAX_LISTED_BYTES,
    QuarantineFilter,
    list_quarantined,
)

EVERYTHING = QuarantineFilter(None, None, None)
MOST = 1_000


@pytest.mark.parametrize(
    ("value_bytes", "headers"),
    [
        (900_000, []),
        (0, [("big", b"x" * 900_000)]),
        (0, [("", None)] * 20_000),
        (0, [("\x01" * 900, None)] * 100),
    ],
    ids=["values", "headers", "many headers", "escaped names"],
)
async def test_page_of_quarantine_is_bounded_whatever_its_records_carry(
    migrated: Callable[[str], Addresses],
    value_bytes: int,
    headers: list[tuple[str, bytes | None]],
) -> None:
    """Pages end before 8 MiB; together they show every record once."""
    records = 25
    async with opened(migrated("metering")) as metering:
        await metering.facts([])
        for _ in range(records):
            await metering.take_values([b"\xfe" * value_bytes], headers=headers)
        shown: list[int] = []
        more = True
        while more:
            after = shown[-1] if shown else 0
            async with metering.api.transaction(tenant="*") as connection:
                page, more = await list_quarantined(connection, EVERYTHING, after, MOST)
            answer = msgspec.json.encode([quarantine_item(record) for record in page])
            assert len(page) == 1 or len(answer) <= MAX_LISTED_BYTES
            assert 0 < len(page) < records
            shown += [record.quarantine_id for record in page]
    assert list(range(1, records + 1)) == shown


async def test_page_of_sources_is_bounded_however_many_gaps_they_have(
    migrated: Callable[[str], Addresses],
) -> None:
    """A thousand sources of a thousand gaps each would be 80 MB: a page ends before 8 MiB."""
    gaps = [[2 * number, 2 * number + 1, None, None, False] for number in range(1, 1_001)]
    sources = 300
    async with opened(migrated("metering")) as metering:
        await metering.facts([])
        await metering.rows(
            "insert into sources (hub, source, node_path, contiguous, beyond, standing, "
            "last_seen_ms) select 'lhr', 's' || lpad(n::text, 4, '0'), 'n', 0, $1::jsonb, "
            "'active', 0 from generate_series(1, $2::int) as n",
            msgspec.json.encode(gaps).decode(),
            sources,
        )
        shown: list[SourcePath] = []
        more = True
        while more:
            after = shown[-1] if shown else ""
            async with metering.api.transaction(tenant="*") as connection:
                page, more = await hubs.list_sources(connection, LHR, after, MOST)
            answer = msgspec.json.encode([source_view(source) for source in page])
            assert len(answer) <= hubs.MAX_LISTED_BYTES
            assert 0 < len(page) < sources
            shown += [source.path for source in page]
    assert [f"s{number:04d}" for number in range(1, sources + 1)] == shown
