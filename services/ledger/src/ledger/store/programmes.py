"""What programmes promised and what became of it: reports, and grants with their lots. SQL.

Nothing is locked here. A report is read on one snapshot (`Database.transaction(snapshot=True)`), so
that the figures of its statements belong together. Sums are made in SQL: there is a row per lot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from hisab_contracts.ids import KeyId, ProgrammeId, TenantId
from hisab_contracts.units import moment_of, ms_of, optional_moment_of, optional_ms_of
from ledger.core.grants import Grant
from ledger.core.programmes import (
    GrantStanding,
    LotSums,
    ProgrammeReport,
    TenantShare,
    report_of,
)
from ledger.store.directory import GRANT_COLUMNS, grant_from_row

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection

_LOT_SUMS: Final = """
coalesce(sum(l.granted_micro), 0)::bigint as granted_micro,
coalesce(sum(l.remaining_micro), 0)::bigint as remaining_micro,
coalesce(sum(l.reserved_micro - coalesce(over.micro, 0)), 0)::bigint as reserved_micro,
coalesce(sum(l.expired_micro), 0)::bigint as expired_micro
"""
# What holds that are over still reserve by what is stored, lot by lot: it is free in every answer.
# No more rows than the sweep of expired holds leaves (`jobs`).
_OVER: Final = """
with over as (
  select due.tenant_id as of_tenant, substr(place, 5) as of_grant, sum(micro)::bigint as micro
    from holds due cross join lateral unnest(due.places, due.reserved) r (place, micro)
   where due.ended is null and due.expires_at <= $1 and place like 'lot:%'
   group by 1, 2
)
"""
_PROGRAMMES = (
    _OVER
    + """
select p.programme_id, p.name, p.theme, p.ends_at, p.currency, b.seq, b.recorded_at,
       own.authority_micro, own.left_micro, own.promised_micro,
       lots.granted_micro, lots.remaining_micro, lots.reserved_micro, lots.expired_micro
  from programmes p
  join books b on b.tenant_id = '/programmes/' || p.programme_id
  cross join lateral (
    select coalesce(sum(balance_micro) filter (where account = 'authority'), 0)::bigint
             as authority_micro,
           coalesce(sum(balance_micro) filter (where account = 'budget'), 0)::bigint as left_micro,
           coalesce(sum(balance_micro) filter (where account like 'granted:%'), 0)::bigint
             as promised_micro
      from accounts a
     where a.tenant_id = b.tenant_id
  ) own
  cross join lateral (
    select """
    + _LOT_SUMS
    + """
      from lots l
      left join over on over.of_tenant = l.tenant_id and over.of_grant = l.grant_id
     where l.programme_id = p.programme_id
  ) lots
 where p.programme_id > $2 and ($3::text is null or p.programme_id = $3)
 order by p.programme_id
 limit $4
"""
)
_SHARES = (
    _OVER
    + """
select p.programme_id, shares.tenant_id, shares.granted_micro, shares.remaining_micro,
       shares.reserved_micro, shares.expired_micro
  from unnest($2::text[]) as p (programme_id)
  cross join lateral (
    select l.tenant_id, """
    + _LOT_SUMS
    + """
      from lots l
      left join over on over.of_tenant = l.tenant_id and over.of_grant = l.grant_id
     where l.programme_id = p.programme_id and l.tenant_id > $3
     group by l.tenant_id
     order by l.tenant_id
     limit $4
  ) shares
 order by p.programme_id, shares.tenant_id
"""
)


async def list_programmes(
    connection: Connection, after: str, limit: int, now_ms: int
) -> list[ProgrammeReport]:
    """Report on programmes in the order of their ids, after one."""
    rows = await connection.fetch(_PROGRAMMES, moment_of(now_ms), after, None, limit)
    return list(map(_report_from_row, rows))


async def find_programme(
    connection: Connection, programme_id: str, now_ms: int
) -> ProgrammeReport | None:
    """Report on one programme; None when there is none of this id."""
    row = await connection.fetchrow(_PROGRAMMES, moment_of(now_ms), "", programme_id, 1)
    return None if row is None else _report_from_row(row)


async def shares_of(
    connection: Connection,
    programme_ids: Sequence[str],
    after: str,
    limit: int,
    now_ms: int,
) -> dict[ProgrammeId, list[TenantShare]]:
    """Say what each tenant has of these programmes, in the order of their ids after one."""
    found: dict[ProgrammeId, list[TenantShare]] = {}
    for row in await connection.fetch(_SHARES, moment_of(now_ms), programme_ids, after, limit):
        share = TenantShare(TenantId(row["tenant_id"]), _sums_from_row(row))
        found.setdefault(ProgrammeId(row["programme_id"]), []).append(share)
    return found


def _report_from_row(row: Row) -> ProgrammeReport:
    return report_of(
        ProgrammeId(row["programme_id"]),
        row["name"],
        theme=row["theme"],
        ends_ms=optional_ms_of(row["ends_at"]),
        currency=row["currency"],
        authority_micro=row["authority_micro"],
        left_micro=row["left_micro"],
        promised_micro=row["promised_micro"],
        lots=_sums_from_row(row),
        seq=row["seq"],
        recorded_ms=ms_of(row["recorded_at"]),
    )


def _sums_from_row(row: Row) -> LotSums:
    return LotSums(
        granted_micro=row["granted_micro"],
        remaining_micro=row["remaining_micro"],
        reserved_micro=row["reserved_micro"],
        expired_micro=row["expired_micro"],
    )


class ListedGrant(Struct, frozen=True, kw_only=True):
    """A grant, who decided it, and what is left of its lot; nothing before it is approved."""

    grant: Grant
    number: int
    """Its place among all proposals, in the order in which they were made."""
    proposed_ms: int
    approved_ms: int | None
    rejected_by: KeyId | None
    rejected_ms: int | None
    reason: str | None
    """Why it was rejected."""
    lot: LotSums


_SELECT_GRANTS = (
    "select "
    + GRANT_COLUMNS
    + """, number, proposed_at, approved_at, rejected_by, rejected_at, reason,
       coalesce(lot.granted_micro, 0) as granted_micro,
       coalesce(lot.remaining_micro, 0) as remaining_micro,
       coalesce(lot.reserved_micro, 0) as reserved_micro,
       coalesce(lot.expired_micro, 0) as expired_micro
  from grants
  left join (
    select tenant_id as of_tenant, grant_id as of_grant, granted_micro, remaining_micro,
           reserved_micro, expired_micro
      from lots
  ) lot on lot.of_tenant = grants.tenant_id and lot.of_grant = grants.grant_id
"""
)
_LIST_GRANTS = (
    _SELECT_GRANTS
    + """
 where number > $1
   and ($2::text is null or tenant_id = $2)
   and ($3::text is null or programme_id = $3)
   and ($4::text is null or state = $4)
   and ($5::boolean is null
        or (coalesce(lot.expired_micro, 0) > 0 or coalesce(expires_at <= $6, false)) = $5)
 order by number
 limit $7
"""
)
_SHOW_GRANT = _SELECT_GRANTS + " where grant_id = $1"


async def list_grants(
    connection: Connection,
    after: int,
    limit: int,
    *,
    tenant_id: str | None,
    programme_id: str | None,
    state: GrantStanding | None,
    complete_until_ms: int | None,
) -> list[ListedGrant]:
    """List grants in the order in which they were proposed.

    `complete_until_ms` decides which of the approved ones have expired (`standing_of`).
    """
    is_expired = {"approved": False, "expired": True}.get(state or "")
    rows = await connection.fetch(
        _LIST_GRANTS,
        after,
        tenant_id,
        programme_id,
        "approved" if state == "expired" else state,
        is_expired,
        optional_moment_of(complete_until_ms),
        limit,
    )
    return list(map(_listed_from_row, rows))


async def show_grant(connection: Connection, grant_id: str) -> ListedGrant | None:
    """Find a grant that this transaction may see, with what is left of its lot."""
    row = await connection.fetchrow(_SHOW_GRANT, grant_id)
    return None if row is None else _listed_from_row(row)


def _listed_from_row(row: Row) -> ListedGrant:
    return ListedGrant(
        grant=grant_from_row(row),
        number=row["number"],
        proposed_ms=ms_of(row["proposed_at"]),
        approved_ms=optional_ms_of(row["approved_at"]),
        rejected_by=row["rejected_by"],
        rejected_ms=optional_ms_of(row["rejected_at"]),
        reason=row["reason"],
        lot=_sums_from_row(row),
    )
