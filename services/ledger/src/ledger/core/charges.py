"""Charges: what a bucket's stated total enters into a book. Pure, called by `decisions` alone.

**Charges are differences.** A charge message states the new total of a bucket: what it costs, and
what is refunded of that; what is charged is one less the other. What is newer than what was booked
(`is_newer`) is entered as the difference; anything else books nothing. An entry is made also when
only GPU time grew (a price of 0, or a fraction of a micro-unit) or only the revision rose: bills
count GPU time by the entries, and an old revision must not come back. Such an entry may have no
postings.

**Who pays.** The difference is drawn from the lots open in the bucket's hour that fit, in draw
order, each up to its share of the bucket's new total less what it paid before, taking what is free
or reserved by the charge's own hold; what no lot covers goes to `receivable` (commercial) or
`unfunded` (all others). Beyond the credit limit it is booked all the same, and flagged: usage is a
fact. What is drawn of a lot that has expired is taken back from breakage first, by an entry of its
own: nobody loses credit because a hub reported late.

**Who gets back.** A total that went down returns credit to what the bucket itself drew: first from
lots that now stand above their share of the new total, then newest first. What returns to a lot of
which all usage has been heard of expires again at once.

Refusals, in order of precedence: `RefundAboveTotal`, `TotalOutOfRange`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from msgspec import Struct
from msgspec.structs import replace

from hisab_contracts.charges import BucketTotal
from hisab_contracts.entries import ChargeDetail, Entry
from hisab_contracts.invariants import invariant
from hisab_contracts.units import MAX_MICRO
from ledger.core.book import (
    Book,
    BookedBucket,
    Books,
    draws_of,
    evolve,
    next_entry,
    postings_of,
    without_newest,
)
from ledger.core.expiry import expire_lot, take_back
from ledger.core.holds import LIMIT, Hold, grow_hold, shrink_hold
from ledger.core.lots import (
    WHOLE_BPS,
    Draw,
    Lot,
    UsageTerms,
    fitting_lots,
    in_draw_order,
    take_from_lots,
)


class RefundAboveTotal(Struct, frozen=True):
    """More is stated as refunded than the bucket costs."""

    refunded_micro: int


class TotalOutOfRange(Struct, frozen=True):
    """The book's total would pass 64 bits; nothing of the charge is entered."""

    charged_micro: int


ChargeRefusal = RefundAboveTotal | TotalOutOfRange
"""Why a stated total is not entered, in order of precedence."""


def charge(books: Books, total: BucketTotal, now_ms: int) -> tuple[Entry, ...] | ChargeRefusal:
    """Enter the difference between a bucket's stated total and what was booked of it."""
    if total.refunded_micro > total.total_micro:
        return RefundAboveTotal(total.refunded_micro)
    bucket = books.bucket or BookedBucket(bucket_id=total.bucket_id, hour_ms=total.hour_ms)
    if not is_newer(total, bucket):
        return ()
    difference_micro = _net_micro(total) - bucket.charged_micro
    if books.book.charged_micro + difference_micro > MAX_MICRO:
        return TotalOutOfRange(books.book.charged_micro)
    if difference_micro >= 0:
        return _draw(books, bucket, total, now_ms)
    return _return(books, bucket, total, now_ms)


def is_newer(total: BucketTotal, bucket: BookedBucket) -> bool:
    """Say whether a stated total is newer than what was booked.

    A higher revision is. Within one revision what is stated only grows, so what grew is.
    """
    if total.revision != bucket.revision:
        return total.revision > bucket.revision
    # A smaller total of the same revision is an old message that comes late, never a correction.
    stated = total.total_gpu_ns, total.total_micro, total.refunded_micro
    booked = bucket.gpu_ns, bucket.charged_micro + bucket.refunded_micro, bucket.refunded_micro
    return stated != booked and all(
        now >= before for now, before in zip(stated, booked, strict=True)
    )


def may_return_credit(total: BucketTotal, bucket: BookedBucket | None) -> bool:
    """Say whether a total may give credit back to lots that have nothing left.

    Only a correction or a refund does, so the spent lots of a book need not be loaded for any
    other.
    """
    # Not needed either where a batch first books a bucket and then corrects it: that bucket drew on
    # lots that were loaded because they had something left.
    return bucket is not None and (
        total.revision > bucket.revision or total.refunded_micro > bucket.refunded_micro
    )


def terms_of(total: BucketTotal) -> UsageTerms:
    """Return what a bucket's usage is, as far as the scope of a lot asks."""
    return UsageTerms(
        hub=total.hub,
        sku=total.sku,
        project_id=total.project_id,
        price_class=total.price_class,
    )


def _net_micro(total: BucketTotal) -> int:
    return total.total_micro - total.refunded_micro


def _draw(books: Books, bucket: BookedBucket, total: BucketTotal, now_ms: int) -> tuple[Entry, ...]:
    """Enter a total that did not fall: who pays the difference."""
    book, hold = books.book, _open(books.hold)
    own = {} if hold is None else dict(hold.reserved)
    wanted_micro = _net_micro(total) - bucket.charged_micro
    lots = fitting_lots(book.lots, total.hour_ms, terms_of(total)) if wanted_micro else []
    draws, overage_micro = take_from_lots(
        lots,
        wanted_micro,
        total_micro=_net_micro(total),
        own=own,
        given=bucket.drawn_from(),
        taking_back=True,
    )
    taken_back: list[Entry] = []
    if any(lot.returnable_micro for lot in lots):
        taken_back, book = _take_back(book, lots, dict(draws), own, now_ms)
    if overage_micro:
        draws.append(("receivable" if book.kind == "commercial" else "unfunded", overage_micro))
    entry = _charge_entry(book, bucket, total, draws, hold, now_ms)
    return (*taken_back, entry)


def _take_back(
    book: Book, lots: Sequence[Lot], draws: dict[str, int], own: dict[str, int], now_ms: int
) -> tuple[list[Entry], Book]:
    """Take back what is drawn of lots beyond what is left of them; return the book after it."""
    entries: list[Entry] = []
    for lot in lots:
        left_micro = lot.free_micro + own.get(lot.account, 0)
        expired_micro = draws.get(lot.account, 0) - left_micro
        if expired_micro > 0:
            entry = take_back(book, lot, expired_micro, now_ms)
            book = evolve(Books(book), entry).book
            entries.append(entry)
    return entries, book


def _return(
    books: Books, bucket: BookedBucket, total: BucketTotal, now_ms: int
) -> tuple[Entry, ...]:
    """Enter a total that fell: who gets the difference back, and what of it expires again."""
    book, hold = books.book, _open(books.hold)
    pieces = _returns(book, bucket, _net_micro(total))
    expiring = [
        lot.account
        for lot in in_draw_order(book.lots)
        # What is left of it, if anything, expires in its own time (`expiry`), and this with it.
        if lot.is_closed_for_good(books.complete_until_ms) and not lot.remaining_micro
    ]
    lost = ("unfunded", *expiring)
    entry = _charge_entry(book, bucket, total, pieces, hold, now_ms, lost=lost)
    entries = [entry]
    returned = [account for account in expiring if account in dict(pieces)]
    if returned:
        book = evolve(replace(books, bucket=bucket, hold=hold, due=None), entry).book
    for account in returned:
        expiry = expire_lot(book, account, now_ms)
        book = evolve(Books(book), expiry).book
        entries.append(expiry)
    return tuple(entries)


def _returns(book: Book, bucket: BookedBucket, net_micro: int) -> list[Draw]:
    """Say what goes back where, piece by piece: excess over shares first, then newest first.

    A lot that was drawn on twice may come twice: what was drawn between returns between.
    """
    left_micro = bucket.charged_micro - net_micro
    drawn = bucket.drawn_from()
    pieces: list[Draw] = []
    # Of a lot that pays all of a bucket no more could stay than of its total: newest first does it.
    subsidies = {lot.account: lot for lot in book.lots if lot.coverage_bps < WHOLE_BPS}
    draws = list(bucket.draws)
    for account in dict.fromkeys(account for account, _ in reversed(bucket.draws)):
        if account in subsidies:
            share_micro = subsidies[account].share_micro(net_micro)
            excess_micro = min(left_micro, max(0, drawn[account] - share_micro))
            draws = without_newest(draws, account, excess_micro)
            pieces.append((account, excess_micro))
            left_micro -= excess_micro
    for account, draw_micro in reversed(draws):
        back_micro = min(left_micro, draw_micro)
        pieces.append((account, back_micro))
        left_micro -= back_micro
    return [(account, micro) for account, micro in pieces if micro]


def _charge_entry(
    book: Book,
    bucket: BookedBucket,
    total: BucketTotal,
    draws: Sequence[Draw],
    hold: Hold | None,
    now_ms: int,
    *,
    lost: Collection[str] = (),
) -> Entry:
    """Make the entry of a charge: of what is drawn, or of what returns where the total fell.

    What returns to a `lost` place can be reserved by nobody.
    """
    difference_micro = _net_micro(total) - bucket.charged_micro
    sign = 1 if difference_micro < 0 else -1
    movements: dict[str, int] = {"usage": difference_micro}
    for account, micro in draws:
        movements[account] = movements.get(account, 0) + sign * micro
    invariant(sum(movements.values()) == 0, "draws and overage are the charge")
    postings = postings_of(book, movements.items())
    # Receivable is the last to be drawn, so an overage is the last posting. It is flagged, never
    # refused: usage that happened is a fact, whatever the limit says.
    over_limit = (
        difference_micro > 0
        and postings[-1].account == "receivable"
        and book.invoiced_micro - postings[-1].balance_micro > book.credit_limit_micro
    )
    changes: list[Draw] | None = None
    short_micro = 0
    if hold is not None and difference_micro >= 0:
        changes = shrink_hold(hold, draws_of(postings))
    elif hold is not None:
        places = [(LIMIT if to == "receivable" else to, micro) for to, micro in draws]
        changes, short_micro = grow_hold(hold, places, lost)
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
        refunded_micro=(total.refunded_micro - bucket.refunded_micro) or None,
        reserved=None if changes is None else tuple(changes),
        short_micro=short_micro or None,
    )
    return next_entry(
        book,
        "charge",
        now_ms,
        effective_ms=total.hour_ms,
        postings=postings,
        caused_by=f"bucket:{total.bucket_id}",
        actor="metering",
        charge=detail,
    )


def _open(hold: Hold | None) -> Hold | None:
    """Return a hold that stands; one that has ended reserves nothing and is nobody's."""
    return None if hold is None or hold.ended_by is not None else hold
