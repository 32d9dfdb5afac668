"""Run the ledger: `python -m ledger migrate | serve | openapi | override-progress | audit`."""

from __future__ import annotations

import os
import sys
from importlib.resources import files
from typing import Final

import ledger
from hisab_contracts import topics
from ledger import audit, registry
from ledger.api import Endpoints
from ledger.commands import Commands
from ledger.consumer import Intake
from ledger.sequencer import Sequencer
from runtime.auth import Role, access_message, key_of, store_keys
from runtime.database import ALL_TENANTS
from runtime.kafka import Topic
from runtime.service import Kit, Parts, Service, Task, main
from runtime.streams import Consumer, Outbox, Subscription

BOOTSTRAP_KEY: Final = "HISAB_BOOTSTRAP_KEY"
CHARGES_PER_TRANSACTION: Final = 1_000
"""Books are locked for as long as a batch takes: large enough to share its cost, small enough for
holds to get between."""


def build(kit: Kit) -> Parts:
    """Wire the parts; connects to nothing."""
    outbox = Outbox((topics.TENANTS, topics.ACCESS))
    sequencer = Sequencer(kit.kafka)
    commands = Commands(sequencer.wake)
    intake = Intake(sequencer.wake)
    endpoints = Endpoints(kit, outbox, commands)
    charges = Subscription(
        "ledger", (topics.CHARGES,), intake.charges, max_records=CHARGES_PER_TRANSACTION
    )
    prices = Subscription("ledger.reference", (topics.PRICES,), intake.prices, compacted=True)

    async def make_first_operator() -> None:
        """Make the first operator's key out of the environment's secret, once."""
        secret = kit.settings.extra.get(BOOTSTRAP_KEY)
        if secret is None:
            return
        async with kit.api.transaction(tenant=ALL_TENANTS) as connection:
            if not await registry.has_operator(connection):
                first = key_of(secret, "bootstrap", Role.OPERATOR)
                await store_keys(connection, [first])
                await outbox.write(connection, [access_message(first)])

    return Parts(
        router=endpoints.router(),
        topics=(
            Topic(topics.ENTRIES, kit.settings.partitions),
            Topic(topics.TENANTS, 1, compacted=True),
            Topic(topics.ACCESS, 1, compacted=True),
        ),
        consumers=(
            Consumer(kit.kafka, kit.writer, charges),
            Consumer(kit.kafka, kit.writer, prices),
        ),
        outbox=outbox,
        tasks=(
            Task("sequencer", 1, sequencer.run),
            Task("expired-holds", 1_000, commands.end_expired_holds),
        ),
        status=endpoints.status,
        start=make_first_operator,
    )


SERVICE: Final = Service(
    "ledger", ledger.__version__, files("ledger") / "migrations", build, (BOOTSTRAP_KEY,)
)

if __name__ == "__main__":
    if sys.argv[1:] == ["audit"]:
        sys.exit(audit.main(os.environ))
    sys.exit(main(SERVICE, sys.argv[1:], os.environ))
