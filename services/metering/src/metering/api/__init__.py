"""What hubs, operators, tenants and auditors ask of metering and command: one module per resource.

Each endpoint checks in this order: who calls (401, 403), what the path names (404), the form of the
request (413, 415, 422), and then acts (409).
"""

from __future__ import annotations

from metering.api.corrections import Corrections
from metering.api.events import Events
from metering.api.hubs import Hubs
from metering.api.prices import Prices
from metering.api.quarantine import Quarantine
from metering.api.sources import Sources
from metering.api.usage import Usage
from metering.api.usage_reports import UsageReports
from metering.consumer import HubConsumer
from runtime.http import Resource
from runtime.outbox import Outbox
from runtime.service import Kit


def resources(
    kit: Kit, outbox: Outbox, usage: HubConsumer, hub_partitions: int
) -> tuple[Resource, ...]:
    """Return every resource of metering but `/v1/status`, which the kit has."""
    return (
        Events(kit),
        Usage(kit),
        UsageReports(kit),
        Quarantine(kit, outbox),
        Corrections(kit, outbox),
        Prices(kit, outbox),
        Hubs(kit, outbox, usage, hub_partitions),
        Sources(kit),
    )
