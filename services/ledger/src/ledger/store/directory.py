"""The directory: tenants, programmes, grants and price lines, as they were registered. SQL.

What is kept here was said once and hardly changes; what it comes to is in the books (`books`). Only
a grant goes through states, and it is the core that decides them. Keys are registered as well, but
their table is the runtime kit's (`runtime.auth`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Final, Literal

from hisab_contracts.ids import (
    EntryId,
    GrantId,
    KeyId,
    PriceClass,
    PriceVersion,
    ProgrammeId,
    ProjectId,
    Sku,
    TenantId,
)
from hisab_contracts.prices import PriceSeries
from hisab_contracts.reference import PriceLine, TenantRecord
from hisab_contracts.units import moment_of, ms_of, optional_moment_of, optional_ms_of
from ledger.core.grants import Grant
from ledger.store.books import scope_as_json, scope_from_json

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection

GRANT_COLUMNS: Final = """
grant_id, tenant_id, programme_id, grant_micro, priority, effective_at, expires_at, state,
proposed_by, approved_by, scope, coverage_bps, tax_effect, after_grant, reference
"""
_PRICE_LINE_COLUMNS: Final = """
rate_line_id, price_version, currency, sku, price_class, micro_per_gpu_hour, valid_from, valid_until
"""


_INSERT_TENANT = """
insert into tenants (tenant_id, name, kind, currency, credit_limit_micro)
values ($1, $2, $3, $4, $5)
on conflict do nothing
"""
_INSERT_PROJECT = """
insert into projects (tenant_id, project_id) values ($1, $2)
"""


async def add_tenant(connection: Connection, record: TenantRecord, name: str) -> bool:
    """Register a tenant and its projects; False when its id is taken."""
    status = await connection.execute(
        _INSERT_TENANT,
        record.tenant_id,
        name,
        record.kind,
        record.currency,
        record.credit_limit_micro,
    )
    if status != "INSERT 0 1":
        return False
    for project_id in record.projects:
        await connection.execute(_INSERT_PROJECT, record.tenant_id, project_id)
    return True


# The limit as it is now: in the book. In `tenants` it stands as it was registered.
_TENANT = """
select t.tenant_id, t.kind, t.currency, b.credit_limit_micro,
       array(select p.project_id from projects p where p.tenant_id = t.tenant_id
              order by p.project_id) as projects
  from tenants t
  join books b on b.tenant_id = t.tenant_id
 where t.tenant_id = $1
"""
_REGISTERED_LIMIT = "select credit_limit_micro from tenants where tenant_id = $1"


async def find_tenant(connection: Connection, tenant_id: str) -> TenantRecord | None:
    """Find a tenant that this transaction may see."""
    row = await connection.fetchrow(_TENANT, tenant_id)
    if row is None:
        return None
    return TenantRecord(
        tenant_id=TenantId(row["tenant_id"]),
        kind=row["kind"],
        currency=row["currency"],
        credit_limit_micro=row["credit_limit_micro"],
        projects=[ProjectId(project) for project in row["projects"]],
    )


async def registered_limit_micro(connection: Connection, tenant_id: str) -> int:
    """Return the credit limit with which a book was opened; a programme's has none."""
    limit_micro: int | None = await connection.fetchval(_REGISTERED_LIMIT, tenant_id)
    return limit_micro or 0


_UNKNOWN_TENANTS = """
select n.tenant_id
  from unnest($1::text[]) as n (tenant_id)
 where not exists (select from tenants t where t.tenant_id = n.tenant_id)
 order by n.tenant_id
"""


async def unknown_tenants(connection: Connection, tenant_ids: Sequence[str]) -> list[str]:
    """Return those of these tenants that are not registered."""
    return [row["tenant_id"] for row in await connection.fetch(_UNKNOWN_TENANTS, tenant_ids)]


_INSERT_PROGRAMME = """
insert into programmes (programme_id, name, currency, budget_micro, theme, ends_at)
values ($1, $2, $3, $4, $5, $6)
on conflict do nothing
"""


async def add_programme(
    connection: Connection,
    programme_id: str,
    name: str,
    currency: str,
    budget_micro: int,
    *,
    theme: str | None = None,
    ends_ms: int | None = None,
) -> bool:
    """Register a programme; False when its id is taken."""
    status = await connection.execute(
        _INSERT_PROGRAMME,
        programme_id,
        name,
        currency,
        budget_micro,
        theme,
        optional_moment_of(ends_ms),
    )
    return status == "INSERT 0 1"


_PROGRAMME_CURRENCY = """
select currency from programmes where programme_id = $1
"""


async def programme_currency(connection: Connection, programme_id: str) -> str | None:
    """Return the currency of a programme; None when there is no such programme."""
    currency: str | None = await connection.fetchval(_PROGRAMME_CURRENCY, programme_id)
    return currency


_TENANT_CURRENCIES = """
select tenant_id, currency from tenants where tenant_id = any($1::text[])
"""
_PROGRAMME_CURRENCIES = """
select programme_id, currency from programmes where programme_id = any($1::text[])
"""


async def tenant_currencies(connection: Connection, tenant_ids: Collection[str]) -> dict[str, str]:
    """Return the currency of each of these tenants that there is."""
    rows = await connection.fetch(_TENANT_CURRENCIES, sorted(tenant_ids))
    return {row["tenant_id"]: row["currency"] for row in rows}


async def programme_currencies(
    connection: Connection, programme_ids: Collection[str]
) -> dict[str, str]:
    """Return the currency of each of these programmes that there is."""
    rows = await connection.fetch(_PROGRAMME_CURRENCIES, sorted(programme_ids))
    return {row["programme_id"]: row["currency"] for row in rows}


# In the order given, which is that of their numbers then. Whoever inserts the same grant at the
# same time is waited for.
_INSERT_GRANTS = (
    "insert into grants ("
    + GRANT_COLUMNS
    + ") select "
    + GRANT_COLUMNS
    + """
  from unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::int[], $6::timestamptz[],
              $7::timestamptz[], $8::text[], $9::text[], $10::text[], $11::jsonb[], $12::int[],
              $13::text[], $14::text[], $15::text[]) with ordinality as n ("""
    + GRANT_COLUMNS
    + """, place)
 order by place
on conflict do nothing
returning grant_id
"""
)
_GRANTS_OF_IDS = (
    "select " + GRANT_COLUMNS + " from grants where grant_id = any($1::text[]) order by grant_id"
)
_FIND_GRANT = "select " + GRANT_COLUMNS + " from grants where grant_id = $1"
_LOCK_GRANT = _FIND_GRANT + " for no key update"
_APPROVE_GRANT = (
    """
update grants
   set state = 'approved', approved_by = $2, approved_at = clock_timestamp(), entry_ids = $3
 where grant_id = $1
returning """
    + GRANT_COLUMNS
)
_REJECT_GRANT = (
    """
update grants
   set state = 'rejected', rejected_by = $2, rejected_at = clock_timestamp(), reason = $3
 where grant_id = $1
returning """
    + GRANT_COLUMNS
)


async def add_grants(connection: Connection, grants: Sequence[Grant]) -> frozenset[GrantId]:
    """Store proposals; returns which were stored: not those that were there already."""
    rows = await connection.fetch(
        _INSERT_GRANTS,
        [grant.grant_id for grant in grants],
        [grant.tenant_id for grant in grants],
        [grant.programme_id for grant in grants],
        [grant.grant_micro for grant in grants],
        [grant.priority for grant in grants],
        [moment_of(grant.effective_ms) for grant in grants],
        [optional_moment_of(grant.expires_ms) for grant in grants],
        [grant.state for grant in grants],
        [grant.proposed_by for grant in grants],
        [grant.approved_by for grant in grants],
        [scope_as_json(grant.scope) for grant in grants],
        [grant.coverage_bps for grant in grants],
        [grant.tax_effect for grant in grants],
        [grant.after_grant for grant in grants],
        [grant.reference for grant in grants],
    )
    return frozenset(GrantId(row["grant_id"]) for row in rows)


async def grants_of_ids(
    connection: Connection, grant_ids: Collection[GrantId]
) -> dict[GrantId, Grant]:
    """Find those of these grants that are there and that this transaction may see."""
    rows = await connection.fetch(_GRANTS_OF_IDS, sorted(grant_ids))
    return {grant.grant_id: grant for grant in map(grant_from_row, rows)}


async def find_grant(connection: Connection, grant_id: str) -> Grant | None:
    """Find a grant that this transaction may see."""
    row = await connection.fetchrow(_FIND_GRANT, grant_id)
    return None if row is None else grant_from_row(row)


async def lock_grant(connection: Connection, grant_id: str) -> Grant | None:
    """Find a grant and keep others from deciding it before this transaction ends."""
    row = await connection.fetchrow(_LOCK_GRANT, grant_id)
    return None if row is None else grant_from_row(row)


async def mark_approved(
    connection: Connection, grant_id: GrantId, approver: KeyId, entry_ids: Sequence[EntryId]
) -> Grant:
    """Store an approval; returns the grant as approved. It is decided, and the row locked."""
    (row,) = await connection.fetch(_APPROVE_GRANT, grant_id, approver, entry_ids)
    return grant_from_row(row)


_END_GRANT = "update grants set state = $2 where grant_id = $1"


async def mark_ended(
    connection: Connection, grant_id: GrantId, state: Literal["revoked", "reversed"]
) -> None:
    """Store that an approved grant was taken back. It is decided, and the book locked."""
    await connection.execute(_END_GRANT, grant_id, state)


async def mark_rejected(
    connection: Connection, grant_id: GrantId, rejecter: KeyId, reason: str
) -> Grant:
    """Store a rejection; returns the grant as rejected. It is decided, and the row locked."""
    (row,) = await connection.fetch(_REJECT_GRANT, grant_id, rejecter, reason)
    return grant_from_row(row)


def grant_from_row(row: Row) -> Grant:
    """Read one grant."""
    return Grant(
        grant_id=GrantId(row["grant_id"]),
        tenant_id=TenantId(row["tenant_id"]),
        programme_id=ProgrammeId(row["programme_id"]),
        grant_micro=row["grant_micro"],
        priority=row["priority"],
        effective_ms=ms_of(row["effective_at"]),
        expires_ms=optional_ms_of(row["expires_at"]),
        state=row["state"],
        proposed_by=KeyId(row["proposed_by"]),
        approved_by=row["approved_by"],
        scope=scope_from_json(row["scope"]),
        coverage_bps=row["coverage_bps"],
        tax_effect=row["tax_effect"],
        after_grant=row["after_grant"],
        reference=row["reference"],
    )


_TENANT_OF_HOLD = """
select tenant_id from holds where hold_id = $1
"""


async def tenant_of_hold(connection: Connection, hold_id: str) -> TenantId | None:
    """Return whose hold it is: a path names a hold alone. None where this transaction sees none."""
    tenant_id: str | None = await connection.fetchval(_TENANT_OF_HOLD, hold_id)
    return None if tenant_id is None else TenantId(tenant_id)


# Which message of a line is the newest is decided by their order in the topic. The row of a known
# line is not locked before, so its end is taken over here.
_KEEP_PRICE_LINES = (
    "insert into price_lines ("
    + _PRICE_LINE_COLUMNS
    + ") select "
    + _PRICE_LINE_COLUMNS
    + """
  from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[],
              $7::timestamptz[], $8::timestamptz[]) as n ("""
    + _PRICE_LINE_COLUMNS
    + """)
on conflict (rate_line_id) do update set valid_until = excluded.valid_until
"""
)
# All that compete for an hour: which of them rates it is the price book's rule.
_PRICE_LINES_OF = (
    "select " + _PRICE_LINE_COLUMNS + " from price_lines"
    " where currency = $1 and sku = $2 and price_class = $3 order by valid_from"
)


async def keep_price_lines(connection: Connection, lines: Sequence[PriceLine]) -> None:
    """Keep price lines; of a known one only its end can change."""
    newest = list({line.rate_line_id: line for line in lines}.values())
    if not newest:
        return
    await connection.execute(
        _KEEP_PRICE_LINES,
        [line.rate_line_id for line in newest],
        [line.price_version for line in newest],
        [line.currency for line in newest],
        [line.sku for line in newest],
        [line.price_class for line in newest],
        [line.micro_per_gpu_hour for line in newest],
        [moment_of(line.valid_from_ms) for line in newest],
        [optional_moment_of(line.valid_until_ms) for line in newest],
    )


async def price_lines_of(connection: Connection, series: PriceSeries) -> list[PriceLine]:
    """Read the price lines of one series."""
    rows = await connection.fetch(_PRICE_LINES_OF, series.currency, series.sku, series.price_class)
    return [_price_line_from_row(row) for row in rows]


def _price_line_from_row(row: Row) -> PriceLine:
    return PriceLine(
        rate_line_id=row["rate_line_id"],
        price_version=PriceVersion(row["price_version"]),
        currency=row["currency"],
        sku=Sku(row["sku"]),
        price_class=PriceClass(row["price_class"]),
        micro_per_gpu_hour=row["micro_per_gpu_hour"],
        valid_from_ms=ms_of(row["valid_from"]),
        valid_until_ms=optional_ms_of(row["valid_until"]),
    )
