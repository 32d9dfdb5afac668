"""Metering alone, once per session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from infrastructure import Infrastructure
from integration.metering.service import Hub, Metering, running


@pytest.fixture(scope="session")
def metering(
    apache_kafka: Infrastructure, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Metering]:
    """The process, on a database and topics of its own."""
    with running(apache_kafka, tmp_path_factory.mktemp("metering") / "log") as found:
        yield found


@pytest.fixture
def hub(metering: Metering) -> Hub:
    """A hub of the test's own."""
    return metering.add_hub()
