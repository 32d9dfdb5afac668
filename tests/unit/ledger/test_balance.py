"""What a book comes to at an instant, and until when it is complete."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ledger.core.balance import balance_at, complete_until
from unit.ledger.values import CoreLedger, approve, at, book, grant, hold


def test_a_balance_shows_what_is_available_and_held_at_its_instant() -> None:
    """Lots open and close without an entry: a later one is listed, and not available yet."""
    ledger = CoreLedger(book(limit_micro=5))
    ledger.do(approve(grant("over", 40, expires_ms=at(11))), at(9))
    ledger.do(approve(grant("open", 30)), at(9))
    ledger.do(approve(grant("later", 20, effective_ms=at(12))), at(9))
    ledger.do(hold("h", 42), at(9))
    ledger.do(hold("on-the-limit", 33), at(9))
    balance = balance_at(ledger.book, at(11), complete_until_ms=at(8))
    assert ["open", "later"] == [lot.grant_id for lot in balance.lots]
    assert (0, 75) == (balance.available_micro, balance.held_micro)
    assert (ledger.book, at(8)) == (balance.book, balance.complete_until_ms)
    noon = balance_at(ledger.book, at(12), complete_until_ms=None)
    assert (20, 75) == (noon.available_micro, noon.held_micro)


@pytest.mark.parametrize(
    ("watermarks_ms", "expected"),
    [([], None), ([7], 7), ([7, 5, 6], 5), ([7, None, 5], None), ([None], None)],
)
def test_usage_is_complete_until_the_lowest_watermark_if_all_are_known(
    watermarks_ms: Sequence[int | None], expected: int | None
) -> None:
    """One that is missing may hide usage of any time."""
    assert expected == complete_until(watermarks_ms)
