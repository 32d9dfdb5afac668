"""Withdrawals: what takes credit back that was granted, by decision of two people.

* **Reversed** is a grant that should not have been made and from which nothing was drawn: an entry
  negates it, its lot is gone, and the programme may promise its amount again.
* **Revoked** is a grant that ends early: its window ends with the hour begun, and it expires like
  any other. One whose window has not begun expires whole, at once.
* **Reclaimed** is what has expired of a grant: it goes back to the programme's budget, once. From
  then on the lot takes nothing back for usage that is heard of late.

Each is decided here and called by `decisions.decide` alone; who may ask for it is decided before.

Refusals, in order of precedence. Entry reversed: `NotReversible` (what kind of entry it is),
`AlreadyReversed`, `AlreadyDrawn`, `Reserved`, `AlreadyReclaimed`. Grant revoked:
`GrantNotApproved`, `GrantExpired`. Expired credit reclaimed: `AlreadyReclaimed`, `NotExpired`.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from hisab_contracts.entries import Entry, LotDetail
from hisab_contracts.invariants import InvariantBroken
from hisab_contracts.units import HOUR_MS, hour_floor_ms
from ledger.core.book import Book, Books, evolve, next_entry, postings_of
from ledger.core.expiry import expire_lot, take_back
from ledger.core.grants import Grant, GrantExpired, GrantState
from ledger.core.lots import Lot
from ledger.core.movements import funding_account, granted_account
from ledger.core.prepayments import PREPAID


class ReverseEntry(Struct, frozen=True, kw_only=True):
    """Negate an entry that should not have been made: a grant's, or a top-up's."""

    entry: Entry
    """It is immutable, so whoever loads it before the books are locked loads the same."""
    actor: str
    reason: str


class RevokeGrant(Struct, frozen=True, kw_only=True):
    """End a grant early."""

    grant: Grant
    actor: str
    reason: str


class ReclaimExpired(Struct, frozen=True, kw_only=True):
    """Give what has expired of a grant back to its programme."""

    grant: Grant
    actor: str


class NotReversible(Struct, frozen=True):
    """An entry of this kind is not negated here: `code` says what is done instead, if anything."""

    code: Literal["is-reversal", "correct-in-metering", "correct-in-invoicing", "not-reversible"]


class AlreadyReversed(Struct, frozen=True):
    """The entry has been negated before."""


class AlreadyDrawn(Struct, frozen=True):
    """Usage has drawn on the lot: what was used cannot be taken away."""

    drawn_micro: int


class Reserved(Struct, frozen=True):
    """Open holds reserve on the lot: what was guaranteed cannot be taken away."""

    reserved_micro: int


class GrantNotApproved(Struct, frozen=True):
    """Only an approved grant has a lot that could end early."""

    state: GrantState


class AlreadyReclaimed(Struct, frozen=True):
    """What had expired of the grant went back to its programme before."""


class NotExpired(Struct, frozen=True):
    """Nothing of the grant has expired, or not all that will."""


ReversalRefusal = NotReversible | AlreadyReversed | AlreadyDrawn | Reserved | AlreadyReclaimed
"""Why an entry cannot be reversed, in order of precedence."""

RevocationRefusal = GrantNotApproved | GrantExpired
"""Why a grant cannot be revoked, in order of precedence."""

ReclaimRefusal = AlreadyReclaimed | NotExpired
"""Why expired credit cannot be reclaimed, in order of precedence."""

WithdrawalRefusal = ReversalRefusal | GrantNotApproved | NotExpired
"""Every refusal that only a withdrawal has."""


def reverse_entry(
    books: Books, command: ReverseEntry, now_ms: int
) -> tuple[Entry, ...] | ReversalRefusal:
    """Negate a grant: its lot is gone, and the programme may promise its amount again.

    A top-up has no programme. What had expired of it is taken back first, so that nothing of it
    stays in `breakage`.
    """
    reversed_entry, book = command.entry, books.book
    grant = reversed_entry.grant
    if grant is None:
        return NotReversible(_code_of(reversed_entry.kind))
    lot = lot_of(book, grant.grant_id)
    if not lot.granted_micro:
        return AlreadyReversed()
    if lot.drawn_micro:
        return AlreadyDrawn(lot.drawn_micro)
    if lot.reserved_micro:
        return Reserved(lot.reserved_micro)
    if lot.reclaimed_micro:
        return AlreadyReclaimed()
    entries: list[Entry] = []
    if lot.expired_micro:
        entries.append(take_back(book, lot, lot.expired_micro, now_ms))
        book = evolve(Books(book), entries[-1]).book
    caused_by = f"entry:{reversed_entry.entry_id}"
    micro = grant.grant_micro
    negated = [(lot.account, -micro), (funding_account(grant.programme_id), micro)]
    if grant.programme_id != PREPAID:
        entries.append(
            _budget_returned(books, micro, now_ms, caused_by=caused_by, actor=command.actor)
        )
    reversal = next_entry(
        book,
        "reversal",
        now_ms,
        postings=postings_of(book, negated),
        caused_by=caused_by,
        actor=command.actor,
        reverses=reversed_entry.entry_id,
        reason=command.reason,
    )
    return (*entries, reversal)


def revoke_grant(
    books: Books, command: RevokeGrant, now_ms: int
) -> tuple[Entry, ...] | RevocationRefusal:
    """End a grant's window with the hour begun, or before it begins."""
    grant, book = command.grant, books.book
    if grant.state != "approved":
        return GrantNotApproved(grant.state)
    lot = lot_of(book, grant.grant_id)
    expires_ms = max(hour_floor_ms(now_ms) + HOUR_MS, lot.effective_ms)
    if lot.expires_ms is not None and lot.expires_ms <= expires_ms:
        return GrantExpired(lot.expires_ms)
    revoked = next_entry(
        book,
        "grant_revoked",
        now_ms,
        caused_by=f"grant:{grant.grant_id}",
        actor=command.actor,
        reason=command.reason,
        lot=LotDetail(grant_id=grant.grant_id, expires_ms=expires_ms),
    )
    if expires_ms > lot.effective_ms:
        return (revoked,)
    # No usage can lie in an empty window, so nobody has to be waited for; and no hold reserves on a
    # lot that has never been open.
    book = evolve(Books(book), revoked).book
    return (revoked, expire_lot(book, lot.account, now_ms))


def reclaim_expired(
    books: Books, command: ReclaimExpired, now_ms: int
) -> tuple[Entry, ...] | ReclaimRefusal:
    """Give what has expired of a grant back to its programme: an entry in each of their books."""
    grant, book = command.grant, books.book
    if grant.state in ("proposed", "rejected"):
        return NotExpired()
    lot = lot_of(book, grant.grant_id)
    if lot.reclaimed_micro:
        return AlreadyReclaimed()
    if not lot.expired_micro or lot.remaining_micro:
        return NotExpired()
    caused_by = f"grant:{grant.grant_id}"
    micro = lot.expired_micro
    returned = [("breakage", -micro), (funding_account(grant.programme_id), micro)]
    return (
        _budget_returned(books, micro, now_ms, caused_by=caused_by, actor=command.actor),
        next_entry(
            book,
            "reclaimed",
            now_ms,
            postings=postings_of(book, returned),
            caused_by=caused_by,
            actor=command.actor,
            lot=LotDetail(grant_id=grant.grant_id, reclaimed_micro=micro),
        ),
    )


def _budget_returned(books: Books, micro: int, now_ms: int, *, caused_by: str, actor: str) -> Entry:
    """Make the entry by which a programme may promise an amount again."""
    programme = books.programme
    if programme is None:
        raise InvariantBroken("what goes back to a programme is decided on its book too")
    returned = [("budget", micro), (granted_account(books.book.tenant_id), -micro)]
    return next_entry(
        programme,
        "budget_returned",
        now_ms,
        postings=postings_of(programme, returned),
        caused_by=caused_by,
        actor=actor,
    )


def lot_of(book: Book, grant_id: str) -> Lot:
    """Return the lot of a grant that was entered; its book was opened with it."""
    found = next((lot for lot in book.lots if lot.grant_id == grant_id), None)
    if found is None:
        raise InvariantBroken(f"the lot of grant {grant_id} was not opened")
    return found


def _code_of(
    kind: str,
) -> Literal["is-reversal", "correct-in-metering", "correct-in-invoicing", "not-reversible"]:
    match kind:
        case "reversal":
            return "is-reversal"
        case "charge":
            return "correct-in-metering"
        case "invoiced" | "settled":
            return "correct-in-invoicing"
        case _:
            return "not-reversible"
