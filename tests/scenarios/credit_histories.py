"""Random histories of credit in the words of the tables, the same for the same number.

For what is too slow for thousands of examples (a database): each history is made to meet much, with
lots that end while holds stand on them, usage that is late, refunds, and requests that are refused.
What comes next is chosen by how a core desk stands, as a client chooses by what it was answered.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Literal

from scenarios.credit_desks import CoreDesk, Time
from scenarios.ledger_credits import (
    Deed,
    Grant,
    Hold,
    Invoiced,
    Nothing,
    Release,
    Reported,
    Reverse,
    Scenario,
    Total,
)

_WEIGHTS = {
    "charge": 7,
    "lower": 5,
    "again": 1,
    "hold": 7,
    "release": 2,
    "grant": 3,
    "report": 5,
    "bill": 1,
    "reverse": 2,
    "hour": 4,
}
"""How often each is tried; one that cannot be lets an hour pass."""
_HUBS, _PROJECTS, _CLASSES = ("lhr", "khi"), ("main", "lab"), ("on_demand", "spot")


class History:
    """One book from 9:00 on: `opening`, then one step after another."""

    def __init__(self, number: int) -> None:
        self._random = Random(number)
        kind: Literal["commercial", "startup"] = "commercial" if number % 2 else "startup"
        limit = self._random.choice((0, 40, 100)) if kind == "commercial" else 0
        self._names = 0
        lots = tuple(self._grant(8) for _ in range(3))
        title = f"random history {number}"
        self.opening = Scenario(title, kind, (), grants=lots, limit=limit, unit_micro=1)
        self.core = CoreDesk(self.opening)
        """Whoever follows the history has it do each step."""
        self.time: Time = (9, 0)
        self._marks = (8, 8)
        self._totals: dict[str, Total] = {}
        self._older: list[Total] = []

    def step(self) -> tuple[Deed, ...]:
        """What happens next, at `time`: one deed, or several totals in one batch."""
        hour, minute = self.time
        self.time = (hour, minute + 1)
        what = self._random.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        if what in ("charge", "lower"):
            batch = [self._total(what) for _ in range(self._random.choice((1, 1, 1, 2, 4)))]
            return tuple(batch)
        deed = self._deed(what)
        if deed is None:
            self.time = (hour + 1, 0)
        return (deed or Nothing(),)

    def _deed(self, what: str) -> Deed | None:
        hour, random, ledger = self.time[0], self._random, self.core.ledger
        standing = [*self.core.seen(self.time).holds]
        match what:
            case "again" if self._older:
                return random.choice(self._older)
            case "hold":
                until = hour + random.randint(1, 3) if random.random() < 0.4 else None
                price_class = random.choice((None, *_CLASSES))
                hub, project = random.choice(_HUBS), random.choice(_PROJECTS)
                return Hold(
                    self._name("h"), random.randint(1, 40), hub, project, price_class, until
                )
            case "release" if ledger.holds:
                # Now and then one that has ended.
                return Release(random.choice([*standing, *standing, *ledger.holds]))
            case "grant":
                return self._grant(hour)
            case "report":
                return self._report(hour)
            case "bill" if ledger.book.receivable_micro > 1:
                return Invoiced(self._name("d"), random.randint(1, ledger.book.receivable_micro))
            case "reverse":
                grants = [entry.grant.grant_id for entry in ledger.entries if entry.grant]
                others = {entry.kind for entry in ledger.entries if entry.kind in _OTHERS}
                return Reverse(random.choice([*grants, *sorted(others)])) if grants else None
            case _:
                return None

    def _name(self, letter: str) -> str:
        self._names += 1
        return f"{letter}{self._names}"

    def _grant(self, hour: int) -> Grant:
        random = self._random
        since = random.choice((None, hour, hour + 1))
        until = None if random.random() < 0.3 else (since or hour) + random.randint(1, 3)
        return Grant(
            self._name("g"),
            random.randint(1, 150),
            random.randint(0, 1),
            since,
            until,
            random.choice((100, 100, 50, 40, 33, 1)),
            hubs=self._some(_HUBS),
            projects=self._some(_PROJECTS),
            classes=self._some(_CLASSES),
        )

    def _some(self, members: tuple[str, ...]) -> tuple[str, ...]:
        return (self._random.choice(members),) if self._random.random() < 0.15 else ()

    def _report(self, hour: int) -> Reported:
        """Watermarks rise to about now; seldom a hub has none."""
        lhr, khi = (max(mark, hour - self._random.randint(-1, 1)) for mark in self._marks)
        self._marks = lhr, khi
        silent = self._random.random() < 0.1
        return Reported(lhr, None if silent else khi, swept=self._random.random() < 0.8)

    def _total(self, what: str) -> Total:
        """A bucket grows, or begins, mostly under a hold; or less is owed of one."""
        random = self._random
        held = [*self.core.seen(self.time).holds, *self.core.ledger.holds, None]
        hold = random.choice(held[:3] if random.random() < 0.7 else held)
        if what == "lower" and self._totals:
            before = random.choice(list(self._totals.values()))
            if random.random() < 0.5:
                part = random.randint(0, before.total - before.refunded)
                stated = replace(before, refunded=before.refunded + part, hold=hold)
            else:
                total, revision = random.randint(0, before.total + 5), before.revision + 1
                refunded = random.choice((0, 0, total // 4))
                stated = replace(
                    before, total=total, refunded=refunded, revision=revision, hold=hold
                )
        else:
            number = random.randint(0, 7)
            hour = self.time[0] - number % 3
            fresh = Total(f"b{number}.{hour}", 0, hour, 0, 0, None, *_terms(number))
            before = self._totals.get(fresh.bucket, fresh)
            stated = replace(before, total=before.total + random.randint(1, 30), hold=hold)
        self._totals[stated.bucket] = stated
        self._older.append(stated)
        return stated


_OTHERS = ("reversal", "charge", "invoiced", "hold_placed")
"""What is not reversed."""


def _terms(number: int) -> tuple[str, str, str]:
    return _HUBS[number % 2], _PROJECTS[number // 2 % 2], _CLASSES[number // 4]
