"""Run metering: `python -m metering migrate | serve | openapi | override-progress`."""

from __future__ import annotations

import os
import sys
from importlib.resources import files
from typing import Final

from hisab_contracts.ids import HubCode
from hisab_contracts.topics import ACCESS, CHARGES, HUBS, PRICES, QUARANTINE, TENANTS, hub_topic
from metering import answers, api, lookup, upkeep
from metering.consumer import Intake
from runtime.kafka import Topic
from runtime.service import Kit, Parts, Service, Status, Task, main
from runtime.streams import Consumer, Outbox, Subscription

VERSION: Final = "0.1.0"
MAX_RECORDS: Final = 4_000


def build(kit: Kit) -> Parts:
    """Wire the parts; nothing is connected."""
    outbox = Outbox((CHARGES, QUARANTINE, PRICES, HUBS))
    intake = Intake(outbox)
    usage = upkeep.HubConsumer(
        kit.kafka,
        kit.writer,
        Subscription(
            "metering", (), intake.handle, on_unread=intake.set_aside, max_records=MAX_RECORDS
        ),
    )
    reference = Consumer(
        kit.kafka,
        kit.writer,
        Subscription(
            "metering.reference", (TENANTS, ACCESS), intake.keep_reference, compacted=True
        ),
    )
    watermarks = upkeep.Watermarks(kit.kafka, outbox, kit.settings.partitions)

    async def status() -> Status:
        async with kit.writer.connection() as connection:
            return Status(
                complete_until=answers.complete_until(await lookup.completeness(connection))
            )

    def follow(hub: HubCode) -> None:
        usage.extend([hub_topic(hub)])

    return Parts(
        router=api.routes(kit, outbox, follow),
        topics=(
            Topic(CHARGES, kit.settings.partitions),
            Topic(QUARANTINE, kit.settings.partitions),
            Topic(PRICES, 1, compacted=True),
            Topic(HUBS, 1, compacted=True),
        ),
        consumers=(usage, reference),
        outbox=outbox,
        tasks=(
            Task("watermarks", 200, watermarks.run),
            Task("endings", 500, upkeep.Endings(outbox).run),
            Task("releases", 500, upkeep.Releases(outbox).run),
        ),
        status=status,
        start=usage.look,
    )


SERVICE = Service("metering", VERSION, files("metering") / "migrations", build)

if __name__ == "__main__":
    sys.exit(main(SERVICE, sys.argv[1:], os.environ))
