"""Proposed corrections: an operator proposes one, another approves or rejects it.

Theory. A correction over HTTP moves money by hand, so it takes two people. It is decided once. Its
revision is given at the approval, above all that is known of the allocation: what somebody looked
at and corrected counts over what was said before. From then on it is a fact like a hub's.

What was decided is published whole (`CorrectionDecision`), so that it survives a restore. A
correction that was only proposed is not: whoever proposed it sees that it is gone.

Refusals, in order of precedence. Approval: `OwnCorrection`, `CorrectionDecided`. Rejection:
`CorrectionDecided`; who proposed it may take it back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from msgspec import structs

from hisab_contracts.events import Correction
from hisab_contracts.ids import CorrectionId
from hisab_contracts.quarantine import CorrectionDecision

CorrectionState = Literal["proposed", "approved", "rejected"]
"""Where a proposed correction stands; it leaves `proposed` once."""


@dataclass(frozen=True, slots=True)
class ProposedCorrection:
    """A correction that an operator has proposed, and what became of it."""

    correction_id: CorrectionId
    correction: Correction
    """Its revision means nothing before it is approved."""
    proposed_by: str
    proposed_ms: int
    state: CorrectionState = "proposed"
    decided_by: str | None = None
    decided_ms: int | None = None


@dataclass(frozen=True, slots=True)
class OwnCorrection:
    """Who proposed a correction cannot approve it."""

    correction_id: CorrectionId


@dataclass(frozen=True, slots=True)
class CorrectionDecided:
    """The correction was approved or rejected before."""

    correction_id: CorrectionId
    state: CorrectionState


ProposalRefusal = OwnCorrection | CorrectionDecided
"""Why nothing is decided about a proposed correction."""


def approve(
    proposed: ProposedCorrection, approved_by: str, approved_ms: int, revision: int
) -> ProposedCorrection | ProposalRefusal:
    """Approve a correction, at this revision."""
    if proposed.proposed_by == approved_by:
        return OwnCorrection(proposed.correction_id)
    if proposed.state != "proposed":
        return CorrectionDecided(proposed.correction_id, proposed.state)
    correction = structs.replace(proposed.correction, revision=revision, approved_by=approved_by)
    return replace(
        proposed,
        correction=correction,
        state="approved",
        decided_by=approved_by,
        decided_ms=approved_ms,
    )


def reject(
    proposed: ProposedCorrection, rejected_by: str, rejected_ms: int
) -> ProposedCorrection | CorrectionDecided:
    """Reject a correction, or take one's own back."""
    if proposed.state != "proposed":
        return CorrectionDecided(proposed.correction_id, proposed.state)
    return replace(proposed, state="rejected", decided_by=rejected_by, decided_ms=rejected_ms)


def decision_of(decided: ProposedCorrection) -> CorrectionDecision:
    """Return what is published of a correction that was decided."""
    if decided.state == "proposed" or decided.decided_by is None or decided.decided_ms is None:
        raise LookupError(f"{decided.correction_id} is not decided")
    return CorrectionDecision(
        correction_id=decided.correction_id,
        hub=decided.correction.hub,
        state=decided.state,
        correction=decided.correction,
        proposed_by=decided.proposed_by,
        proposed_ms=decided.proposed_ms,
        decided_by=decided.decided_by,
        decided_ms=decided.decided_ms,
    )


def proposal_of(decision: CorrectionDecision) -> ProposedCorrection:
    """Return a decided correction as it was published."""
    return ProposedCorrection(
        correction_id=decision.correction_id,
        correction=decision.correction,
        proposed_by=decision.proposed_by,
        proposed_ms=decision.proposed_ms,
        state=decision.state,
        decided_by=decision.decided_by,
        decided_ms=decision.decided_ms,
    )
