"""What the ledger has booked against what metering knows: by command, and by itself every hour.

Theory. Every bucket is compared with what `ledger.entries.v1` says was booked of it; with
`--repair`, what differs is stated anew through the outbox (`metering.core.repair`). The command
(`python -m metering reconcile`) runs beside the service and needs it: the service reads the hubs,
publishes the outbox, and the ledger books. The service itself (`ReconcileTask`) compares what
has changed on either side, hour by hour of usage, and repairs nothing: its result is in
`/v1/status`, in a metric, and goes downstream with the hubs' watermarks. One of all these runs at a
time.

1. *Drained*: everything that is in the hubs' topics now has been metered, and no record that
   the service would release is left. Before that a restored metering lacks what it will read again,
   and a repair would take it back from the ledger for a while.
2. *Mark*: a hub is stated anew to every partition of the charges topic, behind all charges so far.
   The ledger passes it on behind the entries of those charges. When it is back in every partition
   of the entries, all that was stated before it has been booked, and read.
3. *Compare*: what looks different is kept as it stands. A second mark; then it is compared again:
   what was only on its way has arrived.
4. *Repair*: nodes are locked, as by whoever meters; buckets that still differ are stated. A third
   mark; then nothing may differ.

Memory is bounded: entries are added up in the database, buckets compared range by range, and
differences handled page by page. It can be ended at any instant and run again: entries that were
read are not read again. A run is a series of looks: the command makes one after the other, the
service one whenever its task has a turn, so that it stops at once.

Exit status of the command: 0, no difference (after a repair: none left); 1, differences; 2, it
could not be said.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from hisab_contracts.charges import BucketTotal, HubWatermark
from hisab_contracts.entries import ChargeDetail, Entry, EntryWatermark, read_entry_message
from hisab_contracts.ids import BucketId, HubCode, TenantId
from hisab_contracts.invariants import InvariantBroken
from hisab_contracts.topics import CHARGES, ENTRIES, hub_topic
from hisab_contracts.units import instant_text
from metering.core.repair import ComparedBucket, is_difference, is_run_due, repair, state_of
from metering.core.watermarks import complete_until_ms, statement_of
from metering.store import booked, hubs, quarantine
from metering.store.booked import BookedCharges
from metering.store.state import lock_nodes
from runtime import telemetry
from runtime.clock import now_ms, ticks_ms
from runtime.database import ClockStep, Database, checked_now_ms, transaction_on
from runtime.feed import OutOfRangeError
from runtime.kafka import Kafka, Message
from runtime.log_reader import LogReader
from runtime.machine import Partition, Slice
from runtime.outbox import Outbox
from runtime.progress import (
    PartitionRange,
    advance,
    claim,
    offsets_in_logs,
    stored_progress,
)

if TYPE_CHECKING:
    from runtime.clock import Clock
    from runtime.database import Connection

_log = structlog.get_logger("metering.reconcile")

PAGE: Final = 500
LOOK_S: Final = 0.2
HOURS_OF_A_RUN: Final = 1_000
"""Changed hours of hubs that one run of the service compares; what is left is next at once."""
HOURS_AT_ONCE: Final = 20
"""Of them, so many in one statement."""
DIFFERENCES_LOGGED: Final = 20
LEASE_WAIT_S: Final = 2
PATIENCE_S: Final = 600
"""How long a step may stand still before the run gives up: the service or the ledger is away."""


class RunHalted(Exception):
    """It cannot be said whether there are differences; the message says what to do."""


class _Moved:
    """Gives up when nothing has moved for `PATIENCE_S`."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._seen: object = None
        self._since_ms = ticks_ms()

    def look(self, seen: object) -> None:
        if seen != self._seen:
            self._seen, self._since_ms = seen, ticks_ms()
        elif ticks_ms() - self._since_ms > PATIENCE_S * 1_000:
            raise RunHalted(self._what)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run has found, and what was left when it ended."""

    found_count: int
    left_count: int
    repaired_count: int
    """Buckets that were stated anew."""
    is_partial: bool = False
    """Whether more hours were to be compared than one run may."""


Looks = AsyncGenerator[bool, None]
"""The looks of a run: True before one for which it has to wait for others."""


class Reconcile:
    """One run. `connection` is outside a transaction, and holds the lease."""

    def __init__(
        self,
        kafka: Kafka,
        connection: Connection,
        say: Callable[[str], None],
        *,
        clock: Clock = now_ms,
    ) -> None:
        """Print what is found by `say`."""
        self._clock = clock
        self._kafka = kafka
        self._connection = connection
        self._say = say
        self._outbox = Outbox((CHARGES,))
        self._reader: LogReader | None = None
        self._epochs: dict[Partition, int] = {}
        # Of the partitions not yet read to where they ended as the run began, that end.
        self._unread: dict[Partition, int] = {}
        self._repaired = 0
        self.outcome: Outcome | None = None
        """None until a run has ended."""

    async def run(self, *, since_ms: int, restate: bool) -> Outcome:
        """Compare, repair if told to, and compare again what was repaired."""
        async with aclosing(self._compare_all(since_ms, restate=restate)) as looks:
            async for waits in looks:
                if waits:
                    await asyncio.sleep(LOOK_S)
        if self.outcome is None:
            raise InvariantBroken("a run that has ended has an outcome")
        return self.outcome

    async def _compare_all(self, since_ms: int, *, restate: bool) -> Looks:
        complete_ms = await self._complete_until_ms()
        async for waits in self._prepare():
            yield waits
        try:
            for place in range(booked.RANGES):
                async with transaction_on(self._connection):
                    await booked.find_differences(self._connection, place, since_ms)
            async for waits in self._mark():
                yield waits
            found = left = await self._each_difference(self._print)
            if restate and found:
                await self._each_difference(self._restate)
                # What differs although it was stated is not different because it is on its way.
                async for waits in self._mark():
                    yield waits
                left = await self._each_difference(_nothing)
        finally:
            await self._close()
        async with transaction_on(self._connection):
            await booked.save_run(
                self._connection,
                since_ms=since_ms,
                found=found,
                differences=left,
                complete_until_ms=complete_ms,
            )
        self.outcome = Outcome(found, left, self._repaired)

    async def compare_changed(self) -> Looks:
        """Compare the hours in which something has changed; True, while it waits for others."""
        complete_ms = await self._complete_until_ms()
        async for waits in self._prepare():
            yield waits
        try:
            hours = await booked.changed_hours(self._connection, HOURS_OF_A_RUN)
            for begin in range(0, len(hours), HOURS_AT_ONCE):
                async with transaction_on(self._connection):
                    some = hours[begin : begin + HOURS_AT_ONCE]
                    await booked.find_differences_in(self._connection, some)
                yield False
            async for waits in self._mark():
                yield waits
            counted: Counter[tuple[HubCode, int]] = Counter()

            async def count(differences: Sequence[ComparedBucket]) -> None:
                await self._print(differences[: max(0, DIFFERENCES_LOGGED - counted.total())])
                counted.update((c.total.hub, c.total.hour_ms) for c in differences)

            found = await self._each_difference(count)
        finally:
            await self._close()
        async with transaction_on(self._connection):
            standing = await booked.note_compared(self._connection, hours, counted)
            await booked.save_run(
                self._connection,
                since_ms=0,
                found=found,
                differences=standing,
                complete_until_ms=complete_ms,
            )
        self.outcome = Outcome(found, standing, 0, is_partial=len(hours) == HOURS_OF_A_RUN)

    async def _complete_until_ms(self) -> int | None:
        return complete_until_ms(await hubs.list_completeness(self._connection))

    async def _prepare(self) -> Looks:
        """Take in what was there as the run began, and have it booked and read."""
        async for waits in self._drained():
            yield waits
        await self._open_entries()
        async for waits in self._mark():
            yield waits
        async with transaction_on(self._connection):
            await booked.forget_differences(self._connection)

    # 1. Drained.

    async def _drained(self) -> Looks:
        """Wait until all that is in the hubs' topics now has been metered."""
        topics = [hub_topic(hub) for hub in await hubs.list_hubs(self._connection)]
        ends = await self._kafka.end_offsets(topics)
        logs = await self._kafka.topics(topics)
        moved = _Moved("hubs' records stay unread: is metering running, and what does its log say?")
        while True:
            stored = await stored_progress(self._connection, topics)
            taken = offsets_in_logs(stored, logs)
            waiting = sum(max(0, end - taken.get(part, 0)) for part, end in ends.items())
            releasable = await quarantine.releasable(self._connection, 1)
            if not waiting and not releasable:
                return
            moved.look((waiting, tuple(releasable)))
            yield True

    # 2. Marks, and the entries before them.

    async def _mark(self) -> Looks:
        """Have everything booked that was stated so far, and read all of it."""
        statement = await self._state_hub()
        if statement is None:
            # No mark can be sent. What metering stated in a life that a restore forgot is booked.
            async for waits in self._read_to_ends():
                yield waits
            return
        left = set(self._epochs)
        moved = _Moved(
            "what metering stated has not come back as entries: do metering and the ledger run?"
        )
        while left:
            read = await self._read_entries()
            for partition, marks in read.items():
                if any(_is_mark(mark, statement) for mark in marks):
                    left.discard(partition)
            moved.look(len(left) if not read else ticks_ms())
            # Reading has waited itself, if there was nothing.
            yield False

    async def _read_to_ends(self) -> Looks:
        """Read all entries that were there as the run began."""
        moved = _Moved("entries do not come: does the broker answer?")
        while self._unread:
            moved.look(len(self._unread) if not await self._read_entries() else ticks_ms())
            yield False

    async def _state_hub(self) -> HubWatermark | None:
        """State a hub to every partition of the charges topic; None: no hub has ever emitted."""
        views = [view for view in await hubs.view_hubs(self._connection) if view.emitted]
        if not views:
            return None
        hub = views[0].hub
        partitions = await self._kafka.partitions([CHARGES])
        async with transaction_on(self._connection):
            await hubs.lock_hub(self._connection, hub)
            [view] = await hubs.view_hubs(self._connection, hub)
            present_ms = await checked_now_ms(self._connection, self._clock)
            statement = statement_of(view, present_ms)
            await hubs.save_statement(self._connection, statement, present_ms)
            value = msgspec.json.encode(statement)
            await self._outbox.write(
                self._connection,
                [
                    Message(CHARGES, key=None, value=value, partition=partition.number)
                    for partition in partitions
                ],
            )
        return statement

    async def _open_entries(self) -> None:
        """Go on with the entries where the last run ended."""
        partitions = await self._kafka.partitions([ENTRIES])
        first = await self._kafka.offsets_at("beginning", partitions)
        ends = await self._kafka.offsets_at("end", partitions)
        ranges = {part: PartitionRange(first[part], ends[part], None) for part in partitions}
        async with transaction_on(self._connection):
            claims = await claim(self._connection, ranges, compacted=False)
        for found in claims:
            if not found.first_offset <= found.next_offset <= found.end_offset:
                raise RunHalted(
                    f"{found.partition.topic}/{found.partition.number} was read up to "
                    f"{found.next_offset} and holds {found.first_offset} to {found.end_offset}: "
                    "entries were removed unread, or the topic was made anew"
                )
        self._epochs = {found.partition: found.epoch for found in claims}
        self._unread = {
            found.partition: found.end_offset
            for found in claims
            if found.next_offset < found.end_offset
        }
        if claims:
            self._reader = LogReader(
                self._kafka, {found.partition: found.next_offset for found in claims}
            )
            await self._reader.open()

    async def _read_entries(self) -> dict[Partition, list[EntryWatermark]]:
        """Add up the entries that have come; return the marks among them."""
        if self._reader is None:
            raise RunHalted(f"there is no topic {ENTRIES}: the ledger has never run")
        try:
            fetched = await self._reader.read()
        except OutOfRangeError as error:
            raise RunHalted(f"entries of {error.partition} are gone") from error
        marks: dict[Partition, list[EntryWatermark]] = {}
        for piece in fetched:
            messages = [read_entry_message(record.value or b"") for record in piece.records]
            done = Slice(
                piece.partition,
                piece.begun_offset,
                piece.until,
                (),
                epoch=self._epochs[piece.partition],
            )
            async with transaction_on(self._connection):
                await advance(self._connection, [done])
                await self._add([found for found in messages if isinstance(found, Entry)])
            if piece.until >= self._unread.get(piece.partition, 0):
                self._unread.pop(piece.partition, None)
            marks[piece.partition] = [m for m in messages if isinstance(m, EntryWatermark)]
        return marks

    async def _add(self, entries: Sequence[Entry]) -> None:
        """Add entries to what is booked, each once."""
        tenants = sorted({entry.tenant_id for entry in entries})
        sequences = await booked.booked_sequences(self._connection, tenants)
        charges: dict[BucketId, BookedCharges] = {}
        for entry in entries:
            known = sequences.get(entry.tenant_id, 0)
            if entry.seq <= known:
                continue  # Published twice: the ledger does so when it dies in between.
            if entry.seq != known + 1:
                raise RunHalted(
                    f"of {entry.tenant_id} entry {entry.seq} follows {known} in {ENTRIES}"
                )
            sequences[entry.tenant_id] = entry.seq
            if entry.charge is not None:
                _add_charge(charges, entry.tenant_id, entry.charge)
        await booked.add_booked(self._connection, sequences, charges)

    # 3. Differences, page by page.

    async def _each_difference(
        self, act: Callable[[Sequence[ComparedBucket]], Awaitable[None]]
    ) -> int:
        """Hand over every difference, a page at a time; return how many there were."""
        after, count = booked.FIRST_BUCKET, 0
        while True:
            page = await booked.compared_after(self._connection, after, PAGE)
            if not page:
                return count
            after = page[-1].total.bucket_id
            differences = [compared for compared in page if is_difference(compared)]
            count += len(differences)
            if differences:
                await act(differences)

    async def _print(self, differences: Sequence[ComparedBucket]) -> None:
        for compared in differences:
            self._say(_line(compared))

    # 4. Repair.

    async def _restate(self, differences: Sequence[ComparedBucket]) -> None:
        """State buckets anew, as they stand under the locks of their nodes."""
        bucket_ids = [compared.total.bucket_id for compared in differences]
        async with transaction_on(self._connection):
            await lock_nodes(
                self._connection, {(c.total.hub, c.total.node_id) for c in differences}
            )
            totals = repair(await booked.compared_buckets(self._connection, bucket_ids))
            if totals:
                await booked.save_repaired(self._connection, totals)
                await self._outbox.write(self._connection, [_message(total) for total in totals])
        self._repaired += len(totals)

    async def _close(self) -> None:
        if self._reader is not None:
            await self._reader.close()


async def reconcile(database: Database, kafka: Kafka, *, since_ms: int, restate: bool) -> int:
    """Run once, alone, and return the exit status."""
    try:
        # A second run waits here until the first has ended.
        async with database.lease("reconcile", asyncio.Event()) as connection:
            if connection is None:
                return 2
            run = Reconcile(kafka, connection, _say)
            outcome = await run.run(since_ms=since_ms, restate=restate)
    except (RunHalted, ClockStep) as error:
        sys.stderr.write(f"cannot reconcile: {error}\n")
        return 2
    found, repaired = outcome.found_count, outcome.repaired_count
    _say(f"difference {outcome.left_count} (found {found}, repaired {repaired})")
    return 1 if outcome.left_count else 0


class ReconcileTask:
    """Compares what has changed, every hour and when a month is complete. One per process."""

    def __init__(self, kafka: Kafka, database: Database, *, clock: Clock = now_ms) -> None:
        """Compare over a connection of the writer's; the lease says which process does."""
        self._kafka = kafka
        self._database = database
        self._clock = clock
        self._looks: Looks | None = None
        self._waited_from_ms = ticks_ms()
        self._is_partial = False
        self._is_halted = False

    async def run(self, connection: Connection) -> None:
        """Make the next look of a run, if one is due; one that halts is begun anew in an hour."""
        if self._looks is None:
            if not await self._is_due(connection):
                return
            self._looks = self._one_run()
        try:
            has_ended = await anext(self._looks, None) is None
        except BaseException:
            # A generator that has failed is spent.
            self._looks = None
            raise
        if has_ended:
            self._looks = None
            self._waited_from_ms = ticks_ms()

    async def _is_due(self, connection: Connection) -> bool:
        last = await booked.last_run(connection)
        if last is not None:
            # Here, so that what a command has found is in the metric, too.
            telemetry.set_differences("ledger", last.difference_count, last.finished_ms)
        # How long ago it was is measured in ticks: the time of day may be set.
        waited_ms = ticks_ms() - self._waited_from_ms
        complete_ms = complete_until_ms(await hubs.list_completeness(connection))
        compared_ms = None if last is None else last.complete_until_ms
        is_due = is_run_due(waited_ms, None if self._is_halted else complete_ms, compared_ms)
        # Before there is a topic of entries there is no ledger to compare with.
        return (is_due or self._is_partial) and bool(await self._kafka.topics([ENTRIES]))

    async def _one_run(self) -> Looks:
        self._is_partial = self._is_halted = False
        given_up = asyncio.Event()
        asyncio.get_running_loop().call_later(LEASE_WAIT_S, given_up.set)
        try:
            # Over a connection of its own: what the lease of a command keeps out is kept out here.
            async with self._database.lease("reconcile", given_up) as connection:
                if connection is None:
                    return  # A command is comparing.
                run = Reconcile(self._kafka, connection, _log_difference, clock=self._clock)
                async with aclosing(run.compare_changed()) as looks:
                    async for waits in looks:
                        yield waits
                self._is_partial = run.outcome is not None and run.outcome.is_partial
        except RunHalted as error:
            self._is_halted = True
            _log.warning("not compared with the ledger", error=str(error))


def _log_difference(line: str) -> None:
    _log.error("booked otherwise than metered", difference=line)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _line(compared: ComparedBucket) -> str:
    """Write a difference: which bucket, and both sides of it."""
    total, known, stands = compared.total, state_of(compared.total), compared.booked
    return (
        f"{total.tenant_id} {total.project_id!r} {total.allocation_id} on {total.hub}/"
        f"{total.node_id}, {total.sku} {total.price_class} at {total.price_version[:12]}, hour "
        f"{instant_text(total.hour_ms)}: booked {stands.gpu_ns} GPU-ns, {stands.charge_micro} "
        f"micro, revision {stands.revision}; metered {known.gpu_ns} GPU-ns, {known.charge_micro} "
        f"micro, revision {known.revision}"
    )


def _message(total: BucketTotal) -> Message:
    return Message(CHARGES, total.tenant_id.encode(), msgspec.json.encode(total))


def _is_mark(mark: EntryWatermark, statement: HubWatermark) -> bool:
    return mark.hub == statement.hub and mark.revision >= statement.revision


def _add_charge(
    charges: dict[BucketId, BookedCharges], tenant_id: TenantId, detail: ChargeDetail
) -> None:
    """Add what an entry books to its bucket."""
    known = charges.get(detail.bucket_id)
    charges[detail.bucket_id] = BookedCharges(
        tenant_id=tenant_id,
        detail=detail,
        gpu_ns=detail.gpu_ns + (0 if known is None else known.gpu_ns),
        charge_micro=detail.charge_micro + (0 if known is None else known.charge_micro),
    )


async def _nothing(_differences: Sequence[ComparedBucket]) -> None:
    """Only count them."""
