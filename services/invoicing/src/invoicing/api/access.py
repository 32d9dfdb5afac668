"""Who may ask what of bills, and which month a path names.

Money roles read everything here; a tenant reads its own invoices. Who may write is said at each
endpoint.
"""

from __future__ import annotations

from typing import Final

from hisab_contracts.events import EARLIEST_MS, LATEST_MS
from hisab_contracts.reference import Role
from hisab_contracts.units import month_bounds_ms
from runtime.http import Problem

MONEY_ROLES: Final = (Role.FINANCE, Role.AUDITOR, Role.OPERATOR)
"""They see every tenant's bills, months, tax rows and sellers."""

INVOICE_READERS: Final = (Role.TENANT, *MONEY_ROLES)
"""A tenant's key is among them: row-level security shows it its own invoices only."""


def require_month(month: str) -> None:
    """Raise `Problem` 422 unless a billing month is written `yyyy-mm` and usage can lie in it.

    Not 404: every such month exists, also one without charges; this is the name of none. Beyond
    them dates end: the first day after 9999-11 cannot be written.
    """
    try:
        from_ms, until_ms = month_bounds_ms(month)
    except ValueError as error:
        raise Problem("malformed", str(error)) from error
    if until_ms <= EARLIEST_MS or from_ms >= LATEST_MS:
        raise Problem("malformed", f"{month}: billing months lie between 2020 and 2100")
