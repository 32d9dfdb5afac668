"""SQL of the tax table: dated rows, numbered as they are recorded, read as a whole or by page.

The whole table is small (a row per hub and change of the law), and a bill is computed from it; a
closing pins its version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from invoicing.core.tax import TaxRow

if TYPE_CHECKING:
    import asyncpg

    from runtime.database import Connection

_TAX_COLUMNS = "tax_version, hub, authority, tax_bps, valid_from, citation"

# The versions of the tax table that a bill `b` has taken up: its own, and those of the resumptions
# before.
TAKEN_UP_VERSIONS: Final = """
       array(select r.tax_version from closing_resumptions r
              where r.period = b.period and r.tax_version <= b.taken_up_tax_version
              order by r.tax_version) as taken_up_versions
"""


def _tax_row_from_row(row: asyncpg.Record) -> TaxRow:
    return TaxRow(
        tax_version=row["tax_version"],
        hub=row["hub"],
        authority=row["authority"],
        tax_bps=row["tax_bps"],
        valid_from=row["valid_from"],
        citation=row["citation"],
    )


_TAX_ROWS = "select " + _TAX_COLUMNS + " from tax_rates order by tax_version"


async def tax_rows(connection: Connection) -> list[TaxRow]:
    """Return the whole tax table, in the order it was recorded."""
    return [_tax_row_from_row(row) for row in await connection.fetch(_TAX_ROWS)]


_ADD_TAX_ROW = (
    "insert into tax_rates (" + _TAX_COLUMNS + ", actor) values ($1, $2, $3, $4, $5, $6, $7)"
)


async def add_tax_row(connection: Connection, row: TaxRow, *, actor: str) -> None:
    """Record a tax row under the next number (the caller holds the register)."""
    await connection.execute(
        _ADD_TAX_ROW,
        row.tax_version,
        row.hub,
        row.authority,
        row.tax_bps,
        row.valid_from,
        row.citation,
        actor,
    )


_TAX_ROWS_AFTER = (
    "select "
    + _TAX_COLUMNS
    + " from tax_rates where tax_version > $1 order by tax_version limit $2"
)


async def tax_rows_after(connection: Connection, tax_version: int, limit: int) -> list[TaxRow]:
    """Return the next tax rows after a number, for a page of the list."""
    rows = await connection.fetch(_TAX_ROWS_AFTER, tax_version, limit)
    return [_tax_row_from_row(row) for row in rows]
