"""Outages: whether the outside made work fail, or the work itself.

It decides who is to blame. What an outage stopped is tried again as it is, for as long as it lasts;
what fails by itself must not be: a record that ends in a defect of ours is set apart from the
others, a request is answered as `internal`, a part of the process ends loudly.

`Outage` is the base of what the kit's own modules raise when the outside does not answer.
"""

from __future__ import annotations

from typing import Final

import asyncpg


class Outage(Exception):
    """The database, the broker or the network does not do what it is asked; try again later."""


LOST_CONNECTION: Final = (
    OSError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.InternalClientError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    TimeoutError,
)
"""What asyncpg raises, in its many ways, when a connection is gone."""

_OUTAGE_CLASSES: Final = frozenset({"08", "40", "53", "55", "57", "58"})
"""Classes of SQLSTATE: connection, conflict, resources, locks, operator, system."""

_OUTAGE_STATES: Final = frozenset({"25006", "25P03"})
"""No longer the primary; the server ended a transaction that stood idle."""


def is_outage(error: BaseException) -> bool:
    """Say whether the database, the broker or the network made work fail, not the work itself."""
    if isinstance(error, Outage):
        return True
    if isinstance(error, asyncpg.InterfaceError) and isinstance(error, ValueError):
        return False  # A value the driver cannot encode: it never will.
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        return state[:2] in _OUTAGE_CLASSES or state in _OUTAGE_STATES
    return isinstance(error, LOST_CONNECTION)
