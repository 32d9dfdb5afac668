"""A close that is decided on one snapshot, and the way out of every state it can be parked in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest

import infrastructure
from hisab_contracts.units import month_bounds_ms
from integration.invoicing.months import MONTH, Served, charge, served
from invoicing.closing import ROUNDS_AT_ONCE, InvoiceRenderer
from invoicing.core.document import InvoiceStep
from invoicing.ledger_client import InvoicedRefused
from invoicing.pdf import TypesetterProcess
from invoicing.store import closings

Migrated = Callable[[str], infrastructure.Database]
END_MS = month_bounds_ms(MONTH)[1]
PERIOD = f"/v1/periods/{MONTH}"
CLOSE: dict[str, object] = {"issued_on": None, "override": None}
FORCED: dict[str, object] = {"issued_on": None, "override": {"reason": "finance says so"}}
PEW = {
    "hub": "pew",
    "authority": "KPRA",
    "tax_bps": 1500,
    "valid_from": "2025-01-01",
    "citation": "unconfirmed",
}


async def plant(service: Served) -> None:
    """July is complete; `a` and `b` used something at lhr, all in order."""
    await service.books.seller()
    await service.books.tenants("a", "b")
    await service.books.keep(charge("a", 1, 1_000_000), charge("b", 1, 2_000_000))
    await service.books.watermark("lhr", END_MS)


async def carry_on(service: Served) -> None:
    """Let the closing job do all it can, without PDFs and the ledger."""
    await service.books.compute()
    await service.books.number()
    async with service.books.writer.connection() as connection:
        await service.books.closer.run(connection)


async def finish_steps(service: Served, *names: InvoiceStep) -> None:
    """Have every open step of these names done."""
    async with service.books.writer.transaction() as connection:
        for name in names:
            for step in await closings.due_steps(connection, name, 100):
                await closings.step_done(connection, step.invoice_id, name, "done")


async def july(service: Served) -> dict[str, Any]:
    """The month as finance sees it."""
    answer: dict[str, Any] = (await service.get(PERIOD, "finance")).json()
    return answer


@contextlib.asynccontextmanager
async def locked(
    database: infrastructure.Database, table: str
) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Hold a table, so that whoever asks for it next waits."""
    owner = await asyncpg.connect(database.admin)
    try:
        transaction = owner.transaction()
        await transaction.start()
        await owner.execute(f"lock table {table} in access exclusive mode")
        yield owner
        await transaction.rollback()
    finally:
        await owner.close()


async def until_waiting(owner: asyncpg.Connection[Any]) -> None:
    """Return once somebody waits for a lock in this database."""
    waiting = """
        select exists (select from pg_locks l join pg_database d on d.oid = l.database
                        where d.datname = current_database() and not l.granted)
    """
    async with asyncio.timeout(120):
        while not await owner.fetchval(waiting):
            pass


@pytest.mark.parametrize("table", ["legal_entities", "watermarks", "tenants", "tax_rates"])
async def test_a_charge_of_an_untaxed_hub_between_two_statements_of_a_close_is_late(
    migrated: Migrated, broker: str, table: str
) -> None:
    """Whichever statement waits: bills are cut where the decision looked, and nothing is parked."""
    database = migrated("invoicing")
    async with served(database, broker) as service:
        await plant(service)
        async with locked(database, table) as owner:
            closing = asyncio.create_task(service.post(f"{PERIOD}/close", "finance", CLOSE))
            await until_waiting(owner)
            await service.books.keep(charge("a", 2, 5_000_000, hub="pew"))
        closed = await closing
        assert (202, "closing") == (closed.status_code, closed.json()["state"])
        await carry_on(service)
        await finish_steps(service, "pdf", "ledger")
        await carry_on(service)
        month = await july(service)
        assert ("closed", [], "5000000") == tuple(
            month[name] for name in ("state", "blocked_by", "late_micro")
        )
        (bill, _) = (await service.get("/v1/invoices", "finance")).json()["items"]
        assert ("100", "1") == (bill["net_minor"], bill["entries"]["last_seq"])


async def park_at_pew(service: Served, database: infrastructure.Database) -> None:
    """Park July as releases before this one did: a bill reaches a charge that nothing taxes."""
    await plant(service)
    await service.books.close()
    await service.books.keep(charge("a", 2, 5_000_000, hub="pew"))
    owner = await asyncpg.connect(database.admin)
    try:
        await owner.execute("update bills set last_seq = 2 where tenant_id = 'a'")
    finally:
        await owner.close()
    await carry_on(service)


async def test_a_month_parked_for_want_of_a_tax_row_takes_it_up_on_the_record(
    migrated: Migrated,
    broker: str,
) -> None:
    """Named with its hub and the way out; then the row, the same command, and the month is done."""
    database = migrated("invoicing")
    async with served(database, broker) as service:
        await park_at_pew(service, database)
        parked = await july(service)
        missing, waiting = parked["blocked_by"]
        assert ("closing", "tax-missing", "pew", "a") == (
            parked["state"],
            *(missing[name] for name in ("kind", "hub", "tenant_id")),
        )
        assert "POST /v1/tax-rates" in missing["way_out"]
        assert ("number", "b") == (waiting["kind"], waiting["tenant_id"])
        refused = await service.post(f"{PERIOD}/close", "finance", CLOSE, "too-early")
        assert (409, "tax-missing") == (refused.status_code, refused.json()["code"])
        assert "pew" in refused.json()["detail"]
        assert 201 == (await service.post("/v1/tax-rates", "operator", PEW)).status_code
        lahore = {**PEW, "hub": "lhr", "authority": "PRA", "tax_bps": 1, "valid_from": "2025-07-02"}
        assert 201 == (await service.post("/v1/tax-rates", "operator", lahore)).status_code
        resumed = await service.post(f"{PERIOD}/close", "finance", CLOSE, "again")
        assert 202 == resumed.status_code
        (resumption,) = resumed.json()["closing"]["resumptions"]
        assert [("pew", 4)] == [(row["hub"], row["tax_version"]) for row in resumption["taken_up"]]
        assert ("key:k-finance", None, 1) == tuple(
            resumption[name] for name in ("actor", "override", "failed_count")
        )
        await carry_on(service)
        first, second = (await service.get("/v1/invoices", "finance")).json()["items"]
        assert [("lhr", 1600), ("pew", 1500)] == [
            (line["hub"], line["tax_bps"]) for line in first["lines"]
        ]
        assert {"pipeline_version": 1, "tax_version": 3, "taken_up_tax_version": 5} == first[
            "versions"
        ]
        assert {"pipeline_version": 1, "tax_version": 3} == second["versions"]
        rerun = await service.post(f"/v1/invoices/{first['invoice_id']}/recompute", "auditor", {})
        assert (True, []) == (rerun.json()["identical"], rerun.json()["differences"])


async def test_an_override_sets_aside_what_cannot_be_computed_and_numbers_the_rest(
    migrated: Migrated,
    broker: str,
) -> None:
    """Nobody taxes pew: b has its invoice, a's charges a step of their own in the waterfall."""
    database = migrated("invoicing")
    async with served(database, broker) as service:
        await park_at_pew(service, database)
        forced = await service.post(f"{PERIOD}/close", "finance", FORCED, "forced")
        assert 202 == forced.status_code
        (resumption,) = forced.json()["closing"]["resumptions"]
        assert ("finance says so", ["a"]) == (
            resumption["override"],
            [blocker["tenant_id"] for blocker in resumption["failed"]],
        )
        await carry_on(service)
        await finish_steps(service, "pdf", "ledger")
        await carry_on(service)
        (only,) = (await service.get("/v1/invoices", "finance")).json()["items"]
        assert ("b", "INV-2025-26-000001") == (only["tenant_id"], only["number"])
        assert "closed" == (await july(service))["state"]
        told = (await service.get(f"{PERIOD}/reconciliation", "auditor")).json()
        steps = {step["step"]: step["micro"] for step in told["steps"]}
        assert ("-6000000", "0") == (steps["set-aside"], told["difference_micro"])


async def test_an_override_counts_all_that_it_sets_aside(migrated: Migrated, broker: str) -> None:
    """Of more than the record shows."""
    database = migrated("invoicing")
    async with served(database, broker) as service:
        await park_at_pew(service, database)
        owner = await asyncpg.connect(database.admin)
        try:
            # A bill needs a book of its tenant: not here, where nothing of them is computed.
            await owner.execute("set session_replication_role = replica")
            await owner.execute(
                "insert into bills (period, legal_entity_id, tenant_id, last_seq, reason,"
                " reason_kind) select period, legal_entity_id, 'z' || n, 1, 'spoilt', 'compute'"
                " from bills, generate_series(1, 1000) n where tenant_id = 'a'"
            )
            forced = await service.post(f"{PERIOD}/close", "finance", FORCED, "forced")
            aside = await owner.fetchval("select count(*) from bills where state = 'set_aside'")
        finally:
            await owner.close()
        (resumption,) = forced.json()["closing"]["resumptions"]
        assert (1001, 1001) == (resumption["failed_count"], aside)


async def test_a_bill_that_is_always_due_again_does_not_keep_the_job_from_other_months(
    migrated: Migrated, broker: str
) -> None:
    """As where a pass over all that fail takes longer than they wait: the run ends all the same."""
    database = migrated("invoicing")
    async with served(database, broker) as service:
        await park_at_pew(service, database)
        owner = await asyncpg.connect(database.admin)
        try:
            await owner.execute(
                "create function due_again() returns trigger language plpgsql as"
                " $$ begin new.retry_at := '-infinity'; return new; end $$;"
                "create trigger due_again before update on bills"
                " for each row execute function due_again();"
                "update bills set retry_at = retry_at where state = 'pending'"
            )
            async with service.books.writer.connection() as connection, asyncio.timeout(120):
                await service.books.closer.run(connection)
            attempts = await owner.fetchval("select attempts from bills where state = 'pending'")
        finally:
            await owner.close()
        assert ROUNDS_AT_ONCE <= attempts


async def test_a_currency_without_a_minor_unit_holds_up_nobody_else(
    migrated: Migrated, broker: str
) -> None:
    """A book of an older release in XTS: named, overridden, set aside; the others are billed."""
    async with served(migrated("invoicing"), broker) as service:
        await plant(service)
        await service.books.tenants("x", currency="XTS")
        await service.books.keep(charge("x", 1, 1_000_000))
        open_month = await july(service)
        assert ("open", [("currency-unknown", "x")]) == (
            open_month["state"],
            [(blocker["kind"], blocker["tenant_id"]) for blocker in open_month["blocked_by"]],
        )
        refused = await service.post(f"{PERIOD}/close", "finance", CLOSE, "1")
        assert (409, "period-incomplete") == (refused.status_code, refused.json()["code"])
        assert 202 == (await service.post(f"{PERIOD}/close", "finance", FORCED, "2")).status_code
        await carry_on(service)
        first = (await july(service))["blocked_by"][0]
        assert ("currency-unknown", "x") == (first["kind"], first["tenant_id"])
        assert 202 == (await service.post(f"{PERIOD}/close", "finance", FORCED, "3")).status_code
        await carry_on(service)
        found = (await service.get("/v1/invoices", "finance")).json()["items"]
        assert ["a", "b"] == [invoice["tenant_id"] for invoice in found]


async def test_what_the_ledger_refuses_can_be_tried_again_at_once_or_waived(
    migrated: Migrated,
    broker: str,
) -> None:
    """409 not-receivable: the reason is shown; an override closes the month, the step stays due."""
    async with served(migrated("invoicing"), broker) as service:
        await plant(service)
        await service.post(f"{PERIOD}/close", "finance", CLOSE)
        await carry_on(service)
        await finish_steps(service, "pdf")
        refused = InvoicedRefused("not-receivable", "more than receivable")
        await fail_ledger(service, f"ledger {refused.code}: {refused.detail}")
        parked = await july(service)
        assert [("ledger", "a"), ("ledger", "b")] == [
            (blocker["kind"], blocker["tenant_id"]) for blocker in parked["blocked_by"]
        ]
        detail = "attempt 1: ledger not-receivable: more than receivable"
        assert detail == parked["blocked_by"][0]["detail"]
        assert "mend the tenant's book there" in parked["blocked_by"][0]["way_out"]
        assert 0 == await due_ledger_steps(service)
        again = await service.post(f"{PERIOD}/close", "finance", CLOSE, "again")
        assert (202, []) == (
            again.status_code,
            again.json()["closing"]["resumptions"][0]["taken_up"],
        )
        assert 2 == await due_ledger_steps(service)
        await fail_ledger(service, "ledger not-receivable: still")
        forced = await service.post(f"{PERIOD}/close", "finance", FORCED, "forced")
        assert 202 == forced.status_code
        await carry_on(service)
        month = await july(service)
        assert ("closed", []) == (month["state"], month["blocked_by"])
        assert ["finance says so", None] == [
            resumption["override"] for resumption in month["closing"]["resumptions"]
        ]
        assert 2 == await due_ledger_steps(service)
        (first, _) = (await service.get("/v1/invoices", "finance")).json()["items"]
        assert ("finalising", "ledger not-receivable: still") == (
            first["state"],
            first["waiting_for"][0]["reason"],
        )
        late = await service.post(f"{PERIOD}/close", "finance", FORCED, "once-more")
        assert (409, "period-closed") == (late.status_code, late.json()["code"])


async def fail_ledger(service: Served, reason: str) -> None:
    """Record that the ledger did not enter any of the month's invoices."""
    async with service.books.writer.transaction() as connection:
        for step in await closings.due_steps(connection, "ledger", 100):
            await closings.step_failed(connection, step.invoice_id, "ledger", reason)


async def due_ledger_steps(service: Served) -> int:
    """How many the job would ask of the ledger now."""
    async with service.books.writer.transaction() as connection:
        return len(await closings.due_steps(connection, "ledger", 100))


async def test_a_pdf_that_cannot_be_made_is_a_reason_and_can_be_waived(
    migrated: Migrated, broker: str
) -> None:
    """The stored content was spoilt: the renderer refuses it, the month says so and goes on."""
    database = migrated("invoicing")
    async with served(database, broker) as service:
        await plant(service)
        await service.post(f"{PERIOD}/close", "finance", CLOSE)
        await carry_on(service)
        await finish_steps(service, "ledger")
        await spoil_hashes(database)
        typesetter = TypesetterProcess()
        try:
            async with service.books.writer.connection() as connection:
                await renderer(service, typesetter).run(connection)
        finally:
            await typesetter.close()
        blockers = (await july(service))["blocked_by"]
        assert [("pdf", "a"), ("pdf", "b")] == [
            (blocker["kind"], blocker["tenant_id"]) for blocker in blockers
        ]
        assert "attempt 1: content = its hash" == blockers[0]["detail"]
        forced = await service.post(f"{PERIOD}/close", "finance", FORCED, "forced")
        assert 202 == forced.status_code
        await carry_on(service)
        assert "closed" == (await july(service))["state"]


def renderer(service: Served, typesetter: TypesetterProcess) -> InvoiceRenderer:
    """The job that renders."""
    return InvoiceRenderer(typesetter, service.books.closer.outbox)


async def spoil_hashes(database: infrastructure.Database) -> None:
    """Change the recorded hash of every document, as only a superuser can."""
    owner = await asyncpg.connect(database.admin)
    try:
        await owner.execute("set session_replication_role = replica")
        await owner.execute("update invoices set content_sha256 = repeat('0', 64)")
    finally:
        await owner.close()


async def test_a_bill_that_the_database_refuses_parks_its_month_and_stops_nothing_else(
    migrated: Migrated,
    broker: str,
) -> None:
    """A draft of an older release with a wrong sum: named, computed again, and numbered then."""
    database = migrated("invoicing")
    async with served(database, broker) as service:
        await plant(service)
        await service.post(f"{PERIOD}/close", "finance", CLOSE)
        await service.books.compute()
        spoilt = """
            update bills set draft = jsonb_set(draft, '{content,total_minor}', '"7"')
             where tenant_id = 'b'
        """
        async with service.books.writer.transaction() as connection:
            await connection.execute(spoilt)
        assert 1 == await service.books.number()
        blocker, *others = (await july(service))["blocked_by"]
        assert ("compute", "b") == (blocker["kind"], blocker["tenant_id"])
        assert "refused a number" in blocker["detail"]
        assert {("ledger", "a"), ("pdf", "a")} == {
            (other["kind"], other["tenant_id"]) for other in others
        }
        assert 202 == (await service.post(f"{PERIOD}/close", "finance", CLOSE, "2")).status_code
        await carry_on(service)
        found = (await service.get("/v1/invoices", "finance")).json()["items"]
        assert [("a", "INV-2025-26-000001"), ("b", "INV-2025-26-000002")] == [
            (invoice["tenant_id"], invoice["number"]) for invoice in found
        ]


async def test_a_closing_in_progress_or_under_another_date_is_not_asked_for_again(
    migrated: Migrated,
    broker: str,
) -> None:
    """Nothing has failed yet; and a parked month keeps its date."""
    database = migrated("invoicing")
    async with served(database, broker) as service:
        await park_at_pew(service, database)
        dated = {**FORCED, "issued_on": "2025-08-02"}
        other = await service.post(f"{PERIOD}/close", "finance", dated, "dated")
        assert (409, "period-closed") == (other.status_code, other.json()["code"])


async def test_two_who_resume_at_once_are_both_on_the_record(
    migrated: Migrated, broker: str
) -> None:
    """Two services, one month: the second is run again on what the first left."""
    database = migrated("invoicing")
    async with served(database, broker) as service:
        await park_at_pew(service, database)
        await service.post("/v1/tax-rates", "operator", PEW)
        answers = await asyncio.gather(
            *(service.post(f"{PERIOD}/close", "finance", CLOSE, f"again-{n}") for n in range(4))
        )
        assert [202] * 4 == [answer.status_code for answer in answers]
        assert 4 == len((await july(service))["closing"]["resumptions"])
        await carry_on(service)
        found = (await service.get("/v1/invoices", "finance")).json()["items"]
        assert ["a", "b"] == [invoice["tenant_id"] for invoice in found]
