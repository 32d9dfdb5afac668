"""What nodes say, in which order, under which sequence number, as bytes for a hub's topic.

Pure. A plan is a list of `Said`: facts with the instant at which their source says them. `disturb`
resends, re-chunks and shuffles a plan the way a bad network would, without saying anything new and
without passing a watermark. `Numbering` gives each fact its place in its source's sequence and
writes it as a CloudEvent; a resend is the very same record again.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final

import msgspec

from hisab_contracts import events
from hisab_contracts.ids import HubCode, NodeId
from hisab_contracts.units import instant_text

STARTED_FIRST: Final = 0
USAGE: Final = 1
AGAIN: Final = 2
ENDED: Final = 3
WATERMARK_LAST: Final = 4
"""Ranks at one instant: a watermark comes after everything it promises to have followed."""

HEADERS: Final = (("content-type", b"application/cloudevents+json"),)
"""Headers of every event in structured mode."""

_ENCODER: Final = msgspec.json.Encoder()
_text_of: Final = lru_cache(maxsize=4096)(instant_text)

SaidFact = events.Interval | events.Started | events.Ended | events.Watermark


class Said(msgspec.Struct, frozen=True, gc=False):
    """One fact and the instant (event time) at which its source says it."""

    order_ms: int
    rank: int
    source: str
    subject: str
    fact: SaidFact

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
    shuffle_ms: int = 6 * 3_600_000


class _Event(msgspec.Struct):
    """CloudEvents 1.0, structured mode."""

    specversion: str
    type: str
    source: str
    id: str
    time: str
    sequence: str
    datacontenttype: str
    data: SaidFact
    subject: str | msgspec.UnsetType = msgspec.UNSET


def source_of(hub: str, node_id: str, epoch: str) -> str:
    """Return the source of one node's agent in one epoch."""
    return f"/hubs/{hub}/nodes/{node_id}/epochs/{epoch}"


def interval_said(source: str, fact: events.Interval) -> Said:
    """An interval is said when it ends."""
    return Said(fact.end_ms, USAGE, source, fact.allocation_id, fact)


def watermark_said(source: str, watermark_ms: int) -> Said:
    """A watermark is said at its instant, after all else."""
    _, _, hub, _, node_id, _, _ = source.split("/")
    fact = events.Watermark(hub=HubCode(hub), node_id=NodeId(node_id), watermark_ms=watermark_ms)
    return Said(watermark_ms, WATERMARK_LAST, source, "", fact)


def hourly(start_ms: int, end_ms: int) -> Iterator[tuple[int, int]]:
    """Cut [start, end) at UTC hours."""
    while start_ms < end_ms:
        until_ms = min(end_ms, start_ms - start_ms % 3_600_000 + 3_600_000)
        yield start_ms, until_ms
        start_ms = until_ms


class Numbering:
    """Gives each source's facts 1, 2, 3 ... in the order they are said, and writes them."""

    def __init__(self) -> None:
        self._last: defaultdict[str, int] = defaultdict(int)
        self._written: dict[tuple[str, str, int, int], Record] = {}

    def record(self, said: Said) -> Record:
        """Write what is said; a resend (rank AGAIN) returns the record of its original."""
        fact = said.fact
        if isinstance(fact, events.Interval):
            name = (said.source, said.subject, fact.start_ms, fact.end_ms)
            if said.rank == AGAIN:
                return msgspec.structs.replace(self._written[name], order_ms=said.order_ms)
            record = self._write(said, counts=True)
            self._written[name] = record
            return record
        return self._write(said, counts=False)

    def _write(self, said: Said, *, counts: bool) -> Record:
        self._last[said.source] += 1
        sequence = self._last[said.source]
        node_path = said.source.rpartition("/epochs/")[0]
        event = _Event(
            specversion="1.0",
            type=type_of(said.fact),
            source=said.source,
            id=f"{said.fact.hub}-{said.fact.node_id}-{sequence}"[:128],
            time=_text_of(said.order_ms),
            sequence=f"{sequence:020d}",
            datacontenttype="application/json",
            data=said.fact,
            subject=said.subject or msgspec.UNSET,
        )
        value = _ENCODER.encode(event)
        return Record(said.fact.hub, node_path.encode(), value, said.order_ms, counts)


def type_of(fact: SaidFact) -> str:
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


def disturb(plan: Iterable[Said], how: Disturbance) -> list[Said]:
    """Resend, re-chunk and shuffle intervals; say nothing new and pass no watermark.

    The union of what is reported per device stays the same, so everything that is billed does too.
    """
    per_source: defaultdict[str, list[Said]] = defaultdict(list)
    for said in plan:
        per_source[said.source].append(said)
    disturbed: list[Said] = []
    for source, items in per_source.items():
        dice = random.Random(f"{how.seed}:{source}")  # noqa: S311 -- A disturbance, no secret.
        disturbed.extend(_disturb_source(items, how, dice))
    return disturbed


def in_order(plan: Iterable[Said]) -> list[Said]:
    """Return a plan in emission order."""
    return sorted(plan, key=lambda said: said.key)


def _disturb_source(items: Sequence[Said], how: Disturbance, dice: random.Random) -> Iterator[Said]:
    limits = sorted(said.order_ms for said in items if said.rank == WATERMARK_LAST)
    runs: defaultdict[str, list[events.Interval]] = defaultdict(list)
    source = items[0].source
    for said in items:
        if isinstance(said.fact, events.Interval):
            runs[said.subject].append(said.fact)
        else:
            yield said
    for run in runs.values():
        for fact in _rechunked(run, how, dice, limits):
            late_ms = _later(fact.end_ms, how, dice, limits)
            yield Said(late_ms, USAGE, source, fact.allocation_id, fact)
            if dice.randrange(100) < how.resend_pct:
                again_ms = _later(late_ms, how, dice, limits)
                yield Said(again_ms, AGAIN, source, fact.allocation_id, fact)


def _later(order_ms: int, how: Disturbance, dice: random.Random, limits: Sequence[int]) -> int:
    """Delay within the bound, but never past the source's next watermark."""
    delayed_ms = order_ms + dice.randint(0, how.shuffle_ms)
    place = bisect_left(limits, order_ms)
    return min(delayed_ms, limits[place]) if place < len(limits) else delayed_ms


def _rechunked(
    run: Sequence[events.Interval], how: Disturbance, dice: random.Random, limits: Sequence[int]
) -> Iterator[events.Interval]:
    """Cut some intervals in two or three, and join some to the next one of the same allocation."""
    waiting: events.Interval | None = None
    for fact in sorted(run, key=lambda interval: interval.start_ms):
        if waiting is not None:
            joined = _joined(waiting, fact, limits)
            if joined is not None:
                waiting = None
                yield joined
                continue
            yield waiting
            waiting = None
        roll = dice.randrange(100)
        if roll < how.rechunk_pct:
            yield from _cut(fact, dice)
        elif roll < 2 * how.rechunk_pct:
            waiting = fact
        else:
            yield fact
    if waiting is not None:
        yield waiting


def _cut(fact: events.Interval, dice: random.Random) -> Iterator[events.Interval]:
    inner = {dice.randint(fact.start_ms, fact.end_ms) for _ in range(2)}
    edges = sorted({fact.start_ms, fact.end_ms, *inner})
    for start_ms, end_ms in pairwise(edges):
        yield msgspec.structs.replace(fact, start_ms=start_ms, end_ms=end_ms)


def _joined(
    first: events.Interval, second: events.Interval, limits: Sequence[int]
) -> events.Interval | None:
    """Join two that touch and claim the same, unless a watermark was said between them."""
    joined = msgspec.structs.replace(first, end_ms=second.end_ms)
    if msgspec.structs.replace(second, start_ms=first.start_ms) != joined:
        return None
    if first.end_ms != second.start_ms:
        return None
    place = bisect_left(limits, first.start_ms + 1)
    if place < len(limits) and limits[place] < second.end_ms:
        return None
    return joined


def counted(records: Iterable[Record]) -> int:
    """Return how many of these records `records.sent` counts."""
    return sum(record.counts for record in records)
