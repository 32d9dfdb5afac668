"""`/v1/tenants`: who uses and pays or is funded."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from fastapi import Request, Response

from hisab_contracts.currencies import CurrencyText
from hisab_contracts.ids import IdText, ProjectId, TenantId
from hisab_contracts.reference import Role, TenantKind, TenantRecord
from ledger.api.approvals import Approvals, ProposedAnswer
from ledger.api.problems import problem_of
from ledger.api.requests import FreeText, ReasonText, parse_micro
from ledger.commands import Commands
from ledger.core.adjustments import ResumeTenant, SuspendTenant
from ledger.core.directory import fault_of_tenant
from ledger.core.proposals import CreditLimitTerms
from ledger.store.directory import find_tenant
from runtime.auth import Principal
from runtime.http import IntegerText, Model, NoBody, Problem, Resource, post
from runtime.idempotency import Answer, Command, read_command, run_command
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection


M = TypeVar("M", bound=Model)


class OpenTenant(Model, frozen=True, kw_only=True):
    """A new tenant."""

    tenant_id: IdText
    name: FreeText
    kind: TenantKind
    currency: CurrencyText
    credit_limit_micro: IntegerText


class TenantAnswer(Model, frozen=True, kw_only=True):
    """A tenant as registered."""

    tenant_id: str
    name: str
    kind: str
    currency: str
    credit_limit_micro: str
    projects: list[str]


class ProposeCreditLimit(Model, frozen=True, kw_only=True):
    """How far a commercial tenant may owe from now on, and why."""

    credit_limit_micro: IntegerText
    reason: ReasonText


class Suspend(Model, frozen=True, kw_only=True):
    """Why no new job of a tenant is to be admitted."""

    reason: ReasonText


class StandingAnswer(Model, frozen=True, kw_only=True):
    """Whether new jobs of a tenant are admitted: `active` or `suspended`."""

    tenant_id: str
    state: str


class Tenants(Resource):
    """`/v1/tenants`: a tenant, its project `main` and its book begin together."""

    def __init__(self, kit: Kit, commands: Commands, approvals: Approvals) -> None:
        self._kit = kit
        self._commands = commands
        self._approvals = approvals

    @post(
        "/v1/tenants",
        roles=(Role.OPERATOR,),
        body=OpenTenant,
        answer=TenantAnswer,
        status=201,
        idempotent=True,
        problems=("already-exists",),
    )
    async def open_tenant(self, request: Request) -> Response:
        """Register a tenant; its project `main` and its book exist with it."""
        principal = await self._kit.access.authorise(request)
        command = await read_command(request, OpenTenant)
        body = command.body
        record = TenantRecord(
            tenant_id=TenantId(body.tenant_id),
            kind=body.kind,
            currency=body.currency,
            credit_limit_micro=parse_micro(body.credit_limit_micro, "credit_limit_micro", least=0),
            projects=[ProjectId("main")],
        )
        fault = fault_of_tenant(record)
        if fault is not None:
            raise Problem("malformed", fault)

        async def run(connection: Connection) -> Answer:
            refused = await self._commands.open_tenant(connection, record, body.name)
            if refused is not None:
                raise problem_of(refused)
            return Answer(
                201,
                TenantAnswer(
                    tenant_id=body.tenant_id,
                    name=body.name,
                    kind=body.kind,
                    currency=body.currency,
                    credit_limit_micro=body.credit_limit_micro,
                    projects=list(record.projects),
                ),
            )

        return await run_command(
            self._kit.api, command, run, scope=body.tenant_id, tenant=principal.sees
        )

    @post(
        "/v1/tenants/{tenant_id}/credit-limit",
        roles=(Role.FINANCE,),
        body=ProposeCreditLimit,
        answer=ProposedAnswer,
        status=202,
        idempotent=True,
        problems=("not-commercial",),
    )
    async def propose_credit_limit(self, request: Request, tenant_id: str) -> Response:
        """Propose another credit limit; it holds once an approver has approved it."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            if await find_tenant(connection, tenant_id) is None:
                raise Problem("not-found", "no such tenant")
        command = await read_command(request, ProposeCreditLimit)
        body = command.body
        terms = CreditLimitTerms(
            tenant_id=TenantId(tenant_id),
            credit_limit_micro=parse_micro(body.credit_limit_micro, "credit_limit_micro", least=0),
            reason=body.reason,
        )
        return await self._approvals.propose(principal, command, terms)

    @post(
        "/v1/tenants/{tenant_id}/suspend",
        roles=(Role.OPERATOR,),
        body=Suspend,
        answer=StandingAnswer,
        idempotent=True,
        problems=("not-found",),
    )
    async def suspend(self, request: Request, tenant_id: str) -> Response:
        """Admit no new job of a tenant; what it uses is booked, and its holds stay."""
        principal = await self._kit.access.authorise(request)
        command = await read_command(request, Suspend)
        asked = SuspendTenant(reason=command.body.reason, actor=principal.actor)
        return await self._change_standing(principal, command, tenant_id, asked)

    @post(
        "/v1/tenants/{tenant_id}/resume",
        roles=(Role.OPERATOR,),
        body=NoBody,
        answer=StandingAnswer,
        idempotent=True,
        problems=("not-found",),
    )
    async def resume(self, request: Request, tenant_id: str) -> Response:
        """Admit jobs of a tenant again."""
        principal = await self._kit.access.authorise(request)
        command = await read_command(request, NoBody)
        asked = ResumeTenant(actor=principal.actor)
        return await self._change_standing(principal, command, tenant_id, asked)

    async def _change_standing(
        self,
        principal: Principal,
        command: Command[M],
        tenant_id: str,
        asked: SuspendTenant | ResumeTenant,
    ) -> Response:
        async def run(connection: Connection) -> Answer:
            standing = await self._commands.change_standing(connection, tenant_id, asked)
            if not isinstance(standing, bool):
                raise problem_of(standing)
            state = "suspended" if standing else "active"
            return Answer(200, StandingAnswer(tenant_id=tenant_id, state=state))

        return await run_command(
            self._kit.api, command, run, scope=tenant_id, tenant=principal.sees
        )
