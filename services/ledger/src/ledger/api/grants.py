"""`/v1/grants`: credit proposed by one person and approved by another."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Final, Literal, assert_never, get_args

import msgspec
from fastapi import Request, Response
from msgspec import Meta, field, structs

from hisab_contracts.entries import GrantScope
from hisab_contracts.ids import GrantId, HubText, IdText, KeyId, ProgrammeId, TenantId
from hisab_contracts.invariants import InvariantBroken
from hisab_contracts.reference import Role
from hisab_contracts.units import instant_text, optional_instant_text
from ledger.api.approvals import (
    APPROVAL_PROBLEMS,
    DECIDERS,
    REVOCATION_PROBLEMS,
    Approvals,
    ApproveProposal,
    DecisionAnswer,
    ProposedAnswer,
    RejectProposal,
)
from ledger.api.problems import problem_of
from ledger.api.requests import READERS, parse_instant, parse_micro, query_choice
from ledger.commands import Commands, ImportedGrants, id_from_command, imported_grant_id
from ledger.core.balance import complete_until
from ledger.core.decisions import NotFound
from ledger.core.grant_files import (
    COLUMNS,
    Duplicate,
    FileFault,
    GrantFile,
    GrantRow,
    RowFault,
    RowOutcome,
    read_grant_file,
)
from ledger.core.grants import (
    MOST_IN_SCOPE,
    CurrencyDiffers,
    Grant,
    GrantExpired,
    GrantState,
    fault_of_terms,
    scope_of,
)
from ledger.core.programmes import GrantStanding, standing_of
from ledger.core.proposals import revocation_of
from ledger.placement import TenantPartitions
from ledger.store.completeness import complete_until_of
from ledger.store.directory import find_grant
from ledger.store.outcomes import ListedOutcome, outcomes_of
from ledger.store.programmes import ListedGrant, list_grants, show_grant
from runtime.auth import require_own_tenant
from runtime.http import (
    MAX_DETAIL,
    IntegerText,
    Model,
    Position,
    Problem,
    Resource,
    get,
    json_response,
    page_of,
    page_response,
    post,
    query_flag,
)
from runtime.idempotency import Answer, read_command, read_file_command, run_command
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection

STATES: tuple[GrantStanding, ...] = (*get_args(GrantState), "expired")


_WHAT_TO_WRITE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "tenant_id": "the id of a tenant",
        "programme_id": "the id of a programme",
        "grant_micro": "a whole number of micro-units, such as 25000000 for 25 rupees",
        "priority": "a whole number from -1000 to 1000; lower pays first",
        "hubs": "codes of hubs with ; between them, or nothing for all",
        "skus": "SKUs with ; between them, or nothing for all",
        "projects": "projects with ; between them, or nothing for all",
        "coverage_bps": "a whole number from 1 to 10000 (100 %), or nothing for 10000",
    }
)
"""By column: how a cell that is not well-formed is corrected. What is well-formed `ProposeGrant`
says; of instants `parse_instant`, which says itself what to write."""

_WHAT_TO_DO: Final[Mapping[type, str]] = MappingProxyType(
    {
        NotFound: "correct it, or have it registered first",
        CurrencyDiffers: "choose a programme of the tenant's currency",
        GrantExpired: "all usage of its window is booked, so choose a later expires_at",
    }
)
"""By refusal: how a row is corrected that asks for what cannot be."""

_NOT_PROPOSED: Final = (
    "nothing wrong with it, but other rows are rejected: correct those, or send partial=true"
)

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
    after_grant: IdText | None = None
    """A grant of the same tenant: an outcome of it has to be accepted before this is approved."""


class ProposedGrant(Model, frozen=True, kw_only=True):
    """A grant that was proposed; its id is its proposal's too."""

    grant_id: str
    proposal_id: str
    state: str


class OutcomeAnswer(Model, frozen=True, kw_only=True):
    """What was achieved with a grant, as it was put on record, and whether it is accepted."""

    outcome_id: str
    kind: str
    evidence_sha256: str
    note: str
    state: str
    submitted_by: str
    submitted_at: str
    accepted_by: str | None
    accepted_at: str | None


class ImportedRow(Model, frozen=True, kw_only=True):
    """What a row of a file came to; the first row below the header is row 1."""

    row: int
    result: Literal["ok", "rejected", "duplicate"]
    reason: str | None
    """Why it is not proposed, and what to do. Null: it is."""
    grant_id: str | None
    """The grant that is proposed, or that has this reference already. Null: there is none."""


class ImportAnswer(Model, frozen=True, kw_only=True):
    """What a file came to, row by row, and how many grants it proposes."""

    items: list[ImportedRow]
    created: int


class GrantAnswer(Model, frozen=True, kw_only=True):
    """A grant: its terms, where it stands, and what is left; drawn is what usage was paid with."""

    grant_id: str
    proposal_id: str
    tenant_id: str
    programme_id: str
    grant_micro: str
    priority: int
    effective_at: str
    expires_at: str | None
    scope: GrantScope
    coverage_bps: int
    tax_effect: str
    after_grant: str | None
    state: str
    remaining_micro: str
    drawn_micro: str
    reserved_micro: str
    expired_micro: str
    proposed_by: str
    proposed_at: str
    approved_by: str | None
    approved_at: str | None
    rejected_by: str | None
    rejected_at: str | None
    reason: str | None
    """Why it was rejected."""
    reference: str | None
    """The officer's own name for it, where it came in a file."""


class GrantWithOutcomes(GrantAnswer, frozen=True, kw_only=True):
    """A grant, and all that is on record of what was achieved with it."""

    outcomes: list[OutcomeAnswer]


class Grants(Resource):
    """`/v1/grants`: nothing is granted by one person alone."""

    def __init__(
        self, kit: Kit, commands: Commands, approvals: Approvals, partitions: TenantPartitions
    ) -> None:
        """`partitions` says which watermarks there are: by them grants expire."""
        self._kit = kit
        self._commands = commands
        self._approvals = approvals
        self._partitions = partitions

    @post(
        "/v1/grants",
        roles=(Role.OFFICER,),
        body=ProposeGrant,
        answer=ProposedGrant,
        status=201,
        idempotent=True,
        problems=("unsupported", "grant-expired", "not-found"),
    )
    async def propose_grant(self, request: Request) -> Response:
        """Propose a grant. Nothing is granted before somebody else approves it."""
        principal = await self._kit.access.authorise(request)
        command = await read_command(request, ProposeGrant)
        body = command.body
        grant_id = GrantId(id_from_command("g", body.tenant_id, command.key))
        grant = _grant_of(body, grant_id, principal.key_id)

        async def run(connection: Connection) -> Answer:
            refused = await self._commands.propose_grant(connection, grant)
            if refused is not None:
                raise problem_of(refused)
            return Answer(
                201,
                ProposedGrant(
                    grant_id=grant.grant_id, proposal_id=grant.grant_id, state=grant.state
                ),
            )

        return await run_command(
            self._kit.api, command, run, scope=body.tenant_id, tenant=principal.sees
        )

    @post(
        "/v1/grants/import",
        roles=(Role.OFFICER,),
        answer=ImportAnswer,
        idempotent=True,
        query=("dry_run", "partial"),
        csv_columns=COLUMNS,
    )
    async def import_grants(self, request: Request) -> Response:
        """Propose the grants of a file: all or none, or with `partial` those that can be.

        A dry run answers the same and stores nothing: not its answer either, so that its key is
        free for the import itself.
        """
        principal = await self._kit.access.authorise(request)
        partial, dry_run = query_flag(request, "partial"), query_flag(request, "dry_run")
        options = {"partial": partial, "dry_run": dry_run}
        command = await read_file_command(request, "text/csv", _grant_file_of, options)
        rows = [_grant_of_row(row, principal.key_id) for row in command.body.rows]

        async def run(connection: Connection) -> Answer:
            imported = await self._commands.import_grants(
                connection, rows, partial=partial, dry_run=dry_run
            )
            return Answer(200, _import_answer(imported))

        if dry_run:
            async with self._kit.api.transaction(tenant=principal.sees) as connection:
                answer = await run(connection)
            return json_response(answer.body)
        return await run_command(
            self._kit.api, command, run, scope=principal.role, tenant=principal.sees
        )

    @get(
        "/v1/grants",
        roles=READERS,
        others={Role.TENANT: "not-found"},
        answer=GrantAnswer,
        paged=True,
        query=("tenant_id", "programme_id", "state"),
    )
    async def list_grants(self, request: Request) -> Response:
        """Grants in the order in which they were proposed, each with what is left of it."""
        principal = await self._kit.access.authorise(request)
        tenant_id = request.query_params.get("tenant_id")
        if tenant_id is not None:
            require_own_tenant(principal, tenant_id)
        page = page_of(request, tuple[Position])
        (after,) = page.after or (0,)
        state = query_choice(request, "state", STATES)
        programme_id = request.query_params.get("programme_id")
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            until_ms = await self._complete_until_ms(connection)
            found = await list_grants(
                connection,
                after,
                page.limit + 1,
                tenant_id=tenant_id,
                programme_id=programme_id,
                state=state,
                complete_until_ms=until_ms,
            )
        numbers = {str(listed.grant.grant_id): listed.number for listed in found}
        answers = [_grant_answer(listed, until_ms) for listed in found]
        return page_response(answers, page, lambda answer: (numbers[answer.grant_id],))

    @get(
        "/v1/grants/{grant_id}",
        roles=READERS,
        others={Role.TENANT: "not-found"},
        answer=GrantWithOutcomes,
    )
    async def get_grant(self, request: Request, grant_id: str) -> Response:
        """One grant: its terms, who decided it, what is left of it, and its outcomes."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            until_ms = await self._complete_until_ms(connection)
            found = await show_grant(connection, grant_id)
            outcomes = await outcomes_of(connection, grant_id)
        if found is None:
            raise Problem("not-found", "no such grant")
        shown = structs.asdict(_grant_answer(found, until_ms))
        return json_response(
            GrantWithOutcomes(**shown, outcomes=list(map(_outcome_answer, outcomes)))
        )

    @post(
        "/v1/grants/{grant_id}/approve",
        roles=DECIDERS,
        body=ApproveProposal,
        answer=DecisionAnswer,
        idempotent=True,
        problems=(*APPROVAL_PROBLEMS, "grant-expired", "outcome-missing", "budget-exceeded"),
    )
    async def approve_grant(self, request: Request, grant_id: str) -> Response:
        """Approve a grant that another key proposed."""
        return await self._approvals.approve(request, grant_id, only_grants=True)

    @post(
        "/v1/grants/{grant_id}/reject",
        roles=DECIDERS,
        body=RejectProposal,
        answer=DecisionAnswer,
        idempotent=True,
        problems=("already-decided",),
    )
    async def reject_grant(self, request: Request, grant_id: str) -> Response:
        """Reject a grant, or take one's own proposal back."""
        return await self._approvals.reject(request, grant_id, only_grants=True)

    @post(
        "/v1/grants/{grant_id}/revoke",
        roles=(Role.OFFICER,),
        body=RejectProposal,
        answer=ProposedAnswer,
        status=202,
        idempotent=True,
        problems=REVOCATION_PROBLEMS,
    )
    async def propose_revocation(self, request: Request, grant_id: str) -> Response:
        """Propose to end a grant early; once approved its window ends with the hour begun."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            grant = await find_grant(connection, grant_id)
        if grant is None:
            raise Problem("not-found", "no such grant")
        command = await read_command(request, RejectProposal)
        terms = revocation_of(grant, command.body.reason)
        return await self._approvals.propose(principal, command, terms)

    async def _complete_until_ms(self, connection: Connection) -> int | None:
        """Say until when all usage of all tenants has been heard of."""
        until_ms = await complete_until_of(connection, self._partitions.all())
        return complete_until(until_ms.values())


def _grant_of(
    body: ProposeGrant, grant_id: GrantId, key_id: str, reference: str | None = None
) -> Grant:
    """Read a grant, asked for by itself or in a file; raises `Problem` 422."""
    effective_ms = parse_instant(body.effective_at, "effective_at")
    expires_ms = None if body.expires_at is None else parse_instant(body.expires_at, "expires_at")
    fault = fault_of_terms(effective_ms, expires_ms)
    if fault is not None:
        raise Problem("malformed", fault)
    return Grant(
        grant_id=grant_id,
        tenant_id=TenantId(body.tenant_id),
        programme_id=ProgrammeId(body.programme_id),
        grant_micro=parse_micro(body.grant_micro, "grant_micro", least=1),
        priority=body.priority,
        effective_ms=effective_ms,
        expires_ms=expires_ms,
        scope=_scope_of(body.scope),
        coverage_bps=body.coverage_bps,
        tax_effect=body.tax_effect,
        after_grant=None if body.after_grant is None else GrantId(body.after_grant),
        proposed_by=KeyId(key_id),
        reference=reference,
    )


def _grant_file_of(body: bytes) -> GrantFile:
    read = read_grant_file(body)
    if isinstance(read, FileFault):
        raise Problem("malformed", read.detail[:MAX_DETAIL])
    return read


def _grant_of_row(row: GrantRow | RowFault, key_id: str) -> Grant | RowFault:
    """Read a row as the request for its grant alone would be read."""
    if isinstance(row, RowFault):
        return row
    try:
        body = msgspec.convert(row.request, ProposeGrant)
        grant_id = imported_grant_id(TenantId(body.tenant_id), row.reference)
        return _grant_of(body, grant_id, key_id, row.reference)
    except msgspec.ValidationError as error:
        fault, _, place = str(error).partition(" - at ")
        column = next((name for name in _WHAT_TO_WRITE if f".{name}" in place), None)
        if column is None:
            raise InvariantBroken(f"a row says nothing but its columns: {error}") from error
        return RowFault(f"{column}: write {_WHAT_TO_WRITE[column]} ({fault})")
    except Problem as problem:
        return RowFault(problem.detail)


def _import_answer(imported: ImportedGrants) -> ImportAnswer:
    present = imported.created | imported.known.keys()
    rows = enumerate(imported.outcomes, start=1)
    return ImportAnswer(
        items=[_imported_row(row, outcome, imported, present) for row, outcome in rows],
        created=len(imported.created),
    )


def _imported_row(
    row: int, outcome: RowOutcome, imported: ImportedGrants, present: Collection[GrantId]
) -> ImportedRow:
    match outcome:
        case Grant(grant_id=grant_id):
            is_proposed = grant_id in imported.created
            return ImportedRow(
                row=row,
                result="ok",
                reason=None if is_proposed else _NOT_PROPOSED,
                grant_id=grant_id if is_proposed else None,
            )
        case Duplicate(grant_id=grant_id, differing=differing):
            first = imported.known.get(grant_id)
            where = "in this file" if first is None else f"as a grant that is {first.state}"
            change = f", with another {', '.join(differing)}" if differing else ""
            return ImportedRow(
                row=row,
                result="duplicate",
                reason=f"its reference is there already, {where}{change}: "
                "give it another reference if it is another grant",
                grant_id=grant_id if grant_id in present else None,
            )
        case RowFault(reason):
            return ImportedRow(row=row, result="rejected", reason=reason, grant_id=None)
        case NotFound() | CurrencyDiffers() | GrantExpired():
            reason = f"{problem_of(outcome).detail}; {_WHAT_TO_DO[type(outcome)]}"
            return ImportedRow(row=row, result="rejected", reason=reason, grant_id=None)
        case _:
            assert_never(outcome)


def _scope_of(scope: Scope) -> GrantScope | None:
    """Read a scope as it is kept: each name once and in order."""
    return scope_of(msgspec.convert(msgspec.to_builtins(scope), GrantScope))


def _grant_answer(listed: ListedGrant, complete_until_ms: int | None) -> GrantAnswer:
    grant, lot = listed.grant, listed.lot
    return GrantAnswer(
        grant_id=grant.grant_id,
        proposal_id=grant.grant_id,
        tenant_id=grant.tenant_id,
        programme_id=grant.programme_id,
        grant_micro=str(grant.grant_micro),
        priority=grant.priority,
        effective_at=instant_text(grant.effective_ms),
        expires_at=optional_instant_text(grant.expires_ms),
        scope=grant.scope or GrantScope(),
        coverage_bps=grant.coverage_bps,
        tax_effect=grant.tax_effect,
        after_grant=grant.after_grant,
        state=standing_of(grant, lot, complete_until_ms),
        remaining_micro=str(lot.remaining_micro),
        drawn_micro=str(lot.drawn_micro),
        reserved_micro=str(lot.reserved_micro),
        expired_micro=str(lot.expired_micro),
        proposed_by=grant.proposed_by,
        proposed_at=instant_text(listed.proposed_ms),
        approved_by=grant.approved_by,
        approved_at=optional_instant_text(listed.approved_ms),
        rejected_by=listed.rejected_by,
        rejected_at=optional_instant_text(listed.rejected_ms),
        reason=listed.reason,
        reference=grant.reference,
    )


def _outcome_answer(listed: ListedOutcome) -> OutcomeAnswer:
    outcome = listed.outcome
    return OutcomeAnswer(
        outcome_id=outcome.outcome_id,
        kind=outcome.kind,
        evidence_sha256=outcome.evidence_sha256,
        note=outcome.note,
        state=outcome.state,
        submitted_by=outcome.submitted_by,
        submitted_at=instant_text(listed.submitted_ms),
        accepted_by=outcome.accepted_by,
        accepted_at=optional_instant_text(listed.accepted_ms),
    )
