"""Conditions of credit on a real database: the tables row by row, and random histories."""

from __future__ import annotations

import pytest

from infrastructure import Infrastructure
from integration.ledger.credit_database import DatabaseDesk, open_desk
from runtime.database import ClockStep
from scenarios.credit_desks import CoreDesk
from scenarios.credit_histories import History
from scenarios.ledger_credits import SCENARIOS, Scenario, Total
from unit.ledger.values import at

HISTORIES, STEPS = 30, 30


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


@pytest.mark.slow
async def test_random_histories_are_the_same_in_the_core_and_in_the_database(
    infrastructure: Infrastructure,
) -> None:
    """Answers, entries to the last hash, and all that stands, after each step."""
    kinds: set[str] = set()
    for number in range(HISTORIES):
        history = History(number)
        async with open_desk(infrastructure, history.opening) as desk:
            await follow(history, desk, swept=number % 4 > 1)
            assert [] == await desk.ledger.audit(), history.opening
            kinds.update(entry.kind for entry in desk.entries)
    assert {
        *("grant", "charge", "expiry", "expiry_reversed", "invoiced", "reversal"),
        *("hold_placed", "hold_moved", "hold_released"),
    } == kinds


async def follow(history: History, desk: DatabaseDesk, *, swept: bool) -> None:
    """Do all of a history at both desks; swept, the ledger ends holds as soon as they are over."""
    core, done = history.core, list[object]()
    for _ in range(STEPS):
        deeds = history.step()
        done.append((history.time, deeds))
        if swept:
            core.ledger.sweep(at(*history.time))
            await desk.end_expired_holds(history.time)
        answers = [core.do(deed, history.time) for deed in deeds]
        totals = [deed for deed in deeds if isinstance(deed, Total)]
        if len(totals) > 1:
            # Each finds what those before it in the batch have entered.
            kinds = tuple(kind for _, entered in answers for kind in entered)
            assert kinds == await desk.do_at_once(totals, history.time), done
        else:
            assert answers == [await desk.do(deeds[0], history.time)], done
        assert core.ledger.entries == desk.entries, done
        assert core.seen(history.time) == await desk.seen(history.time), done
