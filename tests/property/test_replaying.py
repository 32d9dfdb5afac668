"""Quarantined records that are judged again go the same way, and no account ever loses a thing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hisab_contracts.ids import TenantId
from metering.core.batch import Reference
from property.metered import Metered, facts, meter
from property.test_coverage import TENANTS, anything, batches_of, without_conflict


def knowing(*tenants: str) -> Reference:
    """The seeded prices, and only these tenants."""
    return replace(facts(), currencies={TenantId(tenant): "PKR" for tenant in tenants})


def must_agree(metered: Metered, records: int) -> None:
    """Reported = billed + duplicate + quarantined, and records likewise."""
    outcome = metered.outcome()
    billed = sum(outcome.billed.values())
    explained = billed + outcome.duplicate_gpu_ns + outcome.quarantined_gpu_ns
    assert outcome.reported_gpu_ns == explained
    assert records == outcome.records[0] == sum(outcome.records[1:])


@pytest.mark.defect("M18", "M19", "F5")
@settings(max_examples=60, deadline=None)
@given(
    reported=st.lists(anything(), min_size=1, max_size=20),
    size=st.integers(1, 6),
    data=st.data(),
)
def test_accounts_agree_after_every_batch_and_every_replay(
    reported: list[Any], size: int, data: st.DataObject
) -> None:
    """Tenants become known one after another; any open records are judged again at any time."""
    metered = Metered()
    records = 0
    known = data.draw(st.integers(0, 2))
    for batch in batches_of(reported, size):
        known = data.draw(st.integers(known, 3))
        metered.take(batch, knowing(*TENANTS[:known]))
        records += len(batch)
        must_agree(metered, records)
        again = data.draw(st.sets(st.sampled_from(sorted(metered.open) or [0])))
        metered.replay(sorted(again & set(metered.open)), knowing(*TENANTS[:known]))
        must_agree(metered, records)
    metered.replay(sorted(metered.open), facts())
    must_agree(metered, records)
    assert {"conflict"} >= {waiting.cause.reason for waiting in metered.open.values()}


@pytest.mark.defect("M18")
@settings(max_examples=40, deadline=None)
@given(reported=without_conflict(), size=st.integers(1, 6), data=st.data())
def test_what_waited_for_its_tenant_is_billed_as_if_it_had_never_waited(
    reported: list[Any], size: int, data: st.DataObject
) -> None:
    """Released one by one in any order: buckets, coverage and charges come out alike."""
    metered = Metered()
    for batch in batches_of(reported, size):
        metered.take(batch, knowing(*TENANTS[:1]))
    for quarantine_id in data.draw(st.permutations(sorted(metered.open))):
        metered.replay([quarantine_id], facts())
    expected, outcome = meter([reported]), metered.outcome()
    assert (expected.billed, expected.charged) == (outcome.billed, outcome.charged)
    assert expected.rows == outcome.rows
    assert 0 == outcome.quarantined_gpu_ns
