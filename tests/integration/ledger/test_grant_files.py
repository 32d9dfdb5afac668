"""Grants from a file, over HTTP and on real PostgreSQL: what is stored, and what is answered."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest
from msgspec.structs import replace

from hisab_contracts.ids import ProgrammeId, TenantId
from integration.ledger.real import RealLedger
from integration.ledger.test_api import Api, api, grant_of
from integration.ledger.test_proposals import approve, codes, fresh
from ledger.commands import imported_grant_id
from ledger.core.grant_files import COLUMNS, MOST_ROWS
from runtime.database import ALL_TENANTS
from runtime.http import MAX_BODY_BYTES
from unit.ledger.values import grant

__all__ = ["api"]

PATH = "/v1/grants/import"


def file_of(*rows: dict[str, str]) -> bytes:
    """A file; a row says what is other than usual."""
    usual = {
        "programme_id": "ignite",
        "grant_micro": "50",
        "priority": "1",
        "effective_at": "2025-07-01T00:00:00.000Z",
    }
    lines = [",".join((usual | row).get(name, "") for name in COLUMNS) for row in rows]
    return "\r\n".join([",".join(COLUMNS), *lines, ""]).encode()


def row_of(tenant_id: str, reference: str, **more: str) -> dict[str, str]:
    """A row of a file."""
    return {"tenant_id": tenant_id, "reference": reference} | more


async def send(
    api: Api,
    body: bytes,
    query: str = "",
    who: str = "officer",
    *,
    key: str | None = None,
    media_type: str = "text/csv",
) -> httpx2.Response:
    """Send a file, by default under a key of its own."""
    headers = {"content-type": media_type, "idempotency-key": key or fresh("i")}
    headers |= {"authorization": f"Bearer {api.keys[who]}"}
    return await api.send(PATH + query, body, headers)


def outcomes(answer: httpx2.Response) -> list[str]:
    """What the rows came to; they are numbered from 1."""
    assert 200 == answer.status_code, answer.text
    items = answer.json()["items"]
    assert [item["row"] for item in items] == list(range(1, len(items) + 1))
    return [item["result"] for item in items]


async def grants_of(api: Api, tenant_id: str) -> list[dict[str, Any]]:
    """The grants of a tenant."""
    answer = await api.get(f"/v1/grants?tenant_id={tenant_id}", "officer")
    return list(answer.json()["items"])


async def lab(ledger: RealLedger) -> str:
    """A tenant of its own."""
    return await ledger.tenant(fresh("file"), "university")


async def test_rows_of_a_file_are_proposals_that_somebody_else_approves(
    api: Api, ledger: RealLedger
) -> None:
    """All their terms are kept, in the order of the file; the officer cannot approve them."""
    tenant_id = await lab(ledger)
    full = row_of(
        tenant_id,
        "A-2",
        expires_at="2090-07-01T00:00:00.000Z",
        hubs="lhr;khi",
        skus="h100-sxm-80",
        projects="main;main",
        coverage_bps="2500",
    )
    answer = await send(api, file_of(row_of(tenant_id, "A-1"), full))
    assert ["ok", "ok"] == outcomes(answer)
    assert 2 == answer.json()["created"]
    first, second = await grants_of(api, tenant_id)
    ids = [item["grant_id"] for item in answer.json()["items"]]
    assert ids == [first["grant_id"], second["grant_id"]]
    assert ("A-1", "A-2") == (first["reference"], second["reference"])
    assert ({}, 10_000, None, "proposed", "k-officer") == tuple(
        first[name] for name in ("scope", "coverage_bps", "expires_at", "state", "proposed_by")
    )
    scope = {"hubs": ["khi", "lhr"], "skus": ["h100-sxm-80"], "projects": ["main"]}
    assert (scope, 2500, "2090-07-01T00:00:00.000Z", "2025-07-01T00:00:00.000Z") == tuple(
        second[name] for name in ("scope", "coverage_bps", "expires_at", "effective_at")
    )
    assert (403, "maker-is-checker") == codes(await approve(api, ids[0], "officer"))
    assert 200 == (await approve(api, ids[0])).status_code
    balance = await api.get(f"/v1/tenants/{tenant_id}/balance", "officer")
    assert "50" == balance.json()["available_micro"]


async def test_one_row_that_is_rejected_keeps_all_from_being_stored(
    api: Api, ledger: RealLedger
) -> None:
    """Unless a part is asked for; each row says what to do."""
    tenant_id = await lab(ledger)
    body = file_of(
        row_of(tenant_id, "A"), row_of("nobody", "B"), row_of(tenant_id, "C", grant_micro="0")
    )
    whole = await send(api, body)
    assert ["ok", "rejected", "rejected"] == outcomes(whole)
    assert 0 == whole.json()["created"]
    assert [None] * 3 == [item["grant_id"] for item in whole.json()["items"]]
    assert "partial=true" in whole.json()["items"][0]["reason"]
    assert [] == await grants_of(api, tenant_id)
    part = await send(api, body, "?partial=true")
    assert ["ok", "rejected", "rejected"] == outcomes(part)
    assert 1 == part.json()["created"]
    (kept,) = await grants_of(api, tenant_id)
    assert kept["grant_id"] == part.json()["items"][0]["grant_id"]
    assert None is part.json()["items"][0]["reason"]


async def test_a_dry_run_stores_nothing_and_answers_the_same(api: Api, ledger: RealLedger) -> None:
    """To the byte, and its key is free for the import itself."""
    tenant_id = await lab(ledger)
    body = file_of(row_of(tenant_id, "A"), row_of(tenant_id, "A"), row_of("nobody", "B"))
    whole = await send(api, body, "?dry_run=true")
    assert (["ok", "duplicate", "rejected"], 0) == (outcomes(whole), whole.json()["created"])
    key = fresh("dry")
    dry = [await send(api, body, "?partial=true&dry_run=true", key=key) for _ in range(2)]
    assert (["ok", "duplicate", "rejected"], 1) == (outcomes(dry[0]), dry[0].json()["created"])
    assert [] == await grants_of(api, tenant_id)
    real = await send(api, body, "?partial=true", key=key)
    assert dry[0].content == dry[1].content == real.content
    assert 1 == len(await grants_of(api, tenant_id))
    refused = await send(api, body, "?dry_run=yes")
    assert (422, "malformed") == codes(refused)


async def test_a_reference_seen_before_is_a_duplicate(api: Api, ledger: RealLedger) -> None:
    """In this file or an earlier one, rejected or not; another tenant's is no matter."""
    tenant_id, other = await lab(ledger), await lab(ledger)
    first = await send(api, file_of(row_of(tenant_id, "A")))
    (item,) = first.json()["items"]
    reason = {"reason": "too much"}
    rejected = await api.post(
        f"/v1/grants/{item['grant_id']}/reject", reason, "approver", key=fresh("r")
    )
    assert 200 == rejected.status_code
    body = file_of(
        row_of(tenant_id, "A", grant_micro="51"),
        row_of(tenant_id, "B"),
        row_of(tenant_id, "B"),
        row_of(other, "A"),
    )
    again = await send(api, body)
    assert ["duplicate", "ok", "duplicate", "ok"] == outcomes(again)
    assert 2 == again.json()["created"]
    items = again.json()["items"]
    assert item["grant_id"] == items[0]["grant_id"]
    assert items[1]["grant_id"] == items[2]["grant_id"]
    for words, row in (("rejected, with another grant_micro", 0), ("in this file", 2)):
        assert words in items[row]["reason"]
    assert (["duplicate"] * 4, 0) == (
        outcomes(third := await send(api, body)),
        third.json()["created"],
    )


MANY = ";".join(f"h{number}" for number in range(101))
WRONG = (
    ("tenant_id", "nobody", "nobody"),
    ("tenant_id", "no id", "no id"),
    ("tenant_id", "abroad", "abroad"),
    ("programme_id", "none", "none"),
    ("programme_id", "", ""),
    ("grant_micro", "0", "0"),
    ("grant_micro", "-5", "-5"),
    ("grant_micro", "1.5", "1.5"),
    ("grant_micro", str(2**63), str(2**63)),
    ("priority", "1001", 1001),
    ("priority", "", ""),
    ("priority", "high", "high"),
    ("effective_at", "2025-07-01", "2025-07-01"),
    ("effective_at", "2025-07-01T00:30:00.000Z", "2025-07-01T00:30:00.000Z"),
    ("effective_at", "1999-07-01T00:00:00.000Z", "1999-07-01T00:00:00.000Z"),
    ("effective_at", "", ""),
    ("expires_at", "2025-07-01T00:00:00.000Z", "2025-07-01T00:00:00.000Z"),
    ("expires_at", "2090-07-01T00:30:00.000Z", "2090-07-01T00:30:00.000Z"),
    ("hubs", "LHR", ["LHR"]),
    ("hubs", MANY, MANY.split(";")),
    ("skus", "a b", ["a b"]),
    ("projects", "main;", ["main", ""]),
    ("coverage_bps", "0", 0),
    ("coverage_bps", "10001", 10_001),
    ("coverage_bps", "half", "half"),
)
"""By column: a cell, and the same in a request."""


async def test_each_row_is_refused_as_its_request_alone_would_be(
    api: Api, ledger: RealLedger
) -> None:
    """Whatever is wrong with it; what to change is named by its column."""
    tenant_id = await lab(ledger)
    abroad = {"tenant_id": "abroad", "name": "A", "kind": "startup", "currency": "USD"}
    abroad |= {"credit_limit_micro": "0"}
    assert 201 == (await api.post("/v1/tenants", abroad, "operator", key="abroad")).status_code
    for column, cell, member in WRONG:
        in_scope = column in {"hubs", "skus", "projects"}
        change = {"scope": {column: member}} if in_scope else {column: member}
        alone = await api.post(
            "/v1/grants", grant_of(tenant_id) | change, "officer", key=fresh("g")
        )
        assert alone.status_code in {404, 422}, (column, cell, alone.text)
    rows = [
        row_of(tenant_id, f"W-{number}") | {column: cell}
        for number, (column, cell, _) in enumerate(WRONG)
    ]
    answer = await send(api, file_of(*rows, row_of(tenant_id, "fine")), "?partial=true")
    assert [*(["rejected"] * len(WRONG)), "ok"] == outcomes(answer)
    for (column, cell, _), item in zip(WRONG, answer.json()["items"], strict=False):
        named = "currency" if cell == "abroad" else column.removesuffix("_id")
        assert named in item["reason"], (column, cell, item)
        assert len(item["reason"]) < 250, item


async def test_a_file_that_is_none_is_refused_in_the_order_of_checks(api: Api) -> None:
    """401, 403, 422 for the query, 413, 415, 422 for the file, then for the key."""
    fine = file_of(row_of("nobody", "A"))
    for who in ("operator", "approver", "finance", "auditor", "scheduler", "one", "hub"):
        assert (403, "forbidden") == codes(await send(api, fine, who=who))
    assert (422, "malformed") == codes(await send(api, fine, "?partial=1"))
    assert (413, "too-large") == codes(await send(api, b"," * (MAX_BODY_BYTES + 1)))
    as_json = await send(api, fine, media_type="application/json")
    assert (415, "unsupported-media-type") == codes(as_json)
    for body in (b"", b"," * MAX_BODY_BYTES, fine + b"\0", b"\xff" + fine, fine + b'"'):
        refused = await send(api, body)
        assert (422, "malformed") == codes(refused)
        assert len(refused.json()["detail"]) > 20
    headers = {"content-type": "text/csv", "authorization": f"Bearer {api.keys['officer']}"}
    no_key = await api.send(PATH, fine, headers)
    assert (422, "idempotency-key-missing") == codes(no_key)
    assert (422, "malformed") == codes(await send(api, fine, key="two words"))
    with_charset = await send(api, fine, media_type="text/csv; charset=utf-8")
    assert 200 == with_charset.status_code


async def test_a_repeat_gets_the_first_answer_and_another_file_is_another_command(
    api: Api, ledger: RealLedger
) -> None:
    """The same bytes and options are the same command."""
    tenant_id = await lab(ledger)
    key, body = fresh("i"), file_of(row_of(tenant_id, "A"))
    first, again = [await send(api, body, key=key) for _ in range(2)]
    assert first.content == again.content
    assert 1 == first.json()["created"]
    for other, query, differing in (
        (body + b"\n", "", ["file_sha256"]),
        (body, "?partial=true", ["partial"]),
    ):
        refused = await send(api, other, query, key=key)
        assert (409, "idempotency-key-reused") == codes(refused)
        assert differing == refused.json()["differing"]
    assert 1 == len(await grants_of(api, tenant_id))


async def test_of_files_sent_at_once_each_reference_is_stored_once(
    api: Api, ledger: RealLedger
) -> None:
    """Whatever the order of their rows: what one stores is the other's duplicate."""
    tenant_id = await lab(ledger)
    rows = [row_of(tenant_id, f"R-{number}") for number in range(40)]
    files = [file_of(*rows), file_of(*reversed(rows)), file_of(*rows[20:], *rows[:20])]
    answers = await asyncio.gather(*(insist(api, body) for body in files))
    assert 40 == sum(answer.json()["created"] for answer in answers)
    assert {"ok", "duplicate"} >= {result for answer in answers for result in outcomes(answer)}
    stored = [grant["reference"] for grant in await grants_of(api, tenant_id)]
    assert sorted(row["reference"] for row in rows) == sorted(stored)
    ids = {item["grant_id"] for answer in answers for item in answer.json()["items"]}
    assert 40 == len(ids)


async def test_what_is_imported_meanwhile_is_a_duplicate(api: Api, ledger: RealLedger) -> None:
    """A file waits for one whose end is not known yet, and then says what that came to."""
    tenant_id = await lab(ledger)
    first = grant(imported_grant_id(TenantId(tenant_id), "A"), 7, tenant_id=tenant_id)
    first = replace(first, programme_id=ProgrammeId("ignite"), reference="A")
    body = file_of(row_of(tenant_id, "A"), row_of(tenant_id, "B"))
    async with ledger.admin.connection() as looking:
        async with ledger.api.transaction(tenant=ALL_TENANTS) as connection:
            assert None is await ledger.commands.propose_grant(connection, first)
            sent = asyncio.create_task(insist(api, body))
            waiting = "select exists (select from pg_locks where not granted)"
            while not await looking.fetchval(waiting):
                pass
        answer = await sent
    assert (["duplicate", "ok"], 1) == (outcomes(answer), answer.json()["created"])
    assert first.grant_id == answer.json()["items"][0]["grant_id"]
    assert "grant_micro" in answer.json()["items"][0]["reason"]


async def insist(api: Api, body: bytes) -> httpx2.Response:
    """Send a file as a client should: again, with its key, while the answer is retryable."""
    key = fresh("i")
    while True:
        answer = await send(api, body, key=key)
        if answer.is_success or not answer.json()["retryable"]:
            return answer
        await asyncio.sleep(0.1)


async def test_a_file_of_the_most_rows_is_proposed_and_one_more_is_refused(
    api: Api, ledger: RealLedger
) -> None:
    """All in one transaction; the refusal says to send it in parts."""
    tenant_id = await lab(ledger)
    rows = [row_of(tenant_id, f"M-{number}") for number in range(MOST_ROWS)]
    answer = await send(api, file_of(*rows))
    assert MOST_ROWS == answer.json()["created"]
    too_many = await send(api, file_of(*rows, row_of(tenant_id, "more")))
    assert (422, "malformed") == codes(too_many)
    assert "at most 1000 rows" in too_many.json()["detail"]


async def test_an_imported_grant_is_named_after_its_reference(api: Api, ledger: RealLedger) -> None:
    """So a recovery, which knows no references, still keeps it from coming twice."""
    tenant_id = await lab(ledger)
    grant_id = imported_grant_id(TenantId(tenant_id), "A")
    await ledger.grant(tenant_id, grant_id, 5)
    answer = await send(api, file_of(row_of(tenant_id, "A")))
    assert ["duplicate"] == outcomes(answer)
    assert grant_id == answer.json()["items"][0]["grant_id"]


async def test_the_schema_keeps_a_reference_once_per_tenant(ledger: RealLedger, api: Api) -> None:
    """`grants_reference_key` and `grants_reference_check`, whoever writes."""
    tenant_id = await lab(ledger)
    await send(api, file_of(row_of(tenant_id, "A"), row_of(tenant_id, "B")))
    async with ledger.admin.connection() as connection:
        for reference, constraint in (
            ("A", "grants_reference_key"),
            ("", "grants_reference_check"),
        ):
            with pytest.raises(Exception, match=constraint):
                await connection.execute(
                    "update grants set reference = $2 where tenant_id = $1 and reference = 'B'",
                    tenant_id,
                    reference,
                )
