"""What a grant is, when its lot is open, in which order lots pay, and who may approve.

A *grant* is a promise of credit by a programme to a tenant: proposed by an officer, approved by
somebody else. An approved grant is one *lot* of the tenant's book, with terms that never change: a
window [effective, expires) on whole UTC hours and a priority. Because usage is charged by the UTC
hour, an hour bucket lies wholly inside or outside every window.

There is one total order in which lots pay, reserve and are listed (`draw_order`): priority, then
expiry (none is last), then effective instant, then grant id. It depends on the terms alone, so the
order in which lots were loaded cannot change who pays.

One waterfall (`take_from_lots`) serves holds and charges alike: what is free of each open lot, and
what the taker itself has reserved there.

Refusals, in order of precedence. Terms: not well-formed (`fault_of_terms`), well-formed but later
than this foundation (`unsupported_terms`). Approval: `MakerIsChecker`, `GrantNotProposed`,
`GrantExpired`, then `BudgetExceeded` by the programme's own book (`book.decide`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from hisab_contracts.ids import GrantId, KeyId, ProgrammeId, TenantId
from hisab_contracts.units import is_whole_hour

GrantState = Literal["proposed", "approved"]

LOT: Final = "lot:"
"""Begins the account of a lot: `lot:<grant id>`."""

Draw = tuple[str, int]
"""(account, micro): an amount at a place, listed in the order of drawing or reserving."""


class Grant(Struct, frozen=True):
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
    state: GrantState
    proposed_by: KeyId
    approved_by: KeyId | None


class Lot(Struct, frozen=True):
    """What is left of one grant. `0 <= reserved_micro <= remaining_micro <= granted_micro`."""

    grant_id: GrantId
    programme_id: ProgrammeId
    priority: int
    effective_ms: int
    expires_ms: int | None
    granted_micro: int
    remaining_micro: int
    reserved_micro: int = 0
    """What open holds have reserved of the remainder: nobody else can take it."""

    @property
    def account(self) -> str:
        """Its account in the tenant's book."""
        return LOT + self.grant_id

    @property
    def free_micro(self) -> int:
        """What no hold has reserved."""
        return self.remaining_micro - self.reserved_micro

    def is_open(self, instant_ms: int) -> bool:
        """Say whether usage at this instant may draw on it: effective <= instant < expires."""
        if instant_ms < self.effective_ms:
            return False
        return self.expires_ms is None or instant_ms < self.expires_ms


def draw_order(lot: Lot) -> tuple[int, bool, int, int, str]:
    """Sort key of the one order in which lots pay: priority, expiry, effective, grant id."""
    never = lot.expires_ms is None
    return (lot.priority, never, lot.expires_ms or 0, lot.effective_ms, lot.grant_id)


def in_draw_order(lots: Iterable[Lot]) -> tuple[Lot, ...]:
    """Sort lots into the order in which they pay."""
    return tuple(sorted(lots, key=draw_order))


def open_lots(lots: Iterable[Lot], instant_ms: int) -> list[Lot]:
    """Return the lots open at an instant, in draw order, whatever order they came in."""
    found = [lot for lot in lots if lot.is_open(instant_ms)]
    if len(found) > 1:
        found.sort(key=draw_order)
    return found


def take_from_lots(
    lots: Iterable[Lot], instant_ms: int, wanted_micro: int, own: Mapping[str, int]
) -> tuple[list[Draw], int]:
    """Say what each lot open at an instant gives towards an amount, and what none gives.

    `own` maps accounts to what the taker itself has reserved there: open to it, and to nobody else.
    Conserves: what is taken and what is left add up to what was wanted.
    """
    left_micro = wanted_micro
    taken: list[Draw] = []
    for lot in open_lots(lots, instant_ms):
        if not left_micro:
            break
        given_micro = min(left_micro, lot.free_micro + own.get(lot.account, 0))
        if given_micro:
            taken.append((lot.account, given_micro))
            left_micro -= given_micro
    return taken, left_micro


class MakerIsChecker(Struct, frozen=True):
    """The key that proposed a grant asks to approve it."""


class GrantNotProposed(Struct, frozen=True):
    """The grant has been decided already."""

    state: GrantState


class GrantExpired(Struct, frozen=True):
    """The grant's window has ended: approving it would grant nothing."""

    expires_ms: int


class BudgetExceeded(Struct, frozen=True):
    """The programme has promised so much already that this grant does not fit."""

    budget_left_micro: int
    shortfall_micro: int


ApprovalRefused = MakerIsChecker | GrantNotProposed | GrantExpired
"""Why an approval is refused before the programme's budget is asked, in order of precedence."""


def approve(grant: Grant, approver: KeyId, now_ms: int) -> Grant | ApprovalRefused:
    """Decide an approval: the grant as approved, or why not. Every grant needs two keys."""
    if approver == grant.proposed_by:
        return MakerIsChecker()
    if grant.state != "proposed":
        return GrantNotProposed(grant.state)
    if grant.expires_ms is not None and grant.expires_ms <= now_ms:
        return GrantExpired(grant.expires_ms)
    return replace(grant, state="approved", approved_by=approver)


def within_budget(budget_left_micro: int, grant_micro: int) -> BudgetExceeded | None:
    """Refuse a grant that its programme cannot cover; None when it fits."""
    shortfall_micro = grant_micro - budget_left_micro
    if shortfall_micro > 0:
        return BudgetExceeded(budget_left_micro, shortfall_micro)
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


def id_from_command(prefix: str, scope: str, idempotency_key: str) -> str:
    """Name what a command makes after the command itself, so that a repeat names the same thing.

    80 bits of SHA-256 over the scope and the key, in hexadecimal, behind a one-letter prefix.
    """
    digest = hashlib.sha256(f"{prefix}\0{scope}\0{idempotency_key}".encode())
    return prefix + digest.hexdigest()[:20]
