"""What a restored ledger lacks: published entries against those that are here, and taken back.

A ledger restored from a backup lacks what was entered after it. What of that was published is in
the topic, whole and hashed; entered anew under the same `seq` it would be a second history, and
those downstream would drop it as a repeat of the first. So a ledger compares before it serves, and
published entries can be taken back as they were: the hash is computed again, the entry must follow
the book's head, and its effects follow from it (`book.evolve`).

Two things a tenant's entry does not say. A grant has its counterpart in the programme's book, which
is not published: it is made again out of the grant's entry, with its amounts, and so is that of a
grant's reversal. They come back partition by partition, so where a programme gave to several
tenants, `seq`, hash and `recorded_at` in its own book may differ from what they were; nobody
outside was told those. What a scheduler said of a job when it placed a hold (project, job, hub,
SKU, class) is gone: the hold stands, is drawn on and ends by release or expiry, but no final of a
run ends it, and what it reserves moves to no lot that is for some usage only.

Refusals, in order of precedence. Where to begin: `RecordsRemoved`. Comparing: `EntryLacking`,
`EntryDiffers`. Taking back: `EntryForged`, `BookUnknown`, `EntryDiffers`, `EntriesMissing`,
`ProgrammeUnknown`, `BudgetTooSmall`.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from hisab_contracts.entries import Entry, entry_hash
from hisab_contracts.ids import EntryId, GrantId, HubCode, ProgrammeId, ProjectId, Sku, TenantId
from ledger.core.adjustments import AddBudget
from ledger.core.book import (
    PROGRAMME_BOOK,
    Book,
    Books,
    balance_micro,
    hold_id_of,
    next_entry,
    postings_of,
)
from ledger.core.decisions import UnitOfWork
from ledger.core.holds import PlaceHold
from ledger.core.lots import LOT
from ledger.core.movements import FUNDING, SetBudget, granted_account
from ledger.core.prepayments import PREPAID

UNKNOWN: Final = "-"
"""Stands for what is in no entry; no name of ours is so short of letters."""


class RecordsRemoved(Struct, frozen=True):
    """The broker no longer has records that were published after what is known here."""

    known_offset: int
    first_offset: int


class EntryLacking(Struct, frozen=True):
    """A published entry is not in the database."""

    entry_id: EntryId


class EntryDiffers(Struct, frozen=True):
    """The database has another entry in the place of a published one: the book has forked."""

    entry_id: EntryId


class EntryForged(Struct, frozen=True):
    """A message is not the entry whose hash it carries."""

    entry_id: EntryId


class BookUnknown(Struct, frozen=True):
    """No topic has the tenant of a published entry."""

    tenant_id: TenantId


class EntriesMissing(Struct, frozen=True):
    """Between the book's head and a published entry there are others that the topic lacks."""

    entry_id: EntryId
    head_seq: int


class ProgrammeUnknown(Struct, frozen=True):
    """A grant's programme was opened after the backup; its budget is in no topic."""

    programme_id: ProgrammeId


class BudgetTooSmall(Struct, frozen=True):
    """The programme's budget does not cover what it granted."""

    programme_id: ProgrammeId
    budget_left_micro: int


PublishedFault = RecordsRemoved | EntryLacking | EntryDiffers
"""Why a ledger is not served."""

TakingBackRefusal = (
    EntryForged | BookUnknown | EntryDiffers | EntriesMissing | ProgrammeUnknown | BudgetTooSmall
)
"""Why a published entry cannot be taken back."""


class RestoredBooks(UnitOfWork):
    """Books of a restored database, whole: what they lack is folded into them as it was."""

    def book_or_none(self, book_id: str) -> Book | None:
        """Return a book as it stands now; None when there is none of this id."""
        return self._books.get(book_id)

    def take_back(self, entry: Entry, placed: PlaceHold | None) -> None:
        """Fold an entry that was decided before, and was lost since; `placed`: it placed this hold.

        Raises `InvariantBroken` where it does not follow from its book as it stands.
        """
        book_id, charge = entry.tenant_id, entry.charge
        books = Books(
            self._books[book_id],
            None if charge is None else self._buckets.get((book_id, charge.bucket_id)),
            self._hold_or_none(book_id, hold_id_of(entry)),
        )
        self._fold(books, (entry,), None)
        if placed is not None:
            self._placed[book_id, placed.hold_id] = placed


def first_to_compare(
    known_offset: int | None, first_offset: int, end_offset: int, accepted_offset: int | None
) -> int | RecordsRemoved:
    """Say from which offset of a partition published records are compared.

    What lies before `known_offset` was acknowledged to this database; None: nothing was. A topic
    that ends before it was made again, and is compared whole. `accepted_offset` is where an
    operator says on the record that reading may begin: it excuses what the broker has removed, and
    never a record that is there.
    """
    begin = 0 if known_offset is None else known_offset
    if begin > end_offset:
        return first_offset
    if begin < first_offset and (accepted_offset is None or accepted_offset < first_offset):
        return RecordsRemoved(begin, first_offset)
    return max(begin, first_offset)


def compare_published(
    published: Entry, kept_hash: str | None
) -> EntryLacking | EntryDiffers | None:
    """Compare a published entry with the hash of what stands in its place; None: the same."""
    if kept_hash is None:
        return EntryLacking(published.entry_id)
    return EntryDiffers(published.entry_id) if kept_hash != published.hash else None


def refuse_taking_back(
    published: Entry, book: Book | None
) -> EntryForged | BookUnknown | EntriesMissing | None:
    """Say why a published entry that is lacking cannot follow the book as it stands, or None."""
    if entry_hash(published) != published.hash:
        return EntryForged(published.entry_id)
    if book is None:
        return BookUnknown(published.tenant_id)
    if published.seq != book.seq + 1 or published.prev_hash != book.head_hash:
        return EntriesMissing(published.entry_id, book.seq)
    return None


def budget_change_of(entry: Entry) -> tuple[ProgrammeId, int] | None:
    """Say which programme's budget an entry moved, and by how much; None: none.

    What grants, and what takes back, says it itself: what is posted to `funding` moved the budget.
    """
    if entry.kind not in ("grant", "reversal", "reclaimed"):
        return None
    (posting,) = [found for found in entry.postings if found.account.startswith(FUNDING)]
    programme_id = ProgrammeId(posting.account.removeprefix(FUNDING))
    return None if programme_id == PREPAID else (programme_id, posting.posting_micro)


def reversed_grant_of(entry: Entry) -> GrantId:
    """Say whose lot a reversal emptied."""
    (account,) = [found.account for found in entry.postings if found.account.startswith(LOT)]
    return GrantId(account.removeprefix(LOT))


def counterpart_of(
    entry: Entry, change: tuple[ProgrammeId, int], programme: Book | None
) -> Entry | ProgrammeUnknown:
    """Make the entry that a grant, or what took it back, made in the programme's book.

    Its budget may fall below 0 meanwhile: what came back from one tenant and was granted to another
    lies in two partitions. Whether it covers all is asked at the end (`refuse_budget`).
    """
    programme_id, change_micro = change
    if programme is None:
        return ProgrammeUnknown(programme_id)
    movements = [("budget", change_micro), (granted_account(entry.tenant_id), -change_micro)]
    return next_entry(
        programme,
        "budget_granted" if change_micro < 0 else "budget_returned",
        entry.recorded_ms,
        postings=postings_of(programme, movements),
        caused_by=entry.caused_by,
        actor=entry.actor,
    )


def refuse_budget(programme: Book) -> BudgetTooSmall | None:
    """Say, with everything taken back, whether a programme granted more than it was given."""
    left_micro = balance_micro(programme, "budget")
    if left_micro >= 0:
        return None
    programme_id = ProgrammeId(programme.tenant_id.removeprefix(PROGRAMME_BOOK))
    return BudgetTooSmall(programme_id, left_micro)


def give_budget(programme: Book, budget_micro: int, *, actor: str) -> SetBudget | AddBudget | None:
    """Say by which command a programme comes to what an operator says that it was given in all."""
    if not programme.seq:
        return SetBudget(budget_micro=budget_micro, actor=actor)
    add_micro = budget_micro + balance_micro(programme, "authority")
    return AddBudget(add_micro=add_micro, caused_by=actor, actor=actor) if add_micro > 0 else None


def programme_book_of(programme_id: ProgrammeId) -> TenantId:
    """Return the id of a programme's book."""
    return TenantId(PROGRAMME_BOOK + programme_id)


def placing_of(placed: Entry) -> PlaceHold | None:
    """Return the command of an entry that placed a hold, as far as the entry tells; None: none."""
    detail = placed.hold
    if detail is None or detail.cause != "placed":
        return None
    return PlaceHold(
        hold_id=detail.hold_id,
        hold_micro=detail.hold_micro,
        project_id=ProjectId(UNKNOWN),
        job_ref=UNKNOWN,
        allocation_id=detail.allocation_id,
        hub=HubCode(UNKNOWN),
        sku=Sku(UNKNOWN),
        price_class=None,
        expires_ms=detail.expires_ms,
        actor=placed.actor,
    )
