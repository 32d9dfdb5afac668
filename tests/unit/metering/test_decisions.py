"""What operators decided on a record adds up, in whatever order and however often it is read."""

from __future__ import annotations

from itertools import permutations

import pytest

from hisab_contracts.ids import HubCode
from hisab_contracts.quarantine import decision_key
from metering.core.decisions import (
    RecordName,
    added_up,
    cause_of_dismissal,
    dismissed,
    name_of,
    replay_that_counts,
    replayed,
)

RECORD = RecordName(HubCode("lhr"), "hub.lhr.usage.v1", 3, 812, "0" * 64)
FIRST = replayed(None, RECORD, 1_000, "replayed by key:a")
SECOND = replayed(FIRST, RECORD, 2_000, "replayed by key:b")
LAST = dismissed(SECOND, RECORD, 3_000, "dismissed by key:c", whole_reason=None)


def test_a_decision_names_its_record() -> None:
    """By its place and its value, in the message and in its key."""
    assert RECORD == name_of(FIRST) == name_of(LAST)
    name = f"hub.lhr.usage.v1/3/812/{'0' * 64}"
    assert f"lhr/quarantine/{name}".encode() == decision_key(LAST)


def test_the_last_message_says_all_that_was_decided() -> None:
    """A compacted topic keeps only that one."""
    assert (2_000, "replayed by key:b") == (LAST.replayed_ms, LAST.replayed_because)
    assert (3_000, "dismissed by key:c") == (LAST.dismissed_ms, LAST.dismissed_because)


@pytest.mark.parametrize("read", list(permutations((FIRST, SECOND, LAST, SECOND))))
def test_decisions_add_up_in_any_order(read: tuple[object, ...]) -> None:
    """An older message that is published again takes nothing back."""
    total = None
    for message in read:
        assert isinstance(message, type(FIRST))
        total = added_up(total, message)
    assert total == LAST


def test_the_first_dismissal_stays() -> None:
    """A second one of the same record cannot be: it was closed."""
    other = dismissed(None, RECORD, 9_000, "dismissed by key:d", whole_reason="too-late")
    assert LAST == added_up(LAST, other)


def test_a_record_dismissed_whole_goes_to_quarantine_unjudged() -> None:
    """Under its reason; one of which only parts were dismissed is judged."""
    whole = dismissed(None, RECORD, 3_000, "dismissed by key:c", whole_reason="too-late")
    cause = cause_of_dismissal(whole)
    assert cause is not None
    assert "too-late" == cause.reason
    assert "dismissed by key:c" in cause.detail
    assert cause_of_dismissal(LAST) is None


def test_a_replay_counts_unless_all_of_the_record_was_dismissed_after_it() -> None:
    """Where all of it was still there to be dismissed, the replay had billed nothing."""
    assert (2_000, "replayed by key:b") == replay_that_counts(SECOND)
    assert (2_000, "replayed by key:b") == replay_that_counts(LAST)
    whole = dismissed(SECOND, RECORD, 3_000, "dismissed by key:c", whole_reason="conflict")
    assert replay_that_counts(whole) is None
    never = dismissed(None, RECORD, 3_000, "dismissed by key:c", whole_reason=None)
    assert replay_that_counts(never) is None
