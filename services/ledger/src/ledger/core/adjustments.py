"""Adjustments: what is changed by hand of a book's conditions, where nothing was used or billed.

A programme is given more budget, and a commercial tenant another credit limit: who may ask for
that, and who approves it, is said in `proposals`. A tenant is suspended and resumed by one
operator: that moves no money, and must not wait. Each is a command on one book, decided here and
called by `decisions.decide` alone.

A new credit limit moves no money, so its entry has no postings: it states the limit that holds from
then on. A limit below what is owed already is legal. It leaves no headroom, so no hold reserves on
it any more; holds that did keep what they were guaranteed.

A tenant that is suspended gets no new hold. What it uses all the same is booked, what it had been
promised stays promised, and its balance is what it is.

Refusals. Budget added: `BudgetOutOfRange`. Credit limit changed: `NotCommercial`. Suspended and
resumed: none, what is so already stays so without an entry.
"""

from __future__ import annotations

from msgspec import Struct

from hisab_contracts.entries import Entry, LimitDetail
from hisab_contracts.units import MAX_MICRO
from ledger.core.book import RESUMED, SUSPENDED, Book, balance_micro, next_entry, postings_of


class AddBudget(Struct, frozen=True, kw_only=True):
    """Give a programme more to promise."""

    add_micro: int
    caused_by: str
    actor: str


class ChangeCreditLimit(Struct, frozen=True, kw_only=True):
    """Set how far a tenant may owe before its holds are refused."""

    credit_limit_micro: int
    reason: str
    caused_by: str
    actor: str


class SuspendTenant(Struct, frozen=True, kw_only=True):
    """Admit no new job of a tenant."""

    reason: str
    actor: str


class ResumeTenant(Struct, frozen=True, kw_only=True):
    """Admit jobs of a tenant again."""

    actor: str


class BudgetOutOfRange(Struct, frozen=True):
    """All that the programme was ever given would pass 64 bits."""

    budget_micro: int
    """What it was given so far."""


class NotCommercial(Struct, frozen=True):
    """Only what is receivable counts against a limit, and this tenant never owes anything."""

    kind: str


def add_budget(book: Book, command: AddBudget, now_ms: int) -> tuple[Entry, ...] | BudgetOutOfRange:
    """Move what the authority gives to the budget of a programme."""
    given_micro = -balance_micro(book, "authority")
    if given_micro + command.add_micro > MAX_MICRO:
        return BudgetOutOfRange(given_micro)
    movements = [("authority", -command.add_micro), ("budget", command.add_micro)]
    return (
        next_entry(
            book,
            "budget_added",
            now_ms,
            postings=postings_of(book, movements),
            caused_by=command.caused_by,
            actor=command.actor,
        ),
    )


def change_credit_limit(
    book: Book, command: ChangeCreditLimit, now_ms: int
) -> tuple[Entry, ...] | NotCommercial:
    """State a tenant's new credit limit; it holds from this entry on."""
    if book.kind != "commercial":
        return NotCommercial(book.kind)
    return (
        next_entry(
            book,
            "limit_changed",
            now_ms,
            caused_by=command.caused_by,
            actor=command.actor,
            limit=LimitDetail(credit_limit_micro=command.credit_limit_micro),
            reason=command.reason,
        ),
    )


def suspend_tenant(book: Book, command: SuspendTenant, now_ms: int) -> tuple[Entry, ...]:
    """Admit no new job of a tenant from this entry on."""
    if book.is_suspended:
        return ()
    return (
        next_entry(
            book,
            SUSPENDED,
            now_ms,
            caused_by="suspension",
            actor=command.actor,
            reason=command.reason,
        ),
    )


def resume_tenant(book: Book, command: ResumeTenant, now_ms: int) -> tuple[Entry, ...]:
    """Admit jobs of a tenant again from this entry on."""
    if not book.is_suspended:
        return ()
    return (next_entry(book, RESUMED, now_ms, caused_by="suspension", actor=command.actor),)
