"""What the ledger does by itself: it ends holds whose time has come, and makes the first operator.

A leased task runs in one process at a time, again and again; what it finds it decides under the
same locks as a command, so a release that came first wins and the task finds the hold ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hisab_contracts.reference import Role
from ledger.store import books
from runtime.auth import access_message, any_key_of_role, key_of, store_keys
from runtime.clock import now_ms
from runtime.database import ALL_TENANTS, after_commit, transaction_on

if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.database import Connection, Database
    from runtime.outbox import Outbox

HOLDS_PER_SWEEP: Final = 200
"""Books are locked for as long as a sweep takes; what is left over is due at the next one."""


async def end_expired_holds(connection: Connection, committed: Callable[[], None]) -> None:
    """End the holds whose time has come, by the ledger's clock. A leased task."""
    async with transaction_on(connection):
        # Read without locks, so that a sweep with nothing to do disturbs nobody.
        due = await books.expired_holds(connection, now_ms(), HOLDS_PER_SWEEP)
        if not due:
            return
        unit = await books.open_books(connection, [tenant_id for tenant_id, _ in due], hold_ids=due)
        unit.release_expired(now_ms())
        await books.save(connection, unit.changes())
        after_commit(committed)


async def make_first_operator(database: Database, outbox: Outbox, secret: str) -> None:
    """Make the first operator's key out of a secret; nothing once any operator's key exists."""
    async with database.transaction(tenant=ALL_TENANTS) as connection:
        if not await any_key_of_role(connection, Role.OPERATOR):
            first = key_of(secret, "bootstrap", Role.OPERATOR)
            await store_keys(connection, [first])
            await outbox.write(connection, [access_message(first)])
