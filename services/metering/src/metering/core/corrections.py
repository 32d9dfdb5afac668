"""Corrections: which of them counts where, and which an operator must approve first.

Theory. A correction says of an allocation, on some slices in `[start, end)`, that what was reported
is *void*, or has other terms (*replace*). It is a fact of its own: coverage stays as it was
reported, and what a covered millisecond comes to is read off it through the correction that
*stands* there. That is the one with the highest revision, of equal ones the first that counted. So
it does not matter whether usage or its correction comes first, nor in which order corrections come;
and a void is remembered as long as the fact is there, which is for ever.

A void may *release* its time: the device was really free, so it keeps no other allocation out.

Of two corrections of one revision with other *content* (action, replacement, release) the second
contradicts the first where the first stands. Only that part waits, as a conflict, until a higher
revision settles it. A lower revision than the one that stands is nothing, and so is the same again.

A correction of a hub needs an operator's approval when it is large or reaches far back: a program
gone wrong must not empty a month. Operators' corrections need two people already.

Refuses nothing: what may not count yet is an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from msgspec import Struct

from hisab_contracts.canonical import content_sha256
from hisab_contracts.events import Correction, Replacement
from hisab_contracts.ids import (
    AllocationId,
    CorrectionId,
    HubCode,
    NodeId,
    PriceClass,
    ProjectId,
    Sku,
    SliceId,
    TenantId,
)
from hisab_contracts.units import GPU_NS_PER_GPU_HOUR, instant_text
from metering.core.coverage import Claim

MAX_UNAPPROVED_GPU_HOURS: Final = 168
"""A device for a week: what a hub may correct without an operator."""

WHOLE_DEVICE_PPM: Final = 1_000_000

_ANY_OTHER_NODE: Final = NodeId("")
_ANY_OTHER_SLICE: Final = SliceId("")
"""Stand for all nodes and slices that no correction names: no id is empty."""

CorrectedAllocation = tuple[HubCode, AllocationId]
"""Whom a correction is about: whoever the allocation was reported for."""


class BilledTerms(NamedTuple):
    """For whom, and at which price, time of an allocation is billed."""

    tenant_id: TenantId
    project_id: ProjectId
    sku: Sku
    price_class: PriceClass


class Effect(NamedTuple):
    """What covered time comes to."""

    terms: BilledTerms | None
    """Under which terms it is billed; None: it is voided."""
    frees: bool = False
    """Whether it keeps no other allocation out."""


class CorrectionFact(Struct, frozen=True, gc=False):
    """A correction that counts."""

    counted_seq: int
    """They rise in the order in which corrections began to count."""
    correction: Correction
    waits: bool = False
    """A hub's, of which nothing was covered when it came: it is judged again when something is."""


class CorrectedPiece(NamedTuple):
    """A part of time on one slice, and the correction that stands there, if one does."""

    start_ms: int
    end_ms: int
    standing: CorrectionFact | None

    @property
    def correction(self) -> Correction | None:
        """What the standing one says."""
        return None if self.standing is None else self.standing.correction


class Contradiction(NamedTuple):
    """Where a correction meets another content at its own revision, first of all."""

    node_id: NodeId
    slice_uuid: SliceId
    piece: CorrectedPiece
    is_whole: bool
    """Whether it is so wherever the correction speaks."""


def terms_of(claim: Claim) -> BilledTerms:
    """Return the terms that a claim was reported under."""
    return BilledTerms(claim.tenant_id, claim.project_id, claim.sku, claim.price_class)


def effect_on(claim: Claim, correction: Correction | None) -> Effect:
    """Return what time of a claim comes to where this correction stands."""
    terms = terms_of(claim)
    if correction is None:
        return Effect(terms)
    if correction.action == "void":
        return Effect(None, correction.release)
    other = correction.replacement or Replacement()
    return Effect(
        BilledTerms(
            other.tenant_id or terms.tenant_id,
            other.project_id or terms.project_id,
            other.sku or terms.sku,
            other.price_class or terms.price_class,
        )
    )


def concerns(correction: Correction, node_id: NodeId, slice_uuid: SliceId) -> bool:
    """Say whether a correction of this allocation speaks of a slice of a node."""
    return correction.node_id in (None, node_id) and (
        correction.slice_uuids is None or slice_uuid in correction.slice_uuids
    )


def pieces_of(
    known: Iterable[CorrectionFact],
    node_id: NodeId,
    slice_uuid: SliceId,
    start_ms: int,
    end_ms: int,
) -> list[CorrectedPiece]:
    """Cut `[start_ms, end_ms)` of a slice by what stands in it; the pieces add up to it, in order.

    `known` are corrections of one allocation.
    """
    found = [
        fact
        for fact in known
        if fact.correction.start_ms < end_ms
        and start_ms < fact.correction.end_ms
        and concerns(fact.correction, node_id, slice_uuid)
    ]
    if not found:
        return [CorrectedPiece(start_ms, end_ms, None)]
    edges = {start_ms, end_ms}
    for fact in found:
        edges.add(max(start_ms, fact.correction.start_ms))
        edges.add(min(end_ms, fact.correction.end_ms))
    pieces: list[CorrectedPiece] = []
    for from_ms, until_ms in pairwise(sorted(edges)):
        there = [
            fact
            for fact in found
            if fact.correction.start_ms <= from_ms and until_ms <= fact.correction.end_ms
        ]
        standing = max(there, key=_rank, default=None)
        if pieces and pieces[-1].standing is standing:
            pieces[-1] = pieces[-1]._replace(end_ms=until_ms)
        else:
            pieces.append(CorrectedPiece(from_ms, until_ms, standing))
    return pieces


def contradiction_of(
    known: Sequence[CorrectionFact], correction: Correction
) -> Contradiction | None:
    """Return where a correction contradicts one of its own revision that stands, or None."""
    first: tuple[NodeId, SliceId, CorrectedPiece] | None = None
    is_whole = True
    for node_id in _nodes_of(known, correction):
        for slice_uuid in _slices_of(known, correction):
            for piece in pieces_of(
                known, node_id, slice_uuid, correction.start_ms, correction.end_ms
            ):
                if not _contradicts(piece.standing, correction):
                    is_whole = False
                elif first is None:
                    first = (node_id, slice_uuid, piece)
    return None if first is None else Contradiction(*first, is_whole)


def is_same(correction: Correction, other: Correction) -> bool:
    """Say whether two corrections say the same of the same, whoever approved them, and why."""
    return _content_of(correction) == _content_of(other) and _scope_of(correction) == _scope_of(
        other
    )


def approval_needed(
    correction: Correction, covered_gpu_ns: int, horizon_ms: int | None
) -> str | None:
    """Return why a hub's correction needs an operator's approval; None: it needs none.

    `covered_gpu_ns` is what it names that is covered; what lies before `horizon_ms` is late.
    """
    named_gpu_ns = covered_gpu_ns
    if correction.slice_uuids is not None:
        # Whatever is covered of them: what a hub asks for is what it is held to.
        span_ms = correction.end_ms - correction.start_ms
        named_gpu_ns = len(set(correction.slice_uuids)) * span_ms * WHOLE_DEVICE_PPM
    if named_gpu_ns > MAX_UNAPPROVED_GPU_HOURS * GPU_NS_PER_GPU_HOUR:
        return (
            f"it names {named_gpu_ns // GPU_NS_PER_GPU_HOUR} GPU-hours: more than "
            f"{MAX_UNAPPROVED_GPU_HOURS} take an operator, who approves by replaying this record"
        )
    if horizon_ms is not None and correction.start_ms < horizon_ms:
        return (
            f"it begins before {instant_text(horizon_ms)}, the lateness horizon: that takes an "
            "operator, who approves by replaying this record"
        )
    return None


def next_revision(known: Iterable[Correction], node_id: NodeId | None) -> int:
    """Return the revision of an operator's next correction of an allocation, on a node or all."""
    revisions = [
        correction.revision
        for correction in known
        if node_id is None or correction.node_id in (None, node_id)
    ]
    return max(revisions, default=0) + 1


def hub_correction_id(correction: Correction) -> CorrectionId:
    """Name a hub's correction by all it says: the same again has the same name."""
    return CorrectionId(content_sha256(correction)[:32])


def proposal_id(correction: Correction, proposed_by: str, proposed_ms: int) -> CorrectionId:
    """Name an operator's correction by what is proposed, by whom and when."""
    content = (content_sha256(correction), proposed_by, proposed_ms)
    return CorrectionId(content_sha256(content)[:32])


def _rank(fact: CorrectionFact) -> tuple[int, int]:
    return fact.correction.revision, -fact.counted_seq


def _contradicts(standing: CorrectionFact | None, correction: Correction) -> bool:
    return (
        standing is not None
        and standing.correction.revision == correction.revision
        and _content_of(standing.correction) != _content_of(correction)
    )


def _content_of(correction: Correction) -> tuple[object, ...]:
    # A void may say that it replaces nothing, or say nothing of it.
    other = correction.replacement or Replacement()
    return correction.revision, correction.action, correction.release, other


def _scope_of(correction: Correction) -> tuple[object, ...]:
    slices = None if correction.slice_uuids is None else frozenset(correction.slice_uuids)
    return (
        correction.hub,
        correction.node_id,
        correction.allocation_id,
        slices,
        correction.start_ms,
        correction.end_ms,
    )


def _nodes_of(known: Iterable[CorrectionFact], correction: Correction) -> list[NodeId]:
    """Return the nodes that a correction speaks of, all that nobody names as one."""
    if correction.node_id is not None:
        return [correction.node_id]
    named = {fact.correction.node_id for fact in known}
    return [_ANY_OTHER_NODE, *sorted(node_id for node_id in named if node_id is not None)]


def _slices_of(known: Iterable[CorrectionFact], correction: Correction) -> list[SliceId]:
    """Return the slices that a correction speaks of, all that nobody names as one."""
    if correction.slice_uuids is not None:
        return sorted(set(correction.slice_uuids))
    named = {name for fact in known for name in fact.correction.slice_uuids or ()}
    return [_ANY_OTHER_SLICE, *sorted(named)]
