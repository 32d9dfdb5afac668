"""Entries as rows: appended, read back as they were hashed, found again.

Theory. An entry is one row, its postings inside as parallel arrays. What follows from the rest is
not stored: a charge's cause and actor (its bucket, metering), its hour (when it is effective), its
amount (its posting on `usage`), and every entry's `prev_hash` (the hash of the row before). So a
charge costs less than half a kilobyte, and `entry_from_row` gives back the entry that was hashed.
What only some entries have (a hold, a grant, what a charge changed of its hold's reservations, why
something was reversed) is stored as the JSON it had then, without null members; read into a type
that has grown since, it still hashes to the stored hash (decision 0009).

Beside the entries stand the charges that could not become entries (parked, with their bytes).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, Literal

import msgspec
from msgspec import Struct

from hisab_contracts.entries import (
    GENESIS_HASH,
    ChargeDetail,
    Entry,
    GrantDetail,
    HoldDetail,
    LimitDetail,
    LotDetail,
    Posting,
)
from hisab_contracts.ids import (
    AllocationId,
    BucketId,
    EntryId,
    HubCode,
    NodeId,
    PriceClass,
    PriceVersion,
    ProjectId,
    Sku,
    TenantId,
    entry_id,
)
from hisab_contracts.units import MAX_MICRO, moment_of, ms_of

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection


_SEQ: Final = re.compile(r"[1-9][0-9]{0,18}")
_ENTRY_SCALARS: Final = """
tenant_id, seq, kind, effective_at, recorded_at, hash, caused_by, actor, bucket_id, allocation_id,
project_id, hold_id, hub, node_id, sku, price_class, price_version, revision, gpu_ns, over_limit,
detail, trace_id
"""
ENTRY_COLUMNS: Final = _ENTRY_SCALARS + ", accounts, amounts, balances"

# Arrays inside a row travel as literals: `unnest` flattens arrays of arrays.
_INSERT_ENTRIES = (
    "insert into entries ("
    + ENTRY_COLUMNS
    + ") select "
    + _ENTRY_SCALARS
    + """, accounts::text[], amounts::bigint[], balances::bigint[]
  from unnest($1::text[], $2::bigint[], $3::text[], $4::timestamptz[], $5::timestamptz[],
              $6::bytea[], $7::text[], $8::text[], $9::uuid[], $10::text[], $11::text[],
              $12::text[], $13::text[], $14::text[], $15::text[], $16::text[], $17::text[],
              $18::bigint[], $19::bigint[], $20::boolean[], $21::bytea[], $22::uuid[],
              $23::text[], $24::text[], $25::text[]) as n ("""
    + ENTRY_COLUMNS
    + ")"
)


async def insert_entries(
    connection: Connection, entries: Sequence[Entry], traces: Sequence[str | None]
) -> None:
    """Append entries, each with the trace it came in."""
    charges = [entry.charge for entry in entries]
    await connection.execute(
        _INSERT_ENTRIES,
        [entry.tenant_id for entry in entries],
        [entry.seq for entry in entries],
        [entry.kind for entry in entries],
        [moment_of(entry.effective_ms) for entry in entries],
        [moment_of(entry.recorded_ms) for entry in entries],
        [bytes.fromhex(entry.hash) for entry in entries],
        [entry.caused_by if entry.charge is None else None for entry in entries],
        [entry.actor if entry.charge is None else None for entry in entries],
        [None if charge is None else charge.bucket_id for charge in charges],
        [None if charge is None else charge.allocation_id for charge in charges],
        [None if charge is None else charge.project_id for charge in charges],
        [None if charge is None else charge.hold_id for charge in charges],
        [None if charge is None else charge.hub for charge in charges],
        [None if charge is None else charge.node_id for charge in charges],
        [None if charge is None else charge.sku for charge in charges],
        [None if charge is None else charge.price_class for charge in charges],
        [None if charge is None else charge.price_version for charge in charges],
        [None if charge is None else charge.revision for charge in charges],
        [None if charge is None else charge.gpu_ns for charge in charges],
        [None if charge is None else charge.over_limit for charge in charges],
        [_detail_bytes(entry) for entry in entries],
        traces,
        [pg_array(posting.account for posting in entry.postings) for entry in entries],
        [pg_array(str(posting.posting_micro) for posting in entry.postings) for entry in entries],
        [pg_array(str(posting.balance_micro) for posting in entry.postings) for entry in entries],
    )


class _RareOfCharge(Struct, frozen=True, omit_defaults=True):
    """What few charges have: a refund, or an open hold."""

    refunded_micro: int | None = None
    reserved: tuple[tuple[str, int], ...] | None = None
    short_micro: int | None = None


class _RareOfEntry(Struct, frozen=True, omit_defaults=True):
    """What few entries of other kinds have."""

    lot: LotDetail | None = None
    limit: LimitDetail | None = None
    reverses: EntryId | None = None
    reason: str | None = None


_NOTHING_RARE: Final = _RareOfEntry()
_NOTHING_RARE_OF_CHARGE: Final = _RareOfCharge()


def _detail_bytes(entry: Entry) -> bytes | None:
    """Encode what only some entries have; None: nothing."""
    detail: Struct | None = entry.hold or entry.grant
    if detail is None:
        charge = entry.charge
        rare: Struct = (
            _RareOfEntry(entry.lot, entry.limit, entry.reverses, entry.reason)
            if charge is None
            else _RareOfCharge(charge.refunded_micro, charge.reserved, charge.short_micro)
        )
        detail = None if rare in (_NOTHING_RARE, _NOTHING_RARE_OF_CHARGE) else rare
    return None if detail is None else msgspec.json.encode(detail)


def pg_array(members: Iterable[str]) -> str:
    """Write an array literal of members that need no quoting: account names and numbers."""
    return "{" + ",".join(members) + "}"


_ENTRIES_AFTER = (
    "select "
    + ENTRY_COLUMNS
    + """, lag(hash) over (order by seq) as prev_hash
  from entries
 where tenant_id = $1 and seq >= $2
 order by seq
 limit $3
"""
)


async def entries_after(
    connection: Connection, tenant_id: str, after_seq: int, limit: int
) -> list[Entry]:
    """Read a book's entries after a position, ascending.

    The entry at the position is read too, for its hash: the first one after it names that hash.
    """
    rows = await connection.fetch(_ENTRIES_AFTER, tenant_id, after_seq, limit + 1)
    return [entry_from_row(row) for row in rows if row["seq"] > after_seq][:limit]


# Backwards: it is asked for again soon after it was entered, and a book may be long.
_CAUSED_SEQ = """
select seq from entries
 where tenant_id = $1 and kind = $2 and caused_by = $3
 order by seq desc
 limit 1
"""


async def entry_caused_by(
    connection: Connection, tenant_id: str, kind: Literal["invoiced", "top_up"], cause: str
) -> Entry:
    """Find the entry that a document or a payment has caused; there is one."""
    seq = await connection.fetchval(_CAUSED_SEQ, tenant_id, kind, cause)
    (entry,) = await entries_after(connection, tenant_id, seq - 1, 1)
    return entry


async def find_entry(connection: Connection, entry_id: str) -> Entry | None:
    """Find an entry that this transaction may see, by its id: `<book>.<seq>`."""
    book_id, _, number = entry_id.rpartition(".")
    if _SEQ.fullmatch(number) is None or int(number) > MAX_MICRO:
        return None
    found = await entries_after(connection, book_id, int(number) - 1, 1)
    return next((entry for entry in found if entry.entry_id == entry_id), None)


# Which entries are here, by place, and what they are.
_HASHES_OF = """
select e.tenant_id, e.seq, e.hash
  from unnest($1::text[], $2::bigint[]) as n (tenant_id, seq)
  join entries e on e.tenant_id = n.tenant_id and e.seq = n.seq
"""


async def hashes_of(connection: Connection, wanted: Sequence[Entry]) -> dict[tuple[str, int], str]:
    """Return the hash of the entry that stands in the place of each of these, where one does."""
    rows = await connection.fetch(
        _HASHES_OF, [entry.tenant_id for entry in wanted], [entry.seq for entry in wanted]
    )
    return {(row["tenant_id"], row["seq"]): row["hash"].hex() for row in rows}


def entry_from_row(row: Row) -> Entry:
    """Read one entry, as it was hashed."""
    seq, tenant_id, accounts = row["seq"], TenantId(row["tenant_id"]), row["accounts"]
    effective_ms = ms_of(row["effective_at"])
    postings = [
        Posting(account, posting_micro, balance_micro)
        for account, posting_micro, balance_micro in zip(
            accounts, row["amounts"], row["balances"], strict=True
        )
    ]
    charge: ChargeDetail | None = None
    if row["bucket_id"] is not None:
        charge = _charge_from_row(row, effective_ms, postings)
    kind, detail = row["kind"], row["detail"]
    rare = _NOTHING_RARE
    if detail is not None and charge is None and kind not in (*_OF_HOLDS, *_OF_LOTS):
        rare = msgspec.json.decode(detail, type=_RareOfEntry)
    return Entry(
        tenant_id=tenant_id,
        seq=seq,
        entry_id=entry_id(tenant_id, seq),
        kind=kind,
        effective_ms=effective_ms,
        recorded_ms=ms_of(row["recorded_at"]),
        postings=postings,
        caused_by=row["caused_by"] if charge is None else f"bucket:{charge.bucket_id}",
        actor=row["actor"] if charge is None else "metering",
        prev_hash=GENESIS_HASH if row["prev_hash"] is None else row["prev_hash"].hex(),
        hash=row["hash"].hex(),
        charge=charge,
        hold=msgspec.json.decode(detail, type=HoldDetail) if kind in _OF_HOLDS else None,
        grant=msgspec.json.decode(detail, type=GrantDetail) if kind in _OF_LOTS else None,
        lot=rare.lot,
        limit=rare.limit,
        reverses=rare.reverses,
        reason=rare.reason,
    )


_OF_LOTS: Final = ("grant", "top_up")
_OF_HOLDS: Final = ("hold_placed", "hold_extended", "hold_moved", "hold_released")


def _charge_from_row(row: Row, effective_ms: int, postings: Sequence[Posting]) -> ChargeDetail:
    """A charge's amount is its posting on `usage`; its hour is when it is effective."""
    rare = _NOTHING_RARE_OF_CHARGE
    if row["detail"] is not None:
        rare = msgspec.json.decode(row["detail"], type=_RareOfCharge)
    return ChargeDetail(
        bucket_id=BucketId(row["bucket_id"].hex),
        allocation_id=AllocationId(row["allocation_id"]),
        project_id=ProjectId(row["project_id"]),
        hold_id=row["hold_id"],
        hub=HubCode(row["hub"]),
        node_id=NodeId(row["node_id"]),
        sku=Sku(row["sku"]),
        price_class=PriceClass(row["price_class"]),
        price_version=PriceVersion(row["price_version"]),
        hour_ms=effective_ms,
        revision=row["revision"],
        gpu_ns=row["gpu_ns"],
        charge_micro=sum(
            posting.posting_micro for posting in postings if posting.account == "usage"
        ),
        over_limit=row["over_limit"],
        refunded_micro=rare.refunded_micro,
        reserved=rare.reserved,
        short_micro=rare.short_micro,
    )


class ParkedCharge(Struct, frozen=True, kw_only=True):
    """A charge message that could not be booked, and why."""

    topic: str
    partition: int
    offset: int
    reason: str
    message: bytes


# A batch that is read again finds its own rows.
_PARK_CHARGES = """
insert into parked_charges (topic, partition, "offset", reason, detail, message)
select n.topic, n.partition, n."offset", n.reason, n.reason, n.message
  from unnest($1::text[], $2::int[], $3::bigint[], $4::text[], $5::bytea[])
       as n (topic, partition, "offset", reason, message)
on conflict do nothing
"""
_PARKED_COUNT = "select count(*) from parked_charges"
_FIRST_PARKED = """
select topic, partition, "offset", reason, message
  from parked_charges
 order by topic, partition, "offset"
 limit $1
"""


async def park_charges(connection: Connection, parked: Sequence[ParkedCharge]) -> None:
    """Keep charges that could not be booked, with their bytes."""
    if not parked:
        return
    await connection.execute(
        _PARK_CHARGES,
        [charge.topic for charge in parked],
        [charge.partition for charge in parked],
        [charge.offset for charge in parked],
        [charge.reason for charge in parked],
        [charge.message for charge in parked],
    )


async def parked_count(connection: Connection) -> int:
    """Count the charges that could not be booked."""
    return int(await connection.fetchval(_PARKED_COUNT))


async def first_parked(connection: Connection, limit: int) -> list[ParkedCharge]:
    """Read charges that could not be booked, in the order in which they came per partition."""
    return [
        ParkedCharge(
            topic=row["topic"],
            partition=row["partition"],
            offset=row["offset"],
            reason=row["reason"],
            message=row["message"],
        )
        for row in await connection.fetch(_FIRST_PARKED, limit)
    ]
