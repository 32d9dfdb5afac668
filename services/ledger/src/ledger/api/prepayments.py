"""`/v1/tenants/{tenant_id}/top-ups`: what a tenant paid beforehand is credit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import Request, Response

from hisab_contracts.entries import Entry
from hisab_contracts.ids import GrantId, IdText, PaymentId
from hisab_contracts.reference import Role
from ledger.api.problems import problem_of
from ledger.api.requests import parse_instant, parse_micro
from ledger.commands import Commands, id_from_command
from ledger.core.grants import fault_of_terms
from ledger.core.prepayments import TopUp
from runtime.http import IntegerText, Model, Problem, Resource, post
from runtime.idempotency import Answer, read_command, run_command
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection


class CreditPayment(Model, frozen=True, kw_only=True):
    """A payment that has arrived; its lot may end on a whole UTC hour, or never."""

    payment_id: IdText
    topup_micro: IntegerText
    expires_at: str | None = None


class TopUpAnswer(Model, frozen=True, kw_only=True):
    """The lot that a payment opened, and the entry that did."""

    grant_id: str
    entry_id: str


class Prepayments(Resource):
    """`/v1/tenants/{tenant_id}/top-ups`: one lot per payment, however often it is told."""

    def __init__(self, kit: Kit, commands: Commands) -> None:
        self._kit = kit
        self._commands = commands

    @post(
        "/v1/tenants/{tenant_id}/top-ups",
        roles=(Role.FINANCE,),
        body=CreditPayment,
        answer=TopUpAnswer,
        status=201,
        idempotent=True,
        problems=("payment-differs", "not-found"),
    )
    async def credit_payment(self, request: Request, tenant_id: str) -> Response:
        """Credit what a tenant paid. It takes one person: the payment is the evidence."""
        principal = await self._kit.access.authorise(request)
        command = await read_command(request, CreditPayment)
        body = command.body
        expires_ms = (
            None if body.expires_at is None else parse_instant(body.expires_at, "expires_at")
        )
        fault = fault_of_terms(0, expires_ms)
        if fault is not None:
            raise Problem("malformed", fault)
        top_up = TopUp(
            grant_id=GrantId(id_from_command("t", tenant_id, body.payment_id)),
            payment_id=PaymentId(body.payment_id),
            topup_micro=parse_micro(body.topup_micro, "topup_micro", least=1),
            expires_ms=expires_ms,
            actor=principal.actor,
        )

        async def run(connection: Connection) -> Answer:
            credited = await self._commands.top_up(connection, tenant_id, top_up)
            if not isinstance(credited, Entry):
                raise problem_of(credited)
            return Answer(201, TopUpAnswer(grant_id=top_up.grant_id, entry_id=credited.entry_id))

        return await run_command(
            self._kit.api, command, run, scope=tenant_id, tenant=principal.sees
        )
