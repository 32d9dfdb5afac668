"""`/v1/grants`: credit proposed by one person and approved by another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from fastapi import Request, Response
from msgspec import Meta, field

from hisab_contracts.entries import GrantScope
from hisab_contracts.ids import GrantId, HubText, IdText, KeyId, ProgrammeId, TenantId
from hisab_contracts.reference import Role
from ledger.api.problems import problem_of
from ledger.api.requests import parse_instant, parse_micro
from ledger.commands import Commands, id_from_command
from ledger.core.grants import MOST_IN_SCOPE, Grant, fault_of_terms, refuse_maker, scope_of
from ledger.store import directory
from runtime.http import IntegerText, Model, NoBody, Problem, Resource, post
from runtime.idempotency import Answer, read_command, run_command
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection


_Names = Annotated[tuple[IdText, ...], Meta(min_length=1, max_length=MOST_IN_SCOPE)]


class Scope(Model, frozen=True, kw_only=True, omit_defaults=True):
    """What a grant may be used for: a member that is left out means all, an empty one nothing."""

    hubs: Annotated[tuple[HubText, ...], Meta(min_length=1, max_length=MOST_IN_SCOPE)] | None = None
    skus: _Names | None = None
    projects: _Names | None = None
    price_classes: _Names | None = None


class ProposeGrant(Model, frozen=True, kw_only=True):
    """A grant as proposed: both ends of its window on whole UTC hours."""

    tenant_id: IdText
    programme_id: IdText
    grant_micro: IntegerText
    priority: Annotated[int, Meta(ge=-1000, le=1000)]
    effective_at: str
    expires_at: str | None
    scope: Scope = field(default_factory=Scope)
    coverage_bps: Annotated[int, Meta(ge=1, le=10_000)] = 10_000
    """Which part of each bucket it pays, in 1/100 %."""
    tax_effect: Literal["tender", "reduces_base"] = "tender"


class GrantAnswer(Model, frozen=True, kw_only=True):
    """Where a grant stands."""

    grant_id: str
    state: str


class Grants(Resource):
    """`/v1/grants`: nothing is granted by one person alone."""

    def __init__(self, kit: Kit, commands: Commands) -> None:
        self._kit = kit
        self._commands = commands

    @post(
        "/v1/grants",
        roles=(Role.OFFICER,),
        body=ProposeGrant,
        answer=GrantAnswer,
        status=201,
        idempotent=True,
        problems=("unsupported", "grant-expired", "not-found"),
    )
    async def propose_grant(self, request: Request) -> Response:
        """Propose a grant. Nothing is granted before somebody else approves it."""
        principal = await self._kit.access.authorise(request)
        command = await read_command(request, ProposeGrant)
        body = command.body
        effective_ms = parse_instant(body.effective_at, "effective_at")
        expires_ms = (
            None if body.expires_at is None else parse_instant(body.expires_at, "expires_at")
        )
        fault = fault_of_terms(effective_ms, expires_ms)
        if fault is not None:
            raise Problem("malformed", fault)
        grant = Grant(
            grant_id=GrantId(id_from_command("g", body.tenant_id, command.key)),
            tenant_id=TenantId(body.tenant_id),
            programme_id=ProgrammeId(body.programme_id),
            grant_micro=parse_micro(body.grant_micro, "grant_micro", least=1),
            priority=body.priority,
            effective_ms=effective_ms,
            expires_ms=expires_ms,
            scope=_scope_of(body.scope),
            coverage_bps=body.coverage_bps,
            tax_effect=body.tax_effect,
            proposed_by=KeyId(principal.key_id),
        )

        async def run(connection: Connection) -> Answer:
            refused = await self._commands.propose_grant(connection, grant)
            if refused is not None:
                raise problem_of(refused)
            return Answer(201, _grant_answer(grant))

        return await run_command(
            self._kit.api, command, run, scope=body.tenant_id, tenant=principal.sees
        )

    @post(
        "/v1/grants/{grant_id}/approve",
        roles=(Role.APPROVER, Role.OFFICER),
        body=NoBody,
        answer=GrantAnswer,
        idempotent=True,
        problems=("maker-is-checker", "grant-not-proposed", "grant-expired", "budget-exceeded"),
    )
    async def approve_grant(self, request: Request, grant_id: str) -> Response:
        """Approve a grant that another key proposed."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            grant = await directory.find_grant(connection, grant_id)
        # An officer may not approve at all, but the proposer is told the better reason.
        approver = KeyId(principal.key_id)
        if grant is not None:
            own_proposal = refuse_maker(grant, approver)
            if own_proposal is not None:
                raise problem_of(own_proposal)
        if principal.role != Role.APPROVER:
            raise Problem("forbidden", "approving takes a key of role approver")
        if grant is None:
            raise Problem("not-found", "no such grant")
        command = await read_command(request, NoBody)

        async def run(connection: Connection) -> Answer:
            approved = await self._commands.approve_grant(
                connection, grant_id, approver, actor=principal.actor
            )
            if not isinstance(approved, Grant):
                raise problem_of(approved)
            return Answer(200, _grant_answer(approved))

        return await run_command(
            self._kit.api, command, run, scope=grant.tenant_id, tenant=principal.sees
        )


def _scope_of(scope: Scope) -> GrantScope | None:
    """Read a scope as it is kept: each name once and in order."""
    return scope_of(msgspec.convert(msgspec.to_builtins(scope), GrantScope))


def _grant_answer(grant: Grant) -> GrantAnswer:
    return GrantAnswer(grant_id=grant.grant_id, state=grant.state)
