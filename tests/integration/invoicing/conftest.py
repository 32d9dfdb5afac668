"""What every test of invoicing may ask for beside a database."""

from __future__ import annotations

import pytest

from infrastructure import Infrastructure


@pytest.fixture
def broker(infrastructure: Infrastructure) -> str:
    """Where the broker is that says how many partitions there are."""
    return infrastructure.bootstrap_servers
