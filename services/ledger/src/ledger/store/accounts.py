"""Accounts of books that are neither a lot nor a total of the book: funding, invoiced, budget. SQL.

A charge moves none of them, so only a command that names some loads and writes them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.database import Connection

_LOAD_ACCOUNTS = """
select tenant_id, account, balance_micro
  from accounts
 where tenant_id = any($1::text[]) and ($2::text[] is null or account = any($2::text[]))
"""
# Writes what accounts have come to.
_UPSERT_ACCOUNTS = """
insert into accounts (tenant_id, account, balance_micro)
select n.tenant_id, n.account, n.balance_micro
  from unnest($1::text[], $2::text[], $3::bigint[]) as n (tenant_id, account, balance_micro)
on conflict (tenant_id, account) do update set balance_micro = excluded.balance_micro
"""


async def load_accounts(
    connection: Connection, tenant_ids: Sequence[str], accounts: Collection[str] | None
) -> dict[str, dict[str, int]]:
    """Load these accounts of these books, or all of them, by book and account."""
    named = None if accounts is None else list(accounts)
    found: dict[str, dict[str, int]] = {}
    for row in await connection.fetch(_LOAD_ACCOUNTS, tenant_ids, named):
        found.setdefault(row["tenant_id"], {})[row["account"]] = row["balance_micro"]
    return found


async def upsert_accounts(connection: Connection, accounts: Sequence[tuple[str, str, int]]) -> None:
    """Write (tenant, account, balance)."""
    await connection.execute(
        _UPSERT_ACCOUNTS,
        [tenant_id for tenant_id, _, _ in accounts],
        [account for _, account, _ in accounts],
        [micro for _, _, micro in accounts],
    )
