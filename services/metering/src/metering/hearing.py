"""Hearing: what the sources of a batch said, on top of what is stored about them.

A source seen for the first time is the newest epoch of its node and closes the older ones. What it
says is folded in order of arrival (`sources.observe`); a watermark that goes back waits under the
reason `watermark`, its sequence counts all the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hisab_contracts.ids import SourcePath
from metering.reading import Parked, Reading, SourceEvents, Vouched, Waits
from metering.sources import GoesBack, Source, accept_watermark, closed_by_newer, observe


@dataclass(frozen=True, slots=True)
class Heard:
    """What is known of the sources afterwards."""

    changed: list[Source]
    """In order of first arrival, older epochs that were closed among them."""
    parked: list[Parked]
    """Watermarks that contradict what their source said elsewhere."""
    accepted: list[Vouched]
    """Quarantined watermarks that count now."""


def hear(reading: Reading, stored: Iterable[Source]) -> Heard:
    """Fold a batch into its sources.

    `stored` holds every source that speaks in the batch, and all active ones of the same nodes.
    """
    sources = {source.path: source for source in stored}
    before = dict(sources)
    parked: list[Parked] = []
    accepted: list[Vouched] = []
    for path, events in reading.sources.items():
        if path not in sources:
            _begin(sources, events)
        source, refused = observe(sources[path], events.said)
        sources[path] = replace(source, last_seen_ms=max(source.last_seen_ms, events.last_seen_ms))
        for goes_back in refused:
            origin, watermark = events.origins[goes_back.sequence]
            waits = Waits("watermark", goes_back.detail)
            parked.append(Parked(origin, waits, watermark, counts=False))
    for vouched in reading.vouched:
        source_then = accept_watermark(sources[vouched.path], vouched.said)
        if isinstance(source_then, GoesBack):
            waits = Waits("watermark", source_then.detail)
            parked.append(Parked(vouched.origin, waits, vouched.watermark, False, vouched.prior))
        else:
            sources[vouched.path] = source_then
            accepted.append(vouched)
    changed = [source for path, source in sources.items() if before.get(path) != source]
    return Heard(changed, parked, accepted)


def _begin(sources: dict[SourcePath, Source], events: SourceEvents) -> None:
    """Add a source that was never seen, and close the older epochs of its node."""
    who = events.source
    siblings = [source for source in sources.values() if source.node_path == who.node_path]
    for closed in closed_by_newer(siblings, who.path):
        sources[closed.path] = closed
    sources[who.path] = Source(who.hub, who.path, who.node_path)
