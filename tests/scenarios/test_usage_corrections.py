"""The worked example of corrections against the pure core and the real database."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import msgspec
import pytest

from hisab_contracts.charges import BucketTotal
from infrastructure import Database as Addresses
from integration.metering.stored import opened, unexplained_gpu_ns
from property.metered import Metered
from scenarios.usage_corrections import HALF_GPU_NS, PKR, STEPS, A, Accounts, B, Step, at
from unit.metering.hub_events import HOUR_MS

FIRST_HOUR_MS = at(0)


def stated(totals: list[BucketTotal]) -> dict[tuple[str, int], tuple[int, int]]:
    """What was stated of buckets, in the words of the table."""
    return {
        (total.tenant_id, (total.hour_ms - FIRST_HOUR_MS) // HOUR_MS): (
            total.revision,
            total.total_micro // PKR,
        )
        for total in totals
    }


@pytest.fixture(scope="module")
def metered() -> Metered:
    """Metering as a value."""
    return Metered()


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step.number}")
def test_every_step_of_the_example_shows_the_worked_figures(metered: Metered, step: Step) -> None:
    """Row by row, in order; worked with pencil and paper."""
    assert step.buckets == stated(metered.take(step.says))
    outcome = metered.outcome()
    charged: dict[str, int] = defaultdict(int)
    for bucket, micro in outcome.charged.items():
        charged[bucket.tenant_id] += micro // PKR
    assert step.charged == charged
    seen = (
        outcome.reported_gpu_ns,
        sum(outcome.billed.values()),
        outcome.duplicate_gpu_ns,
        outcome.quarantined_gpu_ns,
        sum(outcome.voided.values()),
    )
    assert step.accounts == Accounts(*(gpu_ns // HALF_GPU_NS for gpu_ns in seen))


async def test_the_example_comes_out_alike_in_the_database(
    migrated: Callable[[str], Addresses],
) -> None:
    """Every step as a batch of its own: accounts, amounts, and what leaves for the ledger."""
    async with opened(migrated("metering")) as metering:
        await metering.facts([A, B])
        for step in STEPS:
            await metering.take(step.says)
            sums = await metering.sums()
            seen = (
                sums.reported_gpu_ns,
                sums.billed_gpu_ns,
                sums.duplicate_gpu_ns,
                sums.quarantined_gpu_ns,
                sums.voided_gpu_ns,
            )
            assert step.accounts == Accounts(*(gpu_ns // HALF_GPU_NS for gpu_ns in seen))
            assert 0 == unexplained_gpu_ns(sums)
            assert sum(step.charged.values()) * PKR == sums.charge_micro
            left = await metering.rows(
                "delete from outbox where topic = 'metering.charges.v1' returning message_value"
            )
            totals = [msgspec.json.decode(row[0], type=BucketTotal) for row in left]
            assert step.buckets == stated(totals)
