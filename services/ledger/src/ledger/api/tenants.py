"""`/v1/tenants`: who uses and pays or is funded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from fastapi import Request, Response

from hisab_contracts import topics
from hisab_contracts.ids import ProjectId, TenantId
from hisab_contracts.reference import Role, TenantKind, TenantRecord
from ledger.api.problems import problem_of
from ledger.api.requests import CurrencyText, FreeText, IdText, parse_micro
from ledger.commands import Commands
from runtime.http import IntegerText, Model, Problem, Resource, post
from runtime.idempotency import Answer, read_command, run_command
from runtime.kafka import Message
from runtime.outbox import Outbox
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


class Tenants(Resource):
    """`/v1/tenants`: a tenant, its project `main` and its book begin together."""

    def __init__(self, kit: Kit, outbox: Outbox, commands: Commands) -> None:
        self._kit = kit
        self._outbox = outbox
        self._commands = commands

    @post(
        "/v1/tenants",
        body=OpenTenant,
        answer=TenantAnswer,
        status=201,
        idempotent=True,
        problems=("already-exists",),
    )
    async def open_tenant(self, request: Request) -> Response:
        """Register a tenant; its project `main` and its book exist with it."""
        principal = await self._kit.access.authorise(request, Role.OPERATOR)
        command = await read_command(request, OpenTenant)
        body = command.body
        limit_micro = parse_micro(body.credit_limit_micro, "credit_limit_micro", least=0)
        # The limit counts what is receivable, and only a commercial tenant ever owes anything.
        if limit_micro and body.kind != "commercial":
            raise Problem("malformed", "only a commercial tenant has a credit limit")
        record = TenantRecord(
            tenant_id=TenantId(body.tenant_id),
            kind=body.kind,
            currency=body.currency,
            credit_limit_micro=limit_micro,
            projects=[ProjectId("main")],
        )

        async def run(connection: Connection) -> Answer:
            refused = await self._commands.open_tenant(connection, record, body.name)
            if refused is not None:
                raise problem_of(refused)
            message = Message(
                topics.TENANTS, key=record.tenant_id.encode(), value=msgspec.json.encode(record)
            )
            await self._outbox.write(connection, [message])
            return Answer(
                201,
                TenantAnswer(
                    tenant_id=body.tenant_id,
                    name=body.name,
                    kind=body.kind,
                    currency=body.currency,
                    credit_limit_micro=body.credit_limit_micro,
                    projects=["main"],
                ),
            )

        return await run_command(
            self._kit.api, command, run, scope=body.tenant_id, tenant=principal.sees
        )
