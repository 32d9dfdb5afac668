"""`python -m ledger audit`: nothing was edited, invented or lost, and every projection is right.

Theory. In one snapshot every book is read from its first entry to its last: each entry's hash is
computed again from what is stored (the hash of the row before included), and the entries are
folded. An edit behind our back breaks the hash of the edited entry, or, when the forger wrote a
matching hash, that of the entry after it, or the head that the book keeps. Then the fold is
compared with the live projections: book, lots, accounts, buckets, holds. The trial balance must be
0. Last come the charges that could not be booked (`consumer`): usage that no bill will show.

It reads as the `reader` role (HISAB_DB_READER) or, without one, as the writer. Exit status 1 and a
line per finding when anything is wrong. What a forger could do who rewrites a whole chain and its
head is for the proof log to show, when it comes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hisab_contracts.entries import entry_hash
from hisab_contracts.invariants import InvariantBroken
from ledger.core.book import Book, RebuiltBook, fold
from ledger.store.entries import entries_after, first_parked, parked_count
from ledger.store.queries import (
    projected_books,
    projected_buckets,
    projected_holds,
    take_snapshot,
    trial_balance,
)
from runtime.database import Database, Limits

if TYPE_CHECKING:
    from runtime.database import Connection

PAGE = 5_000
PARKED_SHOWN = 100


async def audit(connection: Connection) -> list[str]:
    """Audit every book inside the caller's transaction; returns what is wrong, one line each."""
    # One snapshot for everything: a book that grows meanwhile would differ from its own entries.
    await take_snapshot(connection)
    findings: list[str] = []
    for live in await projected_books(connection):
        findings += await _audit_book(connection, live)
    found = await trial_balance(connection)
    total_micro = sum(found.accounts.values())
    if total_micro:
        findings.append(f"trial balance: sums to {total_micro} instead of 0")
    return findings + await _parked(connection)


async def _parked(connection: Connection) -> list[str]:
    """Name the charges that could not be booked: how many, and the first of them one by one."""
    count = await parked_count(connection)
    shown = [
        f"parked charge: {charge.reason}, {charge.topic}/{charge.partition}@{charge.offset}"
        for charge in await first_parked(connection, PARKED_SHOWN)
    ]
    if count > len(shown):
        shown.append(f"parked charges: {count - len(shown)} more")
    return shown


async def _audit_book(connection: Connection, live: Book) -> list[str]:
    """Read one book from its first entry; stop at the first entry that is not as it was."""
    opening = Book(
        tenant_id=live.tenant_id,
        kind=live.kind,
        currency=live.currency,
        credit_limit_micro=live.credit_limit_micro,
    )
    rebuilt = RebuiltBook(opening)
    while True:
        page = await entries_after(connection, opening.tenant_id, rebuilt.book.seq, PAGE)
        for entry in page:
            if entry_hash(entry) != entry.hash:
                return [f"entry {entry.entry_id}: it or its predecessor is not what was hashed"]
        try:
            rebuilt = fold(rebuilt, page)
        except InvariantBroken as error:
            first, last = page[0].entry_id, page[-1].entry_id
            return [f"entries {first} to {last}: {error}"]
        if len(page) < PAGE:
            break
    return [
        f"book {opening.tenant_id}: {what} differ from the entries"
        for what, differs in (
            ("totals, head, lots or accounts", rebuilt.book != live),
            (
                "buckets",
                dict(rebuilt.buckets) != await projected_buckets(connection, opening.tenant_id),
            ),
            ("holds", dict(rebuilt.holds) != await projected_holds(connection, opening.tenant_id)),
        )
        if differs
    ]


async def _run(dsn: str) -> list[str]:
    database = Database(
        dsn, name="ledger-audit", limits=Limits(statement_timeout_ms=0, max_connections=1)
    )
    await database.open()
    try:
        async with database.transaction() as connection:
            return await audit(connection)
    finally:
        await database.close()


def main(environ: Mapping[str, str]) -> int:
    """Run the audit and print what it found."""
    dsn = environ.get("HISAB_DB_READER") or environ.get("HISAB_DB_WRITER")
    if not dsn:
        raise SystemExit("HISAB_DB_READER is not set")
    findings = asyncio.run(_run(dsn))
    sys.stdout.writelines(f"{finding}\n" for finding in findings or ["all books are sound"])
    return 1 if findings else 0
