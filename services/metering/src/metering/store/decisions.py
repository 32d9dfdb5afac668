"""What operators decided on quarantined records: kept here, and found again by the record's name.

A decision is stored in the transaction that carries it out, after the quarantine row was locked, so
that of two commands on one record the second sees what the first decided.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Final

from hisab_contracts.ids import HubCode, TopicId
from hisab_contracts.quarantine import QuarantineDecision
from metering.core.decisions import RecordName, name_of

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection

_NAME: Final = "hub, topic, partition, record_offset, value_sha256, topic_id"
_DECIDED: Final = "replayed_ms, replayed_because, dismissed_ms, dismissed_because, dismissed_reason"

# The name of a quarantined record.
_NAME_OF = "select " + _NAME + " from quarantine where quarantine_id = $1"


async def record_name(connection: Connection, quarantine_id: int) -> RecordName:
    """Return what names a quarantined record; it exists, because nothing is ever deleted."""
    row = await connection.fetchrow(_NAME_OF, quarantine_id)
    if row is None:
        raise LookupError(f"there is no quarantined record {quarantine_id}")
    return _name_from_row(row)


def _name_from_row(row: Row) -> RecordName:
    return RecordName(
        hub=HubCode(row["hub"]),
        topic=row["topic"],
        partition=row["partition"],
        offset=row["record_offset"],
        value_sha256=row["value_sha256"],
        topic_id=TopicId(row["topic_id"]),
    )


# Quarantined records by their names, those that are still open, locked in the order of their ids.
# A name without a log is that of a record in any.
_LOCK_OPEN = """
select q.quarantine_id, k.hub, k.topic, k.partition, k.record_offset, k.value_sha256, k.topic_id
  from unnest($1::text[], $2::text[], $3::int[], $4::bigint[], $5::text[], $6::text[])
       as k (hub, topic, partition, record_offset, value_sha256, topic_id)
  join quarantine q
    on q.topic = k.topic and q.partition = k.partition and q.record_offset = k.record_offset
   and q.value_sha256 = k.value_sha256 and k.topic_id in (q.topic_id, '')
 where q.state = 'open'
 order by q.quarantine_id
   for update of q
"""


async def lock_open(
    connection: Connection, records: Collection[RecordName]
) -> dict[RecordName, int]:
    """Lock those of these records that are open in quarantine; return their numbers."""
    if not records:
        return {}
    rows = await connection.fetch(_LOCK_OPEN, *zip(*records, strict=True))
    return {_name_from_row(row): row["quarantine_id"] for row in rows}


_KNOWN = (
    "select d.hub, d.topic, d.partition, d.record_offset, d.value_sha256, d.topic_id, "
    + _DECIDED
    + """
  from unnest($1::text[], $2::text[], $3::int[], $4::bigint[], $5::text[], $6::text[])
       as k (hub, topic, partition, record_offset, value_sha256, topic_id)
  join quarantine_decisions d
    on d.topic = k.topic and d.partition = k.partition and d.record_offset = k.record_offset
   and d.value_sha256 = k.value_sha256 and d.topic_id = k.topic_id
"""
)


async def known_decisions(
    connection: Connection, records: Collection[RecordName]
) -> dict[RecordName, QuarantineDecision]:
    """Return what was decided on these records, where anything was."""
    if not records:
        return {}
    rows = await connection.fetch(_KNOWN, *zip(*records, strict=True))
    found = map(_decision_from_row, rows)
    return {name_of(decision): decision for decision in found}


# Records of these ranges of offsets that were dismissed whole.
_DISMISSED_WHOLE = (
    "select d.hub, d.topic, d.partition, d.record_offset, d.value_sha256, d.topic_id, "
    + _DECIDED
    + """
  from unnest($1::text[], $2::int[], $3::bigint[], $4::bigint[])
       as k (topic, partition, first_offset, last_offset)
  join quarantine_decisions d
    on d.topic = k.topic and d.partition = k.partition
   and d.record_offset between k.first_offset and k.last_offset
 where d.dismissed_reason is not null
"""
)


async def dismissed_whole(
    connection: Connection, ranges: Mapping[tuple[str, int], tuple[int, int]]
) -> list[QuarantineDecision]:
    """Return the decisions on records, in ranges of offsets per partition, dismissed whole."""
    columns = zip(*((*place, *offsets) for place, offsets in ranges.items()), strict=True)
    rows = await connection.fetch(_DISMISSED_WHOLE, *columns)
    return [_decision_from_row(row) for row in rows]


_WHOLE_REASON = "select reason from quarantine where quarantine_id = $1 and parts is null"


async def whole_reason(connection: Connection, quarantine_id: int) -> str | None:
    """Return why a record is in quarantine with all of it; None when only parts of it are."""
    reason: str | None = await connection.fetchval(_WHOLE_REASON, quarantine_id)
    return reason


def _decision_from_row(row: Row) -> QuarantineDecision:
    return QuarantineDecision(
        hub=HubCode(row["hub"]),
        topic=row["topic"],
        partition=row["partition"],
        offset=row["record_offset"],
        value_sha256=row["value_sha256"],
        replayed_ms=row["replayed_ms"],
        replayed_because=row["replayed_because"],
        dismissed_ms=row["dismissed_ms"],
        dismissed_because=row["dismissed_because"],
        dismissed_reason=row["dismissed_reason"],
        topic_id=TopicId(row["topic_id"]) or None,
    )


_SAVE = (
    "insert into quarantine_decisions ("
    + _NAME
    + ", "
    + _DECIDED
    + """)
select * from unnest($1::text[], $2::text[], $3::int[], $4::bigint[], $5::text[], $6::text[],
                     $7::bigint[], $8::text[], $9::bigint[], $10::text[], $11::text[])
on conflict (topic, partition, record_offset, value_sha256, topic_id) do update
   set replayed_ms = excluded.replayed_ms, replayed_because = excluded.replayed_because,
       dismissed_ms = excluded.dismissed_ms, dismissed_because = excluded.dismissed_because,
       dismissed_reason = excluded.dismissed_reason
"""
)


async def save_decisions(connection: Connection, decisions: Iterable[QuarantineDecision]) -> None:
    """Store all that was decided on each of these records."""
    rows = [
        (
            *name_of(decision),
            decision.replayed_ms,
            decision.replayed_because,
            decision.dismissed_ms,
            decision.dismissed_because,
            decision.dismissed_reason,
        )
        for decision in decisions
    ]
    if rows:
        await connection.execute(_SAVE, *zip(*sorted(rows), strict=True))
