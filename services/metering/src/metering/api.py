"""The HTTP endpoints of metering: what hubs, operators, tenants and auditors ask and command.

Each endpoint checks in this order: who calls (401, 403), what the path names (404), the form of the
request (413, 422), and then acts (409).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec
from fastapi import APIRouter, Request, Response

from hisab_contracts.events import EARLIEST_MS, LATEST_MS
from hisab_contracts.ids import HubCode, PriceClass, Sku, SourcePath
from hisab_contracts.reference import HubRecord
from hisab_contracts.topics import HUBS, PRICES, hub_topic
from hisab_contracts.units import hour_floor_ms, instant_ms, is_whole_hour
from metering import answers, gateway, lookup, store
from metering.answers import (
    AllocationAnswer,
    Dismissal,
    EventProblem,
    EventResult,
    EventResults,
    HubAnswer,
    HubState,
    NewHub,
    PriceVersionAnswer,
    ProposedPrices,
    QuarantineItem,
    QuarantineState,
    Quote,
    QuoteRequest,
    ReconciliationAnswer,
    Retirement,
    RetirementAnswer,
    SourceView,
)
from metering.rating import (
    MAX_MICRO_PER_GPU_HOUR,
    ListedPrice,
    PriceBook,
    PriceList,
    Series,
    displaced,
    lines_of,
    overlap,
    past,
    quote_micro,
)
from metering.release import judge_again
from metering.store import Known
from metering.waiting import dismiss
from runtime.auth import Principal, Role
from runtime.database import ALL_TENANTS
from runtime.http import (
    Answer,
    Nothing,
    Page,
    Place,
    Problem,
    check_depth,
    command_of,
    idempotent,
    json_response,
    operation,
    page_of,
    page_response,
    read_body,
    read_bytes,
)
from runtime.kafka import Message, MessageTooLarge, PublishFailed, Topic
from runtime.service import Kit
from runtime.streams import Outbox
from runtime.telemetry import trace_headers

if TYPE_CHECKING:
    from runtime.database import Connection

DEFAULT_CURRENCY: Final = "PKR"
_WHOLE_TIME = (EARLIEST_MS - EARLIEST_MS % 3_600_000, LATEST_MS)


class Endpoints:
    """What the endpoints share. One per process."""

    def __init__(self, kit: Kit, outbox: Outbox, follow: Callable[[HubCode], None]) -> None:
        """`follow` has this process read the topic of a hub from now on."""
        self.kit = kit
        self.outbox = outbox
        self.follow = follow
        self.known = Known()


async def _registered(connection: Connection, hub: str) -> HubCode:
    """Return the code of a hub; raises `Problem` 404 when nobody registered it."""
    if not await lookup.is_hub(connection, HubCode(hub)):
        raise Problem("not-found", f"no hub {hub} is registered")
    return HubCode(hub)


def routes(kit: Kit, outbox: Outbox, follow: Callable[[HubCode], None]) -> APIRouter:
    """Return every endpoint of metering but `GET /v1/status`, which the kit has."""
    router = APIRouter()
    shared = Endpoints(kit, outbox, follow)
    _add_events(router, shared)
    _add_accounts(router, shared)
    _add_quarantine(router, shared)
    _add_quarantine_commands(router, shared)
    _add_prices(router, shared)
    _add_hubs(router, shared)
    _add_hub_commands(router, shared)
    return router


def _add_events(router: APIRouter, shared: Endpoints) -> None:
    kit = shared.kit

    @router.post(
        "/v1/events", **operation(answer=EventResults, problems=("too-large", "malformed"))
    )
    async def take_events(request: Request) -> Response:
        """Take events of the caller's own hub: one, a JSON array, or one per line."""
        principal = await kit.access.authorise(request, Role.HUB)
        own_hub = principal.hub or ""
        body = await read_bytes(request, max_bytes=gateway.MAX_BODY_BYTES)
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type not in _EVENT_MEDIA_TYPES:
            raise Problem("unsupported-media-type", f"send one of {', '.join(_EVENT_MEDIA_TYPES)}")
        check_depth(body)
        events = gateway.split_body(body, media_type)
        if not events or len(events) > gateway.MAX_EVENTS:
            raise Problem("malformed", f"send 1 to {gateway.MAX_EVENTS} events as JSON")
        trace = trace_headers()
        verdicts = [gateway.judge(event, HubCode(own_hub), trace) for event in events]
        async with kit.api.connection() as connection:
            hub = await _registered(connection, own_hub)
            paths = sorted({one.path for one in verdicts if one.path is not None})
            known = await lookup.sources_named(connection, hub, paths)
        outcomes = gateway.outcomes(verdicts, known)
        await _publish(kit, [one.message for one in verdicts if one.message is not None])
        results = [
            EventResult(
                one.event_id,
                outcome,
                None if one.refused is None else EventProblem(**gateway.problem_of(one.refused)),
            )
            for one, outcome in zip(verdicts, outcomes, strict=True)
        ]
        return json_response(EventResults(results))


_EVENT_MEDIA_TYPES: Final = (
    "application/json",
    "application/cloudevents+json",
    "application/cloudevents-batch+json",
    "application/x-ndjson",
)


async def _publish(kit: Kit, messages: list[Message]) -> None:
    """Make events durable; without all acknowledgements nothing is promised."""
    if not messages:
        return
    try:
        await kit.kafka.publish(messages)
    except MessageTooLarge as error:
        raise Problem("too-large", str(error)) from error
    except PublishFailed as error:
        raise Problem("unavailable", "Kafka did not acknowledge; send the events again") from error


def _add_accounts(router: APIRouter, shared: Endpoints) -> None:
    kit = shared.kit

    @router.get(
        "/v1/reconciliation",
        **operation(
            answer=ReconciliationAnswer, query=("hub", "from", "until"), problems=("malformed",)
        ),
    )
    async def reconcile(request: Request) -> Response:
        """Account for every GPU-nanosecond and record that a hub reported."""
        principal = await kit.access.authorise(request, Role.HUB, Role.OPERATOR, Role.AUDITOR)
        asked = request.query_params.get("hub", principal.hub)
        if asked is not None:
            _own_hub(principal, asked)
        async with kit.api.transaction(tenant=principal.sees) as connection:
            hub = None if asked is None else await _registered(connection, asked)
            from_ms = _hour_of(request, "from", _WHOLE_TIME[0])
            until_ms = _hour_of(request, "until", _WHOLE_TIME[1])
            complete = await lookup.completeness(connection, hub)
            hubs = [one.hub for one in complete]
            found = await lookup.reconcile(connection, hubs, from_ms, until_ms)
        return json_response(answers.reconciliation(found, complete))

    @router.get("/v1/allocations/{hub}/{allocation_id}", **operation(answer=AllocationAnswer))
    async def drill_down(request: Request, hub: str, allocation_id: str) -> Response:
        """Show all that is known of an allocation."""
        principal = await kit.access.authorise(
            request, Role.TENANT, Role.HUB, Role.OPERATOR, Role.AUDITOR
        )
        _own_hub(principal, hub)
        async with kit.api.transaction(tenant=principal.sees) as connection:
            found = await lookup.allocation(connection, HubCode(hub), allocation_id)
        if found is None:
            raise Problem("not-found", f"nothing is known of allocation {allocation_id} at {hub}")
        return json_response(answers.allocation(found))


def _hour_of(request: Request, name: str, default_ms: int) -> int:
    """Read a window's end from the query: a whole UTC hour."""
    text = request.query_params.get(name)
    if text is None:
        return default_ms
    return _whole_hour(name, text)


def _whole_hour(name: str, text: str) -> int:
    try:
        found_ms = instant_ms(text)
    except ValueError as error:
        raise Problem("malformed", f"{name}: {error}") from error
    if not is_whole_hour(found_ms) or not _WHOLE_TIME[0] <= found_ms <= _WHOLE_TIME[1]:
        raise Problem("malformed", f"{name} must be a whole UTC hour from 2020 to 2100")
    return found_ms


def _own_hub(principal: Principal, hub: str) -> None:
    if principal.role is Role.HUB and principal.hub != hub:
        raise Problem("forbidden", "a hub's key is for its own hub")


def _add_quarantine(router: APIRouter, shared: Endpoints) -> None:
    kit = shared.kit

    @router.get(
        "/v1/quarantine",
        **operation(answer=QuarantineItem, paged=True, query=("hub", "reason", "state")),
    )
    async def list_quarantined(request: Request) -> Response:
        """List quarantined records with their bytes, in the order they were set aside."""
        principal = await kit.access.authorise(request, Role.OPERATOR, Role.AUDITOR, Role.HUB)
        query = request.query_params
        asked = lookup.Asked(
            query.get("hub", principal.hub), query.get("reason"), query.get("state")
        )
        if asked.hub is not None:
            _own_hub(principal, asked.hub)
        page = page_of(request, tuple[Place])
        (after,) = page.after or (0,)
        async with kit.api.transaction(tenant=principal.sees) as connection:
            items, more = await lookup.quarantined(connection, asked, after, page.limit)
        shown = [answers.quarantine_item(item) for item in items]
        if more:  # A page may be cut by its bytes before its limit is reached.
            page = Page(len(shown), page.after)
            shown.append(shown[-1])
        return page_response(shown, page, lambda item: (int(item.quarantine_id),))


def _add_quarantine_commands(router: APIRouter, shared: Endpoints) -> None:
    kit = shared.kit

    @router.post(
        "/v1/quarantine/{quarantine_id}/replay",
        **operation(
            answer=QuarantineState, status=202, idempotent=True, problems=("quarantine-closed",)
        ),
    )
    async def replay(request: Request, quarantine_id: str) -> Response:
        """Judge a quarantined record again; what still cannot be billed of it stays open."""
        principal = await kit.access.authorise(request, Role.OPERATOR)
        number = await _open_record(kit, quarantine_id)
        command = command_of(request, await _nothing(request), scope=principal.role)

        async def run(connection: Connection) -> Answer:
            because = f"replayed by key:{principal.key_id}"
            closed = await judge_again(
                connection, shared.outbox, shared.known, [number], because, _now_ms()
            )
            if closed:
                raise Problem("quarantine-closed", f"the record is {closed[0].state}")
            state = await lookup.quarantine_state(connection, number) or ""
            return Answer(202, QuarantineState(quarantine_id, state))

        return await idempotent(kit.api, command, run, tenant=principal.sees)

    @router.post(
        "/v1/quarantine/{quarantine_id}/dismiss",
        **operation(
            answer=QuarantineState,
            body=Dismissal,
            idempotent=True,
            problems=("quarantine-closed",),
        ),
    )
    async def dismiss_record(request: Request, quarantine_id: str) -> Response:
        """Leave a record in quarantine for good: it blocks no period any more."""
        principal = await kit.access.authorise(request, Role.OPERATOR)
        number = await _open_record(kit, quarantine_id)
        body = await read_body(request, Dismissal)
        command = command_of(request, body, scope=principal.role)

        async def run(connection: Connection) -> Answer:
            because = f"dismissed by key:{principal.key_id}: {body.reason}"
            if not await dismiss(connection, number, because):
                state = await lookup.quarantine_state(connection, number)
                raise Problem("quarantine-closed", f"the record is {state}")
            return Answer(200, QuarantineState(quarantine_id, "dismissed"))

        return await idempotent(kit.api, command, run, tenant=principal.sees)


async def _open_record(kit: Kit, quarantine_id: str) -> int:
    """Return the number of a quarantined record; raises `Problem` 404 when there is none."""
    if re.fullmatch(r"[1-9][0-9]{0,17}", quarantine_id):
        async with kit.api.transaction(tenant=ALL_TENANTS) as connection:
            if await lookup.quarantine_state(connection, int(quarantine_id)) is not None:
                return int(quarantine_id)
    raise Problem("not-found", f"there is no quarantined record {quarantine_id}")


async def _nothing(request: Request) -> Nothing:
    """Read a command that says nothing more: `{}`, or no body at all."""
    if request.headers.get("content-length", "0") == "0":
        return Nothing()
    return await read_body(request, Nothing)


def _add_prices(router: APIRouter, shared: Endpoints) -> None:
    kit = shared.kit

    @router.post(
        "/v1/price-lists",
        **operation(
            answer=PriceVersionAnswer,
            body=ProposedPrices,
            status=201,
            idempotent=True,
            problems=("price-overlap", "price-past"),
        ),
    )
    async def add_prices(request: Request) -> Response:
        """Add a price list; its lines are in force from their start on, for ever unchanged."""
        principal = await kit.access.authorise(request, Role.OPERATOR)
        body = await read_body(request, ProposedPrices)
        price_list = _price_list(body)
        command = command_of(request, body, scope=principal.role)

        async def run(connection: Connection) -> Answer:
            await store.close_prices(connection)
            book = PriceBook(await store.load_price_lines(connection))
            lines = lines_of(price_list)
            refused = overlap(book, lines)
            if refused is None:
                ended = displaced(book, lines)
                refused = past(await store.rated_hours(connection, ended), ended)
            if refused is not None:
                raise Problem(refused.code, refused.detail)
            await store.add_price_list(connection, lines, principal.key_id)
            await shared.outbox.write(
                connection,
                [
                    Message(PRICES, line.rate_line_id.encode(), msgspec.json.encode(line))
                    for line in lines
                ],
            )
            return Answer(201, PriceVersionAnswer(lines[0].price_version))

        return await idempotent(kit.api, command, run, tenant=principal.sees)

    @router.post("/v1/quotes", **operation(answer=Quote, body=QuoteRequest, problems=("no-price",)))
    async def quote(request: Request) -> Response:
        """Price whole devices for a duration at what is in force now."""
        principal = await kit.access.authorise(
            request, Role.OPERATOR, Role.AUDITOR, Role.SCHEDULER, Role.TENANT
        )
        body = await read_body(request, QuoteRequest)
        hour_ms = hour_floor_ms(_now_ms())
        async with kit.api.transaction(tenant=principal.sees) as connection:
            currency = await store.currency_of(connection, principal.tenant_id) or DEFAULT_CURRENCY
            series = Series(currency, Sku(body.sku), PriceClass(body.price_class))
            lines = await store.last_price_line(connection, series, hour_ms)
        line = PriceBook(lines).line_at(series, hour_ms)
        if line is None:
            raise Problem("no-price", f"no price for {body.sku}, {body.price_class} now")
        amount = quote_micro(line, body.gpus, body.duration_ms)
        return json_response(Quote(str(amount), line.price_version))


def _price_list(body: ProposedPrices) -> PriceList:
    """Read a proposed list; raises `Problem` 422 for windows off the hour and prices too high."""
    from_ms = _WHOLE_TIME[0]
    if body.valid_from is not None:
        from_ms = _whole_hour("valid_from", body.valid_from)
    until_ms = None
    if body.valid_until is not None:
        until_ms = _whole_hour("valid_until", body.valid_until)
        if until_ms <= from_ms:
            raise Problem("malformed", "valid_until must be after valid_from")
    prices = []
    for price in body.prices:
        micro = int(price.micro_per_gpu_hour)
        if not 0 <= micro <= MAX_MICRO_PER_GPU_HOUR:
            bound = f"micro_per_gpu_hour must be from 0 to {MAX_MICRO_PER_GPU_HOUR}"
            raise Problem("malformed", bound)
        prices.append(ListedPrice(Sku(price.sku), PriceClass(price.price_class), micro))
    return PriceList(body.currency, from_ms, until_ms, tuple(prices))


def _add_hubs(router: APIRouter, shared: Endpoints) -> None:
    kit = shared.kit

    @router.get("/v1/hubs/{hub}", **operation(answer=HubState))
    async def show_hub(request: Request, hub: str) -> Response:
        """Show how far a hub is complete, and what holds it."""
        principal = await kit.access.authorise(request, Role.HUB, Role.OPERATOR, Role.AUDITOR)
        _own_hub(principal, hub)
        async with kit.api.transaction(tenant=principal.sees) as connection:
            [told] = await lookup.views(connection, await _registered(connection, hub))
        return json_response(answers.hub_state(told, _now_ms()))

    @router.get("/v1/hubs/{hub}/sources", **operation(answer=SourceView, paged=True))
    async def list_sources(request: Request, hub: str) -> Response:
        """List the sources of a hub: what an agent's spool may forget, and what is missing."""
        principal = await kit.access.authorise(request, Role.HUB, Role.OPERATOR, Role.AUDITOR)
        _own_hub(principal, hub)
        page = page_of(request, tuple[str])
        (after,) = page.after or ("",)
        async with kit.api.transaction(tenant=principal.sees) as connection:
            code = await _registered(connection, hub)
            found = await lookup.sources(connection, code, after, page.limit + 1)
        shown = [answers.source_view(source) for source in found]
        return page_response(shown, page, lambda source: (source.source,))


def _add_hub_commands(router: APIRouter, shared: Endpoints) -> None:
    kit = shared.kit

    @router.post(
        "/v1/hubs",
        **operation(
            answer=HubAnswer,
            body=NewHub,
            status=201,
            idempotent=True,
            problems=("already-exists",),
        ),
    )
    async def add_hub(request: Request) -> Response:
        """Register a hub: its topic is made, and read from its first record."""
        principal = await kit.access.authorise(request, Role.OPERATOR)
        body = await read_body(request, NewHub)
        command = command_of(request, body, scope=principal.role)
        hub = HubCode(body.hub)
        # First the topic: should we die between the two, the command is simply sent again.
        await kit.kafka.create_topics(
            [Topic(hub_topic(hub), kit.settings.hub_partitions, log_append_time=True)]
        )

        async def run(connection: Connection) -> Answer:
            if not await store.add_hub(connection, hub, body.name, body.heartbeat_ms):
                raise Problem("already-exists", f"hub {hub} is registered")
            record = HubRecord(hub, body.heartbeat_ms)
            message = Message(HUBS, hub.encode(), msgspec.json.encode(record))
            await shared.outbox.write(connection, [message])
            return Answer(201, HubAnswer(hub, body.name, body.heartbeat_ms, hub_topic(hub)))

        response = await idempotent(kit.api, command, run, tenant=principal.sees)
        shared.follow(hub)
        return response

    @router.post(
        "/v1/hubs/{hub}/sources/retire",
        **operation(
            answer=RetirementAnswer,
            body=Retirement,
            idempotent=True,
            problems=("source-unknown",),
        ),
    )
    async def retire(request: Request, hub: str) -> Response:
        """Have a source count no longer for its hub's completeness."""
        principal = await kit.access.authorise(request, Role.OPERATOR)
        async with kit.api.transaction(tenant=principal.sees) as connection:
            code = await _registered(connection, hub)
        body = await read_body(request, Retirement)
        command = command_of(request, body, scope=principal.role)

        async def run(connection: Connection) -> Answer:
            source = SourcePath(body.source)
            because = f"key:{principal.key_id}: {body.reason}"
            if not await store.retire_source(connection, code, source, because):
                raise Problem("source-unknown", f"{hub} has no active source {body.source}")
            return Answer(200, RetirementAnswer(body.source, "retired"))

        return await idempotent(kit.api, command, run, tenant=principal.sees)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
