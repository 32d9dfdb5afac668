"""A batch that touches more rows than are metered at once ends in the same accounts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hisab_contracts.ids import HubCode, PriceClass, Sku, TenantId, TopicId
from hisab_contracts.topics import CHARGES, DECISIONS, PRICES, QUARANTINE
from infrastructure import Infrastructure
from integration.runtime.bare import Bare, service_of_nothing
from metering.batches import THREAD_ABOVE_RECORDS
from metering.commands import dismiss_record
from metering.core.engine import MAX_ROWS
from metering.core.pricing import ListedPrice, PriceList, price_lines_of
from metering.ingest import Ingest
from metering.store import hubs, prices, quarantine, queries
from metering.store.quarantine import QuarantineFilter
from runtime.consumer import Batch
from runtime.database import watched_by
from runtime.outbox import Outbox
from runtime.records import Record
from unit.metering.hub_events import HEADERS, HOUR_MS, NOON_MS, event, interval, watermark

if TYPE_CHECKING:
    from runtime.database import Connection

LHR = HubCode("lhr")
EVERYTHING = QuarantineFilter(None, None, None)
JOB_1 = queries.AllocationFilter(LHR, "job-1", None)
PRICE = ListedPrice(Sku("h100-sxm-80"), PriceClass("on_demand"), 840_000_000)


def some_days() -> list[bytes]:
    """Long intervals of one node that overlap, repeat and contradict, then a watermark."""
    said = [
        interval(NOON_MS + start * HOUR_MS, NOON_MS + end * HOUR_MS, **members)
        for start, end, members in (
            (0, 40, {}),
            (20, 60, {}),
            (30, 35, {"allocation_id": "rival"}),
            (0, 40, {}),
            (60, 90, {"sku": "nobody-knows"}),
            (60, 61, {"tenant_id": "nobody"}),
            (61, 90, {}),
        )
    ]
    usage = [event(data, sequence) for sequence, data in enumerate(said, start=1)]
    return [*usage, event(watermark(NOON_MS), len(said) + 1, "watermark")]


async def facts(connection: Connection) -> None:
    """A hub, a tenant and its price."""
    await hubs.add_hub(connection, LHR, "Lahore", 60_000)
    await prices.save_tenants(connection, {TenantId("ravi-health"): "PKR"})


@pytest.mark.defect("F70")
@pytest.mark.parametrize("max_rows", [1, 60])
def test_accounts_do_not_depend_on_how_much_is_metered_at_once(
    infrastructure: Infrastructure, tmp_path: Path, max_rows: int
) -> None:
    """Record by record, or two by two: buckets, tallies, quarantine and sources come out alike."""
    whole = asyncio.run(taken(infrastructure, tmp_path, some_days()))
    assert 7 == whole[0].read_records
    assert whole == asyncio.run(taken(infrastructure, tmp_path, some_days(), max_rows=max_rows))


def test_accounts_do_not_depend_on_who_decides_the_thread_or_the_loop(
    infrastructure: Infrastructure, tmp_path: Path
) -> None:
    """A batch so large that a thread decides about it comes out as its small pieces do."""
    minute_ms = HOUR_MS // 60
    minutes = [
        event(interval(start_ms, start_ms + 2 * minute_ms), sequence)
        for sequence, start_ms in enumerate(
            range(NOON_MS, NOON_MS + (THREAD_ABOVE_RECORDS + 100) * minute_ms, minute_ms), start=1
        )
    ]
    whole = asyncio.run(taken(infrastructure, tmp_path, minutes))
    assert THREAD_ABOVE_RECORDS + 100 == whole[0].accepted_records
    assert whole == asyncio.run(taken(infrastructure, tmp_path, minutes, batch_size=100))


def test_a_record_of_a_topic_made_anew_is_judged_though_its_place_was_quarantined(
    infrastructure: Infrastructure, tmp_path: Path
) -> None:
    """Another log or other bytes at the same offset are another record; the same one is passed."""
    bad, good = b"{", event(interval(), 1)
    again = asyncio.run(
        taken(infrastructure, tmp_path, [bad], rounds=[("A", [bad]), ("A", [good])])
    )
    anew = asyncio.run(taken(infrastructure, tmp_path, [bad], rounds=[("B", [bad]), ("B", [good])]))
    assert (2, 1) == (again[0].read_records, again[0].accepted_records)
    assert (3, 1) == (anew[0].read_records, anew[0].accepted_records)


def test_what_was_dismissed_in_one_log_is_judged_in_a_topic_made_anew(
    infrastructure: Infrastructure, tmp_path: Path
) -> None:
    """An agent sends its spool again: the same bytes at the same place are another record."""
    values, rounds = [b"{"], [("B", [b"{"])]
    found = asyncio.run(taken(infrastructure, tmp_path, values, rounds=rounds, dismisses=True))
    assert ["dismissed", "open"] == [listed.state for listed in found[4][0]]


def test_a_transaction_of_many_rounds_says_that_it_moves(
    infrastructure: Infrastructure, tmp_path: Path
) -> None:
    """A backfill takes longer than a consumer may stand still: what each round stores is noted."""
    notes: list[None] = []

    def moved() -> None:
        notes.append(None)

    with watched_by(moved):
        asyncio.run(taken(infrastructure, tmp_path, some_days(), max_rows=1))
    assert len(notes) >= 4 * len(some_days())


async def taken(
    infrastructure: Infrastructure,
    folder: Path,
    values: list[bytes],
    *,
    max_rows: int = MAX_ROWS,
    batch_size: int = 1_000,
    rounds: Sequence[tuple[str, list[bytes]]] = (),
    dismisses: bool = False,
) -> Any:
    """Take records into an empty database; return what its tables say.

    They are of log A. In further rounds, records of named logs come from the same offsets; before
    them, an operator may dismiss the first record that went to quarantine.
    """
    dsns = infrastructure.migrated_database("metering")
    bare = Bare(service_of_nothing(folder), dsns, infrastructure.bootstrap_servers)
    topic = f"hub.{LHR}.usage.v1"
    logs = [
        (
            topic_id,
            [
                Record(topic, 0, at, NOON_MS + 200 * HOUR_MS, None, value, tuple(HEADERS))
                for at, value in enumerate(sent)
            ],
        )
        for topic_id, sent in [("A", values), *rounds]
    ]
    outbox = Outbox((CHARGES, DECISIONS, QUARANTINE, PRICES))
    async with bare.open_kit() as kit:
        async with kit.writer.transaction() as connection:
            await facts(connection)
        async with kit.api.transaction(tenant="*") as connection:
            lines = price_lines_of(PriceList("PKR", 1_577_836_800_000, None, (PRICE,)))
            await prices.add_price_list(connection, lines, "key:operator")
        ingest = Ingest(outbox, max_rows=max_rows)
        for topic_id, records in logs:
            for first in range(0, len(records), batch_size):
                async with kit.writer.transaction() as connection:
                    portion = records[first : first + batch_size]
                    batch = Batch(portion, {}, {topic: TopicId(topic_id)})
                    await ingest.handle(batch, connection)
            if dismisses and topic_id == "A":
                async with kit.api.transaction(tenant="*") as connection:
                    await dismiss_record(connection, outbox, 1, "dismissed by key:operator")
        async with kit.api.transaction(tenant="*") as connection:
            found = (
                await queries.sum_usage(connection, [LHR], 0, 2**60),
                await queries.sum_allocation(connection, JOB_1),
                await queries.list_buckets(connection, JOB_1, None, 1_000),
                await queries.list_intervals(connection, JOB_1, None, 1_000),
                await quarantine.list_quarantined(
                    connection, QuarantineFilter(None, None, None), 0, 100
                ),
                await hubs.list_sources(connection, LHR, "", 10),
                [view.quarantined for view in await hubs.view_hubs(connection)],
            )
    infrastructure.drop_database(dsns)
    return found
