"""Proposals as rows, grants among them, and what each approver's own limit is. SQL.

Proposals of all kinds but grants are kept in a table of their own, their terms as the JSON that
they had; a grant is kept with the grants (`directory`), and read from there as the proposal that it
is. Both draw their numbers from one sequence, so a list of all of them is two lists in one order.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct

from hisab_contracts.ids import EntryId, GrantId, KeyId, ProposalId
from hisab_contracts.reference import Role
from hisab_contracts.units import ms_of, optional_ms_of
from ledger.core.proposals import (
    GRANT_STATES,
    GrantTerms,
    KeptTerms,
    Proposal,
    ProposalState,
    proposal_of,
)
from ledger.store.directory import (
    GRANT_COLUMNS,
    find_grant,
    grant_from_row,
    lock_grant,
    mark_approved,
    mark_rejected,
)

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection

NAMED_APPROVERS: Final = 20
"""How many of those who may approve an amount are named at most."""

_PROPOSAL_COLUMNS: Final = "proposal_id, terms, state, proposed_by"
_DECISION_COLUMNS: Final = "number, proposed_at, decided_by, decided_at, reason, entry_ids"


class ListedProposal(Struct, frozen=True, kw_only=True):
    """A proposal, and what became of it."""

    proposal: Proposal
    number: int
    """Its place among all proposals, in the order in which they were made."""
    proposed_ms: int
    decided_by: KeyId | None
    decided_ms: int | None
    reason: str | None
    """Why it was rejected."""
    entry_ids: tuple[EntryId, ...]
    """What its approval entered."""


_INSERT_PROPOSAL = """
insert into proposals (proposal_id, kind, tenant_id, terms, amount_micro, state, proposed_by)
values ($1, $2, $3, $4::text::jsonb, $5, 'proposed', $6)
"""


async def add_proposal(connection: Connection, proposal: Proposal) -> None:
    """Store a proposal of any kind but a grant."""
    terms = proposal.terms
    await connection.execute(
        _INSERT_PROPOSAL,
        proposal.proposal_id,
        terms.kind,
        terms.tenant_id,
        msgspec.json.encode(terms).decode(),
        terms.limited_micro,
        proposal.proposed_by,
    )


_FIND_PROPOSAL = "select " + _PROPOSAL_COLUMNS + " from proposals where proposal_id = $1"
_LOCK_PROPOSAL = _FIND_PROPOSAL + " for no key update"


async def find_proposal(connection: Connection, proposal_id: str) -> Proposal | None:
    """Find a proposal that this transaction may see, or a grant."""
    row = await connection.fetchrow(_FIND_PROPOSAL, proposal_id)
    if row is not None:
        return _proposal_from_row(row)
    grant = await find_grant(connection, proposal_id)
    return None if grant is None else proposal_of(grant)


async def lock_proposal(connection: Connection, proposal_id: str) -> Proposal | None:
    """Find a proposal and keep others from deciding it before this transaction ends."""
    row = await connection.fetchrow(_LOCK_PROPOSAL, proposal_id)
    if row is not None:
        return _proposal_from_row(row)
    grant = await lock_grant(connection, proposal_id)
    return None if grant is None else proposal_of(grant)


_APPROVE_PROPOSAL = """
update proposals
   set state = 'approved', decided_by = $2, decided_at = clock_timestamp(), entry_ids = $3
 where proposal_id = $1
"""
_REJECT_PROPOSAL = """
update proposals
   set state = 'rejected', decided_by = $2, decided_at = clock_timestamp(), reason = $3
 where proposal_id = $1
"""


async def keep_approval(
    connection: Connection, proposal: Proposal, approver: KeyId, entry_ids: Sequence[EntryId]
) -> None:
    """Store an approval. It is decided, and the row locked."""
    if isinstance(proposal.terms, GrantTerms):
        await mark_approved(connection, GrantId(proposal.proposal_id), approver, entry_ids)
    else:
        await connection.execute(_APPROVE_PROPOSAL, proposal.proposal_id, approver, entry_ids)


async def keep_rejection(
    connection: Connection, proposal: Proposal, rejecter: KeyId, reason: str
) -> None:
    """Store a rejection. It is decided, and the row locked."""
    if isinstance(proposal.terms, GrantTerms):
        await mark_rejected(connection, GrantId(proposal.proposal_id), rejecter, reason)
    else:
        await connection.execute(_REJECT_PROPOSAL, proposal.proposal_id, rejecter, reason)


def _proposal_from_row(row: Row) -> Proposal:
    terms = msgspec.json.decode(row["terms"], type=KeptTerms)
    return Proposal(
        proposal_id=ProposalId(row["proposal_id"]),
        terms=terms,
        state=row["state"],
        proposed_by=KeyId(row["proposed_by"]),
    )


# Lists.

# A filter that is not asked for is null; plans are made for each call's own values.
_LIST_PROPOSALS = (
    "select "
    + _PROPOSAL_COLUMNS
    + ", "
    + _DECISION_COLUMNS
    + """
  from proposals
 where number > $1
   and ($2::text is null or state = $2)
   and ($3::text is null or kind = $3)
   and ($4::text is null or tenant_id = $4)
 order by number
 limit $5
"""
)
_LIST_GRANTS = (
    "select "
    + GRANT_COLUMNS
    + """, number, proposed_at, coalesce(approved_by, rejected_by) as decided_by,
       coalesce(approved_at, rejected_at) as decided_at, reason, entry_ids
  from grants
 where number > $1
   and ($2::text[] is null or state = any($2))
   and ($3::text is null or tenant_id = $3)
 order by number
 limit $4
"""
)


async def list_proposals(
    connection: Connection,
    after: int,
    limit: int,
    *,
    state: ProposalState | None,
    kind: str | None,
    tenant_id: str | None,
) -> list[ListedProposal]:
    """List proposals of all kinds, grants too, in the order in which they were made."""
    kept: list[ListedProposal] = []
    grants: list[ListedProposal] = []
    if kind != "grant":
        rows = await connection.fetch(_LIST_PROPOSALS, after, state, kind, tenant_id, limit)
        kept = [_listed(_proposal_from_row(row), row) for row in rows]
    if kind in (None, "grant"):
        states = None if state is None else GRANT_STATES[state]
        rows = await connection.fetch(_LIST_GRANTS, after, states, tenant_id, limit)
        grants = [_listed(proposal_of(grant_from_row(row)), row) for row in rows]
    return list(heapq.merge(kept, grants, key=lambda listed: listed.number))[:limit]


def _listed(proposal: Proposal, row: Row) -> ListedProposal:
    return ListedProposal(
        proposal=proposal,
        number=row["number"],
        proposed_ms=ms_of(row["proposed_at"]),
        decided_by=row["decided_by"],
        decided_ms=optional_ms_of(row["decided_at"]),
        reason=row["reason"],
        entry_ids=tuple(row["entry_ids"]),
    )


# Approvers' own limits.

_INSERT_LIMIT = """
insert into approval_limits (key_id, approve_up_to_micro, set_by) values ($1, $2, $3)
"""
# The newest of a key counts.
_LIMIT_OF = """
select approve_up_to_micro from approval_limits
 where key_id = $1
 order by limit_id desc
 limit 1
"""
_APPROVERS_UP_TO = """
select k.key_id
  from access_keys k
  left join lateral (
    select l.approve_up_to_micro from approval_limits l
     where l.key_id = k.key_id
     order by l.limit_id desc
     limit 1
  ) newest on true
 where k.role = $1 and k.key_id <> $2 and not k.revoked
   and (k.expires_at is null or k.expires_at > clock_timestamp())
   and coalesce(newest.approve_up_to_micro, $3) >= $3
 order by k.key_id
 limit $4
"""


async def keep_approval_limit(
    connection: Connection, key_id: str, up_to_micro: int | None, set_by: str
) -> None:
    """Note how much a key may approve from now on; None: any amount."""
    await connection.execute(_INSERT_LIMIT, key_id, up_to_micro, set_by)


async def approval_limit_micro(connection: Connection, key_id: str) -> int | None:
    """Return how much a key may approve now; None: any amount."""
    up_to_micro: int | None = await connection.fetchval(_LIMIT_OF, key_id)
    return up_to_micro


async def approvers_up_to(
    connection: Connection, needed_micro: int, but: KeyId
) -> tuple[KeyId, ...]:
    """Name keys, all but one, that may approve an amount: no more than an answer can list."""
    rows = await connection.fetch(
        _APPROVERS_UP_TO, Role.APPROVER, but, needed_micro, NAMED_APPROVERS
    )
    return tuple(KeyId(row["key_id"]) for row in rows)
