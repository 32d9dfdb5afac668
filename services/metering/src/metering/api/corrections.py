"""`/v1/corrections`: what was reported was wrong; one operator says so, another approves.

Approving answers 403 `maker-is-checker` to whoever proposed it; both decisions answer 409
`already-decided` for a correction that was decided before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from fastapi import Request, Response
from msgspec import Meta

from hisab_contracts.events import Correction, Replacement, correction_fault
from hisab_contracts.ids import (
    AllocationId,
    CorrectionId,
    HubCode,
    HubText,
    IdText,
    NodeId,
    PriceClass,
    ProjectId,
    Sku,
    SliceId,
    TenantId,
)
from hisab_contracts.reference import Role
from hisab_contracts.units import instant_text, optional_instant_text
from metering.api.problems import problem_of
from metering.api.requests import (
    FIRST_HOUR_MS,
    LAST_HOUR_MS,
    Reason,
    find_hub,
    require_own_hub,
)
from metering.core.proposals import ProposedCorrection
from metering.corrections import approve_correction, propose_correction, reject_correction
from metering.store import proposals
from metering.store.proposals import CorrectionFilter, ListedCorrection
from metering.store.state import ReferenceCache
from runtime.auth import Principal
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

_Instant = Annotated[int, Meta(ge=FIRST_HOUR_MS, lt=LAST_HOUR_MS)]
_SliceText = Annotated[str, Meta(min_length=1, max_length=128)]


class ReplacementTerms(Model, frozen=True, kw_only=True):
    """The terms that usage gets; what is null stays as it was reported."""

    tenant_id: IdText | None = None
    project_id: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    sku: IdText | None = None
    price_class: IdText | None = None


class ProposeCorrection(Model, frozen=True, kw_only=True):
    """A correction as proposed; `revision` and `approved_by` are given when it is approved.

    `node_id` null: all nodes of the allocation. `slice_uuids` null: all its slices there.
    """

    hub: HubText
    allocation_id: IdText
    start_ms: _Instant
    end_ms: _Instant
    action: Literal["void", "replace"]
    reason: Reason
    node_id: IdText | None = None
    slice_uuids: Annotated[list[_SliceText], Meta(min_length=1, max_length=1024)] | None = None
    release: bool = False
    replacement: ReplacementTerms | None = None
    revision: int | None = None
    approved_by: str | None = None


class CorrectionAnswer(msgspec.Struct, frozen=True):
    """Where a proposed correction stands; it has a revision once it is approved."""

    correction_id: str
    state: str
    revision: int | None


class ReplacementView(msgspec.Struct, frozen=True):
    """The terms of a replacement; a tenant is shown no other tenant's."""

    tenant_id: str | None
    project_id: str | None
    sku: str | None
    price_class: str | None


class CorrectionView(msgspec.Struct, frozen=True):
    """A correction, of a hub (`proposed_by` is null) or of operators.

    `waits_for` says why an approved one does not count yet, or not everywhere.
    """

    correction_id: str
    hub: str
    node_id: str | None
    allocation_id: str
    slice_uuids: list[str] | None
    start_ms: int
    end_ms: int
    revision: int | None
    action: str
    release: bool
    replacement: ReplacementView | None
    reason: str
    approved_by: str | None
    state: str
    waits_for: str | None
    waits_detail: str | None
    proposed_by: str | None
    proposed_at: str
    decided_by: str | None
    decided_at: str | None


class Corrections(Resource):
    """`/v1/corrections`: no time is taken back, or given to another, by one person alone."""

    def __init__(self, kit: Kit, outbox: Outbox) -> None:
        """Write what is decided, and what it changes, to this outbox."""
        self._kit = kit
        self._outbox = outbox
        self._cache = ReferenceCache()

    @get(
        "/v1/corrections",
        roles=(Role.OPERATOR, Role.AUDITOR, Role.HUB, Role.TENANT),
        others={Role.HUB: "forbidden", Role.TENANT: "own"},
        answer=CorrectionView,
        paged=True,
        query=("hub", "allocation_id"),
    )
    async def list_corrections(self, request: Request) -> Response:
        """List corrections in order of arrival; a tenant sees those of its own allocations."""
        principal = await self._kit.access.authorise(request)
        query = request.query_params
        bound = principal.bound_to if principal.role == Role.HUB else None
        wanted = CorrectionFilter(query.get("hub", bound), query.get("allocation_id"))
        if wanted.hub is not None:
            require_own_hub(principal, wanted.hub)
        page = page_of(request, tuple[Position])
        (after,) = page.after or (0,)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            found = await proposals.list_corrections(connection, wanted, after, page.limit + 1)
        places = {listed.correction_id: listed.arrival_id for listed in found}
        shown = [correction_view(listed, principal) for listed in found]
        return page_response(shown, page, lambda item: (places[item.correction_id],))

    @post(
        "/v1/corrections",
        roles=(Role.OPERATOR,),
        body=ProposeCorrection,
        answer=CorrectionAnswer,
        status=202,
        idempotent=True,
        problems=("not-found",),
    )
    async def propose(self, request: Request) -> Response:
        """Propose a correction. It changes nothing before another operator approves it."""
        principal = await self._kit.access.authorise(request)
        command = await read_command(request, ProposeCorrection)
        correction = _correction(command.body)

        async def run(connection: Connection) -> Answer:
            await find_hub(connection, correction.hub)
            proposed = await propose_correction(connection, correction, principal.actor)
            return Answer(202, _answer(proposed))

        return await run_command(
            self._kit.api, command, run, scope=principal.role_scope, tenant=principal.sees
        )

    @post(
        "/v1/corrections/{correction_id}/approve",
        roles=(Role.OPERATOR,),
        body=NoBody,
        answer=CorrectionAnswer,
        idempotent=True,
        problems=("maker-is-checker", "already-decided"),
    )
    async def approve(self, request: Request, correction_id: str) -> Response:
        """Approve a correction that another key proposed: it counts at the next revision."""
        principal = await self._kit.access.authorise(request)
        known = await self._existing_id(correction_id)
        command = await read_command(request, NoBody)

        async def run(connection: Connection) -> Answer:
            approved = await approve_correction(
                connection, self._outbox, self._cache, known, principal.actor
            )
            if not isinstance(approved, ProposedCorrection):
                raise problem_of(approved)
            return Answer(200, _answer(approved))

        return await run_command(
            self._kit.api, command, run, scope=principal.role_scope, tenant=principal.sees
        )

    @post(
        "/v1/corrections/{correction_id}/reject",
        roles=(Role.OPERATOR,),
        body=NoBody,
        answer=CorrectionAnswer,
        idempotent=True,
        problems=("already-decided",),
    )
    async def reject(self, request: Request, correction_id: str) -> Response:
        """Reject a correction, or take one's own back: it never counts."""
        principal = await self._kit.access.authorise(request)
        known = await self._existing_id(correction_id)
        command = await read_command(request, NoBody)

        async def run(connection: Connection) -> Answer:
            rejected = await reject_correction(connection, self._outbox, known, principal.actor)
            if not isinstance(rejected, ProposedCorrection):
                raise problem_of(rejected)
            return Answer(200, _answer(rejected))

        return await run_command(
            self._kit.api, command, run, scope=principal.role_scope, tenant=principal.sees
        )

    async def _existing_id(self, correction_id: str) -> CorrectionId:
        """Return the id of a proposed correction; raises `Problem` 404 when there is none."""
        async with self._kit.api.transaction(tenant=ALL_TENANTS) as connection:
            if await proposals.is_proposal(connection, correction_id):
                return CorrectionId(correction_id)
        raise Problem("not-found", f"nobody proposed a correction {correction_id}")


def _correction(body: ProposeCorrection) -> Correction:
    """Read a proposed correction; raises `Problem` 422 for one that makes no sense."""
    terms = body.replacement
    correction = Correction(
        hub=HubCode(body.hub),
        allocation_id=AllocationId(body.allocation_id),
        start_ms=body.start_ms,
        end_ms=body.end_ms,
        revision=1,
        action=body.action,
        reason=body.reason,
        node_id=None if body.node_id is None else NodeId(body.node_id),
        slice_uuids=None
        if body.slice_uuids is None
        else [SliceId(name) for name in body.slice_uuids],
        release=body.release,
        replacement=None
        if terms is None
        else Replacement(
            tenant_id=None if terms.tenant_id is None else TenantId(terms.tenant_id),
            project_id=None if terms.project_id is None else ProjectId(terms.project_id),
            sku=None if terms.sku is None else Sku(terms.sku),
            price_class=None if terms.price_class is None else PriceClass(terms.price_class),
        ),
    )
    fault = correction_fault(correction)
    if fault is not None:
        raise Problem("malformed", fault)
    return correction


def _answer(proposed: ProposedCorrection) -> CorrectionAnswer:
    revision = proposed.correction.revision if proposed.state == "approved" else None
    return CorrectionAnswer(proposed.correction_id, proposed.state, revision)


def correction_view(listed: ListedCorrection, principal: Principal) -> CorrectionView:
    """Show a correction to whoever asks: to a tenant nothing of another's terms or claims."""
    said = listed.correction
    own = principal.tenant_id
    terms = said.replacement
    if terms is not None and own is not None and terms.tenant_id not in (None, own):
        terms = Replacement()
    return CorrectionView(
        correction_id=listed.correction_id,
        hub=said.hub,
        node_id=said.node_id,
        allocation_id=said.allocation_id,
        slice_uuids=None if said.slice_uuids is None else [*said.slice_uuids],
        start_ms=said.start_ms,
        end_ms=said.end_ms,
        revision=listed.revision,
        action=said.action,
        release=said.release,
        replacement=None
        if terms is None
        else ReplacementView(terms.tenant_id, terms.project_id, terms.sku, terms.price_class),
        reason=said.reason,
        approved_by=said.approved_by,
        state=listed.state,
        waits_for=listed.waits_for,
        waits_detail=listed.waits_detail if own is None else None,
        proposed_by=listed.proposed_by,
        proposed_at=instant_text(listed.proposed_ms),
        decided_by=listed.decided_by,
        decided_at=optional_instant_text(listed.decided_ms),
    )
