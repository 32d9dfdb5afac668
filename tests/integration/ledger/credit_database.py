"""The credit tables' third desk: the service's own doors, on a real database.

A table spans hours, and the ledger decides nothing by a clock that is not its server's
(`runtime.database.checked_now_ms`). So the server's clock is set, too: in a database of its own,
`clock_timestamp()` finds a function that reads what the test has set before it finds PostgreSQL's.
The check itself stays as it is: a desk that sets one clock and not the other is refused.

Names and instants are those of the core desk, so the entries are the same, to the last hash.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import asyncpg
from msgspec.structs import replace

from hisab_contracts.charges import BucketTotal
from hisab_contracts.entries import Entry
from hisab_contracts.ids import TenantId
from hisab_contracts.units import moment_of
from infrastructure import Infrastructure
from integration.ledger.real import RealLedger, Refused, opened
from ledger.core.book import hold_state
from ledger.core.decisions import BookCommand
from ledger.core.expiry import hold_at
from ledger.core.grants import ApproveGrant
from ledger.core.holds import PlaceHold, ReleaseHold
from ledger.core.movements import RecordInvoiced
from ledger.store.queries import balance_of, buckets_after, hold_of, holds_after, projected_book
from scenarios.credit_desks import Seen, Time, answer_of, command_of, entry_meant, seen_of
from scenarios.ledger_credits import Answer, Deed, Reported, Reverse, Scenario, Total
from unit.ledger.values import BUDGET_MICRO, at, watermark

TENANT = TenantId("t")
ALL = 1_000
"""No table or history has as many rows of anything."""

# Names that a statement does not qualify are looked for here first; in PostgreSQL's own last.
_INSTALL_CLOCK = """
create schema server_clock;
create table server_clock.present (present_at timestamptz not null);
insert into server_clock.present values ('2025-07-31T08:00:00Z');
create function server_clock.clock_timestamp() returns timestamptz language sql
  as $$ select present_at from server_clock.present $$;
grant usage on schema server_clock to public;
grant select on server_clock.present to public;
do $$ begin
  execute format(
    'alter database %I set search_path = server_clock, public, pg_catalog', current_database());
end $$;
"""
_SET_CLOCK = "update server_clock.present set present_at = $1"


class ScenarioClock:
    """The time of day of the process and of its server, as it was set last."""

    def __init__(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        self._connection = connection
        self.present_ms = at(8)

    def __call__(self) -> int:
        return self.present_ms

    async def set_to(self, present_ms: int) -> None:
        """Let both show an instant."""
        await self._connection.execute(_SET_CLOCK, moment_of(present_ms))
        self.present_ms = present_ms


class DatabaseDesk:
    """A tenant's book behind commands, charges and leased tasks, in micro-units."""

    def __init__(self, ledger: RealLedger, clock: ScenarioClock, scenario: Scenario) -> None:
        self.ledger = ledger
        self.clock = clock
        self.unit_micro = scenario.unit_micro
        self.entries: Sequence[Entry] = ()
        """Those of the tenant's book."""
        self._revision = 0

    async def do(self, deed: Deed, time: Time) -> tuple[Answer, tuple[str, ...]]:
        """The answer to a deed, and the kinds of the entries that it makes in the tenant's book."""
        await self.clock.set_to(at(*time))
        answer: Answer = ()
        try:
            await self._act(deed)
        except Refused as refused:
            answer = answer_of(refused.refusal, self.unit_micro)
        return answer, await self._entered()

    async def do_at_once(self, totals: Sequence[Total], time: Time) -> tuple[str, ...]:
        """The kinds of what several totals enter that come in one batch."""
        await self.clock.set_to(at(*time))
        commands = [command_of(stated, self.unit_micro) for stated in totals]
        await self.ledger.book(*(made for made in commands if isinstance(made, BucketTotal)))
        return await self._entered()

    async def end_expired_holds(self, time: Time) -> tuple[str, ...]:
        """The kinds of what the sweep of holds enters."""
        await self.clock.set_to(at(*time))
        await self.ledger.end_expired_holds()
        return await self._entered()

    async def _entered(self) -> tuple[str, ...]:
        before = len(self.entries)
        self.entries = await self.ledger.entries(TENANT)
        return tuple(entry.kind for entry in self.entries[before:])

    async def _act(self, deed: Deed) -> None:
        match deed:
            case Reported():
                self._revision += 1
                marks = {"lhr": deed.lhr, "khi": deed.khi}
                await self.ledger.book(
                    *(
                        watermark(hub, self._revision, None if hour is None else at(hour))
                        for hub, hour in marks.items()
                    )
                )
                if deed.swept:
                    await self.ledger.expire_lots()
            case Reverse(what):
                await self.ledger.reverse(entry_meant(list(self.entries), what), "wrong")
            case _:
                command = command_of(deed, self.unit_micro)
                if command is not None:
                    await self._enter(command)

    async def _enter(self, command: BucketTotal | BookCommand) -> None:
        match command:
            case BucketTotal():
                await self.ledger.book(command)
            case ApproveGrant(grant=grant):
                await self.ledger.enter_grant(grant)
            case PlaceHold():
                await self.ledger.enter_hold(TENANT, command)
            case ReleaseHold(hold_id=hold_id):
                await self.ledger.release(hold_id)
            case RecordInvoiced(document_id=document_id, invoiced_micro=micro):
                await self.ledger.invoiced(TENANT, document_id, micro)
            case _:
                raise AssertionError(command)

    async def seen(self, time: Time) -> Seen:
        """What stands in the book, by what the service reads of it."""
        present_ms = at(*time)
        async with self.ledger.api.transaction(tenant=TENANT) as connection:
            balance = await balance_of(connection, TENANT, present_ms, 0)
            whole = await projected_book(connection, TENANT)
            held = await holds_after(connection, TENANT, "", ALL)
            states = [await hold_of(connection, hold.hold_id, present_ms) for hold in held]
            buckets = await buckets_after(connection, TENANT, None, ALL)
        assert balance is not None
        holds = [hold_at(hold, present_ms) for hold in held]
        # Read one by one they stand as they do beside each other.
        assert [hold_state(balance.book, hold, present_ms) for hold in holds] == states
        # A balance leaves out lots that are over and spent; what it shows is as of now.
        lots = {lot.grant_id: lot for lot in (*whole.lots, *balance.book.lots)}
        book = replace(balance.book, lots=tuple(lots.values()))
        return seen_of(book, balance.available_micro, holds, buckets, self.unit_micro)


@asynccontextmanager
async def open_desk(
    infrastructure: Infrastructure, scenario: Scenario
) -> AsyncIterator[DatabaseDesk]:
    """A desk on a database of its own, dropped afterwards; it is 8:00, the first grants are in."""
    addresses = infrastructure.migrated_database("ledger")
    try:
        admin = await asyncpg.connect(addresses.admin, timeout=300)
        try:
            await admin.execute(_INSTALL_CLOCK)
            clock = ScenarioClock(admin)
            async with opened(addresses, clock) as ledger:
                await ledger.programme("p", BUDGET_MICRO)
                await ledger.tenant(TENANT, scenario.kind, scenario.limit * scenario.unit_micro)
                desk = DatabaseDesk(ledger, clock, scenario)
                for granted in scenario.grants:
                    await desk.do(granted, (8, 0))
                yield desk
        finally:
            await admin.close()
    finally:
        infrastructure.drop_database(addresses)
