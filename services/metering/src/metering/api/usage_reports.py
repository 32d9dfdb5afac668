"""`/v1/usage`: what was used, added up by any of its keys and by hour, day or month of Karachi.

In pages as JSON, or whole as CSV or NDJSON for whoever accepts one of them: those are of one
instant, and every line says up to when usage is complete. What is grouped by is in an item, and
nothing else is.
"""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
from fastapi import Request, Response
from msgspec import UNSET, UnsetType

from hisab_contracts.ids import HubCode, PriceClass, ProjectId, Sku, TenantId
from hisab_contracts.reference import Role
from hisab_contracts.units import (
    floor_gpu_ms,
    instant_text,
    karachi_date_on,
    month_of,
    optional_instant_text,
)
from metering.api.requests import (
    FIRST_HOUR_MS,
    LAST_HOUR_MS,
    find_hub,
    read_whole_hour,
    require_own_hub,
)
from metering.core.usage_reports import (
    INTERVALS,
    KEYS,
    UsageInterval,
    UsageKey,
    UsageLine,
    UsagePlace,
    UsageReport,
)
from metering.core.watermarks import complete_until_ms
from metering.store import hubs, prices, usage_reports
from runtime.auth import Principal
from runtime.http import Problem, Resource, encode, get, json_response, next_cursor, page_of
from runtime.service import Kit
from runtime.streams import CSV, LINES, Streams, accepted_form

if TYPE_CHECKING:
    from runtime.database import Connection

T = TypeVar("T")

LINES_READ: Final = 10_000
"""Lines of a whole list that one look at the database brings."""
LINES_OF_A_PIECE: Final = 1_000
"""Lines that are made into bytes, and sent, before anybody else has a turn."""
INTERVAL_MEMBERS: Final = {"hour": "hour_at", "day": "on", "month": "month"}
SUM_MEMBERS: Final = (
    "gpu_ns",
    "gpu_ms",
    "charge_micro",
    "refunded_micro",
    "voided_gpu_ns",
    "voided_gpu_ms",
)


class UsageItem(msgspec.Struct, frozen=True, kw_only=True):
    """What was used in one interval under one value of each key that is grouped by.

    `charge_micro` is before refunds; `refunded_micro` is what was given back of it. Voided time was
    reported under these terms and taken back: it is not in `gpu_ns`. Sums are exact in GPU-ns; a
    `gpu_ms` is the floor of its sum.
    """

    hour_at: str | UnsetType = UNSET
    on: str | UnsetType = UNSET
    """A day of Asia/Karachi."""
    month: str | UnsetType = UNSET
    """A billing month, `yyyy-mm`."""
    tenant_id: str | UnsetType = UNSET
    hub: str | UnsetType = UNSET
    project_id: str | UnsetType = UNSET
    sku: str | UnsetType = UNSET
    price_class: str | UnsetType = UNSET
    gpu_ns: str
    gpu_ms: str
    charge_micro: str
    refunded_micro: str
    voided_gpu_ns: str
    voided_gpu_ms: str


class UsageAnswer(msgspec.Struct, frozen=True):
    """A page of a report. Usage before `complete_until` is all there: of the hub, or of all."""

    items: list[UsageItem]
    next: str | None
    complete_until: str | None


class UsageReports(Resource):
    """`/v1/usage`: sums of usage."""

    def __init__(self, kit: Kit) -> None:
        """Answer from the database of the `api` role."""
        self._kit = kit
        self._streams = Streams()

    @get(
        "/v1/usage",
        roles=(Role.TENANT, Role.HUB, Role.OPERATOR, Role.AUDITOR),
        others={Role.TENANT: "not-found", Role.HUB: "forbidden"},
        answer=UsageAnswer,
        query=(
            "tenant_id",
            "hub",
            "sku",
            "project_id",
            "price_class",
            "from",
            "until",
            "group_by",
            "interval",
            "limit",
            "cursor",
        ),
        forms=(CSV, LINES),
    )
    async def usage(self, request: Request) -> Response:
        """Add usage up by hub, SKU, project, class, tenant, and by hour, day or month."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            await _find_named(connection, request, principal)
        report = _read_report(request, principal)
        form = accepted_form(request, (CSV, LINES))
        if form is not None:
            if not {"limit", "cursor"}.isdisjoint(request.query_params):
                raise Problem("malformed", f"{form} is the whole list: it has no limit, no cursor")
            return await self._stream(principal, report, form)
        page = page_of(request, UsagePlace)
        async with self._kit.api.transaction(tenant=principal.sees, snapshot=True) as connection:
            complete_until = await _complete_until(connection, report)
            lines = await usage_reports.list_usage(connection, report, page.after, page.limit + 1)
        shown = lines[: page.limit]
        ended = shown[-1].place if len(lines) > page.limit else None
        items = [usage_item(line, report) for line in shown]
        return json_response(UsageAnswer(items, next_cursor(page, ended), complete_until))

    async def _stream(self, principal: Principal, report: UsageReport, form: str) -> Response:
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            complete_until = await _complete_until(connection, report)
        headers = {} if complete_until is None else {"complete-until": complete_until}
        pieces = self._pieces(principal, report, form, complete_until)
        return self._streams.response(pieces, form, headers)

    async def _pieces(
        self, principal: Principal, report: UsageReport, form: str, complete_until: str | None
    ) -> AsyncGenerator[bytes, None]:
        """Make the whole list out of one snapshot, so many lines at a time."""
        members = _members(report)
        head = _csv([members]) if form == CSV else b""
        after: UsagePlace | None = None
        more = True
        async with self._kit.api.transaction(tenant=principal.sees, snapshot=True) as connection:
            while more:
                lines = await usage_reports.list_usage(connection, report, after, LINES_READ + 1)
                more = len(lines) > LINES_READ
                after = lines[LINES_READ - 1].place if more else None
                for begin in range(0, min(len(lines), LINES_READ), LINES_OF_A_PIECE):
                    shown = [
                        msgspec.to_builtins(usage_item(line, report))
                        | {"complete_until": complete_until}
                        for line in lines[begin : min(begin + LINES_OF_A_PIECE, LINES_READ)]
                    ]
                    if form == CSV:
                        yield head + _csv([[line[member] for member in members] for line in shown])
                    else:
                        yield b"".join(encode(line) + b"\n" for line in shown)
                    head = b""
        if head:
            yield head


async def _find_named(connection: Connection, request: Request, principal: Principal) -> None:
    """Look up whom a report names; raises `Problem` 403 or 404."""
    query = request.query_params
    tenant_id = query.get("tenant_id")
    if tenant_id is not None:
        # A tenant's key cannot tell another tenant from one that does not exist.
        another = principal.tenant_id not in {None, tenant_id}
        if another or not await prices.currencies_of(connection, [TenantId(tenant_id)]):
            raise Problem("not-found", f"no tenant {tenant_id} is known")
    if "hub" in query:
        require_own_hub(principal, query["hub"])
        await find_hub(connection, query["hub"])


def _read_report(request: Request, principal: Principal) -> UsageReport:
    """Read what is asked; raises `Problem` 422."""
    query = request.query_params
    from_ms = read_whole_hour("from", query["from"]) if "from" in query else FIRST_HOUR_MS
    until_ms = read_whole_hour("until", query["until"]) if "until" in query else LAST_HOUR_MS
    if from_ms >= until_ms:
        raise Problem("malformed", "until must lie after from")
    keys, interval = _read_grouping(query.get("group_by"), query.get("interval"))
    return UsageReport(
        # What a key may see, row-level security decides; this is what finds it by an index.
        tenant_id=_given(TenantId, query.get("tenant_id", principal.tenant_id)),
        hub=_given(HubCode, query.get("hub", principal.bound_to)),
        project_id=_given(ProjectId, query.get("project_id")),
        sku=_given(Sku, query.get("sku")),
        price_class=_given(PriceClass, query.get("price_class")),
        from_ms=from_ms,
        until_ms=until_ms,
        keys=keys,
        interval=interval,
    )


def _given(kind: Callable[[str], T], text: str | None) -> T | None:
    return None if text is None else kind(text)


def _read_grouping(
    group_by: str | None, interval: str | None
) -> tuple[frozenset[UsageKey], UsageInterval | None]:
    """Read what is grouped by: by every key where nothing is said, by none where it is empty.

    An interval may stand among the keys, or by itself.
    """
    grouped_by = ",".join(KEYS) if group_by is None else group_by
    named = {name.strip() for name in grouped_by.split(",")} - {""}
    if interval is not None and interval not in INTERVALS:
        raise Problem("malformed", f"interval is one of {', '.join(INTERVALS)}")
    unknown = sorted(named - {*KEYS, *INTERVALS})
    if unknown:
        known = ", ".join((*KEYS, *INTERVALS))
        raise Problem("malformed", f"group_by {unknown[0][:64]!r} is none of {known}")
    intervals = [known for known in INTERVALS if known == interval or known in named]
    if len(intervals) > 1:
        raise Problem("malformed", f"group by one interval, not by {' and '.join(intervals)}")
    return frozenset(key for key in KEYS if key in named), intervals[0] if intervals else None


async def _complete_until(connection: Connection, report: UsageReport) -> str | None:
    """Say up to when usage is complete: of the hub asked for, or of all; read before the sums."""
    hub = None if report.hub is None else await find_hub(connection, report.hub)
    return optional_instant_text(complete_until_ms(await hubs.list_completeness(connection, hub)))


def usage_item(line: UsageLine, report: UsageReport) -> UsageItem:
    """Show a line of a report, with what it is grouped by."""
    place = line.place
    keys: dict[str, str] = {key: getattr(place, key) for key in report.keys}
    match report.interval:
        case "hour":
            keys["hour_at"] = instant_text(place.start_ms)
        case "day":
            keys["on"] = karachi_date_on(place.start_ms).isoformat()
        case "month":
            keys["month"] = month_of(place.start_ms)
        case None:
            pass
    return UsageItem(
        **keys,
        gpu_ns=str(line.gpu_ns),
        gpu_ms=str(floor_gpu_ms(line.gpu_ns)),
        charge_micro=str(line.charge_micro),
        refunded_micro=str(line.refunded_micro),
        voided_gpu_ns=str(line.voided_gpu_ns),
        voided_gpu_ms=str(floor_gpu_ms(line.voided_gpu_ns)),
    )


def _members(report: UsageReport) -> list[str]:
    """Return the columns of a report in order."""
    interval = [] if report.interval is None else [INTERVAL_MEMBERS[report.interval]]
    keys = [key for key in KEYS if key in report.keys]
    return [*interval, *keys, *SUM_MEMBERS, "complete_until"]


def _csv(rows: Sequence[Sequence[str | None]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()
