"""Invoicing restored to before a close: it refuses, whatever its number, until a newer backup."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from demo.api import Json
from e2e.outside import outside_of, until
from faults.backup import Backup
from faults.invoicing.test_killed_closing import MONTH, book_july
from retries import ANSWER_PATIENCE_S
from stack import Stack

BILLED = 5


async def answers(stack: Stack, path: str) -> tuple[int, dict[str, Any]]:
    """Status and body of an answer of invoicing; 0 while it is down."""
    headers = {"authorization": f"Bearer {stack.key('finance')}"}
    async with httpx2.AsyncClient(timeout=ANSWER_PATIENCE_S, trust_env=False) as client:
        try:
            answer = await client.get(stack.url("invoicing") + path, headers=headers)
        except httpx2.HTTPError:
            return 0, {}
    return answer.status_code, answer.json()


async def saved(stack: Stack, backup: Backup) -> None:
    """Save the database of invoicing, which is down for that moment."""
    stack.stop("invoicing")
    await backup.take()
    stack.start("invoicing")
    await until(lambda: answers(stack, "/readyz"), lambda x: x[0] == 200)


@pytest.mark.slow
@pytest.mark.defect("I8")
async def test_invoicing_restored_to_before_a_close_gives_no_number_again(
    own_stack: Stack, apache_kafka: object
) -> None:
    """Its documents are announced, so it serves nothing; a backup that has them is served."""
    own_stack.stop("metering")
    older = Backup.of(own_stack, "invoicing", "older")
    newer = Backup.of(own_stack, "invoicing", "newer")
    path = f"/v1/periods/{MONTH}"
    async with outside_of(own_stack) as outside:

        async def july() -> Json:
            return await outside.api.get("invoicing", path, "finance")

        await book_july(outside, [await outside.tenant() for _ in range(BILLED)])
        await until(july, lambda x: x["state"] == "closable")
        await saved(own_stack, older)
        await until(july, lambda x: x["state"] == "closable")
        body: Json = {"issued_on": None, "override": None}
        await outside.api.post("invoicing", f"{path}/close", "finance", body)
        await until(july, lambda x: x["state"] == "closed")
        await until(
            lambda: answers(own_stack, "/v1/status"), lambda x: x[1].get("outbox_depth") == 0
        )
        await saved(own_stack, newer)
        found = await outside.api.items("invoicing", "/v1/invoices", "finance", period=MONTH)
        await older.restore()
        _, problem = await until(
            lambda: answers(own_stack, path), lambda x: x[1].get("code") == "behind-published"
        )
        assert "restore a backup" in problem["detail"]
        assert (503, 503, 200) == (
            problem["status"],
            (await answers(own_stack, "/readyz"))[0],
            (await answers(own_stack, "/healthz"))[0],
        )
        await newer.restore()
        await until(lambda: answers(own_stack, path), lambda x: x[1].get("state") == "closed")
        again = await outside.api.items("invoicing", "/v1/invoices", "finance", period=MONTH)
    assert BILLED == len(found)
    assert found == again
