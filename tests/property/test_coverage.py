"""Coverage: order, chunking and repetition change nothing, and every GPU-ns has one account."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from property.metered import meter
from unit.metering.hub_events import HOUR_MS, NOON_MS, device, interval

STEP_MS = 450_000  # An eighth of an hour, so that edges meet often.
SPAN = 8 * 30  # Steps: thirty hours, so that hours and a midnight lie inside.
TENANTS = ("ravi-health", "indus-foundry", "flood-watch")
SLICES = (("GPU-1", "GPU-1"), ("GPU-1", "GPU-1/m1"), ("GPU-1", "GPU-1/m2"), ("GPU-2", "GPU-2"))


@st.composite
def anything(draw: st.DrawFn) -> dict[str, Any]:
    """An interval that may repeat, overlap or contradict any other."""
    start = draw(st.integers(0, SPAN - 1))
    length = draw(st.integers(1, 24))
    tenant = draw(st.sampled_from(TENANTS))
    devices = draw(st.lists(st.sampled_from(SLICES), min_size=1, max_size=3))
    share_ppm = draw(st.sampled_from((1_000_000, 333_333)))
    return interval(
        NOON_MS + start * STEP_MS,
        NOON_MS + (start + length) * STEP_MS + draw(st.sampled_from((0, 1, 7))),
        tenant_id=tenant,
        allocation_id=f"job-{tenant}-{draw(st.integers(0, 1))}",
        node_id=draw(st.sampled_from(("n1", "n2"))),
        sku=draw(st.sampled_from(("h100-sxm-80", "l40s-48"))),
        devices=[device(name, part, share_ppm) for name, part in devices],
    )


@st.composite
def without_conflict(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Runs of allocations that never share a device, each reported in overlapping pieces."""
    said = []
    for name in ("GPU-1", "GPU-2"):
        cursor = 0
        for run in range(draw(st.integers(1, 4))):
            start = cursor + draw(st.integers(0, 5))
            cursor = start + draw(st.integers(1, 40))
            pieces = draw(
                st.lists(
                    st.tuples(st.integers(start, cursor - 1), st.integers(1, 40)),
                    min_size=1,
                    max_size=4,
                )
            )
            for piece_start, length in pieces:
                said.append(
                    interval(
                        NOON_MS + piece_start * STEP_MS,
                        NOON_MS + min(piece_start + length, cursor) * STEP_MS,
                        allocation_id=f"{name}-{run}",
                        tenant_id=TENANTS[run % 3],
                        devices=[device(name, share_ppm=500_000)],
                    )
                )
    return said


def batches_of(said: list[Any], size: int) -> list[list[Any]]:
    """Cut into batches, as the consumer would."""
    return [said[at : at + size] for at in range(0, len(said), size)]


@pytest.mark.defect("M11", "M19", "F5")
@settings(max_examples=60, deadline=None)
@given(said=st.lists(anything(), min_size=1, max_size=25), size=st.integers(1, 9))
def test_everything_reported_has_exactly_one_account(said: list[Any], size: int) -> None:
    """Whatever is reported is billed, duplicate or in conflict, as the oracle says."""
    expected = oracle.meter(said)
    outcome = meter(batches_of(said, size))
    assert expected.buckets == outcome.billed
    assert oracle.rate(expected.buckets) == outcome.charged
    assert expected.reported_gpu_ns == outcome.reported_gpu_ns
    assert expected.duplicate_gpu_ns == outcome.duplicate_gpu_ns
    assert expected.conflict_gpu_ns == outcome.quarantined_gpu_ns
    assert len(said) == outcome.records[0] == sum(outcome.records[1:])


@pytest.mark.defect("M11", "M13", "F1", "F3", "F24")
@settings(max_examples=60, deadline=None)
@given(said=without_conflict(), data=st.data())
def test_order_chunking_and_repetition_change_no_charge(
    said: list[Any], data: st.DataObject
) -> None:
    """Any order, cut and resending of conflict-free usage bills the same per bucket."""
    rechunked = []
    for usage in data.draw(st.permutations(said + data.draw(st.lists(st.sampled_from(said))))):
        cut_ms = data.draw(st.integers(usage["start_ms"] + 1, usage["end_ms"]))
        rechunked.append(usage | {"end_ms": cut_ms})
        if cut_ms < usage["end_ms"]:
            rechunked.insert(
                data.draw(st.integers(0, len(rechunked))), usage | {"start_ms": cut_ms}
            )
    expected = meter([said])
    outcome = meter(batches_of(rechunked, data.draw(st.integers(1, 9))))
    assert expected.billed == outcome.billed
    assert expected.charged == outcome.charged
    assert expected.rows == outcome.rows
    assert outcome.quarantined_gpu_ns == 0


@settings(max_examples=40, deadline=None)
@given(said=st.lists(anything(), min_size=1, max_size=25), size=st.integers(1, 9))
def test_no_slice_is_covered_twice(said: list[Any], size: int) -> None:
    """Rows of a slice are disjoint, within one day, merged, and never meet the whole device."""
    rows = meter(batches_of(said, size)).rows
    by_slice: dict[Any, list[Any]] = defaultdict(list)
    for (*where, start_ms), (end_ms, claim) in sorted(rows.items()):
        by_slice[tuple(where)].append((start_ms, end_ms, claim))
    for where, spans in by_slice.items():
        for start_ms, end_ms, _ in spans:
            assert start_ms < end_ms
            assert start_ms // (24 * HOUR_MS) == (end_ms - 1) // (24 * HOUR_MS)
        for (_, end_ms, claim), (start_ms, _, next_claim) in pairwise(spans):
            assert end_ms <= start_ms
            assert end_ms < start_ms or claim != next_claim or start_ms % (24 * HOUR_MS) == 0
        whole = by_slice.get((*where[:3], where[2]), [])
        if where[3] != where[2]:
            assert not [1 for a in spans for b in whole if a[0] < b[1] and b[0] < a[1]]


@pytest.mark.defect("M3", "M9", "M24", "F22", "F24")
@settings(max_examples=25, deadline=None)
@given(said=st.lists(anything(), min_size=1, max_size=15), size=st.integers(1, 9))
def test_a_replay_bills_nothing(said: list[Any], size: int) -> None:
    """The same usage again leaves every bucket and row as it was."""
    once = meter(batches_of(said, size))
    twice = meter(batches_of(said, size) + batches_of(said, size))
    assert once.billed == twice.billed
    assert once.rows == twice.rows
