"""What nodes report: which events, in which order, under which sequence number, in which bytes.

Pure. A plan is a list of `PlannedEvent`: facts, each with the instant at which its source emits it.
`disturb` resends, re-chunks and shuffles a plan the way a bad network would; it adds no usage and
passes no watermark. `Numbering` gives each fact its place in its source's sequence and writes it as
a CloudEvent; a resend is the very same record again.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import pairwise
from typing import Final, Literal, NamedTuple

import msgspec

from hisab_contracts import events
from hisab_contracts.ids import DeviceId, HubCode, NodeId, SliceId
from hisab_contracts.units import (
    HOUR_MS,
    WHOLE_DEVICE_PPM,
    floor_gpu_ms,
    gpu_ns,
    hour_floor_ms,
    instant_text,
)

DAY_MS: Final = 24 * HOUR_MS
HEADERS: Final = (("content-type", b"application/cloudevents+json"),)
"""Headers of every event in structured mode."""

_ENCODER: Final = msgspec.json.Encoder()
_text_of: Final = lru_cache(maxsize=4096)(instant_text)

NodeFact = events.Interval | events.Started | events.Ended | events.Watermark
"""What a node of the demo reports."""
Cause = Literal["user", "limit", "preemption", "infrastructure"]
"""Why a run ended."""


class Rank(IntEnum):
    """The order of what falls on one instant.

    A watermark comes last: it promises that all usage before it has been reported.
    """

    STARTED = 0
    USAGE = 1
    RESENT = 2
    ENDED = 3
    WATERMARK = 4


class Node(NamedTuple):
    """A machine of a hub."""

    hub: HubCode
    node_id: NodeId

    def source(self, epoch: str) -> str:
        """Return the source of this node's agent in one epoch."""
        return f"{self.path}/epochs/{epoch}"

    @property
    def path(self) -> str:
        """The source without its epoch: the Kafka key of everything this node reports."""
        return f"/hubs/{self.hub}/nodes/{self.node_id}"


class PlannedEvent(msgspec.Struct, frozen=True, gc=False):
    """One fact and the instant (event time) at which its source emits it."""

    order_ms: int
    rank: Rank
    source: str
    subject: str
    fact: NodeFact

    @property
    def key(self) -> tuple[int, int, str, int]:
        """Emission order: (instant, rank, allocation, start)."""
        start_ms = self.fact.start_ms if isinstance(self.fact, events.Interval) else 0
        return (self.order_ms, self.rank, self.subject, start_ms)


class Record(msgspec.Struct, frozen=True, gc=False):
    """One record for a hub's topic. `counts`: it is an interval, which `records` count."""

    hub: HubCode
    key: bytes
    value: bytes
    order_ms: int
    counts: bool


@dataclass(frozen=True, slots=True)
class Disturbance:
    """How badly a network treats a plan. Percentages are of the intervals."""

    seed: int
    resend_pct: int = 5
    rechunk_pct: int = 10
    shuffle_ms: int = 6 * HOUR_MS


class _Event(msgspec.Struct):
    """CloudEvents 1.0, structured mode."""

    specversion: str
    type: str
    source: str
    id: str
    time: str
    sequence: str
    datacontenttype: str
    data: NodeFact
    subject: str | msgspec.UnsetType = msgspec.UNSET


def whole_slices(names: Iterable[str], share_ppm: int = WHOLE_DEVICE_PPM) -> list[events.Device]:
    """Return a share of each named device, none of which is cut into slices."""
    return [events.Device(DeviceId(name), SliceId(name), share_ppm) for name in names]


def run_events(source: str, run: events.Interval, cause: Cause) -> Iterator[PlannedEvent]:
    """Return one run's start, its usage cut at UTC hours, and its end.

    `run` is the whole run as if it were one interval: its parts differ from it by their times only.
    """
    yield started_event(source, run)
    for start_ms, end_ms in cut_at_hours(run.start_ms, run.end_ms):
        part = msgspec.structs.replace(run, start_ms=start_ms, end_ms=end_ms)
        yield interval_event(source, part)
    yield ended_event(source, run, cause)


def started_event(source: str, run: events.Interval) -> PlannedEvent:
    """Return the start of a run."""
    fact = events.Started(
        hub=run.hub,
        node_id=run.node_id,
        tenant_id=run.tenant_id,
        allocation_id=run.allocation_id,
        sku=run.sku,
        price_class=run.price_class,
        devices=run.devices,
        started_ms=run.start_ms,
        project_id=run.project_id,
        hold_id=run.hold_id,
    )
    return PlannedEvent(run.start_ms, Rank.STARTED, source, run.allocation_id, fact)


def interval_event(source: str, fact: events.Interval) -> PlannedEvent:
    """Return an interval, emitted when it ends."""
    return PlannedEvent(fact.end_ms, Rank.USAGE, source, fact.allocation_id, fact)


def ended_event(source: str, run: events.Interval, cause: Cause) -> PlannedEvent:
    """Return the end of a run, with the total that metering compares."""
    shares_ppm = sum(device.share_ppm for device in run.devices)
    fact = events.Ended(
        hub=run.hub,
        node_id=run.node_id,
        tenant_id=run.tenant_id,
        allocation_id=run.allocation_id,
        ended_ms=run.end_ms,
        cause=cause,
        reserved_gpu_ms=floor_gpu_ms(gpu_ns(run.start_ms, run.end_ms, shares_ppm)),
        project_id=run.project_id,
    )
    return PlannedEvent(run.end_ms, Rank.ENDED, source, run.allocation_id, fact)


def watermark_event(node: Node, epoch: str, watermark_ms: int) -> PlannedEvent:
    """Return a node's watermark, emitted at its own instant, after all else."""
    fact = events.Watermark(hub=node.hub, node_id=node.node_id, watermark_ms=watermark_ms)
    return PlannedEvent(watermark_ms, Rank.WATERMARK, node.source(epoch), "", fact)


def daily_instants(from_ms: int, until_ms: int) -> list[int]:
    """Return the two instants and every UTC midnight between them: when watermarks are due."""
    first_midnight_ms = from_ms - from_ms % DAY_MS + DAY_MS
    return sorted({from_ms, *range(first_midnight_ms, until_ms + 1, DAY_MS), until_ms})


def cut_at_hours(start_ms: int, end_ms: int) -> Iterator[tuple[int, int]]:
    """Cut [start, end) at UTC hours."""
    while start_ms < end_ms:
        until_ms = min(end_ms, hour_floor_ms(start_ms) + HOUR_MS)
        yield start_ms, until_ms
        start_ms = until_ms


def order_plan(plan: Iterable[PlannedEvent]) -> list[PlannedEvent]:
    """Return a plan in emission order."""
    return sorted(plan, key=lambda event: event.key)


class Numbering:
    """Numbers each source's facts 1, 2, 3 ... in the order of emission, and writes them."""

    def __init__(self) -> None:
        self._last: defaultdict[str, int] = defaultdict(int)
        self._written: dict[tuple[str, str, int, int], Record] = {}

    def write_record(self, event: PlannedEvent) -> Record:
        """Write an event; a resend returns the record of its original, number and all."""
        fact = event.fact
        if isinstance(fact, events.Interval):
            name = (event.source, event.subject, fact.start_ms, fact.end_ms)
            if event.rank == Rank.RESENT:
                return msgspec.structs.replace(self._written[name], order_ms=event.order_ms)
            record = self._write(event, counts=True)
            self._written[name] = record
            return record
        return self._write(event, counts=False)

    def write_records(self, plan: Iterable[PlannedEvent]) -> list[Record]:
        """Write events in the order in which they are emitted."""
        return [self.write_record(event) for event in plan]

    def _write(self, event: PlannedEvent, *, counts: bool) -> Record:
        self._last[event.source] += 1
        sequence = self._last[event.source]
        fact = event.fact
        content = _Event(
            specversion="1.0",
            type=type_of(fact),
            source=event.source,
            id=f"{fact.hub}-{fact.node_id}-{sequence}"[:128],
            time=_text_of(event.order_ms),
            sequence=f"{sequence:020d}",
            datacontenttype="application/json",
            data=fact,
            subject=event.subject or msgspec.UNSET,
        )
        key = Node(fact.hub, fact.node_id).path.encode()
        return Record(fact.hub, key, _ENCODER.encode(content), event.order_ms, counts)


def type_of(fact: NodeFact) -> str:
    """Name the event type of a fact."""
    match fact:
        case events.Interval():
            return events.INTERVAL
        case events.Started():
            return events.STARTED
        case events.Ended():
            return events.ENDED
        case events.Watermark():
            return events.WATERMARK


def count_intervals(records: Iterable[Record]) -> int:
    """Return how many of these records `records.sent` counts."""
    return sum(record.counts for record in records)


def disturb(plan: Iterable[PlannedEvent], disturbance: Disturbance) -> list[PlannedEvent]:
    """Resend, re-chunk and shuffle intervals; add no usage and pass no watermark.

    The union of what is reported per device stays the same, so everything that is billed does too.
    """
    per_source: defaultdict[str, list[PlannedEvent]] = defaultdict(list)
    for event in plan:
        per_source[event.source].append(event)
    disturbed: list[PlannedEvent] = []
    for source, items in per_source.items():
        # Dice of its own per source: what happens to one does not depend on how many there are.
        dice = random.Random(f"{disturbance.seed}:{source}")  # noqa: S311 -- No secret.
        disturbed.extend(_disturb_source(items, disturbance, dice))
    return disturbed


def _disturb_source(
    items: Sequence[PlannedEvent], disturbance: Disturbance, dice: random.Random
) -> Iterator[PlannedEvent]:
    limits = sorted(event.order_ms for event in items if event.rank == Rank.WATERMARK)
    runs: defaultdict[str, list[events.Interval]] = defaultdict(list)
    source = items[0].source
    for event in items:
        if isinstance(event.fact, events.Interval):
            runs[event.subject].append(event.fact)
        else:
            yield event
    for run in runs.values():
        for fact in _rechunk(run, disturbance, dice, limits):
            late_ms = _delay(fact.end_ms, disturbance, dice, limits)
            yield PlannedEvent(late_ms, Rank.USAGE, source, fact.allocation_id, fact)
            if dice.randrange(100) < disturbance.resend_pct:
                again_ms = _delay(late_ms, disturbance, dice, limits)
                yield PlannedEvent(again_ms, Rank.RESENT, source, fact.allocation_id, fact)


def _delay(
    order_ms: int, disturbance: Disturbance, dice: random.Random, limits: Sequence[int]
) -> int:
    """Delay within the bound, but never past the source's next watermark."""
    delayed_ms = order_ms + dice.randint(0, disturbance.shuffle_ms)
    place = bisect_left(limits, order_ms)
    return min(delayed_ms, limits[place]) if place < len(limits) else delayed_ms


def _rechunk(
    run: Sequence[events.Interval],
    disturbance: Disturbance,
    dice: random.Random,
    limits: Sequence[int],
) -> Iterator[events.Interval]:
    """Cut some intervals in two or three, and join some to the next of the same allocation."""
    held_back: events.Interval | None = None
    for fact in sorted(run, key=lambda interval: interval.start_ms):
        if held_back is not None:
            joined = _join(held_back, fact, limits)
            if joined is not None:
                held_back = None
                yield joined
                continue
            yield held_back
            held_back = None
        roll = dice.randrange(100)
        if roll < disturbance.rechunk_pct:
            yield from _cut_at_random(fact, dice)
        elif roll < 2 * disturbance.rechunk_pct:
            held_back = fact
        else:
            yield fact
    if held_back is not None:
        yield held_back


def _cut_at_random(fact: events.Interval, dice: random.Random) -> Iterator[events.Interval]:
    inner = {dice.randint(fact.start_ms, fact.end_ms) for _ in range(2)}
    edges = sorted({fact.start_ms, fact.end_ms, *inner})
    for start_ms, end_ms in pairwise(edges):
        yield msgspec.structs.replace(fact, start_ms=start_ms, end_ms=end_ms)


def _join(
    first: events.Interval, second: events.Interval, limits: Sequence[int]
) -> events.Interval | None:
    """Join two that touch and claim the same, unless a watermark stands between them."""
    joined = msgspec.structs.replace(first, end_ms=second.end_ms)
    if msgspec.structs.replace(second, start_ms=first.start_ms) != joined:
        return None
    if first.end_ms != second.start_ms:
        return None
    # Emitted at its end, the joined interval would report time that the watermark has closed.
    place = bisect_left(limits, first.start_ms + 1)
    if place < len(limits) and limits[place] < second.end_ms:
        return None
    return joined
