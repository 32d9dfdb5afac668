"""One price for an hour in both services: metering rates and quotes by it, the ledger holds by it.

Lists are proposed as an operator proposes them, some of them refused; what metering publishes of
them is all that the ledger hears. Each asks through its own tables and its own way to a price.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import NamedTuple

import msgspec
import pytest

from hisab_contracts.ids import HubCode, PriceClass, ProjectId, Sku, TenantId
from hisab_contracts.prices import PriceBook, PriceSeries, series_of
from hisab_contracts.reference import PriceLine, TenantRecord
from hisab_contracts.topics import HUBS, PRICES
from infrastructure import Infrastructure
from integration.ledger.real import RealLedger, opened
from ledger.core.holds import price_hold
from ledger.store.directory import price_lines_of
from metering.commands import add_price_list, quote
from metering.core.pricing import JobQuote, ListedPrice, PriceList
from metering.store import hubs, prices
from metering.store.state import ReferenceCache, load_reference, look_up_tenants
from property.metered import Metered
from runtime.database import ALL_TENANTS, Database
from runtime.outbox import Outbox
from unit.metering.hub_events import HOUR_MS, NOON_MS, interval

CLASSES = (PriceClass("on_demand"), PriceClass("spot"))
TENANT_OF = {"PKR": TenantId("rupees"), "USD": TenantId("dollars")}
LISTS, SEEDS, HOURS = 10, range(5), range(-1, 14)


class HourPrice(NamedTuple):
    """What one GPU for an hour costs by each way of asking; None: no price."""

    rated: int | None
    quoted: int | None
    held: int | None


class BothServices(NamedTuple):
    """Metering's pool and a ledger, each on a database of its own."""

    metering: Database
    ledger: RealLedger

    async def propose(self, random: Random, sku: Sku) -> bool:
        """Propose a list in a random window, open or fixed; False when it is refused."""
        first, length = random.randrange(12), random.choice([None, None, 1, 2, 5])
        listed = [
            ListedPrice(sku, price_class, random.randrange(10**9))
            for price_class in CLASSES
            if random.random() < 0.8
        ]
        proposed = PriceList(
            random.choice(list(TENANT_OF)),
            NOON_MS + first * HOUR_MS,
            None if length is None else NOON_MS + (first + length) * HOUR_MS,
            tuple(listed) or (ListedPrice(sku, CLASSES[0], 7),),
        )
        async with self.metering.transaction(tenant=ALL_TENANTS) as connection:
            added = await add_price_list(connection, Outbox((PRICES, HUBS)), proposed, "k")
        return isinstance(added, str)

    async def published(self) -> list[PriceLine]:
        """Take what metering wrote for the topic of prices, in order."""
        query = "select message_value from outbox where topic = $1 order by outbox_id"
        async with self.metering.connection() as connection:
            rows = await connection.fetch(query, PRICES)
        return [msgspec.json.decode(row["message_value"], type=PriceLine) for row in rows]

    async def ask(self, series: PriceSeries, hour_ms: int) -> HourPrice:
        """Ask in all three ways, each at that hour."""
        tenant_id = TENANT_OF[series.currency]
        used = interval(
            hour_ms,
            hour_ms + HOUR_MS,
            tenant_id=tenant_id,
            sku=series.sku,
            price_class=series.price_class,
        )
        async with self.metering.transaction(tenant=ALL_TENANTS) as connection:
            cache = ReferenceCache()
            known = await load_reference(connection, cache)
            known = await look_up_tenants(connection, cache, known, [tenant_id])
            quoted = await quote(
                connection,
                tenant_id,
                series.sku,
                series.price_class,
                gpus=1,
                duration_ms=HOUR_MS,
                clock=lambda: hour_ms + HOUR_MS - 1,
            )
        totals = Metered().take([used], known)
        async with self.ledger.api.transaction(tenant=ALL_TENANTS) as connection:
            book = PriceBook(await price_lines_of(connection, series))
        held = price_hold(book, series, gpus=1, duration_ms=HOUR_MS, now_ms=hour_ms)
        return HourPrice(
            totals[0].total_micro if totals else None,
            quoted.quoted_micro if isinstance(quoted, JobQuote) else None,
            held if isinstance(held, int) else None,
        )


@asynccontextmanager
async def both(infrastructure: Infrastructure) -> AsyncIterator[BothServices]:
    """Both services' tables, with a tenant in each currency and a hub."""
    addresses = [infrastructure.migrated_database(name) for name in ("metering", "ledger")]
    # As the API's role, which proposes prices; the tenants come as the consumer keeps them.
    pools = [Database(addresses[0].api, name="prices"), Database(addresses[0].writer, name="feed")]
    for pool in pools:
        await pool.open()
    try:
        async with pools[1].transaction() as connection:
            await prices.save_tenants(connection, {name: c for c, name in TENANT_OF.items()})
            await hubs.add_hub(connection, HubCode("lhr"), "Lahore", 60_000)
        async with opened(addresses[1]) as ledger:
            for currency, tenant_id in TENANT_OF.items():
                record = TenantRecord(tenant_id, "startup", currency, 0, [ProjectId("main")])
                async with ledger.api.transaction(tenant=ALL_TENANTS) as connection:
                    assert None is await ledger.commands.open_tenant(connection, record, "T")
            yield BothServices(pools[0], ledger)
    finally:
        for pool in pools:
            await pool.close()
        for database in addresses:
            infrastructure.drop_database(database)


def came_back_in_vain(lines: Sequence[PriceLine], series: PriceSeries, hour_ms: int) -> bool:
    """Say whether an open line began before a fixed one of its series that is over by then."""
    begun = [line for line in lines if series_of(line) == series and line.valid_from_ms <= hour_ms]
    return any(line.valid_until_ms is None for line in begun)


@pytest.mark.defect("M33", "F42")
async def test_metering_and_the_ledger_never_price_an_hour_differently(
    infrastructure: Infrastructure,
) -> None:
    """Random lists; every hour, SKU, class and currency: rated, quoted and held at one price."""
    priced, in_vain, refused = 0, 0, 0
    async with both(infrastructure) as services:
        skus = [Sku(f"sku-{seed}") for seed in SEEDS]
        for seed, sku in zip(SEEDS, skus, strict=True):
            random = Random(seed)
            refused += LISTS - sum([await services.propose(random, sku) for _ in range(LISTS)])
        lines = await services.published()
        # As a compacted topic may give them: in any order.
        await services.ledger.prices(*Random(0).sample(lines, len(lines)))
        for sku in skus:
            for currency in TENANT_OF:
                for price_class in CLASSES:
                    series = PriceSeries(currency, sku, price_class)
                    for hour in HOURS:
                        hour_ms = NOON_MS + hour * HOUR_MS
                        found = await services.ask(series, hour_ms)
                        assert 1 == len(set(found)), (series, hour, found)
                        priced += found.rated is not None
                        if found.rated is None:
                            in_vain += came_back_in_vain(lines, series, hour_ms)
    # The lists were of every kind: some refused, hours with a price, and the fault's own shape.
    assert min(priced, in_vain, refused) > 0
