"""Whether this database has the documents that were announced: asked before anything is served.

Theory. The newest announcements of each partition of `invoicing.documents.v1` are read back, and
each document is looked up here by number and hash. They leave in the order in which they were
written, but for the few whose transactions overlapped; an announcement that an older copy of the
database lacks is therefore among the last, and a thousand are looked at. Besides, no series may
have announced a higher number than the database has.

Refusals come as a text that says where, what, and what to do: it is shown to whoever calls, so it
names no document; the log names the first that is lacking.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from hisab_contracts import topics
from hisab_contracts.units import instant_text
from invoicing.core.document import DocumentEvent
from invoicing.core.restoration import compare_announced, highest_positions, series_behind
from invoicing.store import documents
from runtime.readback import Readback

if TYPE_CHECKING:
    from runtime.database import Connection, Database
    from runtime.kafka import Kafka
    from runtime.records import Record

NEWEST: Final = 1_000
"""Announcements looked at per partition."""

_log = structlog.get_logger("invoicing.restoration")


class AnnouncedGuard:
    """Compares the documents that were announced with those in the database."""

    def __init__(self, kafka: Kafka, database: Database, *, topic: str = topics.DOCUMENTS) -> None:
        """Compare this database (as its writer) with this cluster."""
        self._database = database
        self._documents = Readback(kafka, topic)

    async def refusal(self) -> str | None:
        """Say what was announced and is not here, and what to do; None: all of it is here."""
        ranges = await self._documents.ranges()
        begin = {
            number: max(found.first_offset, found.end_offset - NEWEST)
            for number, found in ranges.items()
        }
        lacking, last_ms = 0, 0
        async with self._database.connection() as connection:
            async for records in self._documents.read(begin, ranges):
                try:
                    missing = await self._compare(connection, records)
                except msgspec.MsgspecError:
                    place = f"{self._documents.topic} partition {records[0].partition}"
                    return f"{place} has a message that invoicing cannot have published."
                lacking += len(missing)
                last_ms = max([last_ms, *(record.timestamp_ms for record in missing)])
        if not lacking:
            return None
        return (
            f"{self._documents.topic} announces documents that this database lacks or has "
            f"otherwise ({lacking} messages, the last of {instant_text(last_ms)}): their numbers "
            "would be given out again. No topic has the documents themselves: restore a backup, "
            "or a point in time, not older than that"
        )

    async def _compare(self, connection: Connection, records: Sequence[Record]) -> list[Record]:
        """Return the announcements that the database does not bear out."""
        events = [
            (record, msgspec.json.decode(record.value or b"", type=DocumentEvent))
            for record in records
        ]
        kept = await documents.kept_documents(connection, [event.invoice_id for _, event in events])
        highest = highest_positions(event for _, event in events)
        behind = series_behind(highest, await documents.last_positions(connection))
        missing: list[Record] = []
        for record, event in events:
            fault = compare_announced(event, kept.get(event.invoice_id))
            key = event.legal_entity, event.series, event.fiscal_year
            if fault is not None or key in behind:
                missing.append(record)
                if len(missing) == 1:
                    _log.critical("announced and not here", number=event.number, fault=fault)
        return missing
