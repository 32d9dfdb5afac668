"""`/v1/keys`: API keys of all three services."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import Request, Response

from hisab_contracts.ids import HubText, IdText
from hisab_contracts.reference import Role
from ledger.api.problems import problem_of
from ledger.api.requests import parse_micro
from ledger.commands import Commands, id_from_command
from ledger.core.decisions import NotFound
from ledger.core.directory import fault_of_key, fault_of_limit
from runtime.auth import find_access_key
from runtime.http import (
    IntegerText,
    Model,
    NoBody,
    Problem,
    Resource,
    json_response,
    post,
    put,
    read_body,
)
from runtime.idempotency import Answer, read_command, run_command
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection


class MakeKey(Model, frozen=True, kw_only=True):
    """A new API key: a tenant's names its tenant, a hub's its hub."""

    role: Role
    tenant_id: IdText | None = None
    hub: HubText | None = None


class KeyAnswer(Model, frozen=True, kw_only=True):
    """A key; its secret is shown once and null in every repeat."""

    key_id: str
    secret: str | None


class RevokedKey(Model, frozen=True, kw_only=True):
    """A key that no longer opens anything."""

    key_id: str
    state: str


class LimitKey(Model, frozen=True, kw_only=True):
    """How much a key may approve at once; null: any amount."""

    approve_up_to_micro: IntegerText | None


class KeyLimits(Model, frozen=True, kw_only=True):
    """How much a key may approve from now on."""

    key_id: str
    approve_up_to_micro: str | None


class Keys(Resource):
    """`/v1/keys`: made and revoked here, told to the other services on the access topic."""

    def __init__(self, kit: Kit, commands: Commands) -> None:
        self._kit = kit
        self._commands = commands

    @post(
        "/v1/keys",
        roles=(Role.OPERATOR,),
        body=MakeKey,
        answer=KeyAnswer,
        status=201,
        idempotent=True,
    )
    async def make_key(self, request: Request) -> Response:
        """Make an API key. The secret is in this answer and nowhere else."""
        principal = await self._kit.access.authorise(request)
        command = await read_command(request, MakeKey)
        body = command.body
        fault = fault_of_key(body.role, tenant_id=body.tenant_id, hub=body.hub)
        if fault is not None:
            raise Problem("malformed", fault)
        scope = principal.role_scope
        key_id = id_from_command("k", scope, command.key)

        async def run(connection: Connection) -> Answer:
            minted = await self._commands.make_key(
                connection, key_id, body.role, tenant_id=body.tenant_id, hub=body.hub
            )
            if isinstance(minted, NotFound):
                raise problem_of(minted)
            # A secret is shown once: what is stored for retries does not have it.
            return Answer(
                201,
                KeyAnswer(key_id=key_id, secret=minted.secret),
                stored=KeyAnswer(key_id=key_id, secret=None),
            )

        return await run_command(self._kit.api, command, run, scope=scope, tenant=principal.sees)

    @post(
        "/v1/keys/{key_id}/revoke",
        roles=(Role.OPERATOR,),
        body=NoBody,
        answer=RevokedKey,
        idempotent=True,
    )
    async def revoke_key(self, request: Request, key_id: str) -> Response:
        """Revoke a key: refused here at once, everywhere within seconds."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.connection() as connection:
            found = await find_access_key(connection, key_id)
        if found is None:
            raise Problem("not-found", "no such key")
        command = await read_command(request, NoBody)

        async def run(connection: Connection) -> Answer:
            await self._commands.revoke_key(connection, found)
            return Answer(200, RevokedKey(key_id=key_id, state="revoked"))

        return await run_command(
            self._kit.api, command, run, scope=principal.role_scope, tenant=principal.sees
        )

    @put(
        "/v1/keys/{key_id}/limits",
        roles=(Role.OPERATOR,),
        body=LimitKey,
        answer=KeyLimits,
    )
    async def limit_key(self, request: Request, key_id: str) -> Response:
        """Say how much a key may approve: for every approval that begins afterwards."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.connection() as connection:
            found = await find_access_key(connection, key_id)
        if found is None:
            raise Problem("not-found", "no such key")
        body = await read_body(request, LimitKey)
        fault = fault_of_limit(Role(found.role))
        if fault is not None:
            raise Problem("malformed", fault)
        up_to_micro = None
        if body.approve_up_to_micro is not None:
            up_to_micro = parse_micro(body.approve_up_to_micro, "approve_up_to_micro", least=0)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            await self._commands.limit_key(connection, key_id, up_to_micro, actor=principal.actor)
        return json_response(KeyLimits(key_id=key_id, approve_up_to_micro=body.approve_up_to_micro))
