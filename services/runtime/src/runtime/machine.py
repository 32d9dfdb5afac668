"""What the consumer loop decides, without I/O: events in, actions out.

Theory. The truth about progress is the row (topic, partition, owner epoch, next offset) in
PostgreSQL, advanced in the transaction that does the work. The machine therefore never lets a
partition be processed before it was *claimed* (its epoch raised, its offset read) and *sought*
(fetching restarted at exactly that offset), and it discards whatever was fetched before. A batch is
accepted only when the fetch it comes from began at the stored offset; `until` is where the next
fetch begins, so gaps in the offsets (transaction markers, compaction) are passed, not lost. After a
failure the partition is sought back; when the outcome is unknown, or another owner was met, it is
claimed again, which reads what really happened.

A batch that kills the process leaves a trace: before the first batch after each claim the driver
stores the attempt number at this offset (`Process.attempt`), so a good batch costs nothing. At the
third attempt records are handed over one by one, each with its own stored attempt; a record that
was alone in flight when the process died (or that failed alone for a reason of its own) is handed
over as `unread`: store it, do not look at it.

Refusals (`Halt`; the process must end and stay visible): the stored offset lies before the first
one the broker still has (unread records were removed), or in a log that is no more (the topic was
deleted and made again), or behind the end of the log, or a hint committed to Kafka lies ahead of it
(the database was restored); offsets out of range while fetching. An operator answers by overriding
the progress row, on the record.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, assert_never

from hisab_contracts.ids import UNKNOWN_TOPIC, TopicId

CAREFUL_ATTEMPT = 3
"""From this attempt at one offset on, records are handed over one by one."""

UNREAD_ATTEMPT = 4
"""From this attempt on, the first record is handed over unread."""

FENCED_PAUSE_MS = 1_000
FAILED_PAUSE_MS = 100
MAX_PAUSE_MS = 5_000
STUCK_AFTER_MS = 30_000
LONGEST_STEP_MS = 5_000


class Partition(NamedTuple):
    """A partition of a topic."""

    topic: str
    number: int


class Positioned(Protocol):
    """All that the machine needs to know of a record."""

    @property
    def offset(self) -> int:
        """Where the record lies in its partition."""


@dataclass(frozen=True, slots=True)
class PartitionClaim:
    """One progress row as claimed, beside what the broker says about the partition."""

    partition: Partition
    epoch: int
    next_offset: int
    attempts: int
    """Attempts already stored for exactly this offset."""
    first_offset: int
    """The first offset the broker still has."""
    end_offset: int
    hint_offset: int | None
    """What was last committed to Kafka for lag tools, if anything; None when overridden."""
    topic_id: TopicId = UNKNOWN_TOPIC
    """The log that the broker has; "" where it does not say."""
    stored_topic_id: TopicId = UNKNOWN_TOPIC
    """The log that `next_offset` is a place in; "" where that was never known."""


@dataclass(frozen=True, slots=True)
class Slice:
    """What one fetch brought of one partition: every record in [expected, until)."""

    partition: Partition
    expected: int
    until: int
    records: Sequence[Positioned]
    epoch: int = 0
    """Filled in by the machine: the epoch under which `expected` may be advanced."""
    attempt: int = 0
    """Filled in by the machine: store this attempt number at `expected` first; 0: no need."""


# Events: what happened.


@dataclass(frozen=True, slots=True)
class Assigned:
    """The group gave us exactly these partitions; nothing held before counts any more."""

    partitions: tuple[Partition, ...]


@dataclass(frozen=True, slots=True)
class Revoked:
    """The group took everything away."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """The progress rows of these partitions carry our epoch now."""

    claims: tuple[PartitionClaim, ...]


@dataclass(frozen=True, slots=True)
class Fetched:
    """A fetch returned; each slice says at which offset its fetch began."""

    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class Committed:
    """The transaction of the last `Process` is durable."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The last `Process` or `ClaimPartitions` did not commit."""

    unknown: bool = False
    """True when the answer to COMMIT was lost."""
    blame: bool = False
    """True when the records may be the reason, not the database or the network."""


@dataclass(frozen=True, slots=True)
class Fenced:
    """A progress row of the last `Process` no longer carried our epoch and offset."""


@dataclass(frozen=True, slots=True)
class OffsetLost:
    """The broker refused the offset we asked for."""

    partition: Partition


Event = Assigned | Revoked | Claimed | Fetched | Committed | Failed | Fenced | OffsetLost


# Actions: what to do now, in order.


@dataclass(frozen=True, slots=True)
class ClaimPartitions:
    """Raise the owner epoch of these progress rows and report `Claimed`."""

    partitions: tuple[Partition, ...]


@dataclass(frozen=True, slots=True)
class Seek:
    """Restart fetching of a partition at an offset."""

    partition: Partition
    offset: int


@dataclass(frozen=True, slots=True)
class Process:
    """Advance these slices and hand their records over, in one transaction."""

    slices: tuple[Slice, ...]
    unread: bool = False
    """The one record has killed the process: store it, do not look at it."""


@dataclass(frozen=True, slots=True)
class Hint:
    """Tell lag tools how far we are; may be dropped, never waits."""

    offsets: Mapping[Partition, int]


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait before the next action."""

    pause_ms: int


@dataclass(frozen=True, slots=True)
class Halt:
    """End the process with this reason; going on would skip or repeat facts."""

    reason: str


Action = ClaimPartitions | Seek | Process | Hint | Pause | Halt


@dataclass(slots=True)
class _Owned:
    """A claimed partition. `expected` is the stored offset; fetching goes on from there."""

    epoch: int
    expected: int
    attempts: int
    marked: bool = False
    """This process has outlived a batch here, or has stored its attempt at `expected`."""
    careful_left: int = 0
    """Records still to be handed over one by one."""


@dataclass(slots=True)
class Machine:
    """The state of one consumer: which partitions it owns, and what is in flight.

    One `Process` is in flight at a time. `handle` is the only way in.
    """

    max_records: int = 2_000
    _owned: dict[Partition, _Owned] = field(default_factory=dict)
    _assigned: tuple[Partition, ...] = ()
    _queue: deque[Process] = field(default_factory=deque)
    _in_flight: Process | None = None
    _pauses: int = 0

    @property
    def ready(self) -> tuple[Partition, ...]:
        """The partitions that may be fetched: claimed and sought."""
        return tuple(self._owned)

    def expected(self, partition: Partition) -> int | None:
        """Return the stored offset of a claimed partition."""
        owned = self._owned.get(partition)
        return None if owned is None else owned.expected

    def handle(self, event: Event) -> list[Action]:
        """Take one event and return what to do about it, in order."""
        match event:
            case Assigned(partitions):
                # Also what we owned before: somebody else may have had it in between.
                self._forget()
                self._assigned = partitions
                return [ClaimPartitions(partitions)] if partitions else []
            case Revoked():
                self._forget()
                self._assigned = ()
                return []
            case Claimed(claims):
                return self._claimed(claims)
            case Fetched(slices):
                return self._fetched(slices)
            case Committed():
                return self._committed()
            case Failed(unknown, blame):
                return self._failed(unknown=unknown, blame=blame)
            case Fenced():
                return self._reclaim(FENCED_PAUSE_MS)
            case OffsetLost(partition):
                offset = self.expected(partition)
                return [Halt(f"offset {offset} of {_name(partition)} is out of the broker's range")]
            case _:
                assert_never(event)

    def _forget(self) -> None:
        self._owned.clear()
        self._queue.clear()
        self._in_flight = None

    def _claimed(self, claims: Sequence[PartitionClaim]) -> list[Action]:
        actions: list[Action] = []
        for claim in claims:
            # Claimed before a rebalance took it away: the new owner has raised the epoch again.
            if claim.partition not in self._assigned:
                continue
            reason = _refusal(claim)
            if reason is not None:
                return [Halt(reason)]
            self._owned[claim.partition] = _Owned(claim.epoch, claim.next_offset, claim.attempts)
            actions.append(Seek(claim.partition, claim.next_offset))
        return [*actions, Hint({claim.partition: claim.next_offset for claim in claims})]

    def _fetched(self, slices: Iterable[Slice]) -> list[Action]:
        actions: list[Action] = []
        plain: list[Slice] = []
        for piece in slices:
            owned = self._owned.get(piece.partition)
            # Fetched before the claim, or of a partition that is gone: nobody asked for it.
            if owned is None:
                continue
            if not _continues(piece, owned.expected):
                actions.append(Seek(piece.partition, owned.expected))
                continue
            if piece.until == owned.expected:
                continue
            # The attempt is stored only until one batch has been outlived here: a mark costs a
            # commit, and good batches, nearly all, must not pay for it.
            attempt = 0 if owned.marked else owned.attempts + 1
            if owned.careful_left > 0 or attempt >= CAREFUL_ATTEMPT:
                self._queue_singly(piece, owned)
            else:
                plain.append(replace(piece, epoch=owned.epoch, attempt=attempt))
        if plain:
            # Before what is handed over one by one: one bad record must not hold up the others.
            self._queue.appendleft(Process(tuple(plain)))
        return actions + self._next()

    def _queue_singly(self, piece: Slice, owned: _Owned) -> None:
        """Cut a slice into one `Process` per record, each with its own stored attempt."""
        if owned.careful_left <= 0:
            owned.careful_left = self.max_records
        attempt = max(owned.attempts + 1, CAREFUL_ATTEMPT)
        expected = piece.expected
        for index, record in enumerate(piece.records):
            last = index + 1 == len(piece.records)
            until = piece.until if last else record.offset + 1
            single = Slice(piece.partition, expected, until, (record,), owned.epoch, attempt)
            self._queue.append(Process((single,), unread=attempt >= UNREAD_ATTEMPT))
            expected, attempt = until, CAREFUL_ATTEMPT
        if not piece.records:
            self._queue.append(Process((replace(piece, epoch=owned.epoch),)))

    def _next(self) -> list[Action]:
        if self._in_flight is not None or not self._queue:
            return []
        self._in_flight = self._queue.popleft()
        return [self._in_flight]

    def _committed(self) -> list[Action]:
        done = self._take_in_flight()
        offsets: dict[Partition, int] = {}
        for piece in done.slices:
            owned = self._owned[piece.partition]
            owned.expected = offsets[piece.partition] = piece.until
            owned.attempts = 0
            owned.marked = True
            owned.careful_left = max(0, owned.careful_left - 1)
        self._pauses = 0
        return [Hint(offsets), *self._next()]

    def _failed(self, *, unknown: bool, blame: bool) -> list[Action]:
        # The exponent is bounded as well: an outage of a day must not shift by thousands.
        pause_ms = min(MAX_PAUSE_MS, FAILED_PAUSE_MS << min(self._pauses, 6))
        self._pauses += 1
        # After an unknown COMMIT only the store can say where we are.
        if unknown or self._in_flight is None:
            return self._reclaim(pause_ms)
        failed = self._take_in_flight()
        touched = {piece.partition for entry in self._queue for piece in entry.slices}
        # What is queued follows what failed: it is fetched again, from the stored offset.
        self._queue.clear()
        for piece in failed.slices:
            touched.add(piece.partition)
            owned = self._owned[piece.partition]
            if blame:
                owned.attempts = max(piece.attempt, owned.attempts + 1)
                owned.marked = False
        seeks = [Seek(partition, self._owned[partition].expected) for partition in sorted(touched)]
        return [Pause(pause_ms), *seeks]

    def _reclaim(self, pause_ms: int) -> list[Action]:
        """Give up what we think we own and ask the store."""
        self._forget()
        if not self._assigned:
            return []
        return [Pause(pause_ms), ClaimPartitions(self._assigned)]

    def _take_in_flight(self) -> Process:
        if self._in_flight is None:
            raise RuntimeError("an outcome was reported, but nothing is in flight")
        done, self._in_flight = self._in_flight, None
        return done


@dataclass(slots=True)
class Watch:
    """Says when a consumer is silently stuck: records wait, and nothing moves for 30 s.

    Time is counted from look to look, and no step counts for more than a few seconds: a clock that
    jumps for one reading, or a machine that stood still, is not a consumer that does.
    """

    looked_at_ms: int
    stuck_after_ms: int = STUCK_AFTER_MS
    moves_count: int = 0
    """How often something was noted."""
    _waited_ms: int = 0
    """Counted time without a note; below 0 while more was granted."""
    _notes: deque[tuple[int, bool]] = field(default_factory=lambda: deque(maxlen=1_000))
    """Granted time, and whether earlier grants end. Others note, and only who looks counts: the two
    are different threads, and a count that both wrote could lose a note."""

    def moved(self, *, granted_ms: int = 0) -> None:
        """Note that progress was made, that nothing waits, or that the cause is known.

        Time may be granted beyond that: a group's rebalance takes long.
        """
        self._notes.append((granted_ms, False))
        self.moves_count += 1

    def assigned(self) -> None:
        """Note that the rebalance is over: whatever time was granted for it ends."""
        self._notes.append((0, True))
        self.moves_count += 1

    def is_stuck(self, at_ms: int) -> bool:
        """Look: say whether nothing has been noted for too long. To be asked every second."""
        step_ms = min(max(0, at_ms - self.looked_at_ms), LONGEST_STEP_MS)
        self.looked_at_ms = at_ms
        # Before what was noted since the last look, so that a note is worth its whole time.
        self._waited_ms += step_ms
        while self._notes:
            granted_ms, is_assigned = self._notes.popleft()
            waited_ms = 0 if is_assigned else min(self._waited_ms, 0)
            self._waited_ms = min(waited_ms, -granted_ms)
        return self._waited_ms >= self.stuck_after_ms


def _continues(piece: Slice, expected: int) -> bool:
    """Say whether a slice begins exactly at the stored offset and stays in its bounds."""
    if piece.expected != expected or piece.until < expected:
        return False
    if not piece.records:
        return True
    return piece.records[0].offset >= expected and piece.records[-1].offset < piece.until


def _refusal(claim: PartitionClaim) -> str | None:
    name, stored = _name(claim.partition), claim.next_offset
    # First: the offset of another log says nothing about this one.
    if claim.topic_id and claim.stored_topic_id not in {"", claim.topic_id}:
        topic = claim.partition.topic
        return (
            f"{name}: the topic was deleted and made again (id {claim.topic_id}, before"
            f" {claim.stored_topic_id}). Up to offset {stored} the old one was read; what it had"
            " beyond that is gone. To read the new one from its first record, on the record:"
            f" accept-topic {topic} --accepted-by … --reason …"
        )
    if stored < claim.first_offset:
        return (
            f"{name}: offsets {stored} to {claim.first_offset} were removed before they were read"
        )
    if stored > claim.end_offset:
        return f"{name}: stored offset {stored} lies behind the log's end {claim.end_offset}"
    if claim.hint_offset is not None and claim.hint_offset > stored:
        return f"{name}: the hint {claim.hint_offset} is ahead of the stored offset {stored}"
    return None


def _name(partition: Partition) -> str:
    return f"{partition.topic}[{partition.number}]"
