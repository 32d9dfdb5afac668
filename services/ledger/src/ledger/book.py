"""The book: what was entered, and its state as a fold. Pure: values in, values out.

A book is one tenant's (or one programme's) stream of entries, numbered from 1 without gaps and
chained by hash. Its state is a fold: `evolve(page, entry) -> page`. A `Page` is the book opened at
the one bucket and the one hold that an entry can touch; whoever loads them passes them in, so a
book with a million buckets is as quick as a small one. What is entered next is decided from the
same state in `decisions`.

Balances are the tenant's view and sum to zero over a book: `usage` and `lot:*` are >= 0;
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

from msgspec import Struct
from msgspec.structs import replace

from hisab_contracts.entries import GENESIS_HASH, ChargeDetail, Entry, GrantDetail, Posting
from hisab_contracts.ids import BucketId, HoldId, TenantId
from hisab_contracts.reference import TenantKind
from ledger.grants import LOT, Draw, Lot, in_draw_order
from ledger.holds import LIMIT, Hold, held, shrink

INVOICED: Final = "invoiced:"
PROGRAMME_BOOK: Final = "/programmes/"
"""Begins the id of a programme's book. No tenant's id has a slash, so none can be meant."""

BookKind = TenantKind | Literal["fund"]

_NO_ACCOUNTS: Final[Mapping[str, int]] = MappingProxyType({})


class Book(Struct, frozen=True):
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
    """All lots, or for charges those with anything left and those the bucket drew on."""
    accounts: Mapping[str, int] = _NO_ACCOUNTS
    """Balances of all other accounts (funding, invoiced, a programme's); charges need none."""

    @property
    def headroom_micro(self) -> int:
        """What is left of the credit limit, unreserved; negative when usage went beyond it."""
        owed_micro = self.receivable_micro + self.invoiced_micro
        return self.credit_limit_micro - owed_micro - self.reserved_micro


class Bucket(Struct, frozen=True):
    """What has been booked of one bucket, and which accounts paid, oldest draw first."""

    bucket_id: BucketId
    hour_ms: int
    revision: int = 0
    gpu_ns: int = 0
    charged_micro: int = 0
    draws: tuple[Draw, ...] = ()


class Page(Struct, frozen=True):
    """A book opened at one bucket and one hold: all that one entry can change."""

    book: Book
    bucket: Bucket | None = None
    hold: Hold | None = None


def available_micro(book: Book, now_ms: int) -> int:
    """What a hold placed now could reserve (INTERFACE section 7, row 12).

    The unreserved remainder of the lots open now, and what is left of the credit limit.
    """
    return sum(lot.free_micro for lot in book.lots if lot.is_open(now_ms)) + book.headroom_micro


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


def evolve(page: Page, entry: Entry) -> Page:
    """Fold one entry into the page it belongs to.

    Raises `InvariantBroken` when the entry does not follow from the page: a gap in `seq`, another
    predecessor's hash, time running back, a balance that is not the sum, a lot below zero.
    """
    book = page.book
    invariant(entry.seq == book.seq + 1, "entries follow each other without a gap")
    invariant(entry.prev_hash == book.head_hash, "an entry names its predecessor's hash")
    invariant(entry.recorded_ms >= book.recorded_ms, "recorded_at never falls")
    book = _with_postings(book, entry)
    bucket, hold = page.bucket, page.hold
    if entry.charge is not None:
        bucket = _with_charge(bucket, entry.charge, entry.postings)
        if hold is not None and hold.end is None:
            hold, given_up = shrink(hold, _drawn(entry.postings))
            book = _with_reservations(book, given_up, sign=-1)
    elif entry.hold is not None:
        hold = held(entry.hold)
        book = _with_reservations(book, entry.hold.reserved, sign=1 if hold.end is None else -1)
    return Page(book, bucket, hold)


class Folded(Struct, frozen=True):
    """Everything a book's entries say: what every projection must equal."""

    book: Book
    buckets: Mapping[BucketId, Bucket]
    holds: Mapping[HoldId, Hold]


def fold(opening: Book, entries: Iterable[Entry]) -> Folded:
    """Rebuild a book, its buckets and its holds from its entries, first to last."""
    return fold_on(Folded(opening, {}, {}), entries)


def fold_on(before: Folded, entries: Iterable[Entry]) -> Folded:
    """Go on with a rebuild: a long book is read in pages."""
    book = before.book
    buckets = dict(before.buckets)
    holds = dict(before.holds)
    for entry in entries:
        charge, hold_id = entry.charge, None
        if entry.hold is not None:
            hold_id = entry.hold.hold_id
        elif charge is not None:
            hold_id = charge.hold_id
        page = Page(
            book,
            None if charge is None else buckets.get(charge.bucket_id),
            None if hold_id is None else holds.get(hold_id),
        )
        page = evolve(page, entry)
        book = page.book
        if page.bucket is not None:
            buckets[page.bucket.bucket_id] = page.bucket
        if page.hold is not None:
            holds[page.hold.hold_id] = page.hold
    return Folded(book, buckets, holds)


class InvariantBroken(Exception):
    """A defect of ours: the state contradicts itself. Nothing may be committed."""


def invariant(holds: bool, what: str) -> None:  # noqa: FBT001
    """Raise unless a fact that must always be true is true (also under `python -O`)."""
    if not holds:
        raise InvariantBroken(what)


def _with_postings(book: Book, entry: Entry) -> Book:
    """Apply an entry's postings to the book's totals, lots and accounts."""
    charged_micro, funded_micro = book.charged_micro, book.funded_micro
    receivable_micro, invoiced_micro = book.receivable_micro, book.invoiced_micro
    unfunded_micro = book.unfunded_micro
    lots, accounts = book.lots, book.accounts
    for posting in entry.postings:
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


def _with_reservations(book: Book, places: Iterable[Draw], *, sign: Literal[1, -1]) -> Book:
    """Add or take back reservations of a hold on lots and on the limit."""
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
    invariant(reserved_micro >= 0 and not changes, "reservations are taken back where they stand")
    return replace(book, lots=tuple(lots), reserved_micro=reserved_micro)


def _drawn(postings: Iterable[Posting]) -> list[Draw]:
    """List what a charge drew on lots and on the limit. `unfunded` is no draw: nothing gives it."""
    return [
        (LIMIT if posting.account == "receivable" else posting.account, -posting.posting_micro)
        for posting in postings
        if posting.posting_micro < 0 and posting.account not in ("usage", "unfunded")
    ]


def _with_charge(
    bucket: Bucket | None, charge: ChargeDetail, postings: Iterable[Posting]
) -> Bucket:
    """Add a charge to what was booked of its bucket; what it gave back leaves the newest draws."""
    before = bucket or Bucket(charge.bucket_id, charge.hour_ms)
    draws = list(before.draws)
    for posting in postings:
        if posting.account == "usage":
            continue
        drawn_micro = -posting.posting_micro
        if drawn_micro < 0 or (draws and draws[-1][0] == posting.account):
            account, last_micro = draws.pop()
            invariant(account == posting.account, "credit returns to the newest draw")
            drawn_micro += last_micro
        if drawn_micro:
            draws.append((posting.account, drawn_micro))
    after = Bucket(
        bucket_id=before.bucket_id,
        hour_ms=before.hour_ms,
        revision=charge.revision,
        gpu_ns=before.gpu_ns + charge.gpu_ns,
        charged_micro=before.charged_micro + charge.charge_micro,
        draws=tuple(draws),
    )
    invariant(sum(micro for _, micro in draws) == after.charged_micro, "draws are the bucket's sum")
    return after
