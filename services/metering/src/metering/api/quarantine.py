"""`/v1/quarantine`: an operator has records judged again, or leaves them there for good.

Both commands answer 409 `quarantine-closed` for a record that is no longer open.
"""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING

import msgspec
from fastapi import Request, Response

from hisab_contracts.reference import Role
from hisab_contracts.units import optional_instant_text
from metering.api.problems import problem_of
from metering.api.requests import Reason, require_own_hub
from metering.commands import dismiss_record, replay_record
from metering.core.quarantine import QuarantineClosed
from metering.store import quarantine
from metering.store.quarantine import ListedQuarantine, QuarantineFilter
from metering.store.state import ReferenceCache
from runtime.database import ALL_TENANTS
from runtime.http import (
    Model,
    NoBody,
    Position,
    Problem,
    Resource,
    get,
    page_of,
    page_response,
    post,
)
from runtime.idempotency import Answer, read_command, run_command
from runtime.outbox import Outbox
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection


class HeaderView(msgspec.Struct, frozen=True):
    """One header of a record."""

    name: str
    value_base64: str | None


class QuarantineItem(msgspec.Struct, frozen=True):
    """A quarantined record, its bytes as they were received.

    A record that was released keeps its bytes for 90 days: after `forgotten_at` they are null.
    """

    quarantine_id: str
    topic: str
    partition: int
    offset: int
    reason: str
    detail: str
    payload_base64: str | None
    headers: list[HeaderView]
    state: str
    forgotten_at: str | None


class QuarantineAnswer(msgspec.Struct, frozen=True):
    """The state of a quarantined record after a command."""

    quarantine_id: str
    state: str


class Dismissal(Model, frozen=True, kw_only=True):
    """Why a record is dismissed."""

    reason: Reason


class Quarantine(Resource):
    """`/v1/quarantine`: list, replay, dismiss."""

    def __init__(self, kit: Kit, outbox: Outbox) -> None:
        """Write what a replay states to this outbox."""
        self._kit = kit
        self._outbox = outbox
        self._cache = ReferenceCache()

    @get(
        "/v1/quarantine",
        roles=(Role.OPERATOR, Role.AUDITOR, Role.HUB),
        others={Role.HUB: "forbidden"},
        answer=QuarantineItem,
        paged=True,
        query=("hub", "reason", "state"),
    )
    async def list_quarantined(self, request: Request) -> Response:
        """List quarantined records with their bytes, in the order they were set aside."""
        principal = await self._kit.access.authorise(request)
        query = request.query_params
        wanted = QuarantineFilter(
            query.get("hub", principal.bound_to), query.get("reason"), query.get("state")
        )
        if wanted.hub is not None:
            require_own_hub(principal, wanted.hub)
        page = page_of(request, tuple[Position])
        (after,) = page.after or (0,)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            found, more = await quarantine.list_quarantined(connection, wanted, after, page.limit)
        shown = [quarantine_item(record) for record in found]
        # A page may be cut by its bytes before its limit is reached.
        return page_response(shown, page, lambda item: (int(item.quarantine_id),), more=more)

    @post(
        "/v1/quarantine/{quarantine_id}/replay",
        roles=(Role.OPERATOR,),
        body=NoBody,
        answer=QuarantineAnswer,
        status=202,
        idempotent=True,
        problems=("quarantine-closed",),
    )
    async def replay(self, request: Request, quarantine_id: str) -> Response:
        """Judge a quarantined record again; what still cannot be billed of it stays open."""
        principal = await self._kit.access.authorise(request)
        number = await self._existing_id(quarantine_id)
        command = await read_command(request, NoBody)

        async def run(connection: Connection) -> Answer:
            because = f"replayed by {principal.actor}"
            state = await replay_record(connection, self._outbox, self._cache, number, because)
            if isinstance(state, QuarantineClosed):
                raise problem_of(state)
            return Answer(202, QuarantineAnswer(quarantine_id, state))

        return await run_command(
            self._kit.api, command, run, scope=principal.role_scope, tenant=principal.sees
        )

    @post(
        "/v1/quarantine/{quarantine_id}/dismiss",
        roles=(Role.OPERATOR,),
        body=Dismissal,
        answer=QuarantineAnswer,
        idempotent=True,
        problems=("quarantine-closed",),
    )
    async def dismiss_record(self, request: Request, quarantine_id: str) -> Response:
        """Leave a record in quarantine for good: it blocks no period any more."""
        principal = await self._kit.access.authorise(request)
        number = await self._existing_id(quarantine_id)
        command = await read_command(request, Dismissal)

        async def run(connection: Connection) -> Answer:
            because = f"dismissed by {principal.actor}: {command.body.reason}"
            state = await dismiss_record(connection, self._outbox, number, because)
            if isinstance(state, QuarantineClosed):
                raise problem_of(state)
            return Answer(200, QuarantineAnswer(quarantine_id, state))

        return await run_command(
            self._kit.api, command, run, scope=principal.role_scope, tenant=principal.sees
        )

    async def _existing_id(self, quarantine_id: str) -> int:
        """Return the number of a quarantined record; raises `Problem` 404 when there is none."""
        if re.fullmatch(r"[1-9][0-9]{0,17}", quarantine_id):
            async with self._kit.api.transaction(tenant=ALL_TENANTS) as connection:
                state = await quarantine.quarantine_state(connection, int(quarantine_id))
            if state is not None:
                return int(quarantine_id)
        raise Problem("not-found", f"there is no quarantined record {quarantine_id}")


def quarantine_item(record: ListedQuarantine) -> QuarantineItem:
    """Show a quarantined record."""
    return QuarantineItem(
        quarantine_id=str(record.quarantine_id),
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        reason=record.reason,
        detail=record.detail,
        payload_base64=_base64(record.payload),
        headers=[HeaderView(name, _base64(value)) for name, value in record.headers],
        state=record.state,
        forgotten_at=optional_instant_text(record.forgotten_ms),
    )


def _base64(value: bytes | None) -> str | None:
    return None if value is None else base64.b64encode(value).decode()
