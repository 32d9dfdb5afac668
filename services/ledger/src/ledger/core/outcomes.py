"""Outcomes: what a tenant achieved with a grant, on record and accepted by a second person.

An officer submits an outcome with the digest of its evidence, which is kept elsewhere; an approver
accepts it, with another key. Neither enters anything into a book. What is accepted opens the way
for the next *tranche*: a grant that comes after another (`Grant.after_grant`) is approved only once
an outcome of that one is accepted (`grants.refuse_approval`). An acceptance is never taken back, so
a tranche that could be approved for its outcome's sake can be approved later too.

What outcomes cost is reported by the theme of programmes: the credit that was drawn of grants with
an accepted outcome, over the number of these outcomes.

Refusals, in order of precedence. Submission: `NotApproved`, `OutcomesExceeded`. Acceptance:
`MakerIsChecker`, `DecisionForbidden`, `AlreadyDecided`, `NotApproved`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

from msgspec import Struct

from hisab_contracts.ids import GrantId, KeyId, OutcomeId, TenantId
from hisab_contracts.invariants import invariant
from hisab_contracts.reference import Role
from hisab_contracts.units import mean_micro_half_up
from ledger.core.grants import Grant, GrantState
from ledger.core.proposals import AlreadyDecided, DecisionForbidden, MakerIsChecker

OutcomeState = Literal["submitted", "accepted"]

MOST_OUTCOMES: Final = 100
"""How many outcomes a grant may have: all of them are shown with it."""

_HAD_A_LOT: Final[tuple[GrantState, ...]] = ("approved", "revoked")
"""Where a grant stands that gave credit: a reversed one never did."""


class GrantOutcome(Struct, frozen=True, kw_only=True):
    """What was achieved with a grant, as an officer put it on record."""

    outcome_id: OutcomeId
    grant_id: GrantId
    tenant_id: TenantId
    kind: str
    """What was achieved, in the programme's own words: a model trained, a paper, a pilot."""
    evidence_sha256: str
    """The digest of the evidence, in hexadecimal; the evidence itself is not kept here."""
    note: str
    state: OutcomeState = "submitted"
    submitted_by: KeyId
    accepted_by: KeyId | None = None


class NotApproved(Struct, frozen=True):
    """The grant gave no credit that anything could have been achieved with."""

    state: GrantState


class OutcomesExceeded(Struct, frozen=True):
    """The grant has as many outcomes as it may."""

    most_count: int


SubmissionRefusal = NotApproved | OutcomesExceeded
"""Why an outcome is not put on record, in order of precedence."""

AccepterRefusal = MakerIsChecker | DecisionForbidden
AcceptanceRefusal = AccepterRefusal | AlreadyDecided | NotApproved
"""Why an outcome is not accepted, in order of precedence."""


def refuse_submission(grant: Grant, outcome_count: int) -> SubmissionRefusal | None:
    """Say why a grant that has so many outcomes takes no further one, or None."""
    if grant.state not in _HAD_A_LOT:
        return NotApproved(grant.state)
    return OutcomesExceeded(MOST_OUTCOMES) if outcome_count >= MOST_OUTCOMES else None


def refuse_acceptance(
    outcome: GrantOutcome, grant: Grant, key_id: KeyId, role: str
) -> AcceptanceRefusal | None:
    """Say why a key may not accept an outcome of a grant, or None."""
    refused = refuse_accepter(outcome, key_id, role)
    if refused is not None:
        return refused
    if outcome.state != "submitted":
        return AlreadyDecided(outcome.state)
    # Reversed since it was submitted: a grant that should not have been made opens no tranche.
    return None if grant.state in _HAD_A_LOT else NotApproved(grant.state)


def refuse_accepter(
    outcome: GrantOutcome | None, key_id: KeyId, role: str
) -> AccepterRefusal | None:
    """Say why a key may not accept this, whatever its state, or None; nor anything, where None.

    As of proposals, the submitter hears it first.
    """
    if outcome is not None and key_id == outcome.submitted_by:
        return MakerIsChecker()
    if role == Role.APPROVER:
        return None
    return DecisionForbidden("accepting an outcome takes an approver")


def has_accepted(outcomes: Iterable[GrantOutcome]) -> bool:
    """Say whether one of these outcomes is accepted."""
    return any(outcome.state == "accepted" for outcome in outcomes)


class ThemeCost(Struct, frozen=True, kw_only=True):
    """What the outcomes of a theme cost, over all of its programmes of one currency."""

    theme: str | None
    """None: programmes of which nobody said what they are for."""
    currency: str
    grant_count: int
    """Grants with an accepted outcome."""
    outcome_count: int
    """Accepted outcomes."""
    drawn_micro: int
    """What charges were paid with out of these grants, less what they gave back."""

    @property
    def micro_per_outcome(self) -> int | None:
        """What one outcome cost, half-up to the micro-unit; None: nothing is accepted yet."""
        invariant(self.grant_count <= self.outcome_count, "each of these grants has an outcome")
        if not self.outcome_count:
            return None
        return mean_micro_half_up(self.drawn_micro, self.outcome_count)
