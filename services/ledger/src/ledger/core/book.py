"""The book: what was entered, and its state as a fold. Pure: values in, values out.

A book is one tenant's (or one programme's) stream of entries, numbered from 1 without gaps and
chained by hash. Its state is a fold: `evolve(books, entry) -> books`. `Books` is all that one
command can touch: a book opened at one bucket and one hold, and for an approval the programme's
book too. Whoever loads them passes them in, so a book with a million buckets is as quick as a small
one. What is entered next is decided from the same state in `decisions`.

**Lots.** An approved grant is one `Lot`. There is one total order in which lots pay, reserve and
are listed (`draw_order`): priority, then expiry (none is last), then effective instant, then grant
id. It depends on the terms alone, so the order in which lots were loaded cannot change who pays.
One waterfall (`take_from_lots`) serves holds and charges alike: what is free of each open lot, and
what the taker itself has reserved there.

**Signs.** Balances are the tenant's view and sum to zero over a book: `usage` and `lot:*` are >= 0;
`funding:*`, `receivable`, `invoiced:*`, `settled`, `unfunded` are <= 0 and shown positive. In a
programme's book: `authority` <= 0, `budget` and `granted:*` >= 0.

A charge under an open hold shrinks the hold's reservations by what it drew on lots and on the
credit limit, so drawing leaves `available_micro` as it was. What goes to `unfunded` draws on
nothing and shrinks nothing.

There are no refusals here: an entry that does not follow from the state raises `InvariantBroken`,
because then the stored past contradicts itself and nothing may be built on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, Literal

from msgspec import Struct, field
from msgspec.structs import replace

from hisab_contracts.charges import BucketTotal
from hisab_contracts.entries import (
    GENESIS_HASH,
    ChargeDetail,
    Entry,
    GrantDetail,
    HoldDetail,
    Posting,
    entry_hash,
)
from hisab_contracts.ids import BucketId, GrantId, HoldId, ProgrammeId, TenantId, entry_id
from hisab_contracts.invariants import invariant
from hisab_contracts.reference import TenantKind
from ledger.core.holds import LIMIT, Draw, Hold, HoldState, hold_after, shrink_hold

LOT: Final = "lot:"
"""Begins the account of a lot: `lot:<grant id>`."""
INVOICED: Final = "invoiced:"
PROGRAMME_BOOK: Final = "/programmes/"
"""Begins the id of a programme's book. No tenant's id has a slash, so none can be meant."""

BookKind = TenantKind | Literal["fund"]

# One mapping serves as the default of every book, so nobody may be able to write into it.
_NO_ACCOUNTS: Final[Mapping[str, int]] = MappingProxyType({})


class Lot(Struct, frozen=True):
    """What is left of one grant. `0 <= reserved_micro <= remaining_micro <= granted_micro`."""

    grant_id: GrantId
    programme_id: ProgrammeId
    priority: int
    """Lower pays first."""
    effective_ms: int
    expires_ms: int | None
    """None: never."""
    granted_micro: int
    remaining_micro: int
    reserved_micro: int = 0
    """What open holds have reserved of the remainder: nobody else can take it."""

    @property
    def account(self) -> str:
        """Its account in the tenant's book."""
        return LOT + self.grant_id

    @property
    def free_micro(self) -> int:
        """What no hold has reserved."""
        return self.remaining_micro - self.reserved_micro

    def is_open(self, instant_ms: int) -> bool:
        """Say whether usage at this instant may draw on it: effective <= instant < expires."""
        if instant_ms < self.effective_ms:
            return False
        return self.expires_ms is None or instant_ms < self.expires_ms


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
    draws: tuple[Draw, ...] = ()


class DueHolds(Struct, frozen=True):
    """Open holds of a book whose time has come, though no entry says so yet (`expiry`)."""

    holds: tuple[Hold, ...]
    """In the order in which their time came."""
    book: Book
    """The book as it stands now: what they still reserve is free."""


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
        case _ if account.startswith(LOT):
            return next(
                (lot.remaining_micro for lot in book.lots if account[4:] == lot.grant_id), 0
            )
        case _:
            return book.accounts.get(account, 0)


def is_newer(total: BucketTotal, bucket: BookedBucket) -> bool:
    """Say whether a stated total is newer than what was booked.

    A higher revision is. Within one revision totals only grow, so the greater one is.
    """
    if total.revision != bucket.revision:
        return total.revision > bucket.revision
    # A smaller total of the same revision is an old message that comes late, never a correction.
    if total.total_gpu_ns == bucket.gpu_ns:
        return total.total_micro > bucket.charged_micro
    return total.total_gpu_ns > bucket.gpu_ns and total.total_micro >= bucket.charged_micro


def may_return_credit(total: BucketTotal, bucket: BookedBucket | None) -> bool:
    """Say whether a total may give credit back to lots that have nothing left.

    Only a correction lowers a total, so the spent lots of a book need not be loaded for any other.
    """
    # Not needed either where a batch first books a bucket and then corrects it: that bucket drew on
    # lots that were loaded because they had something left.
    return bucket is not None and total.revision > bucket.revision


def draw_order(lot: Lot) -> tuple[int, bool, int, int, str]:
    """Sort key of the one order in which lots pay: priority, expiry, effective, grant id."""
    never = lot.expires_ms is None
    return (lot.priority, never, lot.expires_ms or 0, lot.effective_ms, lot.grant_id)


def in_draw_order(lots: Iterable[Lot]) -> tuple[Lot, ...]:
    """Sort lots into the order in which they pay."""
    return tuple(sorted(lots, key=draw_order))


def open_lots(lots: Iterable[Lot], instant_ms: int) -> list[Lot]:
    """Return the lots open at an instant, in draw order, whatever order they came in."""
    found = [lot for lot in lots if lot.is_open(instant_ms)]
    if len(found) > 1:
        # Sorted here although stores sort too: who pays must not hang on how lots were loaded.
        found.sort(key=draw_order)
    return found


def take_from_lots(
    lots: Iterable[Lot], instant_ms: int, wanted_micro: int, own: Mapping[str, int]
) -> tuple[list[Draw], int]:
    """Say what each lot open at an instant gives towards an amount, and what none gives.

    `own` maps accounts to what the taker itself has reserved there: open to it, and to nobody else.
    Conserves: what is taken and what is left add up to what was wanted.
    """
    left_micro = wanted_micro
    taken: list[Draw] = []
    for lot in open_lots(lots, instant_ms):
        if not left_micro:
            break
        given_micro = min(left_micro, lot.free_micro + own.get(lot.account, 0))
        if given_micro:
            taken.append((lot.account, given_micro))
            left_micro -= given_micro
    return taken, left_micro


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
            hold, given_up = shrink_hold(hold, _draws_of(entry.postings))
            book = with_reservations(book, given_up, sign=-1)
    elif entry.hold is not None:
        hold = hold_after(entry.hold)
        sign: Literal[1, -1] = 1 if hold.ended_by is None else -1
        book = with_reservations(book, entry.hold.reserved, sign=sign)
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
    unfunded_micro = book.unfunded_micro
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
            case _ if account.startswith(LOT):
                lots = _with_lot(lots, posting, entry.grant)
                # Only a charge makes a lot pay; a grant's posting fills it.
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
        lots=lots,
        accounts=accounts,
    )


def _with_lot(
    lots: tuple[Lot, ...], posting: Posting, granted: GrantDetail | None
) -> tuple[Lot, ...]:
    """Move the remainder of one lot, or open the lot that a grant's entry describes."""
    if granted is not None:
        invariant(posting.balance_micro == granted.grant_micro, "a grant opens a lot of its own")
        lot = Lot(
            grant_id=granted.grant_id,
            programme_id=granted.programme_id,
            priority=granted.priority,
            effective_ms=granted.effective_ms,
            expires_ms=granted.expires_ms,
            granted_micro=granted.grant_micro,
            remaining_micro=granted.grant_micro,
        )
        return in_draw_order((*lots, lot))
    changed: list[Lot] = []
    found = False
    for lot in lots:
        if lot.grant_id == posting.account[len(LOT) :]:
            found = lot.remaining_micro + posting.posting_micro == posting.balance_micro
            invariant(0 <= posting.balance_micro <= lot.granted_micro, "a lot is never overdrawn")
            changed.append(replace(lot, remaining_micro=posting.balance_micro))
        else:
            changed.append(lot)
    invariant(found, "a lot moves from where it stood")
    return tuple(changed)


def with_reservations(book: Book, places: Iterable[Draw], *, sign: Literal[1, -1]) -> Book:
    """Return the book with reservations of holds added, or taken back: on lots and on the limit.

    Raises `InvariantBroken` where what is taken back does not stand.
    """
    changes = {place: sign * micro for place, micro in places}
    reserved_micro = book.reserved_micro + changes.pop(LIMIT, 0)
    lots: list[Lot] = []
    for lot in book.lots:
        change_micro = changes.pop(lot.account, 0)
        if change_micro:
            lot_reserved_micro = lot.reserved_micro + change_micro
            invariant(0 <= lot_reserved_micro <= lot.remaining_micro, "a lot reserves what it has")
            lots.append(replace(lot, reserved_micro=lot_reserved_micro))
        else:
            lots.append(lot)
    # What is left in `changes` is on lots that are not loaded: it would be lost without a word.
    invariant(reserved_micro >= 0 and not changes, "reservations are taken back where they stand")
    return replace(book, lots=tuple(lots), reserved_micro=reserved_micro)


def _draws_of(postings: Iterable[Posting]) -> list[Draw]:
    """List what a charge drew on lots and on the limit. `unfunded` is no draw: nothing gives it."""
    return [
        (LIMIT if posting.account == "receivable" else posting.account, -posting.posting_micro)
        for posting in postings
        if posting.posting_micro < 0 and posting.account not in ("usage", "unfunded")
    ]


def _with_charge(
    bucket: BookedBucket | None, charge: ChargeDetail, postings: Iterable[Posting]
) -> BookedBucket:
    """Add a charge to what was booked of its bucket; what it gave back leaves the newest draws."""
    before = bucket or BookedBucket(bucket_id=charge.bucket_id, hour_ms=charge.hour_ms)
    draws = list(before.draws)
    for posting in postings:
        if posting.account == "usage":
            continue
        # A bucket that grows on one lot keeps one draw of it, however often it was charged. What
        # comes back is posted newest draw first, so it always meets the last of the list.
        drawn_micro = -posting.posting_micro
        if drawn_micro < 0 or (draws and draws[-1][0] == posting.account):
            account, last_micro = draws.pop()
            invariant(account == posting.account, "credit returns to the newest draw")
            drawn_micro += last_micro
        if drawn_micro:
            draws.append((posting.account, drawn_micro))
    after = BookedBucket(
        bucket_id=before.bucket_id,
        hour_ms=before.hour_ms,
        revision=charge.revision,
        gpu_ns=before.gpu_ns + charge.gpu_ns,
        charged_micro=before.charged_micro + charge.charge_micro,
        draws=tuple(draws),
    )
    invariant(sum(micro for _, micro in draws) == after.charged_micro, "draws are the bucket's sum")
    return after
