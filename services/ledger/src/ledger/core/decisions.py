"""Decisions: what a command enters into books, or why it is refused. Pure, time is an argument.

`decide(books, command, now_ms) -> entries | refusal` decides whatever is written into books: what
somebody asks for, and what metering states. It never looks anything up: `Books` are the book, and
the one bucket, the one hold and the programme's book that the command speaks of (see `book`).
A `UnitOfWork` holds the books of one transaction and decides commands on them one after another, at
one instant: it folds what each enters, so that the next one sees it, and collects what has to be
written. It does no I/O: a store opens it and saves its changes (`store/books.py`).

**What is over is over.** Holds whose time has come reserve nothing in any decision, though no entry
says so yet. A command that enters something enters the ends of those holds before it; one that is
refused or books nothing leaves them to the next (see `expiry`).

**Charges are differences.** A charge message states the new total of a bucket. What is newer than
what was booked (`book.is_newer`) is entered as the difference; anything else books nothing. An
entry is made also when only GPU time grew (a price of 0, or a fraction of a micro-unit) or only the
revision rose: bills count GPU time by the entries, and an old revision must not come back. Such an
entry may have no postings.

**Who pays.** The difference is drawn from the lots open in the bucket's hour, in draw order, taking
what is free or reserved by the charge's own hold; what no lot covers goes to `receivable`
(commercial) or `unfunded` (all others). Beyond the credit limit it is booked all the same, and
flagged: usage is a fact. A total that went down returns credit to what the bucket itself drew,
newest first.

Refusals, in order of precedence; of any command first `NotFound` (no such book). Charge:
`RefundUnsupported`, `TotalOutOfRange`. Hold placed: `HoldOver`, `InsufficientCredit`. Hold
released: `NotFound` (no such hold), `HoldClosed`. Grant approved: `MakerIsChecker`,
`GrantNotProposed`, `GrantExpired`, `BudgetExceeded`. Invoiced: `AlreadyInvoiced`, `NotReceivable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import assert_never

from msgspec import Struct
from msgspec.structs import replace

from hisab_contracts.charges import AllocationFinal, BucketTotal
from hisab_contracts.entries import ChargeDetail, Entry
from hisab_contracts.ids import HoldId, TenantId
from hisab_contracts.invariants import invariant
from hisab_contracts.units import MAX_MICRO
from ledger.core.book import (
    INVOICED,
    PROGRAMME_BOOK,
    Book,
    BookedBucket,
    Books,
    Lot,
    available_micro,
    evolve,
    hold_id_of,
    is_newer,
    next_entry,
    postings_of,
    take_from_lots,
)
from ledger.core.expiry import books_at, due_of, expire, expiry_of, release_entry
from ledger.core.grants import ApprovalRefusal, ApproveGrant
from ledger.core.holds import (
    LIMIT,
    Draw,
    Hold,
    HoldClosed,
    HoldOver,
    InsufficientCredit,
    PlaceHold,
    ReleaseHold,
    placed_detail,
)
from ledger.core.movements import (
    AlreadyInvoiced,
    NotReceivable,
    RecordInvoiced,
    SetBudget,
    approve_grant,
    funding_account,
    granted_account,
    record_invoiced,
    set_budget,
)

BookCommand = PlaceHold | ReleaseHold | ApproveGrant | RecordInvoiced | SetBudget
"""The closed union of what somebody can ask of a book. Charges come from metering besides."""


class NotFound(Struct, frozen=True):
    """What the command names does not exist, or not for who asks: a tenant, a hold, a grant."""

    what: str


class RefundUnsupported(Struct, frozen=True):
    """The total has a refunded part, which is not booked yet."""

    refunded_micro: int


class TotalOutOfRange(Struct, frozen=True):
    """The book's total would pass 64 bits; nothing of the charge is entered."""

    charged_micro: int


BookRefusal = (
    NotFound
    | RefundUnsupported
    | TotalOutOfRange
    | HoldOver
    | InsufficientCredit
    | HoldClosed
    | ApprovalRefusal
    | AlreadyInvoiced
    | NotReceivable
)
"""The closed union of why a command is refused; precedence stands in the module's docstring."""


class Footprint(Struct, frozen=True, kw_only=True):
    """What a command touches besides its own book.

    Whoever opens books for it loads this, locked; the unit of work decides the command on this, and
    on nothing else.
    """

    hold_id: HoldId | None = None
    programme_book_id: TenantId | None = None
    """The second book of a command that moves something between two."""
    accounts: tuple[str, ...] = ()
    """Those that are neither a lot nor a total of a book."""


def footprint_of(command: BookCommand) -> Footprint:
    """Say what a command touches besides its own book."""
    match command:
        case PlaceHold() | ReleaseHold():
            return Footprint(hold_id=command.hold_id)
        case ApproveGrant(grant=grant):
            return Footprint(
                programme_book_id=TenantId(PROGRAMME_BOOK + grant.programme_id),
                accounts=(funding_account(grant), "budget", granted_account(grant)),
            )
        case RecordInvoiced():
            return Footprint(accounts=(INVOICED + command.document_id,))
        case SetBudget():
            return Footprint(accounts=("authority", "budget"))
        case _:
            assert_never(command)


class BookChanges(Struct, frozen=True, kw_only=True):
    """What a unit of work has to write: new entries, and every projection that they changed."""

    entries: Sequence[Entry]
    traces: Sequence[str | None]
    """The trace of each entry, where it has one: telemetry, no fact."""
    books: Sequence[Book]
    lots: Sequence[tuple[str, Lot]]
    """(tenant, lot), here and below."""
    buckets: Sequence[tuple[str, BookedBucket]]
    placed: Sequence[tuple[str, PlaceHold, Hold]]
    """New holds: what was asked, and what is left of it at the end of the unit."""
    holds: Sequence[tuple[str, Hold]]
    """Older holds that changed."""
    accounts: Sequence[tuple[str, str, int]]
    """(tenant, account, balance)."""


class UnitOfWork:
    """The books of one transaction, and all that was decided on them so far.

    Whoever makes one holds the locks of its books: then `seq` has no gap, `recorded_at` never falls
    and the hash chain has one head. Loaded are the lots and accounts that its commands can move,
    and the buckets and holds that they name; of holds those that a final can end as well, and all
    that are due.
    """

    def __init__(
        self,
        books: Mapping[str, Book],
        now_ms: int,
        *,
        buckets: Mapping[tuple[str, str], BookedBucket] | None = None,
        holds: Mapping[tuple[str, str], Hold] | None = None,
        holds_of_allocations: Mapping[tuple[str, str, str], Sequence[str]] | None = None,
        due: Iterable[tuple[str, Hold]] = (),
    ) -> None:
        """Take what was loaded; buckets and holds by (tenant, id).

        `now_ms` is the instant of every decision of this unit. `holds_of_allocations` lists open
        holds by the (tenant, hub, allocation) whose final ends them: a hub numbers its allocations
        by itself, so two hubs may use one id. `due` are open holds, with their tenants, whose time
        has come: what this unit enters into their books ends them first.
        """
        self.now_ms = now_ms
        self._books = dict(books)
        self._buckets = dict(buckets or {})
        self._holds = dict(holds or {})
        over: dict[str, list[Hold]] = {}
        for tenant_id, hold in due:
            self._holds[tenant_id, hold.hold_id] = hold
            over.setdefault(tenant_id, []).append(hold)
        # Once for all commands: thousands may be due, and a batch may have as many messages that
        # enter nothing. Until something is folded into its book this stands.
        self._due = {
            tenant_id: due_of(self._books[tenant_id], found, now_ms)
            for tenant_id, found in over.items()
        }
        self._holds_of_allocations = dict(holds_of_allocations or {})
        self._lots_before = {book_id: book.lots for book_id, book in books.items()}
        self._entries: list[Entry] = []
        self._traces: list[str | None] = []
        self._placed: dict[tuple[str, str], PlaceHold] = {}
        self._changed_buckets: set[tuple[str, str]] = set()
        self._changed_holds: set[tuple[str, str]] = set()

    def book(self, book_id: str) -> Book:
        """Return a book as it stands now."""
        return self._books[book_id]

    def hold(self, tenant_id: str, hold_id: str) -> Hold:
        """Return a hold as it stands now."""
        return self._holds[tenant_id, hold_id]

    def enter(
        self,
        book_id: str,
        command: BucketTotal | BookCommand,
        *,
        trace_id: str | None = None,
    ) -> tuple[Entry, ...] | BookRefusal:
        """Decide a command on its books as they stand now, and fold what it enters.

        A refusal changes nothing. The command's own entry is the last.
        """
        books = self._opened(book_id, command)
        if books is None:
            return NotFound("tenant")
        decided = decide(books, command, self.now_ms)
        if isinstance(decided, tuple) and decided:
            self._fold(books, decided, trace_id)
            if isinstance(command, PlaceHold):
                self._placed[book_id, command.hold_id] = command
        return decided

    def release_final(self, final: AllocationFinal) -> None:
        """End the open holds that an allocation's final ends; one that is over has expired."""
        tenant_id = final.tenant_id
        allocation = (tenant_id, final.hub, final.allocation_id)
        for hold_id in self._holds_of_allocations.get(allocation, ()):
            hold = self._holds[tenant_id, hold_id]
            # A final that comes twice in one batch finds the hold ended by the first.
            if hold.ended_by is None:
                command = ReleaseHold(
                    hold_id=hold.hold_id,
                    ended_by="final",
                    caused_by=f"final:{final.hub}/{final.allocation_id}",
                    actor="metering",
                )
                self.enter(tenant_id, command)

    def release_expired(self) -> None:
        """End, of the holds that were loaded, those that are over, in the order of their ids."""
        for tenant_id, hold_id in sorted(self._holds):
            hold = self._holds[tenant_id, hold_id]
            # They were looked for before the locks: a final or a release may have ended one since.
            if hold.is_over(self.now_ms):
                self.enter(tenant_id, expiry_of(hold))

    def changes(self) -> BookChanges:
        """Collect what has to be written; no entries: nothing has."""
        changed = sorted({entry.tenant_id for entry in self._entries})
        books = [self._books[book_id] for book_id in changed]
        return BookChanges(
            entries=self._entries,
            traces=self._traces,
            books=books,
            lots=self._changed_lots(books),
            buckets=[(key[0], self._buckets[key]) for key in self._changed_buckets],
            placed=[(key[0], command, self._holds[key]) for key, command in self._placed.items()],
            holds=[
                (key[0], self._holds[key]) for key in self._changed_holds if key not in self._placed
            ],
            accounts=[
                (book.tenant_id, account, micro)
                for book in books
                for account, micro in book.accounts.items()
            ],
        )

    def _opened(self, book_id: str, command: BucketTotal | BookCommand) -> Books | None:
        """Open a book where a command touches it; None when there is no such book."""
        book = self._books.get(book_id)
        # A programme's book takes its budget and nothing else; a tenant's never takes one.
        if book is None or (book.kind == "fund") != isinstance(command, SetBudget):
            return None
        due = self._due.get(book_id)
        if isinstance(command, BucketTotal):
            bucket = self._buckets.get((book_id, command.bucket_id))
            return Books(book, bucket, self._hold_or_none(book_id, command.hold_id), due=due)
        footprint = footprint_of(command)
        second = footprint.programme_book_id
        return Books(
            book,
            hold=self._hold_or_none(book_id, footprint.hold_id),
            programme=None if second is None else self._books.get(second),
            due=due,
        )

    def _hold_or_none(self, tenant_id: str, hold_id: HoldId | None) -> Hold | None:
        return None if hold_id is None else self._holds.get((tenant_id, hold_id))

    def _fold(self, books: Books, entries: tuple[Entry, ...], trace_id: str | None) -> None:
        """Fold what a command entered, keep what it left behind, and note what it changed."""
        book_id = books.book.tenant_id
        # At once, so that the next command of this transaction is decided on what this one left.
        for entry in entries:
            # Each entry with the hold that it speaks of: those that are over end before the
            # command's own entry.
            hold = self._hold_or_none(book_id, hold_id_of(entry))
            books = evolve(replace(books, hold=hold), entry)
            self._entries.append(entry)
            # Only a charge came with a trace; what the clock ended has none.
            self._traces.append(None if entry.charge is None else trace_id)
            if books.hold is not None:
                hold_key = book_id, books.hold.hold_id
                self._holds[hold_key] = books.hold
                self._changed_holds.add(hold_key)
        self._books[book_id] = books.book
        if books.bucket is not None:
            bucket_key = book_id, books.bucket.bucket_id
            self._buckets[bucket_key] = books.bucket
            self._changed_buckets.add(bucket_key)
        if books.programme is not None:
            self._books[books.programme.tenant_id] = books.programme
        # Whatever was due in this book ended before the command's own entry.
        self._due.pop(book_id, None)

    def _changed_lots(self, books: Iterable[Book]) -> list[tuple[str, Lot]]:
        changed: list[tuple[str, Lot]] = []
        for book in books:
            before = self._lots_before[book.tenant_id]
            # Most books of a batch of unfunded or owed usage move no lot: their tuple is the same.
            if book.lots is not before:
                loaded = set(before)
                changed += [(book.tenant_id, lot) for lot in book.lots if lot not in loaded]
        return changed


def decide(
    books: Books, command: BucketTotal | BookCommand, now_ms: int
) -> tuple[Entry, ...] | BookRefusal:
    """Decide a command: the entries it makes, in order, or why it is refused.

    No entries: there is nothing to book (a total not newer than the booked one). Entries of holds
    that are over come first, the command's own last. Conserves: every entry's postings sum to zero.
    """
    due = books.due
    if due is None:
        return _decide(books, command, now_ms)
    # First as of now, without making an entry: a refusal needs none, and thousands may be over.
    decided = _decide(books_at(books, due, now_ms), command, now_ms)
    if not isinstance(decided, tuple) or not decided:
        return decided
    expiries, after = expire(books, due, now_ms)
    decided = _decide(after, command, now_ms)
    return (*expiries, *decided) if isinstance(decided, tuple) else decided


def _decide(
    books: Books, command: BucketTotal | BookCommand, now_ms: int
) -> tuple[Entry, ...] | BookRefusal:
    """Decide a command on books in which nothing is due."""
    match command:
        case BucketTotal():
            return _charge(books, command, now_ms)
        case PlaceHold():
            # Its id comes from the command's key. It is there already when that key was forgotten,
            # by a restore whose entries were taken back: it is not placed a second time.
            return () if books.hold is not None else _place_hold(books.book, command, now_ms)
        case ReleaseHold():
            return _release_hold(books, command, now_ms)
        case ApproveGrant():
            return approve_grant(books, command, now_ms)
        case RecordInvoiced():
            return record_invoiced(books.book, command, now_ms)
        case SetBudget():
            return set_budget(books.book, command, now_ms)
        case _:
            assert_never(command)


def _charge(
    books: Books, total: BucketTotal, now_ms: int
) -> tuple[Entry, ...] | RefundUnsupported | TotalOutOfRange:
    """Enter the difference between a bucket's stated total and what was booked of it."""
    if total.refunded_micro:
        # Refused whole: booking the charge without its refund would bill what was given back.
        return RefundUnsupported(total.refunded_micro)
    book = books.book
    bucket = books.bucket or BookedBucket(bucket_id=total.bucket_id, hour_ms=total.hour_ms)
    if not is_newer(total, bucket):
        return ()
    difference_micro = total.total_micro - bucket.charged_micro
    if book.charged_micro + difference_micro > MAX_MICRO:
        return TotalOutOfRange(book.charged_micro)
    if difference_micro >= 0:
        draws = _draws(book, books.hold, total.hour_ms, difference_micro)
    else:
        draws = _returns(bucket, -difference_micro)
    drawn_micro = sum(micro for _, micro in draws)
    invariant(drawn_micro == difference_micro, "draws and overage are the charge")
    movements = [(account, -micro) for account, micro in draws]
    if difference_micro:
        movements.insert(0, ("usage", difference_micro))
    postings = postings_of(book, movements)
    # Receivable is the last to be drawn, so an overage is the last posting. It is flagged, never
    # refused: usage that happened is a fact, whatever the limit says.
    over_limit = (
        difference_micro > 0
        and postings[-1].account == "receivable"
        and book.invoiced_micro - postings[-1].balance_micro > book.credit_limit_micro
    )
    detail = ChargeDetail(
        bucket_id=total.bucket_id,
        allocation_id=total.allocation_id,
        project_id=total.project_id,
        hold_id=total.hold_id,
        hub=total.hub,
        node_id=total.node_id,
        sku=total.sku,
        price_class=total.price_class,
        price_version=total.price_version,
        hour_ms=total.hour_ms,
        revision=total.revision,
        gpu_ns=total.total_gpu_ns - bucket.gpu_ns,
        charge_micro=difference_micro,
        over_limit=over_limit,
    )
    return (
        next_entry(
            book,
            "charge",
            now_ms,
            effective_ms=total.hour_ms,
            postings=postings,
            caused_by=f"bucket:{total.bucket_id}",
            actor="metering",
            charge=detail,
        ),
    )


def _draws(book: Book, hold: Hold | None, usage_ms: int, charge_micro: int) -> list[Draw]:
    """Say who pays: lots open at usage time in draw order, then receivable or unfunded."""
    own = {} if hold is None else dict(hold.reserved)
    draws, overage_micro = take_from_lots(book.lots, usage_ms, charge_micro, own)
    if overage_micro:
        draws.append(("receivable" if book.kind == "commercial" else "unfunded", overage_micro))
    return draws


def _returns(bucket: BookedBucket, returned_micro: int) -> list[Draw]:
    """Give credit back to what the bucket itself drew, newest first, as negative draws."""
    returns: list[Draw] = []
    left_micro = returned_micro
    for account, drawn_micro in reversed(bucket.draws):
        if not left_micro:
            break
        back_micro = min(left_micro, drawn_micro)
        returns.append((account, -back_micro))
        left_micro -= back_micro
    return returns


def _place_hold(
    book: Book, command: PlaceHold, now_ms: int
) -> tuple[Entry, ...] | HoldOver | InsufficientCredit:
    """Reserve on lots open now in draw order, then on the credit limit; all of it or nothing."""
    if command.expires_ms <= now_ms:
        return HoldOver(command.expires_ms)
    available = available_micro(book, now_ms)
    if command.hold_micro > available:
        return InsufficientCredit(
            available_micro=available, shortfall_micro=command.hold_micro - available
        )
    reserved, limit_micro = take_from_lots(book.lots, now_ms, command.hold_micro, {})
    if limit_micro:
        reserved.append((LIMIT, limit_micro))
    detail = placed_detail(command, reserved)
    caused_by = f"hold:{command.hold_id}"
    return (
        next_entry(
            book, "hold_placed", now_ms, caused_by=caused_by, actor=command.actor, hold=detail
        ),
    )


def _release_hold(
    books: Books, command: ReleaseHold, now_ms: int
) -> tuple[Entry, ...] | NotFound | HoldClosed:
    """End a hold: what it still reserves is free again."""
    hold = books.hold
    if hold is None:
        return NotFound("hold")
    if hold.ended_by is not None:
        return HoldClosed(hold.ended_by)
    return (release_entry(books.book, hold, command, now_ms),)
