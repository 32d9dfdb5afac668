"""Corrections: the order of arrival changes nothing, and every GPU-ns keeps exactly one account."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from correction_oracle import Line, correct, is_free
from hisab_contracts.charges import BucketTotal
from hisab_contracts.events import Correction
from hisab_contracts.ids import HubCode, TenantId
from metering.core.batch import CorrectionOrder, Reference
from metering.core.corrections import proposal_id
from metering.core.engine import LATENESS_MS
from oracle import Bucket
from property.metered import LATER_MS, Metered, facts
from property.test_coverage import STEP_MS, TENANTS, anything, batches_of
from property.test_restoring import Downstream
from unit.metering.hub_events import NOON_MS, correction, device, interval

LHR = HubCode("lhr")
TICKS = 16
NODES = ("n1", "n2")
JOBS = 3
REPLACEMENTS = (
    {"tenant_id": TENANTS[1]},
    {"tenant_id": TENANTS[2], "sku": "l40s-48"},
    {"price_class": "spot"},
    {"project_id": "other", "tenant_id": None},
)


def instant(tick: int) -> int:
    """The beginning of a tick."""
    return NOON_MS + tick * STEP_MS


def slices_of(job: int) -> list[dict[str, Any]]:
    """A job has a device of its own: the whole of it, or two slices."""
    name = f"GPU-{job}"
    if job == 0:
        return [device(name)]
    return [device(name, f"{name}/m1", 500_000), device(name, f"{name}/m2", 500_000)]


@st.composite
def spans(draw: st.DrawFn) -> tuple[int, int]:
    """Two edges."""
    start = draw(st.integers(0, TICKS - 1))
    return start, draw(st.integers(start + 1, TICKS))


@st.composite
def usage_of(draw: st.DrawFn, job: int) -> dict[str, Any]:
    """A piece of what a job used; pieces overlap, and repeat."""
    start, end = draw(spans())
    devices = draw(st.lists(st.sampled_from(slices_of(job)), min_size=1, unique_by=str))
    return interval(
        instant(start),
        instant(end),
        tenant_id=TENANTS[job],
        allocation_id=f"job-{job}",
        node_id=NODES[job % 2],
        devices=devices,
    )


@st.composite
def correction_of(draw: st.DrawFn, job: int, revision: int) -> dict[str, Any]:
    """Anything that may be said of a job at this revision."""
    start, end = draw(spans())
    names = [found["slice_uuid"] for found in slices_of(job)]
    members: dict[str, Any] = {
        "allocation_id": f"job-{job}",
        "node_id": draw(st.sampled_from((None, *NODES))),
        "slice_uuids": draw(st.none() | st.lists(st.sampled_from(names), min_size=1, unique=True)),
        "revision": revision,
    }
    if draw(st.booleans()):
        members["replacement"] = draw(st.sampled_from(REPLACEMENTS))
    else:
        members["release"] = draw(st.booleans())
    return correction(instant(start), instant(end), **members)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Any], list[Any]]:
    """Usage and corrections that agree: no two claims but on released time, no revision twice."""
    usage, corrections = [], []
    for job in range(JOBS):
        usage += draw(st.lists(usage_of(job), min_size=1, max_size=4))
        revisions = draw(st.lists(st.integers(1, 9), max_size=3, unique=True))
        corrections += [draw(correction_of(job, revision)) for revision in revisions]
    if draw(st.booleans()):
        usage += guests(usage, corrections)
    return usage, corrections


def guests(usage: list[Any], corrections: list[Any]) -> list[Any]:
    """Another allocation on every tick that is free in the end."""
    found = []
    for said in usage:
        for part in said["devices"]:
            for start_ms in range(said["start_ms"], said["end_ms"], STEP_MS):
                place = (part["slice_uuid"], start_ms)
                if is_free(
                    corrections, (said["hub"], said["node_id"], said["allocation_id"], *place)
                ):
                    other = {"allocation_id": "guest", "tenant_id": TENANTS[0], "devices": [part]}
                    found.append(
                        said | other | {"start_ms": start_ms, "end_ms": start_ms + STEP_MS}
                    )
    return found


def settle(metered: Metered, reference: Reference) -> list[BucketTotal]:
    """Operators approve what needs it, and the service judges conflicts again, while that helps."""
    stated: list[BucketTotal] = []
    while True:
        waiting = sorted(metered.open)
        stated += metered.replay(waiting, reference, LATER_MS)
        if waiting == sorted(metered.open):
            return stated


def lines(accounts: dict[Bucket, int]) -> dict[Line, int]:
    """Buckets in the words of the oracle, where there is anything."""
    return {
        Line._make(getattr(bucket, name) for name in Line._fields): gpu_ns
        for bucket, gpu_ns in accounts.items()
        if gpu_ns
    }


def must_agree(metered: Metered) -> None:
    """Reported = billed + duplicate + quarantined + voided; and so do the records agree."""
    outcome = metered.outcome()
    read, *counted = outcome.records
    assert read == sum(counted)
    explained = (
        sum(outcome.billed.values())
        + outcome.duplicate_gpu_ns
        + outcome.quarantined_gpu_ns
        + sum(outcome.voided.values())
    )
    assert outcome.reported_gpu_ns == explained


@pytest.mark.defect("M11", "M23", "M24")
@settings(max_examples=80, deadline=None)
@given(history=histories(), size=st.integers(1, 5), data=st.data())
def test_corrections_come_to_the_same_whatever_the_order(
    history: tuple[list[Any], list[Any]], size: int, data: st.DataObject
) -> None:
    """Any interleaving, repetition and restore bills and voids what the oracle says."""
    usage, corrections = history
    expected = correct(usage, corrections, STEP_MS)
    said = data.draw(st.permutations([*usage, *corrections]))
    said += data.draw(st.lists(st.sampled_from(said), max_size=5))
    metered = Metered()
    batches = batches_of(said, size)
    restored_at = data.draw(st.integers(0, len(batches) - 1))
    backup = deepcopy(metered)
    for number, batch in enumerate(batches):
        if number == restored_at:
            backup = deepcopy(metered)
        metered.take(batch, facts())
        must_agree(metered)
        if data.draw(st.booleans()):
            settle(metered, facts())
    for batch in batches[restored_at:]:
        backup.take(data.draw(st.permutations(batch)), facts())
    for found in (metered, backup):
        settle(found, facts())
        must_agree(found)
        assert {} == found.open
        outcome = found.outcome()
        assert expected.billed == lines(outcome.billed)
        assert expected.voided == lines(outcome.voided)


@st.composite
def any_correction(draw: st.DrawFn) -> dict[str, Any]:
    """A correction of anything that `anything` may report, at a revision that others have too."""
    start = draw(st.integers(0, 200))
    tenant = draw(st.sampled_from(TENANTS))
    members: dict[str, Any] = {
        "allocation_id": f"job-{tenant}-{draw(st.integers(0, 1))}",
        "node_id": draw(st.sampled_from((None, "n1", "n2"))),
        "slice_uuids": draw(st.sampled_from((None, ["GPU-1"], ["GPU-1/m1", "GPU-2"]))),
        "revision": draw(st.integers(1, 3)),
    }
    if draw(st.booleans()):
        members["replacement"] = {"tenant_id": draw(st.sampled_from((*TENANTS, "nobody")))}
    else:
        members["release"] = draw(st.booleans())
    return correction(instant(start), instant(start + draw(st.integers(1, 60))), **members)


def order_of(said: dict[str, Any]) -> CorrectionOrder:
    """A correction that operators have approved."""
    found = msgspec.convert(said, Correction)
    return CorrectionOrder(proposal_id(found, "key:1", 1), found, None)


def with_nobody(reference: Reference) -> Reference:
    """These facts, once `nobody` is known, too."""
    currencies = {**reference.currencies, TenantId("nobody"): "PKR"}
    return Reference(currencies, reference.book, reference.watermarks)


@pytest.mark.defect("M11", "M19", "F5")
@settings(max_examples=80, deadline=None)
@given(
    said=st.lists(anything() | any_correction(), min_size=1, max_size=25),
    operators=st.lists(any_correction(), max_size=4),
    size=st.integers(1, 6),
    data=st.data(),
)
def test_every_account_agrees_at_every_step_and_the_ledger_books_what_is_metered(
    said: list[Any], operators: list[Any], size: int, data: st.DataObject
) -> None:
    """Contradictions, unknown tenants, two claims on a slice: the identity holds all the same."""
    metered, downstream = Metered(), Downstream()
    everybody = with_nobody(facts())
    for batch in batches_of(said, size):
        # Where the horizon is when it comes, decides what needs an approval.
        horizon_ms = data.draw(st.none() | st.integers(0, 260).map(instant))
        watermark_ms = None if horizon_ms is None else horizon_ms + LATENESS_MS
        downstream.hear(metered.take(batch, facts({LHR: watermark_ms})), None)
        must_agree(metered)
        if data.draw(st.booleans()) and operators:
            downstream.hear(metered.approve(order_of(operators.pop()), facts()), None)
            must_agree(metered)
        if data.draw(st.booleans()):
            # Its tenant has become known: it counts from now on, whenever it was approved.
            downstream.hear(metered.count_waiting(everybody), None)
            must_agree(metered)
        again = data.draw(st.sets(st.sampled_from(sorted(metered.open) or [0])))
        vouched = data.draw(st.sampled_from((None, LATER_MS)))
        replayed = metered.replay(sorted(again & set(metered.open)), facts(), vouched)
        downstream.hear(replayed, None)
        must_agree(metered)
    charged: dict[str, int] = defaultdict(int)
    for bucket, micro in metered.outcome().charged.items():
        charged[bucket.tenant_id] += micro
    for tenant, ledger in downstream.ledgers.items():
        assert charged[tenant] == ledger.book.charged_micro
