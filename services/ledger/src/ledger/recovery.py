"""`python -m ledger recover`: take back what was published and a restored database lacks.

Theory. A ledger that finds itself behind what it has published is not served (`restoration`). Its
entries after the backup are on `ledger.entries.v1`, whole: each is read from where this database
last knew the topic, hashed again, held against the head of its book, folded like any other, and
stored as it was. So is the programme's side of a grant, which follows from it. Tenants and keys
come from their topics first; revocations with them. What is here already is compared and left.

One batch is one transaction: killed in between, the command is repeated and goes on. It works under
the sequencer's lease, so that no ledger publishes meanwhile, and is put on the record with what it
took back. Charges are read on from where this database is, which books nothing twice: they are
totals. A ledger that waits behind its gate opens by itself afterwards, and publishes the entries
again: readers drop what they have.

In no topic, and gone unless the backup has them: names of tenants and programmes opened since (the
id stands in), what programmes were given since (`--programme` names it), who proposed a grant, what
a scheduler said of a hold's job, proposals and limits of approvers made since, answers to
idempotency keys, and what was entered in the last moments before the loss and had not left yet.

Refusals: those of `core.restoration`, records that the broker has removed, and a ledger that serves
this database. Nothing of the batch that is refused is stored.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, assert_never

import msgspec
from msgspec import Struct

from hisab_contracts import topics
from hisab_contracts.entries import Entry
from hisab_contracts.ids import KeyId, ProgrammeId
from hisab_contracts.reference import TenantRecord
from ledger.core.directory import PROGRAMME_CURRENCY, book_of_programme, book_of_tenant
from ledger.core.proposals import proposal_id_of
from ledger.core.restoration import (
    UNKNOWN,
    BookUnknown,
    BudgetTooSmall,
    EntriesMissing,
    EntryDiffers,
    EntryForged,
    EntryLacking,
    ProgrammeUnknown,
    RestoredBooks,
    TakingBackRefusal,
    budget_change_of,
    compare_published,
    counterpart_of,
    give_budget,
    placing_of,
    programme_book_of,
    refuse_budget,
    refuse_taking_back,
    reversed_grant_of,
)
from ledger.restoration import LedgerTopics, entries_in, everything_in, keys_in, offsets_to_compare
from ledger.store import books, directory, entries, recoveries
from runtime.auth import store_keys
from runtime.clock import now_ms
from runtime.database import Database, Limits, transaction_on
from runtime.kafka import Kafka
from runtime.progress import accept_stored_progress
from runtime.readback import Readback

if TYPE_CHECKING:
    from runtime.database import Connection

LEASE_PATIENCE_S: Final = 5
SEQUENCER_LEASE: Final = "task:sequencer"
ACTOR: Final = "ledger:recover"


class NotRecovered(Exception):
    """What was published cannot be taken back; the message says why, and what to do."""


class Recovered(Struct, frozen=True, kw_only=True):
    """What a recovery took back."""

    entries: int
    tenants: Sequence[str]
    holds: Sequence[str]
    """Those whose job is not known any more."""


class Recovery:
    """Takes published facts back into one database."""

    def __init__(
        self,
        kafka: Kafka,
        database: Database,
        published: LedgerTopics | None = None,
        *,
        charges: str = topics.CHARGES,
        budgets_micro: Mapping[ProgrammeId, int] | None = None,
    ) -> None:
        """`budgets_micro` are those of programmes opened, or given more, after the backup."""
        published = published or LedgerTopics()
        self._kafka = kafka
        self._charges = charges
        self._database = database
        self._entries = Readback(kafka, published.entries)
        self._tenants = Readback(kafka, published.tenants)
        self._keys = Readback(kafka, published.keys)
        self._budgets_micro = budgets_micro or {}

    async def run(self, *, accepted_by: str, reason: str) -> Recovered:
        """Take everything back and put it on the record; raises `NotRecovered`."""
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(LEASE_PATIENCE_S, stop.set)
        async with self._database.lease(SEQUENCER_LEASE, stop) as connection:
            if connection is None:
                raise NotRecovered("a ledger serves this database: there is nothing to recover")
            tenants = await self._take_directory(connection)
            partitions = await self._kafka.partitions([self._charges])
            async with transaction_on(connection):
                # Its consumer was further than this database is, and would refuse to go back; also
                # in partitions of which this database, older than their first charge, has no row.
                # Not after the entries: a ledger that waits may find the last, and open before.
                await accept_stored_progress(connection, partitions, accepted_by, reason)
            taken, holds = await self._take_entries(connection)
            await self._check_budgets(connection)
            done = Recovered(entries=taken, tenants=tenants, holds=holds)
            async with transaction_on(connection):
                await recoveries.record_recovery(
                    connection, accepted_by, reason, taken, tenants, holds
                )
        return done

    async def _take_directory(self, connection: Connection) -> list[str]:
        """Take back tenants and keys: the newest message of each counts."""
        newest: dict[str, TenantRecord] = {}
        async for records in everything_in(self._tenants):
            for record in records:
                if record.value is not None:
                    tenant = msgspec.json.decode(record.value, type=TenantRecord)
                    newest[tenant.tenant_id] = tenant
        async for records in everything_in(self._keys):
            async with transaction_on(connection):
                await store_keys(connection, keys_in(records))
        opened: list[str] = []
        for tenant_id in await directory.unknown_tenants(connection, list(newest)):
            async with transaction_on(connection):
                await directory.add_tenant(connection, newest[tenant_id], tenant_id)
                await books.insert_book(connection, book_of_tenant(newest[tenant_id]))
            opened.append(tenant_id)
        return opened

    async def _take_entries(self, connection: Connection) -> tuple[int, list[str]]:
        """Take back every entry that is lacking; say how many, and which holds were placed."""
        ranges = await self._entries.ranges()
        # All that is lacking is needed, however far back the first of it lies.
        begin = await offsets_to_compare(
            connection, self._entries.topic, ranges, before_positions=None
        )
        if isinstance(begin, str):
            raise NotRecovered(begin)
        await self._give_budgets(connection)
        taken, holds = 0, list[str]()
        async for records in self._entries.read(begin, ranges):
            found = entries_in(records)
            if isinstance(found, str):
                raise NotRecovered(found)
            async with transaction_on(connection):
                batch = await self._take_batch(connection, [entry for _, entry in found])
            taken += len(batch)
            holds += [entry.hold.hold_id for entry in batch if entry.hold and placing_of(entry)]
        return taken, holds

    async def _take_batch(
        self, connection: Connection, published: Sequence[Entry]
    ) -> Sequence[Entry]:
        """Fold and store what is lacking of these entries, in their order."""
        kept = await entries.hashes_of(connection, published)
        lacking: dict[tuple[str, int], Entry] = {}
        for entry in published:
            place = entry.tenant_id, entry.seq
            earlier = lacking.get(place)
            # A window that was published twice is in the topic twice.
            fault = compare_published(entry, kept.get(place) if earlier is None else earlier.hash)
            match fault:
                case EntryLacking():
                    lacking[place] = entry
                case EntryDiffers():
                    raise NotRecovered(reason_of(fault))
                case None:
                    pass
                case _:
                    assert_never(fault)
        if not lacking:
            return ()
        batch = list(lacking.values())
        unit = await recoveries.open_to_take_back(connection, batch)
        for entry in batch:
            await self._take_one(connection, unit, entry)
        await books.save(connection, unit.changes())
        return batch

    async def _take_one(self, connection: Connection, unit: RestoredBooks, entry: Entry) -> None:
        refused = refuse_taking_back(entry, unit.book_or_none(entry.tenant_id))
        if refused is not None:
            raise NotRecovered(reason_of(refused))
        change = budget_change_of(entry)
        if change is not None:
            programme = unit.book_or_none(programme_book_of(change[0]))
            counterpart = counterpart_of(entry, change, programme)
            if not isinstance(counterpart, Entry):
                raise NotRecovered(reason_of(counterpart))
            unit.take_back(counterpart, None)
        if entry.kind == "grant" and entry.grant is not None:
            approver = KeyId(entry.actor.removeprefix("key:"))
            await recoveries.take_back_grant(
                connection, entry.tenant_id, entry.grant, UNKNOWN, approver, entry.recorded_ms
            )
        elif (proposal_id := proposal_id_of(entry)) is not None:
            approver = KeyId(entry.actor.removeprefix("key:"))
            await recoveries.take_back_approval(connection, proposal_id, approver, entry)
        elif entry.kind == "reversal":
            await directory.mark_ended(connection, reversed_grant_of(entry), "reversed")
        elif entry.kind == "grant_revoked" and entry.lot is not None:
            await directory.mark_ended(connection, entry.lot.grant_id, "revoked")
        unit.take_back(entry, placing_of(entry))

    async def _give_budgets(self, connection: Connection) -> None:
        """Give programmes the budgets that the operator has named: those opened or raised since."""
        for programme_id, budget_micro in sorted(self._budgets_micro.items()):
            async with transaction_on(connection):
                added = await directory.add_programme(
                    connection, programme_id, programme_id, PROGRAMME_CURRENCY, budget_micro
                )
                book = book_of_programme(programme_id)
                if added:
                    await books.insert_book(connection, book)
                unit = await books.open_books(
                    connection, [book.tenant_id], now_ms, accounts=("authority", "budget")
                )
                given = give_budget(unit.book(book.tenant_id), budget_micro, actor=ACTOR)
                if given is not None:
                    unit.enter(book.tenant_id, given)
                    await books.save(connection, unit.changes())
                    # What it names was approved since, or never will be: approved again, it would
                    # be given twice.
                    await recoveries.close_budget_proposals(connection, programme_id)

    async def _check_budgets(self, connection: Connection) -> None:
        """Stop where a programme has granted more than it was given, as far as is known here."""
        overdrawn = await recoveries.overdrawn_programmes(connection)
        for programme in (await books.lock_whole_books(connection, overdrawn)).values():
            refused = refuse_budget(programme)
            if refused is not None:
                raise NotRecovered(reason_of(refused))


def reason_of(refusal: TakingBackRefusal) -> str:
    """Say why an entry cannot be taken back, and what to do."""
    match refusal:
        case EntryForged(entry_id):
            return f"entry {entry_id} in the topic is not what its hash says: somebody wrote it"
        case BookUnknown(tenant_id):
            return f"tenant {tenant_id} has entries and is in no topic: restore a newer backup"
        case EntryDiffers(entry_id):
            return (
                f"entry {entry_id} here is another one than was published: this database was "
                "served after it was restored. Restore the backup again, and recover then"
            )
        case EntriesMissing(entry_id, head_seq):
            return (
                f"entry {entry_id} is published and those after {head_seq} before it are in no "
                "topic any more: restore a newer backup"
            )
        case ProgrammeUnknown(programme_id):
            return (
                f"programme {programme_id} was opened after the backup: name its budget, "
                f"--programme {programme_id}=BUDGET_MICRO"
            )
        case BudgetTooSmall(programme_id, left_micro):
            return (
                f"everything is taken back, and what programme {programme_id} was given is "
                f"{-left_micro} less than it granted: its budget was raised after the backup. "
                f"Name all that it was given, --programme {programme_id}=BUDGET_MICRO"
            )
        case _:
            assert_never(refusal)


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the recovery and print what it took back."""
    parser = argparse.ArgumentParser(
        prog="ledger recover", description="take back what was published"
    )
    for name in ("--accepted-by", "--reason"):
        parser.add_argument(name, required=True)
    parser.add_argument(
        "--programme",
        action="append",
        default=[],
        metavar="ID=BUDGET_MICRO",
        help="the whole budget of a programme that was opened, or given more, after the backup",
    )
    chosen = parser.parse_args(arguments)
    for name in ("HISAB_DB_WRITER", "HISAB_KAFKA"):
        if not environ.get(name):
            raise SystemExit(f"{name} is not set")
    budgets = dict(pair.rpartition("=")[::2] for pair in chosen.programme)
    try:
        done = asyncio.run(
            _run(
                environ["HISAB_DB_WRITER"],
                environ["HISAB_KAFKA"],
                {ProgrammeId(name): int(micro) for name, micro in budgets.items()},
                chosen.accepted_by,
                chosen.reason,
            )
        )
    except NotRecovered as error:
        sys.stderr.write(f"not recovered: {error}\n")
        return 1
    sys.stdout.write(f"{done.entries} entries taken back\n")
    sys.stdout.writelines(
        f"tenant {tenant_id} taken back: its name is its id\n" for tenant_id in done.tenants
    )
    sys.stdout.writelines(
        f"hold {hold_id} taken back: its job is not known, a release or its expiry ends it\n"
        for hold_id in done.holds
    )
    return 0


async def _run(
    dsn: str, bootstrap: str, budgets_micro: Mapping[ProgrammeId, int], by: str, reason: str
) -> Recovered:
    database = Database(dsn, name="ledger-recover", limits=Limits(max_connections=2))
    kafka = Kafka(bootstrap, client="ledger-recover", instance="recover")
    await database.open()
    try:
        recovery = Recovery(kafka, database, budgets_micro=budgets_micro)
        return await recovery.run(accepted_by=by, reason=reason)
    finally:
        await kafka.close()
        await database.close()
