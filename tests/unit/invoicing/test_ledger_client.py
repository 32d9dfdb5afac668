"""What invoicing asks of the ledger is asked again when the connection is lost under it."""

from __future__ import annotations

import pytest

from hisab_contracts.ids import DocumentId, TenantId
from invoicing.ledger_client import (
    InvoicedCommand,
    InvoicedEntry,
    LedgerClient,
    LedgerUnreachable,
)
from unit.deploy.scripted import LOST, service_of

COMMAND = InvoicedCommand(DocumentId("d1"), TenantId("t1"), "2025-07", 1, 1, 2)


async def test_a_call_whose_connection_is_lost_goes_out_again_with_its_key() -> None:
    """A kept connection that the ledger closes under a call is no reason to wait for a retry."""
    async with service_of([LOST, LOST, (201, {"entry_id": "t1.9"})]) as service:
        client = LedgerClient(service.url, "key")
        assert InvoicedEntry("t1.9") == await client.post_invoiced(COMMAND)
        await client.close()
    assert [("post /v1/tenants/t1/invoiced", "invoiced:d1")] * 3 == service.asked


async def test_a_ledger_that_loses_every_call_is_unreachable() -> None:
    """After three losses whoever called decides when to come again."""
    async with service_of([LOST] * 3) as service:
        client = LedgerClient(service.url, "key")
        with pytest.raises(LedgerUnreachable):
            await client.entries_after(TenantId("t1"), 0)
        await client.close()
    assert 3 == len(service.asked)
