"""`/v1/grants/{id}/outcomes`: what was achieved with a grant; and what outcomes cost by theme."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import Request, Response
from msgspec import Meta

from hisab_contracts.ids import GrantId, KeyId, OutcomeId
from hisab_contracts.reference import Role
from ledger.api.problems import problem_of
from ledger.api.requests import REPORT_READERS, FreeText
from ledger.commands import Commands, id_from_command
from ledger.core.outcomes import GrantOutcome, ThemeCost, refuse_accepter
from ledger.store.directory import find_grant
from ledger.store.outcomes import find_outcome, theme_costs
from runtime.http import Model, Problem, Resource, get, page_of, page_response, post
from runtime.idempotency import Answer, read_command, run_command
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection

_Sha256Text = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_NoteText = Annotated[str, Meta(max_length=1_000)]


class SubmitOutcome(Model, frozen=True, kw_only=True):
    """What was achieved, and the digest of what shows it: 64 lower-case hexadecimal digits."""

    kind: FreeText
    evidence_sha256: _Sha256Text
    note: _NoteText


class AcceptOutcome(Model, frozen=True, kw_only=True):
    """An acceptance: there is nothing to say but that."""


class OutcomeStanding(Model, frozen=True, kw_only=True):
    """An outcome, and where it stands: submitted or accepted."""

    outcome_id: str
    state: str


class ThemeCostAnswer(Model, frozen=True, kw_only=True):
    """What outcomes of a theme cost: drawn credit of grants with an accepted outcome, per outcome.

    `cost_per_outcome_micro` is `drawn_micro / accepted_count`, half-up to the micro-unit; null
    where no outcome is accepted.
    """

    theme: str | None
    """Null: of programmes without a theme."""
    currency: str
    grant_count: int
    """Grants with an accepted outcome."""
    accepted_count: int
    """Their accepted outcomes."""
    drawn_micro: str
    cost_per_outcome_micro: str | None


class Outcomes(Resource):
    """Outcomes take two people, and enter nothing."""

    def __init__(self, kit: Kit, commands: Commands) -> None:
        self._kit = kit
        self._commands = commands

    @post(
        "/v1/grants/{grant_id}/outcomes",
        roles=(Role.OFFICER,),
        body=SubmitOutcome,
        answer=OutcomeStanding,
        status=201,
        idempotent=True,
        problems=("not-approved", "too-many-outcomes"),
    )
    async def submit_outcome(self, request: Request, grant_id: str) -> Response:
        """Put on record what was achieved with a grant; it counts once another key accepts it."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            grant = await find_grant(connection, grant_id)
        if grant is None:
            raise Problem("not-found", "no such grant")
        command = await read_command(request, SubmitOutcome)
        outcome = GrantOutcome(
            outcome_id=OutcomeId(id_from_command("o", grant.tenant_id, command.key)),
            grant_id=GrantId(grant_id),
            tenant_id=grant.tenant_id,
            kind=command.body.kind,
            evidence_sha256=command.body.evidence_sha256,
            note=command.body.note,
            submitted_by=KeyId(principal.key_id),
        )

        async def run(connection: Connection) -> Answer:
            refused = await self._commands.submit_outcome(connection, outcome)
            if refused is not None:
                raise problem_of(refused)
            return Answer(201, OutcomeStanding(outcome_id=outcome.outcome_id, state=outcome.state))

        return await run_command(
            self._kit.api, command, run, scope=grant.tenant_id, tenant=principal.sees
        )

    @post(
        "/v1/grants/{grant_id}/outcomes/{outcome_id}/accept",
        roles=(Role.APPROVER, Role.OFFICER),
        body=AcceptOutcome,
        answer=OutcomeStanding,
        idempotent=True,
        problems=("maker-is-checker", "already-decided", "not-approved"),
    )
    async def accept_outcome(self, request: Request, grant_id: str, outcome_id: str) -> Response:
        """Accept an outcome that another key submitted: the next tranche may be approved."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            outcome = await find_outcome(connection, grant_id, outcome_id)
        accepter = KeyId(principal.key_id)
        # Officers may not accept at all, but the submitter is told the better reason.
        refused = refuse_accepter(outcome, accepter, principal.role)
        if refused is not None:
            raise problem_of(refused)
        if outcome is None:
            raise Problem("not-found", "no such outcome of this grant")
        command = await read_command(request, AcceptOutcome)

        async def run(connection: Connection) -> Answer:
            refused = await self._commands.accept_outcome(
                connection, grant_id, outcome_id, accepter, principal.role
            )
            if refused is not None:
                raise problem_of(refused)
            return Answer(200, OutcomeStanding(outcome_id=outcome_id, state="accepted"))

        return await run_command(
            self._kit.api, command, run, scope=outcome.tenant_id, tenant=principal.sees
        )

    @get("/v1/outcomes/by-theme", roles=REPORT_READERS, answer=ThemeCostAnswer, paged=True)
    async def list_theme_costs(self, request: Request) -> Response:
        """What accepted outcomes cost, by the theme of programmes."""
        principal = await self._kit.access.authorise(request)
        page = page_of(request, tuple[str, str])
        after = page.after or ("", "")
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            found = await theme_costs(connection, after, page.limit + 1)
        answers = [_theme_cost_answer(cost) for cost in found]
        return page_response(answers, page, lambda answer: (answer.theme or "", answer.currency))


def _theme_cost_answer(cost: ThemeCost) -> ThemeCostAnswer:
    each_micro = cost.micro_per_outcome
    return ThemeCostAnswer(
        theme=cost.theme,
        currency=cost.currency,
        grant_count=cost.grant_count,
        accepted_count=cost.outcome_count,
        drawn_micro=str(cost.drawn_micro),
        cost_per_outcome_micro=None if each_micro is None else str(each_micro),
    )
