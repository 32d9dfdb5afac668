"""A process that asks for holds: one of two that want the same credit.

PYTHONPATH=tests python -m integration.ledger.rival DSN TENANT NAME WORKERS HOLD_MICRO

Says `ready` when it could begin, begins when a line comes in, and says how many were admitted.
"""

from __future__ import annotations

import asyncio
import sys

from integration.ledger.real import FAR_MS
from ledger.commands import Commands
from ledger.core.holds import HoldState, InsufficientCredit
from ledger.placement import TenantPartitions
from runtime.database import ALL_TENANTS, Database
from runtime.outages import is_outage
from runtime.outbox import Outbox
from unit.ledger.values import hold


async def ask(database: Database, tenant_id: str, hold_id: str, hold_micro: int) -> bool:
    """Ask until there is an answer, as a client repeats what is retryable; True: admitted."""
    commands = Commands(Outbox(()), lambda: None, TenantPartitions(lambda: 1))
    command = hold(hold_id, hold_micro, expires_ms=FAR_MS)
    while True:
        try:
            async with database.transaction(tenant=ALL_TENANTS) as connection:
                answer = await commands.enter_hold(connection, tenant_id, command)
        except Exception as error:
            if not is_outage(error):
                raise
            continue
        # A refusal wrote nothing, so nothing had to be rolled back.
        if not isinstance(answer, HoldState | InsufficientCredit):
            raise TypeError(answer)
        return isinstance(answer, HoldState)


async def main(dsn: str, tenant_id: str, name: str, workers: int, hold_micro: int) -> None:
    """Have all workers ask at once."""
    database = Database(dsn, name=name)
    await database.open()
    try:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.readline)
        asked = (ask(database, tenant_id, f"{name}-{n}", hold_micro) for n in range(workers))
        sys.stdout.write(f"{sum(await asyncio.gather(*asked))}\n")
    finally:
        await database.close()


if __name__ == "__main__":
    _, dsn, tenant_id, name, workers, hold_micro = sys.argv
    asyncio.run(main(dsn, tenant_id, name, int(workers), int(hold_micro)))
