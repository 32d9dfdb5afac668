"""Outcomes of grants as rows, and what they cost by theme. SQL.

A row is written once and accepted once. Whoever decides by the outcomes of a grant locks them
(`lock_outcomes`), and nothing else of that grant, so it waits for an acceptance that is about to
commit and stands in nobody's way besides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec import Struct

from hisab_contracts.ids import GrantId, KeyId, OutcomeId, TenantId
from hisab_contracts.units import ms_of, optional_ms_of
from ledger.core.outcomes import MOST_OUTCOMES, GrantOutcome, ThemeCost

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection

_COLUMNS: Final = """
outcome_id, grant_id, tenant_id, kind, evidence_sha256, note, state, submitted_by, accepted_by
"""


class ListedOutcome(Struct, frozen=True, kw_only=True):
    """An outcome, and when what was done."""

    outcome: GrantOutcome
    submitted_ms: int
    accepted_ms: int | None


_INSERT_OUTCOME = (
    "insert into outcomes (" + _COLUMNS + ") values ($1, $2, $3, $4, $5, $6, $7, $8, $9)"
)
# A grant has few: the core refuses more than can be shown with it.
_COUNT_OUTCOMES = "select count(*) from outcomes where grant_id = $1"


async def count_outcomes(connection: Connection, grant_id: GrantId) -> int:
    """Count the outcomes of a grant, accepted or not."""
    count: int = await connection.fetchval(_COUNT_OUTCOMES, grant_id)
    return count


async def add_outcome(connection: Connection, outcome: GrantOutcome) -> None:
    """Store an outcome. It is decided, and the grant locked."""
    await connection.execute(
        _INSERT_OUTCOME,
        outcome.outcome_id,
        outcome.grant_id,
        outcome.tenant_id,
        outcome.kind,
        outcome.evidence_sha256,
        outcome.note,
        outcome.state,
        outcome.submitted_by,
        outcome.accepted_by,
    )


_FIND_OUTCOME = "select " + _COLUMNS + " from outcomes where outcome_id = $1 and grant_id = $2"
_LOCK_OUTCOME = _FIND_OUTCOME + " for no key update"
_LOCK_OUTCOMES = (
    "select " + _COLUMNS + " from outcomes where grant_id = $1 order by number limit $2 for share"
)


async def find_outcome(
    connection: Connection, grant_id: str, outcome_id: str
) -> GrantOutcome | None:
    """Find an outcome of a grant that this transaction may see."""
    row = await connection.fetchrow(_FIND_OUTCOME, outcome_id, grant_id)
    return None if row is None else _outcome_from_row(row)


async def lock_outcome(
    connection: Connection, grant_id: str, outcome_id: str
) -> GrantOutcome | None:
    """Find an outcome and keep others from accepting it before this transaction ends."""
    row = await connection.fetchrow(_LOCK_OUTCOME, outcome_id, grant_id)
    return None if row is None else _outcome_from_row(row)


async def lock_outcomes(connection: Connection, grant_id: GrantId) -> list[GrantOutcome]:
    """Read all outcomes of a grant as they stand, and keep them so while this is decided."""
    rows = await connection.fetch(_LOCK_OUTCOMES, grant_id, MOST_OUTCOMES)
    return list(map(_outcome_from_row, rows))


_ACCEPT_OUTCOME = """
update outcomes set state = 'accepted', accepted_by = $2, accepted_at = clock_timestamp()
 where outcome_id = $1
"""


async def mark_accepted(connection: Connection, outcome_id: OutcomeId, accepter: KeyId) -> None:
    """Store an acceptance. It is decided, and the row locked."""
    await connection.execute(_ACCEPT_OUTCOME, outcome_id, accepter)


_OUTCOMES_OF = (
    "select "
    + _COLUMNS
    + ", submitted_at, accepted_at from outcomes where grant_id = $1 order by number limit $2"
)


async def outcomes_of(connection: Connection, grant_id: str) -> list[ListedOutcome]:
    """List all outcomes of a grant in the order in which they were submitted."""
    rows = await connection.fetch(_OUTCOMES_OF, grant_id, MOST_OUTCOMES)
    return [
        ListedOutcome(
            outcome=_outcome_from_row(row),
            submitted_ms=ms_of(row["submitted_at"]),
            accepted_ms=optional_ms_of(row["accepted_at"]),
        )
        for row in rows
    ]


# A grant counts once however many outcomes it has. Programmes without a theme come first. What all
# programmes of a theme gave may pass 64 bits, so it is read as a text. A page
# adds up what is accepted in all programmes of the themes from there on: rows of the accepted
# outcomes, and of their lots, by index.
_COSTS = """
select coalesce(p.theme, '') as theme, p.currency,
       coalesce(sum(own.grant_count), 0)::bigint as grant_count,
       coalesce(sum(own.outcome_count), 0)::bigint as outcome_count,
       coalesce(sum(own.drawn_micro), 0)::text as drawn_micro
  from programmes p
  left join (
    select l.programme_id, count(*) as grant_count, sum(accepted.outcome_count) as outcome_count,
           sum(l.granted_micro - l.remaining_micro - l.expired_micro) as drawn_micro
      from (
        select tenant_id, grant_id, count(*) as outcome_count
          from outcomes
         where state = 'accepted'
         group by tenant_id, grant_id
      ) accepted
      join lots l on l.tenant_id = accepted.tenant_id and l.grant_id = accepted.grant_id
     group by l.programme_id
  ) own on own.programme_id = p.programme_id
 where (coalesce(p.theme, ''), p.currency) > ($1, $2)
 group by 1, 2
 order by 1, 2
 limit $3
"""


async def theme_costs(
    connection: Connection, after: tuple[str, str], limit: int
) -> list[ThemeCost]:
    """Say what accepted outcomes cost, by theme and currency, after one of them."""
    rows = await connection.fetch(_COSTS, *after, limit)
    return [
        ThemeCost(
            theme=row["theme"] or None,
            currency=row["currency"],
            grant_count=row["grant_count"],
            outcome_count=row["outcome_count"],
            drawn_micro=int(row["drawn_micro"]),
        )
        for row in rows
    ]


def _outcome_from_row(row: Row) -> GrantOutcome:
    return GrantOutcome(
        outcome_id=OutcomeId(row["outcome_id"]),
        grant_id=GrantId(row["grant_id"]),
        tenant_id=TenantId(row["tenant_id"]),
        kind=row["kind"],
        evidence_sha256=row["evidence_sha256"],
        note=row["note"],
        state=row["state"],
        submitted_by=KeyId(row["submitted_by"]),
        accepted_by=row["accepted_by"],
    )
