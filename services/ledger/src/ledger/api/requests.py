"""What requests are made of: the form of their members, and what those mean.

Amounts and `seq` are JSON strings, instants RFC 3339 UTC with milliseconds. Request models are
strict: unknown members are refused, integers are never taken from strings or floats.

Refusals (`Problem`, 422 `malformed`): an amount out of its bounds, a text that is no instant.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

from fastapi import Request
from msgspec import Meta

from hisab_contracts.events import EARLIEST_MS, LATEST_MS
from hisab_contracts.reference import Role
from hisab_contracts.units import MAX_MICRO, instant_ms
from runtime.http import Problem

T = TypeVar("T", bound=str)

FreeText = Annotated[str, Meta(min_length=1, max_length=200)]
ReasonText = Annotated[str, Meta(min_length=1, max_length=1_000)]
"""Why a person decides something: kept with the decision."""

READERS: Final = (
    Role.OPERATOR,
    Role.AUDITOR,
    Role.FINANCE,
    Role.OFFICER,
    Role.APPROVER,
    Role.TENANT,
)
"""Who may read books; a tenant's key only its own."""
REPORT_READERS: Final = (Role.OPERATOR, Role.AUDITOR, Role.FINANCE, Role.OFFICER, Role.APPROVER)
"""Who may read what programmes gave to all of their tenants, and what came of it."""


def query_choice(request: Request, name: str, choices: tuple[T, ...]) -> T | None:
    """Read a filter that takes one of a few words; None without it, 422 for any other word."""
    text = request.query_params.get(name)
    if text is None:
        return None
    for choice in choices:
        if choice == text:
            return choice
    raise Problem("malformed", f"{name} is one of {', '.join(choices)}")


def parse_micro(text: str, name: str, *, least: int) -> int:
    """Read an amount; 422 below `least` or beyond 64 bits."""
    micro = int(text)
    if not least <= micro <= MAX_MICRO:
        raise Problem("malformed", f"{name} is a whole number from {least} to {MAX_MICRO}")
    return micro


def parse_instant(text: str, name: str) -> int:
    """Read an RFC 3339 instant in milliseconds; 422 for anything else."""
    try:
        read_ms = instant_ms(text)
    except ValueError as error:
        raise Problem("malformed", f"{name}: {error}") from error
    if not EARLIEST_MS <= read_ms < LATEST_MS:
        raise Problem("malformed", f"{name} lies between 2020 and 2100")
    return read_ms
