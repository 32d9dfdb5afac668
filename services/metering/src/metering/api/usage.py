"""`/v1/reconciliation` and `/v1/allocations`: what became of the usage that hubs reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

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
from metering.store.queries import (
    AllocationFilter,
    AllocationInterval,
    AllocationQuarantine,
    AllocationSums,
    BilledHour,
    BucketPlace,
    IntervalPlace,
    UsageSums,
)
from runtime.http import (
    MAX_LIMIT,
    Page,
    Position,
    Problem,
    Resource,
    get,
    json_response,
    next_cursor,
    page_of,
)
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection


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
    tenant_id: str
    node_id: str
    device_uuid: str


class QuarantinedUsage(msgspec.Struct, frozen=True):
    """A record that names the allocation and is or was in quarantine; `tenant_id` is its claim."""

    quarantine_id: str
    tenant_id: str
    reason: str
    state: str
    gpu_ns: str


class BucketView(msgspec.Struct, frozen=True):
    """One bucket of an allocation."""

    hour_at: str
    tenant_id: str
    project_id: str
    node_id: str
    sku: str
    price_class: str
    revision: int
    gpu_ns: str
    gpu_ms: str
    voided_gpu_ns: str
    charge_micro: str
    refunded_micro: str
    price_version: str


class AllocationAnswer(msgspec.Struct, frozen=True):
    """An allocation: sums of all there is, whatever the page shows, and a page of each list.

    A scheduler may give a job number out again, so an allocation may have several `owners`: those
    that were billed for it or that its start or end names. `tenant_id` is the only one, null when
    there are several; while nobody owns it, whom a record in quarantine names, if that is one.
    `?tenant_id=` asks for one of them; a tenant's key sees its own only. `next` leads to the next
    page of the three lists; one that has ended is empty there.
    """

    tenant_id: str | None
    owners: list[str]
    intervals: list[IntervalView]
    billed_gpu_ms: str
    duplicate_gpu_ms: str
    quarantined_gpu_ms: str
    voided_gpu_ms: str
    charge_micro: str
    quarantined: list[QuarantinedUsage]
    buckets: list[BucketView]
    next: str | None


class AllocationPosition(NamedTuple):
    """Where a page of the drill-down ended: of each list 1 if it goes on, and its last place."""

    more_buckets: Position
    hour_ms: Position
    bucket_node_id: str
    bucket_id: str
    more_intervals: Position
    tenant_id: str
    node_id: str
    device_uuid: str
    slice_uuid: str
    start_ms: Position
    more_quarantined: Position
    quarantine_id: Position


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
        query=("tenant_id", "limit", "cursor"),
        problems=("malformed",),
    )
    async def drill_down(self, request: Request, hub: str, allocation_id: str) -> Response:
        """Show all that is known of an allocation: sums of all of it, and its lists in pages."""
        principal = await self._kit.access.authorise(request)
        require_own_hub(principal, hub)
        wanted = AllocationFilter(
            HubCode(hub), allocation_id, request.query_params.get("tenant_id")
        )
        page = page_of(request, AllocationPosition)
        if "limit" not in request.query_params:
            page = replace(page, limit=MAX_LIMIT)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            sums = await queries.sum_allocation(connection, wanted)
            if sums is None:
                raise Problem(
                    "not-found", f"nothing is known of allocation {allocation_id} at {hub}"
                )
            lists = await _read_lists(connection, wanted, page)
        return json_response(_allocation(sums, lists, page))


class _Lists(NamedTuple):
    """A page of each list of an allocation, with one item more where it goes on."""

    buckets: list[BilledHour]
    intervals: list[AllocationInterval]
    quarantined: list[AllocationQuarantine]


async def _read_lists(
    connection: Connection, wanted: AllocationFilter, page: Page[AllocationPosition]
) -> _Lists:
    most = page.limit + 1
    if page.after is None:
        return _Lists(
            await queries.list_buckets(connection, wanted, None, most),
            await queries.list_intervals(connection, wanted, None, most),
            await queries.list_quarantined_of(connection, wanted, 0, most),
        )
    after = page.after
    lists = _Lists([], [], [])
    if after.more_buckets:
        bucket = BucketPlace(after.hour_ms, after.bucket_node_id, after.bucket_id)
        lists.buckets.extend(await queries.list_buckets(connection, wanted, bucket, most))
    if after.more_intervals:
        interval = IntervalPlace(
            after.tenant_id, after.node_id, after.device_uuid, after.slice_uuid, after.start_ms
        )
        lists.intervals.extend(await queries.list_intervals(connection, wanted, interval, most))
    if after.more_quarantined:
        lists.quarantined.extend(
            await queries.list_quarantined_of(connection, wanted, after.quarantine_id, most)
        )
    return lists


def _next_position(lists: _Lists, limit: int) -> AllocationPosition | None:
    """Return where the page ended in each list; None when all three have ended."""
    more = [len(items) > limit for items in lists]
    if not any(more):
        return None
    bucket = lists.buckets[limit - 1].place if more[0] else BucketPlace(0, "", "")
    interval = lists.intervals[limit - 1].place if more[1] else IntervalPlace("", "", "", "", 0)
    quarantine_id = lists.quarantined[limit - 1].quarantine_id if more[2] else 0
    return AllocationPosition(
        more_buckets=int(more[0]),
        hour_ms=bucket.hour_ms,
        bucket_node_id=bucket.node_id,
        bucket_id=bucket.bucket_id,
        more_intervals=int(more[1]),
        tenant_id=interval.tenant_id,
        node_id=interval.node_id,
        device_uuid=interval.device_uuid,
        slice_uuid=interval.slice_uuid,
        start_ms=interval.start_ms,
        more_quarantined=int(more[2]),
        quarantine_id=quarantine_id,
    )


def _hour_in_query(request: Request, name: str, default_ms: int) -> int:
    """Read an end of a window from the query: a whole UTC hour."""
    text = request.query_params.get(name)
    return default_ms if text is None else read_whole_hour(name, text)


def _reconciliation(sums: UsageSums, complete: Sequence[HubCompleteness]) -> UsageReconciliation:
    """Show the accounts of hubs, and up to when they are complete."""
    explained_gpu_ns = (
        sums.billed_gpu_ns + sums.duplicate_gpu_ns + sums.quarantined_gpu_ns + sums.voided_gpu_ns
    )
    return UsageReconciliation(
        reported_gpu_ns=str(sums.reported_gpu_ns),
        billed_gpu_ns=str(sums.billed_gpu_ns),
        duplicate_gpu_ns=str(sums.duplicate_gpu_ns),
        quarantined_gpu_ns=str(sums.quarantined_gpu_ns),
        voided_gpu_ns=str(sums.voided_gpu_ns),
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


def _allocation(
    sums: AllocationSums, lists: _Lists, page: Page[AllocationPosition]
) -> AllocationAnswer:
    """Show an allocation."""
    named = sums.owners or sums.claimants
    return AllocationAnswer(
        tenant_id=named[0] if len(named) == 1 else None,
        owners=sums.owners,
        intervals=[_interval(covered) for covered in lists.intervals[: page.limit]],
        billed_gpu_ms=str(floor_gpu_ms(sums.billed_gpu_ns)),
        duplicate_gpu_ms=str(floor_gpu_ms(sums.duplicate_gpu_ns)),
        quarantined_gpu_ms=str(floor_gpu_ms(sums.quarantined_gpu_ns)),
        voided_gpu_ms=str(floor_gpu_ms(sums.voided_gpu_ns)),
        charge_micro=str(sums.charge_micro),
        quarantined=[_quarantined(record) for record in lists.quarantined[: page.limit]],
        buckets=[_bucket(bucket) for bucket in lists.buckets[: page.limit]],
        next=next_cursor(page, _next_position(lists, page.limit)),
    )


def _interval(covered: AllocationInterval) -> IntervalView:
    return IntervalView(
        start_ms=covered.start_ms,
        end_ms=covered.end_ms,
        slice_uuid=covered.slice_uuid,
        share_ppm=covered.share_ppm,
        tenant_id=covered.tenant_id,
        node_id=covered.node_id,
        device_uuid=covered.device_uuid,
    )


def _quarantined(record: AllocationQuarantine) -> QuarantinedUsage:
    # Without the detail: of a conflict it names the other claim, which is not the tenant's to see.
    return QuarantinedUsage(
        quarantine_id=str(record.quarantine_id),
        tenant_id=record.tenant_id,
        reason=record.reason,
        state=record.state,
        gpu_ns=str(record.quarantined_gpu_ns),
    )


def _bucket(bucket: BilledHour) -> BucketView:
    return BucketView(
        hour_at=instant_text(bucket.hour_ms),
        tenant_id=bucket.tenant_id,
        project_id=bucket.project_id,
        node_id=bucket.node_id,
        sku=bucket.sku,
        price_class=bucket.price_class,
        revision=bucket.revision,
        gpu_ns=str(bucket.gpu_ns),
        gpu_ms=str(floor_gpu_ms(bucket.gpu_ns)),
        voided_gpu_ns=str(bucket.voided_gpu_ns),
        charge_micro=str(bucket.charge_micro),
        refunded_micro="0",
        price_version=bucket.price_version,
    )
