"""Run invoicing: `python -m invoicing migrate | serve | openapi | override-progress`."""

from __future__ import annotations

import os
import sys
from importlib.resources import files

import invoicing
from hisab_contracts import topics
from hisab_contracts.reference import Role
from hisab_contracts.units import optional_instant_text
from invoicing import consumer
from invoicing.api import resources
from invoicing.closing import Closer, InvoiceRenderer, LedgerPoster
from invoicing.core.periods import complete_until
from invoicing.ledger_client import LedgerClient
from invoicing.pdf import TypesetterProcess
from invoicing.recompute import RecomputePool
from invoicing.store import entries
from runtime.consumer import Consumer, Subscription
from runtime.kafka import Topic
from runtime.outbox import Outbox
from runtime.service import Kit, Parts, Service, Status, Task, main

LEDGER_URL = "HISAB_LEDGER_URL"
LEDGER_KEY = "HISAB_LEDGER_KEY"


def build(kit: Kit) -> Parts:
    """Wire the service; nothing is connected yet."""
    outbox = Outbox((topics.DOCUMENTS,))
    ledger = LedgerClient(
        kit.settings.extra.get(LEDGER_URL, ""), kit.settings.extra.get(LEDGER_KEY, "")
    )
    typesetter = TypesetterProcess()

    async def status() -> Status:
        async with kit.writer.connection() as connection:
            watermarks = await entries.plain_watermarks(connection)
        complete = complete_until(watermarks, kit.settings.partitions)
        return Status(
            complete_until={hub: optional_instant_text(until) for hub, until in complete.items()}
        )

    return Parts(
        resources=resources(kit, RecomputePool()),
        topics=(Topic(topics.DOCUMENTS, kit.settings.partitions),),
        consumers=(
            Consumer(
                kit.kafka,
                kit.writer,
                Subscription("invoicing", (topics.ENTRIES,), consumer.keep_entries),
            ),
            Consumer(
                kit.kafka,
                kit.writer,
                Subscription(
                    "invoicing.reference",
                    (topics.TENANTS, topics.ACCESS),
                    consumer.keep_reference,
                    compacted=True,
                ),
            ),
        ),
        outbox=outbox,
        tasks=(
            Task("closing", 200, Closer(outbox).run),
            Task("pdf", 200, InvoiceRenderer(typesetter, outbox).run),
            Task("ledger", 200, LedgerPoster(ledger, outbox).run),
            Task("gaps", 500, consumer.GapFetcher(ledger).run),
        ),
        status=status,
    )


SERVICE = Service(
    "invoicing",
    invoicing.__version__,
    files("invoicing") / "migrations",
    build,
    roles=tuple(Role),
    purpose="Closes billing months: invoices, tax, numbers without gaps, and their PDFs.",
    extra_settings=(LEDGER_URL, LEDGER_KEY),
)

if __name__ == "__main__":
    sys.exit(main(SERVICE, sys.argv[1:], os.environ))
