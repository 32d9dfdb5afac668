"""`/v1/hubs/{hub}/sources`: what an agent's spool may forget, what is missing, and retirement.

Retiring answers 409 `source-unknown` for a source that is not active.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from fastapi import Request, Response

from hisab_contracts.ids import SourcePath
from hisab_contracts.reference import Role
from hisab_contracts.units import optional_instant_text
from metering.api.problems import problem_of
from metering.api.requests import Reason, find_hub, require_own_hub
from metering.commands import retire_source
from metering.core.sources import SourceProgress
from metering.store import hubs
from runtime.http import Model, Resource, get, page_of, page_response, post
from runtime.idempotency import Answer, read_command, run_command
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection


class SequenceGap(msgspec.Struct, frozen=True):
    """Sequences that never arrived, both ends included."""

    first_sequence: str
    last_sequence: str


class SourceView(msgspec.Struct, frozen=True):
    """A source: up to which sequence its spool may forget, its watermark, what is missing."""

    source: str
    committed_sequence: str
    watermark_at: str | None
    gaps: list[SequenceGap]
    standing: str


class Retirement(Model, frozen=True, kw_only=True):
    """A source to retire: its hub's completeness hangs on it no longer."""

    source: str
    reason: Reason


class RetirementAnswer(msgspec.Struct, frozen=True):
    """The source that was retired."""

    source: str
    standing: str


class Sources(Resource):
    """`/v1/hubs/{hub}/sources`: the agents of a hub, epoch by epoch."""

    def __init__(self, kit: Kit) -> None:
        """Answer from the database of the `api` role."""
        self._kit = kit

    @get(
        "/v1/hubs/{hub}/sources",
        roles=(Role.HUB, Role.OPERATOR, Role.AUDITOR),
        others={Role.HUB: "forbidden"},
        answer=SourceView,
        paged=True,
    )
    async def list_sources(self, request: Request, hub: str) -> Response:
        """List the sources of a hub: what an agent's spool may forget, and what is missing."""
        principal = await self._kit.access.authorise(request)
        require_own_hub(principal, hub)
        page = page_of(request, tuple[str])
        (after,) = page.after or ("",)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            code = await find_hub(connection, hub)
            found, more = await hubs.list_sources(connection, code, after, page.limit)
        shown = [source_view(source) for source in found]
        return page_response(shown, page, lambda source: (source.source,), more=more)

    @post(
        "/v1/hubs/{hub}/sources/retire",
        roles=(Role.OPERATOR,),
        body=Retirement,
        answer=RetirementAnswer,
        idempotent=True,
        problems=("source-unknown",),
    )
    async def retire(self, request: Request, hub: str) -> Response:
        """Retire a source: it no longer counts for its hub's completeness."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            code = await find_hub(connection, hub)
        command = await read_command(request, Retirement)
        body = command.body

        async def run(connection: Connection) -> Answer:
            because = f"{principal.actor}: {body.reason}"
            retired = await retire_source(connection, code, SourcePath(body.source), because)
            if not isinstance(retired, SourceProgress):
                raise problem_of(retired)
            return Answer(200, RetirementAnswer(body.source, retired.standing))

        return await run_command(
            self._kit.api, command, run, scope=principal.role_scope, tenant=principal.sees
        )


def source_view(source: SourceProgress) -> SourceView:
    """Show a source."""
    return SourceView(
        source=source.path,
        committed_sequence=str(source.contiguous_sequence),
        watermark_at=optional_instant_text(source.watermark_ms),
        gaps=[SequenceGap(str(first), str(until - 1)) for first, until in source.gaps],
        standing=source.standing,
    )
