"""Watermarks: up to when a hub is complete, and how that is stated downstream.

Theory. A hub is complete up to the minimum of the watermarks of its active sources. That minimum is
only a *candidate*: on a partition that lags behind there may be a source not yet seen, or usage
older than the candidate. So it counts after a **barrier**: every partition of the hub's topic has
been read up to the end that the broker named after the watermarks were committed. By then whatever
was in the topic when the sources spoke has been metered, and every source that had spoken is known.
What passes never goes back. Lateness, month close and grant expiry hang on the passed value only.

A hub none of whose sources is active any more (all retired) holds nobody up: it is complete up to
the present hour. Undecodable records belong to no source and block nobody.

A *statement* is a `HubWatermark`, the message downstream. A hub is stated again when its watermark
or its open quarantined time changes, and otherwise (also when metering was compared with the
ledger) at most every second. Readers ignore a revision
that is not higher than the last, so revisions follow the clock: metering that was restored from a
backup, or rebuilt, has forgotten the latest ones, and its statements must count all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from hisab_contracts.charges import HubWatermark, OpenQuarantine, ReconcileResult, SourceBehind
from hisab_contracts.ids import UNKNOWN_TOPIC, HubCode, TopicId
from hisab_contracts.units import hour_floor_ms, instant_text
from metering.core.sources import SourceProgress

MAX_BEHIND: Final = 20
MAX_QUARANTINED: Final = 2_000
"""Items of open quarantined time in one statement: they surely fit a message of the broker."""
RESTATE_AFTER_MS: Final = 1_000
SILENT_HEARTBEATS: Final = 2


@dataclass(frozen=True, slots=True)
class Barrier:
    """A candidate, and how far the topic must be read before it counts."""

    candidate_ms: int
    end_offsets: Mapping[int, int]
    """Partition number → end offset, as observed after the candidate was committed."""
    topic_id: TopicId = UNKNOWN_TOPIC
    """The log these are offsets in; "" where the broker does not say."""


@dataclass(frozen=True, slots=True)
class HubView:
    """What is committed about one hub at one instant."""

    hub: HubCode
    heartbeat_ms: int
    watermark_ms: int | None
    """What has passed a barrier so far."""
    last_seen_ms: int
    """Kafka timestamp of its latest record; when it was registered, if there is none."""
    sources: Sequence[SourceProgress]
    """Its active sources."""
    emitted: bool
    """Whether any source of it was ever seen: only then does it count."""
    ever_seen: bool
    """Whether any record of it was ever read, even one that belongs to no source."""
    quarantined: Sequence[OpenQuarantine]
    """Open quarantined time per tenant we know and billing month, in order."""
    last_statement: HubWatermark | None = None
    """What was stated downstream last; None: nothing yet."""
    stated_ms: int = 0
    """When that was stated, by our clock."""
    reconciled: ReconcileResult | None = None
    """What the last comparison with the ledger found, of all hubs; None: there was none."""


class HubCompleteness(NamedTuple):
    """Up to when a hub is complete, and whether it counts: only once it has emitted."""

    hub: HubCode
    watermark_ms: int | None
    emitted: bool


def least_watermark_ms(watermarks: Collection[int | None]) -> int | None:
    """Return the least of these watermarks; None while one is missing, or if there is none."""
    known = [watermark_ms for watermark_ms in watermarks if watermark_ms is not None]
    return min(known) if known and len(known) == len(watermarks) else None


def complete_until_ms(hubs: Iterable[HubCompleteness]) -> int | None:
    """Return up to when all these hubs are complete; those that never emitted do not count."""
    return least_watermark_ms([hub.watermark_ms for hub in hubs if hub.emitted])


def candidate_ms(view: HubView, now_ms: int) -> int | None:
    """Return the minimum over active sources, or None while one of them has no watermark."""
    if not view.emitted:
        return None
    if not view.sources:
        return hour_floor_ms(now_ms)
    return least_watermark_ms([source.watermark_ms for source in view.sources])


def has_passed(barrier: Barrier, next_offsets: Mapping[int, int]) -> bool:
    """Say whether every partition has been read up to the barrier."""
    return all(
        next_offsets.get(partition, 0) >= end_offset
        for partition, end_offset in barrier.end_offsets.items()
    )


def passed_ms(view: HubView, barrier: Barrier, now_ms: int) -> int | None:
    """Return the hub's watermark after a barrier was passed.

    Sources that were first seen since the barrier was raised count, too: they can hold the hub.
    """
    now_candidate_ms = candidate_ms(view, now_ms)
    if now_candidate_ms is None:
        # A source without a watermark appeared behind the barrier: it holds the hub where it is.
        return view.watermark_ms
    reached_ms = min(barrier.candidate_ms, now_candidate_ms)
    return reached_ms if view.watermark_ms is None else max(view.watermark_ms, reached_ms)


def is_silent(view: HubView, now_ms: int) -> bool:
    """Say whether nothing came from the hub for two of its heartbeats."""
    return now_ms - view.last_seen_ms > SILENT_HEARTBEATS * view.heartbeat_ms


def statement_due(view: HubView, now_ms: int, *, anew: bool = False) -> HubWatermark | None:
    """Return what must be stated downstream now, or None when nothing that matters has changed.

    `anew` is for partitions downstream that were told nothing yet: all is stated.
    """
    if not view.emitted:
        return None
    last, statement = view.last_statement, statement_of(view, now_ms)
    if last is None or anew:
        return statement
    if (statement.watermark_ms, statement.quarantined) != (last.watermark_ms, last.quarantined):
        return statement  # The close of months hangs on these two: they are stated at once.
    plain = (statement.silent, statement.behind, statement.reconciled)
    if plain == (last.silent, last.behind, last.reconciled):
        return None
    return statement if now_ms - view.stated_ms >= RESTATE_AFTER_MS else None


def statement_of(view: HubView, now_ms: int) -> HubWatermark:
    """Return all that there is to state about a hub that has emitted.

    The revision is above every one stated before, those that a restored database forgot included.
    """
    last = view.last_statement
    return HubWatermark(
        hub=view.hub,
        revision=now_ms if last is None else max(last.revision + 1, now_ms),
        watermark_ms=view.watermark_ms,
        silent=is_silent(view, now_ms),
        quarantined=bound_quarantined(view.quarantined),
        behind=[
            SourceBehind(source.path, source.watermark_ms, trouble or "the furthest behind")
            for source, trouble in _deciding(view, now_ms)
        ],
        reconciled=view.reconciled,
    )


def bound_quarantined(quarantined: Sequence[OpenQuarantine]) -> list[OpenQuarantine]:
    """Return at most `MAX_QUARANTINED` items, with the same sum for every month.

    The time of tenants that are left out is added to the first tenant of the same month. So each
    month stays open until all of its time is released or dismissed. Every month keeps an item:
    there are fewer months from 2020 to 2100 than items that may be stated. Equal items in equal
    order give an equal result, so nothing is stated again that has not changed.
    """
    if len(quarantined) <= MAX_QUARANTINED:
        return list(quarantined)
    firsts: dict[str, OpenQuarantine] = {}
    for item in quarantined:
        firsts.setdefault(item.month, item)
    others = [item for item in quarantined if firsts[item.month] is not item]
    kept = MAX_QUARANTINED - len(firsts)
    more: Counter[str] = Counter()
    for item in others[kept:]:
        more[item.month] += item.quarantined_gpu_ns
    return [
        *(
            OpenQuarantine(item.tenant_id, month, item.quarantined_gpu_ns + more[month])
            for month, item in firsts.items()
        ),
        *others[:kept],
    ]


def blocking_sources(view: HubView, now_ms: int) -> list[SourceBehind]:
    """Return the sources that keep their hub from going on: none while all report in step."""
    return [
        SourceBehind(source.path, source.watermark_ms, trouble)
        for source, trouble in _troubles(view, now_ms)
        if trouble is not None
    ][:MAX_BEHIND]


def _deciding(view: HubView, now_ms: int) -> list[tuple[SourceProgress, str | None]]:
    """Return the sources that decide the minimum and those in trouble, furthest behind first."""
    least_ms = candidate_ms(view, now_ms)
    return [
        (source, trouble)
        for source, trouble in _troubles(view, now_ms)
        if trouble is not None or source.watermark_ms == least_ms
    ][:MAX_BEHIND]


def _troubles(view: HubView, now_ms: int) -> list[tuple[SourceProgress, str | None]]:
    """Return every active source and what is wrong with it, furthest behind first."""
    furthest_ms = max((source.watermark_ms or 0 for source in view.sources), default=0)
    patience_ms = SILENT_HEARTBEATS * view.heartbeat_ms
    return [
        (source, _trouble(source, now_ms, furthest_ms, patience_ms))
        for source in sorted(view.sources, key=_behind_key)
    ]


def _trouble(source: SourceProgress, now_ms: int, furthest_ms: int, patience_ms: int) -> str | None:
    """Say why a source does not go on, in one sentence; None when it is in step."""
    if source.beyond:
        first, until = source.gaps[0]
        missing = str(first) if until == first + 1 else f"{first} to {until - 1}"
        return f"gap: sequence {missing} is missing"
    if source.watermark_ms is None:
        return "no watermark yet"
    if now_ms - source.last_seen_ms > patience_ms:
        return f"silent since {instant_text(source.last_seen_ms)}"
    if furthest_ms - source.watermark_ms > patience_ms:
        return f"behind the others: its watermark is {instant_text(source.watermark_ms)}"
    return None


def _behind_key(source: SourceProgress) -> tuple[int, str]:
    return (-1 if source.watermark_ms is None else source.watermark_ms), source.path
