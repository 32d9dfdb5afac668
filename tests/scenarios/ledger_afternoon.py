"""The ledger's part of the worked example: one afternoon of July 2025, step by step.

Amounts are in PKR (books hold them x 10^6); times are UTC of 31 July 2025. Steps that belong to
later issues (expiry, payment, correction) are left out: after step 8 B's lot still holds its 80,
because the expiry entry comes later; step 9 then finds it, as the reversed expiry will.

Every step says what it does and what a finance officer sees afterwards:
B: lot / reserved / available, and A: receivable / invoiced / available.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Seen = tuple[int, int, int]


@dataclass(frozen=True)
class Total:
    """Metering states the new total of a bucket."""

    tenant: Literal["A", "B"]
    allocation: str
    hub: str
    node: str
    hour: int
    gpu_ns: int
    charge: int
    hold: str | None = None


@dataclass(frozen=True)
class Hold:
    """A scheduler asks whether a job may start."""

    tenant: Literal["A", "B"]
    name: str
    amount: int
    refused: tuple[int, int] | None = None
    """(available, shortfall) when it is."""


@dataclass(frozen=True)
class Invoiced:
    """Invoicing tells that a document was finalised."""

    tenant: Literal["A", "B"]
    document: str
    amount: int


@dataclass(frozen=True)
class Nothing:
    """It happens in another service; no book changes."""


@dataclass(frozen=True)
class Step:
    """One row of the worked example."""

    number: int
    time: tuple[int, int]
    what: str
    does: tuple[Total | Hold | Invoiced | Nothing, ...]
    a: Seen
    b: Seen


A_LIMIT = 1_000
B_LOT = 500
B_LOT_EXPIRES = 11

STEPS = (
    Step(0, (8, 0), "the afternoon begins", (Nothing(),), (0, 0, 1_000), (500, 0, 500)),
    Step(
        1, (9, 0), "hold H of 400 for job-1", (Hold("B", "H", 400),), (0, 0, 1_000), (500, 400, 100)
    ),
    Step(
        2,
        (9, 1),
        "a second hold of 200 is refused",
        (Hold("B", "I", 200, refused=(100, 100)),),
        (0, 0, 1_000),
        (500, 400, 100),
    ),
    Step(
        3,
        (10, 30),
        "job-1 ran [10:00, 10:30) under H: 420",
        (Total("B", "job-1", "lhr", "n1", 10, 1_800_000_000_000, 420, "H"),),
        (0, 0, 1_000),
        (80, 0, 80),
    ),
    Step(
        4,
        (10, 31),
        "the same interval again, under another id and cut in three: the total stands",
        (Total("B", "job-1", "lhr", "n1", 10, 1_800_000_000_000, 420, "H"),),
        (0, 0, 1_000),
        (80, 0, 80),
    ),
    Step(
        5,
        (11, 15),
        "job-2 ran [10:15, 11:15): 630 and 210 to receivable",
        (
            Total("A", "job-2", "khi", "n2", 10, 2_700_000_000_000, 630),
            Total("A", "job-2", "khi", "n2", 11, 900_000_000_000, 210),
        ),
        (840, 0, 160),
        (80, 0, 0),
    ),
    Step(
        6,
        (11, 20),
        "job-3 on job-1's device: its free part is 140",
        (Total("A", "job-3", "lhr", "n1", 10, 600_000_000_000, 140),),
        (980, 0, 20),
        (80, 0, 0),
    ),
    Step(
        7, (11, 21), "the conflict is dismissed at metering", (Nothing(),), (980, 0, 20), (80, 0, 0)
    ),
    Step(8, (19, 1), "watermarks: lhr 19:00, khi 12:00", (Nothing(),), (980, 0, 20), (80, 0, 0)),
    Step(
        9,
        (19, 5),
        "late: job-1 on a second device [10:30, 10:40): 560 in all; G1 pays 80, unfunded 60",
        (Total("B", "job-1", "lhr", "n1", 10, 2_400_000_000_000, 560, "H"),),
        (980, 0, 20),
        (0, 0, 0),
    ),
    Step(10, (19, 10), "khi says 19:00: July is closable", (Nothing(),), (980, 0, 20), (0, 0, 0)),
    Step(11, (19, 20), "finance closes July", (Nothing(),), (980, 0, 20), (0, 0, 0)),
    Step(
        12,
        (19, 21),
        "invoicing tells the ledger: 980 invoiced",
        (Invoiced("A", "d-1", 980),),
        (0, 980, 20),
        (0, 0, 0),
    ),
)

CHARGED = {"A": 980, "B": 560}
FUNDED = {"A": 0, "B": 500}
UNFUNDED = {"A": 0, "B": 60}
ENTRIES = {"A": 4, "B": 4}
"""A: three charges and the invoice. B: the grant, the hold and two charges."""
