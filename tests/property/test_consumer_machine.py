"""The consumer's machine against a model of the outside: a log with gaps, a store, a broker.

Whatever happens (rebalances, lost answers, zombies, stray fetches, deaths), every record of the log
is processed exactly once relative to the stored offset: none skipped, none twice.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.machine import (
    CAREFUL_ATTEMPT,
    UNREAD_ATTEMPT,
    Action,
    Assigned,
    Claimed,
    ClaimPartitions,
    Committed,
    Event,
    Failed,
    Fenced,
    Fetched,
    Halt,
    Hint,
    Machine,
    OffsetLost,
    Partition,
    PartitionClaim,
    Pause,
    Process,
    Revoked,
    Seek,
    Slice,
    Watch,
)

P0, P1, P2 = (Partition("t", number) for number in range(3))


@dataclass(frozen=True)
class Message:
    """A record of the model's log."""

    offset: int


@dataclass
class Row:
    """A progress row of the model's store."""

    epoch: int = 0
    next_offset: int = 0
    attempt_offset: int = -1
    attempts: int = 0


@dataclass
class World:
    """Everything outside the machine: logs with gaps, rows, and what was stored in them."""

    logs: dict[Partition, list[Message]]
    ends: dict[Partition, int]
    rows: dict[Partition, Row] = field(default_factory=dict)
    stored: dict[Partition, list[int]] = field(default_factory=dict)
    unread: dict[Partition, list[int]] = field(default_factory=dict)

    def claim(self, partitions: tuple[Partition, ...]) -> Claimed:
        claims = []
        for partition in partitions:
            row = self.rows.setdefault(partition, Row())
            row.epoch += 1
            attempts = row.attempts if row.attempt_offset == row.next_offset else 0
            end = self.ends[partition]
            claims.append(
                PartitionClaim(partition, row.epoch, row.next_offset, attempts, 0, end, None)
            )
        return Claimed(tuple(claims))

    def mark(self, process: Process) -> bool:
        marked = [piece for piece in process.slices if piece.attempt]
        if not all(self._owns(piece) for piece in marked):
            return False
        for piece in marked:
            row = self.rows[piece.partition]
            row.attempt_offset, row.attempts = piece.expected, piece.attempt
        return True

    def commit(self, process: Process) -> bool:
        """The transaction: progress of every slice advances, or nothing happens."""
        if not all(self._owns(piece) for piece in process.slices):
            return False
        for piece in process.slices:
            self.rows[piece.partition].next_offset = piece.until
            place = self.unread if process.unread else self.stored
            offsets = [record.offset for record in piece.records]
            place.setdefault(piece.partition, []).extend(offsets)
        return True

    def _owns(self, piece: Slice) -> bool:
        row = self.rows[piece.partition]
        return row.epoch == piece.epoch and row.next_offset == piece.expected < piece.until


class Member:
    """A driver of the machine, as thin as the real one, with a seeded hand of fate."""

    def __init__(self, world: World, random: Random, poison: int | None = None) -> None:
        self.world = world
        self.random = random
        self.poison = poison
        self.machine = Machine(max_records=5)
        self.positions: dict[Partition, int] = {}
        self.halted: str | None = None

    def feed(self, event: Event) -> None:
        actions: deque[Action] = deque(self.machine.handle(event))
        while actions and self.halted is None:
            action = actions.popleft()
            match action:
                case ClaimPartitions(partitions):
                    actions.extend(self.machine.handle(self._claim(partitions)))
                case Seek(partition, offset):
                    self.positions[partition] = offset
                case Process():
                    actions.extend(self.machine.handle(self._process(action)))
                case Hint() | Pause():
                    pass
                case Halt(reason):
                    self.halted = reason

    def _claim(self, partitions: tuple[Partition, ...]) -> Event:
        if self.random.random() < 0.1:
            return Failed()
        return self.world.claim(partitions)

    def _process(self, process: Process) -> Event:
        for piece in process.slices:
            assert piece.partition in self.machine.ready
        fate = self.random.random()
        if fate < 0.1:
            return Failed()
        if not self.world.mark(process):
            return Fenced()
        offsets = [record.offset for piece in process.slices for record in piece.records]
        if self.poison in offsets and not process.unread:
            raise Killed
        if fate < 0.15:
            return Failed(blame=True)
        committed = self.world.commit(process)
        if fate < 0.3:
            return Failed(unknown=True)
        return Committed() if committed else Fenced()

    def fetch(self) -> None:
        """Bring some of what each partition has from its position on; positions move at once."""
        slices = []
        for partition, begun in sorted(self.positions.items()):
            if self.random.random() < 0.3:
                continue
            ahead = [m for m in self.world.logs[partition] if m.offset >= begun]
            taken = ahead[: self.random.randint(0, 4)]
            until = taken[-1].offset + 1 if taken else begun
            if len(taken) == len(ahead) and self.random.random() < 0.5:
                until = self.world.ends[partition]
            self.positions[partition] = until
            slices.append(Slice(partition, begun, until, taken))
        self.feed(Fetched(tuple(slices)))


class Killed(Exception):
    """kill -9: the member is gone with all it knew."""


def _world(random: Random) -> World:
    logs = {}
    ends = {}
    for partition in (P0, P1, P2):
        offsets = sorted(random.sample(range(40), random.randint(0, 20)))
        logs[partition] = [Message(offset) for offset in offsets]
        ends[partition] = (offsets[-1] + 1 if offsets else 0) + random.randint(0, 3)
    return World(logs, ends)


def _drain(world: World, member: Member) -> None:
    member.random = Random(0)
    member.random.random = lambda: 0.99  # type: ignore[method-assign]
    member.feed(Assigned((P0, P1, P2)))
    for _ in range(200):
        member.fetch()


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
@pytest.mark.defect("M3", "M4", "M30", "F13", "F16", "F22")
def test_every_record_is_stored_exactly_once_whatever_happens(seed: int) -> None:
    """Two members, rebalances, zombies, lost answers, failures: none lost, none twice."""
    random = Random(seed)
    world = _world(random)
    members = [Member(world, random), Member(world, random)]
    for _ in range(60):
        member = random.choice(members)
        fate = random.random()
        if fate < 0.08:
            member.feed(Assigned(tuple(sorted(random.sample((P0, P1, P2), random.randint(1, 3))))))
        elif fate < 0.1:
            member.feed(Revoked())
            member.positions.clear()
        elif fate < 0.15:
            members[members.index(member)] = Member(world, random)
        else:
            member.fetch()
    last = Member(world, random)
    _drain(world, last)
    expected = {p: [m.offset for m in log] for p, log in world.logs.items() if log}
    both = {p: sorted(world.stored.get(p, []) + world.unread.get(p, [])) for p in expected}
    assert expected == both


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), poison=st.integers(0, 39))
@pytest.mark.defect("M6", "M19", "F23")
def test_a_record_that_kills_the_process_is_put_aside_and_only_that_one(
    seed: int, poison: int
) -> None:
    """A poison record kills every process that looks at it; all the others are stored once."""
    world = _world(Random(seed))
    calm = Random(seed)
    calm.random = lambda: 0.99  # type: ignore[method-assign]
    deaths = 0
    for _ in range(20):
        member = Member(world, calm, poison=poison)
        try:
            member.feed(Assigned((P0,)))
            for _ in range(60):
                member.fetch()
        except Killed:
            deaths += 1
            continue
        break
    offsets = [m.offset for m in world.logs[P0]]
    assert [o for o in offsets if o != poison] == sorted(world.stored.get(P0, []))
    assert [o for o in offsets if o == poison] == world.unread.get(P0, [])
    assert deaths <= 2 * UNREAD_ATTEMPT


def _claimed(
    machine: Machine, *, next_offset: int = 0, attempts: int = 0, **more: int
) -> list[Action]:
    machine.handle(Assigned((P0,)))
    bounds = {"first_offset": 0, "end_offset": 100, "hint_offset": None, **more}
    claim = PartitionClaim(P0, 7, next_offset, attempts, **bounds)  # type: ignore[arg-type]
    return machine.handle(Claimed((claim,)))


def _piece(expected: int, *offsets: int) -> Slice:
    return Slice(P0, expected, offsets[-1] + 1, [Message(offset) for offset in offsets])


def test_records_fetched_before_the_seek_are_discarded() -> None:
    """What was fetched of a partition that is only assigned, or from another offset, is dropped."""
    machine = Machine()
    machine.handle(Assigned((P0,)))
    assert [] == machine.handle(Fetched((_piece(0, 0, 1),)))
    _claimed(machine, next_offset=5)
    assert [Seek(P0, 5)] == machine.handle(Fetched((_piece(6, 6, 7),)))


@pytest.mark.defect("F16")
def test_a_hint_ahead_of_the_store_halts() -> None:
    """The database was restored to an older state: going on needs an operator."""
    actions = _claimed(Machine(), next_offset=5, hint_offset=9)
    assert [Halt("t[0]: the hint 9 is ahead of the stored offset 5")] == actions


@pytest.mark.defect("F14")
def test_removed_records_halt() -> None:
    """Retention removed records that were never read: never jump over them."""
    actions = _claimed(Machine(), next_offset=5, first_offset=8)
    assert [Halt("t[0]: offsets 5 to 8 were removed before they were read")] == actions


@pytest.mark.defect("F14")
def test_an_offset_out_of_range_halts() -> None:
    """The same, noticed while fetching."""
    machine = Machine()
    _claimed(machine, next_offset=5)
    assert [Halt("offset 5 of t[0] is out of the broker's range")] == machine.handle(OffsetLost(P0))


@pytest.mark.defect("F18")
def test_a_topic_made_anew_halts() -> None:
    """The log ends before the stored offset: it is another log."""
    actions = _claimed(Machine(), next_offset=101)
    assert [Halt("t[0]: stored offset 101 lies behind the log's end 100")] == actions


@pytest.mark.defect("F18")
def test_a_topic_of_another_id_halts_however_long_it_is_and_names_the_command() -> None:
    """Its offsets are no places in the log that was read; without both ids nothing is compared."""
    [halt] = _claimed(Machine(), next_offset=5, topic_id="B", stored_topic_id="A")  # type: ignore[arg-type]
    assert isinstance(halt, Halt)
    assert "deleted and made again (id B, before A). Up to offset 5" in halt.reason
    assert "accept-topic t " in halt.reason
    for ids in ({"topic_id": "A"}, {"stored_topic_id": "A"}, {}):
        actions = _claimed(Machine(), next_offset=5, **ids)  # type: ignore[arg-type]
        assert [Seek(P0, 5), Hint({P0: 5})] == actions


def test_the_first_batch_after_a_claim_is_marked_and_later_ones_cost_nothing() -> None:
    """Only the first batch stores its attempt; good batches carry no extra commit."""
    machine = Machine()
    _claimed(machine)
    (first,) = machine.handle(Fetched((_piece(0, 0, 1),)))
    assert isinstance(first, Process)
    assert [1] == [piece.attempt for piece in first.slices]
    machine.handle(Committed())
    (second,) = machine.handle(Fetched((_piece(2, 2, 3),)))
    assert isinstance(second, Process)
    assert [0] == [piece.attempt for piece in second.slices]


@pytest.mark.defect("M6")
def test_after_two_deaths_at_one_offset_records_come_one_by_one() -> None:
    """Two attempts are stored at this offset: the third hands over single records."""
    machine = Machine()
    _claimed(machine, attempts=CAREFUL_ATTEMPT - 1)
    (first,) = machine.handle(Fetched((_piece(0, 0, 1, 5),)))
    assert isinstance(first, Process)
    assert [(0, 1, CAREFUL_ATTEMPT)] == [(s.expected, s.until, s.attempt) for s in first.slices]
    _, second = machine.handle(Committed())
    assert isinstance(second, Process)
    assert [(1, 2, CAREFUL_ATTEMPT)] == [(s.expected, s.until, s.attempt) for s in second.slices]


@pytest.mark.defect("M6")
def test_a_record_that_failed_alone_for_a_reason_of_its_own_is_handed_over_unread() -> None:
    """A blamed failure counts like a death; an outage of the database does not."""
    machine = Machine()
    _claimed(machine)
    for _ in range(2):
        machine.handle(Fetched((_piece(0, 0, 1),)))
        machine.handle(Failed(blame=True))
    machine.handle(Fetched((_piece(0, 0, 1),)))
    machine.handle(Failed())
    (single,) = machine.handle(Fetched((_piece(0, 0, 1),)))
    assert isinstance(single, Process)
    assert (1, False) == (len(single.slices[0].records), single.unread)
    machine.handle(Failed(blame=True))
    (unread,) = machine.handle(Fetched((_piece(0, 0, 1),)))
    assert isinstance(unread, Process)
    assert (1, True) == (len(unread.slices[0].records), unread.unread)


def test_a_lost_answer_is_resolved_by_claiming_again() -> None:
    """An unknown COMMIT: the store says what happened."""
    machine = Machine()
    _claimed(machine)
    machine.handle(Fetched((_piece(0, 0),)))
    pause, claim = machine.handle(Failed(unknown=True))
    assert (Pause, ClaimPartitions((P0,))) == (type(pause), claim)
    assert () == machine.ready


def test_an_empty_fetch_that_passed_markers_still_advances() -> None:
    """Transaction markers and compaction leave gaps: the stored offset passes them."""
    machine = Machine()
    _claimed(machine)
    (process,) = machine.handle(Fetched((Slice(P0, 0, 3, []),)))
    assert isinstance(process, Process)
    assert 3 == process.slices[0].until


@pytest.mark.defect("F20")
def test_no_progress_for_thirty_seconds_is_stuck() -> None:
    """The watch says so exactly at its bound, and begins anew with every note."""
    watch = Watch(1_000)
    assert not any(_looks(watch, 2_000, 30_000))
    assert watch.is_stuck(31_000)
    watch.moved()
    assert not any(_looks(watch, 32_000, 61_000))
    assert watch.is_stuck(62_000)


def test_time_granted_for_a_rebalance_ends_with_it() -> None:
    """Joining may take a minute, whatever else is noted; once assigned, it is 30 s again."""
    watch = Watch(1_000)
    watch.moved(granted_ms=60_000)
    watch.moved()
    assert not any(_looks(watch, 2_000, 91_000))
    assert watch.is_stuck(92_000)
    watch.moved(granted_ms=60_000)
    assert not watch.is_stuck(93_000)
    watch.assigned()
    assert not any(_looks(watch, 94_000, 123_000))
    assert watch.is_stuck(124_000)


@settings(max_examples=100, deadline=None)
@given(
    jumps_ms=st.lists(st.integers(-90_000_000, 90_000_000), min_size=1, max_size=5),
    at=st.integers(0, 20),
)
def test_a_clock_that_jumps_for_one_reading_ends_nothing_and_blinds_nobody(
    jumps_ms: list[int], at: int
) -> None:
    """A day ahead or back, while notes come and after they have stopped."""
    watch = Watch(0)
    now_ms = 0
    for second in range(40):
        now_ms += 1_000
        watch.moved()
        jumped_ms = jumps_ms[second - at] if at <= second < at + len(jumps_ms) else 0
        assert not watch.is_stuck(now_ms + jumped_ms)
    stuck = []
    for _ in range(31):
        now_ms += 1_000
        stuck.append(watch.is_stuck(now_ms))
    assert stuck[-1]
    assert not any(stuck[:25])


def _looks(watch: Watch, first_ms: int, last_ms: int) -> list[bool]:
    """Look every second."""
    return [watch.is_stuck(at_ms) for at_ms in range(first_ms, last_ms + 1, 1_000)]


def test_a_claim_of_a_partition_that_was_taken_away_is_passed_over() -> None:
    """The claim was asked for before the rebalance: what it answers is not ours any more."""
    machine = Machine()
    machine.handle(Assigned((P0,)))
    other = PartitionClaim(Partition("t", 1), 3, 5, 0, 0, 100, None)
    actions = machine.handle(Claimed((other,)))
    assert [] == [action for action in actions if isinstance(action, Seek)]
    assert () == machine.ready


@pytest.mark.defect("M6")
def test_markers_after_two_deaths_are_passed_without_a_record() -> None:
    """One by one, a fetch without records is still one step: the stored offset passes it."""
    machine = Machine()
    _claimed(machine, attempts=CAREFUL_ATTEMPT - 1)
    (process,) = machine.handle(Fetched((Slice(P0, 0, 3, []),)))
    assert isinstance(process, Process)
    assert (3, 0) == (process.slices[0].until, len(process.slices[0].records))


def test_a_failure_with_nothing_assigned_asks_for_nothing() -> None:
    """Everything was revoked while work failed: there is nothing to claim again."""
    assert [] == Machine().handle(Failed())
    assert [] == Machine().handle(Fenced())


def test_an_outcome_of_nothing_is_a_defect() -> None:
    """Whoever reports a commit must have been handed work: anything else must be seen at once."""
    machine = Machine()
    _claimed(machine)
    with pytest.raises(RuntimeError, match="nothing is in flight"):
        machine.handle(Committed())
