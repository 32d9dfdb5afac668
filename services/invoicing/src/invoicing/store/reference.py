"""SQL of who is who: tenants, and the legal entities that sell.

Tenants are our copy of what the ledger says; the newest record counts. Sellers are registered here
and never changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hisab_contracts.ids import TenantId
from hisab_contracts.reference import TenantRecord
from invoicing.core.sellers import Seller

if TYPE_CHECKING:
    import asyncpg

    from runtime.database import Connection

# Tenants.


_STORE_TENANTS = """
insert into tenants (tenant_id, kind, currency)
select n.tenant_id, n.kind, n.currency
  from unnest($1::text[], $2::text[], $3::text[]) as n (tenant_id, kind, currency)
 order by n.tenant_id
on conflict (tenant_id) do update set kind = excluded.kind, currency = excluded.currency
"""


async def store_tenants(connection: Connection, records: Iterable[TenantRecord]) -> None:
    """Keep the newest record of each tenant (the last one given counts)."""
    newest = {record.tenant_id: record for record in records}
    await connection.execute(
        _STORE_TENANTS,
        list(newest),
        [record.kind for record in newest.values()],
        [record.currency for record in newest.values()],
    )


_KNOWN_TENANTS = "select tenant_id from tenants where tenant_id = any($1::text[])"


async def known_tenants(connection: Connection, tenants: Iterable[TenantId]) -> frozenset[TenantId]:
    """Return those of these tenants whom the ledger has told us about."""
    rows = await connection.fetch(_KNOWN_TENANTS, sorted(set(tenants)))
    return frozenset(row["tenant_id"] for row in rows)


# Sellers.


_SELLER_COLUMNS = "legal_entity_id, name, series"


def _seller_from_row(row: asyncpg.Record) -> Seller:
    return Seller(legal_entity_id=row["legal_entity_id"], name=row["name"], series=row["series"])


_SELLERS = "select " + _SELLER_COLUMNS + " from legal_entities order by legal_entity_id"


async def sellers(connection: Connection) -> list[Seller]:
    """Return every legal entity, in order of id."""
    return [_seller_from_row(row) for row in await connection.fetch(_SELLERS)]


_ADD_SELLER = (
    "insert into legal_entities ("
    + _SELLER_COLUMNS
    + """, actor) values ($1, $2, $3, $4)
on conflict (legal_entity_id) do nothing
"""
)


async def add_seller(connection: Connection, seller: Seller, *, actor: str) -> None:
    """Register a legal entity; one that exists stays as it is."""
    await connection.execute(_ADD_SELLER, seller.legal_entity_id, seller.name, seller.series, actor)


# A lock named after a register, held until the transaction ends. An advisory lock, because what
# must be excluded is a row that does not exist yet: the next number, the first seller.
_LOCK_REGISTER = "select pg_advisory_xact_lock(hashtextextended($1, 0))"


async def lock_register(connection: Connection, register: str) -> None:
    """Let one transaction at a time add to a register whose rows are numbered or few."""
    await connection.fetchval(_LOCK_REGISTER, register)
