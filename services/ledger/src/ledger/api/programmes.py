"""`/v1/programmes`: public funds that grants are made from, and what became of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import Request, Response

from hisab_contracts.ids import IdText, ProgrammeId
from hisab_contracts.reference import Role
from hisab_contracts.units import instant_text, optional_instant_text
from ledger.api.approvals import RECLAIM_PROBLEMS, Approvals, ProposedAnswer
from ledger.api.problems import problem_of
from ledger.api.requests import REPORT_READERS, FreeText, parse_instant, parse_micro
from ledger.commands import Commands
from ledger.core.directory import fault_of_programme
from ledger.core.movements import SetBudget
from ledger.core.programmes import ProgrammeReport, TenantShare
from ledger.core.proposals import BudgetTerms, reclaim_of
from ledger.store.directory import find_grant, programme_currency
from ledger.store.programmes import find_programme, list_programmes, shares_of
from runtime.clock import now_ms
from runtime.http import (
    IntegerText,
    Model,
    Problem,
    Resource,
    get,
    json_response,
    page_of,
    page_response,
    post,
    query_integer,
)
from runtime.idempotency import Answer, read_command, run_command
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection

SHARES_SHOWN = 1_000
"""Tenants in one answer about a programme, at most; `after_tenant` asks for those behind them."""
SHARES_LISTED = 100
"""Tenants of each programme in a list of programmes, at most."""


class OpenProgramme(Model, frozen=True, kw_only=True):
    """A new programme with its budget; what it is for, and until when, may be left open."""

    programme_id: IdText
    name: FreeText
    budget_micro: IntegerText
    theme: FreeText | None = None
    ends_at: str | None = None


class OpenedProgramme(Model, frozen=True, kw_only=True):
    """A programme as it was registered."""

    programme_id: str
    name: str
    budget_micro: str
    theme: str | None
    ends_at: str | None


class ProposeBudget(Model, frozen=True, kw_only=True):
    """More budget for a programme."""

    add_micro: IntegerText


class ProposeReclaim(Model, frozen=True, kw_only=True):
    """Which grant of the programme."""

    grant_id: IdText


class ShareAnswer(Model, frozen=True, kw_only=True):
    """What one tenant has of a programme: granted = drawn + remaining + expired."""

    tenant_id: str
    granted_micro: str
    drawn_micro: str
    remaining_micro: str
    reserved_micro: str
    expired_micro: str


class ProgrammeAsOf(Model, frozen=True, kw_only=True):
    """The last entry of the programme's own book that the figures include."""

    seq: str
    recorded_at: str


class ProgrammeAnswer(Model, frozen=True, kw_only=True):
    """budget = left + granted - reclaimed; granted = drawn + remaining + expired."""

    programme_id: str
    name: str
    theme: str | None
    ends_at: str | None
    currency: str
    budget_micro: str
    left_micro: str
    granted_micro: str
    drawn_micro: str
    remaining_micro: str
    reserved_micro: str
    expired_micro: str
    reclaimed_micro: str
    by_tenant: list[ShareAnswer]
    by_tenant_next: str | None
    """The last tenant shown, where there are more: the next `after_tenant`."""
    as_of: ProgrammeAsOf


class Programmes(Resource):
    """`/v1/programmes`: a programme's book begins with its budget."""

    def __init__(self, kit: Kit, commands: Commands, approvals: Approvals) -> None:
        self._kit = kit
        self._commands = commands
        self._approvals = approvals

    @post(
        "/v1/programmes",
        roles=(Role.OPERATOR,),
        body=OpenProgramme,
        answer=OpenedProgramme,
        status=201,
        idempotent=True,
        problems=("already-exists",),
    )
    async def open_programme(self, request: Request) -> Response:
        """Register a programme; its book begins with its budget."""
        principal = await self._kit.access.authorise(request)
        command = await read_command(request, OpenProgramme)
        body = command.body
        budget_micro = parse_micro(body.budget_micro, "budget_micro", least=0)
        fault = fault_of_programme(ProgrammeId(body.programme_id))
        if fault is not None:
            raise Problem("malformed", fault)
        ends_ms = None if body.ends_at is None else parse_instant(body.ends_at, "ends_at")
        budget = SetBudget(budget_micro=budget_micro, actor=principal.actor)

        async def run(connection: Connection) -> Answer:
            refused = await self._commands.open_programme(
                connection,
                ProgrammeId(body.programme_id),
                body.name,
                budget,
                theme=body.theme,
                ends_ms=ends_ms,
            )
            if refused is not None:
                raise problem_of(refused)
            return Answer(
                201,
                OpenedProgramme(
                    programme_id=body.programme_id,
                    name=body.name,
                    budget_micro=body.budget_micro,
                    theme=body.theme,
                    ends_at=optional_instant_text(ends_ms),
                ),
            )

        return await run_command(
            self._kit.api, command, run, scope=principal.role_scope, tenant=principal.sees
        )

    @post(
        "/v1/programmes/{programme_id}/budget",
        roles=(Role.OFFICER,),
        body=ProposeBudget,
        answer=ProposedAnswer,
        status=202,
        idempotent=True,
        problems=("budget-out-of-range",),
    )
    async def propose_budget(self, request: Request, programme_id: str) -> Response:
        """Propose more budget; it may be promised once an approver has approved it."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            if await programme_currency(connection, programme_id) is None:
                raise Problem("not-found", "no such programme")
        command = await read_command(request, ProposeBudget)
        terms = BudgetTerms(
            programme_id=ProgrammeId(programme_id),
            add_micro=parse_micro(command.body.add_micro, "add_micro", least=1),
        )
        return await self._approvals.propose(principal, command, terms)

    @post(
        "/v1/programmes/{programme_id}/reclaim",
        roles=(Role.OFFICER,),
        body=ProposeReclaim,
        answer=ProposedAnswer,
        status=202,
        idempotent=True,
        problems=RECLAIM_PROBLEMS,
    )
    async def propose_reclaim(self, request: Request, programme_id: str) -> Response:
        """Propose that what expired of a grant goes back to the programme's budget, once."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            if await programme_currency(connection, programme_id) is None:
                raise Problem("not-found", "no such programme")
        command = await read_command(request, ProposeReclaim)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            grant = await find_grant(connection, command.body.grant_id)
        if grant is None or grant.programme_id != programme_id:
            raise Problem("not-found", "no such grant of this programme")
        return await self._approvals.propose(principal, command, reclaim_of(grant))

    @get(
        "/v1/programmes",
        roles=REPORT_READERS,
        answer=ProgrammeAnswer,
        paged=True,
        query=("tenants",),
    )
    async def list_programmes(self, request: Request) -> Response:
        """Programmes, each with what it promised and what became of that, from the books."""
        principal = await self._kit.access.authorise(request)
        page = page_of(request, tuple[str])
        (after,) = page.after or ("",)
        most = _tenants_asked(request, SHARES_LISTED)
        present_ms = now_ms()
        async with self._kit.api.transaction(tenant=principal.sees, snapshot=True) as connection:
            found = await list_programmes(connection, after, page.limit + 1, present_ms)
            shares = await shares_of(
                connection,
                [report.programme_id for report in found[: page.limit]],
                "",
                most + 1,
                present_ms,
            )
        answers = [
            _programme_answer(report, shares.get(report.programme_id, []), most) for report in found
        ]
        return page_response(answers, page, lambda answer: (answer.programme_id,))

    @get(
        "/v1/programmes/{programme_id}",
        roles=REPORT_READERS,
        answer=ProgrammeAnswer,
        query=("tenants", "after_tenant"),
    )
    async def get_programme(self, request: Request, programme_id: str) -> Response:
        """What a programme promised and what became of that, from the books, by tenant."""
        principal = await self._kit.access.authorise(request)
        after = request.query_params.get("after_tenant", "")
        most = _tenants_asked(request, SHARES_SHOWN)
        present_ms = now_ms()
        async with self._kit.api.transaction(tenant=principal.sees, snapshot=True) as connection:
            found = await find_programme(connection, programme_id, present_ms)
            if found is None:
                raise Problem("not-found", "no such programme")
            shares = await shares_of(connection, [programme_id], after, most + 1, present_ms)
        own = shares.get(found.programme_id, [])
        return json_response(_programme_answer(found, own, most))


def _tenants_asked(request: Request, most: int) -> int:
    """Read how many tenants of a programme an answer shall name."""
    return query_integer(request, "tenants", default=most, least=1, most=most)


def _programme_answer(
    report: ProgrammeReport, shares: list[TenantShare], most: int
) -> ProgrammeAnswer:
    lots = report.lots
    shown = shares[:most]
    return ProgrammeAnswer(
        programme_id=report.programme_id,
        name=report.name,
        theme=report.theme,
        ends_at=optional_instant_text(report.ends_ms),
        currency=report.currency,
        budget_micro=str(report.budget_micro),
        left_micro=str(report.left_micro),
        granted_micro=str(lots.granted_micro),
        drawn_micro=str(lots.drawn_micro),
        remaining_micro=str(lots.remaining_micro),
        reserved_micro=str(lots.reserved_micro),
        expired_micro=str(lots.expired_micro),
        reclaimed_micro=str(report.reclaimed_micro),
        by_tenant=[_share_answer(share) for share in shown],
        by_tenant_next=shown[-1].tenant_id if len(shares) > most else None,
        as_of=ProgrammeAsOf(seq=str(report.seq), recorded_at=instant_text(report.recorded_ms)),
    )


def _share_answer(share: TenantShare) -> ShareAnswer:
    lots = share.lots
    return ShareAnswer(
        tenant_id=share.tenant_id,
        granted_micro=str(lots.granted_micro),
        drawn_micro=str(lots.drawn_micro),
        remaining_micro=str(lots.remaining_micro),
        reserved_micro=str(lots.reserved_micro),
        expired_micro=str(lots.expired_micro),
    )
