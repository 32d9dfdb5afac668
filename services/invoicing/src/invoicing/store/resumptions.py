"""SQL of parked closings: what of them failed, and how they go on, on the record.

It runs in the snapshot that the resumption was decided on. Where the closing job stores a bill at
the same moment and commits first, the two are in conflict, and the command is run again on what is
there then. Where the command commits first, what the job stores of a bill that was set aside is
dropped, and one that failed for what it lacked before is tried again by itself.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from hisab_contracts.ids import HubCode
from invoicing.core.periods import PeriodBlocker, RecordedClosing
from invoicing.core.resumptions import ParkedClosing, Resumption
from invoicing.core.tax import TaxRow
from invoicing.store import periods, tax_rates

if TYPE_CHECKING:
    import asyncpg

    from runtime.database import Connection

SHOWN: Final = 20
"""So many resumptions of a month are shown, the newest."""


@dataclass(frozen=True, slots=True)
class RecordedResumption:
    """A resumption on the record, and when."""

    resumption: Resumption
    recorded_at: dt.datetime


_PENDING_HUBS = """
select distinct m.hub
  from bills b
  join month_usage m on m.period = b.period and m.tenant_id = b.tenant_id
                    and m.first_seq <= b.last_seq
 where b.period = $1 and b.state = 'pending'
 order by m.hub
"""


# A resumption that took nothing up has no version.
_TAKEN_UP_VERSIONS = """
select tax_version from closing_resumptions
 where period = $1 and tax_version is not null
 order by tax_version
"""


async def parked_closing(connection: Connection, recorded: RecordedClosing) -> ParkedClosing:
    """Read what of a closing has failed, and what its pending bills could take up."""
    period = recorded.closing.period
    return ParkedClosing(
        recorded=recorded,
        failed=await periods.outstanding_bills(connection, period, failed_only=True),
        failed_count=await periods.count_failed_bills(connection, period),
        pending_hubs=tuple(
            HubCode(row["hub"]) for row in await connection.fetch(_PENDING_HUBS, period)
        ),
        tax_rows=tuple(await tax_rates.tax_rows(connection)),
        taken_up_versions=tuple(
            row["tax_version"] for row in await connection.fetch(_TAKEN_UP_VERSIONS, period)
        ),
    )


# `do nothing` never does: of two at once the second is refused its snapshot, and is run again.
_RECORD = """
insert into closing_resumptions (period, resumption, override_reason, tax_version, taken_up, failed,
                                 failed_count, actor)
select $1::text, coalesce(max(resumption), 0) + 1, $2::text, $3::bigint, $4::jsonb, $5::jsonb,
       $6::bigint, $7::text
  from closing_resumptions
 where period = $1
on conflict (period, resumption) do nothing
"""
# What lacked a row that is there now is computed, not set aside. Whatever is pending takes the rows
# up: a bill that has not failed yet may lack the same one.
_SET_ASIDE = """
update bills set state = 'set_aside'
 where period = $1 and state = 'pending' and reason is not null
   and not (reason_kind = 'tax-missing' and reason_hub = any($2::text[]))
"""
_TAKE_UP = """
update bills set taken_up_tax_version = coalesce($2, taken_up_tax_version),
                 retry_at = clock_timestamp()
 where period = $1 and state = 'pending'
"""
_TRY_STEPS_AGAIN = """
update invoice_steps s set waived = s.waived or $2, retry_at = clock_timestamp()
  from invoices i
 where i.period = $1 and s.invoice_id = i.invoice_id and s.done_at is null and s.reason is not null
"""


async def record_resumption(connection: Connection, resumption: Resumption) -> None:
    """Put a resumption on the record, and carry it out on the month's bills and steps."""
    period, overrides = resumption.period, resumption.override_reason is not None
    await connection.execute(
        _RECORD,
        period,
        resumption.override_reason,
        resumption.tax_version,
        msgspec.json.encode(resumption.taken_up).decode(),
        msgspec.json.encode(resumption.failed).decode(),
        resumption.failed_count,
        resumption.actor,
    )
    if overrides:
        await connection.execute(_SET_ASIDE, period, [row.hub for row in resumption.taken_up])
    await connection.execute(_TAKE_UP, period, resumption.tax_version)
    await connection.execute(_TRY_STEPS_AGAIN, period, overrides)


def _resumption_from_row(row: asyncpg.Record) -> RecordedResumption:
    resumption = Resumption(
        period=row["period"],
        override_reason=row["override_reason"],
        tax_version=row["tax_version"],
        taken_up=msgspec.json.decode(row["taken_up"], type=tuple[TaxRow, ...]),
        failed=msgspec.json.decode(row["failed"], type=tuple[PeriodBlocker, ...]),
        failed_count=row["failed_count"],
        actor=row["actor"],
    )
    return RecordedResumption(resumption, row["recorded_at"])


_RESUMPTIONS = """
select period, override_reason, tax_version, taken_up, failed, failed_count, actor, recorded_at
  from closing_resumptions
 where period = $1
 order by resumption desc
 limit $2
"""


async def resumptions(connection: Connection, period: str) -> list[RecordedResumption]:
    """Return how a month's closing went on, the newest first; at most `SHOWN`."""
    return [
        _resumption_from_row(row) for row in await connection.fetch(_RESUMPTIONS, period, SHOWN)
    ]
