"""`/v1/keys`: API keys of all three services."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import Request, Response
from msgspec.structs import replace

from hisab_contracts.reference import Role
from ledger.api.requests import HubText, IdText
from ledger.commands import id_from_command
from ledger.store import directory
from runtime.auth import AccessKey, access_message, mint, store_keys
from runtime.http import Model, NoBody, Problem, Resource, post
from runtime.idempotency import Answer, read_command, run_command
from runtime.outbox import Outbox
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


class Keys(Resource):
    """`/v1/keys`: made and revoked here, told to the other services on the access topic."""

    def __init__(self, kit: Kit, outbox: Outbox) -> None:
        self._kit = kit
        self._outbox = outbox

    @post("/v1/keys", body=MakeKey, answer=KeyAnswer, status=201, idempotent=True)
    async def make_key(self, request: Request) -> Response:
        """Make an API key. The secret is in this answer and nowhere else."""
        principal = await self._kit.access.authorise(request, Role.OPERATOR)
        command = await read_command(request, MakeKey)
        body = command.body
        if (body.role is Role.TENANT) != (body.tenant_id is not None):
            raise Problem("malformed", "tenant_id goes with role tenant, and with no other")
        if (body.role is Role.HUB) != (body.hub is not None):
            raise Problem("malformed", "hub goes with role hub, and with no other")
        scope = f"/{principal.role}"

        async def run(connection: Connection) -> Answer:
            tenant_id = body.tenant_id
            if tenant_id and await directory.find_tenant(connection, tenant_id) is None:
                raise Problem("not-found", "no such tenant")
            key_id = id_from_command("k", scope, command.key)
            minted = mint(key_id, body.role, tenant_id=tenant_id, bound_to=body.hub)
            await self._keep(connection, minted.access_key)
            # A secret is shown once: what is stored for retries does not have it.
            return Answer(
                201,
                KeyAnswer(key_id=key_id, secret=minted.secret),
                stored=KeyAnswer(key_id=key_id, secret=None),
            )

        return await run_command(self._kit.api, command, run, scope=scope, tenant=principal.sees)

    @post("/v1/keys/{key_id}/revoke", body=NoBody, answer=RevokedKey, idempotent=True)
    async def revoke_key(self, request: Request, key_id: str) -> Response:
        """Revoke a key: refused here at once, everywhere within seconds."""
        principal = await self._kit.access.authorise(request, Role.OPERATOR)
        async with self._kit.api.connection() as connection:
            found = await directory.find_key(connection, key_id)
        if found is None:
            raise Problem("not-found", "no such key")
        command = await read_command(request, NoBody)
        revoked = replace(found, revoked=True)

        async def run(connection: Connection) -> Answer:
            await self._keep(connection, revoked)
            return Answer(200, RevokedKey(key_id=key_id, state="revoked"))

        return await run_command(
            self._kit.api, command, run, scope=f"/{principal.role}", tenant=principal.sees
        )

    async def _keep(self, connection: Connection, access_key: AccessKey) -> None:
        """Store a key here at once, and tell the other services in the same transaction."""
        await store_keys(connection, [access_key])
        await self._outbox.write(connection, [access_message(access_key)])
