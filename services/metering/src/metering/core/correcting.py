"""Correcting: how corrections, and the usage they are about, change the accounts of a batch.

Theory. `metering.core.corrected` knows what covered time comes to; here it is moved between
buckets. Usage of an allocation that has corrections is covered part by part, each billed or voided
as what stands there says. A correction moves the time whose effect it changes out of one bucket and
into another: billed time falls in its bucket, voided time rises in that of the terms as reported,
so that `reported = billed + duplicate + quarantined + voided` holds at every step. Buckets are
rated at the prices of their hour, whoever's they become.

A hub's correction of which nothing was covered *waits*: it counts, and is held to the bound on
what takes an operator's approval once more when its usage comes.

What a correction cannot do yet makes it wait whole, before anything is changed: a hub's record in
quarantine, an operator's where it is kept. Only another content at its own revision keeps just the
part where it stands, unless the rest had to wait for its usage, too: nothing is in quarantine and
counts on trial at once. The causes are those of `metering.core.engine`, in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, Literal, Protocol

from hisab_contracts.events import Correction, Device, Interval
from hisab_contracts.ids import CorrectionId, HoldId, HubCode, NodeId, TenantId
from hisab_contracts.units import instant_text
from metering.core.batch import (
    BucketTerms,
    CorrectedState,
    CorrectionChanges,
    CorrectionOrder,
    CountedCorrection,
    FreedTime,
    RatedHour,
    RatedInterval,
    RecordHeaders,
    RejectedRecord,
    UsagePart,
    UsageRecord,
    claim_of,
    parts_of,
)
from metering.core.corrected import (
    CorrectedCoverage,
    FreshPart,
    Shift,
    TakenTime,
)
from metering.core.corrections import (
    Contradiction,
    CorrectionFact,
    Effect,
    approval_needed,
    concerns,
    contradiction_of,
    is_same,
    terms_of,
)
from metering.core.coverage import (
    Claim,
    DeviceCoverage,
    DeviceKey,
    IntervalSplit,
    by_hour,
    hours_of,
)
from metering.core.quarantine import QuarantineCause

_FIRST_NEW_SEQ: Final = 2**62
"""Corrections of a batch count after all that are stored, which a database numbers from 1."""


class CorrectedAccounts(Protocol):
    """The accounts of a batch, as far as corrections change them."""

    def horizon_ms(self, hub: HubCode) -> int | None:
        """Return from when on usage of a hub is in time; None: nothing is late yet."""

    def rate(self, terms: BucketTerms, hour_ms: int) -> RatedHour | QuarantineCause:
        """Return the bucket that an hour fills under these terms, or the fact that is missing."""

    def hold_of(self, hour: RatedHour) -> HoldId | None:
        """Return the hold that a bucket has."""

    def bill(
        self, hour: RatedHour, gpu_ns: int, hold_id: HoldId | None, trace: RecordHeaders
    ) -> None:
        """Add to what is billed in a bucket, or take from it; its first hold stays."""

    def void(
        self, hour: RatedHour, gpu_ns: int, hold_id: HoldId | None, trace: RecordHeaders
    ) -> None:
        """Add to what is voided of a bucket, or take from it; its first hold stays."""

    def quarantine(self, rejected: RejectedRecord) -> None:
        """Quarantine a whole record."""

    def undo_count(self, record: UsageRecord) -> None:
        """Undo how a record that is judged again was counted in quarantine."""


class Correcting:
    """The corrections of one batch in the making."""

    def __init__(
        self,
        accounts: CorrectedAccounts,
        state: CorrectedState,
        coverage: Mapping[DeviceKey, DeviceCoverage],
    ) -> None:
        """Change these accounts and this coverage, which others change too."""
        self._accounts = accounts
        self._waiting_records = dict(state.waiting_records)
        self._covered = CorrectedCoverage(coverage, state.freed, state.known)
        self._next_seq = _FIRST_NEW_SEQ
        self._counted: dict[int, CountedCorrection] = {}
        self._begun: list[int] = []
        self._parked: list[int] = []
        self._waiting: dict[CorrectionId, QuarantineCause] = {}
        self._released: list[FreedTime] = []

    def concerns(self, interval: Interval) -> bool:
        """Say whether an interval's allocation has corrections."""
        return bool(self._covered.known_of(interval.hub, interval.allocation_id))

    def changes(self) -> CorrectionChanges:
        """Read out what has changed."""
        return CorrectionChanges(
            counted=list(self._counted.values()),
            begun=self._begun,
            parked=self._parked,
            waiting=self._waiting,
            freed=self._covered.freed_changes(),
            released=self._released,
        )

    # Usage comes.

    def judge_waiting(self, usage: RatedInterval) -> None:
        """Judge corrections again that wait for usage, if some of theirs comes with this."""
        interval = usage.interval
        for fact in list(self._covered.known_of(interval.hub, interval.allocation_id)):
            if not fact.waits:
                continue
            named_gpu_ns = sum(
                _named_gpu_ns(fact.correction, interval.node_id, device, part)
                for device, part in self._fresh_parts(usage)
            )
            if not named_gpu_ns:
                continue
            horizon_ms = self._accounts.horizon_ms(interval.hub)
            detail = approval_needed(fact.correction, named_gpu_ns, horizon_ms)
            if detail is None:
                self._begin(fact)
            else:
                self._park(fact, QuarantineCause("needs-approval", detail))

    def rejection_of(self, usage: RatedInterval) -> RejectedRecord | None:
        """Return why an interval cannot be rated as it was corrected, or None."""
        interval = usage.interval
        for device, part in self._fresh_parts(usage):
            key, claim = _device_key(interval, device), claim_of(interval, device)
            cause = self._missing_for(key, claim, part.effect, part.start_ms, part.end_ms)
            if cause is not None:
                terms = part.effect.terms
                missing_tenant = None if terms is None else terms.tenant_id
                return RejectedRecord(usage.record, cause, interval, True, missing_tenant)
        return None

    def has_fresh_before(self, usage: RatedInterval, horizon_ms: int) -> bool:
        """Say whether an interval brings time before this instant that nobody covers."""
        return any(part.start_ms < horizon_ms for _, part in self._fresh_parts(usage))

    def cover(self, usage: RatedInterval, part: UsagePart) -> IntervalSplit:
        """Cover a part of an interval: what is fresh is billed or voided, as what stands says."""
        interval, device = usage.interval, part.device
        key, claim = _device_key(interval, device), claim_of(interval, device)
        split = self._covered.split(key, device.slice_uuid, part.start_ms, part.end_ms, claim)
        for fresh in split.fresh:
            self._covered.take(key, device.slice_uuid, fresh, claim)
            self._account(key, claim, fresh, 1, interval.hold_id, usage.record.trace)
        ends = tuple((fresh.start_ms, fresh.end_ms) for fresh in split.fresh)
        return IntervalSplit(ends, tuple(split.duplicates), tuple(split.conflicts))

    def _fresh_parts(self, usage: RatedInterval) -> Iterator[tuple[Device, FreshPart]]:
        interval = usage.interval
        for device, start_ms, end_ms in parts_of(usage.record, interval):
            key, claim = _device_key(interval, device), claim_of(interval, device)
            split = self._covered.split(key, device.slice_uuid, start_ms, end_ms, claim)
            for part in split.fresh:
                yield device, part

    def _begin(self, fact: CorrectionFact) -> None:
        """Let a correction wait no more: it has passed, and its usage is here."""
        self._covered.begin(fact, CorrectionFact(fact.counted_seq, fact.correction))
        counted = self._counted.get(fact.counted_seq)
        if counted is None:
            self._begun.append(fact.counted_seq)
        else:
            self._counted[fact.counted_seq] = counted._replace(waits=False)

    def _park(self, fact: CorrectionFact, cause: QuarantineCause) -> None:
        """Have a correction that counted, of which nothing was covered, wait in quarantine."""
        self._covered.forget(fact)
        # One that came with this very batch is not stored yet.
        if self._counted.pop(fact.counted_seq, None) is None:
            self._parked.append(fact.counted_seq)
        record = self._waiting_records[fact.counted_seq]
        self._accounts.quarantine(RejectedRecord(record, cause, fact.correction, counts=False))

    # A correction comes.

    def correct(self, order: CorrectionOrder) -> None:
        """Let a correction count from now on, as far as it can; the rest of it waits."""
        correction = order.correction
        if order.cause is not None:
            self._refuse(order, order.cause)
            return
        known = self._covered.known_of(correction.hub, correction.allocation_id)
        contradiction = contradiction_of(known, correction)
        if contradiction is None or not contradiction.is_whole:
            is_known = any(is_same(fact.correction, correction) for fact in known)
            cause = self._count(order, contradiction, known=is_known)
            if cause is not None:
                self._refuse(order, cause)
                return
            if order.record is not None:
                self._accounts.undo_count(order.record)
        if contradiction is not None:
            self._refuse(order, _contradiction_cause(contradiction))

    def _count(
        self, order: CorrectionOrder, contradiction: Contradiction | None, *, known: bool
    ) -> QuarantineCause | None:
        """Let a correction count, unless it does already; or return why it cannot yet."""
        correction, record = order.correction, order.record
        # Two operators have approved their own; one who replays a record approves it.
        needs_leave = record is not None and record.replayed_ms is None
        covered_gpu_ns = self._covered.covered_gpu_ns(correction)
        fact = CorrectionFact(self._next_seq, correction, needs_leave and covered_gpu_ns == 0)
        self._next_seq += 1
        if known:
            if record is None:
                self._counted[fact.counted_seq] = CountedCorrection(order, waits=False)
            return None
        if needs_leave:
            horizon_ms = self._accounts.horizon_ms(correction.hub)
            detail = approval_needed(correction, covered_gpu_ns, horizon_ms)
            if detail is not None:
                return QuarantineCause("needs-approval", detail)
        if fact.waits and contradiction is not None:
            # Its record would be in quarantine for its part, and could come there once more.
            return _contradiction_cause(contradiction)
        shifts = self._covered.shifts_of(fact)
        taken = self._covered.taken_by(shifts)
        if taken is not None:
            return _taken_cause(taken)
        for shift in shifts:
            key, _, start_ms, end_ms, claim, _, after = shift
            cause = self._missing_for(key, claim, after, start_ms, end_ms)
            if cause is not None:
                return cause
        self._covered.correct(fact, shifts)
        for shift in shifts:
            self._move(shift, () if record is None else record.trace)
        self._counted[fact.counted_seq] = CountedCorrection(order, fact.waits)
        if record is not None:
            self._waiting_records[fact.counted_seq] = record
        if correction.release or correction.action == "replace":
            # What waits in conflict with this time may be in conflict no more.
            self._released.append(FreedTime(correction.hub, correction.start_ms, correction.end_ms))
        return None

    def _refuse(self, order: CorrectionOrder, cause: QuarantineCause) -> None:
        """Have a correction wait: a hub's record in quarantine, an operator's where it is kept."""
        if order.record is None:
            self._waiting[order.correction_id] = cause
            return
        missing_tenant = _missing_tenant(order.correction, cause)
        self._accounts.quarantine(
            RejectedRecord(order.record, cause, order.correction, False, missing_tenant)
        )

    def _move(self, shift: Shift, trace: RecordHeaders) -> None:
        """Move covered time from what it came to before, to what it comes to now."""
        key, _, start_ms, end_ms, claim, before, after = shift
        held = self._account(key, claim, FreshPart(start_ms, end_ms, before), -1, None, trace)
        if _holder(claim, before) != _holder(claim, after):
            held = None
        self._account(key, claim, FreshPart(start_ms, end_ms, after), 1, held, trace)

    # Both.

    def _account(
        self,
        key: DeviceKey,
        claim: Claim,
        part: FreshPart,
        sign: Literal[1, -1],
        hold_id: HoldId | None,
        trace: RecordHeaders,
    ) -> HoldId | None:
        """Add a part to the buckets of what it comes to, or take it out; return their hold."""
        held: HoldId | None = None
        terms = part.effect.terms
        for hour_ms, gpu_ns in by_hour({part[:2]: claim.share_ppm}).items():
            hour = self._rated(key, claim, part.effect, hour_ms)
            if terms is None:
                self._accounts.void(hour, sign * gpu_ns, hold_id, trace)
            elif terms.tenant_id == claim.tenant_id:
                reported = self._rated(key, claim, Effect(terms_of(claim)), hour_ms)
                own = hold_id or self._accounts.hold_of(reported)
                self._accounts.bill(hour, sign * gpu_ns, own, trace)
            else:
                # A hold is its tenant's: nobody else's usage is drawn from it.
                self._accounts.bill(hour, sign * gpu_ns, None, trace)
            held = held or self._accounts.hold_of(hour)
        return held

    def _rated(self, key: DeviceKey, claim: Claim, effect: Effect, hour_ms: int) -> RatedHour:
        rated = self._accounts.rate(_bucket_terms(key, claim, effect), hour_ms)
        if isinstance(rated, QuarantineCause):
            # Judged before anything was changed; and what has rated an hour once always does.
            raise LookupError(f"covered time has no price: {rated.detail}")  # noqa: TRY004
        return rated

    def _missing_for(
        self, key: DeviceKey, claim: Claim, effect: Effect, start_ms: int, end_ms: int
    ) -> QuarantineCause | None:
        """Return the fact that is missing to rate time with this effect, or None."""
        terms = _bucket_terms(key, claim, effect)
        for hour_ms in hours_of(start_ms, end_ms):
            rated = self._accounts.rate(terms, hour_ms)
            if isinstance(rated, QuarantineCause):
                return rated
        return None


def _bucket_terms(key: DeviceKey, claim: Claim, effect: Effect) -> BucketTerms:
    """Return what names the buckets of time: voided time stays with the terms as reported."""
    terms = effect.terms or terms_of(claim)
    return BucketTerms(
        hub=key[0],
        node_id=key[1],
        tenant_id=terms.tenant_id,
        project_id=terms.project_id,
        allocation_id=claim.allocation_id,
        sku=terms.sku,
        price_class=terms.price_class,
    )


def _holder(claim: Claim, effect: Effect) -> TenantId:
    """Return whose buckets time is in: voided time stays with the tenant as reported."""
    return (effect.terms or terms_of(claim)).tenant_id


def _device_key(interval: Interval, device: Device) -> DeviceKey:
    return interval.hub, interval.node_id, device.device_uuid


def _named_gpu_ns(correction: Correction, node_id: NodeId, device: Device, part: FreshPart) -> int:
    """Return how much of a fresh part a correction names."""
    if not concerns(correction, node_id, device.slice_uuid):
        return 0
    start_ms = max(part.start_ms, correction.start_ms)
    end_ms = min(part.end_ms, correction.end_ms)
    return max(0, end_ms - start_ms) * device.share_ppm


def _missing_tenant(correction: Correction, cause: QuarantineCause) -> TenantId | None:
    """Return whom a correction waits for, if it does."""
    if cause.reason != "unknown-tenant" or correction.replacement is None:
        return None
    return correction.replacement.tenant_id


def _contradiction_cause(contradiction: Contradiction) -> QuarantineCause:
    start_ms, end_ms, _ = contradiction.piece
    where = contradiction.slice_uuid or "slices of the allocation"
    return QuarantineCause(
        "conflict",
        f"another correction of the same revision stands on {where} in "
        f"[{instant_text(start_ms)}, {instant_text(end_ms)}): send one of a higher revision",
    )


def _taken_cause(taken: TakenTime) -> QuarantineCause:
    shift, conflict = taken
    claim = conflict.claim
    return QuarantineCause(
        "conflict",
        f"{shift.slice_uuid} [{instant_text(conflict.start_ms)}, {instant_text(conflict.end_ms)}) "
        f"was released, and is covered by {claim.allocation_id} of {claim.tenant_id} by now",
    )
