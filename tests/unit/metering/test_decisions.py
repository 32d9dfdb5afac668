"""What operators decided on a record adds up, in whatever order and however often it is read."""

from __future__ import annotations

from itertools import permutations

import pytest

from hisab_contracts.ids import HubCode, TopicId
from hisab_contracts.quarantine import decision_key
from metering.core.decisions import (
    RecordName,
    added_up,
    cause_of_dismissal,
    decision_on,
    dismissed,
    in_any_log,
    name_of,
    replay_that_counts,
    replayed,
)

RECORD = RecordName(
    HubCode("lhr"), "hub.lhr.usage.v1", 3, 812, "0" * 64, TopicId("4mFkQvSyTt2Uj8zSgzPsJw")
)
FIRST = replayed(None, RECORD, 1_000, "replayed by key:a")
SECOND = replayed(FIRST, RECORD, 2_000, "replayed by key:b")
LAST = dismissed(SECOND, RECORD, 3_000, "dismissed by key:c", whole_reason=None)


def test_a_decision_names_its_record() -> None:
    """By its place, its value and its log, in the message and in its key."""
    assert RECORD == name_of(FIRST) == name_of(LAST)
    name = f"lhr/quarantine/hub.lhr.usage.v1/3/812/{'0' * 64}"
    assert f"{name}/4mFkQvSyTt2Uj8zSgzPsJw".encode() == decision_key(LAST)
    before = replayed(None, in_any_log(RECORD), 1_000, "replayed by key:a")
    assert in_any_log(RECORD) == name_of(before)
    assert name.encode() == decision_key(before)


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


def test_a_decision_does_not_count_for_the_same_bytes_in_a_topic_made_anew() -> None:
    """Only for its own log; one whose log is not known counts for any, and both add up."""
    whole = dismissed(None, RECORD, 3_000, "dismissed by key:c", whole_reason="too-late")
    anew = RECORD._replace(topic_id=TopicId("another-log"))
    assert whole == decision_on(RECORD, {RECORD: whole})
    assert decision_on(anew, {RECORD: whole}) is None
    before = replayed(None, in_any_log(RECORD), 1_000, "replayed by key:a")
    known = {in_any_log(RECORD): before, RECORD: whole}
    assert before == decision_on(anew, known)
    both = decision_on(RECORD, known)
    assert both is not None
    assert (1_000, 3_000, "too-late") == (
        both.replayed_ms,
        both.dismissed_ms,
        both.dismissed_reason,
    )
