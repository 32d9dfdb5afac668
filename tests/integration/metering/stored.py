"""Metering on a real database, driven at the level of its handlers: no process, no broker."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from hisab_contracts.ids import HubCode, PriceClass, Sku, TenantId
from hisab_contracts.topics import CHARGES, DECISIONS, PRICES, QUARANTINE, hub_topic
from infrastructure import Database as Addresses
from metering.core.pricing import ListedPrice, PriceList, price_lines_of
from metering.core.quarantine import QuarantineClosed
from metering.ingest import Ingest
from metering.replay import replay_quarantined
from metering.store import hubs, prices, queries
from metering.store.queries import UsageSums
from metering.store.state import ReferenceCache
from runtime.consumer import Batch
from runtime.database import ALL_TENANTS, Database
from runtime.outbox import Outbox
from runtime.records import Record
from unit.metering.hub_events import HEADERS, event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from runtime.database import Connection

LHR = HubCode("lhr")
LONG_AGO_MS = 1_577_836_800_000
LATER_MS = 1_900_000_000_000
PRICES_OF_TESTS = {("h100-sxm-80", "on_demand"): 840_000_000, ("l40s-48", "on_demand"): 260_000_000}


class StoredMetering:
    """The pools of one process of metering, and what its handlers do with them."""

    def __init__(self, addresses: Addresses) -> None:
        """Describe it; `opened` opens the pools."""
        self.addresses = addresses
        self.api = Database(addresses.api, name="test-api")
        self.writer = Database(addresses.writer, name="test-writer")
        self.admin = Database(addresses.admin, name="test-admin")
        self.outbox = Outbox((CHARGES, QUARANTINE, PRICES, DECISIONS))
        self._ingest = Ingest(self.outbox)
        self._offsets: Iterator[int] = itertools.count(1)
        self._sequences: dict[tuple[str, str], Iterator[int]] = {}

    async def facts(
        self,
        tenants: Sequence[str],
        micro_per_hour: Mapping[tuple[str, str], int] = PRICES_OF_TESTS,
    ) -> None:
        """The hub `lhr`, tenants, and prices since long ago."""
        listed = tuple(
            ListedPrice(Sku(sku), PriceClass(price_class), micro)
            for (sku, price_class), micro in micro_per_hour.items()
        )
        async with self.writer.transaction() as connection:
            await hubs.add_hub(connection, LHR, "Lahore", 60_000)
        await self.know(*tenants)
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            lines = price_lines_of(PriceList("PKR", LONG_AGO_MS, None, listed))
            await prices.add_price_list(connection, lines, "a test")

    async def know(self, *tenants: str) -> None:
        """Keep tenants as the ledger names them."""
        async with self.writer.transaction() as connection:
            await prices.save_tenants(connection, {TenantId(name): "PKR" for name in tenants})

    async def take(
        self,
        batch: Sequence[dict[str, Any]],
        kind: str | None = None,
        *,
        hub: HubCode = LHR,
    ) -> None:
        """Meter what a hub says as one batch, in a transaction of its own."""
        await self.take_values([self._event(data, kind) for data in batch], hub=hub)

    async def take_values(
        self,
        values: Sequence[bytes],
        *,
        headers: Sequence[tuple[str, bytes | None]] = (),
        hub: HubCode = LHR,
    ) -> None:
        """Meter any bytes as one batch."""
        records = [
            Record(
                topic=hub_topic(hub),
                partition=0,
                offset=next(self._offsets),
                timestamp_ms=LATER_MS,
                key=None,
                value=value,
                headers=(*HEADERS, *headers),
            )
            for value in values
        ]
        async with self.writer.transaction() as connection:
            await self._ingest.handle(Batch(records, {}), connection)

    def _event(self, data: dict[str, Any], kind: str | None) -> bytes:
        found = kind or ("watermark" if "watermark_ms" in data else "interval")
        found = "correction" if "revision" in data else found
        source = (data["hub"], data["node_id"] or "n1")
        sequence = next(self._sequences.setdefault(source, itertools.count(1)))
        return event(data, sequence, found)

    async def replay(
        self, connection: Connection, quarantine_ids: Sequence[int]
    ) -> list[QuarantineClosed]:
        """Judge quarantined records again in the caller's transaction."""
        return await replay_quarantined(
            connection, self.outbox, ReferenceCache(), quarantine_ids, "a test"
        )

    async def open_ids(self) -> list[int]:
        """Return the records that are open in quarantine, in order."""
        return [
            row["quarantine_id"]
            for row in await self.rows(
                "select quarantine_id from quarantine where state = 'open' order by quarantine_id"
            )
        ]

    async def sums(self) -> UsageSums:
        """Return the accounts of the hub, of all time."""
        async with self.writer.transaction() as connection:
            return await queries.sum_usage(connection, [LHR], 0, 2**62)

    async def rows(self, query: str, *values: Any) -> list[Any]:
        """Look into its tables."""
        async with self.admin.connection() as connection:
            return list(await connection.fetch(query, *values))


def unexplained_gpu_ns(sums: UsageSums) -> int:
    """What the accounts fail to explain."""
    explained = sums.billed_gpu_ns + sums.duplicate_gpu_ns + sums.quarantined_gpu_ns
    explained += sums.voided_gpu_ns
    return sums.reported_gpu_ns - explained


@asynccontextmanager
async def opened(addresses: Addresses) -> AsyncIterator[StoredMetering]:
    """Metering with open pools."""
    metering = StoredMetering(addresses)
    pools = (metering.api, metering.writer, metering.admin)
    for pool in pools:
        await pool.open()
    try:
        yield metering
    finally:
        for pool in pools:
            await pool.close()
