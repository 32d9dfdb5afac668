"""Books on a real database: the worked afternoon, redelivery, races, parked charges, audits."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from collections import Counter

import pytest

from hisab_contracts.charges import AllocationFinal, HubWatermark
from hisab_contracts.ids import AllocationId, HubCode, TenantId
from hisab_contracts.topics import ACCESS, TENANTS
from hisab_contracts.units import MAX_MICRO
from integration.ledger.real import FAR_MS, RealLedger, Refused, opened
from ledger import jobs
from ledger.commands import Commands
from ledger.consumer import ChargeConsumer
from ledger.core.holds import HoldClosed, HoldEnd, InsufficientCredit
from ledger.store.books import open_books, save
from ledger.store.directory import find_tenant
from ledger.store.entries import entries_after
from ledger.store.queries import (
    balance_of,
    buckets_after,
    hold_of,
    holds_after,
    projected_book,
)
from runtime.clock import now_ms
from runtime.database import ALL_TENANTS, ClockStep
from runtime.outbox import Outbox
from scenarios.ledger_afternoon import A_LIMIT, B_LOT, STEPS, Hold, Invoiced, Total
from unit.ledger.values import at, hold, total, watermark

PKR = 1_000_000


def final_of(tenant_id: str, hub: str, allocation_id: str) -> AllocationFinal:
    """The final of an allocation at a hub."""
    return AllocationFinal(
        tenant_id=TenantId(tenant_id),
        hub=HubCode(hub),
        allocation_id=AllocationId(allocation_id),
        ended_ms=0,
    )


async def over_at_once(ledger: RealLedger, tenant_id: str, holds: int, hold_micro: int) -> int:
    """Place holds whose time comes the millisecond after; return the instant before it.

    In one transaction, so that all are over when it commits, on a machine of any speed.
    """
    async with ledger.api.transaction(tenant=ALL_TENANTS) as connection:
        unit = await open_books(connection, [tenant_id], now_ms)
        for number in range(holds):
            name = f"{tenant_id}-{number:04}"
            command = hold(name, hold_micro, expires_ms=unit.now_ms + 1)
            assert isinstance(unit.enter(tenant_id, command), tuple)
        await save(connection, unit.changes())
    return unit.now_ms


async def test_the_worked_afternoon_shows_the_worked_figures(ledger: RealLedger) -> None:
    """Step by step; the lot stays open here, because holds go by the wall clock."""
    tenants = {
        "A": await ledger.tenant("A", "commercial", A_LIMIT * PKR),
        "B": await ledger.tenant("B", "startup"),
    }
    await ledger.grant("B", "G1", B_LOT * PKR)
    for step in STEPS:
        for deed in step.does:
            if isinstance(deed, Total):
                await ledger.book(
                    total(
                        deed.charge * PKR,
                        gpu_ns=deed.gpu_ns,
                        bucket=f"{deed.allocation[-1]}{deed.hour}",
                        hour_ms=at(deed.hour),
                        hold_id=deed.hold,
                        allocation_id=deed.allocation,
                        tenant_id=tenants[deed.tenant],
                        hub=deed.hub,
                    )
                )
            elif isinstance(deed, Invoiced):
                await ledger.invoiced(tenants[deed.tenant], deed.document, deed.amount * PKR)
            elif isinstance(deed, Hold):
                if deed.refused is None:
                    await ledger.hold(tenants[deed.tenant], deed.name, deed.amount * PKR)
                else:
                    with pytest.raises(Refused) as refused:
                        await ledger.hold(tenants[deed.tenant], deed.name, deed.amount * PKR)
                    available, shortfall = deed.refused
                    expected = InsufficientCredit(
                        available_micro=available * PKR, shortfall_micro=shortfall * PKR
                    )
                    assert expected == refused.value.refusal
        a, b = await ledger.balance("A"), await ledger.balance("B")
        assert step.a == (
            a.book.receivable_micro // PKR,
            a.book.invoiced_micro // PKR,
            a.available_micro // PKR,
        )
        assert step.b[:2] == (
            sum(lot.remaining_micro for lot in b.lots) // PKR,
            b.held_micro // PKR,
        )
    b = await ledger.balance("B")
    assert (560 * PKR, 500 * PKR, 60 * PKR) == (
        b.book.charged_micro,
        b.book.funded_micro,
        b.book.unfunded_micro,
    )
    assert [] == await ledger.audit()


@pytest.mark.defect("M29", "L6")
async def test_a_batch_delivered_again_after_a_restart_books_nothing(ledger: RealLedger) -> None:
    """Totals are not increments."""
    await ledger.tenant("again", limit_micro=10**9)
    batch = ledger.batch([total(5, bucket=str(n), tenant_id="again") for n in range(20)])
    async with ledger.writer.transaction() as connection:
        await ledger.consumer.book_charges(batch, connection)
    async with (
        opened(ledger.addresses) as restarted,
        restarted.writer.transaction() as connection,
    ):
        await restarted.consumer.book_charges(batch, connection)
    balance = await ledger.balance("again")
    assert (20, 100) == (balance.book.seq, balance.book.charged_micro)


@pytest.mark.defect("L12", "F32", "M28")
async def test_credit_for_k_admits_exactly_k_holds_over_two_processes(ledger: RealLedger) -> None:
    """64 workers in two processes of their own, one book; they begin together."""
    await ledger.tenant("race", limit_micro=700)
    rivals = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "integration.ledger.rival"),
            *(ledger.addresses.api, "race", name, "32", "100"),
            stdin=PIPE,
            stdout=PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for name in ("left", "right")
    ]
    for rival in rivals:
        assert rival.stdout is not None
        assert b"ready\n" == await rival.stdout.readline()
    # Each has its connections by now: nothing but the lock of the book orders them.
    answers = await asyncio.gather(*(rival.communicate(b"go\n") for rival in rivals))
    assert [0, 0] == [rival.returncode for rival in rivals]
    assert 7 == sum(int(answer) for answer, _ in answers)
    balance = await ledger.balance("race")
    assert (7, 0, 700) == (balance.book.seq, balance.available_micro, balance.held_micro)
    assert [] == [line for line in await ledger.audit() if "race" in line]


@pytest.mark.defect("L11", "F40", "F41")
async def test_a_hold_ends_by_the_first_of_final_release_and_expiry(ledger: RealLedger) -> None:
    """Each frees what is left; what comes later finds it ended."""
    await ledger.tenant("ends", limit_micro=1_000)
    await ledger.hold("ends", "by-final", 300, allocation_id="a1")
    await over_at_once(ledger, "ends", 1, 300)
    await ledger.hold("ends", "by-hand", 300)
    final = final_of("ends", "lhr", "a1")
    await ledger.book(total(100, tenant_id="ends", hold_id="by-final", allocation_id="a1"), final)
    assert "released" == (await ledger.release("by-hand")).ended_by
    await ledger.end_expired_holds()
    balance = await ledger.balance("ends")
    assert (900, 0) == (balance.available_micro, balance.held_micro)
    ends: tuple[tuple[str, HoldEnd], ...] = (
        ("by-final", "final"),
        ("ends-0000", "expired"),
        ("by-hand", "released"),
    )
    for hold_id, ended_by in ends:
        with pytest.raises(Refused) as refused:
            await ledger.release(hold_id)
        assert HoldClosed(ended_by) == refused.value.refusal


async def kinds_of(ledger: RealLedger, tenant_id: str) -> Counter[str]:
    """Count the entries of a book by kind."""
    async with ledger.api.transaction(tenant=tenant_id) as connection:
        entries = await entries_after(connection, tenant_id, 0, 10_000)
    return Counter(entry.kind for entry in entries)


@pytest.mark.defect("L11", "F40", "F41")
async def test_two_thousand_holds_over_in_one_second_are_over_though_nobody_sweeps(
    ledger: RealLedger,
) -> None:
    """Reads and refusals go by the clock; an admission puts all of them on the record first."""
    await ledger.tenant("mass", limit_micro=5_000)
    await ledger.grant("mass", "g-mass", 15_000)
    before_ms = await over_at_once(ledger, "mass", 2_000, 10)
    before = await ledger.balance("mass", at_ms=before_ms)
    assert (0, 20_000) == (before.available_micro, before.held_micro)
    after = await ledger.balance("mass")
    assert (20_000, 0) == (after.available_micro, after.held_micro)
    assert [(15_000, 0)] == [(lot.remaining_micro, lot.reserved_micro) for lot in after.lots]
    async with ledger.api.transaction(tenant="mass") as connection:
        found = await hold_of(connection, "mass-0000", now_ms())
    assert found is not None
    assert ("expired", 0, 20_000) == (found.ended_by, found.open_micro, found.available_micro)
    for hold_id, micro in (("too-much", 20_001), ("mass-0001", 0)):
        with pytest.raises(Refused) as refused:
            await (ledger.hold("mass", hold_id, micro) if micro else ledger.release(hold_id))
        assert refused.value.refusal in (
            InsufficientCredit(available_micro=20_000, shortfall_micro=1),
            HoldClosed("expired"),
        )
    assert Counter(grant=1, hold_placed=2_000) == await kinds_of(ledger, "mass")
    admitted = await ledger.hold("mass", "all-of-it", 20_000)
    assert (20_000, 0) == (admitted.open_micro, admitted.available_micro)
    expected = Counter(grant=1, hold_placed=2_001, hold_released=2_000)
    assert expected == await kinds_of(ledger, "mass")
    assert [] == [line for line in await ledger.audit() if "mass" in line]


@pytest.mark.defect("L11", "F40")
async def test_charges_and_finals_find_over_what_is_over_though_nobody_sweeps(
    ledger: RealLedger,
) -> None:
    """The lot that an expired hold kept pays before the limit does, in the same batch."""
    await ledger.tenant("overdue", limit_micro=1_000)
    await ledger.grant("overdue", "g-overdue", 100)
    await ledger.hold("overdue", "later", 5, allocation_id="job")
    await over_at_once(ledger, "overdue", 1, 95)
    await ledger.book(
        total(95, bucket="1", tenant_id="overdue"),
        final_of("overdue", "lhr", "job"),
    )
    book = (await ledger.balance("overdue")).book
    assert (95, 0, 0) == (book.funded_micro, book.receivable_micro, book.reserved_micro)
    assert [] == [line for line in await ledger.audit() if "overdue" in line]


async def test_the_sweep_records_what_is_over_and_changes_no_answer(ledger: RealLedger) -> None:
    """More than one sweep's worth, of several books, in one run; a second run finds nothing."""
    for tenant_id in ("sweep-a", "sweep-b"):
        await ledger.tenant(tenant_id, limit_micro=1_500)
        await over_at_once(ledger, tenant_id, jobs.HOLDS_PER_SWEEP - 50, 10)
    answers = [await ledger.balance(name) for name in ("sweep-a", "sweep-b")]
    await ledger.end_expired_holds()
    for answer, name in zip(answers, ("sweep-a", "sweep-b"), strict=True):
        swept = await ledger.balance(name)
        assert (1_500, 0) == (answer.available_micro, answer.held_micro)
        assert (1_500, 0) == (swept.available_micro, swept.held_micro)
        expected = Counter(hold_placed=150, hold_released=150)
        assert expected == await kinds_of(ledger, name)
    commits = ledger.commits
    await ledger.end_expired_holds()
    assert commits == ledger.commits
    assert [] == [line for line in await ledger.audit() if "sweep-" in line]


async def test_a_clock_that_jumps_a_day_ahead_for_one_reading_ends_nothing(
    ledger: RealLedger,
) -> None:
    """Command, charge and sweep: whoever meets the jump writes nothing, and works the next time."""
    await ledger.tenant("jump", limit_micro=1_000)
    await ledger.hold("jump", "h-jump", 300, expires_ms=now_ms() + 3_600_000)
    before = await ledger.balance("jump")
    steps_ms: list[int] = []

    def clock() -> int:
        return now_ms() + (steps_ms.pop() if steps_ms else 0)

    commands = Commands(Outbox((TENANTS, ACCESS)), lambda: None, ledger.partitions, clock)
    consumer = ChargeConsumer(lambda: None, clock)

    async def place() -> None:
        async with ledger.api.transaction(tenant=ALL_TENANTS) as connection:
            await commands.enter_hold(
                connection, "jump", hold("after-jump", 100, expires_ms=FAR_MS)
            )

    async def charge() -> None:
        batch = ledger.batch([total(50, tenant_id="jump", hold_id="h-jump")])
        async with ledger.writer.transaction() as connection:
            await consumer.book_charges(batch, connection)

    async def sweep() -> None:
        async with ledger.writer.connection() as connection:
            await jobs.end_expired_holds(connection, lambda: None, clock)

    for act, readings in ((place, 1), (charge, 1), (sweep, 2)):
        steps_ms[:] = [86_400_000] * readings
        with pytest.raises(ClockStep):
            await act()
        assert before == await ledger.balance("jump")
        steps_ms[:] = [86_400_000] * (readings - 1)
        await act()
        before = await ledger.balance("jump")
    assert (600, 350) == (before.available_micro, before.held_micro)
    assert 50 == before.book.receivable_micro


@pytest.mark.defect("L11")
async def test_a_final_releases_no_hold_of_another_hub(ledger: RealLedger) -> None:
    """Allocation ids are unique within a hub only, even where a charge names the other's hold."""
    await ledger.tenant("hubs", limit_micro=1_000)
    for hub in ("lhr", "khi"):
        await ledger.hold("hubs", f"at-{hub}", 300, allocation_id="job-1", hub=hub)
    final = final_of("hubs", "khi", "job-1")
    await ledger.book(total(1, tenant_id="hubs", hold_id="at-lhr", allocation_id="job-1"), final)
    with pytest.raises(Refused) as refused:
        await ledger.release("at-khi")
    assert HoldClosed("final") == refused.value.refusal
    assert "released" == (await ledger.release("at-lhr")).ended_by


async def test_what_cannot_be_booked_is_parked_and_stops_nobody(ledger: RealLedger) -> None:
    """An unknown tenant, a book beyond 64 bits, too large a refund; the audit names each."""
    await ledger.tenant("parks", limit_micro=10)
    await ledger.book(
        total(1, tenant_id="nobody"),
        total(MAX_MICRO, bucket="1", tenant_id="parks"),
        total(1, bucket="2", tenant_id="parks"),
        total(9, bucket="3", tenant_id="parks", refunded_micro=10),
    )
    async with ledger.reader.transaction() as connection:
        reasons = await connection.fetch("select reason from parked_charges order by reason")
    assert ["out-of-range", "refund", "unknown-tenant"] == [row["reason"] for row in reasons]
    assert MAX_MICRO == (await ledger.balance("parks")).book.charged_micro
    found = [line for line in await ledger.audit() if line.startswith("parked")]
    assert 3 == len(found)
    assert found[0].startswith("parked charge: unknown-tenant, metering.charges.v1/0@")


async def test_completeness_is_the_lowest_watermark_of_every_hub_heard_of(
    ledger: RealLedger,
) -> None:
    """A hub without one, or one not heard of in the tenant's partition, makes it unknown."""
    await ledger.tenant("waits")

    async def until() -> int | None:
        return (await ledger.balance("waits")).complete_until_ms

    def mark(hub: str, revision: int, watermark_ms: int | None) -> HubWatermark:
        return watermark(hub, revision, watermark_ms)

    assert None is await until()
    await ledger.book(mark("lhr", 1, at(5)), mark("khi", 1, at(3)))
    assert at(3) == await until()
    await ledger.book(mark("khi", 3, at(4)), mark("khi", 2, at(9)))
    assert at(4) == await until()
    await ledger.book(mark("isb", 1, None), partition=1)
    assert None is await until()
    await ledger.book(mark("isb", 1, None))
    assert None is await until()
    await ledger.book(mark("isb", 2, at(2)))
    assert at(2) == await until()


@pytest.mark.defect("L21")
async def test_entries_read_back_as_they_were_hashed(ledger: RealLedger) -> None:
    """The feed is ascending, without gaps, and chains."""
    await ledger.tenant("feed", limit_micro=100)
    await ledger.grant("feed", "gf", 50)
    await ledger.hold("feed", "hf", 20)
    await ledger.book(total(60, tenant_id="feed", hold_id="hf"))
    await ledger.release("hf")
    async with ledger.api.transaction(tenant="feed") as connection:
        entries = await entries_after(connection, "feed", 0, 100)
        later = await entries_after(connection, "feed", 2, 100)
    assert ["grant", "hold_placed", "charge", "hold_released"] == [entry.kind for entry in entries]
    assert entries[2:] == later
    assert [1, 2, 3, 4] == [entry.seq for entry in entries]
    assert [entry.hash for entry in entries[:-1]] == [entry.prev_hash for entry in entries[1:]]
    recorded = [entry.recorded_ms for entry in entries]
    assert sorted(recorded) == recorded
    assert [] == [line for line in await ledger.audit() if not line.startswith("parked")]


@pytest.mark.defect("L26", "F64")
async def test_a_tenants_transaction_sees_only_its_own_rows(ledger: RealLedger) -> None:
    """Row-level security, whatever the query forgets."""
    await ledger.tenant("mine", limit_micro=10)
    await ledger.tenant("theirs", limit_micro=10)
    await ledger.book(total(1, tenant_id="mine"), total(1, tenant_id="theirs"))
    async with ledger.api.transaction(tenant="mine") as connection:
        assert None is await find_tenant(connection, "theirs")
        for table in ("entries", "books", "buckets", "tenants"):
            rows = await connection.fetch(f"select distinct tenant_id from {table}")
            assert ["mine"] == [row["tenant_id"] for row in rows], table
    async with ledger.api.connection() as connection:
        assert 0 == await connection.fetchval("select count(*) from entries")


async def test_columns_that_a_later_release_adds_do_not_disturb_this_one(
    ledger: RealLedger,
) -> None:
    """A `pre` migration runs while old code has connections open, with what they have prepared."""
    await ledger.tenant("older", limit_micro=100)
    await ledger.grant("older", "go", 50)
    await ledger.hold("older", "ho", 20)
    await ledger.book(total(5, tenant_id="older", hold_id="ho"))
    async with (
        ledger.admin.connection() as admin,
        ledger.reader.connection() as reader,
    ):

        async def read_all() -> tuple[object, ...]:
            return (
                await balance_of(reader, "older", now_ms(), 0),
                await hold_of(reader, "ho", now_ms()),
                await projected_book(reader, TenantId("older")),
                await buckets_after(reader, TenantId("older"), None, 100),
                await holds_after(reader, TenantId("older"), "", 100),
            )

        before = await read_all()
        for table in ("books", "lots", "holds", "buckets"):
            await admin.execute(f"alter table {table} add column later text")
        assert before == await read_all()
