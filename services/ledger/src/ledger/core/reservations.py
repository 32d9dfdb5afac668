"""Reservations: what it takes to place, extend or end a hold. Called by `decisions` alone.

A hold reserves all that it asks for or nothing: on the lots open now that fit it, in draw order,
each up to its share of the whole hold, then on what is left of the credit limit. What is refused is
refused with what is missing, and with the largest hold of the same terms that would be placed.

Refusals, in order of precedence. Placed: `HoldOver`, `TenantSuspended`, `InsufficientCredit`.
Extended: `HoldClosed`, `HoldOver`, `TenantSuspended`, `InsufficientCredit`. Released: `HoldClosed`.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from hisab_contracts.entries import Entry
from ledger.core.book import Book, next_entry
from ledger.core.expiry import release_entry
from ledger.core.holds import (
    LIMIT,
    ExtendHold,
    Hold,
    HoldClosed,
    HoldOver,
    InsufficientCredit,
    PlaceHold,
    ReleaseHold,
    TenantSuspended,
    detail_of,
    order_of,
    placed_detail,
    places_in_order,
)
from ledger.core.lots import Draw, UsageTerms, fitting_lots, largest_hold, take_from_lots


def place_hold(
    book: Book, command: PlaceHold, now_ms: int
) -> tuple[Entry, ...] | HoldOver | TenantSuspended | InsufficientCredit:
    """Reserve the amount of a new hold."""
    if command.expires_ms <= now_ms:
        return HoldOver(command.expires_ms)
    if book.is_suspended:
        return TenantSuspended()
    hold_micro = command.hold_micro
    reserved = _reserve(book, command.terms, hold_micro, now_ms, total_micro=hold_micro, held={})
    if isinstance(reserved, InsufficientCredit):
        return reserved
    return (
        next_entry(
            book,
            "hold_placed",
            now_ms,
            caused_by=f"hold:{command.hold_id}",
            actor=command.actor,
            hold=placed_detail(command, reserved),
        ),
    )


def extend_hold(
    book: Book, hold: Hold, command: ExtendHold, now_ms: int
) -> tuple[Entry, ...] | HoldClosed | HoldOver | TenantSuspended | InsufficientCredit:
    """Reserve more for a hold, or keep it longer; what it reserves and has drawn stays."""
    if hold.ended_by is not None:
        return HoldClosed(hold.ended_by)
    expires_ms = hold.expires_ms if command.expires_ms is None else command.expires_ms
    if expires_ms <= now_ms:
        return HoldOver(expires_ms)
    if book.is_suspended:
        return TenantSuspended()
    hold_micro = hold.hold_micro + command.add_micro
    held = dict(hold.reserved)
    more = _reserve(
        book, command.terms, command.add_micro, now_ms, total_micro=hold_micro, held=held
    )
    if isinstance(more, InsufficientCredit):
        return more
    for place, micro in more:
        held[place] = held.get(place, 0) + micro
    extended = replace(
        hold,
        hold_micro=hold_micro,
        expires_ms=expires_ms,
        reserved=places_in_order(held, order_of(book.lots)),
    )
    return (
        next_entry(
            book,
            "hold_extended",
            now_ms,
            caused_by=f"hold:{command.hold_id}",
            actor=command.actor,
            hold=detail_of(extended, "extended"),
        ),
    )


def release_hold(
    book: Book, hold: Hold, command: ReleaseHold, now_ms: int
) -> tuple[Entry, ...] | HoldClosed:
    """End a hold: what it still reserves is free again."""
    if hold.ended_by is not None:
        return HoldClosed(hold.ended_by)
    return (release_entry(book, hold, command, now_ms),)


def _reserve(
    book: Book,
    terms: UsageTerms,
    wanted_micro: int,
    now_ms: int,
    *,
    total_micro: int,
    held: Mapping[str, int],
) -> list[Draw] | InsufficientCredit:
    """Reserve an amount for a hold of `total_micro` that has `held` already, or say what lacks."""
    lots = fitting_lots(book.lots, now_ms, terms)
    reserved, beyond_micro = take_from_lots(lots, wanted_micro, total_micro=total_micro, given=held)
    limit_micro = max(0, book.headroom_micro)
    if beyond_micro > limit_micro:
        return InsufficientCredit(
            available_micro=largest_hold(lots, limit_micro),
            shortfall_micro=beyond_micro - limit_micro,
        )
    if beyond_micro:
        reserved.append((LIMIT, beyond_micro))
    return reserved
