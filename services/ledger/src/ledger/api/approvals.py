"""What every door has in common that proposes, approves or rejects: who may, and how it is shown.

Checks run in one order at all of them: who calls; whether the caller may decide this at all, where
the proposer hears `maker-is-checker` before anything else; what the path names; what the body says;
and then, with the proposal locked, everything again (`core.proposals`), because somebody may have
decided it meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeVar, assert_never

from fastapi import Request, Response
from msgspec import Meta

from hisab_contracts.entries import GrantScope
from hisab_contracts.ids import KeyId, ProposalId
from hisab_contracts.reference import Role
from hisab_contracts.units import instant_text, optional_instant_text
from ledger.api.problems import problem_of
from ledger.api.requests import ReasonText
from ledger.commands import Approved, Commands, id_from_command
from ledger.core.grants import Grant
from ledger.core.proposals import (
    NO_CONFLICT,
    BudgetTerms,
    CreditLimitTerms,
    GrantTerms,
    KeptTerms,
    Proposal,
    ProposalState,
    ReclaimTerms,
    ReverseTerms,
    RevokeTerms,
    Terms,
    refuse_approver,
    refuse_rejecter,
)
from ledger.store.proposals import find_proposal
from runtime.auth import Principal
from runtime.http import Model, Problem
from runtime.idempotency import Answer, Command, read_command, run_command
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection

M = TypeVar("M", bound=Model)

DECIDERS = (Role.APPROVER, Role.OFFICER, Role.FINANCE)
"""Approvers, and those who propose: a proposer may take its proposal back, and is told why it may
not approve it."""
REVERSAL_PROBLEMS = (
    "is-reversal",
    "correct-in-metering",
    "correct-in-invoicing",
    "not-reversible",
    "already-reversed",
    "already-drawn",
    "reserved",
    "already-reclaimed",
)
"""Why an entry is not negated, when that is proposed or approved."""
REVOCATION_PROBLEMS = ("already-decided", "grant-expired")
"""Why a grant is not ended early, when that is proposed or approved."""
RECLAIM_PROBLEMS = ("already-decided", "already-reclaimed", "not-expired")
"""Why expired credit is not reclaimed, when that is proposed or approved."""
APPROVAL_PROBLEMS = (
    "maker-is-checker",
    "already-decided",
    "conflict-of-interest",
    "above-limit",
)
"""Why a proposal of any kind is not approved."""


class ApproveProposal(Model, frozen=True, kw_only=True):
    """An approval; any declaration but `none` refuses it."""

    conflict_of_interest: Annotated[str, Meta(max_length=1_000)] = NO_CONFLICT


class RejectProposal(Model, frozen=True, kw_only=True):
    """Why something is not to be."""

    reason: ReasonText


class ShownGrant(Model, frozen=True, kw_only=True, tag_field="kind", tag="grant"):
    """The terms of a grant."""

    tenant_id: str
    programme_id: str
    grant_micro: str
    priority: int
    effective_at: str
    expires_at: str | None
    scope: GrantScope
    coverage_bps: int
    tax_effect: str
    after_grant: str | None


class ShownBudget(Model, frozen=True, kw_only=True, tag_field="kind", tag="budget"):
    """More budget for a programme."""

    programme_id: str
    add_micro: str


class ShownCreditLimit(Model, frozen=True, kw_only=True, tag_field="kind", tag="credit-limit"):
    """Another credit limit for a tenant."""

    tenant_id: str
    credit_limit_micro: str
    reason: str


class ShownReversal(Model, frozen=True, kw_only=True, tag_field="kind", tag="reverse"):
    """An entry to be negated."""

    tenant_id: str
    entry_id: str
    grant_micro: str
    reason: str


class ShownRevocation(Model, frozen=True, kw_only=True, tag_field="kind", tag="revoke"):
    """A grant to be ended early."""

    tenant_id: str
    grant_id: str
    grant_micro: str
    reason: str


class ShownReclaim(Model, frozen=True, kw_only=True, tag_field="kind", tag="reclaim"):
    """A grant whose expired credit goes back to its programme."""

    tenant_id: str
    programme_id: str
    grant_id: str
    grant_micro: str


ShownTerms = (
    ShownGrant | ShownBudget | ShownCreditLimit | ShownReversal | ShownRevocation | ShownReclaim
)


class ProposedAnswer(Model, frozen=True, kw_only=True):
    """What was proposed; nothing is entered before somebody else approves it."""

    proposal_id: str
    kind: str
    state: str
    terms: ShownTerms


class DecisionAnswer(Model, frozen=True, kw_only=True):
    """What was decided, and what that entered: of a tenant's proposal, into books of tenants."""

    proposal_id: str
    grant_id: str | None
    """Of a grant, the same as its proposal's id; null of all other kinds."""
    kind: str
    state: str
    entry_ids: list[str]


class Approvals:
    """Has proposals made and decided, at whichever door."""

    def __init__(self, kit: Kit, commands: Commands) -> None:
        self._kit = kit
        self._commands = commands

    async def propose(
        self, principal: Principal, command: Command[M], terms: KeptTerms
    ) -> Response:
        """Propose something on these terms, and answer 202."""
        scope = terms.tenant_id or principal.role_scope
        proposal = Proposal(
            proposal_id=ProposalId(id_from_command("p", scope, command.key)),
            terms=terms,
            proposed_by=KeyId(principal.key_id),
        )

        async def run(connection: Connection) -> Answer:
            refused = await self._commands.propose(connection, proposal)
            if refused is not None:
                raise problem_of(refused)
            return Answer(202, _proposed(proposal))

        return await run_command(self._kit.api, command, run, scope=scope, tenant=principal.sees)

    async def approve(
        self, request: Request, proposal_id: str, *, only_grants: bool = False
    ) -> Response:
        """Approve what another key proposed, and enter it."""
        principal = await self._kit.access.authorise(request)
        proposal = await self._find(principal, proposal_id, only_grants=only_grants)
        approver = KeyId(principal.key_id)
        # Other roles may not approve at all, but the proposer is told the better reason.
        refused = refuse_approver(proposal, approver, principal.role)
        if refused is not None:
            raise problem_of(refused)
        if proposal is None:
            raise Problem("not-found", "no such proposal")
        command = await read_command(request, ApproveProposal)

        async def run(connection: Connection) -> Answer:
            approved = await self._commands.approve(
                connection,
                proposal_id,
                approver,
                principal.role,
                conflict_of_interest=command.body.conflict_of_interest,
                actor=principal.actor,
            )
            if not isinstance(approved, Approved):
                raise problem_of(approved)
            entry_ids = [str(entry_id) for entry_id in approved.entry_ids]
            return Answer(200, _decision(approved.proposal, "approved", entry_ids))

        scope = proposal.terms.tenant_id or principal.role_scope
        return await run_command(self._kit.api, command, run, scope=scope, tenant=principal.sees)

    async def reject(
        self, request: Request, proposal_id: str, *, only_grants: bool = False
    ) -> Response:
        """Reject a proposal: it will never be entered."""
        principal = await self._kit.access.authorise(request)
        proposal = await self._find(principal, proposal_id, only_grants=only_grants)
        rejecter = KeyId(principal.key_id)
        refused = refuse_rejecter(proposal, rejecter, principal.role)
        if refused is not None:
            raise problem_of(refused)
        if proposal is None:
            raise Problem("not-found", "no such proposal")
        command = await read_command(request, RejectProposal)

        async def run(connection: Connection) -> Answer:
            rejected = await self._commands.reject(
                connection, proposal_id, rejecter, principal.role, command.body.reason
            )
            if not isinstance(rejected, Proposal):
                raise problem_of(rejected)
            return Answer(200, _decision(rejected, "rejected", []))

        scope = proposal.terms.tenant_id or principal.role_scope
        return await run_command(self._kit.api, command, run, scope=scope, tenant=principal.sees)

    async def _find(
        self, principal: Principal, proposal_id: str, *, only_grants: bool
    ) -> Proposal | None:
        """Find what a path names, as far as its door is for it."""
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            proposal = await find_proposal(connection, proposal_id)
        if only_grants and proposal is not None and not isinstance(proposal.terms, GrantTerms):
            return None
        return proposal


def _decision(proposal: Proposal, state: ProposalState, entry_ids: list[str]) -> DecisionAnswer:
    is_grant = isinstance(proposal.terms, GrantTerms)
    return DecisionAnswer(
        proposal_id=proposal.proposal_id,
        grant_id=proposal.proposal_id if is_grant else None,
        kind=proposal.terms.kind,
        state=state,
        entry_ids=entry_ids,
    )


def _proposed(proposal: Proposal) -> ProposedAnswer:
    return ProposedAnswer(
        proposal_id=proposal.proposal_id,
        kind=proposal.terms.kind,
        state=proposal.state,
        terms=shown_terms(proposal.terms),
    )


def shown_terms(terms: Terms) -> ShownTerms:
    """Show what is proposed: amounts are texts, instants RFC 3339."""
    match terms:
        case GrantTerms(grant):
            return _shown_grant(grant)
        case BudgetTerms(programme_id=programme_id, add_micro=add_micro):
            return ShownBudget(programme_id=programme_id, add_micro=str(add_micro))
        case CreditLimitTerms():
            return ShownCreditLimit(
                tenant_id=terms.tenant_id,
                credit_limit_micro=str(terms.credit_limit_micro),
                reason=terms.reason,
            )
        case ReverseTerms():
            return ShownReversal(
                tenant_id=terms.tenant_id,
                entry_id=terms.entry_id,
                grant_micro=str(terms.grant_micro),
                reason=terms.reason,
            )
        case RevokeTerms():
            return ShownRevocation(
                tenant_id=terms.tenant_id,
                grant_id=terms.grant_id,
                grant_micro=str(terms.grant_micro),
                reason=terms.reason,
            )
        case ReclaimTerms():
            return ShownReclaim(
                tenant_id=terms.tenant_id,
                programme_id=terms.programme_id,
                grant_id=terms.grant_id,
                grant_micro=str(terms.grant_micro),
            )
        case _:
            assert_never(terms)


def _shown_grant(grant: Grant) -> ShownGrant:
    return ShownGrant(
        tenant_id=grant.tenant_id,
        programme_id=grant.programme_id,
        grant_micro=str(grant.grant_micro),
        priority=grant.priority,
        effective_at=instant_text(grant.effective_ms),
        expires_at=optional_instant_text(grant.expires_ms),
        scope=grant.scope or GrantScope(),
        coverage_bps=grant.coverage_bps,
        tax_effect=grant.tax_effect,
        after_grant=grant.after_grant,
    )
