"""Corrections that operators propose and decide, and the list of all there are.

A row is locked before it is decided about; `metering.store.corrections` has what counts of them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from hisab_contracts.events import Correction
from hisab_contracts.ids import CorrectionId
from metering.core.corrections import CorrectedAllocation
from metering.core.proposals import CorrectionState, ProposedCorrection
from metering.store.corrections import SAID_COLUMNS, correction_from_row, said_row

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection

_PROPOSED_COLUMNS: Final = (
    "correction_id, " + SAID_COLUMNS + ", state, proposed_by, proposed_ms, decided_by, decided_ms"
)

_SELECT: Final = "select " + _PROPOSED_COLUMNS + " from corrections"

# What is decided is written over what was proposed; whether it counts is no part of it.
_SAVE = (
    "insert into corrections ("
    + _PROPOSED_COLUMNS
    + """, counts)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, false)
on conflict (correction_id) do update
   set revision = excluded.revision, approved_by = excluded.approved_by, state = excluded.state,
       decided_by = excluded.decided_by, decided_ms = excluded.decided_ms
"""
)


async def save_proposal(connection: Connection, proposed: ProposedCorrection) -> None:
    """Store a correction as it stands: proposed, or decided."""
    revision = proposed.correction.revision if proposed.state == "approved" else None
    await connection.execute(
        _SAVE,
        proposed.correction_id,
        *said_row(proposed.correction, revision),
        proposed.state,
        proposed.proposed_by,
        proposed.proposed_ms,
        proposed.decided_by,
        proposed.decided_ms,
    )


_LOCK = _SELECT + " where correction_id = $1 and proposed_by is not null for update"


async def lock_proposal(
    connection: Connection, correction_id: CorrectionId
) -> ProposedCorrection | None:
    """Lock and read a correction that an operator proposed; None when there is none."""
    row = await connection.fetchrow(_LOCK, correction_id)
    return None if row is None else _proposed_from_row(row)


_IS_PROPOSAL = """
select exists (
  select from corrections where correction_id = $1 and proposed_by is not null
)
"""


async def is_proposal(connection: Connection, correction_id: str) -> bool:
    """Say whether an operator proposed such a correction."""
    found: bool = await connection.fetchval(_IS_PROPOSAL, correction_id)
    return found


def _proposed_from_row(row: Row) -> ProposedCorrection:
    return ProposedCorrection(
        correction_id=CorrectionId(row["correction_id"]),
        correction=correction_from_row(row),
        proposed_by=row["proposed_by"],
        proposed_ms=row["proposed_ms"],
        state=row["state"],
        decided_by=row["decided_by"],
        decided_ms=row["decided_ms"],
    )


# Approved corrections that do not count yet: what they lack may have come.
_NOT_COUNTING = """
select correction_id from corrections
 where state = 'approved' and not counts
 order by arrival
 limit $1
"""


async def not_counting(connection: Connection, most: int) -> list[CorrectionId]:
    """Return approved corrections that do not count yet, oldest first."""
    rows = await connection.fetch(_NOT_COUNTING, most)
    return [CorrectionId(row["correction_id"]) for row in rows]


_LOCK_NOT_COUNTING = (
    _SELECT + " where correction_id = $1 and state = 'approved' and not counts for update"
)


async def lock_not_counting(
    connection: Connection, correction_id: CorrectionId
) -> ProposedCorrection | None:
    """Lock an approved correction that does not count; None when it does by now."""
    row = await connection.fetchrow(_LOCK_NOT_COUNTING, correction_id)
    return None if row is None else _proposed_from_row(row)


_APPROVED = (
    "select "
    + SAID_COLUMNS
    + """
  from corrections
 where hub = $1 and allocation_id = $2 and state = 'approved'
 order by arrival
"""
)


async def approved_of(connection: Connection, allocation: CorrectedAllocation) -> list[Correction]:
    """Return the corrections of an allocation that have a revision, whether they count yet."""
    rows = await connection.fetch(_APPROVED, *allocation)
    return [correction_from_row(row) for row in rows]


_DECIDED = """
select correction_id from corrections
 where correction_id = any($1::text[]) and state <> 'proposed'
"""


async def decided_already(
    connection: Connection, correction_ids: Collection[CorrectionId]
) -> set[CorrectionId]:
    """Return those of these corrections that are known to be decided."""
    rows = await connection.fetch(_DECIDED, list(correction_ids))
    return {CorrectionId(row["correction_id"]) for row in rows}


# The list.


@dataclass(frozen=True, slots=True)
class CorrectionFilter:
    """Which corrections are wanted; None is any."""

    hub: str | None
    allocation_id: str | None


class ListedCorrection(NamedTuple):
    """A correction as it is listed, of a hub or of operators."""

    arrival_id: int
    correction_id: str
    correction: Correction
    revision: int | None
    """None: it is not approved."""
    state: CorrectionState
    waits_for: str | None
    waits_detail: str | None
    proposed_by: str | None
    """None: a hub said it."""
    proposed_ms: int
    decided_by: str | None
    decided_ms: int | None


_LISTED = (
    "select arrival, waits_for, waits_detail, "
    + _PROPOSED_COLUMNS
    + """
  from corrections
 where ($1::text is null or hub = $1) and ($2::text is null or allocation_id = $2) and arrival > $3
 order by arrival
 limit $4
"""
)


async def list_corrections(
    connection: Connection, wanted: CorrectionFilter, after: int, most: int
) -> list[ListedCorrection]:
    """List corrections in order of arrival, as far as the caller may see them."""
    rows = await connection.fetch(_LISTED, wanted.hub, wanted.allocation_id, after, most)
    return [_listed_from_row(row) for row in rows]


def _listed_from_row(row: Row) -> ListedCorrection:
    return ListedCorrection(
        arrival_id=row["arrival"],
        correction_id=row["correction_id"],
        correction=correction_from_row(row),
        revision=row["revision"],
        state=row["state"],
        waits_for=row["waits_for"],
        waits_detail=row["waits_detail"],
        proposed_by=row["proposed_by"],
        proposed_ms=row["proposed_ms"],
        decided_by=row["decided_by"],
        decided_ms=row["decided_ms"],
    )
