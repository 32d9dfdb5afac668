"""Quarantine: the states of a record in it, causes that no event gives, and a refusal.

Theory. A record is *open* while something of it is in quarantine. It is then *released* (all of it
was taken after all) or *dismissed* (an operator left it there for good), and both are final: only
an open record is judged again or dismissed. Why a record is there is a `QuarantineCause`. What is
wrong with an event is said by its reader and by `engine`; the causes below are about the bytes of
a record, or about us.

Refusals: `QuarantineClosed` for a command on a record that is no longer open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from hisab_contracts.events import QuarantineReason

QuarantineState = Literal["open", "released", "dismissed"]
"""Where a quarantined record stands; it leaves `open` once."""


class QuarantineCause(NamedTuple):
    """Why a record is in quarantine: the reason, and a sentence about this record."""

    reason: QuarantineReason
    detail: str


@dataclass(frozen=True, slots=True)
class QuarantineClosed:
    """The record was released or dismissed before."""

    quarantine_id: int
    state: QuarantineState


UNREAD_RECORD: Final = QuarantineCause(
    "killed-process",
    "reading or metering this record ended the process: it was set aside unread",
)
"""Of a record during which a process died again and again."""

ESCAPED_HEADER: Final = QuarantineCause(
    "undecodable", "a header's name is not UTF-8; it is shown escaped"
)
"""Of a record whose headers could not be read as they are."""


def undecodable_batch(because: str) -> QuarantineCause:
    """Return the cause of what stands for records that cannot be taken out of their batch.

    `because` says which records, and why.
    """
    return QuarantineCause("undecodable", because)


def failed_release(error: str) -> QuarantineCause:
    """Return the cause of a record that we fail to judge again: an operator must look at it.

    `error` says what failed, in the words of whoever raised it.
    """
    # No process was killed. The list of reasons is fixed by the interface, and this is the only one
    # that speaks of a defect of ours and that no tenant and no price releases: under any other the
    # release would be tried, and would fail, for ever.
    return QuarantineCause("killed-process", f"judging it again failed: {error}")


def refuse_closed(quarantine_id: int, state: QuarantineState) -> QuarantineClosed | None:
    """Refuse to judge a record again, or to dismiss it, unless it is open."""
    return None if state == "open" else QuarantineClosed(quarantine_id, state)
