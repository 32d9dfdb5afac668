"""Sources: what each agent has said so far, by its own count, and up to when it is complete.

Theory. A source numbers all its events 1, 2, 3 …. We keep the length of the unbroken beginning
(the *contiguous* sequence) and, beyond the first gap, the ranges seen. A watermark counts once all
before it in the source's own order was seen: until then it waits in its range. Of a range only the
first and the last watermark matter: the last is what counts once the gap before it closes, and
both say whether another watermark goes back. A retirement takes effect in the same order, so
nothing that is still missing before it is forgotten; it contradicts no watermark, wherever it lies.

Epochs of one node are ordered by first arrival. A new one closes the older ones: they no longer
count for completeness, and what is missing in them stays listed as a gap of the hub. Their usage is
billed all the same: completeness never decides about billing.

Refusals: `GoesBack` for a watermark at a new sequence that contradicts another one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

from hisab_contracts.ids import HubCode, SourcePath

MAX_RANGES: Final = 1_000
"""Ranges kept beyond the first gap. What lies past them counts as not seen yet: it is billed, and
the source stays incomplete until its gaps close or a new epoch begins."""

Standing = Literal["active", "closed", "retired"]
"""Closed: by a newer epoch of its node. Retired: by its agent or an operator."""


class Seen(NamedTuple):
    """Sequences `[first, until)` seen beyond the first gap, with the watermarks among them."""

    first_sequence: int
    until_sequence: int
    first_watermark_ms: int | None = None
    last_watermark_ms: int | None = None
    retires: bool = False
    """Whether a retirement is among them."""


class Said(NamedTuple):
    """One event of a source: its place, and the watermark or retirement it carries, if any."""

    sequence: int
    watermark_ms: int | None = None
    retires: bool = False


@dataclass(frozen=True, slots=True)
class GoesBack:
    """A watermark that does not fit its place: what was said before it, or after it."""

    sequence: int
    detail: str


@dataclass(frozen=True, slots=True)
class Source:
    """All that is known of one source."""

    hub: HubCode
    path: SourcePath
    node_path: str
    contiguous_sequence: int = 0
    """Everything up to this sequence was seen."""
    beyond: tuple[Seen, ...] = ()
    """Ascending; none touches its neighbour or the contiguous part."""
    watermark_ms: int | None = None
    """The last watermark within the contiguous part."""
    standing: Standing = "active"
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


def observe(source: Source, events: Iterable[Said]) -> tuple[Source, list[GoesBack]]:
    """Take a source's events in the order they arrived; return what it is then, and refusals.

    A sequence seen before changes nothing. The sequence of a refused watermark counts as seen.
    """
    contiguous, watermark_ms = source.contiguous_sequence, source.watermark_ms
    beyond = list(source.beyond)
    standing = source.standing
    refused: list[GoesBack] = []
    for said in events:
        if said.sequence <= contiguous:
            continue
        if said == (contiguous + 1, None, False) and not beyond:
            contiguous += 1  # Nearly always: the next one, and nothing is missing.
            continue
        if _holds(beyond, said.sequence):
            continue
        detail = _contradiction(watermark_ms, beyond, said)
        claimed_ms = said.watermark_ms
        if detail is not None:
            refused.append(GoesBack(said.sequence, detail))
            claimed_ms = None
        _insert(
            beyond, Seen(said.sequence, said.sequence + 1, claimed_ms, claimed_ms, said.retires)
        )
        if beyond[0].first_sequence == contiguous + 1:
            reached = beyond.pop(0)
            contiguous = reached.until_sequence - 1
            if reached.retires:
                standing = "retired"
            if reached.last_watermark_ms is not None:
                watermark_ms = reached.last_watermark_ms
        del beyond[MAX_RANGES:]
    changed = replace(
        source,
        contiguous_sequence=contiguous,
        beyond=tuple(beyond),
        watermark_ms=watermark_ms,
        standing=standing,
    )
    return changed, refused


def accept_watermark(source: Source, said: Said) -> Source | GoesBack:
    """Take a watermark again that waited in quarantine, now that an operator vouches for it.

    Its sequence was seen when it first arrived. Beyond the first gap it waits there, as it would
    have then. Which side of other watermarks of its range it lies on is not kept: while the gap is
    open, it is taken only if it lies between them and so changes nothing.
    """
    places = range(len(source.beyond))
    own = [place for place in places if _holds(source.beyond[place : place + 1], said.sequence)]
    others = [source.beyond[place] for place in places if place not in own]
    detail = _contradiction(source.watermark_ms, others, said)
    if detail is not None:
        return GoesBack(said.sequence, detail)
    if said.sequence <= source.contiguous_sequence:
        return replace(source, watermark_ms=said.watermark_ms)
    for place in own:
        seen = _with_watermark(source.beyond[place], said.watermark_ms)
        if seen is not None:
            beyond = (*source.beyond[:place], seen, *source.beyond[place + 1 :])
            return replace(source, beyond=beyond)
    return GoesBack(said.sequence, "it has no place while a sequence before it is missing")


def closed_by_newer(sources: Sequence[Source], newest: SourcePath) -> list[Source]:
    """Return the older epochs of a node that a newly seen one closes."""
    return [
        replace(source, standing="closed")
        for source in sources
        if source.path != newest and source.standing == "active"
    ]


def _holds(beyond: Sequence[Seen], sequence: int) -> bool:
    at = bisect_right(beyond, sequence, key=_first)
    return at > 0 and sequence < beyond[at - 1].until_sequence


def _first(seen: Seen) -> int:
    return seen.first_sequence


def _contradiction(watermark_ms: int | None, beyond: Sequence[Seen], said: Said) -> str | None:
    """Say what a watermark contradicts, if anything: in a source's own order it never goes back."""
    claimed_ms = said.watermark_ms
    if claimed_ms is None:
        return None
    before_ms = watermark_ms
    for seen in beyond:
        if seen.first_sequence > said.sequence:
            if seen.first_watermark_ms is not None and claimed_ms > seen.first_watermark_ms:
                return f"{claimed_ms} lies after {seen.first_watermark_ms}, said at a later place"
        elif seen.last_watermark_ms is not None:
            before_ms = seen.last_watermark_ms
    if before_ms is not None and claimed_ms < before_ms:
        return f"{claimed_ms} lies before {before_ms}, said at an earlier place"
    return None


def _with_watermark(seen: Seen, watermark_ms: int | None) -> Seen | None:
    """Put a watermark at an unknown place of a range; None unless it fits any place."""
    first_ms, last_ms = seen.first_watermark_ms, seen.last_watermark_ms
    if watermark_ms is None or first_ms is None or last_ms is None:
        return seen._replace(first_watermark_ms=watermark_ms, last_watermark_ms=watermark_ms)
    return seen if first_ms <= watermark_ms <= last_ms else None


def _insert(beyond: list[Seen], new: Seen) -> None:
    """Insert a range that overlaps none, joining it with those it touches."""
    at = bisect_right(beyond, new.first_sequence, key=_first)
    beyond.insert(at, new)
    if at + 1 < len(beyond) and beyond[at + 1].first_sequence == new.until_sequence:
        beyond[at : at + 2] = [_join(new, beyond[at + 1])]
    if at > 0 and beyond[at - 1].until_sequence == beyond[at].first_sequence:
        beyond[at - 1 : at + 1] = [_join(beyond[at - 1], beyond[at])]


def _join(lower: Seen, upper: Seen) -> Seen:
    first_ms = lower.first_watermark_ms
    last_ms = upper.last_watermark_ms
    return Seen(
        lower.first_sequence,
        upper.until_sequence,
        upper.first_watermark_ms if first_ms is None else first_ms,
        lower.last_watermark_ms if last_ms is None else last_ms,
        lower.retires or upper.retires,
    )
