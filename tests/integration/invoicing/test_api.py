"""The HTTP edge on a real database: months, invoices, reruns, and who may see what."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable

import pytest

import infrastructure
from hisab_contracts.charges import OpenQuarantine
from hisab_contracts.ids import TenantId
from hisab_contracts.units import month_bounds_ms
from integration.invoicing.months import MONTH, Served, charge, served
from invoicing.closing import InvoiceRenderer, LedgerPoster
from invoicing.core.billing import RatedUsage
from invoicing.ledger_client import LedgerClient
from invoicing.pdf import TypesetterProcess
from invoicing.recompute import Recomputation, RecomputeBusy, RecomputeInput, RecomputePool
from invoicing.store import documents, entries, tax_rates

Migrated = Callable[[str], infrastructure.Database]
END_MS = month_bounds_ms(MONTH)[1]
CLOSE = {"issued_on": None, "override": None}


async def plant(service: Served) -> None:
    """The worked example's July: A owes 980.00, startup B nothing; a and b have keys."""
    await service.books.seller()
    await service.books.tenants("a")
    await service.books.tenants("b", kind="startup")
    await service.books.keep(
        charge("b", 1, 0, funded_micro=500_000_000, unfunded_micro=60_000_000),
        charge("a", 1, 630_000_000, hub="khi", used_gpu_ns=2_700_000_000_000),
        charge("a", 2, 210_000_000, hub="khi", used_gpu_ns=900_000_000_000),
        charge("a", 3, 140_000_000, used_gpu_ns=600_000_000_000),
    )
    await service.books.watermark("lhr", END_MS)
    await service.books.watermark("khi", END_MS)


async def finish(service: Served) -> None:
    """Do the job's work up to the PDFs."""
    await service.books.compute()
    await service.books.number()
    typesetter = TypesetterProcess()
    try:
        async with service.books.writer.connection() as connection:
            await InvoiceRenderer(typesetter, service.books.closer.outbox).run(connection)
    finally:
        await typesetter.close()


async def test_a_month_closes_and_its_invoice_can_be_checked_by_an_outsider(
    migrated: Migrated,
) -> None:
    """Close, invoice, hash, PDF, rerun: the worked example through the API."""
    async with served(migrated("invoicing")) as service:
        await plant(service)
        before = (await service.get(f"/v1/periods/{MONTH}", "finance")).json()
        assert ("closable", [], None) == (before["state"], before["blocked_by"], before["closing"])
        closed = await service.post(f"/v1/periods/{MONTH}/close", "finance", CLOSE)
        assert (202, "closing") == (closed.status_code, closed.json()["state"])
        again = await service.post(f"/v1/periods/{MONTH}/close", "finance", CLOSE)
        assert (202, closed.content) == (again.status_code, again.content)
        other = await service.post(f"/v1/periods/{MONTH}/close", "finance", CLOSE, "other")
        assert (409, "period-closed") == (other.status_code, other.json()["code"])
        await finish(service)

        (found,) = (await service.get("/v1/invoices", "finance", period=MONTH)).json()["items"]
        assert ("112840", "112840", "0") == (
            found["total_minor"],
            found["due_minor"],
            found["tender_minor"],
        )
        assert [{"step": "ledger", "attempts": 0, "reason": None}] == found["waiting_for"]
        assert "finalising" == found["state"]
        invoice_id = found["invoice_id"]
        content = dict(found)
        for name in ("state", "updated_at", "waiting_for", "content_sha256", "pdf_sha256"):
            content.pop(name)
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert hashlib.sha256(text.encode()).hexdigest() == found["content_sha256"]
        pdf = await service.get(f"/v1/invoices/{invoice_id}/pdf", "a")
        assert b"%PDF-" == pdf.content[:5]
        assert hashlib.sha256(pdf.content).hexdigest() == found["pdf_sha256"]
        rerun = await service.post(f"/v1/invoices/{invoice_id}/recompute", "auditor", {})
        assert {
            "content_sha256": found["content_sha256"],
            "pdf_sha256": found["pdf_sha256"],
            "identical": True,
            "differences": [],
        } == rerun.json()


async def test_two_reruns_run_at_a_time_and_who_waits_too_long_is_told(migrated: Migrated) -> None:
    """Five at once: two work, three are refused; the next one finds a place."""
    async with served(migrated("invoicing")) as service:
        await plant(service)
        await service.post(f"/v1/periods/{MONTH}/close", "finance", CLOSE)
        await finish(service)
        (found,) = (await service.get("/v1/invoices", "finance", period=MONTH)).json()["items"]
        async with service.books.api.transaction(tenant="*") as connection:
            basis = await documents.invoice_basis(connection, found["invoice_id"])
            assert basis is not None
            given = RecomputeInput(
                basis.facts, basis.first_seq, await tax_rates.tax_rows(connection), basis.position
            )
            usage, _ = await entries.charges(connection, basis.facts, 0)
        may_end, at_work = asyncio.Event(), []

        async def charges() -> AsyncIterator[list[RatedUsage]]:
            at_work.append(1)
            await may_end.wait()
            yield usage

        pool = RecomputePool(wait_s=1)
        five = [asyncio.create_task(pool.run(given, charges())) for _ in range(5)]
        refused = asyncio.as_completed(five)
        for _ in range(3):
            with pytest.raises(RecomputeBusy):
                await next(refused)
        assert 2 == len(at_work)
        may_end.set()
        ended = await asyncio.gather(*five, return_exceptions=True)
        ended.append(await pool.run(given, charges()))
        again = [answer for answer in ended if isinstance(answer, Recomputation)]
        assert [found["pdf_sha256"]] * 3 == [answer.pdf_sha256 for answer in again]


async def test_with_the_ledger_down_a_close_waits_and_says_so(migrated: Migrated) -> None:
    """Nothing listens: the invoice stays `finalising` with the reason; the PDF is there."""
    async with served(migrated("invoicing")) as service:
        await plant(service)
        await service.post(f"/v1/periods/{MONTH}/close", "finance", CLOSE)
        await finish(service)
        ledger = LedgerClient("http://127.0.0.1:9", "no-key")
        poster = LedgerPoster(ledger, service.books.closer.outbox)
        async with service.books.writer.connection() as connection:
            await poster.run(connection)
            await service.books.closer.run(connection)
        await ledger.close()
        month = (await service.get(f"/v1/periods/{MONTH}", "finance")).json()
        assert "closing" == month["state"]
        (blocker,) = month["blocked_by"]
        assert ("ledger", "a") == (blocker["kind"], blocker["tenant_id"])
        assert blocker["detail"].startswith("attempt 1: ledger unreachable: ConnectError")


@pytest.mark.defect("M22")
async def test_an_incomplete_month_is_refused_and_an_override_is_on_the_record(
    migrated: Migrated,
) -> None:
    """khi is behind and time of A waits in quarantine; finance overrides with a reason."""
    async with served(migrated("invoicing")) as service:
        await plant(service)
        waiting = (OpenQuarantine(TenantId("a"), MONTH, 600_000_000_000),)
        await service.books.watermark("khi", END_MS - 1, 2, quarantined=waiting)
        month = (await service.get(f"/v1/periods/{MONTH}", "auditor")).json()
        assert "open" == month["state"]
        refused = await service.post(f"/v1/periods/{MONTH}/close", "finance", CLOSE)
        assert (409, "period-incomplete", True) == (
            refused.status_code,
            refused.json()["code"],
            refused.json()["retryable"],
        )
        assert [("watermark", "khi"), ("quarantine", "khi")] == [
            (blocker["kind"], blocker["hub"]) for blocker in refused.json()["blocked_by"]
        ]
        body = {"issued_on": None, "override": {"reason": "khi burned down"}}
        forced = await service.post(f"/v1/periods/{MONTH}/close", "finance", body)
        assert (202, "khi burned down") == (
            forced.status_code,
            forced.json()["closing"]["override"],
        )


async def test_without_a_tax_row_no_override_helps(migrated: Migrated) -> None:
    """A fourth hub without tax is named; nobody guesses a rate."""
    async with served(migrated("invoicing")) as service:
        await plant(service)
        await service.books.keep(charge("a", 4, 1_000_000, hub="pew"))
        body = {"issued_on": None, "override": {"reason": "now"}}
        refused = await service.post(f"/v1/periods/{MONTH}/close", "finance", body)
        assert (409, "tax-missing") == (refused.status_code, refused.json()["code"])
        row = {
            "hub": "pew",
            "authority": "KPRA",
            "tax_bps": 1500,
            "valid_from": "2025-01-01",
            "citation": "unconfirmed",
        }
        assert 201 == (await service.post("/v1/tax-rates", "operator", row)).status_code
        changed = {**row, "tax_bps": 200}
        conflict = await service.post("/v1/tax-rates", "operator", changed)
        assert (409, "already-exists") == (conflict.status_code, conflict.json()["code"])
        assert (
            202
            == (
                await service.post(f"/v1/periods/{MONTH}/close", "finance", CLOSE, "later")
            ).status_code
        )


@pytest.mark.defect("M20", "F27", "I21")
async def test_late_usage_is_shown_and_the_issued_bytes_stay(migrated: Migrated) -> None:
    """Booked after the close: late_micro, its own step, difference 0, the old hash."""
    async with served(migrated("invoicing")) as service:
        await plant(service)
        await service.post(f"/v1/periods/{MONTH}/close", "finance", CLOSE)
        await finish(service)
        (old,) = (await service.get("/v1/invoices", "finance")).json()["items"]
        await service.books.keep(charge("a", 4, 70_000_000), charge("b", 2, 5))
        month = (await service.get(f"/v1/periods/{MONTH}", "finance")).json()
        assert "70000000" == month["late_micro"]
        told = (await service.get(f"/v1/periods/{MONTH}/reconciliation", "auditor")).json()
        steps = {step["step"]: step["micro"] for step in told["steps"]}
        assert ("1610000005", "-560000005", "-70000000", "0", "-980000000") == tuple(
            steps[name] for name in ("charged", "non-commercial", "late", "residue", "invoiced")
        )
        assert ("0", "0") == (told["difference_micro"], told["receivable_difference_micro"])
        rerun = await service.post(f"/v1/invoices/{old['invoice_id']}/recompute", "auditor", {})
        assert (True, old["content_sha256"]) == (
            rerun.json()["identical"],
            rerun.json()["content_sha256"],
        )


@pytest.mark.defect("I28")
async def test_no_tenant_sees_anothers_invoice(migrated: Migrated) -> None:
    """Neither in a list nor by its id; who may ask what is in the access matrix."""
    async with served(migrated("invoicing")) as service:
        await plant(service)
        await service.post(f"/v1/periods/{MONTH}/close", "finance", CLOSE)
        await finish(service)
        (mine,) = (await service.get("/v1/invoices", "a")).json()["items"]
        at = f"/v1/invoices/{mine['invoice_id']}"
        assert [] == (await service.get("/v1/invoices", "b")).json()["items"]
        assert 404 == (await service.get("/v1/invoices", "b", tenant_id="a")).status_code
        assert [404, 404] == [
            (await service.get(path, "b")).status_code for path in (at, f"{at}/pdf")
        ]
        assert [200, 200] == [
            (await service.get(path, "a")).status_code for path in (at, f"{at}/pdf")
        ]


async def test_what_is_malformed_is_422(migrated: Migrated) -> None:
    """A month that is none, a date before the month ends, a state or a cursor that is none."""
    async with served(migrated("invoicing")) as service:
        await plant(service)
        early = {"issued_on": "2025-07-30", "override": None}
        answers = [
            await service.get("/v1/periods/2025-13", "finance"),
            await service.post(f"/v1/periods/{MONTH}/close", "finance", early),
            await service.get("/v1/invoices", "finance", state="paid"),
            await service.get("/v1/invoices", "finance", updated_since="yesterday"),
            await service.get("/v1/invoices", "finance", cursor="WzFd"),
            await service.post(
                "/v1/tax-rates",
                "operator",
                {
                    "hub": "lhr",
                    "authority": "PRA",
                    "tax_bps": 16.5,
                    "valid_from": "2025-01-01",
                    "citation": "x",
                },
            ),
        ]
        assert [422] * 6 == [answer.status_code for answer in answers]
        second = {"legal_entity_id": "another", "name": "Another"}
        refused = await service.post("/v1/legal-entities", "operator", second)
        assert (422, "unsupported") == (refused.status_code, refused.json()["code"])


async def test_lists_page_in_a_total_order(migrated: Migrated) -> None:
    """Three invoices in pages of two."""
    async with served(migrated("invoicing")) as service:
        await service.books.seller()
        await service.books.tenants("a", "b", "c")
        await service.books.keep(*(charge(tenant, 1, 1_000_000) for tenant in "abc"))
        await service.books.watermark("lhr", END_MS)
        await service.post(f"/v1/periods/{MONTH}/close", "finance", CLOSE)
        await service.books.compute()
        await service.books.number()
        first = (await service.get("/v1/invoices", "finance", limit="2")).json()
        second = (
            await service.get("/v1/invoices", "finance", limit="2", cursor=first["next"])
        ).json()
        assert [None, None] == [item["pdf_sha256"] for item in first["items"]]
        assert (["a", "b"], ["c"], None) == (
            [item["tenant_id"] for item in first["items"]],
            [item["tenant_id"] for item in second["items"]],
            second["next"],
        )
        done = await service.get("/v1/invoices", "finance", state="finalised")
        assert [] == done.json()["items"]
        since = (
            await service.get("/v1/invoices", "finance", updated_since="2020-01-01T00:00:00Z")
        ).json()
        assert 3 == len(since["items"])
