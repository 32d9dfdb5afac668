"""Sources: contiguous sequences, gaps, watermarks that wait for them, epochs, retirement."""

from __future__ import annotations

from itertools import permutations

import pytest

from hisab_contracts.ids import HubCode, SourcePath
from metering.core.sources import (
    MAX_RANGES,
    SequenceRange,
    SourceEvent,
    SourceNotActive,
    SourceProgress,
    WatermarkRegression,
    accept_watermark,
    closed_by_newer,
    observe,
    retire,
)

PATH = SourcePath("/hubs/lhr/nodes/n1/epochs/e1")


def fresh(path: SourcePath = PATH) -> SourceProgress:
    """A source nobody has heard yet."""
    return SourceProgress(HubCode("lhr"), path, "/hubs/lhr/nodes/n1")


def said(*events: int | tuple[int, int]) -> list[SourceEvent]:
    """Events by sequence; a pair carries a watermark."""
    return [
        SourceEvent(event) if isinstance(event, int) else SourceEvent(*event) for event in events
    ]


def test_contiguous_events_leave_no_gap() -> None:
    """1, 2, 3 in order: everything was seen, and the last watermark counts."""
    source, refused = observe(fresh(), said(1, (2, 100), 3, (4, 200)))
    assert (4, (), 200, []) == (
        source.contiguous_sequence,
        source.beyond,
        source.watermark_ms,
        refused,
    )


@pytest.mark.defect("F4", "M31")
def test_watermark_beyond_a_gap_waits_until_it_closes() -> None:
    """With 3 missing the watermark at 4 does not count; when 3 arrives it does."""
    source, _ = observe(fresh(), said(1, (2, 100), (4, 200), 5))
    assert (2, 100, [(3, 4)]) == (source.contiguous_sequence, source.watermark_ms, source.gaps)
    assert source.has_seen(5)
    assert not source.has_seen(3)
    source, _ = observe(source, said(3))
    assert (5, 200, []) == (source.contiguous_sequence, source.watermark_ms, source.gaps)


def test_order_of_arrival_does_not_matter() -> None:
    """Any order of the same events ends in the same state."""
    events = said(1, (2, 100), 3, (4, 200), 5)
    expected = observe(fresh(), events)
    for order in permutations(events):
        assert expected == observe(fresh(), order)


def test_sequence_seen_before_changes_nothing() -> None:
    """A watermark at a sequence already seen is ignored, within and beyond the gap."""
    source, _ = observe(fresh(), said(1, (2, 100), 4))
    again, refused = observe(source, said((2, 900), (4, 900), 1))
    assert (source, []) == (again, refused)


def test_lower_watermark_at_a_new_sequence_is_refused() -> None:
    """It goes back, so it waits; its sequence counts."""
    source, refused = observe(fresh(), said((1, 200), (2, 100)))
    assert (2, 200) == (source.contiguous_sequence, source.watermark_ms)
    assert [2] == [regression.sequence for regression in refused]


def test_watermark_that_contradicts_a_later_one_is_refused() -> None:
    """At sequence 1 it claims more than the one at 3 that arrived before it."""
    source, refused = observe(fresh(), said((3, 100), (1, 200)))
    assert [1] == [regression.sequence for regression in refused]
    source, refused = observe(source, said(2))
    assert (3, 100, []) == (source.contiguous_sequence, source.watermark_ms, refused)


def test_lower_watermark_beyond_a_gap_is_refused() -> None:
    """Ranges know their last watermark too."""
    source, refused = observe(fresh(), said((3, 200), (5, 100)))
    assert [5] == [regression.sequence for regression in refused]
    assert [(1, 3), (4, 5)] == source.gaps


def test_retirement_takes_effect_in_its_place() -> None:
    """With an event before it missing the source still counts."""
    source, _ = observe(fresh(), [*said(1), SourceEvent(3, retires=True)])
    assert "active" == source.standing
    source, _ = observe(source, said(2))
    assert ("retired", None) == (source.standing, source.watermark_ms)


def test_retirement_contradicts_no_watermark_in_whatever_order_they_arrive() -> None:
    """Watermarks on both sides of it: the source is retired, the last of them is its watermark."""
    events = [*said(1, (2, 100)), SourceEvent(3, retires=True), *said((4, 200), 5)]
    expected = observe(fresh(), events)
    assert ("retired", 200, []) == (expected[0].standing, expected[0].watermark_ms, expected[1])
    for order in permutations(events):
        assert expected == observe(fresh(), order)


def test_ranges_beyond_the_gap_are_bounded() -> None:
    """Whatever a hub sends, what is kept of it has a bound."""
    source, _ = observe(fresh(), [SourceEvent(2 * number) for number in range(1, MAX_RANGES + 50)])
    assert MAX_RANGES == len(source.beyond)


def test_newer_epoch_closes_the_older_ones() -> None:
    """Only active sources of other epochs are closed."""
    newer = fresh(SourcePath("/hubs/lhr/nodes/n1/epochs/e2"))
    [closed] = closed_by_newer([fresh(), newer], newer.path)
    assert (PATH, "closed") == (closed.path, closed.standing)


def test_vouched_watermark_counts_unless_it_contradicts() -> None:
    """An operator's replay moves a watermark forward, never back, never past a later one."""
    source, _ = observe(fresh(), said((1, 100), 2, (4, 300)))
    forward = accept_watermark(source, SourceEvent(2, 200))
    assert isinstance(forward, SourceProgress)
    assert 200 == forward.watermark_ms
    assert isinstance(accept_watermark(source, SourceEvent(2, 50)), WatermarkRegression)
    assert isinstance(accept_watermark(source, SourceEvent(2, 400)), WatermarkRegression)
    alone, _ = observe(fresh(), said(1))
    assert isinstance(accept_watermark(alone, SourceEvent(1, 1)), SourceProgress)


@pytest.mark.defect("F4")
def test_vouched_watermark_beyond_a_gap_waits_until_it_closes() -> None:
    """Sequence 1 and 10 seen: what is vouched for at 10 counts only once 2 to 9 have arrived."""
    source, _ = observe(fresh(), said((1, 100), 10))
    vouched = accept_watermark(source, SourceEvent(10, 900))
    assert isinstance(vouched, SourceProgress)
    assert (100, (SequenceRange(10, 11, 900, 900),)) == (vouched.watermark_ms, vouched.beyond)
    closed, refused = observe(vouched, said(*range(2, 10)))
    assert (10, 900, []) == (closed.contiguous_sequence, closed.watermark_ms, refused)


def test_vouched_watermark_beyond_a_gap_fits_what_was_said_around_it() -> None:
    """Its own range does not say which of two watermarks came first; the others do."""
    source, _ = observe(fresh(), said(1, (3, 200), 4, (5, 300), 8, (10, 500)))
    [range_of_three, eighth, tenth] = source.beyond
    between = accept_watermark(source, SourceEvent(4, 250))
    assert source == between
    assert isinstance(accept_watermark(source, SourceEvent(4, 350)), WatermarkRegression)
    assert isinstance(accept_watermark(source, SourceEvent(8, 250)), WatermarkRegression)
    assert isinstance(accept_watermark(source, SourceEvent(8, 550)), WatermarkRegression)
    eighth_vouched = eighth._replace(first_watermark_ms=400, last_watermark_ms=400)
    placed = accept_watermark(source, SourceEvent(8, 400))
    assert isinstance(placed, SourceProgress)
    assert (range_of_three, eighth_vouched, tenth) == placed.beyond
    assert isinstance(accept_watermark(source, SourceEvent(7, 400)), WatermarkRegression)


def test_only_an_active_source_is_retired_by_an_operator() -> None:
    """Unknown, closed and retired ones are refused; what is missing in it stays listed."""
    source, _ = observe(fresh(), said(1, 3))
    retired = retire(source.hub, source.path, source)
    assert isinstance(retired, SourceProgress)
    assert retired is not None
    assert ("retired", source.gaps) == (retired.standing, retired.gaps)
    refused = SourceNotActive(source.hub, source.path)
    assert refused == retire(source.hub, source.path, retired)
    assert refused == retire(source.hub, source.path, None)
