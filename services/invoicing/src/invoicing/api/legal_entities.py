"""`/v1/legal-entities`: who sells; one legal entity in this version, fixed once registered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, assert_never

from fastapi import Request, Response
from msgspec import Meta, Struct

from hisab_contracts.ids import IdText, LegalEntityId
from hisab_contracts.reference import Role
from invoicing.api.access import MONEY_ROLES
from invoicing.commands import add_legal_entity
from invoicing.core.sellers import SecondSeller, Seller, SellerNameDiffers
from invoicing.store import reference
from runtime.database import ALL_TENANTS
from runtime.http import Model, Problem, Resource, get, page_of, page_response, post
from runtime.idempotency import Answer, read_command, run_command
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection


class LegalEntity(Model, frozen=True):
    """Who sells."""

    legal_entity_id: IdText
    name: Annotated[str, Meta(min_length=1, max_length=200)]


class LegalEntityAnswer(Struct, frozen=True):
    """Who sells, and the series of its invoices."""

    legal_entity_id: str
    name: str
    series: str


class LegalEntities(Resource):
    """`/v1/legal-entities`: register who sells, list who does."""

    def __init__(self, kit: Kit) -> None:
        """Serve from this kit."""
        self._kit = kit

    @post(
        "/v1/legal-entities",
        roles=(Role.OPERATOR,),
        body=LegalEntity,
        answer=LegalEntityAnswer,
        status=201,
        problems=("unsupported", "already-exists"),
        idempotent=True,
    )
    async def add_legal_entity(self, request: Request) -> Response:
        """Register who sells; one legal entity in this version."""
        principal = await self._kit.access.authorise(request)
        command = await read_command(request, LegalEntity)
        legal_entity_id = LegalEntityId(command.body.legal_entity_id)

        async def run(connection: Connection) -> Answer:
            registered = await add_legal_entity(
                connection, legal_entity_id, command.body.name, actor=principal.actor
            )
            match registered:
                case Seller():
                    return Answer(201, _answer(registered))
                case SecondSeller():
                    raise Problem("unsupported", "one legal entity sells in this version")
                case SellerNameDiffers():
                    raise Problem("already-exists", "this legal entity has another name")
                case _:
                    assert_never(registered)

        return await run_command(
            self._kit.api, command, run, scope=principal.role_scope, tenant=ALL_TENANTS
        )

    @get("/v1/legal-entities", roles=MONEY_ROLES, answer=LegalEntityAnswer, paged=True)
    async def legal_entities(self, request: Request) -> Response:
        """Who sells."""
        await self._kit.access.authorise(request)
        page = page_of(request, tuple[str])
        async with self._kit.api.transaction(tenant=ALL_TENANTS) as connection:
            sellers = await reference.sellers(connection)
        (after,) = page.after or ("",)
        shown = [_answer(seller) for seller in sellers if seller.legal_entity_id > after]
        return page_response(shown, page, lambda answer: (answer.legal_entity_id,))


def _answer(seller: Seller) -> LegalEntityAnswer:
    return LegalEntityAnswer(
        legal_entity_id=seller.legal_entity_id, name=seller.name, series=seller.series
    )
