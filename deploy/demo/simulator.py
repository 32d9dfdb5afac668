"""Three hubs play one past month in event time: fixed seed, fixed dates. Pure.

Each hub has four nodes of eight GPUs; a node's GPUs are let in lanes of four, two and two, and on
each lane one run follows the other. Commercial tenants compute from the first day, those who live
on grants from `GRANTS_FROM_MS`. One node carries a SKU that no price list names yet, and one run is
disputed: its device was sold to somebody else for an hour. A bad network (`stream.disturb`)
resends, re-chunks and shuffles what is reported.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

import seed
from demo.stream import (
    DAY_MS,
    Cause,
    Disturbance,
    Node,
    PlannedEvent,
    Rank,
    daily_instants,
    disturb,
    order_plan,
    run_events,
    watermark_event,
    whole_slices,
)
from hisab_contracts import events
from hisab_contracts.ids import AllocationId, DeviceId, NodeId, Sku
from hisab_contracts.units import HOUR_MS, month_bounds_ms

SEED: Final = 1947
MONTH: Final = seed.FIRST_MONTH
FROM_MS, UNTIL_MS = month_bounds_ms(MONTH)
GRANTS_FROM_MS: Final = FROM_MS + 4 * DAY_MS
"""The first hour of 5 July in Karachi."""
EPOCH: Final = "e1"
NODES: Final = tuple(
    Node(hub, NodeId(f"n{number:02d}")) for hub in seed.HUBS for number in range(4)
)
GPUS: Final = 8
LANES: Final = ((0, 1, 2, 3), (4, 5), (6, 7))
NEW_SKU: Final = Sku("mi300x-192")
NEW_SKU_PKR: Final = 980
NEW_SKU_HUB: Final = seed.ISLAMABAD
# A hub that is added to the seed has the last of these until it is given its own.
_SKU_OF_HUB: Final = {seed.LAHORE: seed.H100, seed.KARACHI: seed.A100, seed.ISLAMABAD: seed.L40S}
SKU_OF_NODE: Final[Mapping[Node, Sku]] = {
    **{node: _SKU_OF_HUB.get(node.hub, seed.L40S) for node in NODES},
    Node(seed.KARACHI, NodeId("n03")): seed.H200,
    Node(seed.ISLAMABAD, NodeId("n02")): seed.B200,
    Node(NEW_SKU_HUB, NodeId("n03")): NEW_SKU,
}
PRICE_CLASSES: Final = (*[seed.ON_DEMAND] * 3, seed.RESERVED, seed.SPOT)
"""Drawn from: three runs of five are on demand."""
CAUSES: Final[tuple[Cause, ...]] = ("user", "user", "user", "limit", "preemption")
DISPUTED_NODE: Final = Node(seed.KARACHI, NodeId("n01"))
DISPUTED_RUN: Final = AllocationId("disputed-run")
DISPUTED_AT_MS: Final = FROM_MS + 10 * DAY_MS
NETWORK: Final = Disturbance(SEED, resend_pct=3, rechunk_pct=4, shuffle_ms=HOUR_MS)


@dataclass(frozen=True, slots=True)
class Month:
    """Everything that is reported, in emission order, and where the story's turns fall."""

    plan: tuple[PlannedEvent, ...]
    first_days_until_ms: int = GRANTS_FROM_MS
    unknown_until_ms: int = FROM_MS + 16 * DAY_MS
    kill_at_ms: int = FROM_MS + 22 * DAY_MS


def plan_month() -> Month:
    """Return the simulated month; the same one every time."""
    plan = [event for node in NODES for event in _node_events(node)]
    disputed = _dispute(plan)
    # Added after the disturbance: a resent or re-chunked dispute would be two quarantined records.
    return Month(tuple(order_plan([*disturb(plan, NETWORK), disputed])))


def gpu_names(node: Node, numbers: Iterable[int]) -> list[DeviceId]:
    """Name some of a node's GPUs."""
    return [DeviceId(f"GPU-{node.hub}-{node.node_id}-{number}") for number in numbers]


def _node_events(node: Node) -> Iterator[PlannedEvent]:
    for at_ms in daily_instants(FROM_MS, UNTIL_MS):
        yield watermark_event(node, EPOCH, at_ms)
    dice = random.Random(f"{SEED}:{node.hub}:{node.node_id}")  # noqa: S311 -- No secret.
    for number, lane in enumerate(LANES):
        yield from _lane_events(node, number, lane, dice)


def _lane_events(
    node: Node, number: int, lane: tuple[int, ...], dice: random.Random
) -> Iterator[PlannedEvent]:
    """Fill one lane with runs of 3 to 40 hours and idle times of up to 8."""
    count, at_ms = 0, FROM_MS
    while True:
        start_ms = at_ms + dice.randrange(8 * HOUR_MS)
        end_ms = min(start_ms + dice.randrange(3 * HOUR_MS, 40 * HOUR_MS), UNTIL_MS)
        if end_ms - start_ms < HOUR_MS:
            return
        funded = start_ms >= GRANTS_FROM_MS and dice.randrange(100) < 55
        tenant_id = dice.choice(seed.FUNDED if funded else seed.COMMERCIAL)
        count += 1
        run = events.Interval(
            hub=node.hub,
            node_id=node.node_id,
            tenant_id=tenant_id,
            allocation_id=AllocationId(f"{node.hub}-{node.node_id}-{number}-{count:03d}"),
            sku=SKU_OF_NODE[node],
            price_class=dice.choice(PRICE_CLASSES),
            state="running",
            devices=whole_slices(gpu_names(node, lane)),
            start_ms=start_ms,
            end_ms=end_ms,
        )
        yield from run_events(node.source(EPOCH), run, dice.choice(CAUSES))
        at_ms = end_ms


def _dispute(plan: list[PlannedEvent]) -> PlannedEvent:
    """Sell a device that is already let to somebody else for an hour in the middle of a run."""
    for event in plan:
        fact = event.fact
        if (
            isinstance(fact, events.Interval)
            and (fact.hub, fact.node_id) == DISPUTED_NODE
            and fact.start_ms >= DISPUTED_AT_MS
            and fact.start_ms % DAY_MS == 6 * HOUR_MS
            and fact.end_ms - fact.start_ms == HOUR_MS
        ):
            claim = msgspec.structs.replace(
                fact,
                tenant_id=next(name for name in seed.COMMERCIAL if name != fact.tenant_id),
                allocation_id=DISPUTED_RUN,
                devices=fact.devices[:1],
            )
            # Hours late, so that the first claim is surely the one that is covered.
            late_ms = fact.end_ms + 6 * HOUR_MS
            return PlannedEvent(late_ms, Rank.USAGE, event.source, DISPUTED_RUN, claim)
    raise ValueError("the simulated month has no run to dispute")
