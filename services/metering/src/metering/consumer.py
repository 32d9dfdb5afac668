"""Consumers: which topics are read, and our own copy of reference data.

Hub topics follow the registry: a hub that any process registered is read by all of them. Records of
hubs are handled by `metering.ingest`; tenants and API keys, from the ledger, are kept here.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import msgspec

from hisab_contracts.reference import TenantRecord
from hisab_contracts.topics import TENANTS, hub_topic
from metering.store import allocations, hubs, prices
from runtime.auth import keep_access_keys
from runtime.clock import pause
from runtime.consumer import Batch, Consumer
from runtime.outages import is_outage

if TYPE_CHECKING:
    from runtime.database import Connection

REGISTRY_PAUSE_S: Final = 1

_TENANT: Final = msgspec.json.Decoder(TenantRecord)


class HubConsumer(Consumer):
    """Reads the topic of every hub, whichever process registered it. Every process has one.

    Following the registry is part of reading: when it fails, this part of the process ends.
    """

    async def look(self) -> None:
        """Read what is registered now, too."""
        async with self._database.connection() as connection:
            self.extend([hub_topic(hub) for hub in await hubs.list_hubs(connection)])

    async def run(self, stop: asyncio.Event) -> None:
        """Read until `stop`, and look for new hubs all the while."""
        # A group: should following fail, reading ends too, and with it the process.
        async with asyncio.TaskGroup() as together:
            together.create_task(self._follow(stop), name="registry")
            await super().run(stop)

    async def _follow(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await pause(stop, REGISTRY_PAUSE_S)
            try:
                await self.look()
            except Exception as error:
                # A database that is away for a moment is asked again; anything else must be seen.
                if not is_outage(error):
                    raise


async def keep_reference(batch: Batch, connection: Connection) -> None:
    """Keep our own copy of tenants and API keys."""
    await keep_access_keys(batch, connection)
    tenants = [
        _TENANT.decode(record.value)
        for record in batch.records
        if record.topic == TENANTS and record.value is not None
    ]
    if tenants:
        currencies = {tenant.tenant_id: tenant.currency for tenant in tenants}
        new = await prices.save_tenants(connection, currencies)
        if new:
            await allocations.wake_tenants(connection, new)
