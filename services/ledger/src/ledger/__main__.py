"""Run the ledger: `python -m ledger COMMAND`.

The commands: `migrate`, `serve`, `openapi`, `override-progress`, `audit`, `recover`.
"""

from __future__ import annotations

import os
import sys
from importlib.resources import files
from typing import TYPE_CHECKING, Final

import ledger
from hisab_contracts import topics
from hisab_contracts.reference import Role
from hisab_contracts.units import optional_instant_text
from ledger import api, audit, jobs, recovery
from ledger.commands import Commands
from ledger.consumer import ChargeConsumer, keep_prices
from ledger.core.balance import complete_until
from ledger.placement import TenantPartitions
from ledger.restoration import PublishedGuard
from ledger.sequencer import Sequencer
from ledger.store.completeness import watermarks_by_hub
from ledger.store.sequence import count_unpublished
from runtime.auth import key_of
from runtime.consumer import Consumer, Subscription
from runtime.kafka import Topic
from runtime.outbox import Outbox
from runtime.service import Kit, Parts, Service, Status, Task, main

if TYPE_CHECKING:
    from collections.abc import Mapping

    from runtime.database import Connection

BOOTSTRAP_KEY: Final = "HISAB_BOOTSTRAP_KEY"
CHARGES_PER_TRANSACTION: Final = 1_000
"""Books are locked for as long as a batch takes: large enough to share its cost, small enough for
holds to get between."""


def build(kit: Kit) -> Parts:
    """Wire the parts; connects to nothing."""
    outbox = Outbox((topics.TENANTS, topics.ACCESS))
    sequencer = Sequencer(kit.kafka)
    charges = Subscription(
        "ledger",
        (topics.CHARGES,),
        ChargeConsumer(sequencer.wake).book_charges,
        placed_by_key=True,
        max_records=CHARGES_PER_TRANSACTION,
    )
    booking = Consumer(kit.kafka, kit.writer, charges)
    partitions = TenantPartitions(lambda: booking.partition_count(topics.CHARGES))
    commands = Commands(outbox, sequencer.wake, partitions)
    prices = Subscription("ledger.reference", (topics.PRICES,), keep_prices, compacted=True)

    async def end_expired_holds(connection: Connection) -> None:
        await jobs.end_expired_holds(connection, sequencer.wake)

    async def expire_lots(connection: Connection) -> None:
        await jobs.expire_lots(connection, partitions, sequencer.wake)

    async def make_first_operator() -> None:
        secret = kit.settings.extra.get(BOOTSTRAP_KEY)
        if secret:
            await jobs.make_first_operator(kit.api, outbox, secret)

    async def status() -> Status:
        async with kit.writer.connection() as connection:
            unpublished = await count_unpublished(connection)
            watermarks = await watermarks_by_hub(connection)
        until = {hub: complete_until(of_hub) for hub, of_hub in watermarks.items()}
        return Status(
            unpublished=unpublished,
            complete_until={
                hub: optional_instant_text(until_ms) for hub, until_ms in until.items()
            },
        )

    return Parts(
        resources=api.resources(kit, commands, partitions),
        topics=(
            Topic(topics.ENTRIES, kit.settings.partitions, kept_for_ever=True),
            Topic(topics.TENANTS, 1, compacted=True),
            Topic(topics.ACCESS, 1, compacted=True),
        ),
        consumers=(
            booking,
            Consumer(kit.kafka, kit.writer, prices),
        ),
        outbox=outbox,
        tasks=(
            Task("sequencer", 1, sequencer.run),
            Task("expired-holds", 1_000, end_expired_holds),
            Task("expired-lots", 1_000, expire_lots),
        ),
        status=status,
        start=make_first_operator,
        guard=PublishedGuard(kit.kafka, kit.writer).refusal,
    )


def refuse_malformed_key(environ: Mapping[str, str]) -> None:
    """Stop with one sentence when the first operator's key is not one; unset or empty is none.

    Before anything is connected: what is wrong is the setting, whatever the database is doing.
    """
    secret = environ.get(BOOTSTRAP_KEY)
    if not secret:
        return
    try:
        key_of(secret, "bootstrap", Role.OPERATOR)
    except ValueError as error:
        raise SystemExit(
            f"{BOOTSTRAP_KEY} is no API key: {error}. Make one with:"
            f" echo \"hsb_$(openssl rand -base64 32 | tr '+/' '-_' | tr -d '=')\""
        ) from None


SERVICE: Final = Service(
    "ledger",
    ledger.__version__,
    files("ledger") / "migrations",
    build,
    roles=tuple(Role),
    purpose="Keeps the books of compute credits: grants, holds, charges, and what they leave.",
    extra_settings=(BOOTSTRAP_KEY,),
)

if __name__ == "__main__":
    # The kit knows the commands that all services have; these are the ledger's own.
    if sys.argv[1:] == ["audit"]:
        sys.exit(audit.main(os.environ))
    if sys.argv[1:] == ["serve"]:
        refuse_malformed_key(os.environ)
    if sys.argv[1:2] == ["recover"]:
        sys.exit(recovery.main(sys.argv[2:], os.environ))
    sys.exit(main(SERVICE, sys.argv[1:], os.environ))
