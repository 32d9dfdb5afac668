"""A ledger on a real database, driven at the level of its handlers and commands."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec

from hisab_contracts.charges import AllocationFinal, BucketTotal, HubWatermark
from hisab_contracts.entries import Entry, GrantScope
from hisab_contracts.ids import (
    DocumentId,
    GrantId,
    KeyId,
    ProgrammeId,
    ProjectId,
    ProposalId,
    TenantId,
)
from hisab_contracts.reference import PriceLine, Role, TenantKind, TenantRecord
from hisab_contracts.topics import ACCESS, PRICES, TENANTS
from infrastructure import Database as Addresses
from ledger import jobs
from ledger.api.problems import CommandRefusal
from ledger.audit import audit
from ledger.commands import Approved, Commands
from ledger.consumer import ChargeConsumer, keep_prices
from ledger.core.balance import Balance
from ledger.core.decisions import NotFound
from ledger.core.grants import Grant
from ledger.core.holds import HoldState, PlaceHold, ReleaseHold
from ledger.core.lots import WHOLE_BPS
from ledger.core.movements import RecordInvoiced, SetBudget
from ledger.core.proposals import (
    NO_CONFLICT,
    KeptTerms,
    Proposal,
    reclaim_of,
    reversal_of,
    revocation_of,
)
from ledger.placement import TenantPartitions
from ledger.store.directory import find_grant, tenant_of_hold
from ledger.store.entries import entries_after, find_entry
from ledger.store.queries import balance_of
from runtime.clock import now_ms
from runtime.consumer import Batch
from runtime.database import ALL_TENANTS, Database
from runtime.outbox import Outbox
from runtime.records import Record
from unit.ledger.values import hold, release

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from runtime.clock import Clock

ChargeMessage = BucketTotal | AllocationFinal | HubWatermark
FAR_MS = 4_000_000_000_000


class Refused(Exception):
    """A command was refused: its transaction is rolled back, as the API rolls it back."""

    def __init__(self, refusal: CommandRefusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


class RealLedger:
    """Two pools on one database, as one process of the service has them."""

    def __init__(self, addresses: Addresses, clock: Clock = now_ms) -> None:
        """`clock` is read as the service reads its own: the database's must agree with it."""
        self.addresses = addresses
        self.clock = clock
        self.api = Database(addresses.api, name="test-api")
        self.writer = Database(addresses.writer, name="test-writer")
        self.reader = Database(addresses.reader, name="test-reader")
        self.admin = Database(addresses.admin, name="test-admin")
        self.commits = 0
        self.partitions = TenantPartitions(lambda: 1)
        outbox = Outbox((TENANTS, ACCESS))
        self.commands = Commands(outbox, self._committed, self.partitions, clock)
        self.consumer = ChargeConsumer(self._committed, clock)
        self._offsets: Iterator[int] = itertools.count()

    def _committed(self) -> None:
        self.commits += 1

    async def tenant(
        self, tenant_id: str, kind: TenantKind = "commercial", limit_micro: int = 0
    ) -> str:
        """Register a tenant."""
        record = TenantRecord(
            tenant_id=TenantId(tenant_id),
            kind=kind,
            currency="PKR",
            credit_limit_micro=limit_micro,
            projects=[ProjectId("main")],
        )
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            assert None is await self.commands.open_tenant(connection, record, tenant_id)
        return tenant_id

    async def programme(self, programme_id: str, budget_micro: int = 10**14) -> None:
        """Register a programme with its budget."""
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            budget = SetBudget(budget_micro=budget_micro, actor="key:operator")
            assert None is await self.commands.open_programme(
                connection, ProgrammeId(programme_id), programme_id, budget
            )

    async def grant(
        self,
        tenant_id: str,
        grant_id: str,
        grant_micro: int,
        *,
        programme_id: str = "ignite",
        expires_ms: int | None = None,
        scope: GrantScope | None = None,
        coverage_bps: int = WHOLE_BPS,
        priority: int = 0,
    ) -> None:
        """Propose by one key, approve by another."""
        grant = Grant(
            grant_id=GrantId(grant_id),
            tenant_id=TenantId(tenant_id),
            programme_id=ProgrammeId(programme_id),
            grant_micro=grant_micro,
            priority=priority,
            effective_ms=1_735_689_600_000,
            expires_ms=expires_ms,
            scope=scope,
            coverage_bps=coverage_bps,
            proposed_by=KeyId("officer"),
        )
        await self.enter_grant(grant)

    async def enter_grant(self, grant: Grant) -> None:
        """Have a grant proposed and approved; raises when either is refused."""
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            refused = await self.commands.propose_grant(connection, grant)
            if refused is not None:
                raise Refused(refused)
        await self.approve(grant.grant_id)

    def batch(self, messages: Sequence[ChargeMessage | bytes], partition: int = 0) -> Batch:
        """Write messages as the records of one batch."""
        records = [
            Record(
                topic="metering.charges.v1",
                partition=partition,
                offset=next(self._offsets),
                timestamp_ms=0,
                key=None,
                value=message if isinstance(message, bytes) else msgspec.json.encode(message),
                headers=(("traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"),),
            )
            for message in messages
        ]
        return Batch(records, {})

    async def book(self, *messages: ChargeMessage, partition: int = 0) -> None:
        """Book one batch in its transaction."""
        batch = self.batch(messages, partition)
        async with self.writer.transaction() as connection:
            await self.consumer.book_charges(batch, connection)

    async def prices(self, *lines: PriceLine) -> None:
        """Keep price lines as metering publishes them."""
        records = [
            Record(
                topic=PRICES,
                partition=0,
                offset=next(self._offsets),
                timestamp_ms=0,
                key=None,
                value=msgspec.json.encode(line),
                headers=(),
            )
            for line in lines
        ]
        async with self.writer.transaction() as connection:
            await keep_prices(Batch(records, {}), connection)

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
        """Place a hold; raises when it is refused."""
        command = hold(
            hold_id, hold_micro, allocation_id=allocation_id, hub=hub, expires_ms=expires_ms
        )
        return await self.enter_hold(tenant_id, command)

    async def release(self, hold_id: str) -> HoldState:
        """Release a hold; raises when it is refused."""
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            tenant_id = await tenant_of_hold(connection, hold_id)
        if tenant_id is None:
            raise Refused(NotFound("hold"))
        return await self.enter_hold(tenant_id, release(hold_id))

    async def enter_hold(self, tenant_id: str, command: PlaceHold | ReleaseHold) -> HoldState:
        """Place or release a hold; raises when it is refused."""
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            entered = await self.commands.enter_hold(connection, tenant_id, command)
            if not isinstance(entered, HoldState):
                raise Refused(entered)
            return entered

    async def end_expired_holds(self) -> None:
        """End the holds whose time has come, as the leased task does."""
        async with self.writer.connection() as connection:
            await jobs.end_expired_holds(connection, self._committed, self.clock)

    async def expire_lots(self) -> None:
        """Expire the lots whose windows are complete, as the leased task does."""
        async with self.writer.connection() as connection:
            await jobs.expire_lots(connection, self.partitions, self._committed, self.clock)

    async def reverse(self, entry: Entry, reason: str = "wrong tenant") -> Entry:
        """Have an entry negated by two keys; raises when it is refused."""
        approved = await self.by_two(f"p-{entry.entry_id}", reversal_of(entry, reason))
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            reversal = await find_entry(connection, approved.entry_ids[-1])
        assert reversal is not None
        return reversal

    async def revoke(self, grant_id: str) -> list[str]:
        """Have a grant ended early by two keys; the kinds of what was entered."""
        terms = revocation_of(await self._grant(grant_id), "closed down")
        return await self._kinds_of(await self.by_two(f"r-{grant_id}", terms))

    async def reclaim(self, grant_id: str) -> list[str]:
        """Have expired credit given back to its programme; the kinds of what was entered."""
        terms = reclaim_of(await self._grant(grant_id))
        return await self._kinds_of(await self.by_two(f"c-{grant_id}", terms))

    async def _grant(self, grant_id: str) -> Grant:
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            grant = await find_grant(connection, grant_id)
        if grant is None:
            raise Refused(NotFound("grant"))
        return grant

    async def _kinds_of(self, approved: Approved) -> list[str]:
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            found = [await find_entry(connection, entry_id) for entry_id in approved.entry_ids]
        return [entry.kind for entry in found if entry is not None]

    async def by_two(self, name: str, terms: KeptTerms) -> Approved:
        """Propose by one key and approve by another; raises when either is refused."""
        return await self.approve(await self.propose(name, terms))

    async def propose(self, name: str, terms: KeptTerms) -> ProposalId:
        """Propose by the officer's key; raises when it is refused."""
        proposal = Proposal(
            proposal_id=ProposalId(f"{name}-{next(self._offsets)}"),
            terms=terms,
            proposed_by=KeyId("officer"),
        )
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            refused = await self.commands.propose(connection, proposal)
            if refused is not None:
                raise Refused(refused)
        return proposal.proposal_id

    async def approve(self, proposal_id: str) -> Approved:
        """Approve by the approver's key; raises when it is refused."""
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            approved = await self.commands.approve(
                connection,
                proposal_id,
                KeyId("approver"),
                Role.APPROVER,
                conflict_of_interest=NO_CONFLICT,
                actor="key:approver",
            )
            if not isinstance(approved, Approved):
                raise Refused(approved)
        return approved

    async def entries(self, tenant_id: str) -> list[Entry]:
        """Read a book's entries."""
        async with self.reader.transaction() as connection:
            return await entries_after(connection, tenant_id, 0, 1_000)

    async def invoiced(self, tenant_id: str, document_id: str, micro: int) -> int:
        """Tell that a document was finalised; returns the entry's seq."""
        command = RecordInvoiced(
            document_id=DocumentId(document_id), invoiced_micro=micro, actor="key:finance"
        )
        async with self.api.transaction(tenant=ALL_TENANTS) as connection:
            entry = await self.commands.record_invoiced(connection, tenant_id, command)
            assert isinstance(entry, Entry)
        return entry.seq

    async def balance(self, tenant_id: str, *, at_ms: int | None = None) -> Balance:
        """Read a balance as of now (lots open at another instant if asked)."""
        async with self.api.transaction(tenant=tenant_id) as connection:
            found = await balance_of(connection, tenant_id, at_ms or self.clock(), 0)
        assert found is not None
        return found

    async def audit(self, page: int = 5) -> list[str]:
        """Audit everything, as the reader role, in slices so small that there are some."""
        return await audit(self.reader, page=page)


@asynccontextmanager
async def opened(addresses: Addresses, clock: Clock = now_ms) -> AsyncIterator[RealLedger]:
    """A ledger with open pools."""
    ledger = RealLedger(addresses, clock)
    pools = (ledger.api, ledger.writer, ledger.reader, ledger.admin)
    for pool in pools:
        await pool.open()
    try:
        yield ledger
    finally:
        for pool in pools:
            await pool.close()
