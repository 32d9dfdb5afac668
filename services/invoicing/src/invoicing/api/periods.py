"""`/v1/periods`: how far a billing month is, the command to close it, and its reconciliation."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Final, assert_never

from fastapi import Request, Response
from msgspec import Meta, Struct

from hisab_contracts.charges import ReconcileResult
from hisab_contracts.reference import Role
from hisab_contracts.topics import ENTRIES
from hisab_contracts.units import instant_text, ms_of, optional_instant_text, optional_ms_of
from invoicing.api.access import MONEY_ROLES, require_month
from invoicing.commands import close_month
from invoicing.core.periods import (
    WAYS_OUT,
    CloseRefused,
    Closing,
    IssueDateOrder,
    IssuedTooEarly,
    NothingToBillBy,
    PeriodBlocker,
    PeriodClosed,
    PeriodIncomplete,
    RecordedClosing,
    close_request,
    describe,
    last_reconciled,
    progress_of,
)
from invoicing.core.reconciliation import (
    MonthTotals,
    WaterfallStep,
    difference_micro,
    receivable_waterfall,
    waterfall,
)
from invoicing.core.resumptions import Resumption, ResumptionRefused, TaxRowsMissing
from invoicing.store import periods, resumptions
from invoicing.store.resumptions import RecordedResumption
from runtime.database import ALL_TENANTS
from runtime.http import Model, Problem, Resource, get, json_response, post
from runtime.idempotency import Answer, read_command, run_command
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection

LAST_ISSUED_BEFORE: Final = dt.date(2100, 1, 1)
"""All usage lies before it; a slip in a year would date every later invoice of the series."""

DESCRIBED_BLOCKERS = 5
"""How many blockers a problem's detail names; its `blocked_by` lists them."""

SHOWN_BLOCKERS = 1_000
"""How many blockers an answer lists: hubs may have any number of sources that are behind."""

SHOWN_FAILED = 20
"""How much of what had failed is shown of each resumption."""


class CloseOverride(Model, frozen=True):
    """Why a month is closed although it is not complete."""

    reason: Annotated[str, Meta(min_length=1, max_length=1000)]


class CloseBody(Model, frozen=True):
    """The command to close a month; given again while it is parked, it goes on.

    `issued_on` null is the first day of the next month, or the last date of the series where that
    is later.
    """

    issued_on: dt.date | None = None
    override: CloseOverride | None = None


class BlockedBy(Struct, frozen=True):
    """What stands in the way of a month; while it is closing, what its bills still need."""

    kind: str
    hub: str | None
    source: str | None
    tenant_id: str | None
    detail: str
    way_out: str
    """What a person can do about it."""


class TakenUpTaxRow(Struct, frozen=True):
    """A tax row recorded after the close that its bills were computed by all the same."""

    tax_version: int
    hub: str
    authority: str
    tax_bps: int
    valid_from: dt.date


class ResumptionAnswer(Struct, frozen=True):
    """A parked closing was asked for again: which tax rows it took up, what it went on without."""

    recorded_at: str
    actor: str
    override: str | None
    taken_up: list[TakenUpTaxRow]
    failed_count: int
    failed: list[BlockedBy]
    """What had failed, the first of it."""


class ClosingAnswer(Struct, frozen=True):
    """The command that closes, or closed, a month."""

    requested_at: str
    issued_on: dt.date
    """The date that its invoices were given; each carries the last of its series where that is
    later."""
    override: str | None
    closed_at: str | None
    resumptions: list[ResumptionAnswer]
    """The newest first."""


class MeteringComparison(Struct, frozen=True):
    """How metering stood against the ledger when it was last compared."""

    at: str
    differences: int
    """Buckets, of any month, that were booked otherwise than metered."""


class PeriodAnswer(Struct, frozen=True):
    """A billing month: `open`, `closable` by watermark, `closing` on command, then `closed`."""

    period: str
    state: str
    blocked_by: list[BlockedBy]
    """At most a thousand; `blocked_by_count` counts all that were read."""
    blocked_by_count: int
    late_micro: str
    closing: ClosingAnswer | None
    reconcile: MeteringComparison | None
    """Null: none was heard of. It blocks nothing: what it means is an operator's to judge."""


class StepAnswer(Struct, frozen=True):
    """One step of a waterfall."""

    step: str
    micro: str


class CurrencyTotals(Struct, frozen=True):
    """What a month's invoices in one currency add up to."""

    currency: str
    invoices_count: int
    net_minor: str
    tax_minor: str
    total_minor: str
    tender_minor: str
    due_minor: str


class PeriodReconciliation(Struct, frozen=True):
    """From what the ledger charged to what invoices say, step by step; differences are 0.

    The `_minor` members beside `by_currency` are null where the month was invoiced in several
    currencies: minor units of one are not those of another.
    """

    period: str
    steps: list[StepAnswer]
    difference_micro: str
    receivable_steps: list[StepAnswer]
    receivable_difference_micro: str
    invoices_count: int
    net_minor: str | None
    tax_minor: str | None
    total_minor: str | None
    tender_minor: str | None
    due_minor: str | None
    by_currency: list[CurrencyTotals]
    number_gaps: int


class Periods(Resource):
    """`/v1/periods/{month}`: a month's state, its close, its reconciliation."""

    def __init__(self, kit: Kit) -> None:
        """Serve from this kit."""
        self._kit = kit
        # Closes of this process take turns: two at once would only have to be run again.
        self._one_at_a_time = asyncio.Lock()

    @get("/v1/periods/{month}", roles=MONEY_ROLES, answer=PeriodAnswer)
    async def period(self, request: Request, month: str) -> Response:
        """How far a billing month is, and what stands in its way."""
        await self._kit.access.authorise(request)
        require_month(month)
        partitions = await self._count_partitions()
        async with self._kit.api.transaction(tenant=ALL_TENANTS, snapshot=True) as connection:
            answer = await self._period(connection, month, partitions)
        return json_response(answer)

    @post(
        "/v1/periods/{month}/close",
        roles=(Role.FINANCE,),
        body=CloseBody,
        answer=PeriodAnswer,
        status=202,
        problems=("period-incomplete", "period-closed", "issue-date-order", "tax-missing"),
        idempotent=True,
    )
    async def close(self, request: Request, month: str) -> Response:
        """Close a month; its invoices are then computed, numbered and rendered.

        A month whose closing is parked goes on: tax rows recorded since are taken up, and with an
        override it goes on without what failed.
        """
        principal = await self._kit.access.authorise(request)
        require_month(month)
        command = await read_command(request, CloseBody)
        issued_on, override = command.body.issued_on, command.body.override
        if issued_on is not None and issued_on >= LAST_ISSUED_BEFORE:
            raise Problem("malformed", "issued_on lies before 2100")
        wanted = close_request(
            month,
            issued_on,
            None if override is None else override.reason,
            principal.actor,
        )
        if isinstance(wanted, IssuedTooEarly):
            raise Problem("malformed", "issued_on lies before the month's last day")

        partitions = await self._count_partitions()

        async def run(connection: Connection) -> Answer:
            done = await close_month(connection, wanted, partitions)
            if not isinstance(done, Closing | Resumption):
                raise _problem_of(done)
            return Answer(202, await self._period(connection, month, partitions))

        async with self._one_at_a_time:
            return await run_command(
                self._kit.api,
                command,
                run,
                scope=principal.role_scope,
                tenant=ALL_TENANTS,
                snapshot=True,
            )

    @get("/v1/periods/{month}/reconciliation", roles=MONEY_ROLES, answer=PeriodReconciliation)
    async def reconciliation(self, request: Request, month: str) -> Response:
        """From what the ledger charged for a month to what its invoices say."""
        await self._kit.access.authorise(request)
        require_month(month)
        async with self._kit.api.transaction(tenant=ALL_TENANTS, snapshot=True) as connection:
            answer = await _reconciliation(connection, month)
        return json_response(answer)

    async def _period(self, connection: Connection, month: str, partitions: int) -> PeriodAnswer:
        state = await periods.period_state(connection, month, partitions)
        progress = progress_of(state)
        closing = None
        if state.recorded is not None:
            closing = _closing(state.recorded, await resumptions.resumptions(connection, month))
        return PeriodAnswer(
            period=month,
            state=progress.status,
            blocked_by=_blocked_by(progress.blocked_by),
            blocked_by_count=len(progress.blocked_by),
            late_micro=str(await periods.late_micro(connection, month)),
            closing=closing,
            reconcile=_comparison(last_reconciled(state.watermarks)),
        )

    async def _count_partitions(self) -> int:
        """Ask the broker how many partitions must be complete; a setting would close too early."""
        return await self._kit.kafka.partition_count(ENTRIES)


def _problem_of(refusal: CloseRefused | ResumptionRefused) -> Problem:
    match refusal:
        case PeriodClosed(period):
            return Problem("period-closed", f"{period} is closed, or being closed, already")
        case IssueDateOrder(issued_on, earliest_on):
            detail = f"{issued_on} lies before {earliest_on}, a date that the series has already"
            return Problem("issue-date-order", detail, earliest_on=earliest_on)
        case PeriodIncomplete(blocked_by):
            detail = _described(blocked_by)
            return Problem("period-incomplete", detail, blocked_by=_blocked_by(blocked_by))
        case NothingToBillBy(blocked_by, lasting):
            # Blockers are in a fixed order with tax last: where a rate is missing, say so, because
            # that is what an operator can mend at once.
            code = "tax-missing" if lasting[-1].kind == "tax-missing" else "period-incomplete"
            detail = f"no override helps: {_described(lasting)}"
            return Problem(code, detail, blocked_by=_blocked_by(blocked_by))
        case TaxRowsMissing(failed, hubs):
            detail = f"no tax row for {', '.join(hubs)}: record one with POST /v1/tax-rates"
            return Problem("tax-missing", detail, blocked_by=_blocked_by(failed))
        case _:
            assert_never(refusal)


def _described(blockers: Sequence[PeriodBlocker]) -> str:
    return "; ".join(describe(blocker) for blocker in blockers[:DESCRIBED_BLOCKERS])


def _blocked_by(blockers: Sequence[PeriodBlocker], limit: int = SHOWN_BLOCKERS) -> list[BlockedBy]:
    return [
        BlockedBy(
            kind=blocker.kind,
            hub=blocker.hub,
            source=blocker.source,
            tenant_id=blocker.tenant_id,
            detail=blocker.detail,
            way_out=WAYS_OUT[blocker.kind],
        )
        for blocker in blockers[:limit]
    ]


def _comparison(result: ReconcileResult | None) -> MeteringComparison | None:
    if result is None:
        return None
    return MeteringComparison(instant_text(result.at_ms), result.differences)


def _closing(recorded: RecordedClosing, resumed: Iterable[RecordedResumption]) -> ClosingAnswer:
    closing = recorded.closing
    return ClosingAnswer(
        requested_at=instant_text(ms_of(recorded.requested_at)),
        issued_on=closing.issued_on,
        override=closing.override_reason,
        closed_at=optional_instant_text(optional_ms_of(recorded.closed_at)),
        resumptions=[_resumption(item) for item in resumed],
    )


def _resumption(recorded: RecordedResumption) -> ResumptionAnswer:
    resumption = recorded.resumption
    return ResumptionAnswer(
        recorded_at=instant_text(ms_of(recorded.recorded_at)),
        actor=resumption.actor,
        override=resumption.override_reason,
        taken_up=[
            TakenUpTaxRow(row.tax_version, row.hub, row.authority, row.tax_bps, row.valid_from)
            for row in resumption.taken_up
        ],
        failed_count=resumption.failed_count,
        failed=_blocked_by(resumption.failed, SHOWN_FAILED),
    )


async def _reconciliation(connection: Connection, month: str) -> PeriodReconciliation:
    steps = waterfall(await periods.facts_of_month(connection, month))
    receivable = receivable_waterfall(await periods.receivable_facts(connection, month))
    totals = [_totals(totals) for totals in await periods.month_totals(connection, month)]
    # A month without invoices comes to nothing in whichever currency.
    only = totals[0] if len(totals) == 1 else None
    nothing = None if totals else "0"
    return PeriodReconciliation(
        period=month,
        steps=_steps(steps),
        difference_micro=str(difference_micro(steps)),
        receivable_steps=_steps(receivable),
        receivable_difference_micro=str(difference_micro(receivable)),
        invoices_count=sum(item.invoices_count for item in totals),
        net_minor=only.net_minor if only else nothing,
        tax_minor=only.tax_minor if only else nothing,
        total_minor=only.total_minor if only else nothing,
        tender_minor=only.tender_minor if only else nothing,
        due_minor=only.due_minor if only else nothing,
        by_currency=totals,
        number_gaps=await periods.number_gaps(connection),
    )


def _totals(totals: MonthTotals) -> CurrencyTotals:
    return CurrencyTotals(
        currency=totals.currency,
        invoices_count=totals.invoices_count,
        net_minor=str(totals.net_minor),
        tax_minor=str(totals.tax_minor),
        total_minor=str(totals.total_minor),
        tender_minor=str(totals.tender_minor),
        due_minor=str(totals.due_minor),
    )


def _steps(steps: Iterable[WaterfallStep]) -> list[StepAnswer]:
    return [StepAnswer(step.step, str(step.change_micro)) for step in steps]
