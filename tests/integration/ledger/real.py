"""A ledger on a real database, driven at the level of its handlers and commands."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec

from hisab_contracts.charges import AllocationFinal, BucketTotal, HubWatermark
from hisab_contracts.ids import KeyId, ProjectId, TenantId
from hisab_contracts.reference import TenantKind, TenantRecord
from infrastructure import Database as Addresses
from ledger import registry
from ledger.audit import audit
from ledger.commands import Commands, grant_from_proposal, now_ms
from ledger.consumer import Intake
from ledger.holds import HoldState
from ledger.statements import Balance, balance_of
from runtime.database import ALL_TENANTS, Database
from runtime.records import Record
from runtime.streams import Batch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

Said = BucketTotal | AllocationFinal | HubWatermark
FAR_MS = 4_000_000_000_000


class RealLedger:
    """Two pools on one database, as one process of the service has them."""

    def __init__(self, addresses: Addresses) -> None:
        self.addresses = addresses
        self.api = Database(addresses.api, name="test-api")
        self.writer = Database(addresses.writer, name="test-writer")
        self.reader = Database(addresses.reader, name="test-reader")
        self.admin = Database(addresses.admin, name="test-admin")
        self.commits = 0
        self.commands = Commands(self._committed)
        self.intake = Intake(self._committed)
        self._offsets: Iterator[int] = itertools.count()

    def _committed(self) -> None:
        self.commits += 1

    async def tenant(
        self, tenant_id: str, kind: TenantKind = "commercial", limit_micro: int = 0
    ) -> str:
        """Register a tenant."""
        record = TenantRecord(TenantId(tenant_id), kind, "PKR", limit_micro, [ProjectId("main")])
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            await self.commands.open_tenant(connection, record, tenant_id)
        return tenant_id

    async def programme(self, programme_id: str, budget_micro: int = 10**14) -> None:
        """Register a programme with its budget."""
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            await self.commands.open_programme(
                connection, programme_id, programme_id, budget_micro, "key:operator"
            )

    async def grant(
        self,
        tenant_id: str,
        grant_id: str,
        grant_micro: int,
        *,
        programme_id: str = "ignite",
        expires_ms: int | None = None,
    ) -> None:
        """Propose by one key, approve by another."""
        grant = grant_from_proposal(
            grant_id=grant_id,
            tenant_id=tenant_id,
            programme_id=programme_id,
            grant_micro=grant_micro,
            priority=0,
            effective_ms=1_735_689_600_000,
            expires_ms=expires_ms,
            proposed_by="officer",
        )
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            await self.commands.propose_grant(connection, grant)
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            await self.commands.approve_grant(connection, grant_id, KeyId("approver"))

    def batch(self, said: Sequence[Said | bytes], partition: int = 0) -> Batch:
        """Write messages as the records of one batch."""
        records = [
            Record(
                topic="metering.charges.v1",
                partition=partition,
                offset=next(self._offsets),
                timestamp_ms=0,
                key=None,
                value=each if isinstance(each, bytes) else msgspec.json.encode(each),
                headers=(("traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"),),
            )
            for each in said
        ]
        return Batch(records, {})

    async def book(self, *said: Said, partition: int = 0) -> None:
        """Book one batch in its transaction."""
        batch = self.batch(said, partition)
        async with self.writer.transaction() as connection:
            await self.intake.charges(batch, connection)

    async def hold(
        self,
        tenant_id: str,
        hold_id: str,
        hold_micro: int,
        *,
        allocation_id: str | None = None,
        hub: str = "lhr",
        expires_ms: int = FAR_MS,
    ) -> HoldState:
        """Place a hold; raises the problem when it is refused."""
        facts = registry.HoldFacts(
            hold_id, tenant_id, "main", "job", allocation_id, hub, "sku", hold_micro, expires_ms
        )
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            return await self.commands.place_hold(connection, facts, "key:scheduler")

    async def release(self, hold_id: str) -> HoldState:
        """Release a hold."""
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            return await self.commands.release_hold(connection, hold_id, "key:scheduler")

    async def invoiced(self, tenant_id: str, document_id: str, micro: int) -> int:
        """Tell that a document was finalised; returns the entry's seq."""
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            entry = await self.commands.record_invoiced(
                connection, tenant_id, document_id, micro, "key:finance"
            )
        return entry.seq

    async def balance(self, tenant_id: str, *, at_ms: int | None = None) -> Balance:
        """Read a balance as of now (lots open at another instant if asked)."""
        async with self.api.transaction(tenant=tenant_id) as connection:
            found = await balance_of(connection, tenant_id, at_ms or now_ms(), 0)
        assert found is not None
        return found

    async def audit(self) -> list[str]:
        """Audit everything, as the reader role."""
        async with self.reader.transaction() as connection:
            return await audit(connection)


@asynccontextmanager
async def opened(addresses: Addresses) -> AsyncIterator[RealLedger]:
    """A ledger with open pools, and one programme `ignite`."""
    ledger = RealLedger(addresses)
    pools = (ledger.api, ledger.writer, ledger.reader, ledger.admin)
    for pool in pools:
        await pool.open()
    try:
        yield ledger
    finally:
        for pool in pools:
            await pool.close()
