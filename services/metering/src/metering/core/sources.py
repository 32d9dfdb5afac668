"""Sources: how far each agent's own count of its events has arrived, and how complete it is.

Theory. A source numbers all its events 1, 2, 3 …. We keep the length of the unbroken beginning
(the *contiguous* sequence) and, beyond the first gap, the ranges seen. A watermark counts once all
before it in the source's own order was seen: until then it is kept in its range. Of a range only
the first and the last watermark matter: the last is what counts once the gap before it closes, and
both say whether another watermark goes back. A retirement takes effect in the same order, so
nothing that is still missing before it is forgotten; it contradicts no watermark, wherever it lies.

Epochs of one node are ordered by first arrival. A new one closes the older ones: they no longer
count for completeness, and what is missing in them stays listed as a gap of the hub. Their usage is
billed all the same: completeness never decides about billing.

Refusals: `WatermarkRegression` for a watermark at a new sequence that contradicts another one,
`SourceNotActive` for the retirement of a source that is closed, retired or was never seen.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

from hisab_contracts import ids
from hisab_contracts.ids import HubCode, SourcePath

MAX_RANGES: Final = 1_000
"""Ranges kept beyond the first gap. What lies past them counts as not seen yet: it is billed, and
the source stays incomplete until its gaps close or a new epoch begins."""

SourceStanding = Literal["active", "closed", "retired"]
"""Closed: by a newer epoch of its node. Retired: by its agent or an operator."""


class SequenceRange(NamedTuple):
    """Sequences `[first, until)` seen beyond the first gap, with the watermarks among them."""

    first_sequence: int
    until_sequence: int
    first_watermark_ms: int | None = None
    last_watermark_ms: int | None = None
    retires: bool = False
    """Whether a retirement is among them."""


class SourceEvent(NamedTuple):
    """One event of a source: its place, and the watermark or retirement it carries, if any."""

    sequence: int
    watermark_ms: int | None = None
    retires: bool = False


@dataclass(slots=True, frozen=True)
class SourceReport:
    """All events of one source in a batch."""

    source: ids.Source
    last_seen_ms: int
    """The latest Kafka timestamp of their records."""
    events: Sequence[SourceEvent]
    """In order of arrival."""


@dataclass(frozen=True, slots=True)
class WatermarkRegression:
    """A watermark that does not fit its place: an earlier one is higher, or a later one lower."""

    path: SourcePath
    sequence: int
    detail: str


@dataclass(frozen=True, slots=True)
class SourceNotActive:
    """Only a source that counts for its hub's completeness can be retired."""

    hub: HubCode
    path: SourcePath


@dataclass(frozen=True, slots=True)
class SourceProgress:
    """All that is known of one source: which of its events arrived, and its watermark."""

    hub: HubCode
    path: SourcePath
    node_path: str
    contiguous_sequence: int = 0
    """Everything up to this sequence was seen."""
    beyond: tuple[SequenceRange, ...] = ()
    """Ascending; none touches its neighbour or the contiguous part."""
    watermark_ms: int | None = None
    """The last watermark within the contiguous part."""
    standing: SourceStanding = "active"
    last_seen_ms: int = 0
    """The latest Kafka timestamp of its records."""

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """Return what is missing, as [first, until) in order."""
        firsts = [self.contiguous_sequence + 1, *(seen.until_sequence for seen in self.beyond[:-1])]
        return [
            (first, seen.first_sequence) for first, seen in zip(firsts, self.beyond, strict=False)
        ]

    def has_seen(self, sequence: int) -> bool:
        """Say whether this sequence arrived before."""
        return sequence <= self.contiguous_sequence or _holds(self.beyond, sequence)


class FoldedSources(NamedTuple):
    """The sources of a batch after its events were folded into them."""

    progress: dict[SourcePath, SourceProgress]
    """Those that were stored first, then new ones in order of first arrival."""
    regressions: list[WatermarkRegression]


def fold_reports(
    stored: Iterable[SourceProgress], reports: Iterable[SourceReport]
) -> FoldedSources:
    """Fold what the sources of a batch reported into what is stored of them.

    `stored` holds every source that has a report, and all active ones of the same nodes: a source
    seen for the first time closes the older epochs of its node.
    """
    progress = {source.path: source for source in stored}
    regressions: list[WatermarkRegression] = []
    for report in reports:
        who = report.source
        if who.path not in progress:
            siblings = [other for other in progress.values() if other.node_path == who.node_path]
            progress |= {closed.path: closed for closed in closed_by_newer(siblings, who.path)}
            progress[who.path] = SourceProgress(who.hub, who.path, who.node_path)
        # A closed epoch's events are folded in, too: its gaps close, although it counts no longer.
        source, refused = observe(progress[who.path], report.events)
        last_seen_ms = max(source.last_seen_ms, report.last_seen_ms)
        progress[who.path] = replace(source, last_seen_ms=last_seen_ms)
        regressions += refused
    return FoldedSources(progress, regressions)


def observe(
    source: SourceProgress, events: Iterable[SourceEvent]
) -> tuple[SourceProgress, list[WatermarkRegression]]:
    """Fold a source's events in the order they arrived; return its new progress, and refusals.

    A sequence seen before changes nothing. The sequence of a refused watermark counts as seen.
    """
    contiguous, watermark_ms = source.contiguous_sequence, source.watermark_ms
    beyond = list(source.beyond)
    standing = source.standing
    refused: list[WatermarkRegression] = []
    for event in events:
        if event.sequence <= contiguous:
            continue
        if event == (contiguous + 1, None, False) and not beyond:
            contiguous += 1  # Nearly always: the next one, and nothing is missing.
            continue
        if _holds(beyond, event.sequence):
            continue
        detail = _contradiction(watermark_ms, beyond, event)
        claimed_ms = event.watermark_ms
        if detail is not None:
            # Its sequence still counts: a bad watermark must not look like a lost event, which
            # would hold the hub's completeness for ever.
            refused.append(WatermarkRegression(source.path, event.sequence, detail))
            claimed_ms = None
        _insert(
            beyond,
            SequenceRange(
                first_sequence=event.sequence,
                until_sequence=event.sequence + 1,
                first_watermark_ms=claimed_ms,
                last_watermark_ms=claimed_ms,
                retires=event.retires,
            ),
        )
        if beyond[0].first_sequence == contiguous + 1:
            reached = beyond.pop(0)
            contiguous = reached.until_sequence - 1
            if reached.retires:
                standing = "retired"
            if reached.last_watermark_ms is not None:
                watermark_ms = reached.last_watermark_ms
        # The last ranges are forgotten, not the first: a gap closes from its beginning.
        del beyond[MAX_RANGES:]
    changed = replace(
        source,
        contiguous_sequence=contiguous,
        beyond=tuple(beyond),
        watermark_ms=watermark_ms,
        standing=standing,
    )
    return changed, refused


def accept_watermark(
    source: SourceProgress, event: SourceEvent
) -> SourceProgress | WatermarkRegression:
    """Add a watermark out of quarantine to its source, or refuse it.

    Its sequence was seen when it first arrived. If that lies beyond the first gap, the watermark is
    kept in its range, as it would have been then. The range no longer says which of its other
    watermarks came before this one: while the gap is open, a watermark is accepted only if it lies
    between the first and the last of them, because then it changes nothing.
    """
    places = range(len(source.beyond))
    own = [place for place in places if _holds(source.beyond[place : place + 1], event.sequence)]
    others = [source.beyond[place] for place in places if place not in own]
    detail = _contradiction(source.watermark_ms, others, event)
    if detail is not None:
        return WatermarkRegression(source.path, event.sequence, detail)
    if event.sequence <= source.contiguous_sequence:
        return replace(source, watermark_ms=event.watermark_ms)
    for place in own:
        seen = _with_watermark(source.beyond[place], event.watermark_ms)
        if seen is not None:
            beyond = (*source.beyond[:place], seen, *source.beyond[place + 1 :])
            return replace(source, beyond=beyond)
    detail = "it has no place while a sequence before it is missing"
    return WatermarkRegression(source.path, event.sequence, detail)


def closed_by_newer(sources: Sequence[SourceProgress], newest: SourcePath) -> list[SourceProgress]:
    """Return the older epochs of a node that a newly seen one closes."""
    return [
        replace(source, standing="closed")
        for source in sources
        if source.path != newest and source.standing == "active"
    ]


def retire(
    hub: HubCode, path: SourcePath, source: SourceProgress | None
) -> SourceProgress | SourceNotActive:
    """Return the source of this path as an operator retires it; `source` is None if never seen.

    From then on it no longer counts for its hub's completeness. What is missing in it stays listed.
    """
    if source is None or source.standing != "active":
        return SourceNotActive(hub, path)
    return replace(source, standing="retired")


def _holds(beyond: Sequence[SequenceRange], sequence: int) -> bool:
    at = bisect_right(beyond, sequence, key=_first)
    return at > 0 and sequence < beyond[at - 1].until_sequence


def _first(seen: SequenceRange) -> int:
    return seen.first_sequence


def _contradiction(
    watermark_ms: int | None, beyond: Sequence[SequenceRange], event: SourceEvent
) -> str | None:
    """Say what a watermark contradicts, if anything: in a source's own order it never goes back."""
    claimed_ms = event.watermark_ms
    if claimed_ms is None:
        return None
    before_ms = watermark_ms
    for seen in beyond:
        if seen.first_sequence > event.sequence:
            if seen.first_watermark_ms is not None and claimed_ms > seen.first_watermark_ms:
                return f"{claimed_ms} lies after {seen.first_watermark_ms}, said at a later place"
        elif seen.last_watermark_ms is not None:
            before_ms = seen.last_watermark_ms
    if before_ms is not None and claimed_ms < before_ms:
        return f"{claimed_ms} lies before {before_ms}, said at an earlier place"
    return None


def _with_watermark(seen: SequenceRange, watermark_ms: int | None) -> SequenceRange | None:
    """Put a watermark at an unknown place of a range; None unless it fits any place."""
    first_ms, last_ms = seen.first_watermark_ms, seen.last_watermark_ms
    if watermark_ms is None or first_ms is None or last_ms is None:
        return seen._replace(first_watermark_ms=watermark_ms, last_watermark_ms=watermark_ms)
    return seen if first_ms <= watermark_ms <= last_ms else None


def _insert(beyond: list[SequenceRange], new: SequenceRange) -> None:
    """Insert a range that overlaps none, joining it with those it touches."""
    at = bisect_right(beyond, new.first_sequence, key=_first)
    beyond.insert(at, new)
    if at + 1 < len(beyond) and beyond[at + 1].first_sequence == new.until_sequence:
        beyond[at : at + 2] = [_join(new, beyond[at + 1])]
    if at > 0 and beyond[at - 1].until_sequence == beyond[at].first_sequence:
        beyond[at - 1 : at + 1] = [_join(beyond[at - 1], beyond[at])]


def _join(lower: SequenceRange, upper: SequenceRange) -> SequenceRange:
    first_ms = lower.first_watermark_ms
    last_ms = upper.last_watermark_ms
    return SequenceRange(
        first_sequence=lower.first_sequence,
        until_sequence=upper.until_sequence,
        first_watermark_ms=upper.first_watermark_ms if first_ms is None else first_ms,
        last_watermark_ms=lower.last_watermark_ms if last_ms is None else last_ms,
        retires=lower.retires or upper.retires,
    )
