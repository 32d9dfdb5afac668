"""`/v1/hubs`: the registry, and how far each hub is complete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import msgspec
from fastapi import Request, Response

from hisab_contracts.ids import HubCode, HubText
from hisab_contracts.reference import HubRecord, Role
from hisab_contracts.topics import hub_topic
from hisab_contracts.units import instant_text, optional_instant_text
from metering.api.problems import problem_of
from metering.api.requests import find_hub, require_own_hub
from metering.commands import register_hub
from metering.consumer import HubConsumer
from metering.core.watermarks import HubView, blocking_sources, is_silent
from metering.store import hubs
from runtime.clock import now_ms
from runtime.http import Model, Resource, get, json_response, post
from runtime.idempotency import Answer, read_command, run_command
from runtime.kafka import Topic
from runtime.lag import HiddenRecords
from runtime.machine import Partition
from runtime.outbox import Outbox
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection


class NewHub(Model, frozen=True, kw_only=True):
    """A hub to register."""

    hub: HubText
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    heartbeat_ms: Annotated[int, msgspec.Meta(ge=1_000, le=86_400_000)] = 60_000


class HubAnswer(msgspec.Struct, frozen=True):
    """A hub that was registered, and the topic it writes to."""

    hub: str
    name: str
    heartbeat_ms: int
    topic: str


class BlockedSource(msgspec.Struct, frozen=True):
    """A source that keeps its hub from going on, and why.

    Where an open transaction blocks the hub's topic, its partition stands for the source.
    """

    source: str
    reason: str


class HubState(msgspec.Struct, frozen=True):
    """How far a hub is complete, and what holds it."""

    hub: str
    complete_until: str | None
    silent: bool
    last_seen_at: str | None
    blocked_by: list[BlockedSource]


class Hubs(Resource):
    """`/v1/hubs`: register a hub, see how far one is complete."""

    def __init__(self, kit: Kit, outbox: Outbox, usage: HubConsumer, partitions: int) -> None:
        """`usage` reads the topics of hubs here; a topic is made with so many partitions."""
        self._kit = kit
        self._outbox = outbox
        self._usage = usage
        self._partitions = partitions

    @get(
        "/v1/hubs/{hub}",
        roles=(Role.HUB, Role.OPERATOR, Role.AUDITOR),
        others={Role.HUB: "forbidden"},
        answer=HubState,
    )
    async def show_hub(self, request: Request, hub: str) -> Response:
        """Show how far a hub is complete, and what holds it."""
        principal = await self._kit.access.authorise(request)
        require_own_hub(principal, hub)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            code = await find_hub(connection, hub)
            [view] = await hubs.view_hubs(connection, code)
        return json_response(_hub_state(view, self._usage.hidden(), now_ms()))

    @post(
        "/v1/hubs",
        roles=(Role.OPERATOR,),
        body=NewHub,
        answer=HubAnswer,
        status=201,
        idempotent=True,
        problems=("already-exists",),
    )
    async def add_hub(self, request: Request) -> Response:
        """Register a hub: its topic is made, and read from its first record."""
        principal = await self._kit.access.authorise(request)
        command = await read_command(request, NewHub)
        body = command.body
        hub = HubCode(body.hub)
        # First the topic: should we die between the two, the command is simply sent again.
        await self._kit.kafka.create_topics(
            [Topic(hub_topic(hub), self._partitions, log_append_time=True)]
        )

        async def run(connection: Connection) -> Answer:
            record = HubRecord(hub, body.heartbeat_ms, body.name)
            refused = await register_hub(connection, self._outbox, record)
            if refused is not None:
                raise problem_of(refused)
            return Answer(201, HubAnswer(hub, body.name, body.heartbeat_ms, hub_topic(hub)))

        response = await run_command(
            self._kit.api, command, run, scope=principal.role_scope, tenant=principal.sees
        )
        self._usage.extend([hub_topic(hub)])
        return response


def _hub_state(
    view: HubView, hidden: Mapping[Partition, HiddenRecords], present_ms: int
) -> HubState:
    """Show how far a hub is complete."""
    topic = hub_topic(view.hub)
    return HubState(
        hub=view.hub,
        complete_until=optional_instant_text(view.watermark_ms),
        silent=is_silent(view, present_ms),
        last_seen_at=instant_text(view.last_seen_ms) if view.ever_seen else None,
        blocked_by=[
            *(
                BlockedSource(f"partition {partition.number}", records.explain(partition))
                for partition, records in sorted(hidden.items())
                if partition.topic == topic
            ),
            *(
                BlockedSource(behind.source, behind.reason)
                for behind in blocking_sources(view, present_ms)
            ),
        ],
    )
