"""What a hold guarantees: an amount reserved on named lots, then on the credit limit.

A job asks to start under a hold. The hold reserves all of its amount or nothing: on the lots open
now that fit it, in draw order, then on what is left of the credit limit (`LIMIT`). What is reserved
nobody else can take. Charges of its runs draw on what is free or reserved by their own hold, and
the hold's reservations shrink by what they drew: first where they drew, then from the last place in
order (the limit is last of all). So drawing under a hold leaves the available amount as it was.

Credit that returns to what a run of an open hold drew lets the hold grow back where it returned,
once it has made good what was drawn past the hold (`grow_hold`). A lot that expires takes its
reservations with it: they move to other lots and to the limit. What fits nowhere, and what returns
where nothing can be reserved, the hold is *short*. So always `hold = open + short + given up`, and
what was given up was drawn.

A hold ends once, by the first of: its allocation's `final`, a release, its expiry by the ledger's
clock. Ended, it reserves nothing; a later charge of its run is booked as one without a hold.

What an entry says about a hold (`HoldDetail`) is written here, in `placed_detail` and `detail_of`,
and read back here, in `hold_after`. Why a hold has ended is `ended_by` everywhere but in what is
stored and hashed: there it is the detail's `cause` and the column `ended`.

Refusals, in order of precedence. Pricing: `TenantSuspended`, `NoPrice`, `PriceOutOfRange`. Placing:
`HoldOver`, `TenantSuspended`, `InsufficientCredit`. Extending: `HoldClosed`, `HoldOver`,
`TenantSuspended`, `InsufficientCredit`. Releasing: `HoldClosed`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from hisab_contracts.entries import HoldDetail
from hisab_contracts.ids import AllocationId, HoldId, HubCode, PriceClass, ProjectId, Sku
from hisab_contracts.invariants import InvariantBroken
from hisab_contracts.prices import PriceBook, PriceSeries, quote_micro
from hisab_contracts.units import MAX_MICRO, hour_floor_ms
from ledger.core.lots import Draw, Lot, UsageTerms, in_draw_order

LIMIT: Final = "limit"
"""Where a hold reserves on the credit limit instead of on a lot; its draws are `receivable`."""

HoldEnd = Literal["final", "released", "expired"]
"""What ended a hold: its allocation's final, a release on request, or its expiry."""


class PlaceHold(Struct, frozen=True, kw_only=True):
    """Reserve an amount for a job that wants to start, and note what its scheduler said of it."""

    hold_id: HoldId
    hold_micro: int
    project_id: ProjectId
    job_ref: str
    allocation_id: AllocationId | None
    """The run whose final ends it; None: only a release or its expiry does."""
    hub: HubCode
    sku: Sku
    price_class: PriceClass | None
    """None: it names none, and reserves on no lot that is for some classes only."""
    expires_ms: int
    actor: str

    @property
    def terms(self) -> UsageTerms:
        """What it is for."""
        return UsageTerms(
            hub=self.hub, sku=self.sku, project_id=self.project_id, price_class=self.price_class
        )


class ExtendHold(Struct, frozen=True, kw_only=True):
    """Guarantee more to a job that runs, for longer, or both: all of it or nothing."""

    hold_id: HoldId
    add_micro: int
    expires_ms: int | None
    """None: as it is."""
    terms: UsageTerms
    """What the hold is for, as it was placed."""
    actor: str


class ReleaseHold(Struct, frozen=True, kw_only=True):
    """End a hold: what it still reserves is free again."""

    hold_id: HoldId
    ended_by: HoldEnd
    caused_by: str
    actor: str


class Hold(Struct, frozen=True, kw_only=True):
    """A hold: what it reserved and still reserves, in draw order; nothing once it has ended."""

    hold_id: HoldId
    hold_micro: int
    allocation_id: AllocationId | None
    expires_ms: int
    ended_by: HoldEnd | None = None
    """None while it stands."""
    reserved: tuple[Draw, ...] = ()
    placed_seq: int
    """The position of the entry that placed it: reservations move in this order."""
    short_micro: int = 0
    """What it lost with lots that expired under it, or that returned where nothing can be reserved;
    new credit does not give it back."""
    drawn_micro: int = 0
    """What its runs were charged while it stood, less what they got back.

    Of charges of release 1 only what was not drawn past it.
    """

    @property
    def open_micro(self) -> int:
        """What it still reserves."""
        return sum(micro for _, micro in self.reserved)

    @property
    def given_up_micro(self) -> int:
        """By how much what was drawn has shrunk its reservations."""
        return self.hold_micro - self.open_micro - self.short_micro

    def is_over(self, now_ms: int) -> bool:
        """Say whether its time has come while no entry has ended it: it reserves nothing then."""
        return self.ended_by is None and self.expires_ms <= now_ms


class HoldState(Struct, frozen=True, kw_only=True):
    """A hold as it stands, and what its tenant has available then."""

    hold_id: HoldId
    ended_by: HoldEnd | None
    """None while it stands."""
    hold_micro: int
    open_micro: int
    short_micro: int
    drawn_micro: int
    available_micro: int


class NoPrice(Struct, frozen=True):
    """No price line covers this hour, so the hold has no amount."""

    series: PriceSeries


class PriceOutOfRange(Struct, frozen=True):
    """So many GPUs for so long cost more than an amount can be (64 bits)."""

    priced_micro: int


class HoldOver(Struct, frozen=True):
    """The hold's own expiry has come already."""

    expires_ms: int


class InsufficientCredit(Struct, frozen=True, kw_only=True):
    """What the hold could reserve does not cover it."""

    available_micro: int
    """The largest hold of the same terms that would be placed."""
    shortfall_micro: int
    """What the hold that was asked for could not reserve."""


class TenantSuspended(Struct, frozen=True):
    """The tenant gets no new hold."""


class HoldClosed(Struct, frozen=True):
    """The hold has ended already."""

    ended_by: HoldEnd


def price_hold(
    prices: PriceBook, series: PriceSeries, *, gpus: int, duration_ms: int, now_ms: int
) -> int | NoPrice | PriceOutOfRange:
    """Price a hold asked for as GPUs and a duration, at the price line that rates the hour of now.

    The rule is the one that metering rates usage by, so a job is admitted at the price it will be
    charged at.
    """
    line = prices.line_at(series, hour_floor_ms(now_ms))
    if line is None:
        return NoPrice(series)
    priced_micro = quote_micro(line, gpus, duration_ms)
    return PriceOutOfRange(priced_micro) if priced_micro > MAX_MICRO else priced_micro


def placed_detail(command: PlaceHold, reserved: Sequence[Draw]) -> HoldDetail:
    """Describe a hold for the entry that places it: what it reserves where, in draw order."""
    return HoldDetail(
        hold_id=command.hold_id,
        hold_micro=command.hold_micro,
        open_micro=command.hold_micro,
        reserved=list(reserved),
        cause="placed",
        allocation_id=command.allocation_id,
        expires_ms=command.expires_ms,
    )


def detail_of(hold: Hold, cause: Literal["moved", "extended"] | HoldEnd) -> HoldDetail:
    """Describe a hold for the entry that changes or ends it.

    Of a change, what it reserves where from now on; of an end, what it still reserved.
    """
    return HoldDetail(
        hold_id=hold.hold_id,
        hold_micro=hold.hold_micro,
        open_micro=hold.open_micro,
        reserved=list(hold.reserved),
        cause=cause,
        allocation_id=hold.allocation_id,
        expires_ms=hold.expires_ms,
        short_micro=hold.short_micro or None,
    )


def hold_after(detail: HoldDetail, before: Hold | None, seq: int) -> Hold:
    """Return the hold that the entry at `seq` leaves behind: it placed, changed or ended it.

    Raises `InvariantBroken` for a cause that is none of these: a hold taken for open because its
    end is not understood would keep reserving what others may have been given.
    """
    if detail.cause == "placed":
        return Hold(
            hold_id=detail.hold_id,
            hold_micro=detail.hold_micro,
            allocation_id=detail.allocation_id,
            expires_ms=detail.expires_ms,
            reserved=tuple(detail.reserved),
            placed_seq=seq,
        )
    if before is None:
        raise InvariantBroken(f"a hold is {detail.cause} that was not placed")
    match detail.cause:
        case "moved":
            short_micro = detail.short_micro or 0
            return replace(before, reserved=tuple(detail.reserved), short_micro=short_micro)
        case "extended":
            return replace(
                before,
                hold_micro=detail.hold_micro,
                expires_ms=detail.expires_ms,
                reserved=tuple(detail.reserved),
            )
        case "final" | "released" | "expired" as ended_by:
            # The entry lists what was still reserved; ended, the hold keeps nothing of it.
            return replace(before, ended_by=ended_by, reserved=())
        case unknown:
            raise InvariantBroken(f"a hold is neither placed, changed nor ended by {unknown}")


def shrink_hold(hold: Hold, draws: Iterable[Draw]) -> list[Draw]:
    """Say what a hold gives up for what a charge drew: its reservations' changes, none above 0.

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
    # What was drawn where nothing was reserved is given up from the last place in order, so that
    # the hold keeps the lots that pay first and gives the credit limit back first.
    for place in reversed(reserved):
        last_micro = min(elsewhere_micro, reserved[place])
        reserved[place] -= last_micro
        elsewhere_micro -= last_micro
    return [
        (place, reserved[place] - before_micro)
        for place, before_micro in hold.reserved
        if before_micro != reserved[place]
    ]


def grow_hold(hold: Hold, returns: Iterable[Draw], lost: Collection[str]) -> tuple[list[Draw], int]:
    """Say what a hold reserves again of what its run gave back, and what it is short of it.

    `returns` are amounts at lots, at `LIMIT` or at `unfunded`, in the order in which they return.
    At a place that is `lost` nothing can be reserved. What was drawn past the hold is made good
    first, out of what is lost before anything else; of what follows the hold grows where it
    returned, or is short where that is lost. Nothing beyond what was drawn under it counts.
    """
    # Never below 0 but where old code wrote this hold after new code had counted.
    past_micro = max(0, hold.drawn_micro - hold.given_up_micro)
    counted_micro = hold.drawn_micro
    short_micro = 0
    grown: dict[str, int] = {}
    for place, returned_micro in sorted(returns, key=lambda draw: draw[0] not in lost):
        back_micro = min(returned_micro, counted_micro)
        counted_micro -= back_micro
        made_good_micro = min(back_micro, past_micro)
        past_micro -= made_good_micro
        if place in lost:
            short_micro += back_micro - made_good_micro
        elif back_micro > made_good_micro:
            grown[place] = grown.get(place, 0) + back_micro - made_good_micro
    return list(grown.items()), short_micro


def hold_after_charge(
    hold: Hold,
    drawn_micro: int,
    changes: Iterable[Draw],
    order: Mapping[str, int],
    *,
    short_micro: int = 0,
) -> Hold:
    """Return an open hold after a charge of its run drew so much, or gave back, below 0.

    `order` says where each lot stands in draw order: a place that is new goes where it belongs.
    """
    reserved = dict(hold.reserved)
    for place, change_micro in changes:
        reserved[place] = reserved.get(place, 0) + change_micro
    return replace(
        hold,
        reserved=places_in_order(reserved, order),
        short_micro=hold.short_micro + short_micro,
        drawn_micro=max(0, hold.drawn_micro + drawn_micro),
    )


def places_in_order(reserved: Mapping[str, int], order: Mapping[str, int]) -> tuple[Draw, ...]:
    """List what is reserved where, in draw order, the limit last; places with nothing are out."""
    held = [place for place, micro in reserved.items() if micro]
    held.sort(key=lambda place: order.get(place, len(order)))
    return tuple((place, reserved[place]) for place in held)


def order_of(lots: Iterable[Lot]) -> dict[str, int]:
    """Number the accounts of lots as they stand in draw order, whatever order they came in."""
    return {lot.account: position for position, lot in enumerate(in_draw_order(lots))}
