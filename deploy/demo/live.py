"""Hubs emit live: real time, real intervals, and a balance that falls while one looks.

One tenant's run is the probe: about ten times a second it reports what it used since the last time,
and the moment is taken at which the ledger's balance has reached what all probes so far must cost.
Everything is on real clocks; no service is told a time.
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

from demo import readback, simulator
from demo.replay import HUBS
from demo.scenes import HELD_SKU, HELD_TENANT, ONE_GPU_HOUR_MICRO, SceneError, Stage, place_hold
from demo.screen import pkr
from demo.stream import Numbering, hourly, interval_said, watermark_said
from hisab_contracts import events
from hisab_contracts.ids import (
    AllocationId,
    DeviceId,
    HoldId,
    HubCode,
    NodeId,
    PriceClass,
    Sku,
    SliceId,
    TenantId,
)
from hisab_contracts.units import gpu_ns, hour_floor_ms, rated_micro

PROBE_TENANT: Final = "flood-watch"
_PROBE: Final = ("lhr", "n00")
_HELD: Final = ("lhr", "n01")
_PROBE_S: Final = 0.085
_BEAT_S: Final = 1.0
_LOOK_S: Final = 0.01
_PATIENCE_S: Final = 15
_LEAST_MS: Final = 20


@dataclass
class Probe:
    """What the probes so far must cost, and which of them are not visible yet."""

    charged_before_micro: int
    used_gpu_ns: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    waiting: deque[tuple[int, float]] = field(default_factory=deque)
    seen_ms: list[int] = field(default_factory=list)

    def reported(self, start_ms: int, end_ms: int, shares_ppm: int, at_s: float) -> None:
        """A probe was sent at a moment of the monotonic clock."""
        for from_ms, until_ms in hourly(start_ms, end_ms):
            self.used_gpu_ns[hour_floor_ms(from_ms)] += gpu_ns(from_ms, until_ms, shares_ppm)
        used = self.used_gpu_ns.values()
        must = sum(rated_micro(part, ONE_GPU_HOUR_MICRO) for part in used)
        self.waiting.append((self.charged_before_micro + must, at_s))

    def seen(self, charged_micro: int, at_s: float) -> None:
        """The balance shows this much charged."""
        while self.waiting and self.waiting[0][0] <= charged_micro:
            self.seen_ms.append(int((at_s - self.waiting.popleft()[1]) * 1000))


async def live(stage: Stage, numbering: Numbering, seconds: float) -> dict[str, int]:
    """Emit for some seconds; return the freshness figures."""
    api = stage.api
    before = await api.get("ledger", f"/v1/tenants/{PROBE_TENANT}/balance", "auditor")
    probe = Probe(int(before["charged_micro"]))
    hold_id = await place_hold(stage, HELD_TENANT, "live-held", ONE_GPU_HOUR_MICRO)
    stop = asyncio.Event()
    with stage.screen.live() as show:
        watching = asyncio.create_task(_watch(stage, probe, stop, show))
        beating = asyncio.create_task(_beat(stage, numbering, stop, hold_id))
        try:
            await _probe(stage, numbering, probe, seconds)
            stop.set()
            await beating
            await _settled(probe)
        finally:
            stop.set()
            watching.cancel()
            beating.cancel()
            await asyncio.gather(watching, beating, return_exceptions=True)
    await readback.drained(api, stage.emitter.sent)
    after = await api.get("ledger", f"/v1/tenants/{PROBE_TENANT}/balance", "auditor")
    held = await api.get("ledger", f"/v1/holds/{hold_id}", "scheduler")
    _say_what_happened(stage, before, after, str(held["state"]))
    return freshness(probe.seen_ms)


def freshness(seen_ms: list[int]) -> dict[str, int]:
    """Return how many probes there were, and their 50th and 99th percentile."""
    ranked = sorted(seen_ms)
    if not ranked:
        return {"samples": 0, "p50": 0, "p99": 0}
    last = len(ranked) - 1
    return {
        "samples": len(ranked),
        "p50": ranked[len(ranked) // 2],
        "p99": ranked[min(last, len(ranked) * 99 // 100)],
    }


def _say_what_happened(
    stage: Stage, before: dict[str, object], after: dict[str, object], hold: str
) -> None:
    fell = int(str(before["available_micro"])) - int(str(after["available_micro"]))
    stage.screen.say(
        f"{PROBE_TENANT}: available {pkr(str(before['available_micro']))}"
        f" -> {pkr(str(after['available_micro']))} PKR, {pkr(fell)} used live"
    )
    stage.screen.say(f"the held run of {HELD_TENANT} has ended: its hold is {hold}")


async def _probe(stage: Stage, numbering: Numbering, probe: Probe, seconds: float) -> None:
    """Report the probe's use again and again; then its run ends."""
    run = _run(_PROBE, PROBE_TENANT, "live-flood", None)
    shares_ppm = sum(device.share_ppm for device in run.devices)
    source = simulator.source(*_PROBE)
    began_ms = cursor_ms = _now_ms()
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        await asyncio.sleep(_PROBE_S)
        end_ms = _now_ms()
        if end_ms - cursor_ms < _LEAST_MS:
            continue
        part = msgspec.structs.replace(run, start_ms=cursor_ms, end_ms=end_ms)
        probe.reported(cursor_ms, end_ms, shares_ppm, time.monotonic())
        said = [interval_said(source, part)]
        if end_ms // 1000 != cursor_ms // 1000:
            said.append(watermark_said(source, end_ms))
        await stage.emitter.emit([numbering.record(one) for one in said])
        cursor_ms = end_ms
    whole = msgspec.structs.replace(run, start_ms=began_ms, end_ms=cursor_ms)
    said = [simulator.ended_said(source, whole, "user"), watermark_said(source, cursor_ms)]
    await stage.emitter.emit([numbering.record(one) for one in said])


async def _beat(stage: Stage, numbering: Numbering, stop: asyncio.Event, hold_id: str) -> None:
    """Every second each other node reports its run and says a watermark; then the runs end."""
    nodes = [(hub, node) for hub in HUBS for node in simulator.NODES if (hub, node) != _PROBE]
    began_ms = _now_ms()
    runs = {node: _run(node, *_live_run(node, hold_id)) for node in nodes}
    cursor_ms = began_ms
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _BEAT_S)
        end_ms = max(_now_ms(), cursor_ms + 1)
        said = []
        for node, run in runs.items():
            source = simulator.source(*node)
            part = msgspec.structs.replace(run, start_ms=cursor_ms, end_ms=end_ms)
            said += [interval_said(source, part), watermark_said(source, end_ms)]
        await stage.emitter.emit([numbering.record(one) for one in said])
        cursor_ms = end_ms
    ended = [
        simulator.ended_said(
            simulator.source(*node),
            msgspec.structs.replace(run, start_ms=began_ms, end_ms=cursor_ms),
            "user",
        )
        for node, run in runs.items()
    ]
    await stage.emitter.emit([numbering.record(one) for one in ended])


async def _watch(
    stage: Stage, probe: Probe, stop: asyncio.Event, show: Callable[[str], None]
) -> None:
    """Look at the balance again and again; show it now and then."""
    shown, pause_s = 0.0, 0.1 if stage.screen.is_terminal else 2.0
    while not stop.is_set() or probe.waiting:
        balance = await stage.api.get(
            "ledger", f"/v1/tenants/{PROBE_TENANT}/balance", f"tenant:{PROBE_TENANT}"
        )
        now = time.monotonic()
        probe.seen(int(balance["charged_micro"]), now)
        if now - shown > pause_s:
            shown = now
            figures = freshness(probe.seen_ms)
            show(
                f"{PROBE_TENANT}: available {pkr(balance['available_micro'])} PKR"
                f" | event to balance p50 {figures['p50']} ms, p99 {figures['p99']} ms"
                f" of {figures['samples']}"
            )
        await asyncio.sleep(_LOOK_S)


async def _settled(probe: Probe) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while probe.waiting:
        if time.monotonic() > deadline:
            raise SceneError(f"{len(probe.waiting)} live events are not visible in the balance")
        await asyncio.sleep(_LOOK_S)


def _live_run(node: tuple[str, str], hold_id: str) -> tuple[str, str, HoldId | None]:
    if node == _HELD:
        return HELD_TENANT, "live-held", HoldId(hold_id)
    tenants = ("indus-foundry", "chenab-robotics", "makran-logistics", "khyber-media")
    hub, node_id = node
    return tenants[int(node_id[1:])], f"live-{hub}-{node_id}", None


def _run(
    node: tuple[str, str], tenant: str, allocation_id: str, hold_id: HoldId | None
) -> events.Interval:
    hub, node_id = node
    names = [f"GPU-{hub}-{node_id}-{gpu}" for gpu in range(simulator.GPUS)]
    return events.Interval(
        hub=HubCode(hub),
        node_id=NodeId(node_id),
        tenant_id=TenantId(tenant),
        allocation_id=AllocationId(allocation_id),
        sku=Sku(HELD_SKU if hub == "lhr" else simulator.SKU_OF_NODE[node]),
        price_class=PriceClass("on_demand"),
        state="running",
        devices=[events.Device(DeviceId(name), SliceId(name), 1_000_000) for name in names],
        start_ms=0,
        end_ms=0,
        hold_id=hold_id,
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
