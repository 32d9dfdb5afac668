"""Lots: which credit pays for which usage, how much of it, and in which order.

An approved grant is one `Lot`. What it pays for is its terms and nothing else: its *window* (the
instant of the usage), its *scope* (hub, SKU, project, price class) and its *share* (`coverage_bps`:
a subsidy of 40 % pays that part of a bucket, rounded down over the whole bucket and not over each
message of it). How much it can ever pay is its amount: the cap of a subsidy.

There is one total order in which lots pay, reserve and are listed (`draw_order`): priority, then
expiry (none is last), then effective instant, then grant id. It depends on terms alone, so the
order in which lots were loaded cannot change who pays. One waterfall (`take_from_lots`) serves
charges and holds alike.

**Expired.** What was left of a lot when nothing could be used in its window any more has gone to
`breakage` (`Lot.expired_micro`). Usage that is heard of later for an hour of that window may take
it back: no credit is lost to lateness, until its programme has reclaimed it.

Refuses nothing: what no lot gives is told to who asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from msgspec import Struct

from hisab_contracts.entries import GrantScope
from hisab_contracts.ids import GrantId, HubCode, PriceClass, ProgrammeId, ProjectId, Sku

LOT: Final = "lot:"
"""Begins the account of a lot: `lot:<grant id>`."""
WHOLE_BPS: Final = 10_000
"""The share of a lot that pays all of a bucket."""

Draw = tuple[str, int]
"""(account, micro): an amount at a place, listed in the order of drawing or reserving."""

_NOTHING: Final[Mapping[str, int]] = MappingProxyType({})


class UsageTerms(Struct, frozen=True, kw_only=True):
    """What a charge or a hold is for, as far as a lot's scope asks."""

    hub: HubCode
    sku: Sku
    project_id: ProjectId
    price_class: PriceClass | None
    """None: not known yet (a hold of a stated amount); no lot scoped by class matches it."""


class Lot(Struct, frozen=True):
    """What is left of one grant. `granted = drawn + remaining + expired`; reserved <= remaining."""

    grant_id: GrantId
    programme_id: ProgrammeId
    priority: int
    """Lower pays first."""
    effective_ms: int
    expires_ms: int | None
    """None: never."""
    granted_micro: int
    """0 once the grant was reversed."""
    remaining_micro: int
    reserved_micro: int = 0
    """What open holds have reserved of the remainder: nobody else can take it."""
    scope: GrantScope | None = None
    """None: it may be used for everything."""
    coverage_bps: int = WHOLE_BPS
    """Which part of each bucket it pays, in 1/100 %."""
    expired_micro: int = 0
    """What expired of it and was not taken back."""
    reclaimed_micro: int = 0
    """What of that went back to its programme."""

    @property
    def account(self) -> str:
        """Its account in the tenant's book."""
        return LOT + self.grant_id

    @property
    def free_micro(self) -> int:
        """What no hold has reserved."""
        return self.remaining_micro - self.reserved_micro

    @property
    def drawn_micro(self) -> int:
        """What usage has drawn of it and not returned."""
        return self.granted_micro - self.remaining_micro - self.expired_micro

    @property
    def returnable_micro(self) -> int:
        """What late usage may take back: nothing once its programme has it again."""
        return 0 if self.reclaimed_micro else self.expired_micro

    def is_open(self, instant_ms: int) -> bool:
        """Say whether usage at this instant may draw on it: effective <= instant < expires."""
        if instant_ms < self.effective_ms:
            return False
        return self.expires_ms is None or instant_ms < self.expires_ms

    def is_closed_for_good(self, complete_until_ms: int | None) -> bool:
        """Say whether all usage of its window has been heard of; None: nothing is complete."""
        if self.expires_ms is None or complete_until_ms is None:
            return False
        return self.expires_ms <= complete_until_ms

    def fits(self, terms: UsageTerms) -> bool:
        """Say whether it may be used for this: every member of its scope has to match."""
        scope = self.scope
        if scope is None:
            return True
        return (
            _is_in(scope.hubs, terms.hub)
            and _is_in(scope.skus, terms.sku)
            and _is_in(scope.projects, terms.project_id)
            and _is_in(scope.price_classes, terms.price_class)
        )

    def share_micro(self, total_micro: int) -> int:
        """Return the most it pays of a bucket that costs this, or reserves for a hold of this."""
        return total_micro * self.coverage_bps // WHOLE_BPS


def _is_in(members: tuple[str, ...] | None, asked: str | None) -> bool:
    return members is None or asked in members


def draw_order(lot: Lot) -> tuple[int, bool, int, int, str]:
    """Sort key of the one order in which lots pay: priority, expiry, effective, grant id."""
    never = lot.expires_ms is None
    return (lot.priority, never, lot.expires_ms or 0, lot.effective_ms, lot.grant_id)


def in_draw_order(lots: Iterable[Lot]) -> tuple[Lot, ...]:
    """Sort lots into the order in which they pay."""
    return tuple(sorted(lots, key=draw_order))


def fitting_lots(lots: Iterable[Lot], instant_ms: int, terms: UsageTerms) -> list[Lot]:
    """Return the lots open at an instant that fit, in draw order, whatever order they came in."""
    found = [lot for lot in lots if lot.is_open(instant_ms) and lot.fits(terms)]
    if len(found) > 1:
        # Sorted here although stores sort too: who pays must not hang on how lots were loaded.
        found.sort(key=draw_order)
    return found


def take_from_lots(
    lots: Iterable[Lot],
    wanted_micro: int,
    *,
    total_micro: int,
    own: Mapping[str, int] = _NOTHING,
    given: Mapping[str, int] = _NOTHING,
    taking_back: bool = False,
) -> tuple[list[Draw], int]:
    """Say what each of these lots gives towards an amount, in their order, and what none gives.

    `total_micro` is what their shares are of: all that the bucket costs, or the whole hold. `given`
    maps accounts to what they have given of that total before. `own` maps accounts to what the
    taker itself has reserved there: open to it, and to nobody else. `taking_back`: also what has
    expired. Conserves: what is taken and what is left add up to what was wanted.
    """
    left_micro = wanted_micro
    taken: list[Draw] = []
    for lot in lots:
        if not left_micro:
            break
        usable_micro = lot.free_micro + own.get(lot.account, 0)
        if taking_back:
            usable_micro += lot.returnable_micro
        if lot.coverage_bps < WHOLE_BPS:
            share_micro = lot.share_micro(total_micro) - given.get(lot.account, 0)
            usable_micro = min(usable_micro, max(0, share_micro))
        given_micro = min(left_micro, usable_micro)
        if given_micro:
            taken.append((lot.account, given_micro))
            left_micro -= given_micro
    return taken, left_micro


def largest_hold(lots: Iterable[Lot], limit_micro: int) -> int:
    """Return the largest amount that these lots and this much of a credit limit can guarantee.

    A lot with a share reserves no more than that part of the whole hold, so the largest hold is the
    largest X with `X <= limit + sum of min(free, floor(X * share))`. The right side never falls as
    X rises, so going down from above by it ends at exactly that X. It begins at the root of the
    same without rounding: the end is at most 10 000 micro per lot below it.
    """
    shared = [(lot.free_micro, lot.coverage_bps) for lot in lots if lot.coverage_bps < WHOLE_BPS]
    certain_micro = limit_micro + sum(lot.free_micro for lot in lots if _is_whole(lot))
    hold_micro = _largest_unrounded(shared, certain_micro)
    while True:
        shares_micro = sum(min(free, hold_micro * bps // WHOLE_BPS) for free, bps in shared)
        if certain_micro + shares_micro >= hold_micro:
            return hold_micro
        hold_micro = certain_micro + shares_micro


def _is_whole(lot: Lot) -> bool:
    return lot.coverage_bps == WHOLE_BPS


def _largest_unrounded(shared: list[tuple[int, int]], certain_micro: int) -> int:
    """Return the floor of the largest X with X <= certain + sum of min(free, X * share).

    Newton's method on a concave function, from the right: each step lets at least one more lot give
    its share instead of all that is free, so there are no more steps than lots.
    """
    hold_micro = certain_micro + sum(free for free, _ in shared)
    while True:
        by_share = [bps for free, bps in shared if hold_micro * bps < free * WHOLE_BPS]
        whole_micro = sum(free for free, bps in shared if hold_micro * bps >= free * WHOLE_BPS)
        if sum(by_share) >= WHOLE_BPS:
            return hold_micro
        below_micro = (certain_micro + whole_micro) * WHOLE_BPS // (WHOLE_BPS - sum(by_share))
        if below_micro >= hold_micro:
            return hold_micro
        hold_micro = below_micro
