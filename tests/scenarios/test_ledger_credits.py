"""Conditions of credit, against the naive oracle and the pure core (database: integration)."""

from __future__ import annotations

import pytest

from credit_oracle import NEVER, CreditOracle, Refused, Terms
from credit_oracle import Hold as PlainHold
from credit_oracle import Lot as PlainLot
from scenarios.ledger_credits import (
    SCENARIOS,
    Answer,
    Deed,
    Grant,
    Hold,
    Invoiced,
    Nothing,
    Release,
    Reported,
    Reverse,
    Row,
    Scenario,
    Total,
)

NAMES = [scenario.title for scenario in SCENARIOS]


def minutes(time: tuple[int, int]) -> int:
    """Minutes since midnight: the oracle does not care what it counts in."""
    return time[0] * 60 + time[1]


class OracleDesk:
    """The oracle, asked in the words of the tables."""

    def __init__(self, scenario: Scenario) -> None:
        self.book = CreditOracle(commercial=scenario.kind == "commercial", limit=scenario.limit)
        self.made = 0
        for grant in scenario.grants:
            self.do(grant, (8, 0))

    def do(self, deed: Deed, time: tuple[int, int]) -> tuple[Answer, tuple[str, ...]]:
        """The answer to a deed, and the kinds of the entries that it makes."""
        book = self.book.at(minutes(time))
        before = len(book.entries)
        try:
            released = self._act(book, deed)
        except Refused as refused:
            return refused.args, ()
        return (), (*book.entries[before:], *released)

    def _act(self, book: CreditOracle, deed: Deed) -> tuple[str, ...]:
        match deed:
            case Grant():
                ends = NEVER if deed.until is None else minutes((deed.until, 0))
                named = {
                    "hubs": deed.hubs, "projects": deed.projects, "price_classes": deed.classes
                }  # fmt: skip
                scope = {member: list(names) for member, names in named.items() if names}
                bps = deed.percent * 100
                book.grant(PlainLot(deed.name, deed.granted, deed.first, 0, ends, scope, bps))
            case Hold():
                terms = terms_of(deed.hub, deed.project, deed.price_class)
                book.hold(deed.name, PlainHold(deed.asked, terms, expires=NEVER))
            case Release():
                book.release(deed.name)
                return ("hold_released",)
            case Total():
                stated = (deed.revision, deed.total, deed.total, deed.refunded)
                terms = terms_of(deed.hub, deed.project, deed.price_class)
                hour = minutes((deed.hour, 0))
                book.charge(deed.bucket, stated, hour, terms, deed.hold or "")
            case Reported():
                book.watermarks = {
                    "lhr": minutes((deed.lhr, 0)), "khi": minutes((deed.khi, 0))
                }  # fmt: skip
                book.expire()
            case Invoiced():
                book.entries.append("invoiced")
            case Reverse():
                codes = {
                    "reversal": "is-reversal",
                    "charge": "correct-in-metering",
                    "invoiced": "correct-in-invoicing",
                    "hold_placed": "not-reversible",
                }
                if deed.what in codes:
                    # The oracle reverses grants only: what else an entry may be is no calculation.
                    raise Refused(codes[deed.what])
                book.reverse(deed.what)
            case Nothing():
                pass
        return ()

    def seen(self, row: Row) -> Row:
        """The row as it stands in the oracle."""
        book = self.book
        draws = [unit for units in book.draws.values() for unit in units]
        owed = draws.count("limit") + draws.count("unfunded")
        lots = {
            name: (lot.left, lot.left - book.free(lot), lot.expired)
            for name, lot in book.lots.items()
            if name != "limit" and lot.granted
        }
        holds = {
            name: (hold.reserved.total(), hold.short, hold.drawn)
            for name, hold in book.holds.items()
            if not hold.ended
        }
        sums = (len(draws), len(draws) - owed, owed, book.available())
        return Row(row.time, row.what, row.deed, sums, lots, holds, row.answer, row.kinds)


def terms_of(hub: str, project: str, price_class: str | None) -> Terms:
    """The terms of a charge or hold of the only SKU."""
    return {"hubs": hub, "skus": "h100", "projects": project, "price_classes": price_class}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=NAMES)
def test_the_oracle_shows_the_worked_figures(scenario: Scenario) -> None:
    """So the oracle is held against pencil and paper before the core is held against it."""
    desk = OracleDesk(scenario)
    for row in scenario.rows:
        assert (row.answer, row.kinds) == desk.do(row.deed, row.time), row.what
        assert row == desk.seen(row), row.what
