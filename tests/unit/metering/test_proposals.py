"""Proposed corrections: two people, one decision."""

from __future__ import annotations

import msgspec
import pytest

from hisab_contracts.events import Correction
from hisab_contracts.quarantine import decision_key
from metering.core.corrections import proposal_id
from metering.core.proposals import (
    CorrectionDecided,
    OwnCorrection,
    ProposedCorrection,
    approve,
    decision_of,
    proposal_of,
    reject,
)
from unit.metering.hub_events import correction

SAID = msgspec.convert(correction(approved_by=None), Correction)
PROPOSED = ProposedCorrection(proposal_id(SAID, "key:1", 1), SAID, "key:1", 1)


def decided(revision: int = 7) -> ProposedCorrection:
    """Approved by another."""
    found = approve(PROPOSED, "key:2", 5, revision)
    assert isinstance(found, ProposedCorrection)
    return found


def test_an_approval_gives_a_correction_its_revision() -> None:
    """And says by whom."""
    found = decided()
    assert ("approved", "key:2", 5) == (found.state, found.decided_by, found.decided_ms)
    assert (7, "key:2") == (found.correction.revision, found.correction.approved_by)


def test_who_proposes_a_correction_cannot_approve_it() -> None:
    """Not even once it was approved by another: that is the first thing to know."""
    assert OwnCorrection(PROPOSED.correction_id) == approve(PROPOSED, "key:1", 5, 1)
    assert OwnCorrection(PROPOSED.correction_id) == approve(decided(), "key:1", 5, 1)


def test_who_proposes_a_correction_may_take_it_back() -> None:
    """It is rejected then, as by anybody else."""
    found = reject(PROPOSED, "key:1", 5)
    assert isinstance(found, ProposedCorrection)
    assert ("rejected", "key:1", 5) == (found.state, found.decided_by, found.decided_ms)


def test_a_correction_is_decided_once() -> None:
    """Approved or rejected, it stays so."""
    refused = CorrectionDecided(PROPOSED.correction_id, "approved")
    assert refused == approve(decided(), "key:3", 6, 8)
    assert refused == reject(decided(), "key:3", 6)


def test_what_is_published_of_a_decision_says_all_of_it() -> None:
    """So that a restored metering has it again as it was."""
    assert decided() == proposal_of(decision_of(decided()))


def test_a_decision_is_found_by_hub_kind_and_id() -> None:
    """The last message of a key is all that is kept of it."""
    expected = f"lhr/correction/{PROPOSED.correction_id}".encode()
    assert expected == decision_key(decision_of(decided()))


def test_nothing_is_published_of_what_is_not_decided() -> None:
    """That would be a defect of ours."""
    with pytest.raises(LookupError):
        decision_of(PROPOSED)
