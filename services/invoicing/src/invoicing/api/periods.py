"""`/v1/periods`: how far a billing month is, the command to close it, and its reconciliation."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, assert_never

from fastapi import Request, Response
from msgspec import Meta, Struct

from hisab_contracts.reference import Role
from hisab_contracts.units import instant_text, ms_of, optional_instant_text, optional_ms_of
from invoicing.api.access import MONEY_ROLES, require_month
from invoicing.commands import close_month
from invoicing.core.periods import (
    CloseRefused,
    Closing,
    IssuedTooEarly,
    NothingToBillBy,
    PeriodBlocker,
    PeriodClosed,
    PeriodIncomplete,
    RecordedClosing,
    close_request,
    describe,
    progress_of,
)
from invoicing.core.reconciliation import (
    WaterfallStep,
    difference_micro,
    receivable_waterfall,
    waterfall,
)
from invoicing.store import periods
from runtime.database import ALL_TENANTS
from runtime.http import Model, Problem, Resource, get, json_response, post
from runtime.idempotency import Answer, read_command, run_command
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection

DESCRIBED_BLOCKERS = 5
"""How many blockers a problem's detail names; its `blocked_by` lists all of them."""


class CloseOverride(Model, frozen=True):
    """Why a month is closed although it is not complete."""

    reason: Annotated[str, Meta(min_length=1, max_length=1000)]


class CloseBody(Model, frozen=True):
    """The command to close a month; `issued_on` null is the first day of the next month."""

    issued_on: dt.date | None = None
    override: CloseOverride | None = None


class BlockedBy(Struct, frozen=True):
    """What stands in the way of a month; while it is closing, what its bills still need."""

    kind: str
    hub: str | None
    source: str | None
    tenant_id: str | None
    detail: str


class ClosingAnswer(Struct, frozen=True):
    """The command that closes, or closed, a month."""

    requested_at: str
    issued_on: dt.date
    override: str | None
    closed_at: str | None


class PeriodAnswer(Struct, frozen=True):
    """A billing month: `open`, `closable` by watermark, `closing` on command, then `closed`."""

    period: str
    state: str
    blocked_by: list[BlockedBy]
    late_micro: str
    closing: ClosingAnswer | None


class StepAnswer(Struct, frozen=True):
    """One step of a waterfall."""

    step: str
    micro: str


class PeriodReconciliation(Struct, frozen=True):
    """From what the ledger charged to what invoices say, step by step; differences are 0."""

    period: str
    steps: list[StepAnswer]
    difference_micro: str
    receivable_steps: list[StepAnswer]
    receivable_difference_micro: str
    invoices_count: int
    net_minor: str
    tax_minor: str
    total_minor: str
    tender_minor: str
    due_minor: str
    number_gaps: int


class Periods(Resource):
    """`/v1/periods/{month}`: a month's state, its close, its reconciliation."""

    def __init__(self, kit: Kit) -> None:
        """Serve from this kit."""
        self._kit = kit

    @get("/v1/periods/{month}", roles=MONEY_ROLES, answer=PeriodAnswer)
    async def period(self, request: Request, month: str) -> Response:
        """How far a billing month is, and what stands in its way."""
        await self._kit.access.authorise(request)
        require_month(month)
        async with self._kit.api.transaction(tenant=ALL_TENANTS) as connection:
            answer = await self._period(connection, month)
        return json_response(answer)

    @post(
        "/v1/periods/{month}/close",
        roles=(Role.FINANCE,),
        body=CloseBody,
        answer=PeriodAnswer,
        status=202,
        problems=("period-incomplete", "period-closed", "tax-missing"),
        idempotent=True,
    )
    async def close(self, request: Request, month: str) -> Response:
        """Close a month; its invoices are then computed, numbered and rendered."""
        principal = await self._kit.access.authorise(request)
        require_month(month)
        command = await read_command(request, CloseBody)
        override = command.body.override
        wanted = close_request(
            month,
            command.body.issued_on,
            None if override is None else override.reason,
            principal.actor,
        )
        if isinstance(wanted, IssuedTooEarly):
            raise Problem("malformed", "issued_on lies before the month's last day")

        async def run(connection: Connection) -> Answer:
            closing = await close_month(connection, wanted, self._kit.settings.partitions)
            if not isinstance(closing, Closing):
                raise _problem_of(closing)
            return Answer(202, await self._period(connection, month))

        return await run_command(
            self._kit.api, command, run, scope=principal.role_scope, tenant=ALL_TENANTS
        )

    @get("/v1/periods/{month}/reconciliation", roles=MONEY_ROLES, answer=PeriodReconciliation)
    async def reconciliation(self, request: Request, month: str) -> Response:
        """From what the ledger charged for a month to what its invoices say."""
        await self._kit.access.authorise(request)
        require_month(month)
        async with self._kit.api.transaction(tenant=ALL_TENANTS) as connection:
            answer = await _reconciliation(connection, month)
        return json_response(answer)

    async def _period(self, connection: Connection, month: str) -> PeriodAnswer:
        state = await periods.period_state(connection, month, self._kit.settings.partitions)
        progress = progress_of(state)
        return PeriodAnswer(
            period=month,
            state=progress.status,
            blocked_by=_blocked_by(progress.blocked_by),
            late_micro=str(await periods.late_micro(connection, month)),
            closing=None if state.recorded is None else _closing(state.recorded),
        )


def _problem_of(refusal: CloseRefused) -> Problem:
    match refusal:
        case PeriodClosed(period):
            return Problem("period-closed", f"{period} is closed, or being closed, already")
        case PeriodIncomplete(blocked_by):
            detail = _described(blocked_by)
            return Problem("period-incomplete", detail, blocked_by=_blocked_by(blocked_by))
        case NothingToBillBy(blocked_by, lasting):
            # Blockers are in a fixed order with tax last: where a rate is missing, say so, because
            # that is what an operator can mend at once.
            code = "tax-missing" if lasting[-1].kind == "tax-missing" else "period-incomplete"
            detail = f"no override helps: {_described(lasting)}"
            return Problem(code, detail, blocked_by=_blocked_by(blocked_by))
        case _:
            assert_never(refusal)


def _described(blockers: tuple[PeriodBlocker, ...]) -> str:
    return "; ".join(describe(blocker) for blocker in blockers[:DESCRIBED_BLOCKERS])


def _blocked_by(blockers: Iterable[PeriodBlocker]) -> list[BlockedBy]:
    return [
        BlockedBy(
            kind=blocker.kind,
            hub=blocker.hub,
            source=blocker.source,
            tenant_id=blocker.tenant_id,
            detail=blocker.detail,
        )
        for blocker in blockers
    ]


def _closing(recorded: RecordedClosing) -> ClosingAnswer:
    closing = recorded.closing
    return ClosingAnswer(
        requested_at=instant_text(ms_of(recorded.requested_at)),
        issued_on=closing.issued_on,
        override=closing.override_reason,
        closed_at=optional_instant_text(optional_ms_of(recorded.closed_at)),
    )


async def _reconciliation(connection: Connection, month: str) -> PeriodReconciliation:
    steps = waterfall(await periods.facts_of_month(connection, month))
    receivable = receivable_waterfall(await periods.receivable_facts(connection, month))
    totals = await periods.month_totals(connection, month)
    return PeriodReconciliation(
        period=month,
        steps=_steps(steps),
        difference_micro=str(difference_micro(steps)),
        receivable_steps=_steps(receivable),
        receivable_difference_micro=str(difference_micro(receivable)),
        invoices_count=totals.invoices_count,
        net_minor=str(totals.net_minor),
        tax_minor=str(totals.tax_minor),
        total_minor=str(totals.total_minor),
        tender_minor=str(totals.tender_minor),
        due_minor=str(totals.due_minor),
        number_gaps=await periods.number_gaps(connection),
    )


def _steps(steps: Iterable[WaterfallStep]) -> list[StepAnswer]:
    return [StepAnswer(step.step, str(step.change_micro)) for step in steps]
