"""A database saved and brought back as it was, as an operator restores a backup."""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg

from databases import Server
from stack import Stack


@dataclass(frozen=True, slots=True)
class Backup:
    """One service's database of a stack, and a copy of it on the same server."""

    server: Server
    service: str
    name: str

    @classmethod
    def of(cls, stack: Stack, service: str, name: str = "backup") -> Backup:
        """The backup of a service's database; nothing is copied yet."""
        content = stack.content()
        postgres = content["infrastructure"]["postgres"]
        server = Server(content["provider"]["postgres"], postgres["admin"], postgres["passwords"])
        return cls(server, service, name)

    def dsn(self, role: str) -> str:
        """Where a role finds the database."""
        return self.server.dsn(role, self.service)

    async def take(self) -> None:
        """Copy the database; its service must be down."""
        await self._copy(self.service, f"{self.service}_{self.name}")

    async def restore(self) -> None:
        """Put the copy in the place of the database, whoever is connected."""
        await self._copy(f"{self.service}_{self.name}", self.service)

    async def _copy(self, source: str, target: str) -> None:
        connection = await asyncpg.connect(self.server.admin, timeout=60)
        try:
            await connection.execute(f'drop database if exists "{target}" with (force)')
            await connection.execute(
                f'create database "{target}" owner "{self.service}_owner" template "{source}"'
            )
        finally:
            await connection.close()
