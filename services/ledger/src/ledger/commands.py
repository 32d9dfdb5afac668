"""Commands on books over HTTP: each runs in one transaction, decides, and answers or refuses.

A command locks the books it touches (in id order), decides on them as they are, and saves. What is
refused becomes a problem of the catalogue and rolls everything back.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NoReturn, assert_never

from hisab_contracts.entries import Entry
from hisab_contracts.ids import (
    AllocationId,
    DocumentId,
    GrantId,
    HoldId,
    KeyId,
    ProgrammeId,
    TenantId,
)
from hisab_contracts.reference import TenantRecord
from hisab_contracts.units import instant_text, rated_micro
from ledger import registry
from ledger.book import INVOICED, PROGRAMME_BOOK, Book, InvariantBroken, available_micro
from ledger.decisions import (
    AlreadyInvoiced,
    Command,
    CommitBudget,
    GrantCredit,
    NotReceivable,
    OutOfRange,
    PlaceHold,
    RecordInvoiced,
    Refusal,
    ReleaseHold,
    SetBudget,
    accounts_of,
)
from ledger.grants import (
    ApprovalRefused,
    BudgetExceeded,
    Grant,
    GrantExpired,
    GrantNotProposed,
    MakerIsChecker,
    approve,
)
from ledger.holds import HoldClosed, HoldOver, HoldState, InsufficientCredit
from ledger.store import OpenBooks, expired_holds, load_holds, open_books, open_new_book
from runtime.database import after_commit, transaction_on
from runtime.http import Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.database import Connection

SWEEP_BATCH = 200


def now_ms() -> int:
    """The ledger's clock."""
    return time.time_ns() // 1_000_000


class Commands:
    """The commands of this process; `committed` is called once an entry is durable."""

    def __init__(self, committed: Callable[[], None]) -> None:
        self._committed = committed

    async def open_tenant(self, connection: Connection, record: TenantRecord, name: str) -> None:
        """Register a tenant, its project `main` and its empty book."""
        if not await registry.add_tenant(connection, record, name):
            raise Problem("already-exists", f"tenant {record.tenant_id} exists")
        await open_new_book(
            connection,
            Book(record.tenant_id, record.kind, record.currency, record.credit_limit_micro),
        )

    async def open_programme(
        self, connection: Connection, programme_id: str, name: str, budget_micro: int, actor: str
    ) -> None:
        """Register a programme and enter its budget into its own book."""
        if not await registry.add_programme(connection, programme_id, name, "PKR", budget_micro):
            raise Problem("already-exists", f"programme {programme_id} exists")
        book_id = TenantId(PROGRAMME_BOOK + programme_id)
        await open_new_book(connection, Book(book_id, "fund", "PKR", 0))
        books = await open_books(connection, [book_id], accounts=("authority", "budget"))
        self._enter(books, book_id, SetBudget(budget_micro, actor))
        await self._save(books, connection)

    async def propose_grant(self, connection: Connection, grant: Grant) -> None:
        """Store a proposal; nothing is entered before somebody else approves."""
        tenant = await registry.tenant_of(connection, grant.tenant_id)
        currency = await registry.programme_currency(connection, grant.programme_id)
        if tenant is None or currency is None:
            raise Problem("not-found", "no such tenant or programme")
        if tenant.currency != currency:
            raise Problem("unsupported", f"the programme grants {currency} only")
        if grant.expires_ms is not None and grant.expires_ms <= now_ms():
            _refuse_approval(GrantExpired(grant.expires_ms))
        await registry.add_grant(connection, grant)

    async def approve_grant(self, connection: Connection, grant_id: str, approver: KeyId) -> Grant:
        """Move budget of the programme to a lot of the tenant: two books, one transaction."""
        grant = await registry.grant_of(connection, grant_id, lock=True)
        if grant is None:
            raise Problem("not-found", "no such grant")
        approved = approve(grant, approver, now_ms())
        if not isinstance(approved, Grant):
            _refuse_approval(approved)
        programme_book = PROGRAMME_BOOK + approved.programme_id
        books = await open_books(
            connection, [programme_book, approved.tenant_id], accounts=accounts_of(approved)
        )
        actor = f"key:{approver}"
        self._enter(books, programme_book, CommitBudget(approved, actor))
        self._enter(books, approved.tenant_id, GrantCredit(approved, actor))
        await registry.mark_approved(connection, approved)
        await self._save(books, connection)
        return approved

    async def place_hold(
        self, connection: Connection, facts: registry.HoldFacts, actor: str
    ) -> HoldState:
        """Admit a job, or refuse it with what is missing."""
        books = await self._open(connection, facts.tenant_id)
        allocation_id = facts.allocation_id
        command = PlaceHold(
            HoldId(facts.hold_id),
            facts.hold_micro,
            None if allocation_id is None else AllocationId(allocation_id),
            facts.expires_ms,
            actor,
        )
        self._enter(books, facts.tenant_id, command, hold_id=facts.hold_id)
        await registry.add_hold(connection, facts)
        await self._save(books, connection)
        return _hold_state(books, facts.tenant_id, facts.hold_id)

    async def quote(
        self, connection: Connection, tenant_id: str, sku: str, price_class: str, gpu_ms: int
    ) -> int:
        """Price a hold asked for as GPUs and a duration, at the price of now."""
        tenant = await registry.tenant_of(connection, tenant_id)
        if tenant is None:
            raise Problem("not-found", "no such tenant")
        price = await registry.price_at(connection, sku, price_class, tenant.currency, now_ms())
        if price is None:
            raise Problem("no-price", f"no price for {sku} {price_class} in {tenant.currency}")
        return rated_micro(gpu_ms * 1_000_000, price)

    async def release_hold(self, connection: Connection, hold_id: str, actor: str) -> HoldState:
        """End a hold on request."""
        tenant_id = await registry.tenant_of_hold(connection, hold_id)
        if tenant_id is None:
            raise Problem("not-found", "no such hold")
        books = await self._open(connection, tenant_id)
        books.holds = await load_holds(connection, [(tenant_id, hold_id)])
        command = ReleaseHold("released", f"hold:{hold_id}", actor)
        self._enter(books, tenant_id, command, hold_id=hold_id)
        await self._save(books, connection)
        return _hold_state(books, tenant_id, hold_id)

    async def record_invoiced(
        self, connection: Connection, tenant_id: str, document_id: str, micro: int, actor: str
    ) -> Entry:
        """Move what a finalised document bills out of receivable."""
        books = await self._open(connection, tenant_id, INVOICED + document_id)
        command = RecordInvoiced(DocumentId(document_id), micro, actor)
        (entry,) = self._enter(books, tenant_id, command)
        await self._save(books, connection)
        return entry

    async def end_expired_holds(self, connection: Connection) -> None:
        """End the holds whose time has come, by the ledger's clock. A leased task."""
        async with transaction_on(connection):
            due = await expired_holds(connection, now_ms(), SWEEP_BATCH)
            if not due:
                return
            books = await open_books(connection, [tenant for tenant, _ in due])
            books.holds = await load_holds(connection, due)
            for (tenant_id, hold_id), hold in sorted(books.holds.items()):
                if hold.end is None and hold.expires_ms <= now_ms():
                    command = ReleaseHold("expired", "clock", "ledger")
                    self._enter(books, tenant_id, command, hold_id=hold_id)
            await self._save(books, connection)

    async def _open(self, connection: Connection, tenant_id: str, *accounts: str) -> OpenBooks:
        books = await open_books(connection, [tenant_id], accounts=accounts)
        if tenant_id not in books.books or tenant_id.startswith(PROGRAMME_BOOK):
            raise Problem("not-found", "no such tenant")
        return books

    def _enter(
        self, books: OpenBooks, book_id: str, command: Command, *, hold_id: str | None = None
    ) -> tuple[Entry, ...]:
        decided = books.enter(book_id, command, now_ms(), hold_id=hold_id)
        if not isinstance(decided, tuple):
            _refuse(decided)
        return decided

    async def _save(self, books: OpenBooks, connection: Connection) -> None:
        await books.save(connection)
        after_commit(self._committed)


def _hold_state(books: OpenBooks, tenant_id: str, hold_id: str) -> HoldState:
    hold = books.holds[tenant_id, hold_id]
    return HoldState(
        hold.hold_id,
        hold.end or "open",
        hold.hold_micro,
        hold.open_micro,
        available_micro(books.books[tenant_id], now_ms()),
    )


def _refuse_approval(refusal: ApprovalRefused) -> NoReturn:
    """Raise the problem of a refused approval."""
    match refusal:
        case MakerIsChecker():
            raise Problem("maker-is-checker")
        case GrantNotProposed(state):
            raise Problem("grant-not-proposed", f"it is {state}", state=state)
        case GrantExpired(expires_ms):
            raise Problem("grant-expired", f"its window ended at {instant_text(expires_ms)}")
        case _:
            assert_never(refusal)


def _refuse(refusal: Refusal) -> NoReturn:
    """Raise the problem of a refused command."""
    match refusal:
        case InsufficientCredit(available, shortfall):
            raise Problem(
                "insufficient-credit",
                available_micro=str(available),
                shortfall_micro=str(shortfall),
            )
        case HoldOver(expires_ms):
            raise Problem(
                "malformed", f"expires_at: {instant_text(expires_ms)} is not ahead of now"
            )
        case HoldClosed(end):
            raise Problem("hold-closed", f"it has ended: {end}", state=end)
        case AlreadyInvoiced(micro):
            raise Problem("already-exists", "this document is entered", invoiced_micro=str(micro))
        case NotReceivable(micro):
            raise Problem("not-receivable", receivable_micro=str(micro))
        case BudgetExceeded(left, shortfall):
            raise Problem(
                "budget-exceeded", budget_left_micro=str(left), shortfall_micro=str(shortfall)
            )
        case OutOfRange():
            raise InvariantBroken("only a charge can pass 64 bits")
        case _:
            assert_never(refusal)


def grant_from_proposal(
    *,
    grant_id: str,
    tenant_id: str,
    programme_id: str,
    grant_micro: int,
    priority: int,
    effective_ms: int,
    expires_ms: int | None,
    proposed_by: str,
) -> Grant:
    """Write a proposal as a grant."""
    return Grant(
        grant_id=GrantId(grant_id),
        tenant_id=TenantId(tenant_id),
        programme_id=ProgrammeId(programme_id),
        grant_micro=grant_micro,
        priority=priority,
        effective_ms=effective_ms,
        expires_ms=expires_ms,
        state="proposed",
        proposed_by=KeyId(proposed_by),
        approved_by=None,
    )
