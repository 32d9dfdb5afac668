"""The sums of a month: those of its entries, always; and what a month asks costs only its lines."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

import infrastructure
from hisab_contracts.entries import Entry
from integration.invoicing.months import MONTH, books_in, charge
from invoicing.store import closings, documents, entries, periods, resumptions

if TYPE_CHECKING:
    from runtime.database import Connection

Migrated = Callable[[str], infrastructure.Database]
FROM_ENTRIES = """
select period, tenant_id, hub, sku, price_class, min(seq), max(seq), sum(used_gpu_ns),
       sum(funded_micro), sum(receivable_micro), sum(unfunded_micro)
  from entries where kind = 'charge'
 group by period, tenant_id, hub, sku, price_class
"""
KEPT = """
select period, tenant_id, hub, sku, price_class, first_seq, last_seq, used_gpu_ns, funded_micro,
       receivable_micro, unfunded_micro
  from month_usage
"""
QUERIES: list[tuple[str, str, tuple[object, ...]]] = [
    ("unknown tenants", periods._UNKNOWN_TENANTS, (MONTH,)),
    ("billed hubs", periods._BILLED_HUBS, (MONTH,)),
    ("add bills", closings._ADD_BILLS, (MONTH,)),
    ("unknown currencies", periods._UNKNOWN_CURRENCIES, (MONTH, ["PKR"])),
    ("pending hubs", resumptions._PENDING_HUBS, (MONTH,)),
    ("usage sums", entries._USAGE_SUMS, (MONTH, ["a"], [1])),
    ("late", periods._LATE, (MONTH,)),
    ("month sums", periods._MONTH_SUMS, (MONTH,)),
    ("charges", entries._CHARGES, ("a", MONTH, 0, 9, 10)),
    ("invoice basis", documents._BASIS, ("i",)),
]


async def sums(connection: Connection, query: str) -> set[tuple[object, ...]]:
    """Read sums as a set of rows."""
    return {tuple(row.values()) for row in await connection.fetch(query)}


def some_charges(dice: random.Random, tenant: str, count: int) -> list[Entry]:
    """Charges of a tenant over two months and four lines; some give credit back."""
    return [
        charge(
            tenant,
            seq,
            dice.randint(-9, 10**15),
            hub=dice.choice(["lhr", "khi"]),
            month=dice.choice([MONTH, "2025-08"]),
            funded_micro=dice.randint(0, 9),
            unfunded_micro=dice.randint(0, 9),
            price_class=dice.choice(["on_demand", "spot"]),
            used_gpu_ns=dice.randint(0, 2**60),
        )
        for seq in range(1, count + 1)
    ]


@pytest.mark.parametrize("seed", range(3))
async def test_the_sums_are_those_of_the_entries_whatever_comes_twice_or_out_of_order(
    migrated: Migrated, seed: int
) -> None:
    """Two writers, batches that overlap, gaps that are filled later."""
    dice = random.Random(seed)
    charges = {tenant: some_charges(dice, tenant, 60) for tenant in ("a", "b")}
    batches = [dice.sample(charges["a"], 10) + dice.sample(charges["b"], 10) for _ in range(20)] + [
        charges["a"],
        charges["b"],
    ]
    async with books_in(migrated("invoicing")) as books:

        async def keep(share: list[list[Entry]]) -> None:
            for batch in share:
                await books.keep(*sorted(batch, key=lambda entry: (entry.tenant_id, entry.seq)))

        await asyncio.gather(keep(batches[::2]), keep(batches[1::2]))
        async with books.writer.transaction() as connection:
            assert await sums(connection, FROM_ENTRIES) == await sums(connection, KEPT)


@pytest.mark.defect("F50")
@pytest.mark.parametrize("cut", [1, 7, 30])
async def test_a_bill_is_the_sum_of_its_single_charges_whatever_came_later(
    migrated: Migrated, cut: int
) -> None:
    """Charges booked after the position are taken off again, line by line."""
    charges = some_charges(random.Random(cut), "a", 40)
    async with books_in(migrated("invoicing")) as books:
        await books.seller()
        await books.tenants("a")
        await books.keep(charge("a", 1, 5), *charges[1:cut])
        await books.close()
        await books.keep(*charges[max(cut, 1) :])
        async with books.writer.connection() as connection:
            (bill,) = await closings.pending_bills(connection, MONTH, 10)
            found = (await entries.usage_sums(connection, MONTH, [bill]))[bill.tenant_id]
            single, _ = await entries.charges(connection, bill, 0)
            late_micro = await periods.late_micro(connection, MONTH)
            facts = await periods.facts_of_month(connection, MONTH)
    assert (1, cut) == (found.first_seq, bill.last_seq)
    for part in ("used_gpu_ns", "funded_micro", "receivable_micro", "unfunded_micro"):
        assert sum(getattr(usage, part) for usage in single) == sum(
            getattr(line, part) for line in found.usage
        )
    assert {(usage.hub, usage.sku, usage.price_class) for usage in single} == {
        (line.hub, line.sku, line.price_class) for line in found.usage
    }
    assert facts.late_micro == late_micro


@pytest.fixture(scope="module")
def planned(infrastructure: infrastructure.Infrastructure) -> Any:
    """A database with the schema, for reading plans."""
    database = infrastructure.migrated_database("invoicing")
    yield database
    infrastructure.drop_database(database)


def scanned(plan: dict[str, Any]) -> set[str]:
    """The tables read from end to end: whole, or by an index without a condition."""
    whole = plan["Node Type"] == "Seq Scan" or (
        plan["Node Type"].startswith("Index") and "Index Cond" not in plan
    )
    found = {plan["Relation Name"]} if whole and "Relation Name" in plan else set()
    for part in plan.get("Plans", ()):
        found |= scanned(part)
    return found


@pytest.mark.parametrize(("name", "query", "values"), QUERIES, ids=[query[0] for query in QUERIES])
async def test_what_a_month_asks_reads_no_other_months_charges(
    planned: infrastructure.Database, name: str, query: str, values: tuple[object, ...]
) -> None:
    """With sequential scans made unattractive, as years of charges make them."""
    async with books_in(planned) as books, books.api.transaction(tenant="*") as connection:
        await connection.execute("set local enable_seqscan = off")
        text = await connection.fetchval(f"explain (format json) {query}", *values)
    (found,) = json.loads(text)
    big = {"month_usage", "entries", *(f"entries_{part}" for part in range(4))}
    assert set() == scanned(found["Plan"]) & big
