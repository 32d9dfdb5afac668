"""Commands: each runs in the caller's transaction and returns its answer or a refusal.

A command loads and locks what it is about, has the core decide, saves, and writes to the outbox
what others must know. Refusals are values here; `api` turns them into problems. A refusal means
that nothing may be committed: whoever gets one rolls the transaction back (`api` does so by raising
the problem inside it).

Refusals. Hub registered: `HubAlreadyExists`. Price list added: `PriceListRefused`. Quote:
`NotPriced`. Source retired: `SourceNotActive`. Record replayed or dismissed: `QuarantineClosed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from hisab_contracts.ids import HubCode, PriceClass, PriceVersion, Sku, SourcePath, TenantId
from hisab_contracts.prices import PriceBook, PriceSeries
from hisab_contracts.reference import HubRecord
from hisab_contracts.topics import HUBS, PRICES
from hisab_contracts.units import hour_floor_ms
from metering.core.pricing import (
    DEFAULT_CURRENCY,
    JobQuote,
    JobRequest,
    NotPriced,
    PriceList,
    PriceListRefused,
    displaced_lines,
    price_lines_of,
    quote_job,
    reject_overlap,
    reject_rated,
)
from metering.core.quarantine import QuarantineClosed, QuarantineState, refuse_closed
from metering.core.sources import SourceNotActive, SourceProgress, retire
from metering.decisions import state_dismissal, state_replay
from metering.replay import replay_quarantined
from metering.store import hubs, prices, quarantine
from metering.store.state import ReferenceCache
from runtime.clock import now_ms
from runtime.database import checked_now_ms
from runtime.kafka import Message
from runtime.outbox import Outbox

if TYPE_CHECKING:
    from runtime.clock import Clock
    from runtime.database import Connection


@dataclass(frozen=True, slots=True)
class HubAlreadyExists:
    """A hub of this code is registered already."""

    hub: HubCode


async def register_hub(
    connection: Connection, outbox: Outbox, record: HubRecord
) -> HubAlreadyExists | None:
    """Register a hub and tell the others; its topic exists already."""
    name = record.name or record.hub
    if not await hubs.add_hub(connection, record.hub, name, record.heartbeat_ms):
        return HubAlreadyExists(record.hub)
    message = Message(HUBS, record.hub.encode(), msgspec.json.encode(record))
    await outbox.write(connection, [message])
    return None


async def add_price_list(
    connection: Connection, outbox: Outbox, price_list: PriceList, added_by: str
) -> PriceVersion | PriceListRefused:
    """Add a list of prices, unless it would change what an hour costs or has cost."""
    lines = [replace(line, added_by=added_by) for line in price_lines_of(price_list)]
    # Nobody rates from here on: what is looked up below stays true until the commit.
    await prices.lock_prices(connection)
    book = PriceBook(await prices.load_price_lines(connection))
    refused = reject_overlap(book, lines)
    if refused is None:
        displaced = displaced_lines(book, lines)
        refused = reject_rated(await prices.rated_hours(connection, displaced), displaced)
    if refused is not None:
        return refused
    await prices.add_price_list(connection, lines, added_by)
    await outbox.write(
        connection,
        [Message(PRICES, line.rate_line_id.encode(), msgspec.json.encode(line)) for line in lines],
    )
    return lines[0].price_version


async def quote(
    connection: Connection,
    tenant_id: str | None,
    sku: Sku,
    price_class: PriceClass,
    *,
    gpus: int,
    duration_ms: int,
    clock: Clock = now_ms,
) -> JobQuote | NotPriced:
    """Price a job at what is in force now, in the currency of the tenant's book."""
    currency = None
    if tenant_id is not None:
        tenant = TenantId(tenant_id)
        currency = (await prices.currencies_of(connection, [tenant])).get(tenant)
    series = PriceSeries(currency or DEFAULT_CURRENCY, sku, price_class)
    hour_ms = hour_floor_ms(clock())
    book = PriceBook(await prices.price_lines_of(connection, series))
    return quote_job(book, JobRequest(series, gpus, duration_ms), hour_ms)


async def retire_source(
    connection: Connection, hub: HubCode, path: SourcePath, because: str
) -> SourceProgress | SourceNotActive:
    """Retire a source: from now on it does not count for its hub's completeness."""
    retired = retire(hub, path, await hubs.lock_source(connection, hub, path))
    if isinstance(retired, SourceProgress):
        await hubs.save_retirement(connection, retired, because)
    return retired


async def replay_record(
    connection: Connection,
    outbox: Outbox,
    cache: ReferenceCache,
    quarantine_id: int,
    because: str,
) -> QuarantineState | QuarantineClosed:
    """Judge a quarantined record again; return its state then: open if something of it is left."""
    # The operator vouches that what the record says of the future has come to pass by now.
    replayed_ms = await checked_now_ms(connection)
    closed = await replay_quarantined(
        connection, outbox, cache, [quarantine_id], because, replayed_ms=replayed_ms
    )
    if closed:
        return closed[0]
    await state_replay(connection, outbox, quarantine_id, replayed_ms, because)
    return await quarantine.lock_state(connection, quarantine_id)


async def dismiss_record(
    connection: Connection, outbox: Outbox, quarantine_id: int, because: str
) -> QuarantineState | QuarantineClosed:
    """Leave an open record in quarantine for good: its time keeps no month open any more."""
    closed = refuse_closed(quarantine_id, await quarantine.lock_state(connection, quarantine_id))
    if closed is not None:
        return closed
    await quarantine.dismiss_quarantined(connection, quarantine_id, because)
    dismissed_ms = await checked_now_ms(connection)
    await state_dismissal(connection, outbox, quarantine_id, dismissed_ms, because)
    return "dismissed"
