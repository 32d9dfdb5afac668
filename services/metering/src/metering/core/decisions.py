"""What operators decided on quarantined records, and how it is added up.

Theory. Replay and dismissal are decisions of people: no record of a hub says them again, so a
metering that was restored from a backup would forget them. Each is stated on a compacted topic, as
*all* that was decided on its record (`QuarantineDecision`). Adding up is monotone: a later replay
counts, the first dismissal stays. So it does not matter how often or in which order messages are
read, and whoever finds that a message lacks something it knows states the sum again.

When a record arrives in quarantine again, it is replayed first, if a replay of it counts, and what
is then still open is dismissed, if it was: what a replay billed before a restore is billed after
it, too. A record that was dismissed whole is not judged at all, neither as it is read
(`cause_of_dismissal`) nor by a replay (`replay_that_counts`): it may have lacked a price then and
have one now, or have been late and be in time, because a restored hub's watermark has yet to catch
up.

Refuses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from msgspec.structs import replace

from hisab_contracts.ids import UNKNOWN_TOPIC, HubCode, TopicId
from hisab_contracts.quarantine import QuarantineDecision
from metering.core.quarantine import QuarantineCause


class RecordName(NamedTuple):
    """Names a record of a hub for ever: where it lies, its value's SHA-256, and in which log."""

    hub: HubCode
    topic: str
    partition: int
    offset: int
    value_sha256: str
    topic_id: TopicId
    """Empty: not known, as for records that came before logs were noted."""


def name_of(decision: QuarantineDecision) -> RecordName:
    """Return the record that a decision is about."""
    return RecordName(
        decision.hub,
        decision.topic,
        decision.partition,
        decision.offset,
        decision.value_sha256,
        decision.topic_id or UNKNOWN_TOPIC,
    )


def in_any_log(record: RecordName) -> RecordName:
    """Return the name a record would have if its log were not known."""
    return record._replace(topic_id=UNKNOWN_TOPIC)


def decision_on(
    record: RecordName, known: Mapping[RecordName, QuarantineDecision]
) -> QuarantineDecision | None:
    """Return all that was decided on a record, also before its log was noted.

    Decisions on the same bytes in another log are none on this record: its topic was made anew.
    """
    before, decided = known.get(in_any_log(record)), known.get(record)
    return before if decided is None else added_up(before, decided)


def replayed(
    known: QuarantineDecision | None, record: RecordName, replayed_ms: int, because: str
) -> QuarantineDecision:
    """Add a replay to what was decided on a record."""
    return replace(known or _undecided(record), replayed_ms=replayed_ms, replayed_because=because)


def dismissed(
    known: QuarantineDecision | None,
    record: RecordName,
    dismissed_ms: int,
    because: str,
    *,
    whole_reason: str | None,
) -> QuarantineDecision:
    """Add a dismissal to what was decided on a record.

    `whole_reason` is why all of it was in quarantine; None when only parts of it were.
    """
    return replace(
        known or _undecided(record),
        dismissed_ms=dismissed_ms,
        dismissed_because=because,
        dismissed_reason=whole_reason,
    )


def added_up(known: QuarantineDecision | None, heard: QuarantineDecision) -> QuarantineDecision:
    """Return all that was decided on one record: what is known of it, and what a message says."""
    if known is None:
        return heard
    total = known
    if heard.replayed_ms is not None and heard.replayed_ms > (known.replayed_ms or 0):
        total = replace(
            total, replayed_ms=heard.replayed_ms, replayed_because=heard.replayed_because
        )
    if known.dismissed_ms is None and heard.dismissed_ms is not None:
        total = replace(
            total,
            dismissed_ms=heard.dismissed_ms,
            dismissed_because=heard.dismissed_because,
            dismissed_reason=heard.dismissed_reason,
        )
    return total


def cause_of_dismissal(decision: QuarantineDecision) -> QuarantineCause | None:
    """Return why a record goes to quarantine unjudged: all of it was there, and dismissed."""
    if decision.dismissed_reason is None:
        return None
    return QuarantineCause(
        decision.dismissed_reason, f"as it was before a restore: {decision.dismissed_because}"
    )


def replay_that_counts(decision: QuarantineDecision) -> tuple[int, str] | None:
    """Return when and why a record must be judged again, where that billed anything.

    All of it was still there when it was dismissed whole: its replay was in vain.
    """
    if decision.dismissed_reason is not None:
        return None
    if decision.replayed_ms is None or decision.replayed_because is None:
        return None
    return decision.replayed_ms, decision.replayed_because


def _undecided(record: RecordName) -> QuarantineDecision:
    return QuarantineDecision(
        hub=record.hub,
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        value_sha256=record.value_sha256,
        replayed_ms=None,
        replayed_because=None,
        dismissed_ms=None,
        dismissed_because=None,
        dismissed_reason=None,
        topic_id=record.topic_id or None,
    )
