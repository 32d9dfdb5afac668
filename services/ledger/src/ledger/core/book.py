"""The book: what was entered, and its state as a fold. Pure: values in, values out.

A book is one tenant's (or one programme's) stream of entries, numbered from 1 without gaps and
chained by hash. Its state is a fold: `evolve(books, entry) -> books`. `Books` is all that one
command can touch: a book opened at one bucket and one hold, and for an approval the programme's
book too. Whoever loads them passes them in, so a book with a million buckets is as quick as a small
one. What is entered next is decided from the same state in `decisions`.

**Signs.** Balances are the tenant's view and sum to zero over a book: `usage`, `lot:*` and
`breakage` are >= 0; `funding:*`, `receivable`, `invoiced:*`, `settled`, `unfunded` are <= 0 and
shown positive. In a programme's book: `authority` <= 0, `budget` and `granted:*` >= 0.

A charge under an open hold changes the hold's reservations, and says by how much: they shrink by
what it drew on lots and on the credit limit, so that drawing leaves `available_micro` as it was,
and grow by what returned. What goes to `unfunded` draws on nothing and shrinks nothing.

There are no refusals here: an entry that does not follow from the state raises `InvariantBroken`,
because then the stored past contradicts itself and nothing may be built on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, Literal

from msgspec import Struct, field
from msgspec.structs import replace

from hisab_contracts.entries import (
    GENESIS_HASH,
    ChargeDetail,
    Entry,
    GrantDetail,
    HoldDetail,
    LimitDetail,
    LotDetail,
    Posting,
    entry_hash,
)
from hisab_contracts.ids import BucketId, EntryId, HoldId, TenantId, entry_id
from hisab_contracts.invariants import invariant
from hisab_contracts.reference import TenantKind
from ledger.core.holds import (
    LIMIT,
    Hold,
    HoldState,
    hold_after,
    hold_after_charge,
    order_of,
    shrink_hold,
)
from ledger.core.lots import LOT, WHOLE_BPS, Draw, Lot, UsageTerms, in_draw_order

INVOICED: Final = "invoiced:"
PROGRAMME_BOOK: Final = "/programmes/"
"""Begins the id of a programme's book. No tenant's id has a slash, so none can be meant."""

SUSPENDED: Final = "tenant_suspended"
RESUMED: Final = "tenant_resumed"
"""Kinds of entries that say nothing else than themselves."""

BookKind = TenantKind | Literal["fund"]

# One mapping serves as the default of every book, so nobody may be able to write into it.
_NO_ACCOUNTS: Final[Mapping[str, int]] = MappingProxyType({})


class Book(Struct, frozen=True, kw_only=True):
    """A book after `seq` entries: what it holds, owes and has reserved.

    `charged = funded + receivable + invoiced + settled + unfunded`, always.
    """

    tenant_id: TenantId
    kind: BookKind
    currency: str
    credit_limit_micro: int
    seq: int = 0
    head_hash: str = GENESIS_HASH
    recorded_ms: int = 0
    """When the last entry was recorded: never falls as `seq` rises."""
    charged_micro: int = 0
    funded_micro: int = 0
    receivable_micro: int = 0
    invoiced_micro: int = 0
    settled_micro: int = 0
    unfunded_micro: int = 0
    reserved_micro: int = 0
    """What open holds have reserved on the credit limit."""
    breakage_micro: int = 0
    """What expired of its lots and was not taken back."""
    is_suspended: bool = False
    """No new job of the tenant is admitted; what it uses is booked all the same."""
    lots: tuple[Lot, ...] = ()
    """Those with anything left; the spent ones too where credit may return to one of them."""
    accounts: Mapping[str, int] = _NO_ACCOUNTS
    """Balances of all other accounts (funding, invoiced, a programme's); charges need none."""

    @property
    def headroom_micro(self) -> int:
        """What is left of the credit limit, unreserved; negative when usage went beyond it."""
        owed_micro = self.receivable_micro + self.invoiced_micro
        return self.credit_limit_micro - owed_micro - self.reserved_micro


class BookedBucket(Struct, frozen=True, kw_only=True):
    """What has been booked of one bucket, and which accounts paid, oldest draw first."""

    bucket_id: BucketId
    hour_ms: int
    revision: int = 0
    gpu_ns: int = 0
    charged_micro: int = 0
    """What it costs, less what was refunded of it."""
    refunded_micro: int = 0
    draws: tuple[Draw, ...] = ()

    def drawn_from(self) -> dict[str, int]:
        """Return what each account has paid of it."""
        drawn: dict[str, int] = {}
        for account, micro in self.draws:
            drawn[account] = drawn.get(account, 0) + micro
        return drawn


class DueHolds(Struct, frozen=True):
    """Open holds of a book whose time has come, though no entry says so yet (`expiry`)."""

    holds: tuple[Hold, ...]
    """In the order in which their time came."""
    book: Book
    """The book as it stands now: what they still reserve is free."""


class PlacedHold(Struct, frozen=True):
    """A hold, and what it is for: what decides to which lots its reservations may move."""

    hold: Hold
    terms: UsageTerms


class Books(Struct, frozen=True):
    """All that one command can touch: a book, the bucket and the hold it speaks of, and more.

    `programme` is the second book of a command that moves something between two. `due` is what is
    over in the book and not ended on the record; None: nothing is.
    """

    book: Book
    bucket: BookedBucket | None = None
    hold: Hold | None = None
    programme: Book | None = None
    due: DueHolds | None = None
    complete_until_ms: int | None = None
    """All usage of this tenant before it has been heard of; None: nothing is complete."""
    placed: tuple[PlacedHold, ...] = ()
    """For lots to expire: the open holds that reserve on one of them."""


def available_micro(book: Book, now_ms: int) -> int:
    """What a hold placed now could reserve; never negative.

    The unreserved remainder of the lots open now, and what is left of the credit limit. A limit
    that usage went beyond gives nothing, and takes nothing from the lots: they were granted.
    """
    free_micro = sum(lot.free_micro for lot in book.lots if lot.is_open(now_ms))
    return free_micro + max(0, book.headroom_micro)


def hold_state(book: Book, hold: Hold, now_ms: int) -> HoldState:
    """Say how a hold stands, and what its tenant has available beside it."""
    return HoldState(
        hold_id=hold.hold_id,
        ended_by=hold.ended_by,
        hold_micro=hold.hold_micro,
        open_micro=hold.open_micro,
        short_micro=hold.short_micro,
        drawn_micro=hold.drawn_micro,
        available_micro=available_micro(book, now_ms),
    )


def balance_micro(book: Book, account: str) -> int:
    """Return what an account of the book holds, with its sign; 0 where nothing was entered."""
    match account:
        case "usage":
            return book.charged_micro
        case "receivable":
            return -book.receivable_micro
        case "unfunded":
            return -book.unfunded_micro
        case "breakage":
            return book.breakage_micro
        case _ if account.startswith(LOT):
            return next(
                (lot.remaining_micro for lot in book.lots if account[4:] == lot.grant_id), 0
            )
        case _:
            return book.accounts.get(account, 0)


def next_entry(
    book: Book,
    kind: str,
    now_ms: int,
    *,
    caused_by: str,
    actor: str,
    effective_ms: int | None = None,
    postings: list[Posting] | None = None,
    charge: ChargeDetail | None = None,
    hold: HoldDetail | None = None,
    grant: GrantDetail | None = None,
    lot: LotDetail | None = None,
    limit: LimitDetail | None = None,
    reverses: EntryId | None = None,
    reason: str | None = None,
) -> Entry:
    """Make the book's next entry, chained to its last and hashed; it is not folded yet.

    Effective when it is recorded, unless said otherwise.
    """
    # The clock may step back, but `recorded_at` never falls: order is `seq`, and time follows it.
    recorded_ms = max(now_ms, book.recorded_ms)
    seq = book.seq + 1
    entry = Entry(
        tenant_id=book.tenant_id,
        seq=seq,
        entry_id=entry_id(book.tenant_id, seq),
        kind=kind,
        effective_ms=recorded_ms if effective_ms is None else effective_ms,
        recorded_ms=recorded_ms,
        postings=postings or [],
        caused_by=caused_by,
        actor=actor,
        prev_hash=book.head_hash,
        hash="",
        charge=charge,
        hold=hold,
        grant=grant,
        lot=lot,
        limit=limit,
        reverses=reverses,
        reason=reason,
    )
    return replace(entry, hash=entry_hash(entry))


def postings_of(book: Book, movements: Iterable[tuple[str, int]]) -> list[Posting]:
    """Write movements as postings with each account's balance after; zero amounts are left out."""
    after: dict[str, int] = {}
    postings: list[Posting] = []
    for account, posting_micro in movements:
        if not posting_micro:
            continue
        before_micro = after[account] if account in after else balance_micro(book, account)
        after[account] = before_micro + posting_micro
        postings.append(Posting(account, posting_micro, after[account]))
    invariant(sum(posting.posting_micro for posting in postings) == 0, "postings sum to zero")
    return postings


def evolve(books: Books, entry: Entry) -> Books:
    """Fold one entry into the book it belongs to, and into the bucket or hold it speaks of.

    Raises `InvariantBroken` when the entry does not follow from the books: a gap in `seq`, another
    predecessor's hash, time running back, a balance that is not the sum, a lot below zero.
    """
    programme = books.programme
    if programme is not None and entry.tenant_id == programme.tenant_id:
        return replace(books, programme=_with_entry(programme, entry))
    book = _with_entry(books.book, entry)
    bucket, hold = books.bucket, books.hold
    if entry.charge is not None:
        bucket = _with_charge(bucket, entry.charge, entry.postings)
        if hold is not None and hold.ended_by is None:
            # After the postings: for a moment a lot reserves more than is left of it, and what the
            # hold gives up now mends that.
            changes, drawn_micro = _drawn_under(hold, entry.charge, entry.postings)
            book = with_reservations(book, changes)
            hold = hold_after_charge(
                hold,
                drawn_micro,
                changes,
                order_of(book.lots),
                short_micro=entry.charge.short_micro or 0,
            )
    elif entry.hold is not None:
        before = () if hold is None else hold.reserved
        hold = hold_after(entry.hold, hold, entry.seq)
        freed = [(place, -micro) for place, micro in before]
        book = with_reservations(book, [*freed, *hold.reserved])
    elif entry.lot is not None:
        book = replace(book, lots=_with_change(book.lots, entry.lot))
    elif entry.limit is not None:
        book = replace(book, credit_limit_micro=entry.limit.credit_limit_micro)
    elif entry.kind in (SUSPENDED, RESUMED):
        book = replace(book, is_suspended=entry.kind == SUSPENDED)
    return Books(book, bucket, hold, programme)


class RebuiltBook(Struct, frozen=True):
    """Everything a book's entries say: what every projection must equal.

    A rebuild begins with the book as it was opened, and nothing else.
    """

    book: Book
    buckets: Mapping[BucketId, BookedBucket] = field(default_factory=dict)
    holds: Mapping[HoldId, Hold] = field(default_factory=dict)


def fold(before: RebuiltBook, entries: Iterable[Entry]) -> RebuiltBook:
    """Fold the entries that follow into a rebuild; a long book is read in pages."""
    book = before.book
    buckets = dict(before.buckets)
    holds = dict(before.holds)
    for entry in entries:
        charge, hold_id = entry.charge, hold_id_of(entry)
        books = evolve(
            Books(
                book=book,
                bucket=None if charge is None else buckets.get(charge.bucket_id),
                hold=None if hold_id is None else holds.get(hold_id),
            ),
            entry,
        )
        book = books.book
        if books.bucket is not None:
            buckets[books.bucket.bucket_id] = books.bucket
        if books.hold is not None:
            holds[books.hold.hold_id] = books.hold
    return RebuiltBook(book, buckets, holds)


def hold_id_of(entry: Entry) -> HoldId | None:
    """Return the hold that an entry moves: its own, or the one its charge runs under."""
    if entry.hold is not None:
        return entry.hold.hold_id
    return None if entry.charge is None else entry.charge.hold_id


def _with_entry(book: Book, entry: Entry) -> Book:
    """Append an entry to a book: its place in the chain first, then its postings."""
    invariant(entry.tenant_id == book.tenant_id, "an entry belongs to its book")
    invariant(entry.seq == book.seq + 1, "entries follow each other without a gap")
    invariant(entry.prev_hash == book.head_hash, "an entry names its predecessor's hash")
    invariant(entry.recorded_ms >= book.recorded_ms, "recorded_at never falls")
    return _with_postings(book, entry)


def _with_postings(book: Book, entry: Entry) -> Book:
    """Apply an entry's postings to the book's totals, lots and accounts."""
    charged_micro, funded_micro = book.charged_micro, book.funded_micro
    receivable_micro, invoiced_micro = book.receivable_micro, book.invoiced_micro
    unfunded_micro, breakage_micro = book.unfunded_micro, book.breakage_micro
    lots, accounts = book.lots, book.accounts
    for posting in entry.postings:
        # Each posting states the balance after it. Held against where the account stands, it shows
        # an entry that sums to zero and still does not belong here.
        account, change_micro = posting.account, posting.posting_micro
        before_micro = posting.balance_micro - change_micro
        match account:
            case "usage":
                invariant(before_micro == charged_micro, "usage moves from where it stood")
                charged_micro += change_micro
            case "receivable":
                invariant(before_micro == -receivable_micro, "receivable moves from its balance")
                receivable_micro -= change_micro
            case "unfunded":
                invariant(before_micro == -unfunded_micro, "unfunded moves from its balance")
                unfunded_micro -= change_micro
            case "breakage":
                invariant(before_micro == breakage_micro, "breakage moves from its balance")
                breakage_micro += change_micro
            case _ if account.startswith(LOT):
                lots = _with_lot(lots, posting, entry)
                # Only a charge makes a lot pay; a grant fills it, and an expiry empties it.
                funded_micro -= 0 if entry.charge is None else change_micro
            case _:
                invariant(before_micro == accounts.get(account, 0), "an account moves from there")
                accounts = {**accounts, account: posting.balance_micro}
                if account.startswith(INVOICED):
                    invoiced_micro -= change_micro
    paid_micro = funded_micro + receivable_micro + invoiced_micro + book.settled_micro
    invariant(charged_micro == paid_micro + unfunded_micro, "what is charged is paid or owed")
    return replace(
        book,
        seq=entry.seq,
        head_hash=entry.hash,
        recorded_ms=entry.recorded_ms,
        charged_micro=charged_micro,
        funded_micro=funded_micro,
        receivable_micro=receivable_micro,
        invoiced_micro=invoiced_micro,
        unfunded_micro=unfunded_micro,
        breakage_micro=breakage_micro,
        lots=lots,
        accounts=accounts,
    )


def _with_lot(lots: tuple[Lot, ...], posting: Posting, entry: Entry) -> tuple[Lot, ...]:
    """Move the remainder of one lot, or open the lot that a grant's entry describes."""
    granted = entry.grant
    if granted is not None:
        invariant(posting.balance_micro == granted.grant_micro, "a grant opens a lot of its own")
        return in_draw_order((*lots, _lot_of(granted)))
    changed: list[Lot] = []
    found = False
    for lot in lots:
        if lot.grant_id == posting.account[len(LOT) :]:
            found = lot.remaining_micro + posting.posting_micro == posting.balance_micro
            changed.append(_moved(lot, posting, entry.kind))
        else:
            changed.append(lot)
    invariant(found, "a lot moves from where it stood")
    return tuple(changed)


def _lot_of(granted: GrantDetail) -> Lot:
    return Lot(
        grant_id=granted.grant_id,
        programme_id=granted.programme_id,
        priority=granted.priority,
        effective_ms=granted.effective_ms,
        expires_ms=granted.expires_ms,
        granted_micro=granted.grant_micro,
        remaining_micro=granted.grant_micro,
        scope=granted.scope,
        coverage_bps=WHOLE_BPS if granted.coverage_bps is None else granted.coverage_bps,
    )


def _moved(lot: Lot, posting: Posting, kind: str) -> Lot:
    """Return a lot after a posting: what it moved against depends on the kind of entry."""
    granted_micro, expired_micro = lot.granted_micro, lot.expired_micro
    if kind in ("expiry", "expiry_reversed"):
        expired_micro -= posting.posting_micro
    elif kind == "reversal":
        granted_micro += posting.posting_micro
    invariant(expired_micro >= 0, "no more is taken back of a lot than expired")
    kept_micro = posting.balance_micro + expired_micro
    is_covered = posting.balance_micro >= 0 and kept_micro <= granted_micro
    invariant(is_covered, "a lot is never overdrawn")
    return replace(
        lot,
        granted_micro=granted_micro,
        remaining_micro=posting.balance_micro,
        expired_micro=expired_micro,
    )


def _with_change(lots: tuple[Lot, ...], change: LotDetail) -> tuple[Lot, ...]:
    """Change what a lot's balance does not say: when its window ends, what was reclaimed of it."""
    changed: list[Lot] = []
    for lot in lots:
        if lot.grant_id != change.grant_id:
            changed.append(lot)
        elif change.reclaimed_micro is None:
            changed.append(replace(lot, expires_ms=change.expires_ms))
        else:
            changed.append(replace(lot, reclaimed_micro=change.reclaimed_micro))
    # By its end a lot stands among the others.
    return in_draw_order(changed)


def with_reservations(book: Book, changes: Iterable[Draw]) -> Book:
    """Return the book with reservations of holds changed, on lots and on the limit, by so much.

    Raises `InvariantBroken` where what is taken back does not stand.
    """
    by_place: dict[str, int] = {}
    for place, change_micro in changes:
        by_place[place] = by_place.get(place, 0) + change_micro
    reserved_micro = book.reserved_micro + by_place.pop(LIMIT, 0)
    lots: list[Lot] = []
    for lot in book.lots:
        change_micro = by_place.pop(lot.account, 0)
        if change_micro:
            lot_reserved_micro = lot.reserved_micro + change_micro
            invariant(0 <= lot_reserved_micro <= lot.remaining_micro, "a lot reserves what it has")
            lots.append(replace(lot, reserved_micro=lot_reserved_micro))
        else:
            lots.append(lot)
    # What is left is on lots that are not loaded: it would be lost without a word.
    is_whole = not any(by_place.values())
    invariant(reserved_micro >= 0 and is_whole, "reservations are taken back where they stand")
    return replace(book, lots=tuple(lots), reserved_micro=reserved_micro)


def _drawn_under(
    hold: Hold, charge: ChargeDetail, postings: Iterable[Posting]
) -> tuple[list[Draw], int]:
    """Say by how much a charge changed its hold's reservations, and what it drew under it.

    Entries of release 1 do not say it. Then it follows: nothing came back to a hold, what a charge
    drew on lots and on the limit shrank it, and what was drawn past it was not counted.
    """
    if charge.reserved is not None:
        return list(charge.reserved), charge.charge_micro
    changes = shrink_hold(hold, draws_of(postings))
    return changes, -sum(micro for _, micro in changes)


def draws_of(postings: Iterable[Posting]) -> list[Draw]:
    """List what a charge drew on lots and on the limit. `unfunded` is no draw: nothing gives it."""
    return [
        (LIMIT if posting.account == "receivable" else posting.account, -posting.posting_micro)
        for posting in postings
        if posting.posting_micro < 0 and posting.account not in ("usage", "unfunded")
    ]


def _with_charge(
    bucket: BookedBucket | None, charge: ChargeDetail, postings: Iterable[Posting]
) -> BookedBucket:
    """Add a charge to what was booked of its bucket; returns leave an account's newest draws."""
    before = bucket or BookedBucket(bucket_id=charge.bucket_id, hour_ms=charge.hour_ms)
    draws = list(before.draws)
    for posting in postings:
        if posting.account == "usage":
            continue
        if posting.posting_micro > 0:
            draws = without_newest(draws, posting.account, posting.posting_micro)
        elif draws and draws[-1][0] == posting.account:
            # A bucket that grows on one lot keeps one draw of it, however often it was charged.
            draws[-1] = (posting.account, draws[-1][1] - posting.posting_micro)
        else:
            draws.append((posting.account, -posting.posting_micro))
    after = BookedBucket(
        bucket_id=before.bucket_id,
        hour_ms=before.hour_ms,
        revision=charge.revision,
        gpu_ns=before.gpu_ns + charge.gpu_ns,
        charged_micro=before.charged_micro + charge.charge_micro,
        refunded_micro=before.refunded_micro + (charge.refunded_micro or 0),
        draws=tuple(draws),
    )
    invariant(sum(micro for _, micro in draws) == after.charged_micro, "draws are the bucket's sum")
    return after


def without_newest(draws: Iterable[Draw], account: str, returned_micro: int) -> list[Draw]:
    """Take what an account gets back off its draws, the newest first."""
    left_micro = returned_micro
    kept: list[Draw] = []
    for place, drawn_micro in reversed(list(draws)):
        back_micro = min(left_micro, drawn_micro) if place == account else 0
        left_micro -= back_micro
        if drawn_micro > back_micro:
            kept.append((place, drawn_micro - back_micro))
    invariant(left_micro == 0, "credit returns to what drew it")
    kept.reverse()
    return kept
