"""Whether this database has all that the ledger has published: asked before anything is served.

Theory. With every window and watermark the sequencer notes how far each partition of
`ledger.entries.v1` was then (`store/sequence`). What lies behind that was published by a run that
was killed before it noted it, or by a ledger of which this database is an older copy. So every
entry behind it is looked up here by its hash: an older copy lacks the first of them. Normally that
is nothing, or one window. Tenants and keys are on compacted topics, and are compared whole: a
restored database would otherwise accept a key that was revoked since.

A partition without a noted position, in a database that has published (by a release from before
positions were noted, or nothing of this partition), begins at its last 10 000 records: more than
one window, and so always enough to meet an entry of a later one. A recovery, which needs all that
is lacking and not one of it, begins such a partition at its first record.

Refusals come as a text that says where, what, and what to do: it is shown to whoever calls, so it
names no tenant; the log names the entry. Besides those of `core.restoration`: a database that was
loaded from a dump into a server whose transaction ids are behind, and a message that is none.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, assert_never

import msgspec
import structlog
from msgspec import Struct

from hisab_contracts import topics
from hisab_contracts.entries import Entry, read_entry_message
from hisab_contracts.reference import TenantRecord
from ledger.core.restoration import (
    EntryDiffers,
    EntryLacking,
    PublishedFault,
    RecordsRemoved,
    compare_published,
    first_to_compare,
)
from ledger.store import directory, entries, sequence
from runtime.auth import AccessKey, lacking_keys
from runtime.progress import accepted_offsets
from runtime.readback import OffsetRange, Readback

if TYPE_CHECKING:
    from runtime.database import Connection, Database
    from runtime.kafka import Kafka
    from runtime.records import Record

BEFORE_POSITIONS: Final = 10_000
"""How far back a database without noted positions is compared: twice a window."""

RECOVER: Final = (
    "Restore a newer backup, or take back what was published: "
    "python -m ledger recover --accepted-by NAME --reason TEXT"
)
AHEAD: Final = (
    "the transaction ids in this database are ahead of its server: it was loaded from a dump. "
    "Restore physically, or raise the server's counter first (pg_resetwal -x and -e)"
)

_log = structlog.get_logger("ledger.restoration")


class LedgerTopics(Struct, frozen=True, kw_only=True):
    """Where the ledger publishes what it can compare itself with."""

    entries: str = topics.ENTRIES
    tenants: str = topics.TENANTS
    keys: str = topics.ACCESS


class PublishedGuard:
    """Compares what the ledger has published with its database."""

    def __init__(
        self, kafka: Kafka, database: Database, published: LedgerTopics | None = None
    ) -> None:
        """Compare this database (as its writer) with this cluster."""
        published = published or LedgerTopics()
        self._database = database
        self._entries = Readback(kafka, published.entries)
        self._tenants = Readback(kafka, published.tenants)
        self._keys = Readback(kafka, published.keys)

    async def refusal(self) -> str | None:
        """Say what was published and is not here, and what to do; None: all of it is here."""
        async with self._database.connection() as connection:
            if await sequence.is_ahead_of_its_server(connection):
                return AHEAD
            return (
                await self._lacking_entry(connection)
                or await self._lacking_tenant(connection)
                or await self._lacking_key(connection)
            )

    async def _lacking_entry(self, connection: Connection) -> str | None:
        ranges = await self._entries.ranges()
        begin = await offsets_to_compare(connection, self._entries.topic, ranges)
        if isinstance(begin, str):
            return begin
        async for records in self._entries.read(begin, ranges):
            found = entries_in(records)
            if isinstance(found, str):
                return found
            kept = await entries.hashes_of(connection, [entry for _, entry in found])
            for record, entry in found:
                fault = compare_published(entry, kept.get((entry.tenant_id, entry.seq)))
                if fault is not None:
                    _log.critical("published and not here", entry_id=entry.entry_id, fault=fault)
                    return f"{place_of(record)} {text_of(fault)}"
        return None

    async def _lacking_tenant(self, connection: Connection) -> str | None:
        async for records in everything_in(self._tenants):
            stated = [
                msgspec.json.decode(record.value, type=TenantRecord).tenant_id
                for record in records
                if record.value is not None
            ]
            lacking = await directory.unknown_tenants(connection, stated)
            if lacking:
                _log.critical("published and not here", tenants=lacking)
                return f"{self._tenants.topic} has a tenant that this database lacks. {RECOVER}"
        return None

    async def _lacking_key(self, connection: Connection) -> str | None:
        async for records in everything_in(self._keys):
            lacking = await lacking_keys(connection, keys_in(records))
            if lacking:
                _log.critical("published and not here", keys=lacking)
                return (
                    f"{self._keys.topic} has a key, or a revocation, that this database lacks. "
                    f"{RECOVER}"
                )
        return None


async def offsets_to_compare(
    connection: Connection,
    topic: str,
    ranges: Mapping[int, OffsetRange],
    *,
    before_positions: int | None = BEFORE_POSITIONS,
) -> dict[int, int] | str:
    """Say from where each partition is compared, or why that cannot be known any more.

    `before_positions`: so many records where a partition has no position noted; None: all it has.
    """
    known = await sequence.published_positions(connection, topic)
    accepted = await accepted_offsets(connection, topic)
    has_published = await sequence.last_window(connection) is not None
    begin: dict[int, int] = {}
    for number, found in ranges.items():
        known_offset = known.get(number)
        # Asked per partition: after an upgrade the first window notes positions of some only.
        if known_offset is None and has_published:
            least = 0 if before_positions is None else found.end_offset - before_positions
            known_offset = max(found.first_offset, least)
        offset = first_to_compare(
            known_offset, found.first_offset, found.end_offset, accepted.get(number)
        )
        if isinstance(offset, RecordsRemoved):
            return f"{topic} partition {number} {text_of(offset)}"
        begin[number] = offset
    return begin


async def everything_in(readback: Readback) -> AsyncIterator[Sequence[Record]]:
    """Read a topic from its first record to its end."""
    ranges = await readback.ranges()
    begin = {number: found.first_offset for number, found in ranges.items()}
    async for records in readback.read(begin, ranges):
        yield records


def entries_in(records: Sequence[Record]) -> list[tuple[Record, Entry]] | str:
    """Read the entries among published messages, or say which message is none of ours."""
    found: list[tuple[Record, Entry]] = []
    for record in records:
        try:
            message = read_entry_message(record.value or b"")
        except msgspec.MsgspecError:
            return f"{place_of(record)} has a message that the ledger cannot have published."
        if isinstance(message, Entry):
            found.append((record, message))
    return found


def keys_in(records: Sequence[Record]) -> list[AccessKey]:
    """Read the keys that were published."""
    return [
        msgspec.json.decode(record.value, type=AccessKey)
        for record in records
        if record.value is not None
    ]


def place_of(record: Record) -> str:
    """Name where a record is."""
    return f"{record.topic} partition {record.partition} offset {record.offset}"


def text_of(fault: PublishedFault) -> str:
    """Say what is wrong behind the name of a place, and what to do about it."""
    match fault:
        case EntryLacking():
            return f"has an entry that this database lacks. {RECOVER}"
        case EntryDiffers():
            return (
                "has another entry than this database has in its place: both were served, and "
                "nothing can join them. Restore the newest backup that was made before"
            )
        case RecordsRemoved(known_offset, first_offset):
            return (
                f"was published up to offset {known_offset} when this database was saved, and the "
                f"broker has removed all before {first_offset}: whether entries are lacking cannot "
                "be found. Restore a newer backup; where none of these entries can be lacking, "
                f"say so: python -m ledger override-progress {topics.ENTRIES} PARTITION "
                f"{first_offset} --accepted-by NAME --reason TEXT"
            )
        case _:
            assert_never(fault)
