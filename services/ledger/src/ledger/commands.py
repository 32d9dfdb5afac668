"""Commands on books: each runs in the caller's transaction and returns its answer or a refusal.

A command locks the books it touches (in id order), has the core decide on them as they are, and
saves. Refusals are values here; `api` turns them into problems. A refusal means that nothing may be
committed: some commands have registered something before the core refuses, so whoever gets one
rolls the transaction back (`api` does so by raising the problem inside it).

What other services have to know of at once (tenants, keys) is written to the outbox in the same
transaction.

Refusals, in order of precedence. Any: `NotFound`. Tenant or programme opened: `AlreadyExists`.
Grant proposed: `CurrencyDiffers`, `GrantExpired`; in a file each row is refused by itself
(`core.grant_files`). Outcome submitted or accepted: those of `core.outcomes`. Anything approved or
rejected: those of `core.proposals`, before those of what it enters. Hold priced: `TenantSuspended`,
`NoPrice`, `PriceOutOfRange`. All others as `core.decisions` says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, assert_never

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from hisab_contracts import topics
from hisab_contracts.entries import Entry
from hisab_contracts.ids import EntryId, GrantId, KeyId, PriceClass, ProgrammeId, Sku, TenantId
from hisab_contracts.invariants import InvariantBroken
from hisab_contracts.prices import PriceBook, PriceSeries
from hisab_contracts.reference import Role, TenantRecord
from ledger.core.adjustments import AddBudget, ChangeCreditLimit, ResumeTenant, SuspendTenant
from ledger.core.book import hold_state
from ledger.core.decisions import BookCommand, BookRefusal, NotFound, UnitOfWork, footprint_of
from ledger.core.directory import PROGRAMME_CURRENCY, book_of_programme, book_of_tenant
from ledger.core.grant_files import (
    ImportFacts,
    RowFault,
    RowOutcome,
    decide_rows,
    grants_to_propose,
    refuse_grant,
)
from ledger.core.grants import ApproveGrant, Grant, ProposalRefusal
from ledger.core.holds import (
    ExtendHold,
    HoldState,
    NoPrice,
    PlaceHold,
    PriceOutOfRange,
    ReleaseHold,
    TenantSuspended,
    price_hold,
)
from ledger.core.movements import RecordInvoiced, SetBudget
from ledger.core.outcomes import (
    AcceptanceRefusal,
    GrantOutcome,
    SubmissionRefusal,
    has_accepted,
    refuse_acceptance,
    refuse_submission,
)
from ledger.core.prepayments import TopUp
from ledger.core.proposals import (
    AlreadyDecided,
    Approval,
    BudgetTerms,
    CreditLimitTerms,
    DecisionForbidden,
    DecisionRefusal,
    GrantTerms,
    Proposal,
    ProposedCommand,
    ReclaimTerms,
    ReverseTerms,
    RevokeTerms,
    entry_ids_of,
    refuse_decision,
    refuse_rejection,
)
from ledger.core.withdrawals import ReclaimExpired, ReverseEntry, RevokeGrant
from ledger.placement import TenantPartitions
from ledger.store import books, directory, entries, outcomes, proposals
from ledger.store.completeness import complete_until_of
from ledger.store.queries import hold_of
from runtime.auth import AccessKey, MintedKey, access_message, mint, store_keys
from runtime.clock import now_ms
from runtime.database import after_commit, checked_now_ms
from runtime.kafka import Message

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from runtime.clock import Clock
    from runtime.database import Connection
    from runtime.outbox import Outbox


PROPOSED: Final = "proposed"
"""The actor of entries that are decided to see whether they could be, and thrown away."""


class Approved(Struct, frozen=True):
    """What was approved, and what that entered."""

    proposal: Proposal
    """As it stood before."""
    entry_ids: tuple[EntryId, ...]


class ImportedGrants(Struct, frozen=True):
    """What the rows of a file came to, in its order, and which of them were proposed."""

    outcomes: tuple[RowOutcome, ...]
    created: frozenset[GrantId]
    known: Mapping[GrantId, Grant]
    """Those of them that were there before."""


class AlreadyExists(Struct, frozen=True):
    """A tenant or programme of this id is registered already."""

    what: str


class Commands:
    """The commands of this process; `committed` is called once an entry is durable."""

    def __init__(
        self,
        outbox: Outbox,
        committed: Callable[[], None],
        partitions: TenantPartitions,
        clock: Clock = now_ms,
    ) -> None:
        """`partitions` says whose usage is complete until when: a grant that is over is refused."""
        self._outbox = outbox
        self._committed = committed
        self._partitions = partitions
        self._clock = clock

    async def open_tenant(
        self, connection: Connection, record: TenantRecord, name: str
    ) -> AlreadyExists | None:
        """Register a tenant with its projects and its empty book."""
        if not await directory.add_tenant(connection, record, name):
            return AlreadyExists(f"tenant {record.tenant_id}")
        await books.insert_book(connection, book_of_tenant(record))
        await self._outbox.write(connection, [_tenant_message(record)])
        return None

    async def open_programme(
        self,
        connection: Connection,
        programme_id: ProgrammeId,
        name: str,
        budget: SetBudget,
        *,
        theme: str | None = None,
        ends_ms: int | None = None,
    ) -> AlreadyExists | BookRefusal | None:
        """Register a programme and enter its budget into its own book."""
        added = await directory.add_programme(
            connection,
            programme_id,
            name,
            PROGRAMME_CURRENCY,
            budget.budget_micro,
            theme=theme,
            ends_ms=ends_ms,
        )
        if not added:
            return AlreadyExists(f"programme {programme_id}")
        book = book_of_programme(programme_id)
        await books.insert_book(connection, book)
        entered = await self._enter(connection, book.tenant_id, budget)
        return None if isinstance(entered, tuple) else entered

    async def make_key(
        self,
        connection: Connection,
        key_id: str,
        role: Role,
        *,
        tenant_id: str | None,
        hub: str | None,
    ) -> MintedKey | NotFound:
        """Make an API key; its secret is in what is returned and nowhere else."""
        if tenant_id and await directory.find_tenant(connection, tenant_id) is None:
            return NotFound("tenant")
        minted = mint(key_id, role, tenant_id=tenant_id, bound_to=hub)
        await self._keep_key(connection, minted.access_key)
        return minted

    async def revoke_key(self, connection: Connection, access_key: AccessKey) -> None:
        """Revoke a key: refused here at once, everywhere within seconds."""
        await self._keep_key(connection, replace(access_key, revoked=True))

    async def _keep_key(self, connection: Connection, access_key: AccessKey) -> None:
        """Store a key here at once, and tell the other services in the same transaction."""
        await store_keys(connection, [access_key])
        await self._outbox.write(connection, [access_message(access_key)])

    async def limit_key(
        self, connection: Connection, key_id: str, up_to_micro: int | None, *, actor: str
    ) -> None:
        """Say how much a key may approve: in force for every approval that begins afterwards."""
        await proposals.keep_approval_limit(connection, key_id, up_to_micro, actor)

    async def propose(self, connection: Connection, proposal: Proposal) -> BookRefusal | None:
        """Store a proposal of any kind but a grant; refused as its approval would be now."""
        # Decided, and thrown away: whoever proposes learns at once what cannot be, and nothing is
        # entered before somebody else approves.
        command = await self._command_of(connection, proposal, PROPOSED)
        book_id = proposal.terms.book_id
        unit = await self._open(connection, book_id, command)
        decided = unit.enter(book_id, command)
        if not isinstance(decided, tuple):
            return decided
        await proposals.add_proposal(connection, proposal)
        return None

    async def propose_grant(
        self, connection: Connection, grant: Grant
    ) -> NotFound | ProposalRefusal | None:
        """Store a proposal; nothing is entered before somebody else approves."""
        if grant.after_grant is not None:
            earlier = await directory.find_grant(connection, grant.after_grant)
            if earlier is None or earlier.tenant_id != grant.tenant_id:
                return NotFound("grant of this tenant for it to come after")
        facts = await self._import_facts(connection, [grant])
        refused = refuse_grant(
            grant,
            tenant_currency=facts.tenant_currencies.get(grant.tenant_id),
            programme_currency=facts.programme_currencies.get(grant.programme_id),
            complete_until_ms=facts.complete_until_ms[grant.tenant_id],
        )
        if refused is not None:
            return refused
        if not await directory.add_grants(connection, [grant]):
            raise InvariantBroken(f"the command that proposed {grant.grant_id} runs once")
        return None

    async def import_grants(
        self,
        connection: Connection,
        rows: Sequence[Grant | RowFault],
        *,
        partial: bool,
        dry_run: bool,
    ) -> ImportedGrants:
        """Store proposals for the rows of a file, or with `dry_run` say what would be stored."""
        grants = [row for row in rows if isinstance(row, Grant)]
        facts = await self._import_facts(connection, grants)
        outcomes = decide_rows(rows, facts)
        chosen = grants_to_propose(outcomes, partial=partial)
        chosen_ids = frozenset(grant.grant_id for grant in chosen)
        if dry_run or not chosen:
            return ImportedGrants(outcomes, chosen_ids, facts.known)
        added = await directory.add_grants(connection, chosen)
        if added != chosen_ids:
            # Somebody else imported some of them since we looked: those are duplicates now.
            meanwhile = await directory.grants_of_ids(connection, chosen_ids - added)
            facts = replace(facts, known={**facts.known, **meanwhile})
            outcomes = decide_rows(rows, facts)
        return ImportedGrants(outcomes, added, facts.known)

    async def _import_facts(self, connection: Connection, grants: Sequence[Grant]) -> ImportFacts:
        """Look up, for all grants at once, what decides whether they can be proposed."""
        tenant_ids = {grant.tenant_id for grant in grants}
        partitions = {tenant_id: self._partitions.of(tenant_id) for tenant_id in tenant_ids}
        complete = await complete_until_of(connection, set(partitions.values()))
        return ImportFacts(
            tenant_currencies=await directory.tenant_currencies(connection, tenant_ids),
            programme_currencies=await directory.programme_currencies(
                connection, {grant.programme_id for grant in grants}
            ),
            complete_until_ms={
                tenant_id: complete[partition] for tenant_id, partition in partitions.items()
            },
            known=await directory.grants_of_ids(connection, {grant.grant_id for grant in grants}),
        )

    async def approve(
        self,
        connection: Connection,
        proposal_id: str,
        approver: KeyId,
        role: str,
        *,
        conflict_of_interest: str,
        actor: str,
    ) -> Approved | NotFound | DecisionRefusal | BookRefusal:
        """Decide a proposal of any kind, grants too, and enter what it comes to now."""
        # The proposal is locked before the books: of two decisions one sees the other's.
        proposal = await proposals.lock_proposal(connection, proposal_id)
        if proposal is None:
            return NotFound("proposal")
        needed_micro = proposal.terms.limited_micro or 0
        approval = Approval(
            key_id=approver,
            role=role,
            conflict_of_interest=conflict_of_interest,
            up_to_micro=await proposals.approval_limit_micro(connection, approver),
            others=await proposals.approvers_up_to(connection, needed_micro, proposal.proposed_by),
        )
        refused = refuse_decision(proposal, approval)
        if refused is not None:
            return refused
        command = await self._command_of(connection, proposal, actor)
        entered = await self._enter(connection, proposal.terms.book_id, command)
        if not isinstance(entered, tuple):
            return entered
        _, made = entered
        entry_ids = entry_ids_of(proposal, made, actor)
        await proposals.keep_approval(connection, proposal, approver, entry_ids)
        await self._follow(connection, proposal.terms.book_id, command)
        return Approved(proposal, entry_ids)

    async def reject(
        self, connection: Connection, proposal_id: str, key_id: KeyId, role: str, reason: str
    ) -> Proposal | NotFound | DecisionForbidden | AlreadyDecided:
        """Put on the record that a proposal of any kind will never be entered."""
        proposal = await proposals.lock_proposal(connection, proposal_id)
        if proposal is None:
            return NotFound("proposal")
        refused = refuse_rejection(proposal, key_id, role)
        if refused is not None:
            return refused
        await proposals.keep_rejection(connection, proposal, key_id, reason)
        return proposal

    async def submit_outcome(
        self, connection: Connection, outcome: GrantOutcome
    ) -> NotFound | SubmissionRefusal | None:
        """Put an outcome of a grant on record; it counts once somebody else accepts it."""
        # The grant is locked: of submissions at once each counts those before it.
        grant = await directory.lock_grant(connection, outcome.grant_id)
        if grant is None:
            return NotFound("grant")
        count = await outcomes.count_outcomes(connection, outcome.grant_id)
        refused = refuse_submission(grant, count)
        if refused is not None:
            return refused
        await outcomes.add_outcome(connection, outcome)
        return None

    async def accept_outcome(
        self, connection: Connection, grant_id: str, outcome_id: str, accepter: KeyId, role: str
    ) -> NotFound | AcceptanceRefusal | None:
        """Accept an outcome that another key submitted."""
        # The grant first, as by whoever submits: it may be reversed meanwhile.
        grant = await directory.lock_grant(connection, grant_id)
        outcome = await outcomes.lock_outcome(connection, grant_id, outcome_id)
        if grant is None or outcome is None:
            return NotFound("outcome of this grant")
        refused = refuse_acceptance(outcome, grant, accepter, role)
        if refused is not None:
            return refused
        await outcomes.mark_accepted(connection, outcome.outcome_id, accepter)
        return None

    async def _command_of(
        self, connection: Connection, proposal: Proposal, actor: str
    ) -> ProposedCommand:
        """Return what a proposal has decided, with what it names loaded and locked."""
        terms = proposal.terms
        match terms:
            case ReverseTerms():
                entry = await entries.find_entry(connection, terms.entry_id)
                if entry is None:
                    raise InvariantBroken(f"entry {terms.entry_id} was there, and entries stay")
                if entry.kind == "grant" and entry.grant is not None:
                    # Its state is written once the books are decided; locked before them, as by
                    # whoever revokes it at the same time.
                    await directory.lock_grant(connection, entry.grant.grant_id)
                return terms.command(entry, actor)
            case RevokeTerms() | ReclaimTerms():
                grant = await directory.lock_grant(connection, terms.grant_id)
                if grant is None:
                    raise InvariantBroken(f"grant {terms.grant_id} was there, and grants stay")
                return terms.command(grant, actor)
            case GrantTerms(waiting):
                earlier_id = waiting.after_grant
                earlier = (
                    []
                    if earlier_id is None
                    else await outcomes.lock_outcomes(connection, earlier_id)
                )
                return terms.command(actor, is_earlier_accepted=has_accepted(earlier))
            case BudgetTerms() | CreditLimitTerms():
                return terms.command(proposal.proposal_id, actor)
            case _:
                assert_never(terms)

    async def _follow(self, connection: Connection, book_id: str, command: ProposedCommand) -> None:
        """Keep in step with the books what stands beside them."""
        match command:
            case ReverseEntry(entry=entry):
                if entry.grant is not None:
                    await directory.mark_ended(connection, entry.grant.grant_id, "reversed")
            case RevokeGrant(grant=grant):
                await directory.mark_ended(connection, grant.grant_id, "revoked")
            case ChangeCreditLimit():
                record = await directory.find_tenant(connection, book_id)
                if record is None:
                    raise InvariantBroken("a tenant whose limit was changed is registered")
                await self._outbox.write(connection, [_tenant_message(record)])
            case ApproveGrant() | AddBudget() | ReclaimExpired():
                pass
            case _:
                assert_never(command)

    async def price_hold(
        self,
        connection: Connection,
        tenant_id: str,
        sku: Sku,
        price_class: PriceClass,
        *,
        gpus: int,
        duration_ms: int,
    ) -> int | NotFound | TenantSuspended | NoPrice | PriceOutOfRange:
        """Price a hold asked for as GPUs and a duration, now and in the tenant's currency."""
        tenant = await directory.find_tenant(connection, tenant_id)
        if tenant is None:
            return NotFound("tenant")
        # Asked again when the hold is placed; here so that a missing price is not told before it.
        if await books.is_suspended(connection, tenant_id):
            return TenantSuspended()
        series = PriceSeries(tenant.currency, sku, price_class)
        prices = PriceBook(await directory.price_lines_of(connection, series))
        present_ms = await checked_now_ms(connection, self._clock)
        return price_hold(prices, series, gpus=gpus, duration_ms=duration_ms, now_ms=present_ms)

    async def enter_hold(
        self, connection: Connection, tenant_id: str, command: PlaceHold | ExtendHold | ReleaseHold
    ) -> HoldState | BookRefusal:
        """Admit a job, or refuse it with what is missing; extend or end a hold.

        A hold that is there already is answered as it stands now.
        """
        entered = await self._enter(connection, tenant_id, command)
        if not isinstance(entered, tuple):
            return entered
        unit, made = entered
        if not made:
            placed = await hold_of(connection, command.hold_id, unit.now_ms)
            if placed is None:
                raise InvariantBroken("a hold that is not placed again is there")
            return placed
        # The command made an entry, so nothing is due in the book any more.
        return hold_state(unit.book(tenant_id), unit.hold(tenant_id, command.hold_id), unit.now_ms)

    async def change_standing(
        self, connection: Connection, tenant_id: str, command: SuspendTenant | ResumeTenant
    ) -> bool | BookRefusal:
        """Suspend a tenant or resume it; returns whether it is suspended now."""
        entered = await self._enter(connection, tenant_id, command)
        return entered[0].book(tenant_id).is_suspended if isinstance(entered, tuple) else entered

    async def record_invoiced(
        self, connection: Connection, tenant_id: str, command: RecordInvoiced
    ) -> Entry | BookRefusal:
        """Move what a finalised document bills out of receivable; the entry made then or before."""
        entered = await self._enter(connection, tenant_id, command)
        if not isinstance(entered, tuple):
            return entered
        _, made = entered
        if made:
            return made[-1]
        cause = f"document:{command.document_id}"
        return await entries.entry_caused_by(connection, tenant_id, "invoiced", cause)

    async def top_up(
        self, connection: Connection, tenant_id: str, command: TopUp
    ) -> Entry | BookRefusal:
        """Credit what a payment brought; the entry made then or before."""
        entered = await self._enter(connection, tenant_id, command)
        if not isinstance(entered, tuple):
            return entered
        _, made = entered
        if made:
            return made[-1]
        cause = f"payment:{command.payment_id}"
        return await entries.entry_caused_by(connection, tenant_id, "top_up", cause)

    async def _complete_until_ms(self, connection: Connection, tenant_id: str) -> int | None:
        """Say until when the tenant's usage has been heard of; None: nothing is complete."""
        partition = self._partitions.of(tenant_id)
        found = await complete_until_of(connection, (partition,))
        return found[partition]

    async def _enter(
        self, connection: Connection, book_id: str, command: BookCommand
    ) -> tuple[UnitOfWork, tuple[Entry, ...]] | BookRefusal:
        """Open what a command touches, have it decided, save; return the books and what is new."""
        unit = await self._open(connection, book_id, command)
        decided = unit.enter(book_id, command)
        if not isinstance(decided, tuple):
            return decided
        await books.save(connection, unit.changes())
        # Not before COMMIT: whoever is woken looks for the entries at once.
        after_commit(self._committed)
        return unit, decided

    async def _open(self, connection: Connection, book_id: str, command: BookCommand) -> UnitOfWork:
        """Lock and load all that a command touches."""
        footprint = footprint_of(command)
        hold_id, second_book_id = footprint.hold_id, footprint.programme_book_id
        complete_until_ms: dict[str, int | None] = {}
        if footprint.needs_completeness:
            complete_until_ms[book_id] = await self._complete_until_ms(connection, book_id)
        return await books.open_books(
            connection,
            [book_id] if second_book_id is None else [book_id, second_book_id],
            self._clock,
            accounts=footprint.accounts,
            hold_ids=[] if hold_id is None else [(book_id, hold_id)],
            spent_lots=footprint.spent_lots,
            complete_until_ms=complete_until_ms,
        )


def _tenant_message(record: TenantRecord) -> Message:
    return Message(topics.TENANTS, key=record.tenant_id.encode(), value=msgspec.json.encode(record))


def id_from_command(prefix: str, scope: str, idempotency_key: str) -> str:
    """Name what a command makes after the command itself, so that a repeat names the same thing.

    80 bits of SHA-256 over the scope and the key, in hexadecimal, behind a one-letter prefix.
    """
    digest = hashlib.sha256(f"{prefix}\0{scope}\0{idempotency_key}".encode())
    return prefix + digest.hexdigest()[:20]


def imported_grant_id(tenant_id: TenantId, reference: str) -> GrantId:
    """Name a grant of a file after its tenant and reference: it can never be stored twice.

    Also not after a recovery, which knows no references. No Idempotency-Key has a NUL, so no grant
    that was proposed by itself has such a name.
    """
    return GrantId(id_from_command("g", tenant_id, f"import\0{reference}"))
