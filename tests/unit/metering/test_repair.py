"""What is booked against what is metered: which buckets differ, and what is stated of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger.core.book import BookedBucket
from ledger.core.charges import is_newer
from metering.core.repair import (
    RUN_EVERY_MS,
    BucketState,
    ComparedBucket,
    is_difference,
    is_run_due,
    repair,
)
from unit.ledger.values import CoreLedger, book, total
from unit.metering.hub_events import HOUR_MS, NOON_MS

NOTHING = BucketState(0, 0, 0)


def compared(now: BucketState, booked: BucketState, before: BucketState) -> ComparedBucket:
    """A bucket on both sides."""
    stated = total(now.charge_micro, gpu_ns=now.gpu_ns, revision=now.revision)
    return ComparedBucket(stated, before, booked)


@pytest.mark.parametrize(
    ("booked", "before", "now", "differs"),
    [
        pytest.param((0, 600, 60), (0, 600, 60), (0, 600, 60), False, id="equal"),
        pytest.param((0, 600, 60), (0, 600, 60), (0, 900, 90), False, id="more is on its way"),
        pytest.param((0, 700, 70), (0, 600, 60), (0, 900, 90), False, id="some of it has arrived"),
        pytest.param((0, 700, 70), (0, 600, 60), (0, 700, 70), False, id="all of it has arrived"),
        pytest.param((0, 600, 60), (0, 700, 70), (0, 700, 70), True, id="never booked"),
        pytest.param((0, 700, 70), (0, 600, 60), (0, 600, 60), True, id="booked too much"),
        pytest.param((0, 600, 60), (0, 0, 0), (0, 0, 0), True, id="not known here"),
        pytest.param((0, 0, 0), (0, 600, 60), (0, 600, 60), True, id="not known there"),
        pytest.param((0, 600, 50), (0, 600, 60), (0, 600, 60), True, id="at another price"),
        pytest.param((2, 600, 60), (1, 600, 60), (1, 600, 60), True, id="would be old from now on"),
        pytest.param((2, 600, 60), (1, 600, 60), (1, 900, 90), True, id="is old already"),
        pytest.param((1, 600, 60), (2, 600, 60), (2, 600, 60), False, id="stated again"),
        pytest.param((1, 0, 0), (0, 0, 0), (0, 0, 0), True, id="0 by a repair that was forgotten"),
    ],
)
def test_a_difference_is_what_does_not_come_right_by_itself(
    booked: tuple[int, int, int],
    before: tuple[int, int, int],
    now: tuple[int, int, int],
    differs: bool,
) -> None:
    """(revision, GPU-ns, micro) booked, as metered before and now."""
    bucket = compared(BucketState(*now), BucketState(*booked), BucketState(*before))
    assert differs == is_difference(bucket)
    assert differs == bool(repair([bucket]))


def test_a_bucket_that_is_not_known_is_stated_as_0_above_what_is_booked() -> None:
    """Its terms are those of the ledger."""
    [stated] = repair([compared(NOTHING, BucketState(3, 600, 60), NOTHING)])
    assert (4, 0, 0) == (stated.revision, stated.total_gpu_ns, stated.total_micro)


states = st.builds(BucketState, st.integers(0, 3), st.integers(0, 5), st.integers(0, 3))


@given(now=states, booked=states, before=states)
def test_the_ledger_books_whatever_a_repair_states(
    now: BucketState, booked: BucketState, before: BucketState
) -> None:
    """Its totals stand there afterwards, lower or not, and there is no difference left."""
    bucket = compared(now, booked, before)
    ledger = CoreLedger(book(limit_micro=10**6))
    name = bucket.total.bucket_id
    first = total(booked.charge_micro, gpu_ns=booked.gpu_ns, revision=booked.revision)
    ledger.do(first)
    stands = ledger.buckets.get(name, BookedBucket(bucket_id=name, hour_ms=first.hour_ms))
    for stated in repair([bucket]):
        assert is_newer(stated, stands)
        ledger.do(stated)
        kept = ledger.buckets[name]
        after = BucketState(kept.revision, kept.gpu_ns, kept.charged_micro)
        assert after[1:] == now[1:]
        assert not is_difference(ComparedBucket(stated, before, after))


JULY_END_MS = NOON_MS + 9 * HOUR_MS


@pytest.mark.parametrize(
    ("waited_ms", "complete_ms", "compared_ms", "due"),
    [
        pytest.param(0, None, None, False, id="nothing is complete"),
        pytest.param(0, NOON_MS, None, True, id="never compared"),
        pytest.param(0, JULY_END_MS - 1, NOON_MS, False, id="the same month"),
        pytest.param(0, JULY_END_MS, JULY_END_MS - 1, True, id="July is complete"),
        pytest.param(0, JULY_END_MS + HOUR_MS, JULY_END_MS, False, id="compared since"),
        pytest.param(0, NOON_MS, JULY_END_MS, False, id="a hub that is behind came anew"),
        pytest.param(RUN_EVERY_MS - 1, NOON_MS, NOON_MS, False, id="not yet an hour"),
        pytest.param(RUN_EVERY_MS, NOON_MS, NOON_MS, True, id="an hour"),
        pytest.param(RUN_EVERY_MS, None, None, True, id="an hour, and nothing is complete"),
    ],
)
def test_metering_is_compared_every_hour_and_when_a_month_is_complete(
    waited_ms: int, complete_ms: int | None, compared_ms: int | None, *, due: bool
) -> None:
    """Months are those of Karachi: July ends at 19:00Z."""
    assert due == is_run_due(waited_ms, complete_ms, compared_ms)
