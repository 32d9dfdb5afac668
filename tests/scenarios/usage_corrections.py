"""The worked example of corrections: one day of an allocation, step by step.

Amounts are in PKR (h100 on demand: 840 per GPU-hour), GPU time in half hours of a device, hours are
UTC of 31 July 2025. Every step says what a hub says and what an operator sees afterwards. The fifth
step of the example is a refund, and changes none of these accounts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from unit.metering.hub_events import HOUR_MS, NOON_MS, correction, interval

A, B = "indus-foundry", "khyber-media"
HALF_GPU_NS = 1_800_000_000_000
PKR = 1_000_000


class Accounts(NamedTuple):
    """Half hours of a device; reported is the sum of the others."""

    reported: int
    billed: int
    duplicate: int = 0
    quarantined: int = 0
    voided: int = 0


@dataclass(frozen=True)
class Step:
    """One row of the worked example."""

    number: int
    says: list[dict[str, Any]]
    accounts: Accounts
    charged: dict[str, int]
    """By tenant."""
    buckets: dict[tuple[str, int], tuple[int, int]]
    """(tenant, hour) → (revision, PKR) of the buckets that the step states anew."""


def at(hour: int, minute: int = 0) -> int:
    """An instant of that day."""
    return NOON_MS + (hour - 10) * HOUR_MS + minute * 60_000


DAY = [interval(at(hour), at(hour + 1), tenant_id=A) for hour in (10, 11, 12)]

STEPS = (
    Step(1, DAY, Accounts(6, 6), {A: 2520}, {(A, hour): (0, 840) for hour in (10, 11, 12)}),
    Step(
        2,
        [correction(at(11), at(11, 30), revision=1)],
        Accounts(6, 5, voided=1),
        {A: 2100},
        {(A, 11): (1, 420)},
    ),
    Step(3, DAY, Accounts(12, 5, duplicate=6, voided=1), {A: 2100}, {}),
    Step(
        4,
        [correction(at(12), at(13), revision=2, replacement={"tenant_id": B})],
        Accounts(12, 5, duplicate=6, voided=1),
        {A: 1260, B: 840},
        {(A, 12): (1, 0), (B, 12): (0, 840)},
    ),
    Step(
        6,
        [correction(at(12), at(13), revision=1)],
        Accounts(12, 5, duplicate=6, voided=1),
        {A: 1260, B: 840},
        {},
    ),
)
