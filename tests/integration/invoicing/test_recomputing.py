"""A recomputation after something was altered behind the service: not identical, and why."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest

import infrastructure
from hisab_contracts.units import month_bounds_ms
from integration.invoicing.months import MONTH, Served, charge, served
from invoicing.closing import InvoiceRenderer
from invoicing.pdf import TypesetterProcess

Migrated = Callable[[str], infrastructure.Database]
CLOSE: dict[str, object] = {"issued_on": None, "override": None}


@pytest.fixture
async def issued(migrated: Migrated) -> AsyncIterator[tuple[Served, infrastructure.Database]]:
    """A month of tenant a with one invoice, numbered and rendered."""
    database = migrated("invoicing")
    async with served(database) as service:
        books = service.books
        await books.seller()
        await books.tenants("a")
        await books.keep(
            charge("a", 1, 630_000_000, hub="khi"),
            charge("a", 2, 140_000_000, funded_micro=10_000_000),
        )
        for hub in ("lhr", "khi"):
            await books.watermark(hub, month_bounds_ms(MONTH)[1])
        await service.post(f"/v1/periods/{MONTH}/close", "finance", CLOSE)
        await books.compute()
        await books.number()
        typesetter = TypesetterProcess()
        try:
            async with books.writer.connection() as connection:
                await InvoiceRenderer(typesetter, books.closer.outbox).run(connection)
        finally:
            await typesetter.close()
        yield service, database


async def alter(database: infrastructure.Database, *statements: str) -> None:
    """Change what nobody may change, as a superuser who has switched every guard off."""
    owner = await asyncpg.connect(database.admin)
    try:
        await owner.execute("set session_replication_role = replica")
        for statement in statements:
            assert (await owner.execute(statement)).split()[-1] not in {"0", ""}, statement
    finally:
        await owner.close()


async def rerun(service: Served) -> dict[str, Any]:
    """The auditor's recomputation of the only invoice."""
    (found,) = (await service.get("/v1/invoices", "auditor")).json()["items"]
    path = f"/v1/invoices/{found['invoice_id']}/recompute"
    answer = await service.post(path, "auditor", {})
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


DROP_PDF_CHECK = "alter table invoice_pdfs drop constraint invoice_pdfs_check"
EDIT_PDF = """
update invoice_pdfs set pdf = pdf || '\\x0a', pdf_sha256 = encode(sha256(pdf || '\\x0a'), 'hex')
"""
EDIT_CONTENT = """
update invoices set content = content || '{"issued_on": "2025-08-02"}'
"""


@pytest.mark.parametrize(
    ("statements", "expected"),
    [
        (
            ["update entries set receivable_micro = receivable_micro + 1 where seq = 1"],
            [("entries", "lines[0].net_micro", "630000000", "630000001")],
        ),
        (
            ["update entries set used_gpu_ns = 0 where seq = 1"],
            [("entries", "lines[0].gpu_ms", "3600000", "0")],
        ),
        (
            ["update entries set period = '2025-08' where seq = 2"],
            [("entries", "lines[1].net_micro", "150000000", None)],
        ),
        (
            ["update entries set entry_hash = sha256('forged') where seq = 2"],
            [("entries", "entries.last_hash", None, None)],
        ),
        (["delete from entries where seq = 2"], [("entries", "entries.last_hash", None, "")]),
        (
            ["update tax_rates set tax_bps = 1 where hub = 'khi'"],
            [("tax", "lines[0].tax_bps", "1500", "1"), ("tax", "taxes[1].tax_bps", "1500", "1")],
        ),
        (
            ["update tax_rates set citation = 'another law' where hub = 'lhr'"],
            [("tax", "taxes[0].citation", "unconfirmed", "another law")],
        ),
        (
            ["delete from tax_rates where hub = 'khi'"],
            [("tax", "taxes", None, "no tax row covers khi on 2025-07-31")],
        ),
        (["delete from entries"], [("entries", "lines", None, None)]),
        (
            [EDIT_CONTENT],
            [("content", "content_sha256", None, None), ("content", "issued_on", None, None)],
        ),
        (
            [
                EDIT_PDF,
            ],
            [("pdf", "pdf_sha256", None, None)],
        ),
        (
            ["update legal_entities set name = 'Another'"],
            [("issue", "legal_entity_name", "Ignite HaaS", "Another")],
        ),
    ],
    ids=[
        "amount",
        "time",
        "month",
        "hash",
        "entry-gone",
        "rate",
        "citation",
        "row-gone",
        "all-entries-gone",
        "content",
        "pdf-and-its-hash",
        "seller",
    ],
)
async def test_what_was_altered_is_named(
    issued: tuple[Served, infrastructure.Database],
    statements: list[str],
    expected: list[tuple[str, str, str | None, str | None]],
) -> None:
    """Identical before; then not, with the part, the member and both values."""
    service, database = issued
    before = await rerun(service)
    assert (True, []) == (before["identical"], before["differences"])
    await alter(database, *statements)
    told = await rerun(service)
    assert not told["identical"]
    named = {(item["part"], item["member"]): item for item in told["differences"]}
    for part, member, was, now in expected:
        difference = named[part, member]
        assert was in {None, difference["issued"]}
        assert now in {None, difference["recomputed"]}
    assert {part for part, *_ in expected} == {item["part"] for item in told["differences"]}


async def test_pdf_bytes_that_do_not_have_their_own_hash_are_named(
    issued: tuple[Served, infrastructure.Database],
) -> None:
    """The table's check refuses it; who drops the check is found out all the same."""
    service, database = issued
    edit = "update invoice_pdfs set pdf = pdf || '\\x0a'"
    with pytest.raises(asyncpg.CheckViolationError):
        await alter(database, edit)
    owner = await asyncpg.connect(database.admin)
    try:
        await owner.execute(DROP_PDF_CHECK)
    finally:
        await owner.close()
    await alter(database, edit)
    told = await rerun(service)
    (found,) = told["differences"]
    assert (False, "pdf", told["pdf_sha256"]) == (
        told["identical"],
        found["part"],
        found["issued"],
    )


async def test_without_charges_there_is_no_hash_and_no_failure(
    issued: tuple[Served, infrastructure.Database],
) -> None:
    """Nothing to bill is what the recomputation arrived at."""
    service, database = issued
    await alter(database, "delete from entries")
    told = await rerun(service)
    assert (None, None, False) == (
        told["content_sha256"],
        told["pdf_sha256"],
        told["identical"],
    )
