"""What the ledger does by itself: it ends what is over, and makes the first operator.

A leased task runs in one process at a time, again and again; what it finds it decides under the
same locks as a command, so a release that came first wins and the task finds the hold ended.

The sweep of expired holds changes no answer: what is over is over by the clock (`core.expiry`). It
puts on the record what no other entry of the book would, and keeps few holds due.

The sweep of lots is what moves their remainders to `breakage`, and what holds had reserved on them
to other lots: once the hubs' watermarks have passed a lot's window, and not by the clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hisab_contracts.reference import Role
from ledger.placement import TenantPartitions
from ledger.store import books
from ledger.store.books import FIRST_LOT
from ledger.store.completeness import complete_until_of
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
LOTS_PER_SWEEP: Final = 200


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


async def expire_lots(
    connection: Connection,
    partitions: TenantPartitions,
    committed: Callable[[], None],
    clock: Clock = now_ms,
) -> None:
    """Expire the lots of whose windows all usage has been heard of. A leased task."""
    complete_until_ms = await complete_until_of(connection, partitions.all())
    last_ms = max((until for until in complete_until_ms.values() if until is not None), default=0)
    after = FIRST_LOT
    for _ in range(SWEEPS_AT_ONCE):
        found = await books.find_lots_over(connection, last_ms, after, LOTS_PER_SWEEP)
        if not found:
            return
        after = found[-1]
        # Only now is it known whose partition has come as far as another's.
        until_ms: dict[str, int | None] = {
            lot.tenant_id: complete_until_ms.get(partitions.of(lot.tenant_id)) for lot in found
        }
        async with transaction_on(connection):
            unit = await books.open_to_expire_lots(connection, until_ms, clock)
            unit.expire_lots()
            await books.save(connection, unit.changes())
            after_commit(committed)


async def make_first_operator(database: Database, outbox: Outbox, secret: str) -> None:
    """Make the first operator's key out of a secret; nothing once any operator's key exists."""
    async with database.transaction(tenant=ALL_TENANTS) as connection:
        if not await any_key_of_role(connection, Role.OPERATOR):
            first = key_of(secret, "bootstrap", Role.OPERATOR)
            await store_keys(connection, [first])
            await outbox.write(connection, [access_message(first)])
