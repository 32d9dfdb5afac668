"""The forms of the ledger's HTTP API: what requests say and how answers read. No decisions.

Amounts and `seq` are JSON strings, instants RFC 3339 UTC with milliseconds. Request models are
strict: unknown members are refused, integers are never taken from strings or floats.
"""

from __future__ import annotations

import re
from typing import Annotated

from msgspec import Meta, Raw, field

from hisab_contracts.entries import ChargeDetail, Entry, GrantDetail, HoldDetail
from hisab_contracts.events import EARLIEST_MS, LATEST_MS
from hisab_contracts.ids import HUB_PATTERN, ID_PATTERN
from hisab_contracts.reference import TenantKind
from hisab_contracts.units import MAX_MICRO, instant_ms, instant_text
from ledger.holds import HoldState
from ledger.statements import Balance, TrialBalance
from runtime.auth import Role
from runtime.http import IntegerText, Model, Problem

_Id = Annotated[str, Meta(pattern=f"^{ID_PATTERN}$")]
_Hub = Annotated[str, Meta(pattern=f"^{HUB_PATTERN}$")]
_Text = Annotated[str, Meta(min_length=1, max_length=200)]
_Currency = Annotated[str, Meta(pattern="^[A-Z]{3}$")]
_INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,3})?(Z|[+-]\d\d:\d\d)")


class OpenTenant(Model, frozen=True, kw_only=True):
    """A new tenant."""

    tenant_id: _Id
    name: _Text
    kind: TenantKind
    currency: _Currency
    credit_limit_micro: IntegerText


class TenantAnswer(Model, frozen=True, kw_only=True):
    """A tenant as registered."""

    tenant_id: str
    name: str
    kind: str
    currency: str
    credit_limit_micro: str
    projects: list[str]


class OpenProgramme(Model, frozen=True, kw_only=True):
    """A new programme with its budget."""

    programme_id: _Id
    name: _Text
    budget_micro: IntegerText


class MakeKey(Model, frozen=True, kw_only=True):
    """A new API key: a tenant's names its tenant, a hub's its hub."""

    role: Role
    tenant_id: _Id | None = None
    hub: _Hub | None = None


class KeyAnswer(Model, frozen=True, kw_only=True):
    """A key; its secret is shown once and null in every repeat."""

    key_id: str
    secret: str | None


class RevokedKey(Model, frozen=True, kw_only=True):
    """A key that no longer opens anything."""

    key_id: str
    state: str


class ProposeGrant(Model, frozen=True, kw_only=True):
    """A grant as proposed: both ends of its window on whole UTC hours."""

    tenant_id: _Id
    programme_id: _Id
    grant_micro: IntegerText
    priority: Annotated[int, Meta(ge=-1000, le=1000)]
    effective_at: str
    expires_at: str | None
    scope: dict[str, Raw] = field(default_factory=dict)
    coverage_bps: Annotated[int, Meta(ge=0, le=10_000)] = 10_000
    tax_effect: str = "tender"


class GrantAnswer(Model, frozen=True, kw_only=True):
    """Where a grant stands."""

    grant_id: str
    state: str


class AskHold(Model, frozen=True, kw_only=True):
    """May this job start? Its amount, or GPUs, price class and duration to price it by."""

    tenant_id: _Id
    project_id: Annotated[str, Meta(min_length=1, max_length=128)] = "main"
    job_ref: _Text
    allocation_id: _Id | None = None
    hub: _Hub
    sku: _Id
    hold_micro: IntegerText | None = None
    price_class: _Id | None = None
    gpus: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    duration_ms: Annotated[int, Meta(ge=1, le=10**12)] | None = None
    expires_at: str


class HoldAnswer(Model, frozen=True, kw_only=True):
    """A hold, and what its tenant has available."""

    hold_id: str
    state: str
    """`open` or `released`."""
    ended_by: str | None
    """`final`, `released` or `expired`; null while it is open."""
    hold_micro: str
    open_micro: str
    available_micro: str


class LotAnswer(Model, frozen=True, kw_only=True):
    """One open lot."""

    grant_id: str
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
    held_micro: str
    charged_micro: str
    funded_micro: str
    receivable_micro: str
    invoiced_micro: str
    settled_micro: str
    unfunded_micro: str
    credit_limit_micro: str
    lots: list[LotAnswer]
    as_of: AsOf


class PostingAnswer(Model, frozen=True, kw_only=True):
    """One account's change, and what it holds after it."""

    account: str
    posting_micro: str
    balance_micro: str


class ChargeAnswer(Model, frozen=True, kw_only=True):
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


class ReservedAnswer(Model, frozen=True, kw_only=True):
    """An amount reserved on a lot (`lot:<grant>`) or on the credit limit (`limit`)."""

    place: str
    reserved_micro: str


class HoldEntryAnswer(Model, frozen=True, kw_only=True):
    """A hold placed or released, and where it reserved at that moment."""

    hold_id: str
    hold_micro: str
    open_micro: str
    reserved: list[ReservedAnswer]
    cause: str
    allocation_id: str | None
    expires_at: str


class GrantEntryAnswer(Model, frozen=True, kw_only=True):
    """The terms of a lot as granted."""

    grant_id: str
    programme_id: str
    grant_micro: str
    priority: int
    effective_at: str
    expires_at: str | None


class EntryAnswer(Model, frozen=True, kw_only=True, omit_defaults=True):
    """One entry of a book; `charge`, `hold` and `grant` stand in entries of that kind only."""

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


class Invoiced(Model, frozen=True, kw_only=True):
    """A finalised document and the ledger amount it bills."""

    document_id: _Id
    period: Annotated[str, Meta(pattern=r"^\d{4}-(0[1-9]|1[0-2])$")]
    invoiced_micro: IntegerText
    first_seq: IntegerText
    last_seq: IntegerText


class InvoicedAnswer(Model, frozen=True, kw_only=True):
    """The entry that was made."""

    entry_id: str
    seq: str


def micro_of(text: str, name: str, *, least: int) -> int:
    """Read an amount; 422 below `least` or beyond 64 bits."""
    micro = int(text)
    if not least <= micro <= MAX_MICRO:
        raise Problem("malformed", f"{name} is a whole number from {least} to {MAX_MICRO}")
    return micro


def instant_of(text: str, name: str) -> int:
    """Read an RFC 3339 instant in milliseconds; 422 for anything else."""
    try:
        if _INSTANT.fullmatch(text) is None:
            raise ValueError("write it like 2025-07-01T00:00:00.000Z")  # noqa: TRY301
        read_ms = instant_ms(text)
    except ValueError as error:
        raise Problem("malformed", f"{name}: {error}") from error
    if not EARLIEST_MS <= read_ms < LATEST_MS:
        raise Problem("malformed", f"{name} lies between 2020 and 2100")
    return read_ms


def hold_answer(state: HoldState) -> HoldAnswer:
    """Write a hold as it is answered."""
    return HoldAnswer(
        hold_id=state.hold_id,
        state="open" if state.state == "open" else "released",
        ended_by=None if state.state == "open" else state.state,
        hold_micro=str(state.hold_micro),
        open_micro=str(state.open_micro),
        available_micro=str(state.available_micro),
    )


def balance_answer(balance: Balance) -> BalanceAnswer:
    """Write a balance as it is answered."""
    book, until_ms = balance.book, balance.complete_until_ms
    return BalanceAnswer(
        available_micro=str(balance.available_micro),
        held_micro=str(balance.held_micro),
        charged_micro=str(book.charged_micro),
        funded_micro=str(book.funded_micro),
        receivable_micro=str(book.receivable_micro),
        invoiced_micro=str(book.invoiced_micro),
        settled_micro=str(book.settled_micro),
        unfunded_micro=str(book.unfunded_micro),
        credit_limit_micro=str(book.credit_limit_micro),
        lots=[
            LotAnswer(
                grant_id=lot.grant_id,
                remaining_micro=str(lot.remaining_micro),
                reserved_micro=str(lot.reserved_micro),
                expires_at=None if lot.expires_ms is None else instant_text(lot.expires_ms),
            )
            for lot in balance.lots
        ],
        as_of=AsOf(
            seq=str(book.seq),
            recorded_at=instant_text(book.recorded_ms) if book.seq else None,
            complete_until=None if until_ms is None else instant_text(until_ms),
        ),
    )


def trial_balance_answer(found: TrialBalance) -> TrialBalanceAnswer:
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


def entry_answer(entry: Entry) -> EntryAnswer:
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
    )


def _hold_entry_answer(hold: HoldDetail) -> HoldEntryAnswer:
    return HoldEntryAnswer(
        hold_id=hold.hold_id,
        hold_micro=str(hold.hold_micro),
        open_micro=str(hold.open_micro),
        reserved=[
            ReservedAnswer(place=place, reserved_micro=str(micro)) for place, micro in hold.reserved
        ],
        cause=hold.cause,
        allocation_id=hold.allocation_id,
        expires_at=instant_text(hold.expires_ms),
    )


def _grant_entry_answer(grant: GrantDetail) -> GrantEntryAnswer:
    return GrantEntryAnswer(
        grant_id=grant.grant_id,
        programme_id=grant.programme_id,
        grant_micro=str(grant.grant_micro),
        priority=grant.priority,
        effective_at=instant_text(grant.effective_ms),
        expires_at=None if grant.expires_ms is None else instant_text(grant.expires_ms),
    )
