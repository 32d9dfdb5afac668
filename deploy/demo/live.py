"""Hubs emit live: real time, real intervals, and a balance that falls while one looks.

One tenant's run is the probe: about ten times a second it reports what it used since the last time,
and the moment is taken at which the ledger's balance has reached what all probes so far must cost.
Everything is on real clocks; no service is given a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec

import seed
from demo import readback, simulator
from demo.api import Json
from demo.scenes import HELD_HUB, HELD_TENANT, ONE_GPU_HOUR_MICRO, SceneError, Stage, place_hold
from demo.screen import pkr, pkr_between
from demo.stream import (
    Node,
    Numbering,
    cut_at_hours,
    ended_event,
    interval_event,
    watermark_event,
    whole_slices,
)
from hisab_contracts import events
from hisab_contracts.ids import AllocationId, HoldId, NodeId, TenantId
from hisab_contracts.units import gpu_ns, hour_floor_ms, rated_micro

PROBE_TENANT: Final = seed.FLOOD_WATCH
_PROBE_NODE: Final = Node(HELD_HUB, NodeId("n00"))
_HELD_NODE: Final = Node(HELD_HUB, NodeId("n01"))
_HELD_RUN: Final = AllocationId("live-held")
_PROBE_S: Final = 0.085
_BEAT_S: Final = 1.0
_LOOK_S: Final = 0.01
_PATIENCE_S: Final = 300
_LEAST_MS: Final = 20


@dataclass
class Probe:
    """What the probes so far must cost, and which of them are not visible yet."""

    charged_before_micro: int
    used_gpu_ns: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    """By UTC hour: a bucket is rated as a whole, so the cost of many parts is not their sum."""
    unseen: deque[tuple[int, float]] = field(default_factory=deque)
    """What must be charged before a probe is visible, and when it was sent."""
    delays_ms: list[int] = field(default_factory=list)

    def expect(self, start_ms: int, end_ms: int, shares_ppm: int, sent_s: float) -> None:
        """Add a probe that was sent at a moment of the monotonic clock."""
        for from_ms, until_ms in cut_at_hours(start_ms, end_ms):
            self.used_gpu_ns[hour_floor_ms(from_ms)] += gpu_ns(from_ms, until_ms, shares_ppm)
        cost_micro = sum(
            rated_micro(used, ONE_GPU_HOUR_MICRO) for used in self.used_gpu_ns.values()
        )
        self.unseen.append((self.charged_before_micro + cost_micro, sent_s))

    def observe(self, charged_micro: int, seen_s: float) -> None:
        """Take the delay of every probe that a balance with this much charged contains."""
        while self.unseen and self.unseen[0][0] <= charged_micro:
            self.delays_ms.append(int((seen_s - self.unseen.popleft()[1]) * 1000))


async def emit_live(stage: Stage, numbering: Numbering, seconds: float) -> dict[str, int]:
    """Emit for some seconds; return the freshness figures."""
    api = stage.api
    before = await readback.read_balance(api, PROBE_TENANT)
    probe = Probe(int(before["charged_micro"]))
    hold_id = await place_hold(stage, _HELD_RUN, ONE_GPU_HOUR_MICRO)
    stop = asyncio.Event()
    with stage.screen.live() as show:
        watching = asyncio.create_task(_watch_balance(stage, probe, stop, show))
        beating = asyncio.create_task(_emit_other_nodes(stage, numbering, stop, HoldId(hold_id)))
        try:
            await _emit_probe(stage, numbering, probe, seconds)
            # All runs end before the balance is read a last time: nothing may still be moving.
            stop.set()
            await beating
            await _wait_until_visible(probe)
        finally:
            stop.set()
            watching.cancel()
            beating.cancel()
            await asyncio.gather(watching, beating, return_exceptions=True)
    await stage.wait_until_drained()
    after = await readback.read_balance(api, PROBE_TENANT)
    held = await api.get("ledger", f"/v1/holds/{hold_id}", "scheduler")
    _show_change(stage, before, after, str(held["state"]))
    return freshness_of(probe.delays_ms)


def freshness_of(delays_ms: list[int]) -> dict[str, int]:
    """Return how many probes there were, and their 50th and 99th percentile."""
    ranked = sorted(delays_ms)
    if not ranked:
        return {"samples": 0, "p50": 0, "p99": 0}
    last = len(ranked) - 1
    return {
        "samples": len(ranked),
        "p50": ranked[len(ranked) // 2],
        "p99": ranked[min(last, len(ranked) * 99 // 100)],
    }


def _show_change(stage: Stage, before: Json, after: Json, hold_state: str) -> None:
    had, has = int(before["available_micro"]), int(after["available_micro"])
    stage.screen.say(
        f"{PROBE_TENANT}: available {pkr(had)} -> {pkr(has)} PKR, {pkr_between(had, has)} used live"
    )
    stage.screen.say(f"the held run of {HELD_TENANT} has ended: its hold is {hold_state}")


async def _emit_probe(stage: Stage, numbering: Numbering, probe: Probe, seconds: float) -> None:
    """Report the probe's use again and again; then its run ends."""
    run = _live_run(_PROBE_NODE, PROBE_TENANT, AllocationId("live-flood"), None)
    shares_ppm = sum(device.share_ppm for device in run.devices)
    source = _PROBE_NODE.source(simulator.EPOCH)
    began_ms = cursor_ms = _now_ms()
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        await asyncio.sleep(_PROBE_S)
        end_ms = _now_ms()
        if end_ms - cursor_ms < _LEAST_MS:  # The wall clock was set back, or hardly moved.
            continue
        part = msgspec.structs.replace(run, start_ms=cursor_ms, end_ms=end_ms)
        probe.expect(cursor_ms, end_ms, shares_ppm, time.monotonic())
        plan = [interval_event(source, part)]
        if end_ms // 1000 != cursor_ms // 1000:
            plan.append(watermark_event(_PROBE_NODE, simulator.EPOCH, end_ms))
        await stage.emitter.emit(numbering.write_records(plan))
        cursor_ms = end_ms
    whole = msgspec.structs.replace(run, start_ms=began_ms, end_ms=cursor_ms)
    plan = [
        ended_event(source, whole, "user"),
        watermark_event(_PROBE_NODE, simulator.EPOCH, cursor_ms),
    ]
    await stage.emitter.emit(numbering.write_records(plan))


async def _emit_other_nodes(
    stage: Stage, numbering: Numbering, stop: asyncio.Event, hold_id: HoldId
) -> None:
    """Every second all other nodes report their run and a watermark; then the runs end."""
    began_ms = cursor_ms = _now_ms()
    runs = {node: _run_of(node, hold_id) for node in simulator.NODES if node != _PROBE_NODE}
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _BEAT_S)
        # At least a millisecond: an interval of no length would be refused.
        end_ms = max(_now_ms(), cursor_ms + 1)
        plan = []
        for node, run in runs.items():
            part = msgspec.structs.replace(run, start_ms=cursor_ms, end_ms=end_ms)
            plan.append(interval_event(node.source(simulator.EPOCH), part))
            plan.append(watermark_event(node, simulator.EPOCH, end_ms))
        await stage.emitter.emit(numbering.write_records(plan))
        cursor_ms = end_ms
    ended = []
    for node, run in runs.items():
        whole = msgspec.structs.replace(run, start_ms=began_ms, end_ms=cursor_ms)
        ended.append(ended_event(node.source(simulator.EPOCH), whole, "user"))
    await stage.emitter.emit(numbering.write_records(ended))


async def _watch_balance(
    stage: Stage, probe: Probe, stop: asyncio.Event, show: Callable[[str], None]
) -> None:
    """Look at the balance again and again; show it now and then."""
    shown, pause_s = 0.0, 0.1 if stage.screen.is_terminal else 2.0
    while not stop.is_set() or probe.unseen:
        balance = await readback.read_balance(stage.api, PROBE_TENANT, f"tenant:{PROBE_TENANT}")
        now = time.monotonic()
        probe.observe(int(balance["charged_micro"]), now)
        if now - shown > pause_s:
            shown = now
            figures = freshness_of(probe.delays_ms)
            show(
                f"{PROBE_TENANT}: available {pkr(balance['available_micro'])} PKR"
                f" | event to balance p50 {figures['p50']} ms, p99 {figures['p99']} ms"
                f" of {figures['samples']}"
            )
        await asyncio.sleep(_LOOK_S)


async def _wait_until_visible(probe: Probe) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while probe.unseen:
        if time.monotonic() > deadline:
            raise SceneError(f"{len(probe.unseen)} live events are not visible in the balance")
        await asyncio.sleep(_LOOK_S)


def _run_of(node: Node, hold_id: HoldId) -> events.Interval:
    """Choose who computes on a node; the held run has the hold, which ends with it."""
    if node == _HELD_NODE:
        return _live_run(node, HELD_TENANT, _HELD_RUN, hold_id)
    tenant_id = seed.COMMERCIAL[int(node.node_id[1:])]
    return _live_run(node, tenant_id, AllocationId(f"live-{node.hub}-{node.node_id}"), None)


def _live_run(
    node: Node, tenant_id: TenantId, allocation_id: AllocationId, hold_id: HoldId | None
) -> events.Interval:
    """Return a run on all GPUs of a node, on demand, its times still to be filled in."""
    return events.Interval(
        hub=node.hub,
        node_id=node.node_id,
        tenant_id=tenant_id,
        allocation_id=allocation_id,
        sku=simulator.SKU_OF_NODE[node],
        price_class=seed.ON_DEMAND,
        state="running",
        devices=whole_slices(simulator.gpu_names(node, range(simulator.GPUS))),
        start_ms=0,
        end_ms=0,
        hold_id=hold_id,
    )


def _now_ms() -> int:
    """Read the clock: the demo is an outsider, and may not import the kit's."""
    return time.time_ns() // 1_000_000
