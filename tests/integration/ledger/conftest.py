"""A ledger's database for each module of tests: its tests use tenants of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from infrastructure import Database, Infrastructure
from integration.ledger.real import RealLedger, opened


@pytest.fixture(scope="module")
def addresses(infrastructure: Infrastructure) -> Iterator[Database]:
    """A database with the ledger's schema."""
    database = infrastructure.migrated_database("ledger")
    yield database
    infrastructure.drop_database(database)


@pytest.fixture(scope="module")
async def ledger(addresses: Database) -> AsyncIterator[RealLedger]:
    """A ledger on it, with a programme `ignite`."""
    async with opened(addresses) as ledger:
        await ledger.programme("ignite")
        yield ledger
