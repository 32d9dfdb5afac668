"""The worked example against the pure core (the real database runs it under tests/integration)."""

from __future__ import annotations

from typing import assert_never

import pytest

from ledger.core.holds import InsufficientCredit
from scenarios.ledger_afternoon import (
    A_LIMIT,
    B_LOT,
    B_LOT_EXPIRES,
    CHARGED,
    ENTRIES,
    FUNDED,
    STEPS,
    UNFUNDED,
    Hold,
    Invoiced,
    Nothing,
    Seen,
    Step,
    Total,
)
from unit.ledger.values import CoreLedger, approve, at, book, grant, hold, invoiced, total

PKR = 1_000_000


def act(books: dict[str, CoreLedger], step: Step) -> None:
    """Do one row, and hold its answers against the row."""
    now_ms = at(*step.time)
    for deed in step.does:
        match deed:
            case Total():
                stated = total(
                    deed.charge * PKR,
                    gpu_ns=deed.gpu_ns,
                    bucket=f"{deed.allocation[-1]}{deed.hour}",
                    hour_ms=at(deed.hour),
                    hold_id=deed.hold,
                    allocation_id=deed.allocation,
                    hub=deed.hub,
                )
                assert isinstance(books[deed.tenant].do(stated, now_ms), tuple)
            case Hold():
                answer = books[deed.tenant].do(hold(deed.name, deed.amount * PKR), now_ms)
                if deed.refused is None:
                    assert isinstance(answer, tuple)
                else:
                    available, shortfall = deed.refused
                    assert answer == InsufficientCredit(
                        available_micro=available * PKR, shortfall_micro=shortfall * PKR
                    )
            case Invoiced():
                command = invoiced(deed.document, deed.amount * PKR)
                assert isinstance(books[deed.tenant].do(command, now_ms), tuple)
            case Nothing():
                pass
            case _:
                assert_never(deed)


def seen(books: dict[str, CoreLedger], step: Step) -> tuple[Seen, Seen]:
    """What a finance officer sees of A and of B."""
    a, b = books["A"].book, books["B"].book
    now_ms = at(*step.time)
    return (
        (a.receivable_micro // PKR, a.invoiced_micro // PKR, books["A"].available(now_ms) // PKR),
        (
            sum(lot.remaining_micro for lot in b.lots) // PKR,
            sum(lot.reserved_micro for lot in b.lots) // PKR,
            books["B"].available(now_ms) // PKR,
        ),
    )


@pytest.fixture(scope="module")
def books() -> dict[str, CoreLedger]:
    """A commercial tenant with a limit, a startup with one lot."""
    books = {
        "A": CoreLedger(book("commercial", limit_micro=A_LIMIT * PKR)),
        "B": CoreLedger(book("startup")),
    }
    lot = grant("G1", B_LOT * PKR, expires_ms=at(B_LOT_EXPIRES))
    books["B"].do(approve(lot), at(7))
    return books


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step.number}")
def test_every_step_of_the_afternoon_shows_the_worked_figures(
    books: dict[str, CoreLedger], step: Step
) -> None:
    """Row by row, in order; worked with pencil and paper."""
    act(books, step)
    assert (step.a, step.b) == seen(books, step)


def test_the_afternoon_ends_with_the_worked_sums(books: dict[str, CoreLedger]) -> None:
    """B: charged 560 = funded 500 + unfunded 60. A: charged 980 = invoiced 980."""
    states = {name: ledger.book for name, ledger in books.items()}
    assert {n: v * PKR for n, v in CHARGED.items()} == {
        n: s.charged_micro for n, s in states.items()
    }
    assert {n: v * PKR for n, v in FUNDED.items()} == {n: s.funded_micro for n, s in states.items()}
    assert {n: v * PKR for n, v in UNFUNDED.items()} == {
        n: s.unfunded_micro for n, s in states.items()
    }
    assert ENTRIES == {name: state.seq for name, state in states.items()}
