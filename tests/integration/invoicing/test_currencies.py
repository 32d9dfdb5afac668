"""Months invoiced in the minor units of each book's currency, held by the database too."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import infrastructure
from hisab_contracts.currencies import EXPONENTS, micro_per_minor_of
from hisab_contracts.units import month_bounds_ms
from integration.invoicing.months import books_in, charge, served

Migrated = Callable[[str], infrastructure.Database]
CLOSE: dict[str, object] = {"issued_on": None, "override": None}


async def test_the_database_rounds_by_the_same_table_of_currencies(migrated: Migrated) -> None:
    """Its constraints know the minor unit of every currency that a request may name."""
    async with (
        books_in(migrated("invoicing")) as books,
        books.writer.transaction() as connection,
    ):
        rows = await connection.fetch(
            "select c, micro_per_minor(c) as m from unnest($1::text[]) as c", list(EXPONENTS)
        )
    assert {code: micro_per_minor_of(code) for code in EXPONENTS} == {
        row["c"]: row["m"] for row in rows
    }


@pytest.mark.parametrize(
    ("currency", "net_minor", "due_minor"),
    [("JPY", "1935", "1746"), ("KWD", "1935480", "1745293"), ("PKR", "193548", "174530")],
)
async def test_a_month_is_invoiced_in_the_minor_units_of_its_books(
    migrated: Migrated, currency: str, net_minor: str, due_minor: str
) -> None:
    """1 935.48, a grant paid 499.8649 of it, 16 % tax; beside a tenant in rupees."""
    async with served(migrated("invoicing")) as service:
        await service.books.seller()
        await service.books.tenants("a", currency=currency)
        await service.books.tenants("b")
        await service.books.keep(
            charge("a", 1, 1_435_615_100, funded_micro=499_864_900), charge("b", 1, 10_000)
        )
        await service.books.watermark("lhr", month_bounds_ms("2025-07")[1])
        await service.post("/v1/periods/2025-07/close", "finance", CLOSE)
        await service.books.compute()
        await service.books.number()
        found = (await service.get("/v1/invoices", "finance", tenant_id="a")).json()["items"]
        assert [(currency, net_minor)] == [(item["currency"], item["net_minor"]) for item in found]
        assert due_minor == found[0]["due_minor"]
        told = (await service.get("/v1/periods/2025-07/reconciliation", "auditor")).json()
        assert ("0", "0") == (told["difference_micro"], told["receivable_difference_micro"])
        by_currency = {item["currency"]: item["net_minor"] for item in told["by_currency"]}
        summed = str(int(net_minor) + 1)
        expected = {"PKR": summed} if currency == "PKR" else {currency: net_minor, "PKR": "1"}
        assert expected == by_currency
        assert told["net_minor"] == (summed if currency == "PKR" else None)
