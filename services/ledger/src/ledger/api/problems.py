"""Refusals as problems: the only place where what the core and the commands refuse gets a code."""

from __future__ import annotations

from typing import Final, assert_never

from hisab_contracts.invariants import InvariantBroken
from hisab_contracts.units import MAX_MICRO, instant_text
from ledger.commands import AlreadyExists
from ledger.core.adjustments import BudgetOutOfRange, NotCommercial
from ledger.core.charges import RefundAboveTotal, TotalOutOfRange
from ledger.core.decisions import BookRefusal, NotFound
from ledger.core.grants import (
    ApprovalRefusal,
    BudgetExceeded,
    CurrencyDiffers,
    GrantExpired,
    OutcomeMissing,
    ProposalRefusal,
)
from ledger.core.holds import (
    HoldClosed,
    HoldOver,
    InsufficientCredit,
    NoPrice,
    PriceOutOfRange,
    TenantSuspended,
)
from ledger.core.movements import AlreadyInvoiced, NotReceivable
from ledger.core.outcomes import NotApproved, OutcomesExceeded, SubmissionRefusal
from ledger.core.prepayments import PaymentDiffers, TopUpExpired
from ledger.core.proposals import (
    AboveLimit,
    AlreadyDecided,
    ConflictOfInterest,
    DecisionForbidden,
    DecisionRefusal,
    MakerIsChecker,
)
from ledger.core.withdrawals import (
    AlreadyDrawn,
    AlreadyReclaimed,
    AlreadyReversed,
    GrantNotApproved,
    NotExpired,
    NotReversible,
    Reserved,
    WithdrawalRefusal,
)
from runtime.http import Problem

_NOT_REVERSIBLE: Final = {
    "is-reversal": "a reversal is not reversed: make the entry anew",
    "correct-in-metering": "a charge follows from usage: correct it in metering",
    "correct-in-invoicing": "it follows from a document: correct it in invoicing",
    "not-reversible": "entries of this kind are not reversed",
}

CommandRefusal = (
    BookRefusal
    | ProposalRefusal
    | DecisionRefusal
    | SubmissionRefusal
    | NoPrice
    | PriceOutOfRange
    | AlreadyExists
)
"""Why a command is refused, over HTTP."""


def problem_of(refusal: CommandRefusal) -> Problem:
    """Return the problem of a refusal. Raise it inside the transaction: that rolls it back."""
    if isinstance(refusal, WithdrawalRefusal):
        return _problem_of_withdrawal(refusal)
    if isinstance(refusal, ApprovalRefusal):
        return _problem_of_grant(refusal)
    if isinstance(refusal, SubmissionRefusal):
        return _problem_of_submission(refusal)
    match refusal:
        case NotFound(what):
            return Problem("not-found", f"no such {what}")
        case AlreadyExists(what):
            return Problem("already-exists", f"{what} exists")
        case CurrencyDiffers(currency):
            return Problem("unsupported", f"the programme grants {currency} only")
        case (
            MakerIsChecker()
            | DecisionForbidden()
            | AlreadyDecided()
            | ConflictOfInterest()
            | AboveLimit()
        ):
            return _problem_of_decision(refusal)
        case BudgetOutOfRange(budget_micro):
            bound = f"a budget is at most {MAX_MICRO} micro in all"
            return Problem("budget-out-of-range", bound, budget_micro=str(budget_micro))
        case NotCommercial(kind):
            return Problem("not-commercial", f"the tenant is of kind {kind}")
        case NoPrice(series):
            return Problem(
                "no-price", f"no price for {series.sku} {series.price_class} in {series.currency}"
            )
        case PriceOutOfRange(priced_micro):
            bound = f"a hold is at most {MAX_MICRO} micro"
            return Problem("malformed", f"gpus, duration_ms: they cost {priced_micro}; {bound}")
        case HoldOver(expires_ms):
            # There never was such a hold: nothing is closed, the request itself makes no sense.
            return Problem(
                "malformed", f"expires_at: {instant_text(expires_ms)} is not ahead of now"
            )
        case InsufficientCredit(available_micro=available_micro, shortfall_micro=shortfall_micro):
            return Problem(
                "insufficient-credit",
                available_micro=str(available_micro),
                shortfall_micro=str(shortfall_micro),
            )
        case TenantSuspended():
            return Problem("suspended", "no new job of this tenant is admitted")
        case HoldClosed(ended_by):
            # Over the wire the member is called `state`, though it says what ended the hold.
            return Problem("hold-closed", f"it has ended: {ended_by}", state=ended_by)
        case AlreadyInvoiced(invoiced_micro):
            return Problem(
                "already-exists", "this document is entered", invoiced_micro=str(invoiced_micro)
            )
        case NotReceivable(receivable_micro):
            return Problem("not-receivable", receivable_micro=str(receivable_micro))
        case TopUpExpired(expires_ms):
            return Problem("malformed", f"expires_at: {instant_text(expires_ms)} is not ahead")
        case PaymentDiffers(topup_micro):
            return Problem(
                "payment-differs", "this payment is credited", topup_micro=str(topup_micro)
            )
        case RefundAboveTotal() | TotalOutOfRange():
            # Charges come from metering, never over HTTP.
            raise InvariantBroken(f"only a charge is refused so: {refusal}")
        case _:
            assert_never(refusal)


def _problem_of_withdrawal(refusal: WithdrawalRefusal) -> Problem:
    """Return the problem of a refusal to take back what was granted."""
    match refusal:
        case NotReversible(code):
            return Problem(code, _NOT_REVERSIBLE[code])
        case AlreadyReversed():
            return Problem("already-reversed", "this entry was negated before")
        case AlreadyDrawn(drawn_micro):
            return Problem(
                "already-drawn", "usage has drawn on this lot", drawn_micro=str(drawn_micro)
            )
        case Reserved(reserved_micro):
            return Problem(
                "reserved", "open holds reserve on this lot", reserved_micro=str(reserved_micro)
            )
        case GrantNotApproved(state):
            return Problem("already-decided", f"it is {state}", state=state)
        case AlreadyReclaimed():
            return Problem("already-reclaimed", "the programme has it again")
        case NotExpired():
            return Problem("not-expired", "nothing has expired of this grant, or not all of it yet")
        case _:
            assert_never(refusal)


def _problem_of_grant(refusal: ApprovalRefusal) -> Problem:
    """Return the problem of a grant that cannot be approved as things stand."""
    match refusal:
        case GrantExpired(expires_ms):
            return Problem("grant-expired", f"its window ended at {instant_text(expires_ms)}")
        case BudgetExceeded(budget_left_micro=left_micro, shortfall_micro=shortfall_micro):
            return Problem(
                "budget-exceeded",
                budget_left_micro=str(left_micro),
                shortfall_micro=str(shortfall_micro),
            )
        case OutcomeMissing(after_grant):
            return Problem(
                "outcome-missing",
                f"have an outcome of grant {after_grant} accepted first",
                after_grant=after_grant,
            )
        case _:
            assert_never(refusal)


def _problem_of_submission(refusal: SubmissionRefusal) -> Problem:
    """Return the problem of an outcome that is not put on record."""
    match refusal:
        case NotApproved(state):
            return Problem("not-approved", f"it is {state}", state=state)
        case OutcomesExceeded(most_count):
            return Problem("too-many-outcomes", f"a grant has at most {most_count}")
        case _:
            assert_never(refusal)


def _problem_of_decision(refusal: DecisionRefusal) -> Problem:
    """Return the problem of an approval or rejection that is refused."""
    match refusal:
        case MakerIsChecker():
            return Problem("maker-is-checker", "have it approved with another key")
        case DecisionForbidden(who):
            return Problem("forbidden", who)
        case AlreadyDecided(state):
            return Problem("already-decided", f"it is {state}", state=state)
        case ConflictOfInterest():
            return Problem("conflict-of-interest", "have it approved by somebody without one")
        case AboveLimit(
            up_to_micro=up_to_micro, needed_micro=needed_micro, may_approve=may_approve
        ):
            who = ", ".join(may_approve) or "nobody: an operator may raise a limit"
            return Problem(
                "above-limit",
                f"this key approves up to {up_to_micro} micro; who may approve it: {who}",
                approve_up_to_micro=str(up_to_micro),
                needed_micro=str(needed_micro),
                may_approve=list(may_approve),
            )
        case _:
            assert_never(refusal)
