"""A balance: what a tenant has, owes and has reserved now, and until when its usage is complete.

Lots open and close without an entry, so a balance belongs to an instant. It counts only the usage
that has been booked; how much that is the hubs' watermarks say. A tenant's charges come through one
partition of charges, and every hub's watermarks come through each. So the usage of a tenant is
complete until the lowest watermark that its partition has of all hubs, and nothing is complete
while one hub has none there: it may have usage that nobody has heard of yet.

Refuses nothing: a balance that is complete until no instant is a balance all the same.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from ledger.core.book import Book, available_micro
from ledger.core.lots import Lot


class Balance(Struct, frozen=True, kw_only=True):
    """A book's totals and lots as of `seq`, and until when they are complete."""

    book: Book
    available_micro: int
    held_micro: int
    lots: tuple[Lot, ...]
    """Those that have not expired, in draw order: also those whose window has not begun."""
    complete_until_ms: int | None
    """None while a hub has no watermark."""


def balance_at(book: Book, now_ms: int, *, complete_until_ms: int | None) -> Balance:
    """Say what a book comes to at an instant. Its lots are all that may count then, in order."""
    return Balance(
        book=book,
        available_micro=available_micro(book, now_ms),
        held_micro=book.reserved_micro + sum(lot.reserved_micro for lot in book.lots),
        lots=tuple(lot for lot in book.lots if _is_listed(lot, now_ms)),
        complete_until_ms=complete_until_ms,
    )


def _is_listed(lot: Lot, now_ms: int) -> bool:
    """Say whether a balance names a lot: it has not expired, and its grant was not reversed."""
    return lot.granted_micro > 0 and (lot.expires_ms is None or now_ms < lot.expires_ms)


def complete_until(watermarks_ms: Iterable[int | None]) -> int | None:
    """Return the lowest of the watermarks that must be known; None when one is not, or none is."""
    lowest_ms: int | None = None
    for watermark_ms in watermarks_ms:
        if watermark_ms is None:
            return None
        if lowest_ms is None or watermark_ms < lowest_ms:
            lowest_ms = watermark_ms
    return lowest_ms
