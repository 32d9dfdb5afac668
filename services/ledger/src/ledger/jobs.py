"""What the ledger does by itself: it ends holds that are over, and makes the first operator.

A leased task runs in one process at a time, again and again; what it finds it decides under the
same locks as a command, so a release that came first wins and the task finds the hold ended.

The sweep of expired holds changes no answer: what is over is over by the clock (`core.expiry`). It
puts on the record what no other entry of the book would, and keeps few holds due.
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

    from runtime.clock import Clock
    from runtime.database import Connection, Database
    from runtime.outbox import Outbox

HOLDS_PER_SWEEP: Final = 200
"""Books are locked for as long as a sweep takes: short, so that holds and charges get between."""
SWEEPS_AT_ONCE: Final = 50
"""Then the task looks whether it has to stop; what is left over is due at its next run."""


async def end_expired_holds(
    connection: Connection, committed: Callable[[], None], clock: Clock = now_ms
) -> None:
    """End on the record the holds that are over, by the ledger's clock. A leased task."""
    for _ in range(SWEEPS_AT_ONCE):
        async with transaction_on(connection):
            unit = await books.open_expired(connection, clock, HOLDS_PER_SWEEP)
            if unit is None:
                return
            unit.release_expired()
            await books.save(connection, unit.changes())
            after_commit(committed)


async def make_first_operator(database: Database, outbox: Outbox, secret: str) -> None:
    """Make the first operator's key out of a secret; nothing once any operator's key exists."""
    async with database.transaction(tenant=ALL_TENANTS) as connection:
        if not await any_key_of_role(connection, Role.OPERATOR):
            first = key_of(secret, "bootstrap", Role.OPERATOR)
            await store_keys(connection, [first])
            await outbox.write(connection, [access_message(first)])
