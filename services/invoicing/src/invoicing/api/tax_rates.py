"""`/v1/tax-rates`: the tax table, which grows by one dated row at a time.

A new hub, a new authority or a new rate is a row here and a change of no file. Nothing in code
knows an authority: invoices print what the row says, and the citation with it.
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Annotated, assert_never

from fastapi import Request, Response
from msgspec import Meta, Struct

from hisab_contracts.ids import HubCode, HubText
from hisab_contracts.reference import Role
from invoicing.api.access import MONEY_ROLES
from invoicing.commands import add_tax_row
from invoicing.core.tax import TaxRow, TaxRowDiffers
from invoicing.store import tax_rates
from runtime.database import ALL_TENANTS
from runtime.http import Model, Position, Problem, Resource, get, page_of, page_response, post
from runtime.idempotency import Answer, read_command, run_command
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection


class TaxRate(Model, frozen=True):
    """From a Karachi date on, an authority asks so much of what a hub sells, by this law."""

    hub: HubText
    authority: Annotated[str, Meta(min_length=1, max_length=200)]
    tax_bps: Annotated[int, Meta(ge=0, le=10_000)]
    valid_from: dt.date
    citation: Annotated[str, Meta(min_length=1, max_length=500)]


class TaxRateAnswer(Struct, frozen=True):
    """A recorded tax row."""

    tax_version: int
    hub: str
    authority: str
    tax_bps: int
    valid_from: dt.date
    citation: str


class TaxRates(Resource):
    """`/v1/tax-rates`: record a row, list the table."""

    def __init__(self, kit: Kit) -> None:
        """Serve from this kit."""
        self._kit = kit

    @post(
        "/v1/tax-rates",
        roles=(Role.OPERATOR,),
        body=TaxRate,
        answer=TaxRateAnswer,
        status=201,
        problems=("already-exists",),
        idempotent=True,
    )
    async def add_tax_rate(self, request: Request) -> Response:
        """Record a dated tax row; rows are never changed."""
        principal = await self._kit.access.authorise(request)
        command = await read_command(request, TaxRate)
        wanted = _row(command.body)

        async def run(connection: Connection) -> Answer:
            recorded = await add_tax_row(connection, wanted, actor=principal.actor)
            match recorded:
                case TaxRow():
                    return Answer(201, _answer(recorded))
                case TaxRowDiffers():
                    raise Problem("already-exists", "this hub has another row from this date on")
                case _:
                    assert_never(recorded)

        return await run_command(
            self._kit.api, command, run, scope=principal.role_scope, tenant=ALL_TENANTS
        )

    @get("/v1/tax-rates", roles=MONEY_ROLES, answer=TaxRateAnswer, paged=True)
    async def tax_rates(self, request: Request) -> Response:
        """The tax table, in the order it was recorded."""
        await self._kit.access.authorise(request)
        page = page_of(request, tuple[Position])
        (after_version,) = page.after or (0,)
        async with self._kit.api.transaction(tenant=ALL_TENANTS) as connection:
            rows = await tax_rates.tax_rows_after(connection, after_version, page.limit + 1)
        shown = [_answer(row) for row in rows]
        return page_response(shown, page, lambda answer: (answer.tax_version,))


def _row(body: TaxRate) -> TaxRow:
    return TaxRow(
        tax_version=0,
        hub=HubCode(body.hub),
        authority=body.authority,
        tax_bps=body.tax_bps,
        valid_from=body.valid_from,
        citation=body.citation,
    )


def _answer(row: TaxRow) -> TaxRateAnswer:
    return TaxRateAnswer(
        tax_version=row.tax_version,
        hub=row.hub,
        authority=row.authority,
        tax_bps=row.tax_bps,
        valid_from=row.valid_from,
        citation=row.citation,
    )
