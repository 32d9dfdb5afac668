"""Follow what the ledger says: entries and watermarks, tenants and keys; and fetch what is missing.

Entries arrive in order of seq per tenant, at least once. A message that cannot be read stops the
consumer: skipping one would bill a wrong sum. When a book shows a gap, the missing entries are
fetched from the ledger's feed, outside any transaction, and inserted like the others; until then
the book's position stands still and months it has a part in stay open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

import msgspec
import structlog

from hisab_contracts import topics
from hisab_contracts.entries import Entry, EntryWatermark, read_entry_message
from hisab_contracts.reference import TenantRecord
from invoicing import store
from invoicing.books import kept
from invoicing.ledger_client import LedgerClient, LedgerUnreachable
from runtime.auth import keep_access_keys
from runtime.database import transaction_on
from runtime.streams import Batch

if TYPE_CHECKING:
    from runtime.database import Connection

_log = structlog.get_logger("invoicing.consumer")


async def keep_entries(batch: Batch, connection: Connection) -> None:
    """Handle `ledger.entries.v1`: entries into their books, watermarks beside them."""
    entries, marks = [], []
    for record in batch.records:
        message = read_entry_message(record.value or b"")
        match message:
            case Entry():
                entries.append(kept(message))
            case EntryWatermark():
                marks.append((record.partition, message))
            case _:
                assert_never(message)
    await store.keep_entries(connection, entries)
    await store.keep_watermarks(connection, marks)


async def keep_reference(batch: Batch, connection: Connection) -> None:
    """Handle `ledger.tenants.v1` and `ledger.access.v1`: the newest record of each key counts."""
    tenants = [
        msgspec.json.decode(record.value, type=TenantRecord)
        for record in batch.records
        if record.topic == topics.TENANTS and record.value is not None
    ]
    await store.keep_tenants(connection, tenants)
    await keep_access_keys(batch, connection)


@dataclass(frozen=True, slots=True)
class GapFetcher:
    """Fetches entries that the topic did not bring, one page per book and turn."""

    ledger: LedgerClient

    async def run(self, connection: Connection) -> None:
        """Fetch what is missing of the books that have a gap."""
        for gap in await store.gaps(connection):
            try:
                entries = await self.ledger.entries_after(gap.tenant_id, gap.contiguous_seq)
            except LedgerUnreachable as error:
                _log.warning("gap not fetched", tenant_id=gap.tenant_id, error=str(error))
                return
            async with transaction_on(connection):
                await store.keep_entries(connection, entries)
