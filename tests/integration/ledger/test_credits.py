"""Conditions of credit on a real database: the tables row by row, and random histories."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from infrastructure import Infrastructure
from integration.ledger.credit_database import DatabaseDesk, open_desk
from property.test_credits import CreditMachine
from runtime.database import ClockStep
from scenarios.credit_desks import CoreDesk, Time
from scenarios.ledger_credits import SCENARIOS, Deed, Hold, Nothing, Scenario
from unit.ledger.values import at

HISTORIES = 30


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.title)
async def test_every_row_shows_the_worked_figures(
    infrastructure: Infrastructure, scenario: Scenario
) -> None:
    """Row by row, in order, as the core and the oracle show them."""
    async with open_desk(infrastructure, scenario) as desk:
        core = CoreDesk(scenario)
        for row in scenario.rows:
            assert (row.answer, row.kinds) == await desk.do(row.deed, row.time), row.what
            seen = await desk.seen(row.time)
            assert (row.sums, row.lots, row.holds) == (seen.sums, seen.lots, seen.holds), row.what
            core.do(row.deed, row.time)
            assert core.seen(row.time) == seen, row.what
            assert core.ledger.entries == desk.entries, row.what
        assert [] == await desk.ledger.audit()


async def test_the_tables_clock_is_held_against_the_servers(infrastructure: Infrastructure) -> None:
    """Nothing is decided where only one of the two was set: the check is the service's own."""
    async with open_desk(infrastructure, SCENARIOS[0]) as desk:
        await desk.clock.set_to(at(9))
        desk.clock.present_ms = at(10)
        with pytest.raises(ClockStep):
            await desk.ledger.hold("t", "H", 1)


class History(NamedTuple):
    """What happened to a book, and when."""

    opening: Scenario
    deeds: list[tuple[Time, Deed]]


class Recorder(CreditMachine):
    """Keeps the histories that it makes up, after core and oracle have agreed on each deed."""

    histories: ClassVar[list[History]] = []

    def __init__(self) -> None:
        super().__init__()
        self.deeds: list[tuple[Time, Deed]] = []

    def do(self, deed: Deed) -> None:
        """A hold of nothing is no request: the service has it malformed before any book is asked."""
        if not (isinstance(deed, Hold) and deed.asked == 0):
            super().do(deed)
            self.deeds.append(((self.hour, 0), deed))

    def teardown(self) -> None:
        """An hour after the last deed its holds may be over."""
        super().teardown()
        if self.deeds:
            opening = self.core.ledger.opening
            assert opening.kind in ("commercial", "startup")
            limit = opening.credit_limit_micro
            scenario = Scenario("a random history", opening.kind, (), limit=limit, unit_micro=1)
            self.histories.append(History(scenario, [*self.deeds, ((self.hour + 1, 0), Nothing())]))


@pytest.fixture(scope="module")
def histories() -> list[History]:
    """The same at each run."""
    Recorder.histories.clear()
    run_state_machine_as_test(
        Recorder,
        settings=settings(
            max_examples=HISTORIES,
            stateful_step_count=30,
            phases=[Phase.generate],
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return Recorder.histories[:HISTORIES]


async def test_random_histories_are_the_same_in_the_core_and_in_the_database(
    infrastructure: Infrastructure, histories: list[History]
) -> None:
    """Answers, entries to the last hash, and all that stands, after each deed."""
    kinds: Counter[str] = Counter()
    for number, history in enumerate(histories):
        async with open_desk(infrastructure, history.opening) as desk:
            await follow(history, desk, swept=number % 2 == 1)
            assert [] == await desk.ledger.audit(), history
            kinds.update(entry.kind for entry in desk.entries)
    assert {
        *("grant", "charge", "expiry", "expiry_reversed", "invoiced", "reversal"),
        *("hold_placed", "hold_moved", "hold_released"),
    } == set(kinds)


async def follow(history: History, desk: DatabaseDesk, *, swept: bool) -> None:
    """Do all of a history at both; swept, the ledger ends holds as soon as they are over."""
    core, last = CoreDesk(history.opening), (0, 0)
    for number, (time, deed) in enumerate(history.deeds):
        so_far = history.deeds[: number + 1]
        if swept and time != last:
            core.ledger.sweep(at(*time))
            await desk.end_expired_holds(time)
        assert core.do(deed, time) == await desk.do(deed, time), so_far
        assert core.ledger.entries == desk.entries, so_far
        assert core.seen(time) == await desk.seen(time), so_far
        last = time
