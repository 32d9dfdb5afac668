"""Invoicing killed with -9 while it closes a month: every invoice once, no number missing."""

from __future__ import annotations

import asyncio
from itertools import count

import asyncpg
import msgspec
import pytest
from aiokafka import AIOKafkaProducer

from demo.api import Json
from e2e.outside import Outside, outside_of, until
from hisab_contracts.charges import HubWatermark
from hisab_contracts.ids import HubCode
from hisab_contracts.topics import CHARGES, partition_of
from hisab_contracts.units import month_bounds_ms
from stack import Stack
from unit.ledger.values import total

BILLED = 150
MONTH = "2025-07"
JULY_MS, END_MS = month_bounds_ms(MONTH)
CHARGE_MICRO = 840_000_000
INVOICES = "select count(*) from invoices"
PDFS = "select count(*) from invoice_pdfs"


async def book_july(outside: Outside, tenants: list[str]) -> None:
    """Say one charge per tenant, and that July is complete, as metering would."""
    producer: AIOKafkaProducer = outside.producer
    partitions = len(await producer.partitions_for(CHARGES))
    for number, tenant_id in enumerate(tenants):
        said = total(
            CHARGE_MICRO + number, bucket=f"{number:x}", tenant_id=tenant_id, hour_ms=JULY_MS
        )
        key = tenant_id.encode()
        await producer.send(
            CHARGES, msgspec.json.encode(said), key=key, partition=partition_of(key, partitions)
        )
    mark = msgspec.json.encode(HubWatermark(HubCode("lhr"), 10**6, END_MS, False, [], []))
    for partition in range(partitions):
        await producer.send(CHARGES, mark, partition=partition)
    await producer.flush()


async def kill_at(stack: Stack, numbered: int, rendered: int) -> None:
    """Kill invoicing as soon as it has come this far, and wait for its successor."""
    database = await asyncpg.connect(stack.database("invoicing", "reader"))
    try:
        async with asyncio.timeout(1800):
            while await database.fetchval(INVOICES) < numbered:
                pass
            while (done := await database.fetchval(PDFS)) < rendered:
                pass
    finally:
        await database.close()
    assert done < BILLED, "too late: nothing is left to interrupt"
    killed = stack.kill("invoicing")
    await asyncio.to_thread(stack.wait_back, "invoicing", killed)


async def moved(stack: Stack) -> list[str]:
    """The documents that the ledger entered, one by one."""
    database = await asyncpg.connect(stack.database("ledger", "reader"))
    try:
        rows = await database.fetch("select caused_by from entries where kind = 'invoiced'")
    finally:
        await database.close()
    return [row["caused_by"] for row in rows]


@pytest.mark.slow
@pytest.mark.defect("I8", "I11", "F49")
async def test_a_close_survives_invoicing_being_killed_again_and_again(own_stack: Stack) -> None:
    """Killed when asked, between numbers and between PDFs; then the month is as if never killed."""
    own_stack.stop("metering")
    async with outside_of(own_stack) as outside:
        tenants = [await outside.tenant() for _ in range(BILLED)]
        await book_july(outside, tenants)
        path = f"/v1/periods/{MONTH}"

        async def july() -> Json:
            return await outside.api.get("invoicing", path, "finance")

        await until(july, lambda x: x["state"] == "closable")
        body: Json = {"issued_on": None, "override": None}
        await outside.api.post("invoicing", f"{path}/close", "finance", body)
        for numbered, rendered in ((0, 0), (1, 0), (BILLED, 10), (BILLED, 60)):
            await kill_at(own_stack, numbered, rendered)
        await until(july, lambda x: x["state"] == "closed")
        found = await outside.api.items("invoicing", "/v1/invoices", "finance", period=MONTH)
        proof = await outside.api.get("invoicing", f"{path}/reconciliation", "finance")
        accounts = (await outside.api.get("ledger", "/v1/trial-balance", "auditor"))["accounts"]
    assert sorted(tenants) == [invoice["tenant_id"] for invoice in found]
    numbers = [f"INV-2025-26-{n:06d}" for n, _ in zip(count(1), found, strict=False)]
    assert numbers == sorted(invoice["number"] for invoice in found)
    assert {"finalised"} == {invoice["state"] for invoice in found}
    documents = await moved(own_stack)
    assert sorted(f"document:{invoice['invoice_id']}" for invoice in found) == sorted(documents)
    assert (BILLED, "0", "0", 0) == (
        proof["invoices_count"],
        proof["difference_micro"],
        proof["receivable_difference_micro"],
        proof["number_gaps"],
    )
    charged_micro = sum(CHARGE_MICRO + number for number in range(BILLED))
    assert -charged_micro == next(
        int(account["balance_micro"]) for account in accounts if account["account"] == "invoiced"
    )


WAITING = """
select exists (select from pg_locks l join pg_database d on d.oid = l.database
                where d.datname = current_database() and not l.granted)
"""


@pytest.mark.slow
async def test_a_close_that_is_killed_between_its_statements_has_not_happened(
    own_stack: Stack,
) -> None:
    """Killed before it read the tax table, and before its bills: the same command closes then."""
    own_stack.stop("metering")
    async with outside_of(own_stack) as outside:
        tenants = [await outside.tenant() for _ in range(3)]
        await book_july(outside, tenants)
        path = f"/v1/periods/{MONTH}"

        async def july() -> Json:
            return await outside.api.get("invoicing", path, "finance")

        await until(july, lambda x: x["state"] == "closable")
        body: Json = {"issued_on": None, "override": None}
        for table in ("tax_rates", "bills"):
            owner = await asyncpg.connect(own_stack.database("invoicing", "owner"))
            try:
                await owner.execute(f"begin; lock table {table} in access exclusive mode")
                closing = asyncio.create_task(
                    outside.api.post("invoicing", f"{path}/close", "finance", body)
                )
                async with asyncio.timeout(120):
                    while not await owner.fetchval(WAITING):
                        pass
                killed = own_stack.kill("invoicing")
                # Nobody asks again before the lock is gone: what is left of it is what was done.
                closing.cancel()
                await asyncio.gather(closing, return_exceptions=True)
            finally:
                await owner.close()
            await asyncio.to_thread(own_stack.wait_back, "invoicing", killed)
            assert (await july())["state"] == "closable"
        await outside.api.post("invoicing", f"{path}/close", "finance", body)
        done = await until(july, lambda x: x["state"] == "closed")
        assert ([], "0") == (done["blocked_by"], done["late_micro"])
        found = await outside.api.items("invoicing", "/v1/invoices", "finance", period=MONTH)
    assert sorted(tenants) == [invoice["tenant_id"] for invoice in found]
