"""`/v1/proposals`: what one person asked for and another decides, whatever it is."""

from __future__ import annotations

from typing import get_args

from fastapi import Request, Response

from hisab_contracts.reference import Role
from hisab_contracts.units import instant_text, optional_instant_text
from ledger.api.approvals import (
    APPROVAL_PROBLEMS,
    DECIDERS,
    REVERSAL_PROBLEMS,
    Approvals,
    ApproveProposal,
    DecisionAnswer,
    RejectProposal,
    ShownTerms,
    shown_terms,
)
from ledger.api.requests import READERS, query_choice
from ledger.core.proposals import ProposalKind, ProposalState
from ledger.store.proposals import ListedProposal, list_proposals
from runtime.auth import require_own_tenant
from runtime.http import Model, Position, Resource, get, page_of, page_response, post
from runtime.service import Kit

STATES: tuple[ProposalState, ...] = get_args(ProposalState)
KINDS: tuple[ProposalKind, ...] = get_args(ProposalKind)


class ProposalAnswer(Model, frozen=True, kw_only=True):
    """A proposal, and what became of it."""

    proposal_id: str
    kind: str
    state: str
    tenant_id: str | None
    """Null of a programme's."""
    terms: ShownTerms
    proposed_by: str
    proposed_at: str
    decided_by: str | None
    decided_at: str | None
    reason: str | None
    """Why it was rejected."""
    entry_ids: list[str]


class Proposals(Resource):
    """`/v1/proposals`: one place for everything that takes two people."""

    def __init__(self, kit: Kit, approvals: Approvals) -> None:
        self._kit = kit
        self._approvals = approvals

    @get(
        "/v1/proposals",
        roles=READERS,
        others={Role.TENANT: "not-found"},
        answer=ProposalAnswer,
        paged=True,
        query=("state", "kind", "tenant_id"),
    )
    async def list_proposals(self, request: Request) -> Response:
        """Proposals of all kinds, grants too, in the order in which they were made."""
        principal = await self._kit.access.authorise(request)
        tenant_id = request.query_params.get("tenant_id")
        if tenant_id is not None:
            require_own_tenant(principal, tenant_id)
        page = page_of(request, tuple[Position])
        (after,) = page.after or (0,)
        state = query_choice(request, "state", STATES)
        kind = query_choice(request, "kind", KINDS)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            found = await list_proposals(
                connection, after, page.limit + 1, state=state, kind=kind, tenant_id=tenant_id
            )
        numbers = {str(listed.proposal.proposal_id): listed.number for listed in found}
        answers = [_proposal_answer(listed) for listed in found]
        return page_response(answers, page, lambda answer: (numbers[answer.proposal_id],))

    @post(
        "/v1/proposals/{proposal_id}/approve",
        roles=DECIDERS,
        body=ApproveProposal,
        answer=DecisionAnswer,
        idempotent=True,
        problems=(
            *APPROVAL_PROBLEMS,
            "grant-expired",
            "outcome-missing",
            "budget-exceeded",
            "budget-out-of-range",
            "not-commercial",
            *REVERSAL_PROBLEMS,
            "not-expired",
        ),
    )
    async def approve_proposal(self, request: Request, proposal_id: str) -> Response:
        """Approve what another key proposed: it is entered as the books stand now."""
        return await self._approvals.approve(request, proposal_id)

    @post(
        "/v1/proposals/{proposal_id}/reject",
        roles=DECIDERS,
        body=RejectProposal,
        answer=DecisionAnswer,
        idempotent=True,
        problems=("already-decided",),
    )
    async def reject_proposal(self, request: Request, proposal_id: str) -> Response:
        """Reject a proposal, or take one's own back: it will never be entered."""
        return await self._approvals.reject(request, proposal_id)


def _proposal_answer(listed: ListedProposal) -> ProposalAnswer:
    proposal = listed.proposal
    return ProposalAnswer(
        proposal_id=proposal.proposal_id,
        kind=proposal.terms.kind,
        state=proposal.state,
        tenant_id=proposal.terms.tenant_id,
        terms=shown_terms(proposal.terms),
        proposed_by=proposal.proposed_by,
        proposed_at=instant_text(listed.proposed_ms),
        decided_by=listed.decided_by,
        decided_at=optional_instant_text(listed.decided_ms),
        reason=listed.reason,
        entry_ids=list(listed.entry_ids),
    )
