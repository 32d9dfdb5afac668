"""Coverage: which instants of which device slice are sold, and to whom.

Theory. For every device of a node we keep, per slice, disjoint half-open intervals, each owned by
one *claim*: the allocation that reserved it, for whom, at which SKU, price class and share. A
reported interval is split against them. What nobody covers is *fresh*: it becomes billable and
joins the coverage. What the same claim covers already is a *duplicate*. All else is a *conflict*:
another claim on the same slice, or a claim on the whole device where one of its slices is sold, and
the reverse. So the GPU time of an allocation is the measure of the union of what was reported, and
for input without conflicts neither order nor chunking nor repetition can change it.
A fresh part never overlaps anything, hence no instant of a slice is billed twice.

Rows are cut at UTC midnight, so that no stored row is longer than a day: all that can touch an
interval is found between the midnight before it and its end. Touching rows of one claim within a
day are merged: nearly always a device is one row that grows at its end.

Refuses nothing: a conflict is an answer.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from hisab_contracts.ids import (
    AllocationId,
    DeviceId,
    HubCode,
    NodeId,
    PriceClass,
    ProjectId,
    Sku,
    SliceId,
    TenantId,
)
from hisab_contracts.units import HOUR_MS, hour_floor_ms

DAY_MS: Final = 86_400_000

DeviceKey = tuple[HubCode, NodeId, DeviceId]
"""Which device: a device is named by its node, and a node by its hub."""

ShareSums = dict[tuple[int, int], int]
"""[start_ms, end_ms) → the sum of the shares of the parts that have exactly these ends."""


class Claim(NamedTuple):
    """Who reserved a slice, and at which price class and share: two equal claims are one."""

    tenant_id: TenantId
    project_id: ProjectId
    allocation_id: AllocationId
    sku: Sku
    price_class: PriceClass
    share_ppm: int


class CoveredInterval(NamedTuple):
    """One stored interval `[start_ms, end_ms)` of a slice, within one UTC day."""

    slice_uuid: SliceId
    start_ms: int
    end_ms: int
    claim: Claim


class CoverageConflict(NamedTuple):
    """A part of a reported interval that another claim, or another slicing, has sold already."""

    start_ms: int
    end_ms: int
    slice_uuid: SliceId
    """The slice that is sold: another than the reported one when whole device and slice meet."""
    claim: Claim


class IntervalSplit(NamedTuple):
    """A reported interval, taken apart: the parts are disjoint and add up to it exactly."""

    fresh: tuple[tuple[int, int], ...]
    """`[start_ms, end_ms)` in order: billable."""
    duplicates: tuple[tuple[int, int], ...]
    """`[start_ms, end_ms)` in order: the same claim covers them already."""
    conflicts: tuple[CoverageConflict, ...]


class CoverageChanges(NamedTuple):
    """How the stored rows of one device must change so that they say what its coverage says."""

    removed: list[tuple[SliceId, int]]
    """(slice, start_ms) of rows that are no more: merged into others, or taken out."""
    grown: list[tuple[SliceId, int, int]]
    """(slice, start_ms, new end_ms) of rows that end elsewhere: nearly always they reach further.
    """
    added: list[CoveredInterval]


class _Track:
    """The covered intervals of one slice: three parallel lists, sorted, disjoint."""

    __slots__ = ("claims", "ends", "starts", "stored")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.claims: list[Claim] = []
        self.stored: dict[int, CoveredInterval] = {}
        """By start_ms, the rows as they are in the store."""

    def within(self, start_ms: int, end_ms: int) -> range:
        """Return the indexes of what overlaps `[start_ms, end_ms)`."""
        return range(bisect_right(self.ends, start_ms), bisect_left(self.starts, end_ms))

    def remove(self, start_ms: int, end_ms: int) -> None:
        """Take a part out again; what is left of rows on its sides stays."""
        # From the end: what was looked at before keeps its index.
        for at in reversed(self.within(start_ms, end_ms)):
            row_start_ms, row_end_ms, claim = self.starts[at], self.ends[at], self.claims[at]
            sides = [(row_start_ms, start_ms), (end_ms, row_end_ms)]
            left = [side for side in sides if side[0] < side[1]]
            self.starts[at : at + 1] = [side[0] for side in left]
            self.ends[at : at + 1] = [side[1] for side in left]
            self.claims[at : at + 1] = [claim] * len(left)

    def add(self, start_ms: int, end_ms: int, claim: Claim) -> None:
        """Cover a fresh part, cut at midnights, merging it with what it touches."""
        while start_ms < end_ms:
            until_ms = min(end_ms, start_ms - start_ms % DAY_MS + DAY_MS)
            self._add_within_day(start_ms, until_ms, claim)
            start_ms = until_ms

    def _add_within_day(self, start_ms: int, end_ms: int, claim: Claim) -> None:
        starts, ends, claims = self.starts, self.ends, self.claims
        at = bisect_left(starts, start_ms)
        # Rows that meet at midnight stay two: a merged row would be longer than a day, and whoever
        # loads from the midnight before an interval would no longer find it.
        joins_left = at > 0 and ends[at - 1] == start_ms and start_ms % DAY_MS != 0
        joins_right = at < len(starts) and starts[at] == end_ms and end_ms % DAY_MS != 0
        if joins_right and claims[at] == claim:
            end_ms = ends[at]
            del starts[at], ends[at], claims[at]
        if joins_left and claims[at - 1] == claim:
            ends[at - 1] = end_ms
        else:
            starts.insert(at, start_ms)
            ends.insert(at, end_ms)
            claims.insert(at, claim)


class DeviceCoverage:
    """A working copy of one device's coverage, as far as a batch can touch it.

    It is made from the stored rows, every reported interval is covered on it in order of arrival,
    and `changes` says in the end how the rows must change.
    """

    __slots__ = ("_device_uuid", "_touched", "_tracks")

    def __init__(self, device_uuid: DeviceId, rows: Iterable[CoveredInterval] = ()) -> None:
        """Take the stored rows of all slices of the device, in any order."""
        self._device_uuid: str = device_uuid
        self._tracks: dict[SliceId, _Track] = {}
        self._touched: set[SliceId] = set()
        for row in sorted(rows, key=_by_start):
            track = self._tracks.setdefault(row.slice_uuid, _Track())
            track.starts.append(row.start_ms)
            track.ends.append(row.end_ms)
            track.claims.append(row.claim)
            track.stored[row.start_ms] = row

    def cover(self, slice_uuid: SliceId, start_ms: int, end_ms: int, claim: Claim) -> IntervalSplit:
        """Split a reported interval and take what is fresh of it into the coverage."""
        track = self._tracks.get(slice_uuid)
        if track is None:
            # Split before the track exists: an interval that is all conflict must not leave an
            # empty track, because later intervals take the fast path by the number of tracks.
            split = self.split(slice_uuid, start_ms, end_ms, claim)
            if split.fresh:
                track = self._tracks[slice_uuid] = _Track()
        elif len(self._tracks) == 1 and track.ends and track.ends[-1] <= start_ms:
            # Nearly always so: time goes on, and nobody slices the device otherwise. Nothing on the
            # only track ends after the start, so all of it is fresh and no search is needed.
            split = IntervalSplit(((start_ms, end_ms),), (), ())
        else:
            split = self.split(slice_uuid, start_ms, end_ms, claim)
        if split.fresh and track is not None:
            self._touched.add(slice_uuid)
            for fresh_start_ms, fresh_end_ms in split.fresh:
                track.add(fresh_start_ms, fresh_end_ms, claim)
        return split

    def split(self, slice_uuid: SliceId, start_ms: int, end_ms: int, claim: Claim) -> IntervalSplit:
        """Say what of a reported interval is fresh, duplicate and in conflict; change nothing."""
        fresh: list[tuple[int, int]] = []
        conflicts: list[CoverageConflict] = []
        duplicates: list[tuple[int, int]] = []
        cursor_ms = start_ms
        for covered in sorted(self._covered_within(slice_uuid, start_ms, end_ms), key=_by_start):
            until_ms = min(covered.end_ms, end_ms)
            if until_ms <= cursor_ms:
                continue  # Covered on two slices at once: the earlier one has named the conflict.
            if cursor_ms < covered.start_ms:
                fresh.append((cursor_ms, covered.start_ms))
                cursor_ms = covered.start_ms
            if covered.slice_uuid == slice_uuid and covered.claim == claim:
                duplicates.append((cursor_ms, until_ms))
            else:
                conflicts.append(
                    CoverageConflict(cursor_ms, until_ms, covered.slice_uuid, covered.claim)
                )
            cursor_ms = until_ms
        if cursor_ms < end_ms:
            fresh.append((cursor_ms, end_ms))
        return IntervalSplit(tuple(fresh), tuple(duplicates), tuple(conflicts))

    def take(self, slice_uuid: SliceId, start_ms: int, end_ms: int, claim: Claim) -> None:
        """Take a part into the coverage that `split` has called fresh."""
        self._touched.add(slice_uuid)
        self._tracks.setdefault(slice_uuid, _Track()).add(start_ms, end_ms, claim)

    def remove(self, slice_uuid: SliceId, start_ms: int, end_ms: int) -> None:
        """Take a part out of the coverage: it excludes nobody any more."""
        self._touched.add(slice_uuid)
        self._tracks[slice_uuid].remove(start_ms, end_ms)

    def rows_within(self, start_ms: int, end_ms: int) -> list[CoveredInterval]:
        """Return what is covered in `[start_ms, end_ms)` on any slice, cut at its ends."""
        return [
            CoveredInterval(
                slice_uuid,
                max(track.starts[at], start_ms),
                min(track.ends[at], end_ms),
                track.claims[at],
            )
            for slice_uuid, track in self._tracks.items()
            for at in track.within(start_ms, end_ms)
        ]

    def changes(self) -> CoverageChanges:
        """Return how the rows differ from what was stored; all empty when nothing has changed."""
        changes = CoverageChanges([], [], [])
        for slice_uuid in self._touched:
            track = self._tracks[slice_uuid]
            left = dict(track.stored)
            for start_ms, end_ms, claim in zip(track.starts, track.ends, track.claims, strict=True):
                stored = left.pop(start_ms, None)
                if stored is not None and stored.claim != claim:
                    # Taken out, and taken by another: rows are removed before others are added.
                    changes.removed.append((slice_uuid, start_ms))
                    stored = None
                if stored is None:
                    changes.added.append(CoveredInterval(slice_uuid, start_ms, end_ms, claim))
                elif stored.end_ms != end_ms:
                    changes.grown.append((slice_uuid, start_ms, end_ms))
            changes.removed.extend((slice_uuid, start_ms) for start_ms in left)
        return changes

    def _covered_within(
        self, slice_uuid: SliceId, start_ms: int, end_ms: int
    ) -> Iterator[CoveredInterval]:
        """Yield what is covered in `[start_ms, end_ms)` on every slice that excludes this one."""
        whole = slice_uuid == self._device_uuid
        for other_uuid, track in self._tracks.items():
            if whole or other_uuid in (slice_uuid, self._device_uuid):
                for at in track.within(start_ms, end_ms):
                    yield CoveredInterval(
                        other_uuid, track.starts[at], track.ends[at], track.claims[at]
                    )


def day_floor_ms(instant_ms: int) -> int:
    """Return the UTC midnight at or before an instant: no row that holds it starts earlier."""
    return instant_ms - instant_ms % DAY_MS


def days_touched_count(start_ms: int, end_ms: int) -> int:
    """Return how many UTC days `[start_ms, end_ms)` touches: into so many rows it may be cut."""
    return (end_ms - 1) // DAY_MS - start_ms // DAY_MS + 1


def hours_of(start_ms: int, end_ms: int) -> range:
    """Return the starts of the UTC hours that `[start_ms, end_ms)` touches."""
    return range(hour_floor_ms(start_ms), end_ms, HOUR_MS)


def by_hour(sums: ShareSums) -> dict[int, int]:
    """Split parts at UTC hours and add up their GPU-ns per hour; conserves the sum exactly."""
    hours: dict[int, int] = {}
    for (start_ms, end_ms), share_ppm in sums.items():
        cursor_ms = start_ms
        while cursor_ms < end_ms:
            hour_ms = hour_floor_ms(cursor_ms)
            until_ms = min(end_ms, hour_ms + HOUR_MS)
            hours[hour_ms] = hours.get(hour_ms, 0) + (until_ms - cursor_ms) * share_ppm
            cursor_ms = until_ms
    return hours


def _by_start(row: CoveredInterval) -> tuple[int, int, str]:
    return row.start_ms, row.end_ms, row.slice_uuid
