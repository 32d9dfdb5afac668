"""Decisions: what a command enters into a book, or why it is refused. Pure, time is an argument.

`decide(page, command, now_ms) -> entries | refusal` never looks anything up: the page holds the
book, and the one bucket and the one hold that the command speaks of (see `book`).

**Charges are differences.** A charge message states the new total of a bucket. What is newer than
what was booked (`is_newer`) is entered as the difference; anything else books nothing. An entry is
made also when only GPU time grew (a price of 0, or a fraction of a micro-unit) or only the revision
rose: bills count GPU time by the entries, and an old revision must not come back. Such an entry may
have no postings.

**Who pays.** The difference is drawn from the lots open in the bucket's hour, in draw order, taking
what is free or reserved by the charge's own hold; what no lot covers goes to `receivable`
(commercial) or `unfunded` (all others). Beyond the credit limit it is booked all the same, and
flagged: usage is a fact. A total that went down returns credit to what the bucket itself drew,
newest first.

Refusals, in order of precedence. Charge: `OutOfRange`. Hold placed: `HoldOver`,
`InsufficientCredit`. Hold released: `HoldClosed`. Invoiced: `AlreadyInvoiced`, `NotReceivable`.
Budget committed: `BudgetExceeded`. A grant is refused before it comes here (`grants.approve`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import assert_never

from msgspec import Struct
from msgspec.structs import replace

from hisab_contracts.charges import BucketTotal
from hisab_contracts.entries import (
    ChargeDetail,
    Entry,
    GrantDetail,
    HoldDetail,
    Posting,
    entry_hash,
)
from hisab_contracts.ids import AllocationId, DocumentId, HoldId, entry_id
from hisab_contracts.units import MAX_MICRO
from ledger.book import (
    INVOICED,
    PROGRAMME_BOOK,
    Book,
    Bucket,
    InvariantBroken,
    Page,
    available_micro,
    balance_micro,
    invariant,
)
from ledger.grants import LOT, BudgetExceeded, Draw, Grant, take_from_lots, within_budget
from ledger.holds import (
    LIMIT,
    Hold,
    HoldClosed,
    HoldEnd,
    HoldOver,
    InsufficientCredit,
    detail_of,
)


class GrantCredit(Struct, frozen=True):
    """Enter an approved grant as a lot of the tenant's book."""

    grant: Grant
    actor: str


class SetBudget(Struct, frozen=True):
    """Open a programme's book with its budget."""

    budget_micro: int
    actor: str


class CommitBudget(Struct, frozen=True):
    """Move budget of a programme to a tenant: the other half of a grant's approval."""

    grant: Grant
    actor: str


class PlaceHold(Struct, frozen=True):
    """Reserve an amount for a job that wants to start."""

    hold_id: HoldId
    hold_micro: int
    allocation_id: AllocationId | None
    expires_ms: int
    actor: str


class ReleaseHold(Struct, frozen=True):
    """End the page's hold."""

    end: HoldEnd
    caused_by: str
    actor: str


class RecordInvoiced(Struct, frozen=True):
    """A finalised document bills this much of what is receivable."""

    document_id: DocumentId
    invoiced_micro: int
    actor: str


Command = (
    BucketTotal | PlaceHold | ReleaseHold | GrantCredit | RecordInvoiced | SetBudget | CommitBudget
)
"""The closed union of what a book can be asked."""


class OutOfRange(Struct, frozen=True):
    """The book's total would pass 64 bits; nothing of the charge is entered."""

    charged_micro: int


class AlreadyInvoiced(Struct, frozen=True):
    """The book has entered this document under another command."""

    invoiced_micro: int


class NotReceivable(Struct, frozen=True):
    """More would be invoiced than is receivable."""

    receivable_micro: int


Refusal = (
    OutOfRange
    | HoldOver
    | InsufficientCredit
    | HoldClosed
    | AlreadyInvoiced
    | NotReceivable
    | BudgetExceeded
)
"""The closed union of why a command is refused; precedence stands in the module's docstring."""


def decide(page: Page, command: Command, now_ms: int) -> tuple[Entry, ...] | Refusal:
    """Decide a command: the entries it makes, in order, or why it is refused.

    No entries: there is nothing to book (a total not newer than the booked one). Conserves: every
    entry's postings sum to zero.
    """
    match command:
        case BucketTotal():
            return _charge(page, command, now_ms)
        case PlaceHold():
            return _place_hold(page.book, command, now_ms)
        case ReleaseHold():
            return _release_hold(page, command, now_ms)
        case GrantCredit():
            return _grant_credit(page.book, command, now_ms)
        case RecordInvoiced():
            return _record_invoiced(page.book, command, now_ms)
        case SetBudget():
            return _set_budget(page.book, command, now_ms)
        case CommitBudget():
            return _commit_budget(page.book, command, now_ms)
        case _:
            assert_never(command)


def is_newer(total: BucketTotal, bucket: Bucket) -> bool:
    """Say whether a stated total is newer than what was booked.

    A higher revision is. Within one revision totals only grow, so the greater one is.
    """
    if total.revision != bucket.revision:
        return total.revision > bucket.revision
    if total.total_gpu_ns == bucket.gpu_ns:
        return total.total_micro > bucket.charged_micro
    return total.total_gpu_ns > bucket.gpu_ns and total.total_micro >= bucket.charged_micro


def _charge(page: Page, total: BucketTotal, now_ms: int) -> tuple[Entry, ...] | OutOfRange:
    """Enter the difference between a bucket's stated total and what was booked of it."""
    book = page.book
    bucket = page.bucket or Bucket(total.bucket_id, total.hour_ms)
    if not is_newer(total, bucket):
        return ()
    difference_micro = total.total_micro - bucket.charged_micro
    if book.charged_micro + difference_micro > MAX_MICRO:
        return OutOfRange(book.charged_micro)
    if difference_micro >= 0:
        draws = _draws(book, page.hold, total.hour_ms, difference_micro)
    else:
        draws = _returns(bucket, -difference_micro)
    drawn_micro = sum(micro for _, micro in draws)
    invariant(drawn_micro == difference_micro, "draws and overage are the charge")
    movements = [(account, -micro) for account, micro in draws]
    if difference_micro:
        movements.insert(0, ("usage", difference_micro))
    postings = _postings(book, movements)
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
        _entry(
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


def _returns(bucket: Bucket, returned_micro: int) -> list[Draw]:
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


def _place_hold(book: Book, command: PlaceHold, now_ms: int) -> tuple[Entry, ...] | Refusal:
    """Reserve on lots open now in draw order, then on the credit limit; all of it or nothing."""
    if command.expires_ms <= now_ms:
        return HoldOver(command.expires_ms)
    available = available_micro(book, now_ms)
    if command.hold_micro > available:
        return InsufficientCredit(available, command.hold_micro - available)
    reserved, limit_micro = take_from_lots(book.lots, now_ms, command.hold_micro, {})
    if limit_micro:
        reserved.append((LIMIT, limit_micro))
    detail = HoldDetail(
        hold_id=command.hold_id,
        hold_micro=command.hold_micro,
        open_micro=command.hold_micro,
        reserved=reserved,
        cause="placed",
        allocation_id=command.allocation_id,
        expires_ms=command.expires_ms,
    )
    caused_by = f"hold:{command.hold_id}"
    return (
        _entry(book, "hold_placed", now_ms, caused_by=caused_by, actor=command.actor, hold=detail),
    )


def _release_hold(page: Page, command: ReleaseHold, now_ms: int) -> tuple[Entry, ...] | Refusal:
    """End a hold: what it still reserves is free again."""
    hold = page.hold
    if hold is None:
        raise InvariantBroken("a release names a hold of this book")
    if hold.end is not None:
        return HoldClosed(hold.end)
    return (
        _entry(
            page.book,
            "hold_released",
            now_ms,
            caused_by=command.caused_by,
            actor=command.actor,
            hold=detail_of(hold, command.end),
        ),
    )


def accounts_of(grant: Grant) -> tuple[str, str, str]:
    """Name what approving a grant moves: funding of the tenant; budget, granted of the fund."""
    return f"funding:{grant.programme_id}", "budget", f"granted:{grant.tenant_id}"


def _grant_credit(book: Book, command: GrantCredit, now_ms: int) -> tuple[Entry, ...]:
    """Enter a grant: funding falls, a lot appears."""
    grant = command.grant
    funding, _, _ = accounts_of(grant)
    movements = [(funding, -grant.grant_micro), (LOT + grant.grant_id, grant.grant_micro)]
    detail = GrantDetail(
        grant_id=grant.grant_id,
        programme_id=grant.programme_id,
        grant_micro=grant.grant_micro,
        priority=grant.priority,
        effective_ms=grant.effective_ms,
        expires_ms=grant.expires_ms,
    )
    return (
        _entry(
            book,
            "grant",
            now_ms,
            effective_ms=grant.effective_ms,
            postings=_postings(book, movements),
            caused_by=f"grant:{grant.grant_id}",
            actor=command.actor,
            grant=detail,
        ),
    )


def _record_invoiced(
    book: Book, command: RecordInvoiced, now_ms: int
) -> tuple[Entry, ...] | Refusal:
    """Move what a finalised document bills from receivable to the document's own account."""
    account = INVOICED + command.document_id
    if account in book.accounts:
        return AlreadyInvoiced(-book.accounts[account])
    if command.invoiced_micro > book.receivable_micro:
        return NotReceivable(book.receivable_micro)
    movements = [("receivable", command.invoiced_micro), (account, -command.invoiced_micro)]
    return (
        _entry(
            book,
            "invoiced",
            now_ms,
            postings=_postings(book, movements),
            caused_by=f"document:{command.document_id}",
            actor=command.actor,
        ),
    )


def _set_budget(book: Book, command: SetBudget, now_ms: int) -> tuple[Entry, ...]:
    """Open a programme: what it may promise is its authority's to give."""
    movements = [("authority", -command.budget_micro), ("budget", command.budget_micro)]
    postings = _postings(book, movements)
    caused_by = f"programme:{book.tenant_id.removeprefix(PROGRAMME_BOOK)}"
    return (
        _entry(
            book, "budget_set", now_ms, postings=postings, caused_by=caused_by, actor=command.actor
        ),
    )


def _commit_budget(book: Book, command: CommitBudget, now_ms: int) -> tuple[Entry, ...] | Refusal:
    """Promise budget to a tenant; a programme can never promise more than it has."""
    grant = command.grant
    refused = within_budget(balance_micro(book, "budget"), grant.grant_micro)
    if refused is not None:
        return refused
    _, budget, granted = accounts_of(grant)
    movements = [(budget, -grant.grant_micro), (granted, grant.grant_micro)]
    return (
        _entry(
            book,
            "budget_granted",
            now_ms,
            postings=_postings(book, movements),
            caused_by=f"grant:{grant.grant_id}",
            actor=command.actor,
        ),
    )


def _entry(
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
    """Make the book's next entry, chained to its last. Recorded now, but never before the last."""
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


def _postings(book: Book, movements: Iterable[tuple[str, int]]) -> list[Posting]:
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
