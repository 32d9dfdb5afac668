"""`/v1/price-lists` and `/v1/quotes`: what a GPU-hour costs, and what a job would cost.

A list is refused with 409 `price-overlap` or `price-past`, a quote with 409 `no-price`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
from fastapi import Request, Response

from hisab_contracts.currencies import CurrencyText
from hisab_contracts.ids import IdText, PriceClass, Sku
from hisab_contracts.reference import Role
from metering.api.problems import problem_of
from metering.api.requests import FIRST_HOUR_MS, read_whole_hour
from metering.commands import add_price_list, quote
from metering.core.pricing import (
    MAX_MICRO_PER_GPU_HOUR,
    ListedPrice,
    NotPriced,
    PriceList,
    PriceListRefused,
)
from runtime.http import IntegerText, Model, Problem, Resource, json_response, post, read_body
from runtime.idempotency import Answer, read_command, run_command
from runtime.outbox import Outbox
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection


class PriceView(Model, frozen=True, kw_only=True):
    """One price of a list."""

    sku: IdText
    price_class: IdText
    micro_per_gpu_hour: IntegerText


class ProposedPrices(Model, frozen=True, kw_only=True):
    """A price list."""

    currency: CurrencyText
    valid_from: str | None
    valid_until: str | None
    prices: Annotated[list[PriceView], msgspec.Meta(min_length=1, max_length=1_000)]


class PriceVersionAnswer(msgspec.Struct, frozen=True):
    """The content hash of a list that was added."""

    price_version: str


class QuoteRequest(Model, frozen=True, kw_only=True):
    """What a job would take: whole devices for a duration."""

    sku: IdText
    price_class: IdText
    gpus: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    duration_ms: Annotated[int, msgspec.Meta(ge=1, le=366 * 86_400_000)]


class Quote(msgspec.Struct, frozen=True):
    """What it would cost at the price in force now."""

    quote_micro: str
    price_version: str


class Prices(Resource):
    """`/v1/price-lists` and `/v1/quotes`."""

    def __init__(self, kit: Kit, outbox: Outbox) -> None:
        """Write new price lines to this outbox."""
        self._kit = kit
        self._outbox = outbox

    @post(
        "/v1/price-lists",
        roles=(Role.OPERATOR,),
        body=ProposedPrices,
        answer=PriceVersionAnswer,
        status=201,
        idempotent=True,
        problems=("price-overlap", "price-past"),
    )
    async def add_prices(self, request: Request) -> Response:
        """Add a price list; its lines are in force from their start on, for ever unchanged."""
        principal = await self._kit.access.authorise(request)
        command = await read_command(request, ProposedPrices)
        price_list = _price_list(command.body)

        async def run(connection: Connection) -> Answer:
            version = await add_price_list(connection, self._outbox, price_list, principal.key_id)
            if isinstance(version, PriceListRefused):
                raise problem_of(version)
            return Answer(201, PriceVersionAnswer(version))

        return await run_command(
            self._kit.api, command, run, scope=principal.role_scope, tenant=principal.sees
        )

    @post(
        "/v1/quotes",
        roles=(Role.OPERATOR, Role.AUDITOR, Role.SCHEDULER, Role.TENANT),
        others={Role.TENANT: "own"},
        body=QuoteRequest,
        answer=Quote,
        problems=("no-price",),
    )
    async def quote(self, request: Request) -> Response:
        """Price whole devices for a duration at what is in force now."""
        principal = await self._kit.access.authorise(request)
        body = await read_body(request, QuoteRequest)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            quoted = await quote(
                connection,
                principal.tenant_id,
                Sku(body.sku),
                PriceClass(body.price_class),
                gpus=body.gpus,
                duration_ms=body.duration_ms,
            )
        if isinstance(quoted, NotPriced):
            raise problem_of(quoted)
        return json_response(Quote(str(quoted.quoted_micro), quoted.price_version))


def _price_list(body: ProposedPrices) -> PriceList:
    """Read a proposed list; raises `Problem` 422 for windows off the hour and prices too high."""
    from_ms = FIRST_HOUR_MS
    if body.valid_from is not None:
        from_ms = read_whole_hour("valid_from", body.valid_from)
    until_ms = None
    if body.valid_until is not None:
        until_ms = read_whole_hour("valid_until", body.valid_until)
        if until_ms <= from_ms:
            raise Problem("malformed", "valid_until must be after valid_from")
    listed = []
    for price in body.prices:
        micro = int(price.micro_per_gpu_hour)
        if not 0 <= micro <= MAX_MICRO_PER_GPU_HOUR:
            bound = f"micro_per_gpu_hour must be from 0 to {MAX_MICRO_PER_GPU_HOUR}"
            raise Problem("malformed", bound)
        listed.append(ListedPrice(Sku(price.sku), PriceClass(price.price_class), micro))
    return PriceList(body.currency, from_ms, until_ms, tuple(listed))
