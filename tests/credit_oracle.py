"""The naive oracle of credits: one tenant's book, computed plainly, importing nothing of ours.

Amounts are whole units: a bucket keeps, in order, who paid each single one of them. The credit
limit is a lot that pays last, and more than it has. `entries` are the kinds of what commands enter,
but the ends of holds: the clock ends them whether or not anybody writes it down.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from operator import ge

Terms = dict[str, str | None]  # hub, SKU, project, price class: by the members of a scope


class Refused(Exception):
    """The code of a refusal, then its amounts."""


@dataclass
class Lot:
    """An approved grant: granted = drawn + left + expired (to breakage, and not taken back)."""

    name: str
    granted: int
    priority: int = 0
    effective: int = 0
    expires: int = 2**62
    scope: dict[str, list[str]] = field(default_factory=dict)
    bps: int = 10_000
    left: int = 0
    expired: int = 0

    def order(self) -> tuple[object, ...]:
        return self.name == "limit", self.priority, self.expires, self.effective, self.name

    def fits(self, instant: int, terms: Terms | None) -> bool:
        matches = terms is None or all(terms[m] in self.scope[m] for m in self.scope)
        return matches and self.effective <= instant < self.expires


@dataclass
class Hold:
    """A promise: micro = reserved + short + what it gave up to charges."""

    micro: int
    terms: Terms
    expires: int = 0
    reserved: Counter[str] = field(default_factory=Counter)
    drawn: int = 0
    short: int = 0
    ended: str | None = None


class CreditOracle:
    """One book, at an instant: `book.at(now).hold(...)`."""

    def __init__(self, *, commercial: bool, limit: int = 0) -> None:
        self.overage = "limit" if commercial else "unfunded"
        self.lots = {"limit": Lot("limit", limit, left=limit)}
        self.holds: dict[str, Hold] = {}
        self.draws: defaultdict[str, list[str]] = defaultdict(list)
        self.stated: dict[str, tuple[int, ...]] = {}
        self.watermarks: dict[str, int] = {}  # of a hub; -1: none yet
        self.now, self.entries = 0, list[str]()

    def at(self, now: int) -> CreditOracle:
        """Let time pass: holds that are over end."""
        self.now = now
        for hold in self.holds.values():
            if not hold.ended and hold.expires <= now:
                hold.ended, hold.reserved = "expired", Counter()
        return self

    def free(self, lot: Lot, but: Hold | None = None) -> int:
        return lot.left - sum(h.reserved[lot.name] for h in self.holds.values() if h is not but)

    def available(self) -> int:
        return sum(max(0, self.free(place)) for place in self.places(self.now, None))

    def places(self, instant: int, terms: Terms | None) -> list[Lot]:
        """List the lots that are open and fit, in the order in which they pay; last the limit."""
        return sorted((t for t in self.lots.values() if t.fits(instant, terms)), key=Lot.order)

    def is_past(self, lot: Lot) -> bool:
        """Say whether the watermark of every hub has come to the end of a lot."""
        return lot.expires <= min(self.watermarks.values(), default=-1)

    def grant(self, lot: Lot) -> None:
        if self.is_past(lot):
            raise Refused("grant-expired")
        self.lots[lot.name], lot.left = lot, lot.granted
        self.entries.append("grant")

    def reverse(self, name: str) -> None:
        """Take a grant back, if nothing was drawn of it and no hold stands on it."""
        lot = self.lots[name]
        if not lot.granted:
            raise Refused("already-reversed")
        if drawn := sum(units.count(name) for units in self.draws.values()):
            raise Refused("already-drawn", drawn)
        if self.free(lot) < lot.left:
            raise Refused("reserved")
        self.entries += ["expiry_reversed"] * bool(lot.expired) + ["reversal"]
        lot.granted = lot.left = lot.expired = 0

    def hold(self, name: str, hold: Hold) -> None:
        """Reserve all or nothing; a refusal tries every amount, from the largest down."""
        if missing := self.seat(hold, hold.micro):
            sizes = range(sum(lot.granted for lot in self.lots.values()), -1, -1)
            largest = next(x for x in sizes if not self.seat(Hold(x, hold.terms), x))
            raise Refused("insufficient-credit", largest, missing)
        self.holds[name] = hold
        self.entries.append("hold_placed")

    def seat(self, hold: Hold, missing: int, but: tuple[Lot, ...] = ()) -> int:
        """Reserve what is missing of a hold where it fits (but on some); say what is left."""
        for lot in self.places(self.now, hold.terms):
            share = hold.micro * lot.bps // 10_000 - hold.reserved[lot.name]
            found = max(0, min(missing, self.free(lot), share)) if lot not in but else 0
            hold.reserved[lot.name] += found
            missing -= found
        return missing

    def release(self, name: str) -> None:
        if ended := self.holds[name].ended:
            raise Refused("hold-closed", ended)
        self.holds[name].ended, self.holds[name].reserved = "released", Counter()

    def charge(self, name: str, stated: tuple[int, ...], at: int, terms: Terms, held: str) -> None:
        """Book what a newly stated (revision, GPU time, total, refunded) of a bucket differs by."""
        old = self.stated.get(name, (0, 0, 0, 0))
        if stated[0] > old[0] or (stated != old and all(map(ge, stated, old))):
            self.stated[name] = stated
            hold = self.holds[held] if held in self.holds and not self.holds[held].ended else None
            net, paid = stated[2] - stated[3], self.draws[name]
            if net < len(paid):
                self.give_back(paid, net, hold)
            else:
                self.draw(paid, net, self.places(at, terms)[:-1], hold)

    def draw(self, paid: list[str], net: int, lots: list[Lot], hold: Hold | None) -> None:
        units, wanted = list[str](), net - len(paid)
        for lot in lots:
            share = net * lot.bps // 10_000 - paid.count(lot.name)
            usable = self.free(lot, but=hold)
            given = max(0, min(wanted - len(units), usable + lot.expired, share))
            back = max(0, given - usable)
            self.entries += ["expiry_reversed"] * bool(back)
            lot.left, lot.expired = lot.left + back - given, lot.expired - back
            units += [lot.name] * given
        units += [self.overage] * (wanted - len(units))
        paid += units
        self.lots["limit"].left -= units.count("limit")
        self.entries.append("charge")
        if hold:
            hold.drawn += wanted
            drawn = Counter(unit for unit in units if unit != "unfunded")
            here = hold.reserved & drawn
            hold.reserved -= here
            for _ in range(min((drawn - here).total(), hold.reserved.total())):
                kept = [self.lots[place] for place, micro in hold.reserved.items() if micro]
                hold.reserved[max(kept, key=Lot.order).name] -= 1

    def give_back(self, paid: list[str], net: int, hold: Hold | None) -> None:
        """Return unit by unit: of the newest lot that is above its share, else the newest."""
        units, lost = list[str](), ["unfunded"]
        newest_first = [self.lots.get(unit) for unit in dict.fromkeys(reversed(paid))]
        subsidies = [lot for lot in newest_first if lot and lot.bps < 10_000]
        while len(paid) > net:
            above = (t.name for t in subsidies if paid.count(t.name) > net * t.bps // 10_000)
            unit = next(above, paid[-1])
            units.append(paid.pop(max(n for n, drawn in enumerate(paid) if drawn == unit)))
        self.entries.append("charge")
        for lot in self.lots.values():
            if lot.name in units and self.is_past(lot) and not lot.left:
                self.entries.append("expiry")
                lot.expired += units.count(lot.name)
                lost.append(lot.name)
            else:
                lot.left += units.count(lot.name)
        if hold:
            # Past the hold was drawn first of all what nothing can be reserved on.
            units.sort(key=lambda unit: unit not in lost)
            counted, kept = min(len(units), hold.drawn), hold.reserved.total() + hold.short
            healed = min(counted, hold.drawn - (hold.micro - kept))
            hold.drawn, back = hold.drawn - counted, Counter(units[healed:counted])
            hold.short += sum(back.pop(place, 0) for place in lost)
            hold.reserved += back

    def expire(self) -> None:
        """Take to breakage what is left of lots that are past; holds move off them first."""
        past = tuple(lot for lot in self.lots.values() if self.is_past(lot) and lot.left)
        for lot in sorted(past, key=lambda lot: (lot.expires, lot.order())):
            for hold in [hold for hold in self.holds.values() if hold.reserved[lot.name]]:
                hold.short += self.seat(hold, hold.reserved.pop(lot.name), but=past)
                self.entries.append("hold_moved")
            self.entries.append("expiry")
            lot.expired, lot.left = lot.expired + lot.left, 0
