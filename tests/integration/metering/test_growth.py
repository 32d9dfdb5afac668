"""What is looked at again and again does not grow with what is stored."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import asyncpg

from hisab_contracts.ids import HubCode, TenantId
from infrastructure import Database as Addresses
from infrastructure import run_apart
from integration.metering.service import Hub, charges, eventually
from integration.metering.stored import LHR, StoredMetering, opened, unexplained_gpu_ns
from metering.jobs import CHECKS_OF_A_HUB, Finals, Releases
from metering.store import allocations, hubs, prices
from metering.store.allocations import lock_due_allocations
from metering.store.quarantine import ListedQuarantine, QuarantineFilter, list_quarantined
from unit.metering.hub_events import HOUR_MS, NOON_MS, ended, interval

KHI = HubCode("khi")
UNFINISHED = 5_000


async def end_many(metering: StoredMetering, count: int) -> None:
    """Allocations of Lahore that have ended, of which usage is still missing."""
    await metering.rows(
        "insert into allocations (hub, allocation_id, tenant_id, project_id, ended_ms, cause, "
        "reserved_gpu_ms) select 'lhr', 'unfinished-' || n, 'ravi-health', 'main', $1, 'user', 9 "
        "from generate_series(1, $2::int) as n",
        NOON_MS + HOUR_MS,
        count,
    )


async def due(metering: StoredMetering, watermark_ms: int | None = None) -> list[str]:
    """Which allocations the next look takes up."""
    watermarks = {LHR: watermark_ms, KHI: None}
    async with metering.writer.transaction() as connection:
        found = await lock_due_allocations(connection, watermarks, CHECKS_OF_A_HUB)
    return [allocation.key.allocation_id for allocation in found]


async def finals(metering: StoredMetering) -> int:
    """How many finals are in the outbox."""
    [row] = await metering.rows(
        "select count(*) as found from outbox where position('final'::bytea in message_value) > 0"
    )
    return int(row["found"])


async def test_unfinished_allocations_of_one_hub_delay_no_other(
    migrated: Callable[[str], Addresses],
) -> None:
    """5 000 wait in Lahore: the first look takes Karachi's up, and later ones take up none."""
    async with opened(migrated("metering")) as metering:
        await metering.facts(["ravi-health"])
        async with metering.writer.transaction() as connection:
            await hubs.add_hub(connection, KHI, "Karachi", 60_000)
        await end_many(metering, UNFINISHED)
        await metering.take([interval(hub="khi")], hub=KHI)
        await metering.take([ended(NOON_MS + HOUR_MS, HOUR_MS, hub="khi")], "ended", hub=KHI)
        taken_up = await due(metering)
        assert CHECKS_OF_A_HUB + 1 == len(taken_up)
        assert "job-1" in taken_up
        job = Finals(metering.outbox)
        async with metering.writer.connection() as connection:
            while await due(metering):
                await job.run(connection)
        assert 1 == await finals(metering)
        # They rest: no look takes any up, until something of one changes.
        await metering.take([interval(allocation_id="unfinished-7")])
        assert ["unfinished-7"] == await due(metering)
        # Or its hub is complete past their end, and then in bounded parts.
        assert CHECKS_OF_A_HUB <= len(await due(metering, NOON_MS + HOUR_MS))
        async with metering.writer.transaction() as connection:
            await hubs.save_watermark(connection, LHR, NOON_MS + HOUR_MS)
        async with metering.writer.connection() as connection:
            while await due(metering, NOON_MS + HOUR_MS):
                await job.run(connection)
        assert 1 + UNFINISHED == await finals(metering)


async def test_look_at_an_end_and_its_last_usage_at_once_misses_nothing(
    migrated: Callable[[str], Addresses],
) -> None:
    """200 rounds: while a look lets an allocation rest, the usage that completes it is metered."""
    rounds = 200
    async with opened(migrated("metering")) as metering:
        await metering.facts(["ravi-health"])
        names = [f"job-{number}" for number in range(rounds)]
        await metering.take(
            [ended(NOON_MS + HOUR_MS, HOUR_MS, allocation_id=name) for name in names], "ended"
        )
        job = Finals(metering.outbox)
        for number, name in enumerate(names):
            start_ms = NOON_MS - number * HOUR_MS
            usage = interval(start_ms, start_ms + HOUR_MS, allocation_id=name)
            async with metering.writer.connection() as connection:
                await asyncio.gather(job.run(connection), metering.take([usage]))
                await job.run(connection)
        assert rounds == await finals(metering)


async def test_an_end_is_looked_at_a_second_time_before_it_rests(
    migrated: Callable[[str], Addresses],
) -> None:
    """Who billed before the end was committed woke nobody; its hub, complete, is not waited out."""
    async with opened(migrated("metering")) as metering:
        await metering.facts(["ravi-health"])
        await metering.take([ended(NOON_MS, 9, allocation_id=name) for name in "ab"], "ended")
        job = Finals(metering.outbox)
        async with metering.writer.connection() as connection:
            await job.run(connection)
            rests = (
                "select check_at = 'infinity' as rests from allocations where allocation_id = $1"
            )
            assert [False] == [row["rests"] for row in await metering.rows(rests, "a")]
            # A minute later.
            soon = "update allocations set check_at = clock_timestamp() where allocation_id = 'a'"
            await metering.rows(soon)
            await job.run(connection)
        assert [True] == [row["rests"] for row in await metering.rows(rests, "a")]
        assert [False] == [row["rests"] for row in await metering.rows(rests, "b")]
        assert ["a", "b"] == sorted(await due(metering, NOON_MS))


async def test_end_is_final_once_its_tenant_becomes_known_however_long_it_was_put_off(
    migrated: Callable[[str], Addresses],
) -> None:
    """The tenant wakes it: nobody looks at it every second meanwhile."""
    async with opened(migrated("metering")) as metering:
        await metering.facts(["ravi-health"])
        await metering.take([ended(NOON_MS, 0, tenant_id="late")], "ended")
        job = Finals(metering.outbox)
        async with metering.writer.connection() as connection:
            await job.run(connection)
        assert [] == await due(metering)
        async with metering.writer.transaction() as connection:
            new = await prices.save_tenants(connection, {TenantId("late"): "PKR"})
            await allocations.wake_tenants(connection, new)
        assert ["job-1"] == await due(metering)


async def test_bytes_of_released_records_are_forgotten_and_no_count_changes(
    migrated: Callable[[str], Addresses],
) -> None:
    """After 90 days; what is open or was dismissed keeps its bytes, the identity stays exact."""
    async with opened(migrated("metering")) as metering:
        await metering.facts(["ravi-health"])
        await metering.take([interval(tenant_id="late"), interval(tenant_id="never")])
        await metering.know("late")
        job = Releases(metering.outbox)
        async with metering.writer.connection() as connection:
            await job.run(connection)
        before = await metering.sums()
        found: list[ListedQuarantine] = []
        for days, forgotten in ((89, [False, False]), (91, [True, False])):
            await metering.rows(
                "update quarantine set closed_at = clock_timestamp() - $1::int * interval '1 day' "
                "where state = 'released'",
                days,
            )
            async with metering.writer.connection() as connection:
                await Releases(metering.outbox).run(connection)
            async with metering.api.transaction(tenant="*") as connection:
                found, _ = await list_quarantined(
                    connection, QuarantineFilter(None, None, None), 0, 10
                )
            assert forgotten == [record.payload is None for record in found]
            assert forgotten == [record.headers == [] for record in found]
            assert forgotten == [record.forgotten_ms is not None for record in found]
        assert ["released", "open"] == [record.state for record in found]
        after = await metering.sums()
    assert before == after
    assert 0 == unexplained_gpu_ns(after)


@contextmanager
def overlapping_transactions(dsn: str) -> Iterator[None]:
    """Write to the outbox all the while, each transaction begun before the last one ends."""
    stop = threading.Event()

    async def write() -> None:
        connections = [await asyncpg.connect(dsn) for _ in range(2)]
        begun: list[asyncpg.transaction.Transaction] = []
        number = 0
        while not stop.is_set():
            connection = connections[number % 2]
            transaction = connection.transaction()
            await transaction.start()
            # The number is drawn, and whoever reads the outbox does not see it until the end.
            await connection.execute("insert into outbox (topic) values ('nobody reads it')")
            begun.append(transaction)
            await asyncio.sleep(0.05)
            number += 1
            if len(begun) == 2:
                await begun.pop(0).rollback()
        for transaction in begun:
            await transaction.rollback()
        for connection in connections:
            await connection.close()

    thread = threading.Thread(target=lambda: run_apart(write()))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_watermark_is_published_although_write_transactions_overlap_for_ever(hub: Hub) -> None:
    """There is no instant without an open one, and the hub is complete all the same."""

    def told() -> list[int]:
        return [
            message["watermark_ms"]
            for message in charges(hub.metering.infrastructure, hub.code)
            if message["kind"] == "watermark"
        ]

    with overlapping_transactions(hub.metering.database.admin):
        for hour in range(3):
            until_ms = NOON_MS + hour * HOUR_MS
            hub.complete(until_ms)
            hub.flush()
            assert until_ms in eventually(told, partial(contains, until_ms))


def contains(wanted: int, found: list[int]) -> bool:
    """Whether it is there."""
    return wanted in found
