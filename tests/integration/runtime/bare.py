"""A bare service on the kit, with its own database, and short names for what tests ask of it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from infrastructure import Database as Dsns
from runtime.service import Kit, Parts, Service, Settings, make_kit

ROLES = ("operator", "auditor", "tenant")


@dataclass(frozen=True)
class Bare:
    """A service without tables of its own."""

    service: Service
    dsns: Dsns
    bootstrap_servers: str

    def settings(self, *, port: int = 0, instance: str = "0") -> Settings:
        return Settings(
            http_host="127.0.0.1",
            http_port=port,
            kafka=self.bootstrap_servers,
            partitions=4,
            replication=1,
            instance=instance,
            database_api=self.dsns.api,
            database_writer=self.dsns.writer,
            otlp_endpoint=None,
        )

    @contextlib.asynccontextmanager
    async def open_kit(self, *, instance: str = "0") -> AsyncIterator[Kit]:
        kit = make_kit(self.service, self.settings(instance=instance))
        await kit.api.open()
        await kit.writer.open()
        try:
            yield kit
        finally:
            await kit.kafka.close()
            await kit.api.close()
            await kit.writer.close()

    async def admin(self) -> asyncpg.Connection[asyncpg.Record]:
        return await asyncpg.connect(self.dsns.admin)


def service_of_nothing(migrations: Path) -> Service:
    """Metering's name and roles, and the kit's tables only."""
    return Service("metering", "0", migrations, lambda _kit: Parts(), ROLES)
