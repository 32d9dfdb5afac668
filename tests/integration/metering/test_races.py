"""Two at once: what a lock protects is read after the lock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from infrastructure import Database as Addresses
from integration.metering.stored import LHR, StoredMetering, opened, unexplained_gpu_ns
from metering.store import hubs
from unit.metering.hub_events import HOUR_MS, NOON_MS, device, interval

ROUNDS = 200
HOUR_GPU_NS = 3_600_000_000_000


async def test_two_replays_of_one_record_at_once_leave_every_account_in_balance(
    migrated: Callable[[str], Addresses],
) -> None:
    """200 rounds: the second waits for the first, and takes back what the first has left."""
    async with opened(migrated("metering")) as metering:
        await metering.facts(["ravi-health"])
        await metering.take([half_of(number) for number in range(ROUNDS)])
        await metering.take([whole_of(number) for number in range(ROUNDS)])
        quarantine_ids = await metering.open_ids()
        assert ROUNDS == len(quarantine_ids)
        await metering.know(*(f"late-{number}" for number in range(ROUNDS)))
        for quarantine_id in quarantine_ids:
            await replay_twice_at_once(metering, quarantine_id)
        sums = await metering.sums()
    assert 0 == unexplained_gpu_ns(sums)
    half = ROUNDS * HOUR_GPU_NS // 2
    assert (3 * half, 2 * half, 0, half) == (
        sums.reported_gpu_ns,
        sums.billed_gpu_ns,
        sums.duplicate_gpu_ns,
        sums.quarantined_gpu_ns,
    )
    assert (2 * ROUNDS, ROUNDS, 0, ROUNDS) == (
        sums.read_records,
        sums.accepted_records,
        sums.duplicate_records,
        sums.quarantined_records,
    )


async def test_a_hub_that_is_stated_does_not_keep_its_new_sources_out(
    migrated: Callable[[str], Addresses],
) -> None:
    """A new source or partition refers to the hub's row: what that takes does not wait."""
    async with opened(migrated("metering")) as metering:
        await metering.facts(["ravi-health"])
        async with metering.writer.transaction() as stating:
            await hubs.lock_hub(stating, LHR)
            referred = "select hub from hubs where hub = $1 for key share nowait"
            assert [LHR] == [row["hub"] for row in await metering.rows(referred, LHR)]


def half_of(number: int) -> dict[str, Any]:
    """Half an hour of a device, taken by a tenant that is known."""
    return interval(NOON_MS, NOON_MS + HOUR_MS // 2, devices=[device(f"GPU-{number}")])


def whole_of(number: int) -> dict[str, Any]:
    """The whole hour of the same device, of a tenant that becomes known later."""
    return interval(
        tenant_id=f"late-{number}", allocation_id="late", devices=[device(f"GPU-{number}")]
    )


async def replay_twice_at_once(metering: StoredMetering, quarantine_id: int) -> None:
    """The first replay commits only once the second waits for its lock."""

    async def second() -> None:
        async with metering.writer.transaction() as connection:
            assert [] == await metering.replay(connection, [quarantine_id])

    async with metering.writer.transaction() as connection:
        assert [] == await metering.replay(connection, [quarantine_id])
        waiting = asyncio.create_task(second())
        while not await metering.rows(
            "select from pg_stat_activity "
            "where wait_event_type = 'Lock' and datname = current_database()"
        ):
            assert not waiting.done()
    await waiting
