"""A bare service for each test, on a blank database that the kit has migrated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from infrastructure import Database, Infrastructure
from integration.runtime.bare import Bare, service_of_nothing
from runtime.migrations import migrate


@pytest.fixture
async def bare(
    infrastructure: Infrastructure, blank: Callable[[str], Database], tmp_path: Path
) -> Bare:
    """A service that has nothing of its own yet."""
    dsns = blank("metering")
    service = service_of_nothing(tmp_path)
    await migrate(service.name, service.migrations, dsns.owner)
    return Bare(service, dsns, infrastructure.bootstrap_servers)
