"""Properties of decide and evolve: any interleaving keeps the books balanced and the holds kept."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from hisab_contracts.charges import BucketTotal
from hisab_contracts.entries import entry_hash
from hisab_contracts.ids import HoldId
from ledger.core.book import Book, BookKind, Books, RebuiltBook, balance_micro, fold
from ledger.core.decisions import decide
from ledger.core.holds import HoldClosed, HoldEnd, InsufficientCredit
from ledger.core.restoration import RestoredBooks, placing_of, refuse_taking_back
from unit.ledger.values import (
    DAY_MS,
    HOUR_MS,
    CoreLedger,
    approve,
    book,
    grant,
    hold,
    invoiced,
    total,
)

AMOUNTS = st.integers(0, 120)
HOURS = st.integers(0, 3)
BUCKETS = st.sampled_from(["b0", "b1", "b2", "b3"])
HOLDS = st.none() | st.integers(0, 5).map(str)
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""How long an example takes is not what is tested."""
KINDS: tuple[BookKind, ...] = ("commercial", "startup")


class LedgerMachine(RuleBasedStateMachine):
    """Grants, holds, charges, invoices and clocks in any order, against a naive account of each.

    The naive account knows only sums: what was granted, what each bucket stands at, how many holds
    stand. It does not know who pays: that the invariants bound.
    """

    def __init__(self) -> None:
        super().__init__()
        kind = self.kind()
        limit_micro = 100 if kind == "commercial" else 0
        self.ledger = CoreLedger(book(kind, limit_micro=limit_micro))
        self.granted_micro = 0
        self.totals: Counter[str] = Counter()
        self.revisions: Counter[str] = Counter()
        self.ended: dict[str, HoldEnd] = {}
        self.hour = 0

    def kind(self) -> BookKind:
        """Overridden for the other kind."""
        return "commercial"

    @property
    def now_ms(self) -> int:
        """The ledger's clock."""
        return DAY_MS + self.hour * HOUR_MS

    @rule(micro=AMOUNTS, start=HOURS, length=st.none() | st.integers(1, 3), priority=HOURS)
    def grant(self, micro: int, start: int, length: int | None, priority: int) -> None:
        """A lot appears, also one whose window has ended: usage of it may still be heard of."""
        if not micro:
            return
        effective_ms = DAY_MS + start * HOUR_MS
        lot = grant(
            f"g{len(self.ledger.book.lots)}",
            micro,
            priority=priority,
            effective_ms=effective_ms,
            expires_ms=None if length is None else effective_ms + length * HOUR_MS,
        )
        self.ledger.do(approve(lot), self.now_ms)
        self.granted_micro += micro

    @rule(bucket=BUCKETS, more=AMOUNTS, hold_id=HOLDS)
    def charge_more(self, bucket: str, more: int, hold_id: str | None) -> None:
        """A total grows; drawing under a hold that covers it leaves what is available."""
        held = None if hold_id is None else self.ledger.holds.get(HoldId(hold_id))
        before_micro, before = self.ledger.available(self.now_ms), self.ledger.book
        self.totals[bucket] += more
        decided = self.ledger.do(self.stated(bucket, hold_id), self.now_ms)
        assert isinstance(decided, tuple)
        assert bool(more) == bool(decided)
        lots_of_now = all(lot.is_open(self.now_ms) for lot in before.lots)
        if held is None or held.is_over(self.now_ms):
            return
        if more <= held.open_micro and lots_of_now:
            unfunded_micro = self.ledger.book.unfunded_micro - before.unfunded_micro
            if self.hour_of(bucket) == self.hour and not unfunded_micro:
                assert before_micro == self.ledger.available(self.now_ms)

    @rule(bucket=BUCKETS)
    def charge_again(self, bucket: str) -> None:
        """The same total, or an older one, books nothing."""
        seq = self.ledger.book.seq
        stated = self.stated(bucket, None)
        self.ledger.do(stated, self.now_ms)
        older = replace(stated, total_micro=stated.total_micro // 2, total_gpu_ns=0)
        self.ledger.do(older, self.now_ms)
        assert seq == self.ledger.book.seq

    @rule(bucket=BUCKETS, parts=st.integers(0, 4))
    def correct_down(self, bucket: str, parts: int) -> None:
        """A higher revision states less."""
        self.revisions[bucket] += 1
        self.totals[bucket] = self.totals[bucket] * parts // 4
        assert isinstance(self.ledger.do(self.stated(bucket, None), self.now_ms), tuple)

    @rule(micro=st.integers(0, 150), length=st.none() | st.integers(1, 2))
    def place(self, micro: int, length: int | None) -> None:
        """A hold is admitted exactly when what is available covers it."""
        available = self.ledger.available(self.now_ms)
        expires_ms = 2**60 if length is None else self.now_ms + length * HOUR_MS
        asked = hold(str(len(self.ledger.holds)), micro, expires_ms=expires_ms)
        answer = self.ledger.do(asked, self.now_ms)
        if micro > available:
            assert answer == InsufficientCredit(
                available_micro=available, shortfall_micro=micro - available
            )
        else:
            assert isinstance(answer, tuple)
            assert available - micro == self.ledger.available(self.now_ms)

    @precondition(lambda self: self.ledger.holds)
    @rule(number=HOURS, ended_by=st.sampled_from(["final", "released"]))
    def end(self, number: int, ended_by: HoldEnd) -> None:
        """A hold ends once, if not by the clock; whoever comes second learns how it ended."""
        held = list(self.ledger.holds.values())[number % len(self.ledger.holds)]
        answer = self.ledger.release(held.hold_id, ended_by, self.now_ms)
        over = held.expires_ms <= self.now_ms
        first = self.ended.get(held.hold_id, "expired" if over else None)
        assert isinstance(answer, tuple) if first is None else answer == HoldClosed(first)
        self.ended[held.hold_id] = first or ended_by

    @rule()
    def sweep(self) -> None:
        """What is over is put on the record: that changes no answer."""
        before = self.ledger.book_at(self.now_ms)
        self.ledger.sweep(self.now_ms)
        assert without_history(before) == without_history(self.ledger.book)
        assert self.ledger.book == self.ledger.book_at(self.now_ms)

    @precondition(lambda self: self.ledger.book.receivable_micro > 0)
    @rule(parts=st.integers(1, 4))
    def invoice(self, parts: int) -> None:
        """Some of what is receivable is billed."""
        state = self.ledger.book
        document = f"d{len(state.accounts)}"
        answer = self.ledger.do(invoiced(document, state.receivable_micro * parts // 4))
        assert isinstance(answer, tuple)

    @rule()
    def an_hour_passes(self) -> None:
        """Lots open and close."""
        self.hour += 1

    def stated(self, bucket: str, hold_id: str | None) -> BucketTotal:
        """The bucket's total as metering would state it now."""
        return total(
            self.totals[bucket],
            bucket=bucket,
            hour_ms=DAY_MS + self.hour_of(bucket) * HOUR_MS,
            revision=self.revisions[bucket],
            hold_id=hold_id,
        )

    def hour_of(self, bucket: str) -> int:
        """The hour a bucket lies in."""
        return int(bucket[1])

    @invariant()
    def what_is_charged_is_what_was_stated(self) -> None:
        """And is paid or owed, to the last micro-unit."""
        state = self.ledger.book
        owed = state.receivable_micro + state.invoiced_micro + state.settled_micro
        assert sum(self.totals.values()) == state.charged_micro
        assert state.charged_micro == state.funded_micro + owed + state.unfunded_micro
        remaining_micro = sum(lot.remaining_micro for lot in state.lots)
        assert self.granted_micro == remaining_micro + state.funded_micro

    @invariant()
    def accounts_sum_to_zero(self) -> None:
        """Over the whole book."""
        state = self.ledger.book
        accounts = {"usage", "receivable", "unfunded", *state.accounts}
        accounts |= {lot.account for lot in state.lots}
        assert 0 == sum(balance_micro(state, account) for account in accounts)
        for entry in self.ledger.entries[-3:]:
            assert 0 == sum(posting.posting_micro for posting in entry.postings)

    @invariant()
    def holds_are_kept(self) -> None:
        """What holds reserve is what lots and the limit have set aside, and no lot is overdrawn."""
        state = self.ledger.book
        reserved: Counter[str] = Counter()
        for held in self.ledger.holds.values():
            assert 0 <= held.open_micro <= held.hold_micro
            assert held.ended_by is None or not held.reserved
            for place, micro in held.reserved:
                assert micro > 0
                reserved[place] += micro
        assert reserved["limit"] == state.reserved_micro
        for lot in state.lots:
            assert 0 <= lot.reserved_micro <= lot.remaining_micro <= lot.granted_micro
            assert reserved[lot.account] == lot.reserved_micro

    @invariant()
    def what_is_over_reserves_nothing(self) -> None:
        """As of now, though no entry says so yet: only holds whose time has not come count."""
        now = self.ledger.book_at(self.now_ms)
        standing_micro = sum(
            held.open_micro
            for held in self.ledger.holds.values()
            if held.ended_by is None and held.expires_ms > self.now_ms
        )
        reserved_micro = now.reserved_micro + sum(lot.reserved_micro for lot in now.lots)
        assert standing_micro == reserved_micro

    @invariant()
    def no_entry_stands_on_a_hold_that_was_over(self) -> None:
        """Whoever enters anything has ended before it all that was over by then."""
        recorded_ms = self.ledger.book.recorded_ms
        for held in self.ledger.holds.values():
            assert held.ended_by is not None or held.expires_ms > recorded_ms

    def teardown(self) -> None:
        """The whole life, read back from its entries, is the live state; the chain holds."""
        folded = fold(RebuiltBook(self.ledger.opening), self.ledger.entries)
        assert self.ledger.book == folded.book
        assert self.ledger.buckets == folded.buckets
        assert self.ledger.holds == folded.holds
        assert all(entry.hash == entry_hash(entry) for entry in self.ledger.entries)
        recorded = [entry.recorded_ms for entry in self.ledger.entries]
        assert sorted(recorded) == recorded
        self.take_back()

    def take_back(self) -> None:
        """Taken back from what was published, entry by entry, a lost book is what it was."""
        opening = self.ledger.opening
        unit = RestoredBooks({opening.tenant_id: opening}, self.ledger.book.recorded_ms)
        for entry in self.ledger.entries:
            assert None is refuse_taking_back(entry, unit.book(opening.tenant_id))
            unit.take_back(entry, placing_of(entry))
        changes = unit.changes()
        assert self.ledger.book == unit.book(opening.tenant_id)
        assert self.ledger.buckets == {bucket.bucket_id: bucket for _, bucket in changes.buckets}
        holds = [*changes.holds, *((tenant, hold) for tenant, _, hold in changes.placed)]
        assert self.ledger.holds == {hold.hold_id: hold for _, hold in holds}


class UnfundedMachine(LedgerMachine):
    """The same life for a tenant without a commercial contract."""

    def kind(self) -> BookKind:
        """Overage is never billed."""
        return "startup"


LIVES = settings(PATIENT, max_examples=60, stateful_step_count=40)
LedgerMachine.TestCase.settings = LIVES
UnfundedMachine.TestCase.settings = LIVES
TestCommercialLife = pytest.mark.defect("L11", "L12", "L13", "L16", "F39")(LedgerMachine.TestCase)
TestStartupLife = pytest.mark.defect("L11", "L12", "L13", "L16", "F39")(UnfundedMachine.TestCase)


def with_lots(kind: BookKind) -> CoreLedger:
    """Three lots that differ in every term."""
    ledger = CoreLedger(book(kind, limit_micro=1_000 if kind == "commercial" else 0))
    windows = ((0, None, 2), (0, 4, 1), (1, 3, 1))
    for number, (start, until, priority) in enumerate(windows):
        lot = grant(
            f"g{number}",
            40,
            priority=priority,
            effective_ms=DAY_MS + start * HOUR_MS,
            expires_ms=None if until is None else DAY_MS + until * HOUR_MS,
        )
        ledger.do(approve(lot))
    return ledger


@PATIENT
@given(st.sampled_from(KINDS), st.lists(AMOUNTS, max_size=6), st.integers(0, 4))
def test_splitting_a_charge_over_messages_changes_nothing_but_the_entries(
    kind: BookKind, parts: list[int], hour: int
) -> None:
    """The same final total books the same amounts on the same lots, in however many steps."""
    hour_ms = DAY_MS + hour * HOUR_MS
    split, whole = with_lots(kind), with_lots(kind)
    for end in range(len(parts) + 1):
        split.do(total(sum(parts[:end]), hour_ms=hour_ms))
    whole.do(total(sum(parts), hour_ms=hour_ms))
    assert without_history(whole.book) == without_history(split.book)
    assert whole.buckets.values() or not sum(parts)
    assert list(whole.buckets.values()) == list(split.buckets.values())


def without_history(state: Book) -> Book:
    """The state but for how many entries led to it."""
    return replace(state, seq=0, head_hash="", recorded_ms=0)


@PATIENT
@given(
    st.lists(st.tuples(BUCKETS, AMOUNTS, st.integers(0, 2)), max_size=12),
    st.integers(),
    st.integers(0, 3),
)
def test_messages_resent_and_out_of_order_book_each_bucket_once(
    messages: list[tuple[str, int, int]], seed: int, repeats: int
) -> None:
    """Within a revision the greatest total wins, of revisions the highest, whatever came before."""
    ordered, disturbed = with_lots("commercial"), with_lots("commercial")
    stated = [
        total(micro, bucket=bucket, revision=revision) for bucket, micro, revision in messages
    ]
    for message in stated:
        ordered.do(message)
    again = stated * (repeats + 1)
    Random(seed).shuffle(again)
    for message in again:
        disturbed.do(message)
    assert ordered.book.charged_micro == disturbed.book.charged_micro
    assert {b: s.charged_micro for b, s in ordered.buckets.items()} == {
        b: s.charged_micro for b, s in disturbed.buckets.items()
    }


@pytest.mark.defect("L23")
@PATIENT
@given(st.permutations(range(3)), st.integers(1, 200), st.integers(0, 4), st.booleans())
def test_permuting_the_lots_as_loaded_never_changes_a_decision(
    order: list[int], micro: int, hour: int, asks_hold: bool
) -> None:
    """Draws and reservations name the same lots in the same order, hash included."""
    ledger = with_lots("commercial")
    permuted = replace(ledger.book, lots=tuple(ledger.book.lots[place] for place in order))
    hour_ms = DAY_MS + hour * HOUR_MS
    command = hold("h", micro) if asks_hold else total(micro, hour_ms=hour_ms)
    assert decide(Books(ledger.book), command, hour_ms) == decide(Books(permuted), command, hour_ms)


@pytest.mark.defect("L24")
@PATIENT
@given(AMOUNTS, AMOUNTS, AMOUNTS)
def test_corrections_in_steps_return_the_same_credit_as_one(
    first: int, second: int, third: int
) -> None:
    """Any split of what goes back equals the whole."""
    high, middle, low = sorted((first, second, third), reverse=True)
    steps, at_once = with_lots("commercial"), with_lots("commercial")
    for ledger in (steps, at_once):
        ledger.do(total(high))
    steps.do(total(middle, revision=1))
    for ledger in (steps, at_once):
        ledger.do(total(low, revision=2))
    assert without_history(at_once.book) == without_history(steps.book)
    assert at_once.buckets == steps.buckets
