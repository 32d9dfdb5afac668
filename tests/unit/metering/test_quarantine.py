"""Quarantine: which commands on a record are refused, and the cause of a release that fails."""

from __future__ import annotations

import pytest

from metering.core.quarantine import (
    QuarantineClosed,
    QuarantineState,
    failed_release,
    refuse_closed,
    undecodable_batch,
)


@pytest.mark.parametrize("state", ["released", "dismissed"])
def test_only_an_open_record_is_judged_again_or_dismissed(state: QuarantineState) -> None:
    """What was released or dismissed stays so."""
    assert QuarantineClosed(7, state) == refuse_closed(7, state)
    assert refuse_closed(7, "open") is None


def test_record_that_we_fail_to_release_is_left_to_an_operator() -> None:
    """Under a reason that no tenant and no price releases, with what went wrong."""
    cause = failed_release("ValueError('boom')")
    assert ("killed-process", "judging it again failed: ValueError('boom')") == cause


def test_batch_that_cannot_be_taken_apart_is_undecodable_and_says_why() -> None:
    """Its bytes wait whole; the detail says which records they hold."""
    cause = undecodable_batch("offsets 3 to 9: too large")
    assert ("undecodable", "offsets 3 to 9: too large") == cause
