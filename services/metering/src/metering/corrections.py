"""Corrections of operators: proposed, decided, published, followed, and made to count.

Theory. A command stores a decision and states it on `metering.decisions.v1` in its own transaction,
as decisions on quarantined records are (`metering.decisions`). An approved correction then goes the
one way in (`metering.batches.meter_approved`). Where it lacks a fact, or its time is taken, it does
not count yet, and says so; it is tried again now and then. Metering that was restored takes up what
it has forgotten from the topic: corrections are facts whose order of arrival does not matter, so
they may count before the usage that they are about is read again.

Refusals: those of `metering.core.proposals`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from hisab_contracts.events import Correction
from hisab_contracts.ids import CorrectionId
from hisab_contracts.quarantine import CorrectionDecision, decision_key
from hisab_contracts.topics import DECISIONS
from metering.batches import meter_approved
from metering.core.batch import CorrectionOrder
from metering.core.corrections import next_revision, proposal_id
from metering.core.proposals import (
    ProposalRefusal,
    ProposedCorrection,
    approve,
    decision_of,
    proposal_of,
    reject,
)
from metering.store import corrections, proposals, state
from metering.store.state import ReferenceCache
from runtime.database import checked_now_ms
from runtime.kafka import Message
from runtime.outbox import Outbox

if TYPE_CHECKING:
    from runtime.database import Connection


async def propose_correction(
    connection: Connection, correction: Correction, proposed_by: str
) -> ProposedCorrection:
    """Keep a correction that an operator proposes; nothing is changed by it."""
    proposed_ms = await checked_now_ms(connection)
    name = proposal_id(correction, proposed_by, proposed_ms)
    proposed = ProposedCorrection(name, correction, proposed_by, proposed_ms)
    await proposals.save_proposal(connection, proposed)
    return proposed


async def approve_correction(
    connection: Connection,
    outbox: Outbox,
    cache: ReferenceCache,
    correction_id: CorrectionId,
    approved_by: str,
) -> ProposedCorrection | ProposalRefusal:
    """Approve a correction at the next revision of its allocation, and have it count."""
    proposed = await _locked(connection, correction_id)
    said = proposed.correction
    reference = await state.load_reference(connection, cache)
    # Nobody else gives or takes a revision of this hub's corrections from here on.
    await corrections.lock_hubs(connection, (), {said.hub})
    known = await proposals.approved_of(connection, (said.hub, said.allocation_id))
    revision = next_revision(known, said.node_id)
    approved_ms = await checked_now_ms(connection)
    approved = approve(proposed, approved_by, approved_ms, revision)
    if not isinstance(approved, ProposedCorrection):
        return approved
    await _state(connection, outbox, approved)
    order = CorrectionOrder(approved.correction_id, approved.correction, None)
    await meter_approved(connection, outbox, cache, reference, [order])
    return approved


async def reject_correction(
    connection: Connection, outbox: Outbox, correction_id: CorrectionId, rejected_by: str
) -> ProposedCorrection | ProposalRefusal:
    """Reject a correction: it never counts."""
    proposed = await _locked(connection, correction_id)
    rejected = reject(proposed, rejected_by, await checked_now_ms(connection))
    if isinstance(rejected, ProposedCorrection):
        await _state(connection, outbox, rejected)
    return rejected


async def count_waiting(
    connection: Connection, outbox: Outbox, cache: ReferenceCache, correction_id: CorrectionId
) -> None:
    """Try again to have an approved correction count."""
    waiting = await proposals.lock_not_counting(connection, correction_id)
    if waiting is not None:
        reference = await state.load_reference(connection, cache)
        order = CorrectionOrder(correction_id, waiting.correction, None)
        await meter_approved(connection, outbox, cache, reference, [order])


async def take_decided(
    connection: Connection,
    outbox: Outbox,
    cache: ReferenceCache,
    heard: Iterable[CorrectionDecision],
) -> None:
    """Take up what was published and is not known to be decided: after a restore, or never."""
    decided = {said.correction_id: said for said in heard}
    for name in await proposals.decided_already(connection, decided):
        del decided[name]
    for said in decided.values():
        await proposals.save_proposal(connection, proposal_of(said))
    for name, said in decided.items():
        if said.state == "approved":
            await count_waiting(connection, outbox, cache, name)


async def _locked(connection: Connection, correction_id: CorrectionId) -> ProposedCorrection:
    proposed = await proposals.lock_proposal(connection, correction_id)
    if proposed is None:
        raise LookupError(f"there is no proposed correction {correction_id}")
    return proposed


async def _state(connection: Connection, outbox: Outbox, decided: ProposedCorrection) -> None:
    """Keep and publish what was decided."""
    await proposals.save_proposal(connection, decided)
    decision = decision_of(decided)
    message = Message(DECISIONS, decision_key(decision), msgspec.json.encode(decision))
    await outbox.write(connection, [message])
