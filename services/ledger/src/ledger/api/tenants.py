"""`/v1/tenants`: who uses and pays or is funded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import Request, Response

from hisab_contracts.currencies import CurrencyText
from hisab_contracts.ids import IdText, ProjectId, TenantId
from hisab_contracts.reference import Role, TenantKind, TenantRecord
from ledger.api.approvals import Approvals, ProposedAnswer
from ledger.api.problems import problem_of
from ledger.api.requests import FreeText, ReasonText, parse_micro
from ledger.commands import Commands
from ledger.core.directory import fault_of_tenant
from ledger.core.proposals import CreditLimitTerms
from ledger.store.directory import find_tenant
from runtime.http import IntegerText, Model, Problem, Resource, post
from runtime.idempotency import Answer, read_command, run_command
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection


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
