"""Prepayments: money that a tenant paid beforehand is a lot like any other, once per payment.

No programme promises it, so no budget moves and no second person approves it: the payment is the
evidence. Its lot is effective from the hour begun, pays after lots of lower priority and for
everything, and its source is `prepaid` where a grant names its programme.

Refusals, in order of precedence: `PaymentDiffers`, `TopUpExpired`.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from hisab_contracts.entries import Entry, GrantDetail
from hisab_contracts.ids import GrantId, PaymentId, ProgrammeId
from hisab_contracts.units import hour_floor_ms
from ledger.core.book import Book, next_entry, postings_of
from ledger.core.lots import LOT
from ledger.core.movements import funding_account

PREPAID: Final = ProgrammeId("prepaid")
"""Stands where a grant names its programme; no programme may be called so."""
TOP_UP_PRIORITY: Final = 100


class TopUp(Struct, frozen=True, kw_only=True):
    """Credit what a payment brought."""

    grant_id: GrantId
    """The lot's: it follows from the tenant and the payment."""
    payment_id: PaymentId
    topup_micro: int
    expires_ms: int | None
    """None: never."""
    actor: str


class PaymentDiffers(Struct, frozen=True):
    """The payment has been credited already, with another amount or expiry, or was reversed."""

    topup_micro: int
    """What it stands at; 0 once it was reversed."""


class TopUpExpired(Struct, frozen=True):
    """Credit that ends in the hour begun, or before it, could never be used."""

    expires_ms: int


TopUpRefusal = PaymentDiffers | TopUpExpired
"""Why a payment is not credited so, in order of precedence."""


def top_up(book: Book, command: TopUp, now_ms: int) -> tuple[Entry, ...] | TopUpRefusal:
    """Open a lot of what was paid. No entry where the same payment was credited the same."""
    known = next((lot for lot in book.lots if lot.grant_id == command.grant_id), None)
    if known is not None:
        credited = known.granted_micro, known.expires_ms
        is_same = credited == (command.topup_micro, command.expires_ms)
        return () if is_same else PaymentDiffers(known.granted_micro)
    effective_ms = hour_floor_ms(now_ms)
    if command.expires_ms is not None and command.expires_ms <= effective_ms:
        return TopUpExpired(command.expires_ms)
    micro = command.topup_micro
    movements = [(funding_account(PREPAID), -micro), (LOT + command.grant_id, micro)]
    return (
        next_entry(
            book,
            "top_up",
            now_ms,
            effective_ms=effective_ms,
            postings=postings_of(book, movements),
            caused_by=f"payment:{command.payment_id}",
            actor=command.actor,
            grant=GrantDetail(
                grant_id=command.grant_id,
                programme_id=PREPAID,
                grant_micro=micro,
                priority=TOP_UP_PRIORITY,
                effective_ms=effective_ms,
                expires_ms=command.expires_ms,
                source="prepaid",
            ),
        ),
    )
