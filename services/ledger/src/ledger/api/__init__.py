"""The ledger's HTTP endpoints (INTERFACE section 7, rows 9 to 14 and 18): who may do what.

Each endpoint reads in the order of the checks: who calls, what the path names, what the body says;
then it acts through `commands` or reads through `statements` and `feed`. What goes in and comes out
is written in `forms`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec
from fastapi import APIRouter, Request, Response

from hisab_contracts import topics
from hisab_contracts.ids import KeyId, ProjectId, TenantId
from hisab_contracts.reference import TenantRecord
from hisab_contracts.units import MAX_MICRO, instant_text
from ledger import registry
from ledger.commands import Commands, grant_from_proposal, now_ms
from ledger.feed import complete_until, count_unpublished, entries_after
from ledger.forms import (
    AskHold,
    BalanceAnswer,
    EntryAnswer,
    GrantAnswer,
    HoldAnswer,
    Invoiced,
    InvoicedAnswer,
    KeyAnswer,
    MakeKey,
    OpenProgramme,
    OpenTenant,
    ProposeGrant,
    RevokedKey,
    TenantAnswer,
    TrialBalanceAnswer,
    balance_answer,
    entry_answer,
    hold_answer,
    instant_of,
    micro_of,
    trial_balance_answer,
)
from ledger.grants import fault_of_terms, id_from_command, unsupported_terms
from ledger.statements import balance_of, hold_of, trial_balance
from runtime.auth import AccessKey, Principal, Role, access_message, mint, own_tenant, store_keys
from runtime.http import (
    Answer,
    Nothing,
    Place,
    Problem,
    cached_response,
    command_of,
    idempotent,
    json_response,
    operation,
    page_of,
    page_response,
    query_integer,
    read_body,
)
from runtime.kafka import Message
from runtime.service import Kit, Status
from runtime.streams import Outbox

if TYPE_CHECKING:
    from runtime.database import Connection

Endpoint = Callable[..., Awaitable[Response]]

READERS: Final = (
    Role.OPERATOR,
    Role.AUDITOR,
    Role.FINANCE,
    Role.OFFICER,
    Role.APPROVER,
    Role.TENANT,
)


class Endpoints:
    """The endpoints of this process."""

    def __init__(self, kit: Kit, outbox: Outbox, commands: Commands) -> None:
        self._kit = kit
        self._outbox = outbox
        self._commands = commands

    def router(self) -> APIRouter:
        """Return every route."""
        routes = APIRouter()
        self._add_registry(routes)
        self._add_credit(routes)
        self._add_books(routes)
        return routes

    def _add_registry(self, routes: APIRouter) -> None:
        """Tenants, programmes and keys (row 9)."""

        def post(path: str, endpoint: Endpoint, **said: Any) -> None:
            extra = operation(idempotent=True, **said)
            routes.add_api_route(path, endpoint, methods=["POST"], **extra)

        known = ("already-exists",)
        post(
            "/v1/tenants",
            self.open_tenant,
            body=OpenTenant,
            answer=TenantAnswer,
            status=201,
            problems=known,
        )
        post(
            "/v1/programmes",
            self.open_programme,
            body=OpenProgramme,
            answer=OpenProgramme,
            status=201,
            problems=known,
        )
        post("/v1/keys", self.make_key, body=MakeKey, answer=KeyAnswer, status=201)
        post("/v1/keys/{key_id}/revoke", self.revoke_key, body=Nothing, answer=RevokedKey)

    def _add_credit(self, routes: APIRouter) -> None:
        """Grants and holds (rows 10 and 11)."""

        def post(path: str, endpoint: Endpoint, **said: Any) -> None:
            extra = operation(idempotent=True, **said)
            routes.add_api_route(path, endpoint, methods=["POST"], **extra)

        post(
            "/v1/grants",
            self.propose_grant,
            body=ProposeGrant,
            answer=GrantAnswer,
            status=201,
            problems=("unsupported", "grant-expired", "not-found"),
        )
        post(
            "/v1/grants/{grant_id}/approve",
            self.approve_grant,
            body=Nothing,
            answer=GrantAnswer,
            problems=("maker-is-checker", "grant-not-proposed", "grant-expired", "budget-exceeded"),
        )
        post(
            "/v1/holds",
            self.place_hold,
            body=AskHold,
            answer=HoldAnswer,
            status=201,
            problems=("insufficient-credit", "no-price", "not-found"),
        )
        post(
            "/v1/holds/{hold_id}/release",
            self.release_hold,
            body=Nothing,
            answer=HoldAnswer,
            problems=("hold-closed",),
        )
        routes.get("/v1/holds/{hold_id}", **operation(answer=HoldAnswer))(self.get_hold)

    def _add_books(self, routes: APIRouter) -> None:
        """Balances, entries, the trial balance, and what invoices bill (rows 12 to 14, 18)."""
        book = "/v1/tenants/{tenant_id}"
        routes.get(
            f"{book}/balance",
            **operation(answer=BalanceAnswer, query=("as_of", "basis"), problems=("unsupported",)),
        )(self.get_balance)
        routes.get(
            f"{book}/entries", **operation(answer=EntryAnswer, paged=True, query=("after_seq",))
        )(self.get_entries)
        routes.get("/v1/trial-balance", **operation(answer=TrialBalanceAnswer))(
            self.get_trial_balance
        )
        routes.post(
            f"{book}/invoiced",
            **operation(
                body=Invoiced,
                answer=InvoicedAnswer,
                status=201,
                idempotent=True,
                problems=("not-receivable", "already-exists"),
            ),
        )(self.record_invoiced)

    async def status(self) -> Status:
        """What the ledger adds to `GET /v1/status`."""
        async with self._kit.writer.connection() as connection:
            unpublished = await count_unpublished(connection)
            until = await complete_until(connection)
        return Status(
            unpublished,
            {hub: None if ms is None else instant_text(ms) for hub, ms in until.items()},
        )

    async def open_tenant(self, request: Request) -> Response:
        """Register a tenant; its project `main` and its book exist with it."""
        principal = await self._kit.access.authorise(request, Role.OPERATOR)
        body = await read_body(request, OpenTenant)
        limit_micro = micro_of(body.credit_limit_micro, "credit_limit_micro", least=0)
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
            await self._commands.open_tenant(connection, record, body.name)
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

        command = command_of(request, body, scope=body.tenant_id)
        return await idempotent(self._kit.api, command, run, tenant=principal.sees)

    async def open_programme(self, request: Request) -> Response:
        """Register a programme; its book begins with its budget."""
        principal = await self._kit.access.authorise(request, Role.OPERATOR)
        body = await read_body(request, OpenProgramme)
        budget_micro = micro_of(body.budget_micro, "budget_micro", least=0)

        async def run(connection: Connection) -> Answer:
            await self._commands.open_programme(
                connection, body.programme_id, body.name, budget_micro, _actor(principal)
            )
            return Answer(201, body)

        command = command_of(request, body, scope=f"/{principal.role}")
        return await idempotent(self._kit.api, command, run, tenant=principal.sees)

    async def make_key(self, request: Request) -> Response:
        """Make an API key. The secret is in this answer and nowhere else."""
        principal = await self._kit.access.authorise(request, Role.OPERATOR)
        body = await read_body(request, MakeKey)
        if (body.role is Role.TENANT) != (body.tenant_id is not None):
            raise Problem("malformed", "tenant_id goes with role tenant, and with no other")
        if (body.role is Role.HUB) != (body.hub is not None):
            raise Problem("malformed", "hub goes with role hub, and with no other")
        command = command_of(request, body, scope=f"/{principal.role}")

        async def run(connection: Connection) -> Answer:
            tenant_id = body.tenant_id
            if tenant_id and await registry.tenant_of(connection, tenant_id) is None:
                raise Problem("not-found", "no such tenant")
            key_id = id_from_command("k", command.scope, command.key)
            minted = mint(key_id, body.role, tenant_id=body.tenant_id, hub=body.hub)
            await store_keys(connection, [minted.access_key])
            await self._outbox.write(connection, [access_message(minted.access_key)])
            return Answer(
                201,
                KeyAnswer(key_id=key_id, secret=minted.secret),
                stored=KeyAnswer(key_id=key_id, secret=None),
            )

        return await idempotent(self._kit.api, command, run, tenant=principal.sees)

    async def revoke_key(self, request: Request, key_id: str) -> Response:
        """Revoke a key: refused here at once, everywhere within seconds."""
        principal = await self._kit.access.authorise(request, Role.OPERATOR)
        async with self._kit.api.connection() as connection:
            found = await registry.key_of(connection, key_id)
        if found is None:
            raise Problem("not-found", "no such key")
        body = await read_body(request, Nothing)
        revoked = AccessKey(
            key_id=found.key_id,
            sha256=found.sha256,
            role=found.role,
            tenant_id=found.tenant_id,
            hub=found.hub,
            expires_at_ms=found.expires_ms,
            revoked=True,
        )

        async def run(connection: Connection) -> Answer:
            await store_keys(connection, [revoked])
            await self._outbox.write(connection, [access_message(revoked)])
            return Answer(200, RevokedKey(key_id=key_id, state="revoked"))

        command = command_of(request, body, scope=f"/{principal.role}")
        return await idempotent(self._kit.api, command, run, tenant=principal.sees)

    async def propose_grant(self, request: Request) -> Response:
        """Propose a grant. Nothing is granted before somebody else approves it."""
        principal = await self._kit.access.authorise(request, Role.OFFICER)
        body = await read_body(request, ProposeGrant)
        effective_ms = instant_of(body.effective_at, "effective_at")
        expires_ms = None if body.expires_at is None else instant_of(body.expires_at, "expires_at")
        fault = fault_of_terms(effective_ms, expires_ms)
        if fault is not None:
            raise Problem("malformed", fault)
        unsupported = unsupported_terms(body.scope, body.coverage_bps, body.tax_effect)
        if unsupported is not None:
            raise Problem("unsupported", unsupported)
        command = command_of(request, body, scope=body.tenant_id)
        grant = grant_from_proposal(
            grant_id=id_from_command("g", command.scope, command.key),
            tenant_id=body.tenant_id,
            programme_id=body.programme_id,
            grant_micro=micro_of(body.grant_micro, "grant_micro", least=1),
            priority=body.priority,
            effective_ms=effective_ms,
            expires_ms=expires_ms,
            proposed_by=principal.key_id,
        )

        async def run(connection: Connection) -> Answer:
            await self._commands.propose_grant(connection, grant)
            return Answer(201, GrantAnswer(grant_id=grant.grant_id, state=grant.state))

        return await idempotent(self._kit.api, command, run, tenant=principal.sees)

    async def approve_grant(self, request: Request, grant_id: str) -> Response:
        """Approve a grant that another key proposed."""
        access = self._kit.access
        principal = await access.authorise(request, Role.APPROVER, Role.OFFICER)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            grant = await registry.grant_of(connection, grant_id, lock=False)
        if grant is not None and grant.proposed_by == principal.key_id:
            raise Problem("maker-is-checker")
        if principal.role is not Role.APPROVER:
            raise Problem("forbidden", "approving takes a key of role approver")
        if grant is None:
            raise Problem("not-found", "no such grant")
        body = await read_body(request, Nothing)

        async def run(connection: Connection) -> Answer:
            approved = await self._commands.approve_grant(
                connection, grant_id, KeyId(principal.key_id)
            )
            return Answer(200, GrantAnswer(grant_id=approved.grant_id, state=approved.state))

        command = command_of(request, body, scope=grant.tenant_id)
        return await idempotent(self._kit.api, command, run, tenant=principal.sees)

    async def place_hold(self, request: Request) -> Response:
        """May this job start? Reserves the amount, or says what is missing."""
        principal = await self._kit.access.authorise(request, Role.SCHEDULER)
        body = await read_body(request, AskHold)
        expires_ms = instant_of(body.expires_at, "expires_at")
        by_price = (body.price_class, body.gpus, body.duration_ms)
        if (body.hold_micro is None) == any(part is None for part in by_price):
            raise Problem(
                "malformed", "give hold_micro, or price_class, gpus and duration_ms: one of them"
            )
        asked_micro = None
        if body.hold_micro is not None:
            asked_micro = micro_of(body.hold_micro, "hold_micro", least=1)
        command = command_of(request, body, scope=body.tenant_id)

        async def run(connection: Connection) -> Answer:
            hold_micro = asked_micro
            if hold_micro is None:
                gpu_ms = (body.gpus or 0) * (body.duration_ms or 0)
                hold_micro = await self._commands.quote(
                    connection, body.tenant_id, body.sku, body.price_class or "", gpu_ms
                )
            facts = registry.HoldFacts(
                hold_id=id_from_command("h", command.scope, command.key),
                tenant_id=body.tenant_id,
                project_id=body.project_id,
                job_ref=body.job_ref,
                allocation_id=body.allocation_id,
                hub=body.hub,
                sku=body.sku,
                hold_micro=hold_micro,
                expires_ms=expires_ms,
            )
            placed = await self._commands.place_hold(connection, facts, _actor(principal))
            return Answer(201, hold_answer(placed))

        return await idempotent(self._kit.api, command, run, tenant=principal.sees)

    async def get_hold(self, request: Request, hold_id: str) -> Response:
        """Where a hold stands."""
        principal = await self._kit.access.authorise(request, Role.SCHEDULER, *READERS)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            found = await hold_of(connection, hold_id, now_ms())
        if found is None:
            raise Problem("not-found", "no such hold")
        return json_response(hold_answer(found))

    async def release_hold(self, request: Request, hold_id: str) -> Response:
        """End a hold; what it still reserves is free again."""
        principal = await self._kit.access.authorise(request, Role.SCHEDULER)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            tenant_id = await registry.tenant_of_hold(connection, hold_id)
        if tenant_id is None:
            raise Problem("not-found", "no such hold")
        body = await read_body(request, Nothing)

        async def run(connection: Connection) -> Answer:
            released = await self._commands.release_hold(connection, hold_id, _actor(principal))
            return Answer(200, hold_answer(released))

        command = command_of(request, body, scope=tenant_id)
        return await idempotent(self._kit.api, command, run, tenant=principal.sees)

    async def get_balance(self, request: Request, tenant_id: str) -> Response:
        """What a tenant has, owes and has reserved, and how fresh that is."""
        principal = await self._kit.access.authorise(request, Role.SCHEDULER, *READERS)
        own_tenant(principal, tenant_id)
        partition = topics.partition_of(tenant_id.encode(), self._kit.settings.partitions)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            balance = await balance_of(connection, tenant_id, now_ms(), partition)
        if balance is None:
            raise Problem("not-found", "no such tenant")
        if request.query_params.get("basis", "effective") not in ("effective", "recorded"):
            raise Problem("malformed", "basis is effective or recorded")
        if "as_of" in request.query_params:
            instant_of(request.query_params["as_of"], "as_of")
            raise Problem("unsupported", "balances of other instants come later; leave out as_of")
        etag = f"{balance.book.seq}.{balance.complete_until_ms}.{balance.available_micro}"
        return cached_response(request, balance_answer(balance), etag=etag)

    async def get_entries(self, request: Request, tenant_id: str) -> Response:
        """A book's entries after a position, ascending: all that its hashes cover."""
        principal = await self._kit.access.authorise(request, *READERS)
        own_tenant(principal, tenant_id)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            if await registry.tenant_of(connection, tenant_id) is None:
                raise Problem("not-found", "no such tenant")
            page = page_of(request, tuple[Place])
            after_seq = query_integer(request, "after_seq", default=0, most=MAX_MICRO)
            if page.after is not None:
                (after_seq,) = page.after
            found = await entries_after(connection, tenant_id, after_seq, page.limit + 1)
        answers = [entry_answer(entry) for entry in found]
        return page_response(answers, page, lambda entry: (int(entry.seq),))

    async def get_trial_balance(self, request: Request) -> Response:
        """Every account over all books; the sum is 0."""
        principal = await self._kit.access.authorise(request, Role.AUDITOR, Role.OPERATOR)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            found = await trial_balance(connection)
        return json_response(trial_balance_answer(found))

    async def record_invoiced(self, request: Request, tenant_id: str) -> Response:
        """A finalised document bills what was receivable; its key is its document."""
        principal = await self._kit.access.authorise(request, Role.FINANCE)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            if await registry.tenant_of(connection, tenant_id) is None:
                raise Problem("not-found", "no such tenant")
        body = await read_body(request, Invoiced)
        invoiced_micro = micro_of(body.invoiced_micro, "invoiced_micro", least=1)
        first_seq = micro_of(body.first_seq, "first_seq", least=0)
        micro_of(body.last_seq, "last_seq", least=first_seq)
        command = command_of(request, body, scope=tenant_id)
        if command.key != f"invoiced:{body.document_id}":
            raise Problem("malformed", "the Idempotency-Key is invoiced:<document_id>")

        async def run(connection: Connection) -> Answer:
            entry = await self._commands.record_invoiced(
                connection, tenant_id, body.document_id, invoiced_micro, _actor(principal)
            )
            return Answer(201, InvoicedAnswer(entry_id=entry.entry_id, seq=str(entry.seq)))

        return await idempotent(self._kit.api, command, run, tenant=principal.sees)


def _actor(principal: Principal) -> str:
    return f"key:{principal.key_id}"
