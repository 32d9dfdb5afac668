"""What several resources read from a request: the hub that is meant, whole hours, reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from hisab_contracts.events import EARLIEST_MS, LATEST_MS
from hisab_contracts.ids import HubCode
from hisab_contracts.reference import Role
from hisab_contracts.units import hour_floor_ms, instant_ms, is_whole_hour
from metering.store import hubs
from runtime.auth import Principal
from runtime.http import Problem

if TYPE_CHECKING:
    from runtime.database import Connection

FIRST_HOUR_MS: Final = hour_floor_ms(EARLIEST_MS)
LAST_HOUR_MS: Final = LATEST_MS
"""All usage lies between the two: what a window is that names no end of its own."""

Reason = Annotated[str, msgspec.Meta(min_length=1, max_length=1_000)]
"""Why an operator does something, for the record."""


def require_own_hub(principal: Principal, hub: str) -> None:
    """Refuse a hub's key that asks for another hub; raises `Problem` 403."""
    if principal.role == Role.HUB and principal.bound_to != hub:
        raise Problem("forbidden", "a hub's key is for its own hub")


async def find_hub(connection: Connection, hub: str) -> HubCode:
    """Return the code of a hub; raises `Problem` 404 when nobody registered it."""
    if not await hubs.is_hub(connection, HubCode(hub)):
        raise Problem("not-found", f"no hub {hub} is registered")
    return HubCode(hub)


def read_whole_hour(name: str, text: str) -> int:
    """Read an instant that must lie on a UTC hour; raises `Problem` 422."""
    try:
        found_ms = instant_ms(text)
    except ValueError as error:
        raise Problem("malformed", f"{name}: {error}") from error
    if not is_whole_hour(found_ms) or not FIRST_HOUR_MS <= found_ms <= LAST_HOUR_MS:
        raise Problem("malformed", f"{name} must be a whole UTC hour from 2020 to 2100")
    return found_ms
