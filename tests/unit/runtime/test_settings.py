"""Settings that bound what a client may cost: from the environment, with bounds of their own."""

from __future__ import annotations

from importlib.resources import files

import pytest

from runtime.auth import AccessLimits
from runtime.server import ServerLimits
from runtime.service import Parts, Service, read_settings

SERVICE = Service("metering", "0", files("metering"), lambda _kit: Parts(), ())
NEEDED = {
    "HISAB_HTTP_PORT": "8080",
    "HISAB_KAFKA": "k:9092",
    "HISAB_DB_API": "a",
    "HISAB_DB_WRITER": "w",
}


def test_limits_have_defaults_and_can_be_set() -> None:
    """Nothing has to be said; what is said counts."""
    assert ServerLimits() == read_settings(SERVICE, NEEDED).server
    assert AccessLimits() == read_settings(SERVICE, NEEDED).access
    said = {"HISAB_HTTP_HEAD_S": "3", "HISAB_HTTP_CONNECTIONS": "9", "HISAB_REQUESTS_PER_S": "7"}
    settings = read_settings(SERVICE, NEEDED | said | {"HISAB_HTTP_PROXIES": "10.0.0.1"})
    assert (3, 9) == (settings.server.head_s, settings.server.connections)
    assert (7, "10.0.0.1") == (settings.access.requests_per_s, settings.trusted_proxies)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "1e3", "", "\u0663", "1000001", "9" * 5_000])
def test_a_limit_that_is_none_stops_the_start(text: str) -> None:
    """The message names the variable and its bounds."""
    with pytest.raises(SystemExit, match="HISAB_HTTP_BODY_S is a whole number from 1 to 1000000"):
        read_settings(SERVICE, NEEDED | {"HISAB_HTTP_BODY_S": text})


@pytest.mark.parametrize("name", ["HISAB_HTTP_PORT", "HISAB_PARTITIONS", "HISAB_REPLICATION"])
def test_a_setting_that_is_no_number_is_named(name: str) -> None:
    """The start ends with one sentence, not with a traceback."""
    with pytest.raises(SystemExit, match=f"{name} is a whole number"):
        read_settings(SERVICE, NEEDED | {name: "many"})
