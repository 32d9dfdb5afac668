"""Every constraint of every schema is refused by name, or out of every client's reach."""

from __future__ import annotations

from collections import Counter

import asyncpg
import pytest

from infrastructure import Infrastructure
from integration.invoicing.test_constraints import SHOWN as OF_INVOICING
from integration.ledger.test_constraints import SHOWN as OF_LEDGER
from integration.metering.test_constraints import SHOWN as OF_METERING
from integration.schema_constraints import INVOICING, KIT, LEDGER, METERING, Reasons

# Not null is left out: what a column has no value for is a type of ours that has none. So are the
# copies that partitions inherit. Unique indexes are constraints without the name.
CONSTRAINTS = """
select c.conname::text as name
  from pg_constraint c join pg_namespace n on n.oid = c.connamespace
 where n.nspname = 'public' and c.contype <> 'n' and c.conislocal
union
select r.relname::text
  from pg_index i
  join pg_class r on r.oid = i.indexrelid
  join pg_class t on t.oid = i.indrelid
  join pg_namespace n on n.oid = r.relnamespace
 where n.nspname = 'public' and i.indisunique and not t.relispartition
"""


@pytest.mark.parametrize(
    ("service", "reasons", "shown"),
    [
        ("ledger", LEDGER, OF_LEDGER),
        ("metering", METERING, OF_METERING),
        ("invoicing", INVOICING, OF_INVOICING),
    ],
)
async def test_every_constraint_is_refused_by_name_or_out_of_reach(
    infrastructure: Infrastructure, service: str, reasons: Reasons, shown: set[str]
) -> None:
    """A new constraint fails here until somebody says what a client would be told."""
    database = infrastructure.migrated_database(service)
    connection = await asyncpg.connect(database.admin)
    try:
        there = {row["name"] for row in await connection.fetch(CONSTRAINTS)}
    finally:
        await connection.close()
        infrastructure.drop_database(database)
    reasoned = [name for names in (*reasons.values(), *KIT.values()) for name in names.split()]
    assert [] == [name for name, times in Counter(reasoned).items() if times > 1]
    assert {"neither shown nor reasoned": set(), "no such constraint": set()} == {
        "neither shown nor reasoned": there - shown - {*reasoned},
        "no such constraint": (shown | {*reasoned}) - there,
    }
