"""`python -m ledger audit`: nothing was edited, invented or lost, and every projection is right.

Theory. Every book is read from its first entry to its last, in pages: each entry's hash is computed
again from what is stored (the hash of the row before included), and the entries are folded. An edit
behind our back breaks the hash of the edited entry, or, when the forger wrote a matching hash, that
of the entry after it, or the head that the book keeps. Then the fold is held against the live
projections: book, lots, accounts, buckets, holds. The trial balance must be 0. Last come the
charges that could not be booked (`consumer`): usage that no bill will show.

It may run for hours, on books that grow meanwhile, and hold nothing back: entries never change, so
their pages need no common snapshot; projections are compared in slices, each in a short snapshot of
its own into which the fold is first taken: its entries up to the head that this snapshot shows. So
what is compared belongs together, exactly. Memory does not grow with a book: the states of buckets
and holds lie in a temporary file (`store/rebuilt`); lots and accounts of one book are held.

It reads as the `reader` role (HISAB_DB_READER) or, without one, as the writer. Exit status 1 and a
line per finding when anything is wrong. What a forger could do who rewrites a whole chain and its
head is for the proof log to show, when it comes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import msgspec

from hisab_contracts.entries import Entry, entry_hash
from hisab_contracts.ids import TenantId
from hisab_contracts.invariants import InvariantBroken
from ledger.core.book import Book, BookedBucket, RebuiltBook, fold, hold_id_of
from ledger.core.holds import Hold
from ledger.store.books import load_buckets
from ledger.store.directory import registered_limit_micro
from ledger.store.entries import entries_after, first_parked, parked_count
from ledger.store.holds import load_holds
from ledger.store.queries import (
    book_ids_after,
    buckets_after,
    holds_after,
    projected_book,
    take_snapshot,
    trial_balance,
)
from ledger.store.rebuilt import RebuiltStates
from runtime.database import Database, Limits

if TYPE_CHECKING:
    from runtime.database import Connection

PAGE: Final = 5_000
BOOKS_AT_ONCE: Final = 1_000
PARKED_SHOWN: Final = 100

State = TypeVar("State", bound=msgspec.Struct)

TOTALS: Final = "totals, head, lots or accounts"


class BookBroken(Exception):
    """A book's entries do not follow from each other; the message names the first that does not."""


async def audit(database: Database, *, page: int = PAGE) -> list[str]:
    """Audit every book, so many rows at a time; returns what is wrong, one line each."""
    findings: list[str] = []
    buckets, holds = RebuiltStates(BookedBucket), RebuiltStates(Hold)
    try:
        async for tenant_id in _books(database):
            buckets.clear()
            holds.clear()
            findings += await _BookAudit(database, tenant_id, buckets, holds, page).run()
    finally:
        buckets.close()
        holds.close()
    async with database.transaction() as connection:
        await take_snapshot(connection)
        found = await trial_balance(connection)
        total_micro = sum(found.accounts.values())
        if total_micro:
            findings.append(f"trial balance: sums to {total_micro} instead of 0")
        return findings + await _parked(connection)


async def _books(database: Database) -> AsyncIterator[TenantId]:
    """Name every book; one that is opened meanwhile may be missed."""
    after = ""
    while True:
        async with database.connection() as connection:
            found = await book_ids_after(connection, after, BOOKS_AT_ONCE)
        for tenant_id in found:
            yield tenant_id
        if len(found) < BOOKS_AT_ONCE:
            return
        after = found[-1]


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


@dataclass(frozen=True, slots=True)
class _Projection(Generic[State]):
    """How the live states of a kind are read, of one book."""

    name: str
    after: Callable[[Connection, State | None], Awaitable[list[State]]]
    """The next page behind a state, in order; the first page behind None."""
    load: Callable[[Connection, Sequence[State]], Awaitable[Mapping[tuple[str, str], State]]]
    """Those of these that there are, by (tenant, id)."""
    id_of: Callable[[State], str]


class _BookAudit:
    """One book: its entries folded, and what they come to held against what is projected."""

    def __init__(
        self,
        database: Database,
        tenant_id: TenantId,
        buckets: RebuiltStates[BookedBucket],
        holds: RebuiltStates[Hold],
        page: int,
    ) -> None:
        self._database = database
        self._tenant_id = tenant_id
        self._buckets = buckets
        self._holds = holds
        self._page = page
        self._book: Book | None = None
        self._differing: set[str] = set()

    async def run(self) -> list[str]:
        """Read the book from its first entry; stop at the first entry that is not as it was."""
        try:
            while await self._fold_page():
                pass
            await self._compare_totals()
            await self._compare_buckets()
            await self._compare_holds()
        except BookBroken as error:
            return [str(error)]
        return [
            f"book {self._tenant_id}: {what} differ from the entries"
            for what in (TOTALS, "buckets", "holds")
            if what in self._differing
        ]

    async def _fold_page(self) -> bool:
        """Fold the next entries, outside any snapshot: they never change. False at the end."""
        async with self._database.connection() as connection:
            opened = await self._opened(connection)
            entries = await entries_after(connection, self._tenant_id, opened.seq, self._page)
        self._fold(opened, entries)
        return len(entries) == self._page

    async def _opened(self, connection: Connection) -> Book:
        """Return the book as folded so far: at first as it was opened, without entries."""
        if self._book is None:
            live = await projected_book(connection, self._tenant_id)
            self._book = Book(
                tenant_id=live.tenant_id,
                kind=live.kind,
                currency=live.currency,
                # Not the live one: entries may have changed it since.
                credit_limit_micro=await registered_limit_micro(connection, live.tenant_id),
            )
        return self._book

    def _fold(self, book: Book, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if entry_hash(entry) != entry.hash:
                raise BookBroken(
                    f"entry {entry.entry_id}: it or its predecessor is not what was hashed"
                )
        charges = [entry.charge for entry in entries if entry.charge is not None]
        hold_ids = {hold_id for entry in entries if (hold_id := hold_id_of(entry)) is not None}
        before = RebuiltBook(
            book,
            {
                bucket.bucket_id: bucket
                for bucket in self._buckets.load({c.bucket_id for c in charges}).values()
            },
            {hold.hold_id: hold for hold in self._holds.load(hold_ids).values()},
        )
        try:
            rebuilt = fold(before, entries)
        except InvariantBroken as error:
            first, last = entries[0].entry_id, entries[-1].entry_id
            raise BookBroken(f"entries {first} to {last}: {error}") from error
        self._book = rebuilt.book
        self._buckets.save(rebuilt.buckets.items())
        self._holds.save(rebuilt.holds.items())

    async def _live(self, connection: Connection) -> Book:
        """Take a snapshot, and the fold into it: up to the head that the snapshot shows."""
        await take_snapshot(connection)
        live = await projected_book(connection, self._tenant_id)
        while self._book is not None and self._book.seq < live.seq:
            entries = await entries_after(connection, self._tenant_id, self._book.seq, self._page)
            if not entries:
                break
            self._fold(self._book, entries)
        return live

    async def _compare_totals(self) -> None:
        async with self._database.transaction() as connection:
            live = await self._live(connection)
        if live != self._book:
            self._differing.add(TOTALS)

    async def _compare_buckets(self) -> None:
        async def after(connection: Connection, last: BookedBucket | None) -> list[BookedBucket]:
            return await buckets_after(connection, self._tenant_id, last, self._page)

        async def load(
            connection: Connection, wanted: Sequence[BookedBucket]
        ) -> dict[tuple[str, str], BookedBucket]:
            hours_ms: dict[tuple[str, str], int] = {
                (self._tenant_id, bucket.bucket_id): bucket.hour_ms for bucket in wanted
            }
            return await load_buckets(connection, hours_ms)

        live = _Projection("buckets", after, load, lambda bucket: bucket.bucket_id)
        await self._compare(self._buckets, live)

    async def _compare_holds(self) -> None:
        async def after(connection: Connection, last: Hold | None) -> list[Hold]:
            hold_id = "" if last is None else last.hold_id
            return await holds_after(connection, self._tenant_id, hold_id, self._page)

        async def load(
            connection: Connection, wanted: Sequence[Hold]
        ) -> dict[tuple[str, str], Hold]:
            places = [(self._tenant_id, hold.hold_id) for hold in wanted]
            return await load_holds(connection, places)

        await self._compare(self._holds, _Projection("holds", after, load, lambda h: h.hold_id))

    async def _compare(self, rebuilt: RebuiltStates[State], projection: _Projection[State]) -> None:
        """Compare slice by slice; then what has no projection, or one that a slice passed by."""
        last: State | None = None
        while True:
            async with self._database.transaction() as connection:
                await self._live(connection)
                found = await projection.after(connection, last)
            live = {projection.id_of(state): state for state in found}
            self._hold_against(projection.name, rebuilt, live)
            if len(found) < self._page:
                break
            last = found[-1]
        # What has no projection, or one that was written behind the slice that passed it.
        rebuilt.next_lap()
        last_id = ""
        while unmarked := rebuilt.unmarked(last_id):
            last_id = projection.id_of(unmarked[-1])
            async with self._database.transaction() as connection:
                await self._live(connection)
                loaded = await projection.load(connection, unmarked)
            states = rebuilt.load([projection.id_of(state) for state in unmarked])
            if states != {state_id: state for (_, state_id), state in loaded.items()}:
                self._differing.add(projection.name)

    def _hold_against(
        self, what: str, rebuilt: RebuiltStates[State], live: Mapping[str, State]
    ) -> None:
        """Compare a slice of a projection with what the entries come to, and mark it."""
        if rebuilt.load(live.keys()) != live:
            self._differing.add(what)
        rebuilt.mark(live.keys())


async def _run(dsn: str) -> list[str]:
    database = Database(
        dsn, name="ledger-audit", limits=Limits(statement_timeout_ms=0, max_connections=1)
    )
    await database.open()
    try:
        return await audit(database)
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
