"""What is over by the clock, row by row, against the pure core."""

from __future__ import annotations

import pytest

from hisab_contracts.charges import BucketTotal
from hisab_contracts.entries import Entry
from hisab_contracts.ids import HoldId
from ledger.core.balance import balance_at
from ledger.core.decisions import BookCommand
from ledger.core.expiry import hold_at
from ledger.core.holds import HoldClosed, InsufficientCredit
from scenarios.ledger_expiry import HOLDS, LIMIT, LOT, TABLE, Row
from unit.ledger.values import CoreLedger, approve, at, book, grant, hold, release, total

PKR = 1_000_000


@pytest.fixture(scope="module")
def ledger() -> CoreLedger:
    """The tenant at 9:00."""
    ledger = CoreLedger(book("commercial", limit_micro=LIMIT * PKR))
    ledger.do(approve(grant("G", LOT * PKR)), at(8))
    for name, amount, hour in HOLDS:
        answer = ledger.do(hold(name, amount * PKR, expires_ms=at(hour)), at(9))
        assert isinstance(answer, tuple)
    return ledger


def answered(ledger: CoreLedger, row: Row) -> tuple[str, tuple[Entry, ...]]:
    """Ask what the row asks; the answer in the row's words, and what was entered."""
    what, name, amount = row.ask
    now_ms = at(*row.time)
    if what == "look":
        return "", ()
    commands: dict[str, BucketTotal | BookCommand] = {
        "place": hold(name, amount * PKR),
        "release": release(name),
        "charge": total(amount * PKR, hold_id=name, hour_ms=at(11)),
    }
    match answer := ledger.do(commands[what], now_ms):
        case InsufficientCredit(shortfall_micro=shortfall_micro):
            return f"short {shortfall_micro // PKR}", ()
        case HoldClosed(ended_by):
            return ended_by, ()
        case tuple():
            return {"place": "admitted", "charge": "booked"}[what], answer
        case _:
            raise AssertionError(answer)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.time[0]}:{row.time[1]:02} {row.what}")
def test_what_is_over_is_over_in_every_row(ledger: CoreLedger, row: Row) -> None:
    """Row by row, in order; nobody sweeps."""
    answer, entries = answered(ledger, row)
    now_ms = at(*row.time)
    seen = balance_at(ledger.book_at(now_ms), now_ms, complete_until_ms=None)
    first = hold_at(ledger.holds[HoldId("H1")], now_ms).ended_by or "open"
    assert row.answer == answer
    assert row.kinds == tuple(entry.kind for entry in entries)
    assert (row.available * PKR, row.held * PKR) == (seen.available_micro, seen.held_micro)
    assert row.first == first


def test_an_expiry_is_effective_when_its_time_came_and_recorded_when_it_is_written(
    ledger: CoreLedger,
) -> None:
    """Whoever asks later what was reserved at 10:30 has to find the two holds ended."""
    ends = [entry for entry in ledger.entries if entry.kind == "hold_released"]
    assert [(at(10), at(10, 1)), (at(10), at(10, 1)), (at(12), at(12))] == [
        (entry.effective_ms, entry.recorded_ms) for entry in ends
    ]
    assert [("clock", "ledger")] * 3 == [(entry.caused_by, entry.actor) for entry in ends]
