"""Proposals: what moves money or limits by hand takes two people, whatever it is.

One person proposes, and nothing is entered. Another approves, and only then the command is decided,
on the books as they stand at that moment: what was possible when it was proposed may be refused
now. Or somebody rejects it, and it never is. A proposal is decided once.

**Terms** say what is proposed, one class per kind: the book that it is about, the amount that an
approver's own limit is held against, and the command that its approval enters. A kind more is a
class more in `Terms`, with its command in `decisions` and its answer in the API. A grant is a
proposal too. It lives on after its decision, so it is kept with the grants, and its terms are the
grant itself.

**Who may decide.** The key that proposed never approves, whatever its role; a key of another role
than approver does not either. An approver who declares a conflict of interest is refused this
approval, and so is one whose own limit (`PUT /v1/keys/{id}/limits`) is lower than the amount. It
may be rejected by its proposer, who takes it back, or by any approver.

Refusals, in order of precedence. Approval: `MakerIsChecker`, `DecisionForbidden`, `AlreadyDecided`,
`ConflictOfInterest`, `AboveLimit`; then those of the command. Rejection: `DecisionForbidden`,
`AlreadyDecided`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import ClassVar, Final, Literal

from msgspec import Struct

from hisab_contracts.entries import Entry
from hisab_contracts.ids import EntryId, GrantId, KeyId, ProgrammeId, ProposalId, TenantId
from hisab_contracts.reference import Role
from ledger.core.adjustments import AddBudget, ChangeCreditLimit
from ledger.core.book import PROGRAMME_BOOK
from ledger.core.grants import ApproveGrant, Grant, GrantState
from ledger.core.withdrawals import ReclaimExpired, ReverseEntry, RevokeGrant

ProposalKind = Literal["grant", "budget", "credit-limit", "reverse", "revoke", "reclaim"]
ProposalState = Literal["proposed", "approved", "rejected"]

ProposedCommand = (
    ApproveGrant | AddBudget | ChangeCreditLimit | ReverseEntry | RevokeGrant | ReclaimExpired
)
"""What an approval has decided."""

NO_CONFLICT: Final = "none"
"""What an approver without a conflict of interest declares; any other text is a conflict."""


GRANT_STATES: Final[Mapping[ProposalState, tuple[GrantState, ...]]] = MappingProxyType(
    {
        "proposed": ("proposed",),
        "approved": ("approved", "revoked", "reversed"),
        "rejected": ("rejected",),
    }
)
"""Where a grant may stand that is decided so: an approved one goes on through states of its own."""


class GrantTerms(Struct, frozen=True):
    """Move budget of a programme to a lot of a tenant: two books."""

    kind: ClassVar[ProposalKind] = "grant"
    grant: Grant

    @property
    def tenant_id(self) -> TenantId | None:
        """Whose it is."""
        return self.grant.tenant_id

    @property
    def book_id(self) -> TenantId:
        """The book that the command is about."""
        return self.grant.tenant_id

    @property
    def limited_micro(self) -> int | None:
        """What is held against an approver's own limit."""
        return self.grant.grant_micro

    def command(self, actor: str, *, is_earlier_accepted: bool = False) -> ProposedCommand:
        """Return what is decided once it is approved by this actor, as outcomes stand now."""
        return ApproveGrant(grant=self.grant, actor=actor, is_earlier_accepted=is_earlier_accepted)


class BudgetTerms(Struct, frozen=True, kw_only=True, tag_field="kind", tag="budget"):
    """Give a programme more to promise."""

    kind: ClassVar[ProposalKind] = "budget"
    programme_id: ProgrammeId
    add_micro: int

    @property
    def tenant_id(self) -> TenantId | None:
        """Whose it is: no tenant's."""
        return None

    @property
    def book_id(self) -> TenantId:
        """The book that the command is about."""
        return TenantId(PROGRAMME_BOOK + self.programme_id)

    @property
    def limited_micro(self) -> int | None:
        """What is held against an approver's own limit."""
        return self.add_micro

    def command(self, proposal_id: ProposalId, actor: str) -> ProposedCommand:
        """Return what is decided once it is approved by this actor."""
        return AddBudget(add_micro=self.add_micro, caused_by=cause_of(proposal_id), actor=actor)


class CreditLimitTerms(Struct, frozen=True, kw_only=True, tag_field="kind", tag="credit-limit"):
    """Let a commercial tenant owe so much, and why."""

    kind: ClassVar[ProposalKind] = "credit-limit"
    tenant_id: TenantId
    credit_limit_micro: int
    reason: str

    @property
    def book_id(self) -> TenantId:
        """The book that the command is about."""
        return self.tenant_id

    @property
    def limited_micro(self) -> int | None:
        """What is held against an approver's own limit: all that may be owed, not the rise."""
        return self.credit_limit_micro

    def command(self, proposal_id: ProposalId, actor: str) -> ProposedCommand:
        """Return what is decided once it is approved by this actor."""
        return ChangeCreditLimit(
            credit_limit_micro=self.credit_limit_micro,
            reason=self.reason,
            caused_by=cause_of(proposal_id),
            actor=actor,
        )


class ReverseTerms(Struct, frozen=True, kw_only=True, tag_field="kind", tag="reverse"):
    """Negate an entry that should not have been made, and why."""

    kind: ClassVar[ProposalKind] = "reverse"
    tenant_id: TenantId
    entry_id: EntryId
    grant_micro: int
    """What the entry granted; 0: it is no grant's."""
    reason: str

    @property
    def book_id(self) -> TenantId:
        """The book that the command is about."""
        return self.tenant_id

    @property
    def limited_micro(self) -> int | None:
        """What is held against an approver's own limit."""
        return self.grant_micro

    def command(self, entry: Entry, actor: str) -> ProposedCommand:
        """Return what is decided once it is approved by this actor, of the entry as loaded."""
        return ReverseEntry(entry=entry, actor=actor, reason=self.reason)


class RevokeTerms(Struct, frozen=True, kw_only=True, tag_field="kind", tag="revoke"):
    """End a grant early, and why."""

    kind: ClassVar[ProposalKind] = "revoke"
    tenant_id: TenantId
    grant_id: GrantId
    grant_micro: int
    reason: str

    @property
    def book_id(self) -> TenantId:
        """The book that the command is about."""
        return self.tenant_id

    @property
    def limited_micro(self) -> int | None:
        """What is held against an approver's own limit: the whole grant."""
        return self.grant_micro

    def command(self, grant: Grant, actor: str) -> ProposedCommand:
        """Return what is decided once it is approved by this actor, of the grant as it stands."""
        return RevokeGrant(grant=grant, actor=actor, reason=self.reason)


class ReclaimTerms(Struct, frozen=True, kw_only=True, tag_field="kind", tag="reclaim"):
    """Give what has expired of a grant back to its programme."""

    kind: ClassVar[ProposalKind] = "reclaim"
    tenant_id: TenantId
    programme_id: ProgrammeId
    grant_id: GrantId
    grant_micro: int

    @property
    def book_id(self) -> TenantId:
        """The book that the command is about: the lot is in the tenant's."""
        return self.tenant_id

    @property
    def limited_micro(self) -> int | None:
        """What is held against an approver's own limit: the whole grant."""
        return self.grant_micro

    def command(self, grant: Grant, actor: str) -> ProposedCommand:
        """Return what is decided once it is approved by this actor, of the grant as it stands."""
        return ReclaimExpired(grant=grant, actor=actor)


KeptTerms = BudgetTerms | CreditLimitTerms | ReverseTerms | RevokeTerms | ReclaimTerms
"""Terms that are kept with their proposal: of all kinds but a grant, which is kept by itself."""

Terms = GrantTerms | KeptTerms
"""The closed union of what can be proposed."""


class Proposal(Struct, frozen=True, kw_only=True):
    """What somebody proposed, and whether it is decided."""

    proposal_id: ProposalId
    terms: Terms
    state: ProposalState = "proposed"
    proposed_by: KeyId


class Approval(Struct, frozen=True, kw_only=True):
    """Who asks to approve, and all that decides whether that key may."""

    key_id: KeyId
    role: str
    conflict_of_interest: str = NO_CONFLICT
    up_to_micro: int | None = None
    """The key's own limit; None: it has none."""
    others: tuple[KeyId, ...] = ()
    """Approvers who may approve this amount, the proposer left out."""


class MakerIsChecker(Struct, frozen=True):
    """The key that proposed it asks to approve it."""


class DecisionForbidden(Struct, frozen=True):
    """The key's role may not decide it so."""

    who: str
    """Who may, in words."""


class AlreadyDecided(Struct, frozen=True):
    """It was approved or rejected before."""

    state: str
    """Where it stands."""


class ConflictOfInterest(Struct, frozen=True):
    """The approver declared one."""


class AboveLimit(Struct, frozen=True, kw_only=True):
    """It is more than the approver's own limit."""

    up_to_micro: int
    needed_micro: int
    may_approve: tuple[KeyId, ...]
    """Who may: ids of keys, no secrets; none where nobody may."""


ApproverRefusal = MakerIsChecker | DecisionForbidden
DecisionRefusal = ApproverRefusal | AlreadyDecided | ConflictOfInterest | AboveLimit
"""Why a proposal is not decided so, in order of precedence."""


def reversal_of(entry: Entry, reason: str) -> ReverseTerms:
    """Return the terms of negating an entry; whether it can be is decided with the books."""
    return ReverseTerms(
        tenant_id=entry.tenant_id,
        entry_id=entry.entry_id,
        grant_micro=0 if entry.grant is None else entry.grant.grant_micro,
        reason=reason,
    )


def revocation_of(grant: Grant, reason: str) -> RevokeTerms:
    """Return the terms of ending a grant early."""
    return RevokeTerms(
        tenant_id=grant.tenant_id,
        grant_id=grant.grant_id,
        grant_micro=grant.grant_micro,
        reason=reason,
    )


def reclaim_of(grant: Grant) -> ReclaimTerms:
    """Return the terms of giving what has expired of a grant back to its programme."""
    return ReclaimTerms(
        tenant_id=grant.tenant_id,
        programme_id=grant.programme_id,
        grant_id=grant.grant_id,
        grant_micro=grant.grant_micro,
    )


def proposal_of(grant: Grant) -> Proposal:
    """Return a grant as the proposal that it is, or was before it was decided."""
    return Proposal(
        proposal_id=ProposalId(grant.grant_id),
        terms=GrantTerms(grant),
        state=next(state for state, states in GRANT_STATES.items() if grant.state in states),
        proposed_by=grant.proposed_by,
    )


def refuse_decision(proposal: Proposal, approval: Approval) -> DecisionRefusal | None:
    """Say why a key may not approve a proposal, whatever its kind, or None."""
    refused = refuse_approver(proposal, approval.key_id, approval.role)
    if refused is not None:
        return refused
    if proposal.state != "proposed":
        return AlreadyDecided(proposal.state)
    if approval.conflict_of_interest != NO_CONFLICT:
        return ConflictOfInterest()
    needed_micro = proposal.terms.limited_micro
    up_to_micro = approval.up_to_micro
    if up_to_micro is not None and needed_micro is not None and needed_micro > up_to_micro:
        return AboveLimit(
            up_to_micro=up_to_micro, needed_micro=needed_micro, may_approve=approval.others
        )
    return None


def refuse_approver(proposal: Proposal | None, key_id: KeyId, role: str) -> ApproverRefusal | None:
    """Say why a key may not approve this, whatever it says, or None; nor anything, where None.

    The proposer hears it first, and learns nothing else: not even that it is decided.
    """
    if proposal is not None and key_id == proposal.proposed_by:
        return MakerIsChecker()
    return None if role == Role.APPROVER else DecisionForbidden("approving takes an approver")


def refuse_rejection(
    proposal: Proposal, key_id: KeyId, role: str
) -> DecisionForbidden | AlreadyDecided | None:
    """Say why a key may not reject a proposal, or None."""
    forbidden = refuse_rejecter(proposal, key_id, role)
    if forbidden is not None:
        return forbidden
    return None if proposal.state == "proposed" else AlreadyDecided(proposal.state)


def refuse_rejecter(
    proposal: Proposal | None, key_id: KeyId, role: str
) -> DecisionForbidden | None:
    """Say why a key may not reject this, or None; nor anything, where None."""
    if role == Role.APPROVER or (proposal is not None and key_id == proposal.proposed_by):
        return None
    return DecisionForbidden("rejecting takes an approver, or the key that proposed it")


def entry_ids_of(proposal: Proposal, made: Iterable[Entry], actor: str) -> tuple[EntryId, ...]:
    """Name what an approval entered, in books that those it concerns can read.

    Of a tenant's proposal the entries in books of tenants, of a programme's those in its own. What
    the clock had ended before is no part of it.
    """
    is_of_programme = proposal.terms.tenant_id is None
    return tuple(
        entry.entry_id
        for entry in made
        if entry.actor == actor and entry.tenant_id.startswith(PROGRAMME_BOOK) == is_of_programme
    )


def proposal_id_of(entry: Entry) -> ProposalId | None:
    """Return the proposal that an entry names as its cause; None: it names something else."""
    prefix, _, name = entry.caused_by.partition(":")
    return ProposalId(name) if prefix == "proposal" else None


def cause_of(proposal_id: ProposalId) -> str:
    """Name a proposal as what caused an entry."""
    return f"proposal:{proposal_id}"
