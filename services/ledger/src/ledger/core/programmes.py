"""What a programme comes to: what it was given, promised, and has left, to the micro-unit.

The figures are those of the books. What a programme was given, has promised and has left are
accounts of its own book; what became of its promises stands in the lots of its tenants. Two
identities hold, and are held here: `budget = left + granted - reclaimed`, and, of one tenant's lots
as of all of them, `granted = drawn + remaining + expired`. What was drawn is what charges were paid
with, less what they gave back.

Refuses nothing. `InvariantBroken` where a programme's book and the lots do not agree.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from hisab_contracts.ids import ProgrammeId, TenantId
from hisab_contracts.invariants import invariant
from ledger.core.grants import Grant, GrantState

GrantStanding = GrantState | Literal["expired"]
"""Where a grant stands as it is shown: that it has expired is no decision, so it is not kept."""


class LotSums(Struct, frozen=True, kw_only=True):
    """Lots of a programme, added up: those of one tenant, or all."""

    granted_micro: int = 0
    remaining_micro: int = 0
    reserved_micro: int = 0
    """What open holds keep of the remainder."""
    expired_micro: int = 0
    """What went to breakage and was not taken back."""

    @property
    def drawn_micro(self) -> int:
        """What charges were paid with, less what they gave back."""
        return self.granted_micro - self.remaining_micro - self.expired_micro


def standing_of(grant: Grant, lot: LotSums, complete_until_ms: int | None) -> GrantStanding:
    """Say where a grant stands: an approved one has expired once all usage of its window is known.

    Also when something of it went to breakage already: then somebody knew it.
    """
    if grant.state != "approved":
        return grant.state
    is_over = (
        grant.expires_ms is not None
        and complete_until_ms is not None
        and grant.expires_ms <= complete_until_ms
    )
    return "expired" if is_over or lot.expired_micro else "approved"


class TenantShare(Struct, frozen=True):
    """What one tenant has of a programme."""

    tenant_id: TenantId
    lots: LotSums


class ProgrammeReport(Struct, frozen=True, kw_only=True):
    """A programme, and what its books come to."""

    programme_id: ProgrammeId
    name: str
    theme: str | None
    """What it is for: agriculture, health, …; None where nobody said."""
    ends_ms: int | None
    currency: str
    budget_micro: int
    """All that it was given."""
    left_micro: int
    """What it may still promise."""
    lots: LotSums
    reclaimed_micro: int
    """What expired and came back to its budget."""
    seq: int
    recorded_ms: int
    """When the last entry of its own book was recorded."""


def report_of(
    programme_id: ProgrammeId,
    name: str,
    *,
    theme: str | None,
    ends_ms: int | None,
    currency: str,
    authority_micro: int,
    left_micro: int,
    promised_micro: int,
    lots: LotSums,
    seq: int,
    recorded_ms: int,
) -> ProgrammeReport:
    """Report on a programme out of balances of its book and the sums of its lots.

    `authority_micro` and `promised_micro` are the balances of `authority` and of all `granted:*`.
    What was promised less than the lots were granted has been reclaimed.
    """
    budget_micro = -authority_micro
    reclaimed_micro = lots.granted_micro - promised_micro
    invariant(reclaimed_micro >= 0, "every promise of a programme is a lot")
    invariant(
        budget_micro == left_micro + lots.granted_micro - reclaimed_micro,
        "a programme's budget is what is left and what it granted",
    )
    return ProgrammeReport(
        programme_id=programme_id,
        name=name,
        theme=theme,
        ends_ms=ends_ms,
        currency=currency,
        budget_micro=budget_micro,
        left_micro=left_micro,
        lots=lots,
        reclaimed_micro=reclaimed_micro,
        seq=seq,
        recorded_ms=recorded_ms,
    )
