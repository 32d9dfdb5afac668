"""What a recovery takes back: books opened for it, approved grants, and its own record. SQL.

Everything else that it writes is written as ever (`books`, `directory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hisab_contracts.entries import Entry, GrantDetail
from hisab_contracts.ids import KeyId
from hisab_contracts.units import moment_of, optional_moment_of
from ledger.core.book import hold_id_of
from ledger.core.lots import WHOLE_BPS
from ledger.core.restoration import RestoredBooks, budget_change_of, programme_book_of
from ledger.store.books import load_buckets, lock_whole_books, scope_as_json
from ledger.store.holds import load_holds

if TYPE_CHECKING:
    from runtime.database import Connection


async def open_to_take_back(connection: Connection, published: Sequence[Entry]) -> RestoredBooks:
    """Lock and load all that published entries speak of, programmes of their grants included."""
    changes = [change for entry in published if (change := budget_change_of(entry)) is not None]
    # Whole books: nobody has said beforehand which lots and accounts these entries move.
    opened = await lock_whole_books(
        connection,
        {entry.tenant_id for entry in published}
        | {programme_book_of(programme_id) for programme_id, _ in changes},
    )
    buckets = await load_buckets(
        connection,
        {
            (entry.tenant_id, entry.charge.bucket_id): entry.charge.hour_ms
            for entry in published
            if entry.charge is not None
        },
    )
    holds = await load_holds(
        connection,
        [
            (entry.tenant_id, hold_id)
            for entry in published
            if (hold_id := hold_id_of(entry)) is not None
        ],
    )
    # Nothing is decided here: the entries carry their own instants, and are folded as they are.
    latest_ms = max((entry.recorded_ms for entry in published), default=0)
    return RestoredBooks(opened, latest_ms, buckets=buckets, holds=holds)


# A proposal that the backup has keeps its proposer.
_TAKE_BACK_GRANT = """
insert into grants (grant_id, tenant_id, programme_id, grant_micro, priority, effective_at,
                    expires_at, state, proposed_by, approved_by, approved_at, scope, coverage_bps,
                    tax_effect)
values ($1, $2, $3, $4, $5, $6, $7, 'approved', $8, $9, $10, $11::jsonb, $12, $13)
on conflict (grant_id) do update
   set state = excluded.state, approved_by = excluded.approved_by,
       approved_at = excluded.approved_at
 where grants.state = 'proposed'
"""


async def take_back_grant(
    connection: Connection,
    tenant_id: str,
    grant: GrantDetail,
    proposer: str,
    approver: KeyId,
    approved_ms: int,
) -> None:
    """Store an approved grant as its entry describes it."""
    await connection.execute(
        _TAKE_BACK_GRANT,
        grant.grant_id,
        tenant_id,
        grant.programme_id,
        grant.grant_micro,
        grant.priority,
        moment_of(grant.effective_ms),
        optional_moment_of(grant.expires_ms),
        proposer,
        approver,
        moment_of(approved_ms),
        scope_as_json(grant.scope),
        WHOLE_BPS if grant.coverage_bps is None else grant.coverage_bps,
        "tender" if grant.tax_effect is None else grant.tax_effect,
    )


_TAKE_BACK_PROPOSAL = """
update proposals
   set state = 'approved', decided_by = $2, decided_at = $3, entry_ids = array[$4::text]
 where proposal_id = $1 and state = 'proposed' and proposed_by <> $2
"""


async def take_back_approval(
    connection: Connection, proposal_id: str, approver: KeyId, entry: Entry
) -> None:
    """Note that a proposal which the backup has as open was approved, as its entry says.

    So it is not entered a second time. One that the backup lacks is gone; its entry is not.
    """
    await connection.execute(
        _TAKE_BACK_PROPOSAL,
        proposal_id,
        approver,
        moment_of(entry.recorded_ms),
        entry.entry_id,
    )


_CLOSE_BUDGET_PROPOSALS = """
update proposals
   set state = 'rejected', decided_by = 'recover', decided_at = clock_timestamp(),
       reason = 'the budget was named whole when the ledger was recovered'
 where kind = 'budget' and state = 'proposed' and terms ->> 'programme_id' = $1
"""


async def close_budget_proposals(connection: Connection, programme_id: str) -> None:
    """Reject what was proposed for a programme whose budget an operator has named whole."""
    await connection.execute(_CLOSE_BUDGET_PROPOSALS, programme_id)


_OVERDRAWN = """
select tenant_id from accounts where account = 'budget' and balance_micro < 0 order by tenant_id
"""


async def overdrawn_programmes(connection: Connection) -> list[str]:
    """Name the books of programmes that have granted more than they were given."""
    return [row["tenant_id"] for row in await connection.fetch(_OVERDRAWN)]


_RECORD_RECOVERY = """
insert into recoveries (accepted_by, reason, entries, tenants, holds) values ($1, $2, $3, $4, $5)
"""


async def record_recovery(
    connection: Connection,
    accepted_by: str,
    reason: str,
    entries: int,
    tenants: Sequence[str],
    holds: Sequence[str],
) -> None:
    """Put on the record what was taken back from the topics."""
    await connection.execute(_RECORD_RECOVERY, accepted_by, reason, entries, tenants, holds)
