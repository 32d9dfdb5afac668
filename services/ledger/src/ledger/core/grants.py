"""What a grant is, what is wrong with its terms, and who may approve it.

A *grant* is a promise of credit by a programme to a tenant: proposed by an officer, approved by
somebody else. An approved grant is one *lot* of the tenant's book (`book.Lot`), with terms that
never change: a window [effective, expires) on whole UTC hours and a priority. Because usage is
charged by the UTC hour, an hour bucket lies wholly inside or outside every window.

Approving moves budget of the programme to the tenant, in two books at once, so a programme can
never promise more than it has (`decisions`).

Refusals, in order of precedence. Terms: not well-formed (`fault_of_terms`), well-formed but not
supported yet (`unsupported_terms`). Proposal: `CurrencyDiffers`, `GrantExpired`. Approval:
`MakerIsChecker`, `GrantNotProposed`, `GrantExpired`, `BudgetExceeded`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from hisab_contracts.ids import GrantId, KeyId, ProgrammeId, TenantId
from hisab_contracts.units import is_whole_hour

GrantState = Literal["proposed", "approved"]


class Grant(Struct, frozen=True, kw_only=True):
    """A proposed or approved grant: its terms, who proposed it and who approved it."""

    grant_id: GrantId
    tenant_id: TenantId
    programme_id: ProgrammeId
    grant_micro: int
    priority: int
    """Lower pays first."""
    effective_ms: int
    expires_ms: int | None
    """None: never."""
    state: GrantState = "proposed"
    proposed_by: KeyId
    approved_by: KeyId | None = None


class ApproveGrant(Struct, frozen=True, kw_only=True):
    """Move budget of the grant's programme to a lot of its tenant: two books, one command."""

    grant: Grant
    approver: KeyId
    actor: str
    """The approver as entries name who did something."""


class CurrencyDiffers(Struct, frozen=True):
    """The programme grants another currency than the tenant's."""

    currency: str
    """The programme's."""


class MakerIsChecker(Struct, frozen=True):
    """The key that proposed a grant asks to approve it."""


class GrantNotProposed(Struct, frozen=True):
    """The grant has been decided already."""

    state: GrantState


class GrantExpired(Struct, frozen=True):
    """The grant's window has ended: it would grant nothing."""

    expires_ms: int


class BudgetExceeded(Struct, frozen=True, kw_only=True):
    """The programme has promised so much already that this grant does not fit."""

    budget_left_micro: int
    shortfall_micro: int


ProposalRefusal = CurrencyDiffers | GrantExpired
"""Why a grant cannot be proposed, in order of precedence."""

ApprovalRefusal = MakerIsChecker | GrantNotProposed | GrantExpired | BudgetExceeded
"""Why a grant cannot be approved, in order of precedence."""


def refuse_proposal(
    grant: Grant, *, tenant_currency: str, programme_currency: str, now_ms: int
) -> ProposalRefusal | None:
    """Say why a grant cannot be proposed, or None. Its terms are well-formed already."""
    if tenant_currency != programme_currency:
        return CurrencyDiffers(programme_currency)
    return _refuse_expired(grant, now_ms)


def refuse_approval(
    command: ApproveGrant, *, budget_left_micro: int, now_ms: int
) -> ApprovalRefusal | None:
    """Say why a grant cannot be approved, or None. Every grant needs two keys."""
    grant = command.grant
    # First of all: the proposer learns nothing else about the grant, not even that it is decided.
    own_proposal = refuse_maker(grant, command.approver)
    if own_proposal is not None:
        return own_proposal
    if grant.state != "proposed":
        return GrantNotProposed(grant.state)
    expired = _refuse_expired(grant, now_ms)
    if expired is not None:
        return expired
    shortfall_micro = grant.grant_micro - budget_left_micro
    if shortfall_micro > 0:
        return BudgetExceeded(budget_left_micro=budget_left_micro, shortfall_micro=shortfall_micro)
    return None


def refuse_maker(grant: Grant, approver: KeyId) -> MakerIsChecker | None:
    """Refuse to have a grant approved by the key that proposed it; None for any other key."""
    return MakerIsChecker() if approver == grant.proposed_by else None


def _refuse_expired(grant: Grant, now_ms: int) -> GrantExpired | None:
    if grant.expires_ms is not None and grant.expires_ms <= now_ms:
        return GrantExpired(grant.expires_ms)
    return None


def fault_of_terms(effective_ms: int, expires_ms: int | None) -> str | None:
    """Say what is malformed about a window, or None: whole UTC hours, and not empty."""
    if not is_whole_hour(effective_ms):
        return "effective_at must lie on a whole UTC hour"
    if expires_ms is None:
        return None
    if not is_whole_hour(expires_ms):
        return "expires_at must lie on a whole UTC hour, or be null"
    if expires_ms <= effective_ms:
        return "expires_at must lie after effective_at"
    return None


def unsupported_terms(
    scope: Mapping[str, object], coverage_bps: int, tax_effect: str
) -> str | None:
    """Say which term is not supported yet, or None. It is refused, never ignored."""
    if scope:
        return "scope other than {} is not supported yet"
    if coverage_bps != 10_000:
        return "coverage_bps other than 10000 is not supported yet"
    if tax_effect != "tender":
        return "tax_effect other than tender is not supported yet"
    return None
