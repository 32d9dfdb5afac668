"""Random histories of credit: the core against the naive oracle, and against its own entries.

A history is told in the words of the scenario tables, so a failure prints as rows.
"""

from __future__ import annotations

import dataclasses
from itertools import count
from typing import Any, Literal, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from msgspec.structs import replace

from ledger.core.book import RebuiltBook, balance_micro, fold
from scenarios.credit_desks import CoreDesk, OracleDesk
from scenarios.ledger_credits import (
    Deed,
    Grant,
    Hold,
    Invoiced,
    Release,
    Reported,
    Reverse,
    Scenario,
    Total,
)

Deed_ = TypeVar("Deed_", Grant, Total)
AMOUNTS = st.integers(1, 60)
PERCENTS = st.sampled_from([100, 100, 50, 40, 33, 1])
NUMBERS = st.integers(0, 5)
HUBS = st.sampled_from(["lhr", "khi"])
PROJECTS = st.sampled_from(["main", "lab"])
CLASSES = st.sampled_from(["on_demand", "spot"])
KINDS: st.SearchStrategy[Literal["commercial", "startup"]] = st.sampled_from(
    ["commercial", "startup"]
)


def some(members: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[str, ...]]:
    """One member of a scope: mostly it says nothing."""
    nothing: tuple[str, ...] = ()
    return st.sampled_from([True, False, False, False]).flatmap(
        lambda said: members.map(lambda member: (member,)) if said else st.just(nothing)
    )


@st.composite
def grants(draw: st.DrawFn) -> Grant:
    """A lot of whatever terms; its name comes later."""
    since = draw(st.none() | st.integers(8, 10))
    length = draw(st.none() | st.integers(1, 4))
    return Grant(
        name="",
        granted=draw(AMOUNTS),
        first=draw(st.integers(0, 1)),
        since=since,
        until=None if length is None else (since or 8) + length,
        percent=draw(PERCENTS),
        hubs=draw(some(HUBS)),
        projects=draw(some(PROJECTS)),
        classes=draw(some(CLASSES)),
    )


class CreditMachine(RuleBasedStateMachine):
    """Any history of one book; after each step both desks answer and show the same."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = count(1)
        self.hour = 9
        self.totals: dict[str, Total] = {}
        self.stale: list[Total] = []
        self.reported = (8, 8)

    @initialize(
        kind=KINDS, limit=st.sampled_from([0, 40, 100]), lots=st.lists(grants(), max_size=4)
    )
    def open(self, kind: Literal["commercial", "startup"], limit: int, lots: list[Grant]) -> None:
        """The book, and a second core that is handed the lots of its book in another order."""
        limit = limit if kind == "commercial" else 0
        scenario = Scenario("a random history", kind, rows=(), limit=limit, unit_micro=1)
        self.oracle, self.core = OracleDesk(scenario), CoreDesk(scenario)
        self.shuffled = CoreDesk(scenario)
        self.states = [self.rebuilt()]
        for lot in lots:
            self.grant(lot)

    def rebuilt(self) -> RebuiltBook:
        """What the units of work hold, as a rebuild would hold it."""
        ledger = self.core.ledger
        return RebuiltBook(ledger.book, dict(ledger.buckets), dict(ledger.holds))

    def do(self, deed: Deed) -> None:
        """Ask both, and compare answers, entries and all that stands."""
        time = (self.hour, 0)
        answer, kinds = self.oracle.do(deed, time)
        actual, entered = self.core.do(deed, time)
        assert answer == actual
        # When an end of a hold is written down is left to the core: it changes nothing.
        assert self.without_ends(kinds) == self.without_ends(entered)
        assert self.oracle.seen(time) == self.core.seen(time)
        reverse_lots(self.shuffled)
        self.shuffled.do(deed, time)
        assert self.core.ledger.entries == self.shuffled.ledger.entries
        self.conserves()
        self.states.append(self.rebuilt())

    def without_ends(self, kinds: tuple[str, ...]) -> list[str]:
        """The kinds but for the ends of holds."""
        return [kind for kind in kinds if kind != "hold_released"]

    def conserves(self) -> None:
        """What is always true of a book, whatever the oracle says."""
        ledger = self.core.ledger
        state = ledger.book
        owed = state.receivable_micro + state.invoiced_micro + state.settled_micro
        assert state.charged_micro == state.funded_micro + owed + state.unfunded_micro
        drawn = dict.fromkeys((lot.account for lot in state.lots), 0)
        for bucket in ledger.buckets.values():
            for account, micro in bucket.draws:
                if account in drawn:
                    drawn[account] += micro
        for lot in state.lots:
            spent = drawn[lot.account] + lot.expired_micro
            assert lot.granted_micro == spent + lot.remaining_micro
            assert 0 <= lot.reserved_micro <= lot.remaining_micro
            assert lot.expired_micro >= 0
        assert state.breakage_micro == sum(lot.expired_micro for lot in state.lots)
        for hold in ledger.holds.values():
            if hold.ended_by is None:
                given_up = hold.hold_micro - hold.open_micro - hold.short_micro
                assert 0 <= given_up <= hold.drawn_micro
        assert all(
            0 == sum(posting.posting_micro for posting in entry.postings)
            for entry in ledger.entries
        )
        accounts = {"usage", "receivable", "unfunded", "breakage", *state.accounts}
        accounts |= {lot.account for lot in state.lots}
        assert 0 == sum(balance_micro(state, account) for account in accounts)

    @rule(lot=grants())
    def grant(self, lot: Grant) -> None:
        """A lot of whatever terms."""
        self.do(changed(lot, name=f"g{next(self.numbers)}"))

    @rule(
        asked=st.integers(0, 60),
        hub=HUBS,
        project=PROJECTS,
        price_class=st.none() | CLASSES,
        length=st.none() | st.integers(1, 3),
    )
    def place(
        self, asked: int, hub: str, project: str, price_class: str | None, length: int | None
    ) -> None:
        """A hold is admitted by both or by none, with the same amounts."""
        until = None if length is None else self.hour + length
        self.do(Hold(f"h{next(self.numbers)}", asked, hub, project, price_class, until))

    @rule(number=NUMBERS, more=AMOUNTS, hold=NUMBERS)
    def charge_more(self, number: int, more: int, hold: int) -> None:
        """A bucket grows, or begins; each has its own hour, hub, project and class."""
        hub, project = ("lhr", "khi")[number % 2], ("main", "lab")[number // 2 % 2]
        price_class = ("on_demand", "spot")[number // 3 % 2]
        name = f"b{number}"
        fresh = Total(name, 0, 8 + number, 0, 0, None, hub, project, price_class)
        stated = self.totals.get(name, fresh)
        self.state(stated, hold, total=stated.total + more)

    @precondition(lambda self: self.totals)
    @rule(number=NUMBERS, parts=st.integers(1, 4), hold=NUMBERS)
    def refund(self, number: int, parts: int, hold: int) -> None:
        """More of a bucket is refunded."""
        stated = self.stated(number)
        more = (stated.total - stated.refunded) * parts // 4
        self.state(stated, hold, refunded=stated.refunded + more)

    @precondition(lambda self: self.totals)
    @rule(number=NUMBERS, parts=st.integers(0, 5), refunded=st.integers(0, 4), hold=NUMBERS)
    def correct(self, number: int, parts: int, refunded: int, hold: int) -> None:
        """A higher revision states another total, and another refund of it."""
        stated = self.stated(number)
        total, revision = stated.total * parts // 4, stated.revision + 1
        self.state(stated, hold, total=total, refunded=total * refunded // 4, revision=revision)

    def stated(self, number: int) -> Total:
        """What was stated last of some bucket."""
        return list(self.totals.values())[number % len(self.totals)]

    def state(self, before: Total, hold: int, **members: int) -> None:
        """Metering states a total, mostly under a hold that stands."""
        held = [*self.core.seen((self.hour, 0)).holds, *self.core.ledger.holds, None]
        stated = changed(before, hold=held[hold % len(held)], **members)
        self.do(stated)
        self.totals[stated.bucket] = stated
        self.stale.append(stated)

    @rule(lhr=st.integers(0, 2), khi=st.integers(0, 2), swept=st.booleans())
    def report(self, lhr: int, khi: int, swept: bool) -> None:
        """Watermarks rise; the ledger looks at once, or later."""
        self.reported = self.reported[0] + lhr, self.reported[1] + khi
        self.do(Reported(*self.reported, swept))

    @rule(number=NUMBERS, what=st.sampled_from(["again", "new hub", "release", "bill", "reverse"]))
    def seldom(self, number: int, what: str) -> None:
        """What ends most histories if it happens often."""
        ledger = self.core.ledger
        match what:
            case "again" if self.stale:
                seq = ledger.book.seq
                self.do(self.stale[number * 7 % len(self.stale)])
                assert seq == ledger.book.seq
            case "new hub":
                self.do(Reported(self.reported[0], None, swept=False))
            case "release" if ledger.holds:
                self.do(Release(list(ledger.holds)[number % len(ledger.holds)]))
            case "bill" if ledger.book.receivable_micro > 0:
                billed = ledger.book.receivable_micro * (number + 1) // 6
                self.do(Invoiced(f"d{next(self.numbers)}", billed))
            case "reverse":
                names = [entry.grant.grant_id for entry in ledger.entries if entry.grant]
                if names:
                    self.do(Reverse(names[number % len(names)]))

    @rule()
    def an_hour_passes(self) -> None:
        """Lots open and close, holds end."""
        self.hour += 1
        time = (self.hour, 0)
        assert self.oracle.seen(time) == self.core.seen(time)

    def teardown(self) -> None:
        """The entries alone, folded, are the state at each position."""
        if not hasattr(self, "core"):
            return
        ledger = self.core.ledger
        folded = RebuiltBook(ledger.opening)
        for state in self.states:
            more = ledger.entries[folded.book.seq : state.book.seq]
            folded = fold(folded, more)
            assert state == folded


def reverse_lots(desk: CoreDesk) -> None:
    """Hand a core its lots in the reverse of the order in which it left them."""
    state = desk.ledger.book
    desk.ledger._books[state.tenant_id] = replace(state, lots=state.lots[::-1])


def changed(deed: Deed_, **members: Any) -> Deed_:
    """The same deed but for some members."""
    return dataclasses.replace(deed, **members)


CreditMachine.TestCase.settings = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=100,
    stateful_step_count=30,
)
TestCredits = pytest.mark.defect("L13", "L16", "L23", "L24")(CreditMachine.TestCase)
