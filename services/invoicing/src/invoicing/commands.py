"""Commands of finance and operators: each runs in the caller's transaction.

A command takes the lock of the register it adds to, reads what its decision needs, has the core
decide, and saves. It returns what is on the record then, or the core's refusal: `api` turns that
into a problem. A refusal has changed nothing.

The lock comes first: of two commands at once the second decides on what the first has committed.
Closing a month takes none: all that it reads must be one snapshot, and a snapshot taken before a
wait would be stale after it. It writes what it shares with others instead (the month, the series),
so that of two at once the second is refused by the database and run again (decision 0016).

Refusals: those of `core.periods.close_period`, `core.resumptions.resume_closing`,
`core.tax.record_tax_row` and `core.sellers.register_seller`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hisab_contracts.ids import LegalEntityId
from invoicing.core.periods import (
    CloseRefused,
    CloseRequest,
    Closing,
    RecordedClosing,
    close_period,
)
from invoicing.core.resumptions import Resumption, ResumptionRefused, resume_closing
from invoicing.core.sellers import Seller, SellerRefused, register_seller
from invoicing.core.tax import TaxRow, TaxRowDiffers, record_tax_row
from invoicing.store import closings, periods, reference, resumptions, tax_rates

if TYPE_CHECKING:
    from runtime.database import Connection


async def close_month(
    connection: Connection, request: CloseRequest, partitions: int
) -> Closing | Resumption | CloseRefused | ResumptionRefused:
    """Put the closing of a month on the record, with one bill for each tenant that is billed.

    Asked for again, a closing that is parked goes on. The connection is in a transaction that reads
    one snapshot: what the decision saw is what the bills are cut at.
    """
    state = await periods.period_state(connection, request.period, partitions)
    if state.recorded is not None:
        return await _resume(connection, state.recorded, request)
    decided = close_period(state, request)
    if isinstance(decided, Closing):
        await closings.record_closing(connection, decided)
        await closings.count_closing(connection, decided)
        # In the same transaction: a closing without its bills would be done at once.
        await closings.add_bills(connection, decided.period)
    return decided


async def _resume(
    connection: Connection, recorded: RecordedClosing, request: CloseRequest
) -> Resumption | ResumptionRefused:
    decided = resume_closing(await resumptions.parked_closing(connection, recorded), request)
    if isinstance(decided, Resumption):
        await resumptions.record_resumption(connection, decided)
    return decided


async def add_tax_row(
    connection: Connection, wanted: TaxRow, *, actor: str
) -> TaxRow | TaxRowDiffers:
    """Record a tax row under the next number, or find that it is recorded already."""
    # Rows are numbered one after another, so only one transaction at a time may add one.
    await reference.lock_register(connection, "tax_rates")
    rows = await tax_rates.tax_rows(connection)
    decided = record_tax_row(rows, wanted)
    if isinstance(decided, TaxRow) and decided not in rows:
        await tax_rates.add_tax_row(connection, decided, actor=actor)
    return decided


async def add_legal_entity(
    connection: Connection, legal_entity_id: LegalEntityId, name: str, *, actor: str
) -> Seller | SellerRefused:
    """Register who sells, or find that it is registered already."""
    await reference.lock_register(connection, "legal_entities")
    decided = register_seller(await reference.sellers(connection), legal_entity_id, name)
    if isinstance(decided, Seller):
        await reference.add_seller(connection, decided, actor=actor)
    return decided
