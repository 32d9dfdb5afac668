"""Conditions of credit, told as tables: scope, subsidy, expiry, refunds, reversal.

Amounts are in PKR (one table counts single micro-units), times are UTC of 31 July 2025. Every row
says what happens, what the ledger answers, which entries that makes, and what a finance officer
sees afterwards. Worked with pencil and paper from what outsiders may rely on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Answer = tuple[str | int, ...]
"""Empty: it is done. Else the code of the refusal and its amounts."""
PKR = 1_000_000


@dataclass(frozen=True)
class Grant:
    """An approved grant: a lot. Usage from `since` on and before `until` may draw on it."""

    name: str
    granted: int
    first: int = 0
    """Its priority: lower numbers pay first."""
    since: int | None = None
    """The hour; None: long ago, or (of `until`) never."""
    until: int | None = None
    percent: int = 100
    hubs: tuple[str, ...] = ()
    projects: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hold:
    """A scheduler asks whether a job may start."""

    name: str
    asked: int
    hub: str = "lhr"
    project: str = "main"
    price_class: str | None = None
    until: int | None = None
    """The hour in which its time comes; None: later than anything here."""


@dataclass(frozen=True)
class Release:
    """A scheduler gives a hold back."""

    name: str


@dataclass(frozen=True)
class Total:
    """Metering states the new total of a bucket."""

    bucket: str
    total: int
    hour: int = 9
    refunded: int = 0
    revision: int = 0
    hold: str | None = None
    hub: str = "lhr"
    project: str = "main"
    price_class: str = "on_demand"


@dataclass(frozen=True)
class Reported:
    """Hubs say up to which hour all of their usage is reported; the ledger expires what it may."""

    lhr: int | None
    """None: it has emitted, and says nothing yet."""
    khi: int | None
    swept: bool = True
    """False: the ledger has not come to it yet."""


@dataclass(frozen=True)
class Invoiced:
    """Invoicing tells that a document was finalised."""

    document: str
    billed: int


@dataclass(frozen=True)
class Reverse:
    """Two people reverse an entry: the last of a kind, or the grant of a name."""

    what: str


@dataclass(frozen=True)
class Nothing:
    """Only the clock goes on."""


Deed = Grant | Hold | Release | Total | Reported | Invoiced | Reverse | Nothing


@dataclass(frozen=True)
class Row:
    """One instant: what happens, and what is seen after it."""

    time: tuple[int, int]
    what: str
    deed: Deed
    sums: tuple[int, int, int, int]
    """Charged, funded, owed (receivable and invoiced, or unfunded), available."""
    lots: Mapping[str, tuple[int, int, int]]
    """Of each lot: left, reserved of it, expired."""
    holds: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    """Of each hold that stands: reserved, short, drawn."""
    answer: Answer = ()
    kinds: tuple[str, ...] = ()
    """The entries that this makes."""


@dataclass(frozen=True)
class Scenario:
    """A tenant's story; grants of the morning come before its first row."""

    title: str
    kind: Literal["commercial", "startup"]
    rows: tuple[Row, ...]
    grants: tuple[Grant, ...] = ()
    limit: int = 0
    unit_micro: int = PKR


# Tables: two lines a row.
# fmt: off
SUBSIDY = Scenario(
    "a subsidy of 40 % up to 100, its cap crossed in the middle of a bucket",
    "commercial",
    limit=1000,
    grants=(Grant("S", 100, percent=40),),
    rows=(
        Row((9, 30), "200: the subsidy pays 80",
            Total("b1", 200), (200, 80, 120, 900), {"S": (20, 0, 0)}, kinds=("charge",)),
        Row((9, 40), "100 in another bucket: 40 would be its share, 20 are left",
            Total("b2", 100), (300, 100, 200, 800), {"S": (0, 0, 0)}, kinds=("charge",)),
        Row((9, 50), "150 in it: nothing is left",
            Total("b2", 150), (350, 100, 250, 750), {"S": (0, 0, 0)}, kinds=("charge",)),
        Row((9, 55), "corrected to 30: of its 20 the subsidy keeps the share of 12",
            Total("b2", 30, revision=1), (230, 92, 138, 870), {"S": (8, 0, 0)}, kinds=("charge",)),
        Row((9, 56), "60 in a third bucket: what came back pays again",
            Total("b3", 60), (290, 100, 190, 810), {"S": (0, 0, 0)}, kinds=("charge",)),
    ),
)

FLOORS = Scenario(
    "several charges of one bucket: 40 % of the total, floored, not of the parts (micro-units)",
    "startup",
    unit_micro=1,
    grants=(Grant("S", 100, percent=40),),
    rows=tuple(
        Row((9, total), f"{total}: {paid} paid", Total("b", total, revision=revision),
            (total, paid, total - paid, 100 - paid), {"S": (100 - paid, 0, 0)}, kinds=("charge",))
        # 0.4, 0.8, 1.2, 1.6, 2.0; and down again by a correction: 1.6. Each part alone would be 0.
        for total, paid, revision in
            ((1, 0, 0), (2, 0, 0), (3, 1, 0), (4, 1, 0), (5, 2, 0), (4, 1, 1))
    ),
)

ONE_HUB = Scenario(
    "a lot for one hub only, before a general one",
    "startup",
    grants=(Grant("L", 100, hubs=("lhr",)), Grant("G", 100, first=1)),
    rows=(
        Row((9, 30), "60 in Karachi: the general lot",
            Total("k", 60, hub="khi"), (60, 60, 0, 140), {"L": (100, 0, 0), "G": (40, 0, 0)},
            kinds=("charge",)),
        Row((9, 31), "a hold of 70 in Karachi cannot use what is for Lahore",
            Hold("H", 70, hub="khi"), (60, 60, 0, 140), {"L": (100, 0, 0), "G": (40, 0, 0)},
            answer=("insufficient-credit", 40, 30)),
        Row((9, 32), "130 in Lahore: its own lot first",
            Total("l", 130), (190, 190, 0, 10), {"L": (0, 0, 0), "G": (10, 0, 0)},
            kinds=("charge",)),
        Row((9, 33), "90 in Karachi: 10 are left for it",
            Total("k", 90, hub="khi"), (220, 200, 20, 0), {"L": (0, 0, 0), "G": (0, 0, 0)},
            kinds=("charge",)),
    ),
)

PROJECT_AND_CLASS = Scenario(
    "one lot for a project, one for spot",
    "startup",
    grants=(Grant("P", 50, projects=("lab",)), Grant("C", 50, classes=("spot",))),
    rows=(
        Row((9, 0), "a hold of project main that names no class fits neither",
            Hold("H1", 30), (0, 0, 0, 100), {"P": (50, 0, 0), "C": (50, 0, 0)},
            answer=("insufficient-credit", 0, 30)),
        Row((9, 1), "spot of main fits one",
            Hold("H2", 60, price_class="spot"), (0, 0, 0, 100), {"P": (50, 0, 0), "C": (50, 0, 0)},
            answer=("insufficient-credit", 50, 10)),
        Row((9, 2), "spot of the lab fits both, the one named C first",
            Hold("H3", 60, project="lab", price_class="spot"), (0, 0, 0, 40),
            {"P": (50, 10, 0), "C": (50, 50, 0)}, {"H3": (60, 0, 0)}, kinds=("hold_placed",)),
        Row((9, 3), "given back",
            Release("H3"), (0, 0, 0, 100), {"P": (50, 0, 0), "C": (50, 0, 0)},
            kinds=("hold_released",)),
        Row((9, 4), "10 of main on demand: nobody pays",
            Total("m", 10), (10, 0, 10, 100), {"P": (50, 0, 0), "C": (50, 0, 0)},
            kinds=("charge",)),
        Row((9, 5), "20 of the lab on demand",
            Total("d", 20, project="lab"), (30, 20, 10, 80), {"P": (30, 0, 0), "C": (50, 0, 0)},
            kinds=("charge",)),
        Row((9, 6), "60 of the lab on spot: 50 and 10",
            Total("s", 60, project="lab", price_class="spot"), (90, 80, 10, 20),
            {"P": (20, 0, 0), "C": (0, 0, 0)}, kinds=("charge",)),
    ),
)

HOLD_AND_SHARE = Scenario(
    "holds over a lot that pays half, and a limit of 100",
    "commercial",
    limit=100,
    grants=(Grant("S", 200, percent=50),),
    rows=(
        Row((9, 0), "a hold of 150: half on the lot, half on the limit",
            Hold("H1", 150), (0, 0, 0, 150), {"S": (200, 75, 0)}, {"H1": (150, 0, 0)},
            kinds=("hold_placed",)),
        Row((9, 1), "60: 30 on the lot, 25 left of the limit; 50 could be",
            Hold("H2", 60), (0, 0, 0, 150), {"S": (200, 75, 0)}, {"H1": (150, 0, 0)},
            answer=("insufficient-credit", 50, 5)),
        Row((9, 2), "50: that is all of the limit",
            Hold("H3", 50), (0, 0, 0, 100), {"S": (200, 100, 0)},
            {"H1": (150, 0, 0), "H3": (50, 0, 0)}, kinds=("hold_placed",)),
        Row((9, 3), "100 are available, and yet no hold can be: nobody pays the other half",
            Hold("H4", 10), (0, 0, 0, 100), {"S": (200, 100, 0)},
            {"H1": (150, 0, 0), "H3": (50, 0, 0)}, answer=("insufficient-credit", 0, 5)),
        Row((9, 30), "150 under the first hold take what it reserved",
            Total("b", 150, hold="H1"), (150, 75, 75, 100), {"S": (125, 25, 0)},
            {"H1": (0, 0, 150), "H3": (50, 0, 0)}, kinds=("charge",)),
    ),
)

EXPIRY = Scenario(
    "a lot expires once all usage before its end is reported; late hours take back what they need",
    "startup",
    grants=(Grant("E", 100, until=12), Grant("N", 50)),
    rows=(
        Row((9, 30), "30 in Lahore",
            Total("a", 30), (30, 30, 0, 120), {"E": (70, 0, 0), "N": (50, 0, 0)},
            kinds=("charge",)),
        Row((12, 5), "its end has come: no hold can reserve on it, but it is not expired",
            Nothing(), (30, 30, 0, 50), {"E": (70, 0, 0), "N": (50, 0, 0)}),
        Row((12, 10), "Lahore has reported all before 12:00, Karachi has not",
            Reported(lhr=12, khi=11), (30, 30, 0, 50), {"E": (70, 0, 0), "N": (50, 0, 0)}),
        Row((12, 20), "20 in Karachi for the hour of 11:00",
            Total("b", 20, hour=11, hub="khi"), (50, 50, 0, 50), {"E": (50, 0, 0), "N": (50, 0, 0)},
            kinds=("charge",)),
        Row((12, 30), "now Karachi has: the remainder expires",
            Reported(lhr=12, khi=12), (50, 50, 0, 50), {"E": (0, 0, 50), "N": (50, 0, 0)},
            kinds=("expiry",)),
        Row((13, 0), "late, 15 more of that hour: they take 15 back",
            Total("b", 35, hour=11, hub="khi"), (65, 65, 0, 50), {"E": (0, 0, 35), "N": (50, 0, 0)},
            kinds=("expiry_reversed", "charge")),
        Row((13, 10), "late, 60 of another bucket: all that expired, then the lot that never ends",
            Total("c", 60, hour=11), (125, 125, 0, 25), {"E": (0, 0, 0), "N": (25, 0, 0)},
            kinds=("expiry_reversed", "charge")),
        Row((13, 20), "40 of these are refunded: 25 to N; the 15 that return to E expire again",
            Total("c", 60, hour=11, refunded=40), (85, 85, 0, 50),
            {"E": (0, 0, 15), "N": (50, 0, 0)}, kinds=("charge", "expiry")),
        Row((13, 30), "an hour after its end does not reach it",
            Total("d", 60, hour=12), (145, 135, 10, 0), {"E": (0, 0, 15), "N": (0, 0, 0)},
            kinds=("charge",)),
    ),
)

ABOVE_SHARE = Scenario(
    "a lower total returns first what stands above its share",
    "startup",
    grants=(Grant("S", 100, percent=40), Grant("G", 100, first=1)),
    rows=(
        Row((9, 30), "100: 40 and 60",
            Total("b", 100), (100, 100, 0, 100), {"S": (60, 0, 0), "G": (40, 0, 0)},
            kinds=("charge",)),
        Row((9, 40), "corrected to 50: the subsidy keeps 20, the newest draw returns the other 30",
            Total("b", 50, revision=1), (50, 50, 0, 150), {"S": (80, 0, 0), "G": (70, 0, 0)},
            kinds=("charge",)),
        Row((9, 41), "the same total stated late changes nothing",
            Total("b", 100), (50, 50, 0, 150), {"S": (80, 0, 0), "G": (70, 0, 0)}),
        Row((9, 50), "all of it refunded",
            Total("b", 50, refunded=50, revision=1), (0, 0, 0, 200),
            {"S": (100, 0, 0), "G": (100, 0, 0)}, kinds=("charge",)),
    ),
)

MOVED_AND_SHORT = Scenario(
    "what holds had reserved on a lot that expires moves, in the order of placing, or is short",
    "commercial",
    limit=30,
    grants=(Grant("A", 100, until=12), Grant("B", 40, first=1)),
    rows=(
        Row((9, 0), "70 on A",
            Hold("H1", 70), (0, 0, 0, 100), {"A": (100, 70, 0), "B": (40, 0, 0)},
            {"H1": (70, 0, 0)}, kinds=("hold_placed",)),
        Row((9, 1), "30 on A, 20 on B",
            Hold("H2", 50), (0, 0, 0, 50), {"A": (100, 100, 0), "B": (40, 20, 0)},
            {"H1": (70, 0, 0), "H2": (50, 0, 0)}, kinds=("hold_placed",)),
        Row((12, 30), "A expires: H1 moves 20 to B, 30 to the limit; it is short of 20, H2 of 30",
            Reported(lhr=12, khi=12), (0, 0, 0, 0), {"A": (0, 0, 100), "B": (40, 40, 0)},
            {"H1": (50, 20, 0), "H2": (20, 30, 0)}, kinds=("hold_moved", "hold_moved", "expiry")),
        Row((12, 40), "new credit does not heal that",
            Grant("C", 100, first=2), (0, 0, 0, 100),
            {"A": (0, 0, 100), "B": (40, 40, 0), "C": (100, 0, 0)},
            {"H1": (50, 20, 0), "H2": (20, 30, 0)}, kinds=("grant",)),
        Row((12, 50), "60 under H1: its 20 on B, 40 of C; so it gives up the 30 on the limit too",
            Total("b", 60, hour=12, hold="H1"), (60, 60, 0, 90),
            {"A": (0, 0, 100), "B": (20, 20, 0), "C": (60, 0, 0)},
            {"H1": (0, 20, 60), "H2": (20, 30, 0)}, kinds=("charge",)),
        Row((12, 55), "given back, H2 frees its 20",
            Release("H2"), (60, 60, 0, 110), {"A": (0, 0, 100), "B": (20, 0, 0), "C": (60, 0, 0)},
            {"H1": (0, 20, 60)}, kinds=("hold_released",)),
    ),
)

MOVED_BY_SHARE = Scenario(
    "what moves keeps to the share of the lot it moves to",
    "commercial",
    limit=100,
    grants=(Grant("A", 40, until=12), Grant("B", 40, first=1, percent=50)),
    rows=(
        Row((9, 0), "40 on A",
            Hold("H", 40), (0, 0, 0, 140), {"A": (40, 40, 0), "B": (40, 0, 0)}, {"H": (40, 0, 0)},
            kinds=("hold_placed",)),
        Row((12, 30), "A expires: B takes half of 40, the limit the rest",
            Reported(lhr=12, khi=12), (0, 0, 0, 100), {"A": (0, 0, 40), "B": (40, 20, 0)},
            {"H": (40, 0, 0)}, kinds=("hold_moved", "expiry")),
    ),
)

GROWN_BACK = Scenario(
    "a refund gives back to the open hold what had been drawn from it",
    "commercial",
    limit=50,
    grants=(Grant("G", 100),),
    rows=(
        Row((9, 0), "80 on G",
            Hold("H", 80), (0, 0, 0, 70), {"G": (100, 80, 0)}, {"H": (80, 0, 0)},
            kinds=("hold_placed",)),
        Row((9, 30), "120 under it: 40 past it",
            Total("b", 120, hold="H"), (120, 100, 20, 30), {"G": (0, 0, 0)}, {"H": (0, 0, 120)},
            kinds=("charge",)),
        Row((9, 40), "30 refunded: they go to what was drawn past it",
            Total("b", 120, refunded=30, hold="H"), (90, 90, 0, 60), {"G": (10, 0, 0)},
            {"H": (0, 0, 90)}, kinds=("charge",)),
        Row((9, 50), "40 more: 10 heal the rest of that, the hold reserves the other 30 again",
            Total("b", 120, refunded=70, hold="H"), (50, 50, 0, 70), {"G": (50, 30, 0)},
            {"H": (30, 0, 50)}, kinds=("charge",)),
    ),
)

PAST_FIRST = Scenario(
    "what was drawn past a hold is made good first: the unfunded before the lots",
    "startup",
    grants=(Grant("S", 100, percent=40), Grant("G", 36, first=1)),
    rows=(
        Row((9, 0), "24 on S, 36 on G",
            Hold("H", 60), (0, 0, 0, 76), {"S": (100, 24, 0), "G": (36, 36, 0)}, {"H": (60, 0, 0)},
            kinds=("hold_placed",)),
        Row((9, 30), "100 under it: S 40, G 36, 24 unfunded; it gives up all, 40 are past it",
            Total("b", 100, hold="H"), (100, 76, 24, 60), {"S": (60, 0, 0), "G": (0, 0, 0)},
            {"H": (0, 0, 100)}, kinds=("charge",)),
        Row((9, 40), "corrected to 50: S 20, unfunded 24, G 6 return: 40 made good, 10 reserved",
            Total("b", 50, hold="H", revision=1), (50, 50, 0, 76),
            {"S": (80, 4, 0), "G": (6, 6, 0)}, {"H": (10, 0, 50)}, kinds=("charge",)),
        Row((9, 50), "to 0: all that it promised stands again",
            Total("b", 0, hold="H", revision=2), (0, 0, 0, 76),
            {"S": (100, 24, 0), "G": (36, 36, 0)}, {"H": (60, 0, 0)}, kinds=("charge",)),
    ),
)

RETURNED_TO_EXPIRED = Scenario(
    "what returns to a lot that is past cannot be reserved again: the hold is short of it",
    "startup",
    grants=(Grant("E", 10, until=12),),
    rows=(
        Row((9, 0), "10 on E",
            Hold("H", 10), (0, 0, 0, 0), {"E": (10, 10, 0)}, {"H": (10, 0, 0)},
            kinds=("hold_placed",)),
        Row((9, 30), "10 under it",
            Total("b", 10, hour=9, hold="H"), (10, 10, 0, 0), {"E": (0, 0, 0)}, {"H": (0, 0, 10)},
            kinds=("charge",)),
        Row((12, 30), "nothing is left that could expire",
            Reported(lhr=12, khi=12), (10, 10, 0, 0), {"E": (0, 0, 0)}, {"H": (0, 0, 10)}),
        Row((12, 31), "5 refunded expire at once",
            Total("b", 10, hour=9, refunded=5, hold="H"), (5, 5, 0, 0), {"E": (0, 0, 5)},
            {"H": (0, 5, 5)}, kinds=("charge", "expiry")),
        Row((12, 32), "new credit of 3",
            Grant("F", 3), (5, 5, 0, 3), {"E": (0, 0, 5), "F": (3, 0, 0)}, {"H": (0, 5, 5)},
            kinds=("grant",)),
        Row((12, 33), "3 under it, which it had not promised",
            Total("c", 3, hour=12, hold="H"), (8, 8, 0, 0), {"E": (0, 0, 5), "F": (0, 0, 0)},
            {"H": (0, 5, 8)}, kinds=("charge",)),
        Row((12, 34), "these refunded: that makes good what was drawn past it, and no more",
            Total("c", 3, hour=12, refunded=3, hold="H"), (5, 5, 0, 3),
            {"E": (0, 0, 5), "F": (3, 0, 0)}, {"H": (0, 5, 5)}, kinds=("charge",)),
    ),
)

INTERLEAVED = Scenario(
    "draws return newest first also where one lot was drawn from twice",
    "commercial",
    grants=(Grant("A", 30, first=0), Grant("B", 30, first=1)),
    rows=(
        Row((9, 0), "20 on A",
            Hold("H", 20), (0, 0, 0, 40), {"A": (30, 20, 0), "B": (30, 0, 0)}, {"H": (20, 0, 0)},
            kinds=("hold_placed",)),
        Row((9, 1), "another reserves 10 on A, 10 on B",
            Hold("I", 20), (0, 0, 0, 20), {"A": (30, 30, 0), "B": (30, 10, 0)},
            {"H": (20, 0, 0), "I": (20, 0, 0)}, kinds=("hold_placed",)),
        Row((9, 10), "40 under H: A 20, B 20",
            Total("b", 40, hold="H"), (40, 40, 0, 0), {"A": (10, 10, 0), "B": (10, 10, 0)},
            {"H": (0, 0, 40), "I": (20, 0, 0)}, kinds=("charge",)),
        Row((9, 11), "I is given back",
            Release("I"), (40, 40, 0, 20), {"A": (10, 0, 0), "B": (10, 0, 0)}, {"H": (0, 0, 40)},
            kinds=("hold_released",)),
        Row((9, 12), "10 more: A 10",
            Total("b", 50, hold="H"), (50, 50, 0, 10), {"A": (0, 0, 0), "B": (10, 0, 0)},
            {"H": (0, 0, 50)}, kinds=("charge",)),
        Row((9, 20), "all refunded: A 10 and B 20 make good 30 past it, the older 20 of A are kept",
            Total("b", 50, refunded=50, hold="H"), (0, 0, 0, 40),
            {"A": (30, 20, 0), "B": (30, 0, 0)}, {"H": (20, 0, 0)}, kinds=("charge",)),
    ),
)

REVERSAL = Scenario(
    "a grant is reversed while nothing stands on it",
    "startup",
    grants=(Grant("G1", 100), Grant("G2", 50, until=12), Grant("G3", 40)),
    rows=(
        Row((9, 0), "G1 was a mistake",
            Reverse("G1"), (0, 0, 0, 90), {"G2": (50, 0, 0), "G3": (40, 0, 0)},
            kinds=("reversal",)),
        Row((9, 1), "only once",
            Reverse("G1"), (0, 0, 0, 90), {"G2": (50, 0, 0), "G3": (40, 0, 0)},
            answer=("already-reversed",)),
        Row((9, 2), "and for good",
            Reverse("reversal"), (0, 0, 0, 90), {"G2": (50, 0, 0), "G3": (40, 0, 0)},
            answer=("is-reversal",)),
        Row((9, 30), "10 charged",
            Total("b", 10), (10, 10, 0, 80), {"G2": (40, 0, 0), "G3": (40, 0, 0)},
            kinds=("charge",)),
        Row((9, 31), "G2 has paid already",
            Reverse("G2"), (10, 10, 0, 80), {"G2": (40, 0, 0), "G3": (40, 0, 0)},
            answer=("already-drawn", 10)),
        Row((9, 32), "usage is corrected where it is metered",
            Reverse("charge"), (10, 10, 0, 80), {"G2": (40, 0, 0), "G3": (40, 0, 0)},
            answer=("correct-in-metering",)),
        Row((9, 33), "a hold over both",
            Hold("H", 60), (10, 10, 0, 20), {"G2": (40, 40, 0), "G3": (40, 20, 0)},
            {"H": (60, 0, 0)}, kinds=("hold_placed",)),
        Row((9, 34), "a hold stands on G3",
            Reverse("G3"), (10, 10, 0, 20), {"G2": (40, 40, 0), "G3": (40, 20, 0)},
            {"H": (60, 0, 0)}, answer=("reserved",)),
        Row((9, 35), "a hold is given back, not reversed",
            Reverse("hold_placed"), (10, 10, 0, 20), {"G2": (40, 40, 0), "G3": (40, 20, 0)},
            {"H": (60, 0, 0)}, answer=("not-reversible",)),
        Row((9, 36), "given back",
            Release("H"), (10, 10, 0, 80), {"G2": (40, 0, 0), "G3": (40, 0, 0)},
            kinds=("hold_released",)),
        Row((9, 40), "the 10 were void",
            Total("b", 0, revision=1), (0, 0, 0, 90), {"G2": (50, 0, 0), "G3": (40, 0, 0)},
            kinds=("charge",)),
        Row((12, 30), "G2 expires",
            Reported(lhr=12, khi=12), (0, 0, 0, 40), {"G2": (0, 0, 50), "G3": (40, 0, 0)},
            kinds=("expiry",)),
        Row((12, 40), "reversed all the same: first it is taken back from breakage",
            Reverse("G2"), (0, 0, 0, 40), {"G3": (40, 0, 0)},
            kinds=("expiry_reversed", "reversal")),
    ),
)

INVOICED = Scenario(
    "what is invoiced is corrected in invoicing; it counts against the limit, and returns to it",
    "commercial",
    limit=100,
    rows=(
        Row((9, 30), "60 owed",
            Total("b", 60), (60, 0, 60, 40), {}, kinds=("charge",)),
        Row((9, 40), "40 billed",
            Invoiced("d", 40), (60, 0, 60, 40), {}, kinds=("invoiced",)),
        Row((9, 41), "not by a reversal",
            Reverse("invoiced"), (60, 0, 60, 40), {}, answer=("correct-in-invoicing",)),
        Row((9, 50), "all of it refunded: 40 are a credit until the credit note",
            Total("b", 60, refunded=60), (0, 0, 0, 100), {}, kinds=("charge",)),
    ),
)
# fmt: on

SCENARIOS = (
    SUBSIDY,
    FLOORS,
    ONE_HUB,
    PROJECT_AND_CLASS,
    HOLD_AND_SHARE,
    EXPIRY,
    ABOVE_SHARE,
    MOVED_AND_SHORT,
    MOVED_BY_SHARE,
    GROWN_BACK,
    PAST_FIRST,
    RETURNED_TO_EXPIRED,
    INTERLEAVED,
    REVERSAL,
    INVOICED,
)
