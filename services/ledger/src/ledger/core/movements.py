"""Movements: commands that move money between accounts of books, where nothing was used.

A programme gets its budget, a grant moves some of it to a lot of a tenant (an entry in each of
their books), and a finalised document moves what is receivable to the document's own account. Each
is decided here and called by `decisions.decide` alone; what takes a grant back is in `withdrawals`.

Refusals, in order of precedence. Grant approved: `GrantExpired`, `OutcomeMissing`,
`BudgetExceeded`. Invoiced: `AlreadyInvoiced`, `NotReceivable`.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from hisab_contracts.entries import Entry, GrantDetail
from hisab_contracts.ids import DocumentId, ProgrammeId, TenantId
from hisab_contracts.invariants import InvariantBroken
from ledger.core.book import (
    INVOICED,
    PROGRAMME_BOOK,
    Book,
    Books,
    balance_micro,
    next_entry,
    postings_of,
)
from ledger.core.grants import ApprovalRefusal, ApproveGrant, refuse_approval
from ledger.core.lots import LOT, WHOLE_BPS

FUNDING: Final = "funding:"
"""Begins the account of a tenant's book that says what a programme has given."""


class SetBudget(Struct, frozen=True, kw_only=True):
    """Open a programme's book with its budget."""

    budget_micro: int
    actor: str


class RecordInvoiced(Struct, frozen=True, kw_only=True):
    """A finalised document bills this much of what is receivable."""

    document_id: DocumentId
    invoiced_micro: int
    actor: str


class AlreadyInvoiced(Struct, frozen=True):
    """The book has entered this document with another amount."""

    invoiced_micro: int


class NotReceivable(Struct, frozen=True):
    """More would be invoiced than is receivable."""

    receivable_micro: int


def approve_grant(
    books: Books, command: ApproveGrant, now_ms: int
) -> tuple[Entry, ...] | ApprovalRefusal:
    """Move budget of the programme to a lot of the tenant: an entry in each of their books."""
    programme = books.programme
    if programme is None:
        raise InvariantBroken("an approval is decided on the programme's book too")
    budget_left_micro = balance_micro(programme, "budget")
    refused = refuse_approval(
        command, budget_left_micro=budget_left_micro, complete_until_ms=books.complete_until_ms
    )
    if refused is not None:
        return refused
    grant = command.grant
    caused_by = f"grant:{grant.grant_id}"
    tenant_account = granted_account(grant.tenant_id)
    committed = [("budget", -grant.grant_micro), (tenant_account, grant.grant_micro)]
    received = [
        (funding_account(grant.programme_id), -grant.grant_micro),
        (LOT + grant.grant_id, grant.grant_micro),
    ]
    detail = GrantDetail(
        grant_id=grant.grant_id,
        programme_id=grant.programme_id,
        grant_micro=grant.grant_micro,
        priority=grant.priority,
        effective_ms=grant.effective_ms,
        expires_ms=grant.expires_ms,
        scope=grant.scope,
        coverage_bps=None if grant.coverage_bps == WHOLE_BPS else grant.coverage_bps,
        tax_effect=None if grant.tax_effect == "tender" else grant.tax_effect,
    )
    return (
        next_entry(
            programme,
            "budget_granted",
            now_ms,
            postings=postings_of(programme, committed),
            caused_by=caused_by,
            actor=command.actor,
        ),
        next_entry(
            books.book,
            "grant",
            now_ms,
            effective_ms=grant.effective_ms,
            postings=postings_of(books.book, received),
            caused_by=caused_by,
            actor=command.actor,
            grant=detail,
        ),
    )


def funding_account(programme_id: ProgrammeId) -> str:
    """Name the account of a tenant's book that says how much a programme has given."""
    return FUNDING + programme_id


def granted_account(tenant_id: TenantId) -> str:
    """Name the account of a programme's book that says how much a tenant was given."""
    return f"granted:{tenant_id}"


def record_invoiced(
    book: Book, command: RecordInvoiced, now_ms: int
) -> tuple[Entry, ...] | AlreadyInvoiced | NotReceivable:
    """Move what a finalised document bills from receivable to the document's own account.

    No entry where it was moved already: its key is forgotten by a restore, and the entry is not.
    """
    account = INVOICED + command.document_id
    # Asked first: once it is entered nothing may be receivable any more, and that is no reason to
    # say anything else than that the document is entered.
    if account in book.accounts:
        entered_micro = -book.accounts[account]
        return () if entered_micro == command.invoiced_micro else AlreadyInvoiced(entered_micro)
    if command.invoiced_micro > book.receivable_micro:
        return NotReceivable(book.receivable_micro)
    movements = [("receivable", command.invoiced_micro), (account, -command.invoiced_micro)]
    return (
        next_entry(
            book,
            "invoiced",
            now_ms,
            postings=postings_of(book, movements),
            caused_by=f"document:{command.document_id}",
            actor=command.actor,
        ),
    )


def set_budget(book: Book, command: SetBudget, now_ms: int) -> tuple[Entry, ...]:
    """Open a programme: what it may promise is its authority's to give."""
    movements = [("authority", -command.budget_micro), ("budget", command.budget_micro)]
    postings = postings_of(book, movements)
    caused_by = f"programme:{book.tenant_id.removeprefix(PROGRAMME_BOOK)}"
    return (
        next_entry(
            book, "budget_set", now_ms, postings=postings, caused_by=caused_by, actor=command.actor
        ),
    )
