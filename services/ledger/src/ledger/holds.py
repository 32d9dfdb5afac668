"""What a hold guarantees: an amount reserved on named lots, then on the credit limit.

A job asks to start under a hold. The hold reserves all of its amount or nothing: on the lots open
now in draw order, then on what is left of the credit limit (`LIMIT`). What is reserved nobody else
can take. Charges of its runs draw on what is free or reserved by their own hold, and the hold's
reservations shrink by what they drew: first where they drew, then from the last place in order (the
limit is last of all). So drawing under a hold leaves the available amount as it was.

A hold ends once, by the first of: its allocation's `final`, a release, its expiry by the ledger's
clock. Ended, it reserves nothing; a later charge of its run is booked as one without a hold.

Refusals, in order of precedence. Placing: `HoldOver`, `InsufficientCredit`. Releasing:
`HoldClosed`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from hisab_contracts.entries import HoldDetail
from hisab_contracts.ids import AllocationId, HoldId
from ledger.grants import Draw

LIMIT: Final = "limit"
"""Where a hold reserves on the credit limit instead of on a lot; its draws are `receivable`."""

HoldEnd = Literal["final", "released", "expired"]


class Hold(Struct, frozen=True):
    """A hold: what it reserved and still reserves, in draw order; nothing once it has ended."""

    hold_id: HoldId
    hold_micro: int
    allocation_id: AllocationId | None
    expires_ms: int
    end: HoldEnd | None = None
    """None while it stands."""
    reserved: tuple[Draw, ...] = ()

    @property
    def open_micro(self) -> int:
        """What it still reserves."""
        return sum(micro for _, micro in self.reserved)


class HoldState(Struct, frozen=True):
    """A hold as it stands, and what its tenant has available then."""

    hold_id: HoldId
    state: str
    """open, final, released or expired."""
    hold_micro: int
    open_micro: int
    available_micro: int


class HoldOver(Struct, frozen=True):
    """The hold's own expiry has come already."""

    expires_ms: int


class InsufficientCredit(Struct, frozen=True):
    """What is available does not cover the hold. `available_micro` may be negative."""

    available_micro: int
    shortfall_micro: int


class HoldClosed(Struct, frozen=True):
    """The hold has ended already."""

    end: HoldEnd


def held(detail: HoldDetail) -> Hold:
    """Return the hold that a placing or releasing entry leaves behind."""
    match detail.cause:
        case "final" | "released" | "expired" as end:
            return Hold(
                detail.hold_id, detail.hold_micro, detail.allocation_id, detail.expires_ms, end
            )
        case _:
            return Hold(
                detail.hold_id,
                detail.hold_micro,
                detail.allocation_id,
                detail.expires_ms,
                reserved=tuple(detail.reserved),
            )


def detail_of(hold: Hold, cause: HoldEnd) -> HoldDetail:
    """Describe the end of a hold for its entry: what it still reserved, and why it ended."""
    return HoldDetail(
        hold_id=hold.hold_id,
        hold_micro=hold.hold_micro,
        open_micro=hold.open_micro,
        reserved=list(hold.reserved),
        cause=cause,
        allocation_id=hold.allocation_id,
        expires_ms=hold.expires_ms,
    )


def shrink(hold: Hold, draws: Iterable[Draw]) -> tuple[Hold, list[Draw]]:
    """Take what a charge drew off its hold's reservations; return the hold, and what it gave up.

    `draws` are amounts at lots or at `LIMIT`. Conserves: what is given up is the lesser of what was
    drawn and what was reserved.
    """
    reserved = dict(hold.reserved)
    elsewhere_micro = 0
    for place, drawn_micro in draws:
        here_micro = min(drawn_micro, reserved.get(place, 0))
        if here_micro:
            reserved[place] -= here_micro
        elsewhere_micro += drawn_micro - here_micro
    for place in reversed(reserved):
        last_micro = min(elsewhere_micro, reserved[place])
        reserved[place] -= last_micro
        elsewhere_micro -= last_micro
    given_up = [
        (place, before_micro - reserved[place])
        for place, before_micro in hold.reserved
        if before_micro != reserved[place]
    ]
    kept = tuple((place, micro) for place, micro in reserved.items() if micro)
    return replace(hold, reserved=kept), given_up
