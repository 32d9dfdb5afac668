"""Books on a real database: the worked afternoon, redelivery, races, parked charges, audits."""

from __future__ import annotations

import asyncio

import pytest

from hisab_contracts.charges import AllocationFinal, HubWatermark
from hisab_contracts.ids import AllocationId, HubCode, TenantId
from hisab_contracts.units import MAX_MICRO
from integration.ledger.real import RealLedger, Refused, opened
from ledger.core.holds import HoldClosed, HoldEnd, InsufficientCredit
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
from scenarios.ledger_afternoon import A_LIMIT, B_LOT, STEPS, Hold, Invoiced, Total
from unit.ledger.values import at, total, watermark

PKR = 1_000_000


def final_of(tenant_id: str, hub: str, allocation_id: str) -> AllocationFinal:
    """The final of an allocation at a hub."""
    return AllocationFinal(
        tenant_id=TenantId(tenant_id),
        hub=HubCode(hub),
        allocation_id=AllocationId(allocation_id),
        ended_ms=0,
    )


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


@pytest.mark.defect("L12", "F32")
async def test_credit_for_k_admits_exactly_k_holds_over_two_processes(ledger: RealLedger) -> None:
    """64 workers, two pools of connections, one book."""
    await ledger.tenant("race", limit_micro=700)
    async with opened(ledger.addresses) as other:

        async def ask(number: int) -> bool:
            try:
                await (ledger, other)[number % 2].hold("race", f"r{number}", 100)
            except Refused as refused:
                if not isinstance(refused.refusal, InsufficientCredit):
                    raise
                return False
            return True

        admitted = await asyncio.gather(*(ask(number) for number in range(64)))
    assert 7 == sum(admitted)
    assert 0 == (await ledger.balance("race")).available_micro


@pytest.mark.defect("L11", "F40", "F41")
async def test_a_hold_ends_by_the_first_of_final_release_and_expiry(ledger: RealLedger) -> None:
    """Each frees what is left; what comes later finds it ended."""
    await ledger.tenant("ends", limit_micro=1_000)
    await ledger.hold("ends", "by-final", 300, allocation_id="a1")
    await ledger.hold("ends", "by-clock", 300, expires_ms=now_ms() + 300)
    await ledger.hold("ends", "by-hand", 300)
    final = final_of("ends", "lhr", "a1")
    await ledger.book(total(100, tenant_id="ends", hold_id="by-final", allocation_id="a1"), final)
    assert "released" == (await ledger.release("by-hand")).ended_by
    await asyncio.sleep(0.4)
    await ledger.end_expired_holds()
    balance = await ledger.balance("ends")
    assert (900, 0) == (balance.available_micro, balance.held_micro)
    ends: tuple[tuple[str, HoldEnd], ...] = (
        ("by-final", "final"),
        ("by-clock", "expired"),
        ("by-hand", "released"),
    )
    for hold_id, ended_by in ends:
        with pytest.raises(Refused) as refused:
            await ledger.release(hold_id)
        assert HoldClosed(ended_by) == refused.value.refusal


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
    """An unknown tenant, a book beyond 64 bits, a refund; the audit names each."""
    await ledger.tenant("parks", limit_micro=10)
    refund = total(9, bucket="3", tenant_id="parks")
    await ledger.book(
        total(1, tenant_id="nobody"),
        total(MAX_MICRO, bucket="1", tenant_id="parks"),
        total(1, bucket="2", tenant_id="parks"),
        type(refund)(
            **{**{f: getattr(refund, f) for f in refund.__struct_fields__}, "refunded_micro": 1}
        ),
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
