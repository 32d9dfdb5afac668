"""A reading of the clock against the server's: near enough is taken, a step is refused."""

from __future__ import annotations

import pytest

from hisab_contracts.units import moment_of
from runtime.database import CLOCK_TOLERANCE_MS, ClockStep, check_clock
from runtime.outages import is_outage

SERVER_MS = 1_753_920_000_000
DAY_MS = 86_400_000


@pytest.mark.parametrize("apart_ms", [0, 1, -1, CLOCK_TOLERANCE_MS, -CLOCK_TOLERANCE_MS])
def test_clocks_that_are_kept_agree_well_enough(apart_ms: int) -> None:
    """What machines drift apart, and what a slow answer takes, stops nothing."""
    check_clock(SERVER_MS + apart_ms, moment_of(SERVER_MS))


@pytest.mark.parametrize(
    "apart_ms", [CLOCK_TOLERANCE_MS + 1, -CLOCK_TOLERANCE_MS - 1, DAY_MS, -DAY_MS]
)
def test_a_step_is_refused_by_name_and_tried_again(apart_ms: int) -> None:
    """The message says how far, and what to do; it is the outside that is to blame."""
    with pytest.raises(ClockStep, match=f"{apart_ms} ms from that of the database") as refused:
        check_clock(SERVER_MS + apart_ms, moment_of(SERVER_MS))
    assert "Set the clock that is wrong" in str(refused.value)
    assert is_outage(refused.value)
