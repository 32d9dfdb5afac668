"""A batch that touches more hours than one reading holds ends in the same accounts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hisab_contracts.ids import HubCode, PriceClass, Sku, TenantId
from hisab_contracts.topics import CHARGES, PRICES, QUARANTINE
from infrastructure import Infrastructure
from integration.runtime.bare import Bare, service_of_nothing
from metering import lookup, store
from metering.consumer import Intake
from metering.rating import ListedPrice, PriceList, lines_of
from runtime.records import Record
from runtime.streams import Batch, Outbox
from unit.metering.said import HEADERS, HOUR_MS, NOON_MS, event, interval, watermark

if TYPE_CHECKING:
    from runtime.database import Connection

LHR = HubCode("lhr")
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
    await store.add_hub(connection, LHR, "Lahore", 60_000)
    await store.save_tenants(connection, {TenantId("ravi-health"): "PKR"})


@pytest.mark.defect("F70")
@pytest.mark.parametrize("max_hours", [1, 60])
def test_accounts_do_not_depend_on_how_much_is_settled_at_once(
    infrastructure: Infrastructure, tmp_path: Path, max_hours: int
) -> None:
    """Record by record, or two by two: buckets, tallies, quarantine and sources come out alike."""
    whole = asyncio.run(taken(infrastructure, tmp_path, 100_000))
    assert 7 == whole[0].read_records
    assert whole == asyncio.run(taken(infrastructure, tmp_path, max_hours))


async def taken(infrastructure: Infrastructure, folder: Path, max_hours: int) -> Any:
    """Take the batch into an empty database; return what its tables say."""
    dsns = infrastructure.migrated_database("metering")
    bare = Bare(service_of_nothing(folder), dsns, infrastructure.bootstrap_servers)
    values = some_days()
    records = [
        Record(f"hub.{LHR}.usage.v1", 0, at, NOON_MS + 200 * HOUR_MS, None, value, tuple(HEADERS))
        for at, value in enumerate(values)
    ]
    outbox = Outbox((CHARGES, QUARANTINE, PRICES))
    async with bare.open_kit() as kit:
        async with kit.writer.transaction() as connection:
            await facts(connection)
        async with kit.api.transaction(tenant="*") as connection:
            prices = lines_of(PriceList("PKR", 1_577_836_800_000, None, (PRICE,)))
            await store.add_price_list(connection, prices, "key:operator")
        async with kit.writer.transaction() as connection:
            await Intake(outbox, max_hours=max_hours).handle(Batch(records, {}), connection)
        async with kit.api.transaction(tenant="*") as connection:
            found = (
                await lookup.reconcile(connection, [LHR], 0, 2**60),
                await lookup.allocation(connection, LHR, "job-1"),
                await lookup.quarantined(connection, lookup.Asked(None, None, None), 0, 100),
                await lookup.sources(connection, LHR, "", 10),
                [told.view.quarantined for told in await lookup.views(connection)],
            )
    infrastructure.drop_database(dsns)
    return found
