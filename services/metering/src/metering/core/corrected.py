"""Corrected coverage: what is covered of allocations with corrections, and what it comes to.

Theory. Coverage says which time of which slice was reported, for whom; corrections say what it
comes to (`metering.core.corrections`). Both are facts, and the *effect* of a covered millisecond is
a function of them: billed under some terms, or voided. When usage comes, its fresh time has the
effect of what stands there; when a correction comes, the time whose effect it changes *shifts* from
one to the other. Whoever keeps the buckets moves it there.

Time that a void has released is *freed*: it leaves the coverage, so that another allocation can
have it, and is remembered for its own allocation alone, so that a replay of it is a duplicate. It
returns when a higher revision says so, unless another allocation has it by then.

An allocation that is reported again is a duplicate under the terms as reported, and under those
that they were corrected to.

Refuses nothing: `TakenTime` says that a correction cannot count yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from hisab_contracts.events import Correction
from hisab_contracts.ids import AllocationId, HubCode, NodeId, SliceId
from metering.core.corrections import (
    CorrectedAllocation,
    CorrectionFact,
    Effect,
    concerns,
    effect_on,
    pieces_of,
)
from metering.core.coverage import (
    Claim,
    CoverageChanges,
    CoverageConflict,
    CoveredInterval,
    DeviceCoverage,
    DeviceKey,
)

FreedKey = tuple[DeviceKey, AllocationId]
"""Whose freed time, and on which device."""


class FreshPart(NamedTuple):
    """A part of a reported interval that nobody covered, and what it comes to."""

    start_ms: int
    end_ms: int
    effect: Effect


class CorrectedSplit(NamedTuple):
    """A reported interval, taken apart under corrections; the parts add up to it exactly."""

    fresh: list[FreshPart]
    duplicates: list[tuple[int, int]]
    conflicts: list[CoverageConflict]


class Shift(NamedTuple):
    """Covered time of a slice whose effect a correction changes."""

    device: DeviceKey
    slice_uuid: SliceId
    start_ms: int
    end_ms: int
    claim: Claim
    before: Effect
    after: Effect


class TakenTime(NamedTuple):
    """Freed time that a correction would take back, and who has it by now."""

    shift: Shift
    conflict: CoverageConflict


class CorrectedCoverage:
    """A working copy of what is covered of allocations with corrections, in one batch."""

    def __init__(
        self,
        coverage: Mapping[DeviceKey, DeviceCoverage],
        freed: Mapping[DeviceKey, Sequence[CoveredInterval]],
        known: Mapping[CorrectedAllocation, Sequence[CorrectionFact]],
    ) -> None:
        """Work on this coverage, which others work on too."""
        self._coverage = coverage
        self._known = {allocation: list(facts) for allocation, facts in known.items()}
        self._freed: dict[FreedKey, DeviceCoverage] = {}
        for key, rows in freed.items():
            allocations = {row.claim.allocation_id for row in rows}
            for allocation_id in allocations:
                own = [row for row in rows if row.claim.allocation_id == allocation_id]
                self._freed[key, allocation_id] = DeviceCoverage(key[2], own)

    def known_of(self, hub: HubCode, allocation_id: AllocationId) -> Sequence[CorrectionFact]:
        """Return the corrections of an allocation that count."""
        return self._known.get((hub, allocation_id), ())

    def forget(self, fact: CorrectionFact) -> None:
        """Let a correction count no more, that nothing was corrected by so far."""
        correction = fact.correction
        self._known[correction.hub, correction.allocation_id].remove(fact)

    def begin(self, fact: CorrectionFact, begun: CorrectionFact) -> None:
        """Let a correction wait no more."""
        facts = self._known[fact.correction.hub, fact.correction.allocation_id]
        facts[facts.index(fact)] = begun

    # Usage comes.

    def split(
        self, key: DeviceKey, slice_uuid: SliceId, start_ms: int, end_ms: int, claim: Claim
    ) -> CorrectedSplit:
        """Say what of a reported interval is fresh, duplicate and in conflict; change nothing."""
        found = CorrectedSplit([], [], [])
        known = self.known_of(key[0], claim.allocation_id)
        for piece in pieces_of(known, key[1], slice_uuid, start_ms, end_ms):
            effect = effect_on(claim, piece.correction)
            covered = self._freed_of(key, claim) if effect.frees else self._coverage[key]
            split = covered.split(slice_uuid, piece.start_ms, piece.end_ms, claim)
            found.fresh.extend(FreshPart(*ends, effect) for ends in split.fresh)
            found.duplicates.extend(split.duplicates)
            for conflict in split.conflicts:
                if _comes_to_the_same(conflict, slice_uuid, claim, piece.correction):
                    found.duplicates.append((conflict.start_ms, conflict.end_ms))
                else:
                    found.conflicts.append(conflict)
        return found

    def take(self, key: DeviceKey, slice_uuid: SliceId, part: FreshPart, claim: Claim) -> None:
        """Take a part into what is covered that `split` has called fresh."""
        covered = self._freed_of(key, claim) if part.effect.frees else self._coverage[key]
        covered.take(slice_uuid, part.start_ms, part.end_ms, claim)

    # A correction comes.

    def covered_gpu_ns(self, correction: Correction) -> int:
        """Return how much of what a correction names is covered, voided time included."""
        return sum(
            (row.end_ms - row.start_ms) * row.claim.share_ppm
            for _, row in self._rows_named(correction)
        )

    def shifts_of(self, fact: CorrectionFact) -> list[Shift]:
        """Return the covered time whose effect a new correction changes; change nothing."""
        correction = fact.correction
        before = self.known_of(correction.hub, correction.allocation_id)
        after = [*before, fact]
        return [
            Shift(key, row.slice_uuid, old.start_ms, old.end_ms, row.claim, was, becomes)
            for key, row in self._rows_named(correction)
            for new in pieces_of(after, key[1], row.slice_uuid, row.start_ms, row.end_ms)
            if new.standing is fact
            for old in pieces_of(before, key[1], row.slice_uuid, new.start_ms, new.end_ms)
            if (was := effect_on(row.claim, old.correction))
            != (becomes := effect_on(row.claim, correction))
        ]

    def taken_by(self, shifts: Sequence[Shift]) -> TakenTime | None:
        """Return what of freed time cannot return, because another allocation has it."""
        for shift in shifts:
            if shift.before.frees and not shift.after.frees:
                split = self._coverage[shift.device].split(
                    shift.slice_uuid, shift.start_ms, shift.end_ms, shift.claim
                )
                for conflict in split.conflicts:
                    return TakenTime(shift, conflict)
        return None

    def correct(self, fact: CorrectionFact, shifts: Sequence[Shift]) -> None:
        """Let a correction count; `shifts` are its own, and none of them is taken."""
        correction = fact.correction
        self._known.setdefault((correction.hub, correction.allocation_id), []).append(fact)
        for key, slice_uuid, start_ms, end_ms, claim, before, after in shifts:
            if before.frees == after.frees:
                continue
            freed, coverage = self._freed_of(key, claim), self._coverage[key]
            left, joined = (freed, coverage) if before.frees else (coverage, freed)
            left.remove(slice_uuid, start_ms, end_ms)
            joined.take(slice_uuid, start_ms, end_ms, claim)

    def freed_changes(self) -> dict[FreedKey, CoverageChanges]:
        """Return how the rows of freed time differ from what was stored."""
        changes = {key: device.changes() for key, device in self._freed.items()}
        return {key: changed for key, changed in changes.items() if any(changed)}

    def _freed_of(self, key: DeviceKey, claim: Claim) -> DeviceCoverage:
        return self._freed.setdefault((key, claim.allocation_id), DeviceCoverage(key[2]))

    def _rows_named(self, correction: Correction) -> Iterator[tuple[DeviceKey, CoveredInterval]]:
        """Yield what a correction names of what is covered, cut at its ends."""
        devices = [(key, device) for key, device in self._coverage.items()]
        devices += [(key, device) for (key, _), device in self._freed.items()]
        for key, device in devices:
            if key[0] != correction.hub:
                continue
            for row in device.rows_within(correction.start_ms, correction.end_ms):
                if row.claim.allocation_id == correction.allocation_id and concerns(
                    correction, NodeId(key[1]), row.slice_uuid
                ):
                    yield key, row


def _comes_to_the_same(
    conflict: CoverageConflict, slice_uuid: SliceId, claim: Claim, standing: Correction | None
) -> bool:
    """Say whether covered time of another claim is this one's, under the terms as corrected."""
    other = conflict.claim
    if conflict.slice_uuid != slice_uuid or other.allocation_id != claim.allocation_id:
        return False
    effect = effect_on(claim, standing)
    return (
        effect.terms is not None
        and other.share_ppm == claim.share_ppm
        and effect == effect_on(other, standing)
    )
