"""Balances: what a tenant has, owes and has reserved, and the sum over all books."""

from __future__ import annotations

import hashlib

from fastapi import Request, Response

from hisab_contracts.reference import Role
from hisab_contracts.units import instant_text, optional_instant_text
from ledger.api.requests import READERS, parse_instant
from ledger.core.balance import Balance
from ledger.core.prepayments import PREPAID
from ledger.placement import TenantPartitions
from ledger.store.queries import TrialBalance, balance_of, trial_balance
from runtime.auth import require_own_tenant
from runtime.clock import now_ms
from runtime.http import Model, Problem, Resource, cached_response, encode, get, json_response
from runtime.service import Kit


class LotAnswer(Model, frozen=True, kw_only=True):
    """One lot whose window has not ended; `available_micro` counts those that are open now."""

    grant_id: str
    source: str
    """`programme`, or `prepaid`: the tenant paid for it."""
    remaining_micro: str
    reserved_micro: str
    expires_at: str | None


class AsOf(Model, frozen=True, kw_only=True):
    """How fresh an answer is: the last entry it includes, and until when usage is complete."""

    seq: str
    recorded_at: str | None
    complete_until: str | None


class BalanceAnswer(Model, frozen=True, kw_only=True):
    """charged = funded + receivable + invoiced + settled + unfunded."""

    available_micro: str
    is_suspended: bool
    """No new hold is placed, whatever is available."""
    held_micro: str
    charged_micro: str
    funded_micro: str
    receivable_micro: str
    invoiced_micro: str
    settled_micro: str
    unfunded_micro: str
    breakage_micro: str
    """What expired of the tenant's lots and was not taken back."""
    credit_limit_micro: str
    lots: list[LotAnswer]
    as_of: AsOf


class AccountAnswer(Model, frozen=True, kw_only=True):
    """One account, summed over all books."""

    account: str
    balance_micro: str


class TrialBalanceAsOf(Model, frozen=True, kw_only=True):
    """What the sums include."""

    recorded_at: str
    entries: str


class TrialBalanceAnswer(Model, frozen=True, kw_only=True):
    """Every account; the sum is 0."""

    accounts: list[AccountAnswer]
    sum_micro: str
    as_of: TrialBalanceAsOf


class Balances(Resource):
    """A tenant's balance, and the trial balance of all books."""

    def __init__(self, kit: Kit, partitions: TenantPartitions) -> None:
        self._kit = kit
        self._partitions = partitions

    @get(
        "/v1/tenants/{tenant_id}/balance",
        roles=(Role.SCHEDULER, *READERS),
        others={Role.TENANT: "not-found"},
        answer=BalanceAnswer,
        query=("as_of", "basis"),
        problems=("unsupported",),
    )
    async def get_balance(self, request: Request, tenant_id: str) -> Response:
        """What a tenant has, owes and has reserved, and how fresh that is."""
        principal = await self._kit.access.authorise(request)
        require_own_tenant(principal, tenant_id)
        partition = self._partitions.of(tenant_id)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            balance = await balance_of(connection, tenant_id, now_ms(), partition)
        if balance is None:
            raise Problem("not-found", "no such tenant")
        if request.query_params.get("basis", "effective") not in ("effective", "recorded"):
            raise Problem("malformed", "basis is effective or recorded")
        if "as_of" in request.query_params:
            parse_instant(request.query_params["as_of"], "as_of")
            raise Problem("unsupported", "balances of other instants come later; leave out as_of")
        answer = _balance_answer(balance)
        # Over the whole answer: lots open and close, and holds end, without an entry.
        etag = hashlib.sha256(encode(answer)).hexdigest()[:32]
        return cached_response(request, answer, etag=etag)

    @get("/v1/trial-balance", roles=(Role.AUDITOR, Role.OPERATOR), answer=TrialBalanceAnswer)
    async def get_trial_balance(self, request: Request) -> Response:
        """Every account over all books; the sum is 0."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            found = await trial_balance(connection)
        return json_response(_trial_balance_answer(found))


def _balance_answer(balance: Balance) -> BalanceAnswer:
    """Write a balance as it is answered."""
    book, until_ms = balance.book, balance.complete_until_ms
    return BalanceAnswer(
        available_micro=str(balance.available_micro),
        is_suspended=book.is_suspended,
        held_micro=str(balance.held_micro),
        charged_micro=str(book.charged_micro),
        funded_micro=str(book.funded_micro),
        receivable_micro=str(book.receivable_micro),
        invoiced_micro=str(book.invoiced_micro),
        settled_micro=str(book.settled_micro),
        unfunded_micro=str(book.unfunded_micro),
        breakage_micro=str(book.breakage_micro),
        credit_limit_micro=str(book.credit_limit_micro),
        lots=[
            LotAnswer(
                grant_id=lot.grant_id,
                source="prepaid" if lot.programme_id == PREPAID else "programme",
                remaining_micro=str(lot.remaining_micro),
                reserved_micro=str(lot.reserved_micro),
                expires_at=optional_instant_text(lot.expires_ms),
            )
            for lot in balance.lots
        ],
        as_of=AsOf(
            seq=str(book.seq),
            recorded_at=instant_text(book.recorded_ms) if book.seq else None,
            complete_until=optional_instant_text(until_ms),
        ),
    )


def _trial_balance_answer(found: TrialBalance) -> TrialBalanceAnswer:
    """Write the trial balance as it is answered."""
    return TrialBalanceAnswer(
        accounts=[
            AccountAnswer(account=account, balance_micro=str(micro))
            for account, micro in found.accounts.items()
        ],
        sum_micro=str(sum(found.accounts.values())),
        as_of=TrialBalanceAsOf(
            recorded_at=instant_text(found.recorded_ms), entries=str(found.entries)
        ),
    )
