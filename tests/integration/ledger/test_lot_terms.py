"""Scopes, shares, expiry and reversal on a real database: what is written is what was decided."""

from __future__ import annotations

import pytest

from hisab_contracts.entries import Entry, GrantScope, entry_hash
from hisab_contracts.ids import HubCode, ProjectId, TenantId
from integration.ledger.real import RealLedger, Refused
from ledger.core.lots import Lot
from ledger.core.withdrawals import (
    AlreadyDrawn,
    AlreadyReclaimed,
    AlreadyReversed,
    GrantNotApproved,
    NotExpired,
)
from ledger.placement import TenantPartitions
from ledger.store.queries import hold_of, projected_book
from runtime.clock import now_ms
from unit.ledger.values import HOUR_MS, at, total, watermark


async def kinds_of(ledger: RealLedger, tenant_id: str) -> list[str]:
    """The kinds of a book's entries, in order."""
    return [entry.kind for entry in await ledger.entries(tenant_id)]


async def lots_of(ledger: RealLedger, tenant_id: str) -> dict[str, Lot]:
    """Every lot of a book, also what is spent or has expired."""
    async with ledger.reader.connection() as connection:
        book = await projected_book(connection, TenantId(tenant_id))
    return {lot.grant_id: lot for lot in book.lots}


async def test_terms_are_stored_and_decide_who_pays(ledger: RealLedger) -> None:
    """A subsidy for one project, a lot for another hub, and a general one behind them."""
    await ledger.tenant("terms", "startup")
    scope = GrantScope(projects=(ProjectId("main"),))
    await ledger.grant("terms", "t-share", 1_000, scope=scope, coverage_bps=4_000)
    await ledger.grant("terms", "t-khi", 1_000, scope=GrantScope(hubs=(HubCode("khi"),)))
    await ledger.grant("terms", "t-all", 50, priority=1)
    await ledger.book(total(100, tenant_id="terms", hour_ms=at(1)))
    await ledger.book(total(200, tenant_id="terms", hour_ms=at(1)))
    lots = await lots_of(ledger, "terms")
    drawn = {grant_id: lot.drawn_micro for grant_id, lot in lots.items()}
    assert {"t-share": 80, "t-khi": 0, "t-all": 50} == drawn
    assert (scope, 4_000) == (lots["t-share"].scope, lots["t-share"].coverage_bps)
    assert 70 == (await ledger.balance("terms")).book.unfunded_micro
    grants = [entry.grant for entry in await ledger.entries("terms") if entry.grant is not None]
    assert [4_000, None, None] == [grant.coverage_bps for grant in grants]


async def test_a_lot_expires_by_the_watermarks_and_late_usage_takes_back(
    ledger: RealLedger,
) -> None:
    """Not by the clock, and not while one hub is behind; what returns expires again."""
    await ledger.tenant("late")
    await ledger.grant("late", "l-old", 100, expires_ms=at(2))
    await ledger.book(watermark("lhr", 1, at(9)), watermark("khi", 1, at(1)))
    await ledger.expire_lots()
    assert ["grant"] == await kinds_of(ledger, "late")
    await ledger.book(watermark("khi", 2, at(2)))
    await ledger.expire_lots()
    await ledger.expire_lots()
    assert ["grant", "expiry"] == await kinds_of(ledger, "late")
    await ledger.book(total(30, tenant_id="late", hour_ms=at(1)))
    await ledger.book(total(30, tenant_id="late", hour_ms=at(1), refunded_micro=10))
    assert [
        "grant", "expiry", "expiry_reversed", "charge", "charge", "expiry",
    ] == await kinds_of(ledger, "late")  # fmt: skip
    lot = (await lots_of(ledger, "late"))["l-old"]
    assert (0, 80, 20) == (lot.remaining_micro, lot.expired_micro, lot.drawn_micro)
    balance = await ledger.balance("late")
    assert (20, 20, 80) == (
        balance.book.charged_micro,
        balance.book.funded_micro,
        balance.book.breakage_micro,
    )


async def test_a_lot_waits_for_the_partition_of_its_tenant(ledger: RealLedger) -> None:
    """A watermark that came through another says nothing of its charges."""
    two, one = TenantPartitions(lambda: 2), ledger.partitions
    names = {two.of(name): name for name in map(str, range(1_000, 1_100))}
    here, there = names[0], names[1]
    for tenant_id in (here, there):
        await ledger.tenant(tenant_id)
        await ledger.grant(tenant_id, f"g-{tenant_id}", 10, expires_ms=at(3))
    await ledger.book(watermark("lhr", 5, at(9)), watermark("khi", 5, at(9)), partition=0)
    ledger.partitions = two
    await ledger.expire_lots()
    ledger.partitions = one
    assert ["grant", "expiry"] == await kinds_of(ledger, here)
    assert ["grant"] == await kinds_of(ledger, there)


async def test_what_a_hold_reserved_moves_before_its_lot_expires(ledger: RealLedger) -> None:
    """In one transaction with the expiry; a reader sees what nothing guarantees any more."""
    hour_ms = now_ms() // HOUR_MS * HOUR_MS
    await ledger.tenant("moves", limit_micro=15)
    await ledger.grant("moves", "m-old", 100, expires_ms=hour_ms + 2 * HOUR_MS)
    await ledger.hold("moves", "h-first", 60)
    await ledger.hold("moves", "h-second", 40)
    await ledger.grant("moves", "m-new", 70)
    ahead_ms = hour_ms + 3 * HOUR_MS
    await ledger.book(watermark("lhr", 9, ahead_ms), watermark("khi", 9, ahead_ms))
    await ledger.expire_lots()
    assert ["hold_moved", "hold_moved", "expiry"] == (await kinds_of(ledger, "moves"))[-3:]
    async with ledger.reader.connection() as connection:
        first = await hold_of(connection, "h-first", now_ms())
        second = await hold_of(connection, "h-second", now_ms())
    assert first is not None
    assert second is not None
    assert (60, 0) == (first.open_micro, first.short_micro)
    assert (25, 15) == (second.open_micro, second.short_micro)
    lots = await lots_of(ledger, "moves")
    assert (100, 70) == (lots["m-old"].expired_micro, lots["m-new"].reserved_micro)


async def test_a_grant_is_reversed_once_and_not_after_it_was_drawn_on(ledger: RealLedger) -> None:
    """Both books in one transaction; a refusal leaves nothing behind."""
    await ledger.tenant("wrong")
    await ledger.programme("small", 100)
    await ledger.grant("wrong", "w-unused", 60, programme_id="small")
    await ledger.grant("wrong", "w-used", 40, programme_id="small")
    unused, used = [entry for entry in await ledger.entries("wrong") if entry.grant is not None]
    reversal = await ledger.reverse(unused)
    assert (unused.entry_id, "wrong tenant") == (reversal.reverses, reversal.reason)
    # The programme has its 60 back, to the last micro-unit.
    await ledger.grant("wrong", "w-right", 60, programme_id="small")
    await ledger.book(total(110, tenant_id="wrong"))
    with pytest.raises(Refused) as again:
        await ledger.reverse(unused)
    with pytest.raises(Refused) as drawn:
        await ledger.reverse(used)
    assert AlreadyReversed() == again.value.refusal
    assert isinstance(drawn.value.refusal, AlreadyDrawn)
    assert 10 == (await ledger.balance("wrong")).book.receivable_micro


async def test_a_grant_is_revoked_expires_and_is_reclaimed_once(ledger: RealLedger) -> None:
    """Its window ends with the hour; what the watermarks leave goes back to the programme."""
    hour_ms = now_ms() // HOUR_MS * HOUR_MS
    await ledger.tenant("ended")
    await ledger.programme("brief", 100)
    await ledger.grant("ended", "e-one", 100, programme_id="brief")
    assert ["grant_revoked"] == await ledger.revoke("e-one")
    lot = (await lots_of(ledger, "ended"))["e-one"]
    assert lot.expires_ms is not None
    # The hour may have turned since.
    assert lot.expires_ms in (hour_ms + HOUR_MS, hour_ms + 2 * HOUR_MS)
    with pytest.raises(Refused) as again:
        await ledger.revoke("e-one")
    assert GrantNotApproved("revoked") == again.value.refusal
    with pytest.raises(Refused) as early:
        await ledger.reclaim("e-one")
    assert NotExpired() == early.value.refusal
    await ledger.book(watermark("lhr", 99, lot.expires_ms), watermark("khi", 99, lot.expires_ms))
    await ledger.expire_lots()
    assert ["reclaimed"] == await ledger.reclaim("e-one")
    with pytest.raises(Refused) as twice:
        await ledger.reclaim("e-one")
    assert AlreadyReclaimed() == twice.value.refusal
    await ledger.grant("ended", "e-two", 100, programme_id="brief")


async def test_what_returns_within_a_batch_expires_again_like_what_returns_later(
    ledger: RealLedger,
) -> None:
    """Usage taken back out of an expired lot, and its correction, in one batch or in two."""
    late, corrected = (
        total(60, tenant_id="batched", hour_ms=at(1)),
        total(0, tenant_id="batched", hour_ms=at(1), revision=1),
    )
    await ledger.tenant("batched")
    expires_ms = (now_ms() // HOUR_MS + 9) * HOUR_MS
    await ledger.grant("batched", "b-old", 100, expires_ms=expires_ms)
    await ledger.book(watermark("lhr", 999, expires_ms), watermark("khi", 999, expires_ms))
    await ledger.expire_lots()
    await ledger.book(late, corrected)
    assert [
        "grant", "expiry", "expiry_reversed", "charge", "charge", "expiry",
    ] == await kinds_of(ledger, "batched")  # fmt: skip


async def test_entries_of_every_kind_read_back_as_they_were_hashed(ledger: RealLedger) -> None:
    """What only some have is stored with them, and the audit folds them to what is projected."""
    assert [] == await ledger.audit()
    found: list[Entry] = []
    for tenant_id in ("terms", "late", "moves", "wrong", "ended"):
        found += await ledger.entries(tenant_id)
    kinds = {"grant", "charge", "expiry", "expiry_reversed", "hold_moved", "reversal"}
    kinds |= {"grant_revoked", "reclaimed"}
    assert kinds <= {entry.kind for entry in found}
    assert all(entry.hash == entry_hash(entry) for entry in found)
