"""How the three services are run in the local stack: their commands, settings and topics.

Every service is its own process and has its own database. It gets the environment variables that a
deployment would give to a container, and nothing else.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import seed
from brokers import PARTITIONS, Broker
from children import Program, first_line_of
from databases import SERVICES, Server
from hisab_contracts import topics as names

_ROOT: Final = Path(__file__).resolve().parents[2]
_TOPICS: Final = frozenset(
    {
        names.CHARGES,
        names.QUARANTINE,
        names.PRICES,
        names.HUBS,
        names.DECISIONS,
        names.ENTRIES,
        names.ALERTS,
        names.TENANTS,
        names.ACCESS,
        names.DOCUMENTS,
    }
)


def new_secret() -> str:
    """Return the secret of a fresh API key."""
    return f"hsb_{secrets.token_urlsafe(32)}"


def is_service_topic(topic: str) -> bool:
    """Say whether a topic is one that our services create."""
    return topic in _TOPICS or names.hub_of_topic(topic) is not None


def topics_of_outsiders() -> dict[str, object]:
    """Return the topics outsiders use, as stack.json names them."""
    return {
        "hub": {hub: names.hub_topic(hub) for hub in seed.HUBS},
        "charges": names.CHARGES,
        "quarantine": names.QUARANTINE,
        "entries": names.ENTRIES,
    }


@dataclass(frozen=True, slots=True)
class Plan:
    """Which port each service gets, and its settings."""

    server: Server
    env: Mapping[str, str]
    logs: Path
    ports: Mapping[str, int]

    @classmethod
    def new(cls, server: Server, env: Mapping[str, str], logs: Path, ports: Iterator[int]) -> Plan:
        """Choose the ports: they stay with the services across restarts."""
        return cls(server, env, logs, {service: next(ports) for service in SERVICES})

    def urls(self) -> dict[str, str]:
        """Return where each service answers."""
        return {service: f"http://127.0.0.1:{self.ports[service]}" for service in SERVICES}

    def migration(self, service: str) -> Program:
        """Return the program that brings a service's schema up to date."""
        return Program(
            name=f"{service} migrate",
            argv=(sys.executable, "-m", service, "migrate"),
            log=self.logs / f"{service}-migrate.log",
            env=dict(self.env) | {"HISAB_DB_OWNER": self.server.dsn(f"{service}_owner", service)},
            cwd=_ROOT,
        )

    def metering(self, broker: Broker) -> Program:
        """Return the program of metering."""
        return self._serve("metering", broker, {"HISAB_HUB_PARTITIONS": str(PARTITIONS)})

    def ledger(self, broker: Broker, operator: str) -> Program:
        """Return the program of the ledger, with the secret of its first operator key."""
        return self._serve("ledger", broker, {"HISAB_BOOTSTRAP_KEY": operator})

    def invoicing(self, broker: Broker, finance: str) -> Program:
        """Return the program of invoicing, with the finance key it commands the ledger with."""
        ledger = {"HISAB_LEDGER_URL": self.urls()["ledger"], "HISAB_LEDGER_KEY": finance}
        return self._serve("invoicing", broker, ledger)

    def _serve(self, service: str, broker: Broker, own_settings: Mapping[str, str]) -> Program:
        port = self.ports[service]

        async def is_ready() -> bool:
            request = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            answer = await first_line_of(port, request)
            return answer is not None and answer.split()[1:2] == [b"200"]

        return Program(
            name=service,
            argv=(sys.executable, "-m", service, "serve"),
            log=self.logs / f"{service}.log",
            env=dict(self.env)
            | {
                "HISAB_HTTP_HOST": "127.0.0.1",
                "HISAB_HTTP_PORT": str(port),
                "HISAB_KAFKA": broker.bootstrap_servers,
                "HISAB_PARTITIONS": str(PARTITIONS),
                "HISAB_REPLICATION": "1",
                "HISAB_DB_API": self.server.dsn(f"{service}_api", service),
                "HISAB_DB_WRITER": self.server.dsn(f"{service}_writer", service),
            }
            | dict(own_settings),
            cwd=_ROOT,
            is_ready=is_ready,
        )
