"""Who is asked in the words of the credit tables: the naive oracle, and the pure core.

Both answer the same, and show the same: what a finance officer sees, and under it who paid what and
what is reserved where. So does the real database (`integration/ledger/credit_database.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from msgspec import Struct

from credit_oracle import CreditOracle, Refused, Terms
from credit_oracle import Hold as PlainHold
from credit_oracle import Lot as PlainLot
from hisab_contracts.charges import BucketTotal
from hisab_contracts.entries import Entry, GrantScope
from hisab_contracts.ids import BucketId, HubCode, PriceClass, ProjectId
from ledger.core.balance import complete_until
from ledger.core.book import Book, BookedBucket
from ledger.core.decisions import BookCommand
from ledger.core.expiry import ExpireLots, hold_at
from ledger.core.grants import GrantExpired
from ledger.core.holds import Hold as StoredHold
from ledger.core.holds import HoldClosed, InsufficientCredit
from ledger.core.withdrawals import (
    AlreadyDrawn,
    AlreadyReversed,
    NotReversible,
    Reserved,
    ReverseEntry,
)
from scenarios.ledger_credits import (
    Answer,
    Deed,
    Grant,
    Hold,
    Invoiced,
    Nothing,
    Release,
    Reported,
    Reverse,
    Scenario,
    Total,
)
from unit.ledger.values import (
    CoreLedger,
    approve,
    at,
    book,
    grant,
    hold,
    invoiced,
    release,
    total,
)

Time = tuple[int, int]


@dataclass(frozen=True)
class Seen:
    """What stands in a book: the columns of a row, then what they are made of."""

    sums: tuple[int, int, int, int]
    lots: Mapping[str, tuple[int, int, int]]
    holds: Mapping[str, tuple[int, int, int]]
    places: Mapping[str, Mapping[str, int]]
    """Of each hold: what it reserves where."""
    draws: Mapping[str, tuple[tuple[str, int], ...]]
    """Of each bucket: who paid how much, in order."""


class OracleDesk:
    """The oracle; it counts time in minutes of the day."""

    def __init__(self, scenario: Scenario) -> None:
        self.book = CreditOracle(commercial=scenario.kind == "commercial", limit=scenario.limit)
        for granted in scenario.grants:
            self.do(granted, (8, 0))

    def do(self, deed: Deed, time: Time) -> tuple[Answer, tuple[str, ...]]:
        """The answer to a deed, and the kinds of the entries that it makes."""
        self.book.at(_minute(*time))
        before = len(self.book.entries)
        try:
            self._act(deed)
        except Refused as refused:
            return refused.args, ()
        # That a hold ends is no entry to the oracle.
        ends = ("hold_released",) if isinstance(deed, Release) else ()
        return (), (*self.book.entries[before:], *ends)

    def _act(self, deed: Deed) -> None:
        match deed:
            case Grant():
                self.book.grant(_plain_lot(deed))
            case Hold():
                terms = _terms(deed.hub, deed.project, deed.price_class)
                ends = _NEVER if deed.until is None else _minute(deed.until)
                self.book.hold(deed.name, PlainHold(deed.asked, terms, ends))
            case Release():
                self.book.release(deed.name)
            case Total():
                stated = (deed.revision, deed.total, deed.total, deed.refunded)
                terms = _terms(deed.hub, deed.project, deed.price_class)
                hour = _minute(deed.hour)
                self.book.charge(deed.bucket, stated, hour, terms, deed.hold or "")
            case Reported():
                marks = {"lhr": deed.lhr, "khi": deed.khi}
                self.book.watermarks = {
                    hub: -1 if hour is None else _minute(hour) for hub, hour in marks.items()
                }
                if deed.swept:
                    self.book.expire()
            case Invoiced():
                # It moves what is owed, and the oracle does not ask to where.
                self.book.entries.append("invoiced")
            case Reverse(what) if what in _OTHERS:
                # The oracle reverses grants: what else an entry may be is nothing to calculate.
                raise Refused(_OTHERS[what])
            case Reverse():
                self.book.reverse(deed.what)
            case Nothing():
                pass

    def seen(self, time: Time) -> Seen:
        """What stands in the book."""
        book = self.book.at(_minute(*time))
        paid = [unit for units in book.draws.values() for unit in units]
        owed = paid.count("limit") + paid.count("unfunded")
        held = {name: hold for name, hold in book.holds.items() if not hold.ended}
        return Seen(
            sums=(len(paid), len(paid) - owed, owed, book.available()),
            lots={
                name: (lot.left, lot.left - book.free(lot), lot.expired)
                for name, lot in book.lots.items()
                if name != "limit" and lot.granted
            },
            holds={name: (h.reserved.total(), h.short, h.drawn) for name, h in held.items()},
            places={name: dict(+hold.reserved) for name, hold in held.items()},
            draws={
                name: tuple((place, len(list(run))) for place, run in groupby(units))
                for name, units in book.draws.items()
                if units
            },
        )


class CoreDesk:
    """The pure core, in micro-units."""

    def __init__(self, scenario: Scenario) -> None:
        self.unit_micro = scenario.unit_micro
        limit_micro = scenario.limit * self.unit_micro
        self.ledger = CoreLedger(book(scenario.kind, limit_micro=limit_micro))
        for granted in scenario.grants:
            self.do(granted, (8, 0))

    def do(self, deed: Deed, time: Time) -> tuple[Answer, tuple[str, ...]]:
        """The answer to a deed, and the kinds of the entries that it makes in the tenant's book."""
        before = len(self.ledger.entries)
        command = self._command_of(deed)
        if command is None:
            return (), ()
        decided = self.ledger.do(command, at(*time))
        if isinstance(decided, tuple):
            return (), tuple(entry.kind for entry in self.ledger.entries[before:])
        return answer_of(decided, self.unit_micro), ()

    def _command_of(self, deed: Deed) -> BucketTotal | BookCommand | None:
        if isinstance(deed, Reported):
            marks = [None if hour is None else at(hour) for hour in (deed.lhr, deed.khi)]
            self.ledger.complete_until_ms = complete_until(marks)
            return ExpireLots() if deed.swept else None
        if isinstance(deed, Reverse):
            entry = entry_meant(self.ledger.entries, deed.what)
            return ReverseEntry(entry=entry, actor="key:approver", reason="wrong")
        return command_of(deed, self.unit_micro)

    def seen(self, time: Time) -> Seen:
        """What stands in the book."""
        now_ms = at(*time)
        holds = [hold_at(hold, now_ms) for hold in self.ledger.holds.values()]
        return seen_of(
            self.ledger.book_at(now_ms),
            self.ledger.available(now_ms),
            holds,
            self.ledger.buckets.values(),
            self.unit_micro,
        )


def seen_of(
    state: Book,
    available_micro: int,
    holds: Iterable[StoredHold],
    buckets: Iterable[BookedBucket],
    unit: int,
) -> Seen:
    """What stands in a book of the core, all of it as of now."""
    owed_micro = state.receivable_micro + state.invoiced_micro + state.unfunded_micro
    sums = (state.charged_micro, state.funded_micro, owed_micro, available_micro)
    charged, funded, owed, available = (micro // unit for micro in sums)
    held = [hold for hold in holds if hold.ended_by is None]
    return Seen(
        sums=(charged, funded, owed, available),
        lots={
            lot.grant_id: (
                lot.remaining_micro // unit,
                lot.reserved_micro // unit,
                lot.expired_micro // unit,
            )
            for lot in state.lots
            if lot.granted_micro
        },
        holds={
            hold.hold_id: (
                hold.open_micro // unit,
                hold.short_micro // unit,
                hold.drawn_micro // unit,
            )
            for hold in held
        },
        places={
            hold.hold_id: {_place(account): micro // unit for account, micro in hold.reserved}
            for hold in held
        },
        draws={
            _bucket_name(bucket.bucket_id): _in_runs(bucket.draws, unit)
            for bucket in buckets
            if bucket.draws
        },
    )


def command_of(deed: Deed, unit_micro: int) -> BucketTotal | BookCommand | None:
    """The command of a deed that is one, whatever the book."""
    match deed:
        case Grant():
            proposed = grant(
                deed.name,
                deed.granted * unit_micro,
                priority=deed.first,
                effective_ms=0 if deed.since is None else at(deed.since),
                expires_ms=None if deed.until is None else at(deed.until),
                scope=scope_of(deed),
                coverage_bps=deed.percent * 100,
            )
            return approve(proposed)
        case Hold():
            return hold(
                deed.name,
                deed.asked * unit_micro,
                hub=deed.hub,
                project_id=deed.project,
                price_class=deed.price_class,
                expires_ms=NEVER_MS if deed.until is None else at(deed.until),
            )
        case Release():
            return release(deed.name)
        case Total():
            return total(
                deed.total * unit_micro,
                bucket=_bucket_id(deed.bucket),
                hour_ms=at(deed.hour),
                revision=deed.revision,
                refunded_micro=deed.refunded * unit_micro,
                hold_id=deed.hold,
                hub=deed.hub,
                project_id=deed.project,
                price_class=deed.price_class,
            )
        case Invoiced():
            return invoiced(deed.document, deed.billed * unit_micro)
        case Reported() | Reverse() | Nothing():
            return None


def scope_of(deed: Grant) -> GrantScope | None:
    """The scope of a grant; None: it has none."""
    if not (deed.hubs or deed.projects or deed.classes):
        return None
    return GrantScope(
        hubs=tuple(map(HubCode, deed.hubs)) or None,
        projects=tuple(map(ProjectId, deed.projects)) or None,
        price_classes=tuple(map(PriceClass, deed.classes)) or None,
    )


def entry_meant(entries: list[Entry], what: str) -> Entry:
    """The entry that a table means: the grant of a name, or the last of a kind."""
    return next(
        entry
        for entry in reversed(entries)
        if what in (entry.kind, None if entry.grant is None else entry.grant.grant_id)
    )


def answer_of(refusal: Struct, unit_micro: int) -> Answer:
    """A refusal in the words of the tables."""
    match refusal:
        case InsufficientCredit(available_micro=available, shortfall_micro=shortfall):
            return "insufficient-credit", available // unit_micro, shortfall // unit_micro
        case HoldClosed(ended_by):
            return "hold-closed", ended_by
        case GrantExpired():
            return ("grant-expired",)
        case AlreadyReversed():
            return ("already-reversed",)
        case AlreadyDrawn(drawn_micro):
            return "already-drawn", drawn_micro // unit_micro
        case Reserved():
            return ("reserved",)
        case NotReversible(code):
            return (code,)
        case _:
            raise AssertionError(refusal)


_OTHERS = {
    "reversal": "is-reversal",
    "charge": "correct-in-metering",
    "invoiced": "correct-in-invoicing",
    "hold_placed": "not-reversible",
}
"""Why entries of other kinds are not reversed."""


_NEVER = 2**62
NEVER_MS = 4_000_000_000_000
"""Later than anything here, and still a date: in 2096."""


def _minute(hour: int, minute: int = 0) -> int:
    return hour * 60 + minute


def _terms(hub: str, project: str, price_class: str | None) -> Terms:
    return {"hubs": hub, "skus": "h100", "projects": project, "price_classes": price_class}


def _plain_lot(deed: Grant) -> PlainLot:
    named = {"hubs": deed.hubs, "projects": deed.projects, "price_classes": deed.classes}
    return PlainLot(
        deed.name,
        deed.granted,
        deed.first,
        effective=0 if deed.since is None else _minute(deed.since),
        expires=_NEVER if deed.until is None else _minute(deed.until),
        scope={member: list(names) for member, names in named.items() if names},
        bps=deed.percent * 100,
    )


def _bucket_id(name: str) -> str:
    """A bucket's id is a number in hexadecimal."""
    return name.encode().hex()


def _bucket_name(bucket_id: BucketId) -> str:
    return bytes.fromhex(bucket_id.lstrip("0")).decode()


def _in_runs(draws: Iterable[tuple[str, int]], unit_micro: int) -> tuple[tuple[str, int], ...]:
    """Draws of one place that follow each other as one; what came between has been returned."""
    return tuple(
        (_place(account), sum(micro for _, micro in run) // unit_micro)
        for account, run in groupby(draws, key=lambda draw: draw[0])
    )


def _place(account: str) -> str:
    """The oracle's name of an account, or of a place."""
    return "limit" if account == "receivable" else account.removeprefix("lot:")
