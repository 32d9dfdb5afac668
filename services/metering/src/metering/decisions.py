"""Decisions of operators on quarantined records: stated, followed, and applied again.

Theory. A command stores its decision and states it on `metering.decisions.v1` in its own
transaction (`state_replay`, `state_dismissal`). Metering follows that topic (`take_decisions`):
what it decided itself it knows already, so nothing happens; metering that was restored from a
backup takes up what it has forgotten. A decision is applied to its record if that is open in
quarantine, and whenever it arrives there again (`apply_to`, by ingest): replayed first, unless all
of it was dismissed in the end; then what is still open is dismissed.

A backup may also hold an old message in its outbox that is published after the newer one. Whoever
reads such a message knows more than it says, and states all of it again, so that the last message
of a record is never behind what was decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from hisab_contracts.quarantine import QuarantineDecision, decision_key
from hisab_contracts.topics import DECISIONS
from metering.core.batch import UsageRecord
from metering.core.decisions import (
    RecordName,
    added_up,
    decision_on,
    dismissed,
    in_any_log,
    name_of,
    replay_that_counts,
    replayed,
)
from metering.replay import replay_quarantined
from metering.store import quarantine
from metering.store.decisions import (
    known_decisions,
    record_name,
    save_decisions,
    whole_reason,
)
from metering.store.quarantine import OpenedQuarantine
from metering.store.state import ReferenceCache
from runtime.kafka import Message
from runtime.outbox import Outbox

if TYPE_CHECKING:
    from runtime.database import Connection


async def state_replay(
    connection: Connection, outbox: Outbox, quarantine_id: int, replayed_ms: int, because: str
) -> None:
    """Keep and publish that an operator had a record, locked before, judged again."""
    record = await record_name(connection, quarantine_id)
    known = (await known_decisions(connection, [record])).get(record)
    await _state(connection, outbox, [replayed(known, record, replayed_ms, because)])


async def state_dismissal(
    connection: Connection, outbox: Outbox, quarantine_id: int, dismissed_ms: int, because: str
) -> None:
    """Keep and publish that an operator dismissed a record, locked before."""
    record = await record_name(connection, quarantine_id)
    known = (await known_decisions(connection, [record])).get(record)
    reason = await whole_reason(connection, quarantine_id)
    decision = dismissed(known, record, dismissed_ms, because, whole_reason=reason)
    await _state(connection, outbox, [decision])


async def _state(
    connection: Connection, outbox: Outbox, decisions: Sequence[QuarantineDecision]
) -> None:
    await save_decisions(connection, decisions)
    await outbox.write(
        connection,
        [
            Message(DECISIONS, decision_key(decision), msgspec.json.encode(decision))
            for decision in decisions
        ],
    )


async def take_decisions(
    connection: Connection,
    outbox: Outbox,
    cache: ReferenceCache,
    heard: Iterable[QuarantineDecision],
    numbers: Mapping[RecordName, int],
) -> None:
    """Take up what was published; apply what is new to records that are open.

    `numbers` are those of the records of `heard` that are open, locked before anything else was.
    """
    newest: dict[RecordName, QuarantineDecision] = {}
    for decision in heard:
        name = name_of(decision)
        newest[name] = added_up(newest.get(name), decision)
    known = await known_decisions(connection, list(newest))
    totals = {name: added_up(known.get(name), said) for name, said in newest.items()}
    new = [total for name, total in totals.items() if total != known.get(name)]
    await save_decisions(connection, new)
    # What a message lacks of the sum, its topic lacks: state it there again.
    behind = [total for name, total in totals.items() if total != newest[name]]
    await _state(connection, outbox, behind)
    for total in new:
        number = numbers.get(name_of(total))
        if number is not None:
            await _apply(connection, outbox, cache, number, total)


async def apply_to(
    connection: Connection,
    outbox: Outbox,
    cache: ReferenceCache,
    opened: Sequence[OpenedQuarantine],
    *,
    replays: bool = True,
) -> None:
    """Apply what was decided before a restore to records that have come to quarantine again.

    `replays`: whether those decided on may be read at all.
    """
    numbers = {
        record_name_of(new.quarantined.record, new.value_sha256): new.quarantine_id
        for new in opened
    }
    known = await known_decisions(connection, {*numbers, *map(in_any_log, numbers)})
    # In order of arrival: which of two claims comes first must not hang on how rows were found.
    for name, number in numbers.items():
        decision = decision_on(name, known)
        if decision is not None:
            kept = decision if replays else replace(decision, replayed_ms=None)
            await _apply(connection, outbox, cache, number, kept)


def record_name_of(record: UsageRecord, value_sha256: str) -> RecordName:
    """Return what names a record, whose value has this hash: whoever calls may know it already."""
    return RecordName(
        record.hub, record.topic, record.partition, record.offset, value_sha256, record.topic_id
    )


async def _apply(
    connection: Connection,
    outbox: Outbox,
    cache: ReferenceCache,
    quarantine_id: int,
    decision: QuarantineDecision,
) -> None:
    """Do again what operators did: replay, then dismiss what is still open."""
    replay = replay_that_counts(decision)
    if replay is not None:
        replayed_ms, because = replay
        await replay_quarantined(
            connection, outbox, cache, [quarantine_id], because, replayed_ms=replayed_ms
        )
    if decision.dismissed_because is not None:
        state = await quarantine.lock_state(connection, quarantine_id)
        if state == "open":
            await quarantine.dismiss_quarantined(
                connection, quarantine_id, decision.dismissed_because
            )
