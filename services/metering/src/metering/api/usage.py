"""`/v1/reconciliation` and `/v1/allocations`: what became of the usage that hubs reported."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from fastapi import Request, Response

from hisab_contracts.ids import HubCode
from hisab_contracts.reference import Role
from hisab_contracts.units import floor_gpu_ms, instant_text, optional_instant_text
from metering.api.requests import (
    FIRST_HOUR_MS,
    LAST_HOUR_MS,
    find_hub,
    read_whole_hour,
    require_own_hub,
)
from metering.core.watermarks import HubCompleteness, complete_until_ms
from metering.store import hubs, queries
from metering.store.queries import AllocationDetail, BilledHour, UsageSums
from runtime.http import Problem, Resource, get, json_response
from runtime.service import Kit


class RecordCounts(msgspec.Struct, frozen=True):
    """Records of a hub: read = accepted + duplicate + quarantined."""

    read: int
    accepted: int
    duplicate: int
    quarantined: int


class UsageReconciliation(msgspec.Struct, frozen=True):
    """The accounts of a hub; `difference_gpu_ns` is what they fail to explain."""

    reported_gpu_ns: str
    billed_gpu_ns: str
    duplicate_gpu_ns: str
    quarantined_gpu_ns: str
    voided_gpu_ns: str
    difference_gpu_ns: str
    records: RecordCounts
    buckets: int
    charge_micro: str
    complete_until: str | None


class IntervalView(msgspec.Struct, frozen=True):
    """An interval of a slice that is covered by the allocation."""

    start_ms: int
    end_ms: int
    slice_uuid: str
    share_ppm: int


class QuarantinedUsage(msgspec.Struct, frozen=True):
    """A record of the allocation that is or was in quarantine."""

    quarantine_id: str
    reason: str
    state: str
    gpu_ns: str


class BucketView(msgspec.Struct, frozen=True):
    """One bucket of an allocation."""

    hour_at: str
    node_id: str
    sku: str
    price_class: str
    revision: int
    gpu_ns: str
    gpu_ms: str
    charge_micro: str
    refunded_micro: str
    price_version: str


class AllocationAnswer(msgspec.Struct, frozen=True):
    """An allocation: sums of all that is known; lists are cut (10 000 items, 100 000 intervals)."""

    tenant_id: str
    intervals: list[IntervalView]
    billed_gpu_ms: str
    duplicate_gpu_ms: str
    quarantined: list[QuarantinedUsage]
    buckets: list[BucketView]


class Usage(Resource):
    """`/v1/reconciliation` and `/v1/allocations`: the accounts of hubs and of allocations."""

    def __init__(self, kit: Kit) -> None:
        """Answer from the database of the `api` role."""
        self._kit = kit

    @get(
        "/v1/reconciliation",
        roles=(Role.HUB, Role.OPERATOR, Role.AUDITOR),
        others={Role.HUB: "forbidden"},
        answer=UsageReconciliation,
        query=("hub", "from", "until"),
        problems=("malformed",),
    )
    async def reconcile(self, request: Request) -> Response:
        """Account for every GPU-nanosecond and record that a hub reported."""
        principal = await self._kit.access.authorise(request)
        wanted = request.query_params.get("hub", principal.bound_to)
        if wanted is not None:
            require_own_hub(principal, wanted)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            hub = None if wanted is None else await find_hub(connection, wanted)
            from_ms = _hour_in_query(request, "from", FIRST_HOUR_MS)
            until_ms = _hour_in_query(request, "until", LAST_HOUR_MS)
            complete = await hubs.list_completeness(connection, hub)
            codes = [found.hub for found in complete]
            sums = await queries.sum_usage(connection, codes, from_ms, until_ms)
        return json_response(_reconciliation(sums, complete))

    @get(
        "/v1/allocations/{hub}/{allocation_id}",
        roles=(Role.TENANT, Role.HUB, Role.OPERATOR, Role.AUDITOR),
        others={Role.TENANT: "not-found", Role.HUB: "forbidden"},
        answer=AllocationAnswer,
    )
    async def drill_down(self, request: Request, hub: str, allocation_id: str) -> Response:
        """Show all that is known of an allocation."""
        principal = await self._kit.access.authorise(request)
        require_own_hub(principal, hub)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            found = await queries.find_allocation(connection, HubCode(hub), allocation_id)
        if found is None:
            raise Problem("not-found", f"nothing is known of allocation {allocation_id} at {hub}")
        return json_response(_allocation(found))


def _hour_in_query(request: Request, name: str, default_ms: int) -> int:
    """Read an end of a window from the query: a whole UTC hour."""
    text = request.query_params.get(name)
    return default_ms if text is None else read_whole_hour(name, text)


def _reconciliation(sums: UsageSums, complete: Sequence[HubCompleteness]) -> UsageReconciliation:
    """Show the accounts of hubs, and up to when they are complete."""
    explained_gpu_ns = sums.billed_gpu_ns + sums.duplicate_gpu_ns + sums.quarantined_gpu_ns
    return UsageReconciliation(
        reported_gpu_ns=str(sums.reported_gpu_ns),
        billed_gpu_ns=str(sums.billed_gpu_ns),
        duplicate_gpu_ns=str(sums.duplicate_gpu_ns),
        quarantined_gpu_ns=str(sums.quarantined_gpu_ns),
        voided_gpu_ns="0",
        difference_gpu_ns=str(sums.reported_gpu_ns - explained_gpu_ns),
        records=RecordCounts(
            read=sums.read_records,
            accepted=sums.accepted_records,
            duplicate=sums.duplicate_records,
            quarantined=sums.quarantined_records,
        ),
        buckets=sums.buckets,
        charge_micro=str(sums.charge_micro),
        complete_until=optional_instant_text(complete_until_ms(complete)),
    )


def _allocation(found: AllocationDetail) -> AllocationAnswer:
    """Show an allocation."""
    return AllocationAnswer(
        tenant_id=found.tenant_id,
        intervals=[
            IntervalView(
                start_ms=covered.start_ms,
                end_ms=covered.end_ms,
                slice_uuid=covered.slice_uuid,
                share_ppm=covered.share_ppm,
            )
            for covered in found.intervals
        ],
        billed_gpu_ms=str(floor_gpu_ms(found.billed_gpu_ns)),
        duplicate_gpu_ms=str(floor_gpu_ms(found.duplicate_gpu_ns)),
        quarantined=[
            QuarantinedUsage(
                quarantine_id=str(record.quarantine_id),
                reason=record.reason,
                state=record.state,
                gpu_ns=str(record.quarantined_gpu_ns),
            )
            for record in found.quarantined
        ],
        buckets=[_bucket(bucket) for bucket in found.buckets],
    )


def _bucket(bucket: BilledHour) -> BucketView:
    return BucketView(
        hour_at=instant_text(bucket.hour_ms),
        node_id=bucket.node_id,
        sku=bucket.sku,
        price_class=bucket.price_class,
        revision=bucket.revision,
        gpu_ns=str(bucket.gpu_ns),
        gpu_ms=str(floor_gpu_ms(bucket.gpu_ns)),
        charge_micro=str(bucket.charge_micro),
        refunded_micro="0",
        price_version=bucket.price_version,
    )
