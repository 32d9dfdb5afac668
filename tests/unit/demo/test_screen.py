"""What the demo writes for eyes: figures that agree with each other."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.report import _table
from demo.screen import pkr, pkr_between

AMOUNTS = st.integers(-(10**15), 10**15)


def shown(text: str) -> Decimal:
    """Read an amount as it was written."""
    return Decimal(text.replace(",", ""))


@given(AMOUNTS, AMOUNTS)
def test_a_fall_is_the_difference_of_the_two_amounts_beside_it(before: int, after: int) -> None:
    """Each once rounded by itself: 827,277.72 fell to 827,240.31 by 37.40."""
    assert shown(pkr(before)) - shown(pkr(after)) == shown(pkr_between(before, after))


@pytest.mark.parametrize("names", [1, 2])
def test_numbers_of_a_table_stand_to_the_right(names: int) -> None:
    """Only the columns that name something stand to the left, heads and cells alike."""
    table = _table(("hub", "reported", "billed"), [("lhr", "1.00", "2.00")], names)
    assert 2 * names == table.count('class="name"')
    assert (names == 2) is ('<th class="name">reported</th>' in table)
    assert "<td>2.00</td>" in table
