"""What a grant is, what is wrong with its terms, and when it can be approved.

A *grant* is a promise of credit by a programme to a tenant: proposed by an officer, approved by
somebody else (`proposals`). An approved grant is one *lot* of the tenant's book (`lots.Lot`), with
terms that never change: a window [effective, expires) on whole UTC hours, a priority, a scope, and
the share of each bucket that it pays. Because usage is charged by the UTC hour, an hour bucket lies
wholly inside or outside every window.

Approving moves budget of the programme to the tenant, in two books at once, so a programme can
never promise more than it has (`decisions`).

A grant is over only when all usage of its window has been heard of: then it would grant nothing.
One whose window has ended by the clock still pays for usage that is heard of late.

A grant may come after another of its tenant, as the next *tranche*: then it is approved only once
an outcome of that one is accepted (`outcomes`).

Refusals, in order of precedence. Terms: not well-formed (`fault_of_terms`).
Proposal: `CurrencyDiffers`, `GrantExpired`. Approval, once the approver may approve it
(`proposals`): `GrantExpired`, `OutcomeMissing`, `BudgetExceeded`.
"""

from __future__ import annotations

from typing import Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from hisab_contracts.entries import GrantScope
from hisab_contracts.ids import GrantId, KeyId, ProgrammeId, TenantId
from hisab_contracts.invariants import invariant
from hisab_contracts.units import is_whole_hour
from ledger.core.lots import WHOLE_BPS

GrantState = Literal["proposed", "approved", "rejected", "revoked", "reversed"]
TaxEffect = Literal["tender", "reduces_base"]
"""What paying with a grant means for tax: it pays the bill, or it makes the taxed price less."""

MOST_IN_SCOPE: Final = 100
"""How many hubs, SKUs, projects or classes a scope may name."""


class Grant(Struct, frozen=True, kw_only=True):
    """A grant, proposed or decided: its terms, who proposed it and who approved it."""

    grant_id: GrantId
    tenant_id: TenantId
    programme_id: ProgrammeId
    grant_micro: int
    priority: int
    """Lower pays first."""
    effective_ms: int
    expires_ms: int | None
    """None: never."""
    scope: GrantScope | None = None
    """None: for everything."""
    coverage_bps: int = WHOLE_BPS
    """Which part of each bucket it pays, in 1/100 %."""
    tax_effect: TaxEffect = "tender"
    after_grant: GrantId | None = None
    """The earlier grant of which an outcome has to be accepted first; None: it waits for none."""
    state: GrantState = "proposed"
    proposed_by: KeyId
    approved_by: KeyId | None = None
    reference: str | None = None
    """The officer's own name for it, where it came in a file; no other of its tenant has it."""


class ApproveGrant(Struct, frozen=True, kw_only=True):
    """Move budget of the grant's programme to a lot of its tenant: two books, one command."""

    grant: Grant
    actor: str
    """The approver as entries name who did something."""
    is_earlier_accepted: bool = False
    """Whether an outcome of the grant that it comes after is accepted, as it stands now."""


class CurrencyDiffers(Struct, frozen=True):
    """The programme grants another currency than the tenant's."""

    currency: str
    """The programme's."""


class GrantExpired(Struct, frozen=True):
    """The grant's window has ended: it would grant nothing."""

    expires_ms: int


class OutcomeMissing(Struct, frozen=True):
    """No outcome is accepted yet of the grant that it comes after."""

    after_grant: GrantId


class BudgetExceeded(Struct, frozen=True, kw_only=True):
    """The programme has promised so much already that this grant does not fit."""

    budget_left_micro: int
    shortfall_micro: int


ProposalRefusal = CurrencyDiffers | GrantExpired
"""Why a grant cannot be proposed, in order of precedence."""

ApprovalRefusal = GrantExpired | OutcomeMissing | BudgetExceeded
"""Why a grant cannot be approved, in order of precedence."""


def refuse_proposal(
    grant: Grant,
    *,
    tenant_currency: str,
    programme_currency: str,
    complete_until_ms: int | None,
) -> ProposalRefusal | None:
    """Say why a grant cannot be proposed, or None. Its terms are well-formed already."""
    if tenant_currency != programme_currency:
        return CurrencyDiffers(programme_currency)
    return _refuse_expired(grant, complete_until_ms)


def refuse_approval(
    command: ApproveGrant, *, budget_left_micro: int, complete_until_ms: int | None
) -> ApprovalRefusal | None:
    """Say why a grant cannot be approved, or None; who may approve it is decided before."""
    grant = command.grant
    invariant(grant.state == "proposed", "a grant is decided once")
    expired = _refuse_expired(grant, complete_until_ms)
    if expired is not None:
        return expired
    if grant.after_grant is not None and not command.is_earlier_accepted:
        return OutcomeMissing(grant.after_grant)
    shortfall_micro = grant.grant_micro - budget_left_micro
    if shortfall_micro > 0:
        return BudgetExceeded(budget_left_micro=budget_left_micro, shortfall_micro=shortfall_micro)
    return None


def _refuse_expired(grant: Grant, complete_until_ms: int | None) -> GrantExpired | None:
    if grant.expires_ms is None or complete_until_ms is None:
        return None
    return GrantExpired(grant.expires_ms) if grant.expires_ms <= complete_until_ms else None


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


def scope_of(scope: GrantScope) -> GrantScope | None:
    """Return a scope as it is kept: each name once and in order; None where it names nothing."""
    named = {
        name: tuple(sorted(set(members)))
        for name in scope.__struct_fields__
        if (members := getattr(scope, name)) is not None
    }
    return replace(scope, **named) if named else None
