"""`/v1/programmes`: public funds that grants are made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import Request, Response

from hisab_contracts.ids import IdText, ProgrammeId
from hisab_contracts.reference import Role
from ledger.api.problems import problem_of
from ledger.api.requests import FreeText, parse_micro
from ledger.commands import Commands
from ledger.core.directory import fault_of_programme
from ledger.core.movements import SetBudget
from runtime.http import IntegerText, Model, Problem, Resource, post
from runtime.idempotency import Answer, read_command, run_command
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection


class OpenProgramme(Model, frozen=True, kw_only=True):
    """A new programme with its budget."""

    programme_id: IdText
    name: FreeText
    budget_micro: IntegerText


class Programmes(Resource):
    """`/v1/programmes`: a programme's book begins with its budget."""

    def __init__(self, kit: Kit, commands: Commands) -> None:
        self._kit = kit
        self._commands = commands

    @post(
        "/v1/programmes",
        roles=(Role.OPERATOR,),
        body=OpenProgramme,
        answer=OpenProgramme,
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
        budget = SetBudget(budget_micro=budget_micro, actor=principal.actor)

        async def run(connection: Connection) -> Answer:
            refused = await self._commands.open_programme(
                connection, ProgrammeId(body.programme_id), body.name, budget
            )
            if refused is not None:
                raise problem_of(refused)
            return Answer(201, body)

        return await run_command(
            self._kit.api, command, run, scope=principal.role_scope, tenant=principal.sees
        )
