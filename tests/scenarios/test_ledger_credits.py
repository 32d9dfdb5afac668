"""Conditions of credit, against the naive oracle and the pure core (database: integration)."""

from __future__ import annotations

import pytest

from scenarios.credit_desks import CoreDesk, OracleDesk
from scenarios.ledger_credits import SCENARIOS, Scenario


@pytest.mark.parametrize("desk_of", [OracleDesk, CoreDesk])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.title)
def test_every_row_shows_the_worked_figures(
    scenario: Scenario, desk_of: type[OracleDesk | CoreDesk]
) -> None:
    """Row by row, in order. The oracle too: what the core is held against stands on these."""
    desk = desk_of(scenario)
    for row in scenario.rows:
        assert (row.answer, row.kinds) == desk.do(row.deed, row.time), row.what
        seen = desk.seen(row.time)
        assert (row.sums, row.lots, row.holds) == (seen.sums, seen.lots, seen.holds), row.what
