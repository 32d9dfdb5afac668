"""The registry of hubs is followed for as long as the process lives, or the process ends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import pytest

from infrastructure import Infrastructure
from integration.runtime.bare import Bare, service_of_nothing
from metering.consumer import HubConsumer
from runtime.consumer import Batch, Subscription

if TYPE_CHECKING:
    from runtime.database import Connection


async def ignore(_batch: Batch, _connection: Connection) -> None:
    """Nothing comes."""


@pytest.mark.defect("F20")
def test_reading_ends_when_the_registry_cannot_be_followed(
    infrastructure: Infrastructure, tmp_path: Path
) -> None:
    """No table of hubs: an error that no waiting mends must end the part, not only its follower."""
    dsns = infrastructure.migrated_database("metering")
    bare = Bare(service_of_nothing(tmp_path), dsns, infrastructure.bootstrap_servers)

    async def read() -> None:
        async with bare.open_kit() as kit:
            usage = HubConsumer(kit.kafka, kit.writer, Subscription("metering", (), ignore))
            await usage.look()
            admin = await bare.admin()
            await admin.execute("alter table hubs rename to gone")
            await admin.close()
            await asyncio.wait_for(usage.run(asyncio.Event()), 600)

    with pytest.raises(ExceptionGroup) as ended:
        asyncio.run(read())
    assert ended.group_contains(asyncpg.UndefinedTableError)
    infrastructure.drop_database(dsns)
