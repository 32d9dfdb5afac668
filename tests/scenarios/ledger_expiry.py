"""What is over by the clock, told as a table: three holds on one lot and a limit, nobody sweeps.

Amounts are in PKR, times are UTC of 31 July 2025. The tenant is commercial with a limit of 100 and
a lot of 300. At 9:00 three jobs reserve everything: H1 and H2 until 10:00, H3 until 12:00. Nothing
happens at 10:00 itself: no request, no charge, no sweep. Every row says what is asked then, what
the answer is, and what a reader sees: available, held, and how H1 stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LIMIT, LOT = 100, 300
HOLDS = (("H1", 200, 10), ("H2", 100, 10), ("H3", 100, 12))
"""Name, amount, the hour at which its time comes: in the order in which they are placed at 9:00."""


@dataclass(frozen=True)
class Row:
    """One instant: what is asked, what is answered, and what a reader sees after it."""

    time: tuple[int, int]
    what: str
    ask: tuple[Literal["look", "place", "release", "charge"], str, int]
    """What, which hold (of a charge: under which), how much."""
    answer: str
    available: int
    held: int
    first: str
    """How H1 stands: `open`, or how it ended."""
    kinds: tuple[str, ...] = ()
    """The entries that this makes."""


TABLE = (
    Row((9, 0), "everything is reserved", ("look", "", 0), "", 0, 400, "open"),
    Row((9, 1), "so one more is refused", ("place", "H4", 1), "short 1", 0, 400, "open"),
    Row((9, 59), "until their time comes", ("place", "H5", 300), "short 300", 0, 400, "open"),
    Row((10, 0), "the clock alone ends H1 and H2", ("look", "", 0), "", 300, 100, "expired"),
    Row((10, 0), "too late to release H1", ("release", "H1", 0), "expired", 300, 100, "expired"),
    Row(
        (10, 0),
        "more than is free is refused",
        ("place", "H6", 301),
        "short 1",
        300,
        100,
        "expired",
    ),
    Row(
        (10, 1),
        "the whole lot is free for H7; the two ends come on the record before it",
        ("place", "H7", 300),
        "admitted",
        0,
        400,
        "expired",
        ("hold_released", "hold_released", "hold_placed"),
    ),
    Row(
        (12, 0),
        "H3 gave the limit back before usage under it is charged",
        ("charge", "H3", 40),
        "booked",
        60,
        300,
        "expired",
        ("hold_released", "charge"),
    ),
)
