"""`/v1/tenants/{tenant_id}/entries`: a book as it was hashed."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import Request, Response

from hisab_contracts.entries import (
    ChargeDetail,
    Entry,
    GrantDetail,
    GrantScope,
    HoldDetail,
    LimitDetail,
    LotDetail,
)
from hisab_contracts.reference import Role
from hisab_contracts.units import MAX_MICRO, instant_text, optional_instant_text
from ledger.api.approvals import REVERSAL_PROBLEMS, Approvals, ProposedAnswer
from ledger.api.requests import READERS, ReasonText
from ledger.core.lots import Draw
from ledger.core.proposals import reversal_of
from ledger.store.directory import find_tenant
from ledger.store.entries import entries_after, find_entry
from runtime.auth import require_own_tenant
from runtime.http import (
    Model,
    Position,
    Problem,
    Resource,
    get,
    page_of,
    page_response,
    post,
    query_integer,
)
from runtime.idempotency import read_command
from runtime.service import Kit


class PostingAnswer(Model, frozen=True, kw_only=True):
    """One account's change, and what it holds after it."""

    account: str
    posting_micro: str
    balance_micro: str


class ReservedAnswer(Model, frozen=True, kw_only=True):
    """An amount reserved on a lot (`lot:<grant>`) or on the credit limit (`limit`)."""

    place: str
    reserved_micro: str


class ChargeAnswer(Model, frozen=True, kw_only=True, omit_defaults=True):
    """Which bucket a charge belongs to."""

    allocation_id: str
    project_id: str
    hold_id: str | None
    hub: str
    node_id: str
    sku: str
    price_class: str
    hour_at: str
    gpu_ns: str
    charge_micro: str
    price_version: str
    bucket_id: str
    revision: int
    over_limit: bool
    refunded_micro: str | None = None
    """What more of the bucket was refunded: `charge_micro` is less by it."""
    reserved: list[ReservedAnswer] | None = None
    """By how much the reservations of its open hold changed, place by place."""
    short_micro: str | None = None
    """What more its hold is short of."""


class HoldEntryAnswer(Model, frozen=True, kw_only=True, omit_defaults=True):
    """A hold placed, moved or released, and where it reserved at that moment."""

    hold_id: str
    hold_micro: str
    open_micro: str
    reserved: list[ReservedAnswer]
    cause: str
    allocation_id: str | None
    expires_at: str
    short_micro: str | None = None


class GrantEntryAnswer(Model, frozen=True, kw_only=True, omit_defaults=True):
    """The terms of a lot as granted."""

    grant_id: str
    programme_id: str
    grant_micro: str
    priority: int
    effective_at: str
    expires_at: str | None
    source: str | None = None
    scope: GrantScope | None = None
    coverage_bps: int | None = None
    tax_effect: str | None = None


class LotEntryAnswer(Model, frozen=True, kw_only=True, omit_defaults=True):
    """What changed of a lot beside its balance: when it ends, or what was reclaimed of it."""

    grant_id: str
    expires_at: str | None = None
    reclaimed_micro: str | None = None


class LimitEntryAnswer(Model, frozen=True, kw_only=True):
    """The credit limit that holds from this entry on."""

    credit_limit_micro: str


class EntryAnswer(Model, frozen=True, kw_only=True, omit_defaults=True):
    """One entry of a book; what only some kinds have stands in entries of those kinds only.

    A member that may be left out is left out where it is null, as it is in what was hashed.
    """

    seq: str
    entry_id: str
    kind: str
    effective_at: str
    recorded_at: str
    postings: list[PostingAnswer]
    caused_by: str
    actor: str
    prev_hash: str
    hash: str
    charge: ChargeAnswer | None = None
    hold: HoldEntryAnswer | None = None
    grant: GrantEntryAnswer | None = None
    lot: LotEntryAnswer | None = None
    reverses: str | None = None
    reason: str | None = None
    limit: LimitEntryAnswer | None = None


class ProposeReversal(Model, frozen=True, kw_only=True):
    """Why an entry should not have been made."""

    reason: ReasonText


class Entries(Resource):
    """The entries of a book, ascending: all that their hashes cover."""

    def __init__(self, kit: Kit, approvals: Approvals) -> None:
        self._kit = kit
        self._approvals = approvals

    @get(
        "/v1/tenants/{tenant_id}/entries",
        roles=READERS,
        others={Role.TENANT: "not-found"},
        answer=EntryAnswer,
        paged=True,
        query=("after_seq",),
    )
    async def get_entries(self, request: Request, tenant_id: str) -> Response:
        """A book's entries after a position, ascending: all that its hashes cover."""
        principal = await self._kit.access.authorise(request)
        require_own_tenant(principal, tenant_id)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            if await find_tenant(connection, tenant_id) is None:
                raise Problem("not-found", "no such tenant")
            page = page_of(request, tuple[Position])
            after_seq = query_integer(request, "after_seq", default=0, most=MAX_MICRO)
            # A cursor was given by the page before, so it is further than where the list began.
            if page.after is not None:
                (after_seq,) = page.after
            found = await entries_after(connection, tenant_id, after_seq, page.limit + 1)
        answers = [_entry_answer(entry) for entry in found]
        return page_response(answers, page, lambda entry: (int(entry.seq),))

    @post(
        "/v1/entries/{entry_id}/reverse",
        roles=(Role.OFFICER, Role.FINANCE),
        body=ProposeReversal,
        answer=ProposedAnswer,
        status=202,
        idempotent=True,
        problems=REVERSAL_PROBLEMS,
    )
    async def propose_reversal(self, request: Request, entry_id: str) -> Response:
        """Propose to negate an entry; it is once an approver has approved it."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            entry = await find_entry(connection, entry_id)
        if entry is None:
            raise Problem("not-found", "no such entry")
        command = await read_command(request, ProposeReversal)
        terms = reversal_of(entry, command.body.reason)
        return await self._approvals.propose(principal, command, terms)


def _entry_answer(entry: Entry) -> EntryAnswer:
    """Write an entry as it is answered: everything its hash covers."""
    return EntryAnswer(
        seq=str(entry.seq),
        entry_id=entry.entry_id,
        kind=entry.kind,
        effective_at=instant_text(entry.effective_ms),
        recorded_at=instant_text(entry.recorded_ms),
        postings=[
            PostingAnswer(
                account=posting.account,
                posting_micro=str(posting.posting_micro),
                balance_micro=str(posting.balance_micro),
            )
            for posting in entry.postings
        ],
        caused_by=entry.caused_by,
        actor=entry.actor,
        prev_hash=entry.prev_hash,
        hash=entry.hash,
        charge=None if entry.charge is None else _charge_answer(entry.charge),
        hold=None if entry.hold is None else _hold_entry_answer(entry.hold),
        grant=None if entry.grant is None else _grant_entry_answer(entry.grant),
        lot=None if entry.lot is None else _lot_entry_answer(entry.lot),
        reverses=entry.reverses,
        reason=entry.reason,
        limit=None if entry.limit is None else _limit_entry_answer(entry.limit),
    )


def _charge_answer(charge: ChargeDetail) -> ChargeAnswer:
    return ChargeAnswer(
        allocation_id=charge.allocation_id,
        project_id=charge.project_id,
        hold_id=charge.hold_id,
        hub=charge.hub,
        node_id=charge.node_id,
        sku=charge.sku,
        price_class=charge.price_class,
        hour_at=instant_text(charge.hour_ms),
        gpu_ns=str(charge.gpu_ns),
        charge_micro=str(charge.charge_micro),
        price_version=charge.price_version,
        bucket_id=charge.bucket_id,
        revision=charge.revision,
        over_limit=charge.over_limit,
        refunded_micro=None if charge.refunded_micro is None else str(charge.refunded_micro),
        reserved=None if charge.reserved is None else _reserved_answers(charge.reserved),
        short_micro=None if charge.short_micro is None else str(charge.short_micro),
    )


def _hold_entry_answer(hold: HoldDetail) -> HoldEntryAnswer:
    return HoldEntryAnswer(
        hold_id=hold.hold_id,
        hold_micro=str(hold.hold_micro),
        open_micro=str(hold.open_micro),
        reserved=_reserved_answers(hold.reserved),
        cause=hold.cause,  # `placed`, `extended`, `moved`, or what a hold is `ended_by`
        allocation_id=hold.allocation_id,
        expires_at=instant_text(hold.expires_ms),
        short_micro=None if hold.short_micro is None else str(hold.short_micro),
    )


def _reserved_answers(reserved: Iterable[Draw]) -> list[ReservedAnswer]:
    return [ReservedAnswer(place=place, reserved_micro=str(micro)) for place, micro in reserved]


def _grant_entry_answer(grant: GrantDetail) -> GrantEntryAnswer:
    return GrantEntryAnswer(
        grant_id=grant.grant_id,
        programme_id=grant.programme_id,
        grant_micro=str(grant.grant_micro),
        priority=grant.priority,
        effective_at=instant_text(grant.effective_ms),
        expires_at=optional_instant_text(grant.expires_ms),
        source=grant.source,
        scope=grant.scope,
        coverage_bps=grant.coverage_bps,
        tax_effect=grant.tax_effect,
    )


def _lot_entry_answer(lot: LotDetail) -> LotEntryAnswer:
    return LotEntryAnswer(
        grant_id=lot.grant_id,
        expires_at=optional_instant_text(lot.expires_ms),
        reclaimed_micro=None if lot.reclaimed_micro is None else str(lot.reclaimed_micro),
    )


def _limit_entry_answer(limit: LimitDetail) -> LimitEntryAnswer:
    return LimitEntryAnswer(credit_limit_micro=str(limit.credit_limit_micro))
