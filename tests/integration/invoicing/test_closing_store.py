"""Numbers, sums and immutability, held by the database itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import asyncpg
import msgspec
import pytest

import infrastructure
from hisab_contracts.canonical import content_sha256
from hisab_contracts.ids import TenantId
from integration.invoicing.months import MONTH, books_in, charge, entry_hash
from invoicing.closing import record_done
from invoicing.core.document import ComputedBill, DocumentEvent
from invoicing.core.reconciliation import difference_micro, receivable_waterfall, waterfall
from invoicing.pdf import pdf_sha256
from invoicing.store import closings, documents, periods
from invoicing.store.documents import InvoiceFilter
from invoicing.store.entries import BookGap, ForkedError, gaps

if TYPE_CHECKING:
    from runtime.database import Connection

Migrated = Callable[[str], infrastructure.Database]
ALL = InvoiceFilter()


async def test_a_month_is_computed_numbered_and_adds_up(migrated: Migrated) -> None:
    """Worked example, steps 5 to 11: A's invoice is 840.00 + 140.00 + tax = 1 128.40."""
    async with books_in(migrated("invoicing")) as books:
        await books.seller()
        await books.tenants("a")
        await books.tenants("b", kind="startup")
        await books.keep(
            charge("b", 1, 0, funded_micro=500_000_000, unfunded_micro=60_000_000),
            charge("a", 1, 630_000_000, hub="khi", used_gpu_ns=2_700_000_000_000),
            charge("a", 2, 210_000_000, hub="khi", used_gpu_ns=900_000_000_000),
            charge("a", 3, 140_000_000, used_gpu_ns=600_000_000_000),
        )
        await books.close()
        await books.compute()
        assert 1 == await books.number()
        await books.keep(charge("a", 4, 70_000_000))
        async with books.api.transaction(tenant="*") as connection:
            (found,) = await documents.invoices(connection, ALL, 1000)
            steps = waterfall(await periods.facts_of_month(connection, MONTH))
            late_micro = await periods.late_micro(connection, MONTH)
            moved = receivable_waterfall(await periods.receivable_facts(connection, MONTH))
        content = found.content
        assert [("khi", "84000", "12600"), ("lhr", "14000", "2240")] == [
            (line.hub, line.net_minor, line.tax_minor) for line in content.lines
        ]
        assert ("INV-2025-26-000001", "112840", "112840") == (
            content.number,
            content.total_minor,
            content.due_minor,
        )
        assert ("1", "3", entry_hash("a", 3).hex()) == (
            content.entries.first_seq,
            content.entries.last_seq,
            content.entries.last_hash,
        )
        assert content_sha256(content) == found.content_sha256
        assert {"charged": 1_610_000_000, "non-commercial": -560_000_000, "late": -70_000_000} == {
            step.step: step.change_micro for step in steps if step.step in STEPS_BY_HAND
        }
        assert (70_000_000, 0, 0) == (
            late_micro,
            difference_micro(steps),
            difference_micro(moved),
        )


STEPS_BY_HAND = ("charged", "non-commercial", "late")


@pytest.mark.defect("F50")
async def test_entries_that_arrive_after_the_close_are_not_billed(migrated: Migrated) -> None:
    """The cut is the book's position read at the close, not a clock."""
    async with books_in(migrated("invoicing")) as books:
        await books.seller()
        await books.tenants("a")
        await books.keep(charge("a", 1, 1_000_000))
        await books.close()
        await books.keep(charge("a", 2, 5_000_000))
        await books.compute()
        await books.number()
        async with books.api.transaction(tenant="*") as connection:
            (found,) = await documents.invoices(connection, ALL, 1000)
        assert "100" == found.content.net_minor


@pytest.mark.defect("I8", "I11", "F49")
async def test_64_finalisers_at_once_leave_no_gap_and_no_double(migrated: Migrated) -> None:
    """Numbers 1 to 200, each once, in order of tenant; the series is proven by its constraint.

    Who finds no connection free in time, or waits too long for the series, comes again.
    """
    tenants = [f"t{number:03d}" for number in range(200)]
    async with books_in(migrated("invoicing"), writers=64) as books:
        await books.seller()
        await books.tenants(*tenants)
        await books.keep(*(charge(tenant, 1, 1_000_000) for tenant in tenants))
        await books.close()
        await books.compute()
        await asyncio.gather(
            *(infrastructure.through_outages(lambda: books.number(limit=1)) for _ in range(64))
        )
        async with books.api.transaction(tenant="*") as connection:
            found = await documents.invoices(connection, ALL, 1000)
            gap_count = await periods.number_gaps(connection)
        assert tenants == [invoice.content.tenant_id for invoice in found]
        assert [f"INV-2025-26-{n:06d}" for n in range(1, 201)] == [
            invoice.content.number for invoice in found
        ]
        assert 0 == gap_count


async def test_a_zero_bill_burns_no_number_and_shows_in_the_waterfall(migrated: Migrated) -> None:
    """0.4 paisa are skipped; the next tenant has number 1."""
    async with books_in(migrated("invoicing")) as books:
        await books.seller()
        await books.tenants("a", "b")
        await books.keep(charge("a", 1, 4_000), charge("b", 1, 1_000_000))
        await books.close()
        await books.compute()
        await books.number()
        async with books.api.transaction(tenant="*") as connection:
            (found,) = await documents.invoices(connection, ALL, 1000)
            steps = waterfall(await periods.facts_of_month(connection, MONTH))
        assert ("b", "INV-2025-26-000001") == (found.content.tenant_id, found.content.number)
        assert -4_000 == next(
            step.change_micro for step in steps if step.step.startswith("skipped")
        )
        assert 0 == difference_micro(steps)


@pytest.mark.defect("I10", "I11")
async def test_the_database_refuses_a_gap_a_wrong_sum_and_any_edit(migrated: Migrated) -> None:
    """Even by the owner's hand: numbers skip nothing, lines add up, documents stay."""
    database = migrated("invoicing")
    async with books_in(database) as books:
        await books.seller()
        await books.tenants("a", "b")
        await books.keep(charge("a", 1, 1_000_000), charge("b", 1, 1_000_000))
        await books.close()
        await books.compute()
        await books.number()
    owner = await asyncpg.connect(database.admin)
    try:
        copied = """
            insert into invoices select {} from (select (jsonb_populate_record(i, {})).* from
            invoices i where position = 2) as r
        """
        for change in (
            '{"invoice_id": "x", "tenant_id": "c", "position": 4, "previous_position": 3}',
            '{"invoice_id": "x", "tenant_id": "c", "position": 3, "previous_position": 1}',
            '{"total_minor": 1}',
        ):
            with pytest.raises(asyncpg.IntegrityConstraintViolationError):
                await owner.execute(copied.format("*", f"'{change}'::jsonb".replace("'", "'")))
        for edit in (
            "update invoices set net_minor = 0",
            "delete from invoices",
            "truncate invoices cascade",
            "update entries set seq = 9",
            "delete from entries",
            "truncate entries_0",
            "delete from tax_rates",
        ):
            with pytest.raises(asyncpg.RestrictViolationError):
                await owner.execute(edit)
    finally:
        await owner.close()


@pytest.mark.defect("I28")
async def test_no_role_can_edit_a_fact_and_a_tenant_sees_its_own(migrated: Migrated) -> None:
    """Privileges and row-level security, whatever the code would ask for."""
    database = migrated("invoicing")
    async with books_in(database) as books:
        await books.seller()
        await books.tenants("a", "b")
        await books.keep(charge("a", 1, 1_000_000), charge("b", 1, 1_000_000))
        await books.close()
        await books.compute()
        await books.number()
        async with books.api.transaction(tenant="a") as connection:
            found = await documents.invoices(connection, ALL, 1000)
        assert ["a"] == [invoice.content.tenant_id for invoice in found]
        async with books.api.connection() as connection:
            assert [] == await documents.invoices(connection, ALL, 1000)
        for part in (books.api, books.writer):
            for edit in ("update invoices set number = ''", "delete from entries"):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    async with part.transaction(tenant="*") as connection:
                        await connection.execute(edit)


async def test_duplicate_entries_are_ignored_and_a_forked_one_stops_everything(
    migrated: Migrated,
) -> None:
    """The same entry again books nothing; another content under its seq is refused."""
    async with books_in(migrated("invoicing")) as books:
        await books.tenants("a")
        await books.keep(charge("a", 1, 1_000_000), charge("a", 2, 2_000_000))
        await books.keep(charge("a", 2, 2_000_000), charge("a", 3, 4_000_000))
        async with books.writer.connection() as connection:
            facts = await periods.facts_of_month(connection, MONTH)
        assert 7_000_000 == facts.charged_micro
        forked = charge("a", 2, 2_000_000)
        with pytest.raises(ForkedError, match=r"a\.2"):
            await books.keep(msgspec.structs.replace(forked, hash="00" * 32))


async def test_a_gap_holds_the_position_until_it_is_filled(migrated: Migrated) -> None:
    """Entry 2 is missing: the book stands at 1, whatever follows; then it stands at 4."""
    async with books_in(migrated("invoicing")) as books:
        await books.tenants("a")
        await books.keep(charge("a", 1, 1), charge("a", 3, 1))
        await books.keep(charge("a", 4, 1))
        async with books.writer.connection() as connection:
            assert [BookGap(charge("a", 1, 1).tenant_id, 1, 4)] == await gaps(connection)
        await books.keep(charge("a", 2, 1))
        async with books.writer.connection() as connection:
            assert [] == await gaps(connection)


async def test_a_closing_is_recorded_once(migrated: Migrated) -> None:
    """The month is its key."""
    async with books_in(migrated("invoicing")) as books:
        await books.seller()
        await books.close()
        async with books.api.transaction(tenant="*") as connection:
            known = await closings.closing_of(connection, MONTH)
            assert known is not None
            again = replace(known.closing, actor="again")
            assert not await closings.record_closing(connection, again)
        assert 3 == known.closing.tax_version
        async with books.writer.connection() as connection:
            assert await closings.close_if_done(connection, MONTH)


async def test_an_invoice_is_announced_with_its_number_and_when_nothing_is_outstanding(
    migrated: Migrated,
) -> None:
    """A step that leaves another one outstanding says nothing, nor does one done again."""
    async with books_in(migrated("invoicing")) as books:
        await books.seller()
        await books.tenants("a")
        await books.keep(charge("a", 1, 1_000_000))
        await books.close()
        await books.compute()
        await books.number()
        pdf = b"%PDF-"
        sha256 = pdf_sha256(pdf)
        announced: list[tuple[str, str | None]] = [("finalising", None)]
        async with books.writer.transaction() as connection:
            assert announced == await states_announced(connection)
            (step,) = await closings.due_steps(connection, "pdf", 10)
            await closings.keep_pdf(connection, step.invoice_id, step.tenant_id, pdf, sha256)
            await record_done(connection, books.closer.outbox, step, "pdf", sha256)
            assert announced == await states_announced(connection)
        announced.append(("finalised", sha256))
        for _ in range(2):
            async with books.writer.transaction() as connection:
                await record_done(connection, books.closer.outbox, step, "ledger", "a.2")
                assert announced == await states_announced(connection)


async def states_announced(connection: Connection) -> list[tuple[str, str | None]]:
    """The states and PDFs of the documents in the outbox, in order."""
    rows = await connection.fetch("select message_value from outbox order by outbox_id")
    events = [msgspec.json.decode(row["message_value"], type=DocumentEvent) for row in rows]
    return [(event.state, event.pdf_sha256) for event in events]


@pytest.mark.parametrize(("attempts", "wait_ms"), [(0, 250), (3, 2_000), (8, 60_000), (99, 60_000)])
async def test_a_failed_step_waits_twice_as_long_each_time_and_at_most_a_minute(
    migrated: Migrated, attempts: int, wait_ms: int
) -> None:
    """From a quarter of a second on, by the server's clock; a bill waits by the same rule."""
    async with books_in(migrated("invoicing")) as books:
        await books.seller()
        await books.tenants("a")
        await books.keep(charge("a", 1, 1_000_000))
        await books.close()
        failed = ComputedBill(TenantId("a"), "pending", reason="no tax row")
        async with books.writer.transaction() as connection:
            await connection.execute("update bills set attempts = $1", attempts)
            begun_at = await connection.fetchval("select clock_timestamp()")
            await closings.store_computed(connection, MONTH, [failed])
            (bill,) = await connection.fetch(DUE_AGAIN.format("bills"), begun_at, wait_ms)
        assert (attempts + 1, True) == tuple(bill.values())
        async with books.writer.transaction() as connection:
            await connection.execute("update bills set retry_at = clock_timestamp()")
        await books.compute()
        await books.number()
        async with books.writer.transaction() as connection:
            (step,) = await closings.due_steps(connection, "pdf", 10)
            await connection.execute("update invoice_steps set attempts = $1", attempts)
            begun_at = await connection.fetchval("select clock_timestamp()")
            await closings.step_failed(connection, step.invoice_id, "pdf", "no font")
            (row,) = await connection.fetch(DUE_AGAIN.format("invoice_steps"), begun_at, wait_ms)
        assert (attempts + 1, True) == tuple(row.values())


DUE_AGAIN = """
select attempts, retry_at - $2 * interval '1 millisecond' between $1 and clock_timestamp()
  from {} where reason is not null
"""


def test_an_invoice_keeps_its_bytes_through_the_database() -> None:
    """jsonb does not keep bytes; the canonical encoding of what it keeps is the same."""
    text = '{"b": "1", "a": {"z": 1, "y": "ü"}}'
    assert content_sha256(msgspec.json.decode(text)) == content_sha256(
        {"a": {"y": "ü", "z": 1}, "b": "1"}
    )
