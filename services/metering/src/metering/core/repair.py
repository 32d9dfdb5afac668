"""Repair: metering's buckets against what the ledger has booked of them, and what to state anew.

Theory. Metering that was restored from a backup and replayed has covered every GPU-nanosecond once,
but perhaps not as before: of two conflicting claims in two partitions, the other one may have come
first this time. Then the ledger has booked a bucket that metering does not know, and knows less of
another. A repair states each such bucket anew, at a revision above both: then the ledger takes
the total as it is, even where it is lower. A bucket that metering does not know is stated as 0.

Charges are on their way while buckets are compared, so a bucket that is being filled always differs
from what is booked. Metering's total is therefore taken twice: *before* the charges were known to
have been booked (a mark was sent behind them, and has come back), and now. What is booked must
be one of the two or lie between them, in the order in which the ledger takes totals for newer:
a higher revision, and within one revision a greater total.

A booked revision above metering's own is a difference, too, even at equal totals: whatever metering
states next of that bucket, the ledger would take for an old message.

By itself metering compares every hour, and at once when one more month is complete: before finance
may close it (`is_run_due`). Such a run repairs nothing: that is an operator's decision.

Refuses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from msgspec.structs import replace

from hisab_contracts.charges import BucketTotal
from hisab_contracts.units import month_of

RUN_EVERY_MS: Final = 3_600_000


class BucketState(NamedTuple):
    """How a bucket stands, on one side; all 0: nothing is known of it."""

    revision: int
    gpu_ns: int
    charge_micro: int


class ComparedBucket(NamedTuple):
    """One bucket on both sides."""

    total: BucketTotal
    """As metering would state it now; 0 of everything when it does not know the bucket."""
    before: BucketState
    """As metering would have stated it before the mark that `booked` was read up to."""
    booked: BucketState


def is_difference(compared: ComparedBucket) -> bool:
    """Say whether what is booked is not what metering has stated, now or on the way."""
    before, booked, now = compared.before, compared.booked, state_of(compared.total)
    if _agree(booked, before) or _agree(booked, now):
        return False
    return not (_is_newer(booked, before) and _is_newer(now, booked))


def repair(compared: Iterable[ComparedBucket]) -> list[BucketTotal]:
    """Return what must be stated so that the ledger books what metering knows; its own totals.

    Each is above both revisions. Buckets without a difference are not stated.
    """
    return [
        replace(bucket.total, revision=max(bucket.total.revision, bucket.booked.revision) + 1)
        for bucket in compared
        if is_difference(bucket)
    ]


def is_run_due(
    waited_ms: int, complete_until_ms: int | None, compared_until_ms: int | None
) -> bool:
    """Say whether everything that has changed is to be compared now.

    `waited_ms` is how long ago the last run ended (or we began to look), `complete_until_ms` up to
    when usage is complete, and `compared_until_ms` up to when it was at the last run.
    """
    if waited_ms >= RUN_EVERY_MS:
        return True
    if complete_until_ms is None:
        return False
    return compared_until_ms is None or month_of(complete_until_ms) > month_of(compared_until_ms)


def state_of(total: BucketTotal) -> BucketState:
    """Return how a bucket stands by what is stated of it."""
    return BucketState(total.revision, total.total_gpu_ns, total.total_micro)


def _agree(booked: BucketState, stated: BucketState) -> bool:
    return booked[1:] == stated[1:] and booked.revision <= stated.revision


def _is_newer(state: BucketState, other: BucketState) -> bool:
    """Say whether the ledger, having booked `other`, would book `state` (its `book.is_newer`)."""
    if state.revision != other.revision:
        return state.revision > other.revision
    return state > other and state.charge_micro >= other.charge_micro
