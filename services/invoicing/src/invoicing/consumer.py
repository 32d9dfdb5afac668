"""Follow what the ledger says: entries and watermarks, tenants and keys; and fetch what is missing.

Entries arrive in order of seq per tenant, at least once. A message that cannot be read stops the
consumer: skipping one would bill a wrong sum. When a book shows a gap, the missing entries are
fetched from the ledger's API, outside any transaction, and inserted like the others; until then the
book's position stands still, and no month can be closed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, assert_never

import msgspec
import structlog

from hisab_contracts import topics
from hisab_contracts.entries import Entry, EntryWatermark, read_entry_message
from hisab_contracts.reference import TenantRecord
from invoicing.core.billing import book_entry_of
from invoicing.ledger_client import BookRefused, LedgerClient, LedgerUnreachable
from invoicing.store import entries, reference
from invoicing.store.entries import BookGap
from runtime.auth import keep_access_keys
from runtime.consumer import Batch
from runtime.database import transaction_on

if TYPE_CHECKING:
    from runtime.database import Connection

PAGES_PER_TURN: Final = 20
"""How many pages of a book are fetched before the next book has its turn."""

_log = structlog.get_logger("invoicing.consumer")


async def keep_entries(batch: Batch, connection: Connection) -> None:
    """Handle `ledger.entries.v1`: entries into their books, watermarks beside them."""
    booked, watermarks = [], []
    for record in batch.records:
        message = read_entry_message(record.value or b"")
        match message:
            case Entry():
                booked.append(book_entry_of(message))
            case EntryWatermark():
                watermarks.append((record.partition, message))
            case _:
                assert_never(message)
    # In this order and one transaction: a watermark says that what came before it is here.
    await entries.append_entries(connection, booked)
    await entries.store_watermarks(connection, watermarks)


async def keep_reference(batch: Batch, connection: Connection) -> None:
    """Handle `ledger.tenants.v1` and `ledger.access.v1`: the newest record of each key counts."""
    tenants = [
        msgspec.json.decode(record.value, type=TenantRecord)
        for record in batch.records
        if record.topic == topics.TENANTS and record.value is not None
    ]
    await reference.store_tenants(connection, tenants)
    await keep_access_keys(batch, connection)


@dataclass(frozen=True, slots=True)
class GapFetcher:
    """Fetches entries that the topic did not bring, some pages per book and turn."""

    ledger: LedgerClient

    async def run(self, connection: Connection) -> None:
        """Fetch what is missing of the books that have a gap, all of them in turn."""
        after = ""
        while found := await entries.gaps(connection, after):
            for gap in found:
                failed = await self._fetch(connection, gap)
                if failed is not None:
                    # Nothing is lost: the gap stays on record, and the next turn asks again.
                    _log.warning("gap not fetched", tenant_id=gap.tenant_id, error=str(failed))
                if isinstance(failed, LedgerUnreachable):
                    return
            after = found[-1].tenant_id

    async def _fetch(
        self, connection: Connection, gap: BookGap
    ) -> LedgerUnreachable | BookRefused | None:
        """Fetch the next pages of a book: up to what is known of it, or to this turn's bound.

        Returns why it went no further. A book that is refused must not hold up the others.
        """
        position = gap.contiguous_seq
        for _ in range(PAGES_PER_TURN):
            try:
                page = await self.ledger.entries_after(gap.tenant_id, position)
            except (LedgerUnreachable, BookRefused) as error:
                return error
            if not page:
                return None
            async with transaction_on(connection):
                await entries.append_entries(connection, [book_entry_of(entry) for entry in page])
            position = page[-1].seq
            if position >= gap.highest_seq:
                return None
        return None
