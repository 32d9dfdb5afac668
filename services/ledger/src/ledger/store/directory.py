"""Who there is: tenants, programmes, proposed grants, the facts of holds, prices, keys. SQL.

What is kept here is what was said once; what it comes to is in books (`store`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from hisab_contracts.ids import GrantId, KeyId, ProgrammeId, ProjectId, TenantId
from hisab_contracts.reference import PriceLine, TenantRecord
from ledger.feed import moment_of, ms_of
from ledger.grants import Grant

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection


class Parked(Struct, frozen=True):
    """A charge message that could not be booked, and why."""

    topic: str
    partition: int
    offset: int
    reason: str
    message: bytes


class HoldFacts(Struct, frozen=True):
    """What a scheduler said about a hold beyond its amount."""

    hold_id: str
    tenant_id: str
    project_id: str
    job_ref: str
    allocation_id: str | None
    hub: str
    sku: str
    hold_micro: int
    expires_ms: int


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


_TENANT = """
select t.tenant_id, t.kind, t.currency, t.credit_limit_micro,
       array(select p.project_id from projects p where p.tenant_id = t.tenant_id
              order by p.project_id) as projects
  from tenants t
 where t.tenant_id = $1
"""


async def tenant_of(connection: Connection, tenant_id: str) -> TenantRecord | None:
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


_INSERT_PROGRAMME = """
insert into programmes (programme_id, name, currency, budget_micro)
values ($1, $2, $3, $4)
on conflict do nothing
"""


async def add_programme(
    connection: Connection, programme_id: str, name: str, currency: str, budget_micro: int
) -> bool:
    """Register a programme; False when its id is taken."""
    status = await connection.execute(_INSERT_PROGRAMME, programme_id, name, currency, budget_micro)
    return status == "INSERT 0 1"


_PROGRAMME_CURRENCY = """
select currency from programmes where programme_id = $1
"""


async def programme_currency(connection: Connection, programme_id: str) -> str | None:
    """Return the currency of a programme; None when there is no such programme."""
    currency: str | None = await connection.fetchval(_PROGRAMME_CURRENCY, programme_id)
    return currency


_INSERT_GRANT = """
insert into grants (grant_id, tenant_id, programme_id, grant_micro, priority, effective_at,
                    expires_at, state, proposed_by)
values ($1, $2, $3, $4, $5, $6, $7, 'proposed', $8)
"""


async def add_grant(connection: Connection, grant: Grant) -> None:
    """Store a proposal."""
    await connection.execute(
        _INSERT_GRANT,
        grant.grant_id,
        grant.tenant_id,
        grant.programme_id,
        grant.grant_micro,
        grant.priority,
        moment_of(grant.effective_ms),
        None if grant.expires_ms is None else moment_of(grant.expires_ms),
        grant.proposed_by,
    )


_GRANT = """
select grant_id, tenant_id, programme_id, grant_micro, priority, effective_at, expires_at, state,
       proposed_by, approved_by
  from grants
 where grant_id = $1
"""
_LOCK_GRANT = _GRANT + " for no key update"


async def grant_of(connection: Connection, grant_id: str, *, lock: bool) -> Grant | None:
    """Find a grant; with `lock` nobody else decides it before this transaction ends."""
    row = await connection.fetchrow(_LOCK_GRANT if lock else _GRANT, grant_id)
    return None if row is None else _grant_from_row(row)


def _grant_from_row(row: Row) -> Grant:
    expires_at = row["expires_at"]
    return Grant(
        grant_id=GrantId(row["grant_id"]),
        tenant_id=TenantId(row["tenant_id"]),
        programme_id=ProgrammeId(row["programme_id"]),
        grant_micro=row["grant_micro"],
        priority=row["priority"],
        effective_ms=ms_of(row["effective_at"]),
        expires_ms=None if expires_at is None else ms_of(expires_at),
        state=row["state"],
        proposed_by=KeyId(row["proposed_by"]),
        approved_by=row["approved_by"],
    )


_APPROVE_GRANT = """
update grants set state = 'approved', approved_by = $2, approved_at = clock_timestamp()
 where grant_id = $1
"""


async def mark_approved(connection: Connection, grant: Grant) -> None:
    """Store an approval."""
    await connection.execute(_APPROVE_GRANT, grant.grant_id, grant.approved_by)


_INSERT_HOLD = """
insert into holds (tenant_id, hold_id, project_id, job_ref, allocation_id, hub, sku, hold_micro,
                   expires_at, ended, places, reserved)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, null, '{}', '{}')
"""


async def add_hold(connection: Connection, hold: HoldFacts) -> None:
    """Store what was asked for; what it reserves is written with its entry."""
    await connection.execute(
        _INSERT_HOLD,
        hold.tenant_id,
        hold.hold_id,
        hold.project_id,
        hold.job_ref,
        hold.allocation_id,
        hold.hub,
        hold.sku,
        hold.hold_micro,
        moment_of(hold.expires_ms),
    )


_TENANT_OF_HOLD = """
select tenant_id from holds where hold_id = $1
"""


async def tenant_of_hold(connection: Connection, hold_id: str) -> TenantId | None:
    """Return whose hold it is; None when this transaction cannot see it."""
    tenant_id: str | None = await connection.fetchval(_TENANT_OF_HOLD, hold_id)
    return None if tenant_id is None else TenantId(tenant_id)


_KEEP_PRICE_LINES = """
insert into price_lines (rate_line_id, price_version, currency, sku, price_class,
                         micro_per_gpu_hour, valid_from, valid_until)
select n.rate_line_id, n.price_version, n.currency, n.sku, n.price_class, n.micro_per_gpu_hour,
       n.valid_from, n.valid_until
  from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[],
              $7::timestamptz[], $8::timestamptz[])
       as n (rate_line_id, price_version, currency, sku, price_class, micro_per_gpu_hour,
             valid_from, valid_until)
on conflict (rate_line_id) do update set valid_until = excluded.valid_until
"""


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
        [
            None if line.valid_until_ms is None else moment_of(line.valid_until_ms)
            for line in newest
        ],
    )


_PRICE_AT = """
select micro_per_gpu_hour
  from price_lines
 where sku = $1 and price_class = $2 and currency = $3 and valid_from <= $4
   and (valid_until is null or valid_until > $4)
 order by valid_from desc
 limit 1
"""


async def price_at(
    connection: Connection, sku: str, price_class: str, currency: str, instant_ms: int
) -> int | None:
    """Return the price of a GPU-hour at an instant: the line that began last."""
    price: int | None = await connection.fetchval(
        _PRICE_AT, sku, price_class, currency, moment_of(instant_ms)
    )
    return price


_PARK = """
insert into parked_charges (topic, partition, "offset", reason, detail, message)
select n.topic, n.partition, n."offset", n.reason, n.reason, n.message
  from unnest($1::text[], $2::int[], $3::bigint[], $4::text[], $5::bytea[])
       as n (topic, partition, "offset", reason, message)
on conflict do nothing
"""


async def park(connection: Connection, parked: Sequence[Parked]) -> None:
    """Keep charges that could not be booked, with their bytes."""
    if not parked:
        return
    await connection.execute(
        _PARK,
        [each.topic for each in parked],
        [each.partition for each in parked],
        [each.offset for each in parked],
        [each.reason for each in parked],
        [each.message for each in parked],
    )


_PARKED_COUNT = "select count(*) from parked_charges"


async def parked_count(connection: Connection) -> int:
    """Count the charges that could not be booked."""
    return int(await connection.fetchval(_PARKED_COUNT))


_FIRST_PARKED = """
select topic, partition, "offset", reason, message
  from parked_charges
 order by topic, partition, "offset"
 limit $1
"""


async def first_parked(connection: Connection, limit: int) -> list[Parked]:
    """Read charges that could not be booked, in the order in which they came per partition."""
    return [
        Parked(row["topic"], row["partition"], row["offset"], row["reason"], row["message"])
        for row in await connection.fetch(_FIRST_PARKED, limit)
    ]


_HAS_OPERATOR = """
select exists (select from access_keys where role = 'operator') as known
"""


async def has_operator(connection: Connection) -> bool:
    """Say whether any operator's key exists."""
    return bool(await connection.fetchval(_HAS_OPERATOR))


class KeyRow(Struct, frozen=True):
    """An API key as stored: never its secret."""

    key_id: str
    sha256: str
    role: str
    tenant_id: str | None
    hub: str | None
    expires_ms: int | None
    revoked: bool


_KEY = """
select key_id, sha256, role, tenant_id, hub, expires_at, revoked from access_keys where key_id = $1
"""


async def key_of(connection: Connection, key_id: str) -> KeyRow | None:
    """Find a key by its id."""
    row = await connection.fetchrow(_KEY, key_id)
    if row is None:
        return None
    expires_at = row["expires_at"]
    return KeyRow(
        row["key_id"],
        row["sha256"],
        row["role"],
        row["tenant_id"],
        row["hub"],
        None if expires_at is None else ms_of(expires_at),
        row["revoked"],
    )
