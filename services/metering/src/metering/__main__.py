"""Run metering: `python -m metering <command>`.

Commands: `migrate`, `serve`, `openapi`, `override-progress`, `accept-restore`, `reconcile`,
`usage-sums`.
"""

from __future__ import annotations

import os
import sys
from importlib.resources import files
from typing import Final

from hisab_contracts.ids import HubCode
from hisab_contracts.reference import Role
from hisab_contracts.topics import (
    ACCESS,
    CHARGES,
    DECISIONS,
    HUBS,
    PRICES,
    QUARANTINE,
    TENANTS,
    hub_topic,
)
from hisab_contracts.units import optional_instant_text
from metering import __version__, api, console, facts, jobs
from metering.api.status import ReconciledStatus
from metering.consumer import HubConsumer, keep_reference
from metering.facts import Facts
from metering.ingest import Ingest
from metering.reconcile import ReconcileTask
from metering.store import hubs
from runtime.consumer import Consumer, Subscription
from runtime.kafka import Topic
from runtime.outbox import Outbox
from runtime.service import Kit, Parts, Service, Status, Task, main, whole_setting

MAX_RECORDS: Final = 4_000
HUB_PARTITIONS: Final = "HISAB_HUB_PARTITIONS"
"""How many partitions the topic of a new hub gets."""


def build(kit: Kit) -> Parts:
    """Wire the parts; nothing is connected."""
    outbox = Outbox((CHARGES, QUARANTINE, PRICES, HUBS, DECISIONS))
    own_facts = Facts(outbox)
    ingest = Ingest(outbox)
    usage = HubConsumer(
        kit.kafka,
        kit.writer,
        Subscription(
            "metering",
            (),
            ingest.handle,
            on_unread=ingest.quarantine_unread,
            max_records=MAX_RECORDS,
        ),
    )
    reference = Consumer(
        kit.kafka,
        kit.writer,
        Subscription("metering.reference", (TENANTS, ACCESS), keep_reference, compacted=True),
    )
    following = Consumer(
        kit.kafka,
        kit.writer,
        Subscription("metering.facts", facts.TOPICS, own_facts.keep, compacted=True),
    )
    watermarks = jobs.Watermarks(kit.kafka, outbox)

    async def status() -> Status:
        async with kit.writer.connection() as connection:
            complete = await hubs.list_completeness(connection)
        return Status(
            complete_until={hub.hub: optional_instant_text(hub.watermark_ms) for hub in complete}
        )

    def follow(hub: HubCode) -> None:
        usage.extend([hub_topic(hub)])

    async def start() -> None:
        # Before anything is rated: a restored database has forgotten what it published.
        await own_facts.catch_up(kit.kafka, kit.writer)
        await usage.look()

    hub_partitions = whole_setting(kit.settings.extra, HUB_PARTITIONS, 12)
    return Parts(
        resources=api.resources(kit, outbox, usage, hub_partitions),
        topics=(
            Topic(CHARGES, kit.settings.partitions),
            Topic(QUARANTINE, kit.settings.partitions),
            Topic(PRICES, 1, compacted=True),
            Topic(HUBS, 1, compacted=True),
            # One partition, so that a hub's decisions are in one, whatever else is in their key.
            Topic(DECISIONS, 1, compacted=True),
        ),
        consumers=(usage, reference, following),
        outbox=outbox,
        tasks=(
            Task("watermarks", 200, watermarks.run),
            Task("finals", 500, jobs.Finals(outbox).run),
            Task("releases", 500, jobs.Releases(outbox).run),
            Task("usage-sums", 1_000, jobs.fold_usage),
            Task("reconcile", 500, ReconcileTask(kit.kafka, kit.writer).run),
        ),
        status=status,
        status_resource=ReconciledStatus,
        start=start,
    )


SERVICE = Service(
    "metering",
    __version__,
    files("metering") / "migrations",
    build,
    roles=tuple(Role),
    purpose="Takes what hubs report, covers every GPU-nanosecond once, and rates it.",
    extra_settings=(HUB_PARTITIONS,),
)

if __name__ == "__main__":
    # The kit knows the commands that all services have; these are metering's own.
    if sys.argv[1:2] and sys.argv[1] in console.COMMANDS:
        sys.exit(console.main(sys.argv[1:], os.environ))
    sys.exit(main(SERVICE, sys.argv[1:], os.environ))
