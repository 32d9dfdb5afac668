"""Three hubs play one past month in event time: fixed seed, fixed dates. Pure.

Each hub has four nodes of eight GPUs; a node's GPUs are let in lanes of four, two and two, and on
each lane one run follows the other. Commercial tenants compute from the first day, those who live
on grants from `GRANTS_FROM_MS`. One node carries a SKU that no price list names yet, and one run is
disputed: its device was sold to somebody else for an hour. A bad network (`stream.disturb`)
resends, re-chunks and shuffles what is said.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from demo.replay import COMMERCIAL, GRANTED, HUBS
from demo.stream import (
    ENDED,
    STARTED_FIRST,
    USAGE,
    Disturbance,
    Said,
    disturb,
    hourly,
    in_order,
    interval_said,
    source_of,
    watermark_said,
)
from hisab_contracts import events
from hisab_contracts.ids import (
    AllocationId,
    DeviceId,
    HubCode,
    NodeId,
    PriceClass,
    Sku,
    SliceId,
    TenantId,
)
from hisab_contracts.units import HOUR_MS, gpu_ns, month_bounds_ms

SEED: Final = 1947
MONTH: Final = "2025-07"
FROM_MS, UNTIL_MS = month_bounds_ms(MONTH)
DAY_MS: Final = 24 * HOUR_MS
GRANTS_FROM_MS: Final = FROM_MS + 4 * DAY_MS
"""The first hour of 5 July in Karachi."""
EPOCH: Final = "e1"
NODES: Final = ("n00", "n01", "n02", "n03")
GPUS: Final = 8
LANES: Final = ((0, 1, 2, 3), (4, 5), (6, 7))
NEW_SKU: Final = Sku("mi300x-192")
NEW_SKU_PKR: Final = 980
SKU_OF_NODE: Final[Mapping[tuple[str, str], str]] = {
    **{("lhr", node_id): "h100-sxm-80" for node_id in NODES},
    **{("khi", node_id): "a100-sxm-80" for node_id in NODES},
    **{("isb", node_id): "l40s-48" for node_id in NODES},
    ("khi", "n03"): "h200-sxm-141",
    ("isb", "n02"): "b200-sxm-180",
    ("isb", "n03"): NEW_SKU,
}
PRICE_CLASSES: Final = ("on_demand", "on_demand", "on_demand", "reserved", "spot")
CAUSES: Final = ("user", "user", "user", "limit", "preemption")
DISPUTED_NODE: Final = ("khi", "n01")
DISPUTED_AT_MS: Final = FROM_MS + 10 * DAY_MS
NETWORK: Final = Disturbance(SEED, resend_pct=3, rechunk_pct=4, shuffle_ms=HOUR_MS)


@dataclass(frozen=True, slots=True)
class Month:
    """All that is said, in emission order, and when the story's turns fall."""

    said: tuple[Said, ...]
    first_days_until_ms: int = GRANTS_FROM_MS
    unknown_until_ms: int = FROM_MS + 16 * DAY_MS
    kill_at_ms: int = FROM_MS + 22 * DAY_MS


def month() -> Month:
    """Return the simulated month; the same one every time."""
    plan = [said for hub in HUBS for node_id in NODES for said in _node(hub, node_id)]
    disputed = _disputed(plan)
    return Month(tuple(in_order([*disturb(plan, NETWORK), disputed])))


def source(hub: str, node_id: str) -> str:
    """Return the source of one of our nodes."""
    return source_of(hub, node_id, EPOCH)


def watermark_instants() -> list[int]:
    """Every node says a watermark at first, each midnight UTC, and at the month's end."""
    return [FROM_MS, *range(FROM_MS - FROM_MS % DAY_MS + DAY_MS, UNTIL_MS, DAY_MS), UNTIL_MS]


def _node(hub: str, node_id: str) -> Iterator[Said]:
    for at_ms in watermark_instants():
        yield watermark_said(source(hub, node_id), at_ms)
    dice = random.Random(f"{SEED}:{hub}:{node_id}")  # noqa: S311 -- A simulation, no secret.
    for number, lane in enumerate(LANES):
        yield from _lane(hub, node_id, number, lane, dice)


def _lane(
    hub: str, node_id: str, number: int, lane: tuple[int, ...], dice: random.Random
) -> Iterator[Said]:
    """Fill one lane with runs of 3 to 40 hours and idle times of up to 8."""
    run, at_ms = 0, FROM_MS
    while True:
        start_ms = at_ms + dice.randrange(8 * HOUR_MS)
        end_ms = min(start_ms + dice.randrange(3 * HOUR_MS, 40 * HOUR_MS), UNTIL_MS)
        if end_ms - start_ms < HOUR_MS:
            return
        granted = start_ms >= GRANTS_FROM_MS and dice.randrange(100) < 55
        tenant = dice.choice(GRANTED if granted else COMMERCIAL)
        run += 1
        devices = [
            events.Device(DeviceId(name), SliceId(name), 1_000_000)
            for name in (f"GPU-{hub}-{node_id}-{gpu}" for gpu in lane)
        ]
        usage = events.Interval(
            hub=HubCode(hub),
            node_id=NodeId(node_id),
            tenant_id=TenantId(tenant),
            allocation_id=AllocationId(f"{hub}-{node_id}-{number}-{run:03d}"),
            sku=Sku(SKU_OF_NODE[hub, node_id]),
            price_class=PriceClass(dice.choice(PRICE_CLASSES)),
            state="running",
            devices=devices,
            start_ms=start_ms,
            end_ms=end_ms,
        )
        yield from run_said(source(hub, node_id), usage, dice.choice(CAUSES))
        at_ms = end_ms


def run_said(where: str, run: events.Interval, cause: str) -> Iterator[Said]:
    """Return one run's start, its hours and its end."""
    yield started_said(where, run)
    for start_ms, end_ms in hourly(run.start_ms, run.end_ms):
        part = msgspec.structs.replace(run, start_ms=start_ms, end_ms=end_ms)
        yield interval_said(where, part)
    yield ended_said(where, run, cause)


def started_said(where: str, run: events.Interval) -> Said:
    """A run began."""
    fact = events.Started(
        hub=run.hub,
        node_id=run.node_id,
        tenant_id=run.tenant_id,
        allocation_id=run.allocation_id,
        sku=run.sku,
        price_class=run.price_class,
        devices=run.devices,
        started_ms=run.start_ms,
        hold_id=run.hold_id,
    )
    return Said(run.start_ms, STARTED_FIRST, where, run.allocation_id, fact)


def ended_said(where: str, run: events.Interval, cause: str) -> Said:
    """A run ended, with the totals that metering compares."""
    shares_ppm = sum(device.share_ppm for device in run.devices)
    fact = msgspec.convert(
        {
            "hub": run.hub,
            "node_id": run.node_id,
            "tenant_id": run.tenant_id,
            "allocation_id": run.allocation_id,
            "ended_ms": run.end_ms,
            "cause": cause,
            "reserved_gpu_ms": gpu_ns(run.start_ms, run.end_ms, shares_ppm) // 1_000_000,
        },
        events.Ended,
    )
    return Said(run.end_ms, ENDED, where, run.allocation_id, fact)


def _disputed(plan: list[Said]) -> Said:
    """Sell a device that is already let to somebody else for an hour in the middle of a run."""
    for said in plan:
        fact = said.fact
        if (
            isinstance(fact, events.Interval)
            and (fact.hub, fact.node_id) == DISPUTED_NODE
            and fact.start_ms >= DISPUTED_AT_MS
            and fact.start_ms % DAY_MS == 6 * HOUR_MS
            and fact.end_ms - fact.start_ms == HOUR_MS
        ):
            other = next(name for name in COMMERCIAL if name != fact.tenant_id)
            claim = msgspec.structs.replace(
                fact,
                tenant_id=TenantId(other),
                allocation_id=AllocationId("disputed-run"),
                devices=fact.devices[:1],
            )
            late_ms = fact.end_ms + 6 * HOUR_MS
            return Said(late_ms, USAGE, said.source, "disputed-run", claim)
    raise ValueError("the simulated month has no run to dispute")
