"""The properties of coverage again, through PostgreSQL: what is loaded is what was saved.

The histories are those of `tests/property`. There a value stands for what metering has stored; here
it is stored, and must come out as that value does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from hisab_contracts.ids import (
    AllocationId,
    PriceClass,
    ProjectId,
    Sku,
    TenantId,
)
from infrastructure import Database as Addresses
from infrastructure import Infrastructure, run_apart
from integration.metering.stored import StoredMetering, opened, unexplained_gpu_ns
from metering.core.coverage import Claim
from property.metered import Outcome, meter
from property.test_coverage import TENANTS, anything, batches_of, without_conflict

FEW = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
History = Callable[[StoredMetering], Awaitable[None]]


@pytest.fixture(scope="module")
def addresses(infrastructure: Infrastructure) -> Iterator[Addresses]:
    """One database for all histories: each begins with empty tables."""
    found = infrastructure.migrated_database("metering")
    yield found
    infrastructure.drop_database(found)


def run(addresses: Addresses, history: History, known: tuple[str, ...] = TENANTS) -> Outcome:
    """Have a history happen to empty tables; read out what is stored."""

    async def happen() -> Outcome:
        async with opened(addresses) as metering:
            await metering.rows(
                "truncate hubs, hub_partitions, sources, nodes, coverage, buckets, tallies, "
                "corrections, freed_coverage, freed_time, "
                "allocations, allocation_duplicates, quarantine, quarantine_time, open_time, "
                "tenants, price_lists, price_lines, outbox restart identity"
            )
            await metering.facts(known, oracle.MICRO_PER_GPU_HOUR)
            await history(metering)
            return await outcome(metering)

    return run_apart(happen())


async def outcome(metering: StoredMetering) -> Outcome:
    """Read the tables out in the oracle's words."""
    buckets = await metering.rows("select * from buckets")
    names = [oracle.Bucket._make(row[name] for name in oracle.Bucket._fields) for row in buckets]
    sums = await metering.sums()
    return Outcome(
        billed={name: row["gpu_ns"] for name, row in zip(names, buckets, strict=True)},
        charged={name: row["charge_micro"] for name, row in zip(names, buckets, strict=True)},
        reported_gpu_ns=sums.reported_gpu_ns,
        duplicate_gpu_ns=sums.duplicate_gpu_ns,
        quarantined_gpu_ns=sums.quarantined_gpu_ns,
        rows={
            (
                row["hub"],
                row["node_id"],
                row["device_uuid"],
                row["slice_uuid"],
                row["start_ms"],
            ): (row["end_ms"], _claim(row))
            for row in await metering.rows("select * from coverage")
        },
        records=[
            sums.read_records,
            sums.accepted_records,
            sums.duplicate_records,
            sums.quarantined_records,
        ],
        voided={
            name: row["voided_gpu_ns"]
            for name, row in zip(names, buckets, strict=True)
            if row["voided_gpu_ns"]
        },
    )


def _claim(row: Any) -> Claim:
    return Claim(
        TenantId(row["tenant_id"]),
        ProjectId(row["project_id"]),
        AllocationId(row["allocation_id"]),
        Sku(row["sku"]),
        PriceClass(row["price_class"]),
        row["share_ppm"],
    )


@pytest.mark.defect("M11", "M19", "F5")
@FEW
@given(said=st.lists(anything(), min_size=1, max_size=25), size=st.integers(1, 9))
def test_what_is_stored_is_what_the_engine_decided(
    addresses: Addresses, said: list[Any], size: int
) -> None:
    """Batch by batch through the tables: every account as the value has it, and as the oracle."""

    async def take(metering: StoredMetering) -> None:
        for batch in batches_of(said, size):
            await metering.take(batch)

    stored = run(addresses, take)
    assert meter(batches_of(said, size)) == stored
    expected = oracle.meter(said)
    assert expected.buckets == stored.billed
    assert oracle.rate(expected.buckets) == stored.charged
    assert expected.conflict_gpu_ns == stored.quarantined_gpu_ns


@pytest.mark.defect("M11", "M13", "F1", "F3", "F24")
@FEW
@given(said=without_conflict(), data=st.data())
def test_order_and_repetition_change_nothing_that_is_stored(
    addresses: Addresses, said: list[dict[str, Any]], data: st.DataObject
) -> None:
    """Shuffled, resent and cut into other batches: the same buckets, the same rows of coverage."""
    again = data.draw(st.permutations(said + data.draw(st.lists(st.sampled_from(said)))))
    size = data.draw(st.integers(1, 9))

    async def take(metering: StoredMetering) -> None:
        for batch in batches_of(list(again), size):
            await metering.take(batch)

    stored, expected = run(addresses, take), meter([said])
    assert expected.billed == stored.billed
    assert expected.charged == stored.charged
    assert expected.rows == stored.rows
    assert 0 == stored.quarantined_gpu_ns


@pytest.mark.defect("M18", "M19", "F5")
@FEW
@given(
    said=st.lists(anything(), min_size=1, max_size=20),
    size=st.integers(1, 6),
    data=st.data(),
)
def test_accounts_that_are_stored_agree_after_every_batch_and_every_replay(
    addresses: Addresses, said: list[Any], size: int, data: st.DataObject
) -> None:
    """Tenants become known one after another; any open records are judged again at any time."""
    batches = batches_of(said, size)
    known = sorted(data.draw(st.integers(0, 3)) for _ in batches)
    again = [data.draw(st.sets(st.integers(1, 20))) for _ in batches]

    async def replay(metering: StoredMetering, wanted: set[int]) -> None:
        quarantine_ids = [number for number in await metering.open_ids() if number in wanted]
        async with metering.writer.transaction() as connection:
            assert [] == await metering.replay(connection, quarantine_ids)
        assert 0 == unexplained_gpu_ns(await metering.sums())

    async def happen(metering: StoredMetering) -> None:
        for batch, count, wanted in zip(batches, known, again, strict=True):
            await metering.know(*TENANTS[:count])
            await metering.take(batch)
            assert 0 == unexplained_gpu_ns(await metering.sums())
            await replay(metering, wanted)
        await metering.know(*TENANTS)
        await replay(metering, set(await metering.open_ids()))

    stored = run(addresses, happen, known=())
    read, *others = stored.records
    assert len(said) == read == sum(others)
    reported = sum(
        (usage["end_ms"] - usage["start_ms"]) * device["share_ppm"]
        for usage in said
        for device in usage["devices"]
    )
    assert reported == stored.reported_gpu_ns
