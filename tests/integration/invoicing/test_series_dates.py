"""Within a series, over all fiscal years, dates never fall: by the service and by the database."""

from __future__ import annotations

import asyncio
import datetime as dt
import random
from collections.abc import Callable, Sequence

import asyncpg
import pytest

import infrastructure
from hisab_contracts.units import month_bounds_ms
from integration.invoicing.months import Books, books_in, charge, served
from invoicing.commands import close_month
from invoicing.core.document import default_issued_on
from invoicing.core.periods import CloseRequest, Closing, IssueDateOrder

Migrated = Callable[[str], infrastructure.Database]
MONTHS = ("2025-04", "2025-05", "2025-06", "2025-07", "2025-08", "2025-09")
CLOSE: dict[str, object] = {"issued_on": None, "override": None}
DATES = """
select i.fiscal_year, i.position, i.issued_on, i.period, i.content ->> 'issued_on' as stated_on
  from invoices i order by i.issued_on, i.fiscal_year, i.position
"""


async def plant(books: Books, months: Sequence[str] = MONTHS) -> None:
    """Three tenants used something in each month, and all of them are complete."""
    await books.seller()
    await books.tenants("a", "b", "c")
    for seq, month in enumerate(months, start=1):
        await books.keep(*(charge(tenant, seq, 1_000_000, month=month) for tenant in "abc"))
    await books.watermark("lhr", month_bounds_ms(months[-1])[1])


async def make_invoices(books: Books, month: str) -> None:
    """Compute and number a month's bills."""
    await books.compute(month)
    await books.number(month)


async def dates(books: Books) -> list[tuple[str, int, dt.date, str]]:
    """Every number with its date and month, in order of date and then number."""
    async with books.writer.transaction() as connection:
        rows = await connection.fetch(DATES)
    assert [row["issued_on"].isoformat() for row in rows] == [row["stated_on"] for row in rows]
    return [(row["fiscal_year"], row["position"], row["issued_on"], row["period"]) for row in rows]


async def test_a_month_closed_after_a_later_one_carries_the_later_date(migrated: Migrated) -> None:
    """August is closed first; July's numbers follow August's, so July's dates do, too."""
    async with served(migrated("invoicing")) as service:
        await plant(service.books)
        await service.post("/v1/periods/2025-08/close", "finance", CLOSE)
        await make_invoices(service.books, "2025-08")
        early = {"issued_on": "2025-08-31", "override": None}
        refused = await service.post("/v1/periods/2025-07/close", "finance", early)
        assert (409, "issue-date-order", "2025-09-01", False) == (
            refused.status_code,
            *(refused.json()[name] for name in ("code", "earliest_on", "retryable")),
        )
        closed = await service.post("/v1/periods/2025-07/close", "finance", CLOSE)
        assert (202, "2025-09-01") == (closed.status_code, closed.json()["closing"]["issued_on"])
        await make_invoices(service.books, "2025-07")
        found = await dates(service.books)
        assert [(dt.date(2025, 9, 1), n) for n in range(1, 7)] == [
            (issued_on, position) for _, position, issued_on, _ in found
        ]
        assert ["2025-08"] * 3 + ["2025-07"] * 3 == [period for *_, period in found]


async def test_a_later_fiscal_year_holds_back_the_years_before_it(migrated: Migrated) -> None:
    """May's invoices, dated in the old year, would be numbered after those of the new one."""
    async with served(migrated("invoicing")) as service:
        await plant(service.books)
        await service.post("/v1/periods/2025-06/close", "finance", CLOSE)
        await make_invoices(service.books, "2025-06")
        closed = await service.post("/v1/periods/2025-05/close", "finance", CLOSE)
        assert "2025-07-01" == closed.json()["closing"]["issued_on"]
        await make_invoices(service.books, "2025-05")
        assert {("2025-26", dt.date(2025, 7, 1))} == {
            (year, issued_on) for year, _, issued_on, _ in await dates(service.books)
        }


async def test_a_date_given_to_a_closing_counts_before_its_numbers_are_taken(
    migrated: Migrated,
) -> None:
    """Only while it is open: an empty month that is closed far ahead holds nobody back."""
    async with served(migrated("invoicing")) as service:
        await plant(service.books, ("2025-07",))
        empty = {"issued_on": "2031-01-01", "override": {"reason": "nothing was used"}}
        assert (
            202 == (await service.post("/v1/periods/2025-03/close", "finance", empty)).status_code
        )
        early = {"issued_on": "2025-08-01", "override": None}
        refused = await service.post("/v1/periods/2025-07/close", "finance", early, "1")
        assert ("issue-date-order", "2031-01-01") == (
            refused.json()["code"],
            refused.json()["earliest_on"],
        )
        async with service.books.writer.connection() as connection:
            await service.books.closer.run(connection)
        accepted = await service.post("/v1/periods/2025-07/close", "finance", early, "2")
        assert (202, "2025-08-01") == (
            accepted.status_code,
            accepted.json()["closing"]["issued_on"],
        )


async def test_numbers_taken_late_bring_the_date_of_their_series(migrated: Migrated) -> None:
    """July waited for its tax row while August was numbered: its own date is over."""
    async with books_in(migrated("invoicing")) as books:
        await plant(books)
        await books.close("2025-07")
        await books.close("2025-08")
        await make_invoices(books, "2025-08")
        await make_invoices(books, "2025-07")
        assert {dt.date(2025, 9, 1)} == {issued_on for _, _, issued_on, _ in await dates(books)}


@pytest.mark.parametrize("seed", range(3))
async def test_closers_of_many_months_at_once_leave_dates_in_the_order_of_numbers(
    migrated: Migrated, seed: int
) -> None:
    """Twelve finalisers, six months over the turn of a fiscal year, blocks of one number each."""
    dice = random.Random(seed)
    async with books_in(migrated("invoicing")) as books:
        await plant(books)
        for month in dice.sample(MONTHS, len(MONTHS)):
            await books.close(month, default_issued_on(month) + dt.timedelta(dice.randint(0, 60)))
            await books.compute(month)
        at_once = [*MONTHS, *MONTHS]
        dice.shuffle(at_once)
        done = await asyncio.gather(*(books.number(month, limit=1) for month in at_once))
        found = await dates(books)
    assert (18, 18) == (sum(done), len(found))
    for year in {year for year, *_ in found}:
        in_year = [position for own, position, *_ in found if own == year]
        assert [*range(1, len(in_year) + 1)] == in_year
    assert sorted(found, key=lambda row: row[2]) == found
    years = [year for year, *_ in found]
    assert sorted(years) == years


async def test_two_closes_at_once_do_not_both_take_the_earlier_date(migrated: Migrated) -> None:
    """The one that the database runs again sees what the other was given."""
    async with books_in(migrated("invoicing")) as books:
        await plant(books, ("2025-07", "2025-08"))
        july = CloseRequest("2025-07", dt.date(2025, 8, 1), None, "key:a")
        august = CloseRequest("2025-08", dt.date(2025, 9, 1), None, "key:b")

        async def close(request: CloseRequest) -> object:
            while True:
                try:
                    async with books.api.transaction(tenant="*", snapshot=True) as connection:
                        return await close_month(connection, request, 4)
                except asyncpg.SerializationError:
                    continue

        done = await asyncio.gather(close(july), close(august))
        assert isinstance(done[1], Closing)
        # Either July was first, or it was told that August has a later date already.
        assert isinstance(done[0], Closing) or done[0] == IssueDateOrder(
            dt.date(2025, 8, 1), dt.date(2025, 9, 1)
        )
        async with books.writer.transaction() as connection:
            asked = [row["period"] for row in await connection.fetch(ASKED)]
        assert asked == sorted(asked)


ASKED = "select period from closings order by requested_at"


async def test_twelve_closes_over_http_at_once_are_all_taken(migrated: Migrated) -> None:
    """They take turns in the service; each has a date that no earlier one exceeds."""
    async with served(migrated("invoicing")) as service:
        await plant(service.books)
        answers = await asyncio.gather(
            *(
                service.post(f"/v1/periods/{month}/close", "finance", CLOSE)
                for month in random.Random(1).sample(MONTHS, len(MONTHS))
            )
        )
        assert [202] * len(MONTHS) == [answer.status_code for answer in answers]
        asked = sorted(
            (answer.json()["closing"]["requested_at"], answer.json()["closing"]["issued_on"])
            for answer in answers
        )
        assert sorted(issued_on for _, issued_on in asked) == [on for _, on in asked]


async def test_the_database_refuses_a_date_that_falls(migrated: Migrated) -> None:
    """By anybody's hand: an invoice before its series' last, the last date itself, its removal."""
    database = migrated("invoicing")
    async with books_in(database) as books:
        await plant(books)
        await books.close("2025-08")
        await make_invoices(books, "2025-08")
        await books.close("2025-05")
        await books.compute("2025-05")
    owner = await asyncpg.connect(database.admin)
    try:
        copied = """
            insert into invoices select (jsonb_populate_record(i, jsonb_build_object(
              'invoice_id', 'x', 'number', 'X', 'period', '2025-05', 'issued_on', $1::text,
              'fiscal_year', $2::text, 'position', 1, 'previous_position', null,
              'content', i.content || '{"invoice_id": "x", "number": "X", "period": "2025-05"}'
            ))).* from invoices i where position = 1
        """
        with pytest.raises(asyncpg.CheckViolationError, match="the last date of its series"):
            await owner.execute(copied, "2025-06-01", "2024-25")
        assert "INSERT 0 1" == await owner.execute(copied, "2025-09-01", "2024-25")
        for fall in ("last_issued_on - 1", "null"):
            with pytest.raises(asyncpg.CheckViolationError, match="falls"):
                await owner.execute(f"update invoice_series set last_issued_on = {fall}")
        for edit in ("delete from invoice_series", "truncate invoice_series"):
            with pytest.raises(asyncpg.RestrictViolationError):
                await owner.execute(edit)
    finally:
        await owner.close()
