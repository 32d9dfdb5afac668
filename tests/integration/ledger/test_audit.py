"""The audit of books that are larger than a slice, and that grow while they are audited."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from integration.ledger.real import RealLedger
from ledger.audit import audit
from runtime.database import Database
from unit.ledger.values import HOUR_MS, total

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from runtime.database import Connection


class Watched(Database):
    """A pool that lets something happen before each of its transactions and connections."""

    before = 0

    async def happens(self) -> None:
        """What happens in between."""

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend a connection, after what happens."""
        self.before += 1
        await self.happens()
        async with super().connection() as connection:
            yield connection


async def book_many(ledger: RealLedger, tenant_id: str, begin: int, count: int) -> None:
    """Book a charge in each of so many buckets, and let each third one grow."""
    for number in range(begin, begin + count):
        hour_ms = 1_753_920_000_000 + number % 5 * HOUR_MS
        for micro in (1, 2)[: 1 + (number % 3 == 0)]:
            said = total(micro, bucket=f"{number:x}", tenant_id=tenant_id, hour_ms=hour_ms)
            await ledger.book(said)


async def test_a_book_that_grows_between_slices_is_found_sound(ledger: RealLedger) -> None:
    """Each slice is compared at its own head: nothing has to stand still for an audit."""
    tenant_id = await ledger.tenant("grows", "startup")
    await ledger.grant(tenant_id, "g-grows", 10**6)
    await book_many(ledger, tenant_id, 0, 40)

    class Growing(Watched):
        async def happens(self) -> None:
            # Behind the slice that is compared next, and before it: in both the fold is taken on.
            number = 1_000 + self.before
            await book_many(ledger, tenant_id, number, 1)
            if self.before % 4 == 0:
                await ledger.hold(tenant_id, f"h-{number}", 1)

    database = Growing(ledger.addresses.reader, name="growing")
    await database.open()
    try:
        async with asyncio.timeout(300):
            found = await audit(database, page=7)
    finally:
        await database.close()
    assert [] == [line for line in found if tenant_id in line]
    assert database.before > 20


async def test_no_transaction_of_an_audit_outlives_a_slice(ledger: RealLedger) -> None:
    """Between two slices the audit holds no snapshot: vacuum waits for a slice, not for a book."""
    tenant_id = await ledger.tenant("slices", "startup")
    await book_many(ledger, tenant_id, 0, 30)
    open_transactions: list[int] = []

    class Observed(Watched):
        async def happens(self) -> None:
            async with ledger.admin.connection() as connection:
                open_transactions.append(
                    await connection.fetchval(
                        "select count(*) from pg_stat_activity where application_name = $1"
                        " and (backend_xmin is not null or xact_start is not null)",
                        "observed",
                    )
                )

    database = Observed(ledger.addresses.reader, name="observed")
    await database.open()
    try:
        await audit(database, page=5)
    finally:
        await database.close()
    # Entries and buckets of this book alone make six pages each.
    assert len(open_transactions) > 12
    assert {0} == set(open_transactions)


async def test_a_bucket_that_was_altered_in_a_late_slice_is_found(ledger: RealLedger) -> None:
    """The last of many slices is compared like the first."""
    tenant_id = await ledger.tenant("late-slice", "startup")
    await book_many(ledger, tenant_id, 0, 30)
    async with ledger.admin.transaction() as connection:
        await connection.execute(
            "update buckets set revision = 7 where (tenant_id, hour_at, bucket_id) ="
            " (select tenant_id, hour_at, bucket_id from buckets where tenant_id = $1"
            "   order by hour_at desc, bucket_id desc limit 1)",
            tenant_id,
        )
    found = [line for line in await ledger.audit() if tenant_id in line]
    assert [f"book {tenant_id}: buckets differ from the entries"] == found
