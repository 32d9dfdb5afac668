"""`/v1/holds`: may this job start?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import Request, Response
from msgspec import Meta

from hisab_contracts.ids import (
    AllocationId,
    HoldId,
    HubCode,
    HubText,
    IdText,
    PriceClass,
    ProjectId,
    Sku,
)
from hisab_contracts.reference import Role
from hisab_contracts.units import instant_text
from ledger.api.problems import problem_of
from ledger.api.requests import READERS, FreeText, parse_instant, parse_micro
from ledger.commands import Commands, id_from_command
from ledger.core.expiry import hold_at
from ledger.core.holds import ExtendHold, HoldState, PlaceHold, ReleaseHold
from ledger.store import directory
from ledger.store.holds import PlacedJob, job_of, jobs_after
from ledger.store.queries import hold_of
from runtime.clock import now_ms
from runtime.http import (
    IntegerText,
    Model,
    NoBody,
    Problem,
    Resource,
    get,
    json_response,
    page_of,
    page_response,
    post,
)
from runtime.idempotency import Answer, read_command, run_command
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection


class AskHold(Model, frozen=True, kw_only=True):
    """May this job start? Its amount, or GPUs, price class and duration to price it by."""

    tenant_id: IdText
    project_id: Annotated[str, Meta(min_length=1, max_length=128)] = "main"
    job_ref: FreeText
    allocation_id: IdText | None = None
    hub: HubText
    sku: IdText
    hold_micro: IntegerText | None = None
    price_class: IdText | None = None
    gpus: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    duration_ms: Annotated[int, Meta(ge=1, le=10**12)] | None = None
    expires_at: str


class AskExtension(Model, frozen=True, kw_only=True):
    """Guarantee more, for longer, or both; null leaves the hold's expiry as it is."""

    add_micro: IntegerText = "0"
    expires_at: str | None = None


class PlacedHoldAnswer(Model, frozen=True, kw_only=True):
    """A hold in a list: how it stands, and what was said of its job."""

    hold_id: str
    tenant_id: str
    project_id: str
    job_ref: str
    allocation_id: str | None
    hub: str
    sku: str
    price_class: str | None
    state: str
    end: str | None
    hold_micro: str
    open_micro: str
    drawn_micro: str
    short_micro: str
    expires_at: str


class HoldAnswer(Model, frozen=True, kw_only=True):
    """A hold, and what its tenant has available."""

    hold_id: str
    state: str
    """`open` or `released`: here, as in the kind `hold_released`, that is a hold's every end."""
    ended_by: str | None
    """`final`, `released` (on request) or `expired`; null while it is open."""
    end: str | None
    """The same by its second name."""
    hold_micro: str
    open_micro: str
    drawn_micro: str
    """What its runs were charged while it was open, less what they got back."""
    short_micro: str
    """What it lost with lots that expired: nothing guarantees it any more."""
    available_micro: str


class Holds(Resource):
    """`/v1/holds`: an amount guaranteed to a job before it starts."""

    def __init__(self, kit: Kit, commands: Commands) -> None:
        self._kit = kit
        self._commands = commands

    @post(
        "/v1/holds",
        roles=(Role.SCHEDULER,),
        body=AskHold,
        answer=HoldAnswer,
        status=201,
        idempotent=True,
        problems=("suspended", "no-price", "insufficient-credit", "not-found"),
    )
    async def place_hold(self, request: Request) -> Response:
        """May this job start? Reserves the amount, or says what is missing."""
        principal = await self._kit.access.authorise(request)
        command = await read_command(request, AskHold)
        body = command.body
        expires_ms = parse_instant(body.expires_at, "expires_at")
        # A class beside an amount says what the hold is for: lots may be for some classes only.
        by_price = (body.gpus, body.duration_ms)
        if body.hold_micro is None:
            is_whole = body.price_class is not None and None not in by_price
        else:
            is_whole = by_price == (None, None)
        if not is_whole:
            raise Problem(
                "malformed", "give hold_micro, or price_class, gpus and duration_ms: one of them"
            )
        asked_micro = None
        if body.hold_micro is not None:
            asked_micro = parse_micro(body.hold_micro, "hold_micro", least=0)

        async def run(connection: Connection) -> Answer:
            # Priced inside the transaction: a retry gets the first answer, not a price of its own.
            hold_micro = asked_micro
            if hold_micro is None:
                hold_micro = await self._priced_micro(connection, body)
            placed = await self._commands.enter_hold(
                connection,
                body.tenant_id,
                PlaceHold(
                    hold_id=HoldId(id_from_command("h", body.tenant_id, command.key)),
                    hold_micro=hold_micro,
                    project_id=ProjectId(body.project_id),
                    job_ref=body.job_ref,
                    allocation_id=(
                        None if body.allocation_id is None else AllocationId(body.allocation_id)
                    ),
                    hub=HubCode(body.hub),
                    sku=Sku(body.sku),
                    price_class=None if body.price_class is None else PriceClass(body.price_class),
                    expires_ms=expires_ms,
                    actor=principal.actor,
                ),
            )
            if not isinstance(placed, HoldState):
                raise problem_of(placed)
            return Answer(201, _hold_answer(placed))

        return await run_command(
            self._kit.api, command, run, scope=body.tenant_id, tenant=principal.sees
        )

    async def _priced_micro(self, connection: Connection, body: AskHold) -> int:
        """Price a hold that was asked for as GPUs and a duration."""
        priced = await self._commands.price_hold(
            connection,
            body.tenant_id,
            Sku(body.sku),
            PriceClass(body.price_class or ""),
            gpus=body.gpus or 0,
            duration_ms=body.duration_ms or 0,
        )
        if not isinstance(priced, int):
            raise problem_of(priced)
        return priced

    @get(
        "/v1/holds/{hold_id}",
        roles=(Role.SCHEDULER, *READERS),
        others={Role.TENANT: "not-found"},
        answer=HoldAnswer,
    )
    async def get_hold(self, request: Request, hold_id: str) -> Response:
        """Where a hold stands."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            found = await hold_of(connection, hold_id, now_ms())
        if found is None:
            raise Problem("not-found", "no such hold")
        return json_response(_hold_answer(found))

    @get(
        "/v1/holds",
        roles=(Role.SCHEDULER, *READERS),
        others={Role.TENANT: "own"},
        answer=PlacedHoldAnswer,
        paged=True,
        query=("tenant_id", "state", "job_ref"),
    )
    async def list_holds(self, request: Request) -> Response:
        """Holds in the order of their ids: of a tenant, in a state, of a job."""
        principal = await self._kit.access.authorise(request)
        page = page_of(request, tuple[str])
        asked = request.query_params
        state = asked.get("state")
        if state not in (None, "open", "released"):
            raise Problem("malformed", "state is open or released")
        after = "" if page.after is None else page.after[0]
        present_ms = now_ms()
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            found = await jobs_after(
                connection,
                after,
                page.limit + 1,
                now_ms=present_ms,
                is_open=None if state is None else state == "open",
                tenant_id=asked.get("tenant_id"),
                job_ref=asked.get("job_ref"),
            )
        answers = [_placed_answer(job, present_ms) for job in found]
        return page_response(answers, page, lambda answer: (answer.hold_id,))

    @post(
        "/v1/holds/{hold_id}/extend",
        roles=(Role.SCHEDULER,),
        body=AskExtension,
        answer=HoldAnswer,
        idempotent=True,
        problems=("hold-closed", "suspended", "insufficient-credit"),
    )
    async def extend_hold(self, request: Request, hold_id: str) -> Response:
        """Guarantee more to a job that runs, for longer, or both: all of it or nothing."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            job = await job_of(connection, hold_id)
        if job is None:
            raise Problem("not-found", "no such hold")
        command = await read_command(request, AskExtension)
        body = command.body
        extension = ExtendHold(
            hold_id=HoldId(hold_id),
            add_micro=parse_micro(body.add_micro, "add_micro", least=0),
            expires_ms=(
                None if body.expires_at is None else parse_instant(body.expires_at, "expires_at")
            ),
            terms=job.terms,
            actor=principal.actor,
        )

        async def run(connection: Connection) -> Answer:
            extended = await self._commands.enter_hold(connection, job.tenant_id, extension)
            if not isinstance(extended, HoldState):
                raise problem_of(extended)
            return Answer(200, _hold_answer(extended))

        return await run_command(
            self._kit.api, command, run, scope=job.tenant_id, tenant=principal.sees
        )

    @post(
        "/v1/holds/{hold_id}/release",
        roles=(Role.SCHEDULER,),
        body=NoBody,
        answer=HoldAnswer,
        idempotent=True,
        problems=("hold-closed",),
    )
    async def release_hold(self, request: Request, hold_id: str) -> Response:
        """End a hold; what it still reserves is free again."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            tenant_id = await directory.tenant_of_hold(connection, hold_id)
        if tenant_id is None:
            raise Problem("not-found", "no such hold")
        command = await read_command(request, NoBody)
        release = ReleaseHold(
            hold_id=HoldId(hold_id),
            ended_by="released",
            caused_by=f"hold:{hold_id}",
            actor=principal.actor,
        )

        async def run(connection: Connection) -> Answer:
            released = await self._commands.enter_hold(connection, tenant_id, release)
            if not isinstance(released, HoldState):
                raise problem_of(released)
            return Answer(200, _hold_answer(released))

        return await run_command(
            self._kit.api, command, run, scope=tenant_id, tenant=principal.sees
        )


def _hold_answer(hold: HoldState) -> HoldAnswer:
    return HoldAnswer(
        hold_id=hold.hold_id,
        state="open" if hold.ended_by is None else "released",
        ended_by=hold.ended_by,
        end=hold.ended_by,
        hold_micro=str(hold.hold_micro),
        open_micro=str(hold.open_micro),
        drawn_micro=str(hold.drawn_micro),
        short_micro=str(hold.short_micro),
        available_micro=str(hold.available_micro),
    )


def _placed_answer(job: PlacedJob, present_ms: int) -> PlacedHoldAnswer:
    """Write a hold as a list has it: what is over by the clock has ended."""
    hold = hold_at(job.hold, present_ms)
    return PlacedHoldAnswer(
        hold_id=hold.hold_id,
        tenant_id=job.tenant_id,
        project_id=job.terms.project_id,
        job_ref=job.job_ref,
        allocation_id=hold.allocation_id,
        hub=job.terms.hub,
        sku=job.terms.sku,
        price_class=job.terms.price_class,
        state="open" if hold.ended_by is None else "released",
        end=hold.ended_by,
        hold_micro=str(hold.hold_micro),
        open_micro=str(hold.open_micro),
        drawn_micro=str(hold.drawn_micro),
        short_micro=str(hold.short_micro),
        expires_at=instant_text(hold.expires_ms),
    )
