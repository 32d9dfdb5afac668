"""Corrections, one rule at a time: what a hub says, and what becomes of it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec import structs

from hisab_contracts.events import Correction
from hisab_contracts.ids import HubCode, NodeId, PriceClass, Sku, TenantId
from hisab_contracts.prices import PriceBook, PriceSeries
from metering.core import engine
from metering.core.batch import CorrectionOrder, MeteringState, Reference, UsageRecord
from metering.core.corrections import (
    approval_needed,
    hub_correction_id,
    is_same,
    next_revision,
    proposal_id,
)
from metering.core.quarantine import QuarantineCause
from property.metered import LATER_MS, Metered, facts
from unit.metering.hub_events import (
    HEADERS,
    HOUR_MS,
    MINUTE_MS,
    NOON_MS,
    correction,
    device,
    event,
    interval,
)

A, B, C = "ravi-health", "indus-foundry", "flood-watch"
HALF = NOON_MS + HOUR_MS // 2
END = NOON_MS + HOUR_MS
MINUTE_GPU_NS = MINUTE_MS * 1_000_000
LHR = HubCode("lhr")


def said(**members: Any) -> Correction:
    """A correction as it is read."""
    return msgspec.convert(correction(**members), Correction)


def minutes(metered: Metered) -> tuple[int, ...]:
    """Reported, billed, duplicate, quarantined and voided minutes of a device; they add up."""
    outcome = metered.outcome()
    found = (
        outcome.reported_gpu_ns,
        sum(outcome.billed.values()),
        outcome.duplicate_gpu_ns,
        outcome.quarantined_gpu_ns,
        sum(outcome.voided.values()),
    )
    assert found[0] == sum(found[1:])
    return tuple(gpu_ns // MINUTE_GPU_NS for gpu_ns in found)


def billed(metered: Metered) -> dict[str, int]:
    """Billed minutes by tenant, where there are any."""
    found: dict[str, int] = {}
    for bucket, gpu_ns in metered.outcome().billed.items():
        if gpu_ns:
            found[bucket.tenant_id] = found.get(bucket.tenant_id, 0) + gpu_ns // MINUTE_GPU_NS
    return found


def reasons(metered: Metered) -> list[str]:
    """Why records are open in quarantine."""
    return [waiting.cause.reason for waiting in metered.open.values()]


def after(*batches: list[dict[str, Any]], reference: Reference | None = None) -> Metered:
    """What has become of these batches."""
    metered = Metered()
    for batch in batches:
        metered.take(batch, reference)
    return metered


@pytest.mark.defect("M24")
def test_voided_time_stays_covered() -> None:
    """A replay of it is a duplicate, and no other allocation may take it."""
    metered = after([interval()], [correction(NOON_MS, HALF)], [interval()])
    assert (120, 30, 60, 0, 30) == minutes(metered)
    metered.take([interval(allocation_id="guest")])
    assert ["conflict"] == reasons(metered)


def test_released_time_is_free_for_others_and_remembered_for_its_own() -> None:
    """The guest is billed; the voided allocation, reported again, is a duplicate all the same."""
    metered = after([interval()], [correction(release=True)])
    metered.take([interval(allocation_id="guest", tenant_id=B)])
    metered.take([interval()])
    assert (180, 60, 60, 0, 60) == minutes(metered)
    assert {B: 60} == billed(metered)


def test_a_replacement_bills_the_same_time_under_other_terms() -> None:
    """Whatever of the terms it names; the rest stays as it was reported."""
    metered = after([interval()], [correction(replacement={"sku": "l40s-48"})])
    [bucket] = [bucket for bucket, gpu_ns in metered.outcome().billed.items() if gpu_ns]
    assert (A, "main", "l40s-48", "on_demand") == bucket[:2] + bucket[5:7]
    assert 260_000_000 == metered.outcome().charged[bucket]


@pytest.mark.parametrize("tenant", [A, B])
def test_reported_again_as_reported_or_as_corrected_is_a_duplicate(tenant: str) -> None:
    """Both are this allocation's time; so is what a third tenant's would be corrected to."""
    metered = after([interval()], [correction(replacement={"tenant_id": B})])
    metered.take([interval(tenant_id=tenant)])
    assert (120, 60, 60, 0, 0) == minutes(metered)
    assert [] == reasons(metered)


def test_reported_under_terms_that_no_correction_gives_is_a_conflict() -> None:
    """The correction gave it another project; another tenant is none of its terms."""
    metered = after([interval()], [correction(replacement={"project_id": "other"})])
    metered.take([interval(tenant_id=C)])
    assert ["conflict"] == reasons(metered)


def test_another_share_or_slice_of_a_replaced_allocation_is_a_conflict() -> None:
    """It is not what was corrected."""
    metered = after([interval()], [correction(replacement={"tenant_id": B})])
    metered.take([interval(devices=[device(share_ppm=500_000)])])
    metered.take([interval(devices=[device("GPU-1", "GPU-1/m1")])])
    assert ["conflict", "conflict"] == reasons(metered)


def test_voided_time_reported_for_another_tenant_is_a_conflict() -> None:
    """A void has no terms that it could agree with."""
    metered = after([interval()], [correction()], [interval(tenant_id=B)])
    assert ["conflict"] == reasons(metered)


def test_a_lower_revision_changes_nothing_and_a_higher_one_counts() -> None:
    """Whatever came first."""
    metered = after([interval()], [correction(revision=2, replacement={"tenant_id": B})])
    assert [] == metered.take([correction(revision=1)])
    assert {B: 60} == billed(metered)
    metered.take([correction(revision=3)])
    assert (60, 0, 0, 0, 60) == minutes(metered)
    metered.take([correction(revision=4, replacement={"project_id": "other"})])
    assert {A: 60} == billed(metered)


def test_an_equal_revision_with_other_content_waits_for_its_part_only() -> None:
    """The rest of it counts; a higher revision settles it, and a replay then finds nothing left."""
    metered = after([interval()], [correction(NOON_MS, HALF, replacement={"tenant_id": B})])
    metered.take([correction()])
    assert ["conflict"] == reasons(metered)
    assert (60, 30, 0, 0, 30) == minutes(metered)
    metered.replay(list(metered.open), facts(), LATER_MS)
    assert ["conflict"] == reasons(metered)
    metered.take([correction(NOON_MS, HALF, revision=2)])
    metered.replay(list(metered.open), facts(), LATER_MS)
    assert [] == reasons(metered)
    assert (60, 0, 0, 0, 60) == minutes(metered)


def test_an_equal_revision_that_contradicts_everywhere_does_not_count() -> None:
    """By another action, another replacement, or another release."""
    for other in (
        {"replacement": {"tenant_id": B}},
        {"release": True},
        {"slice_uuids": ["GPU-1"], "release": True},
        {"node_id": None, "start_ms": NOON_MS, "end_ms": HALF, "release": True},
    ):
        metered = after([interval()], [correction(node_id=None)], [correction(**other)])
        assert ["conflict"] == reasons(metered)
        assert 1 == len(metered.corrections)


def test_a_slice_that_is_not_contradicted_counts() -> None:
    """One of two slices is void already; the other one is replaced."""
    halves = [device("GPU-1", f"GPU-1/m{n}", 500_000) for n in (1, 2)]
    metered = after([interval(devices=halves)], [correction(slice_uuids=["GPU-1/m1"])])
    metered.take([correction(replacement={"tenant_id": B})])
    assert ["conflict"] == reasons(metered)
    assert (60, 30, 0, 0, 30) == minutes(metered)
    assert {B: 30} == billed(metered)


def test_a_node_that_is_not_contradicted_counts() -> None:
    """One of two nodes is void already; on the other one all is replaced."""
    hours = [interval(), interval(node_id="n2", devices=[device("GPU-2")])]
    metered = after(hours, [correction()], [correction(node_id=None, replacement={"tenant_id": B})])
    assert ["conflict"] == reasons(metered)
    assert {B: 60} == billed(metered)


def test_the_first_of_several_contradictions_is_named() -> None:
    """Two slices are void already; a third one, that nobody named, is replaced."""
    parts = [device("GPU-1", f"GPU-1/m{n}", 300_000) for n in (1, 2, 3)]
    voids = [correction(slice_uuids=[f"GPU-1/m{n}"]) for n in (1, 2)]
    metered = after([interval(devices=parts)], voids, [correction(replacement={"tenant_id": B})])
    [waiting] = metered.open.values()
    assert "GPU-1/m1" in waiting.cause.detail
    assert {B: 18} == billed(metered)


@pytest.mark.defect("M23")
def test_the_same_again_is_nothing() -> None:
    """Whoever approved it, for whatever reason."""
    metered = after([interval()], [correction()])
    assert [] == metered.take([correction(reason="again", approved_by=None)])
    assert 1 == len(metered.corrections)
    assert [] == reasons(metered)


def test_a_bucket_that_falls_is_stated_at_its_next_revision_zero_too() -> None:
    """And one that rises keeps the revision it has."""
    metered = after([interval()])
    [half] = metered.take([correction(NOON_MS, HALF)])
    assert (1, 420_000_000) == (half.revision, half.total_micro)
    [none] = metered.take([correction(HALF, END)])
    assert (2, 0, 0) == (none.revision, none.total_gpu_ns, none.total_micro)
    [back] = metered.take([correction(revision=2, replacement={"project_id": "main"})])
    assert (2, 840_000_000) == (back.revision, back.total_micro)


def test_usage_that_is_void_when_it_comes_states_nothing() -> None:
    """Nothing was ever booked of it."""
    metered = after([correction()])
    assert [] == metered.take([interval()])
    assert (60, 0, 0, 0, 60) == minutes(metered)


def test_a_hold_stays_with_its_tenant() -> None:
    """Usage that becomes another tenant's is drawn from no hold; under other terms it keeps it."""
    metered = after([interval(hold_id="h1")])
    stated = metered.take([correction(replacement={"tenant_id": B})])
    assert {A: "h1", B: None} == {total.tenant_id: total.hold_id for total in stated}
    stated = metered.take([correction(revision=2, replacement={"price_class": "spot"})])
    assert ["h1"] == [total.hold_id for total in stated if total.price_class == "spot"]
    fresh = after([correction(replacement={"sku": "l40s-48"})])
    [total] = fresh.take([interval(hold_id="h2")])
    assert "h2" == total.hold_id
    other = after([correction(replacement={"tenant_id": B})])
    [total] = other.take([interval(hold_id="h2")])
    assert total.hold_id is None


@pytest.mark.parametrize("back", [{"replacement": {"project_id": "main"}}, {}])
def test_a_hold_of_another_tenant_does_not_come_back_with_the_time(back: dict[str, Any]) -> None:
    """Time was another tenant's, whose own usage has a hold; back with its own it has none."""
    metered = after(
        [interval(NOON_MS, HALF), interval(HALF, END, tenant_id=B, hold_id="of-b")],
        [correction(NOON_MS, HALF, replacement={"tenant_id": B})],
        [correction(NOON_MS, HALF, revision=2, **back)],
    )
    holds = {total.tenant_id: total.hold_id for total in metered.totals.values()}
    assert {A: None, B: "of-b"} == holds


def test_released_time_returns_unless_another_allocation_has_it() -> None:
    """Then the higher revision waits, whole, until the time is free again."""
    metered = after([interval()], [correction(release=True)])
    metered.take([interval(NOON_MS, HALF, allocation_id="guest", tenant_id=B)])
    metered.take([correction(revision=2, replacement={"tenant_id": C})])
    assert ["conflict"] == reasons(metered)
    assert (90, 30, 0, 0, 60) == minutes(metered)
    metered.take([correction(allocation_id="guest", release=True)])
    metered.judge_released(facts())
    assert [] == reasons(metered)
    assert {C: 60} == billed(metered)
    assert (90, 60, 0, 0, 30) == minutes(metered)


def test_freed_time_that_is_voided_or_released_again_moves_where_it_belongs() -> None:
    """Part of it returns; what is left on both sides stays free."""
    metered = after([interval()], [correction(release=True)])
    third = HOUR_MS // 3
    metered.take([correction(NOON_MS + third, END - third, revision=2)])
    metered.take([interval(allocation_id="guest", tenant_id=B)])
    assert (120, 40, 0, 20, 60) == minutes(metered)
    metered.take([interval()])
    assert (180, 40, 60, 20, 60) == minutes(metered)


def test_a_conflict_that_a_replacement_ends_is_released() -> None:
    """What was reported under the new terms before the correction came is a duplicate now."""
    metered = after([interval()], [interval(tenant_id=B)])
    assert ["conflict"] == reasons(metered)
    metered.take([correction(replacement={"tenant_id": B})])
    metered.judge_released(facts())
    assert (120, 60, 60, 0, 0) == minutes(metered)


@pytest.mark.parametrize("order", [1, -1])
def test_a_replacement_that_lacks_a_fact_waits_for_it(order: int) -> None:
    """Its tenant; then its SKU; then a price. In the other order the usage waits, where it must."""
    known = facts()
    few = Reference({TenantId(A): "PKR"}, known.book, {})
    batches = [[interval()], [correction(replacement={"tenant_id": B})]][::order]
    metered = after(*batches, reference=few)
    assert ["unknown-tenant"] == reasons(metered)
    [waiting] = metered.open.values()
    assert TenantId(B) == waiting.tenant_id
    assert 0 == waiting.quarantined_gpu_ns.get(NOON_MS, 0)
    metered.replay(list(metered.open), known)
    assert {B: 60} == billed(metered)
    batches = [[interval()], [correction(replacement={"sku": "b300"})]][::order]
    assert ["unknown-sku"] == reasons(after(*batches))
    batches = [[interval()], [correction(replacement={"price_class": "gold"})]][::order]
    assert ["no-price"] == reasons(after(*batches))


def test_usage_whose_new_tenant_is_forgotten_waits_for_that_tenant() -> None:
    """A restored metering may know a correction before it knows whom it names."""
    few = Reference({TenantId(A): "PKR"}, facts().book, {})
    metered = after([correction(replacement={"tenant_id": B})])
    metered.take([interval()], few)
    [waiting] = metered.open.values()
    assert ("unknown-tenant", TenantId(B)) == (waiting.cause.reason, waiting.tenant_id)
    metered.replay(list(metered.open), facts())
    assert {B: 60} == billed(metered)


def test_late_usage_waits_and_a_late_replay_of_voided_or_freed_time_is_a_duplicate() -> None:
    """Only new time is late."""
    late = facts({LHR: END + 80 * HOUR_MS})
    for release in (False, True):
        metered = after([interval()], [correction(release=release)])
        metered.take([interval()], late)
        assert (120, 0, 60, 0, 60) == minutes(metered)
        metered.take([interval(NOON_MS, END + HOUR_MS)], late)
        assert ["too-late"] == reasons(metered)


def test_a_correction_that_reaches_behind_the_horizon_takes_an_operator() -> None:
    """Whoever replays its record approves it."""
    metered = after([interval()])
    metered.take([correction()], facts({LHR: END + 80 * HOUR_MS}))
    assert ["needs-approval"] == reasons(metered)
    assert (60, 60, 0, 0, 0) == minutes(metered)
    metered.replay(list(metered.open), facts({LHR: END + 80 * HOUR_MS}), LATER_MS)
    assert [] == reasons(metered)
    assert (60, 0, 0, 0, 60) == minutes(metered)


def test_what_takes_an_operator_is_what_is_named_not_what_is_covered() -> None:
    """168 GPU-hours: of named slices whole devices for the whole span, else what is covered."""
    week = {"start_ms": NOON_MS, "end_ms": NOON_MS + 168 * HOUR_MS}
    hour_gpu_ns = HOUR_MS * 1_000_000
    one, two = said(**week, slice_uuids=["a", "a"]), said(**week, slice_uuids=["a", "b"])
    assert approval_needed(one, 0, None) is None
    assert "336 GPU-hours" in (approval_needed(two, 0, None) or "")
    assert approval_needed(said(**week), 168 * hour_gpu_ns, None) is None
    assert approval_needed(said(**week), 168 * hour_gpu_ns + 1, None) is not None
    assert approval_needed(one, 0, NOON_MS) is None
    assert "lateness horizon" in (approval_needed(one, 0, NOON_MS + 1) or "")


MANY = [device(f"GPU-{number}") for number in range(64)]


@pytest.mark.parametrize("together", [False, True])
def test_a_correction_that_waited_for_its_usage_is_judged_again_then(together: bool) -> None:
    """In another batch or in the same: too large, it never counted, and an operator decides."""
    void = correction(NOON_MS, NOON_MS + 3 * HOUR_MS)
    used = interval(NOON_MS, NOON_MS + 3 * HOUR_MS, devices=MANY)
    metered = after([void, used]) if together else after([void], [used])
    assert ["needs-approval"] == reasons(metered)
    assert {} == metered.corrections
    assert {A: 64 * 180} == billed(metered)
    metered.replay(list(metered.open), facts(), LATER_MS)
    assert {} == billed(metered)


@pytest.mark.parametrize("together", [False, True])
def test_a_correction_that_is_small_enough_then_waits_no_more(together: bool) -> None:
    """The next usage is not judged by it, however much there is."""
    void = correction(NOON_MS, NOON_MS + 4 * HOUR_MS)
    metered = after([void, interval()]) if together else after([void], [interval()])
    assert [False] == [fact.waits for fact, _ in metered.corrections.values()]
    metered.take([interval(END, NOON_MS + 4 * HOUR_MS, devices=MANY)])
    assert {} == billed(metered)


def test_usage_that_a_waiting_correction_does_not_name_leaves_it_waiting() -> None:
    """On another node, on another slice, and at another time."""
    metered = after([correction(slice_uuids=["GPU-7"])], [interval(node_id="n2")], [interval()])
    metered.take([interval(END, END + HOUR_MS, devices=[device("GPU-7")])])
    assert [True] == [fact.waits for fact, _ in metered.corrections.values()]
    metered.take([interval(devices=[device("GPU-7")])])
    assert [False] == [fact.waits for fact, _ in metered.corrections.values()]


@pytest.mark.parametrize("together", [False, True])
def test_a_correction_in_conflict_does_not_wait_for_its_usage_as_well(together: bool) -> None:
    """Contradicted in part before anything is covered, it is in quarantine once, and whole."""
    batches = [
        [correction(NOON_MS, HALF), correction(replacement={"tenant_id": B})],
        [interval(HALF, END)],
    ]
    # By the time the usage comes, what was in time reaches behind the horizon.
    behind = facts({LHR: HALF + 72 * HOUR_MS})
    metered = Metered()
    if together:
        metered.take([*batches[0], *batches[1]])
    else:
        metered.take(batches[0])
        metered.take(batches[1], behind)
    assert ["conflict"] == reasons(metered)
    assert 1 == len(metered.corrections)
    assert {A: 30} == billed(metered)
    metered.replay(list(metered.open), facts(), LATER_MS)
    assert ["conflict"] == reasons(metered)
    assert {B: 30} == billed(metered)


@pytest.mark.parametrize("too_much", [False, True])
def test_a_correction_that_was_no_known_event_is_counted_no_more_once_it_is_read(
    too_much: bool,
) -> None:
    """No record of usage is left of it, even if it is back in quarantine within the batch."""
    few = Reference({}, facts().book, {})
    used = interval(NOON_MS, NOON_MS + 3 * HOUR_MS, devices=MANY) if too_much else interval()
    value = event(correction(NOON_MS, NOON_MS + 3 * HOUR_MS), 1, "correction")
    record = UsageRecord(LHR, "t", 0, 0, LATER_MS, None, value, HEADERS)
    unknown = QuarantineCause("unknown-type", "no such event")
    metered = Metered()
    metered.meter_records([structs.replace(record, cause=unknown)], few)
    metered.take([used], few)
    assert ["unknown-type", "unknown-tenant"] == reasons(metered)
    assert [2, 0, 0, 2] == metered.outcome().records
    # The service can read it by now.
    metered.open[1] = metered.open[1]._replace(record=record)
    metered.replay(list(metered.open), facts())
    assert (["needs-approval"] if too_much else []) == reasons(metered)
    assert [1, 1, 0, 0] == metered.outcome().records


def approved(**members: Any) -> CorrectionOrder:
    """A correction that operators have approved."""
    correction_said = said(**members)
    return CorrectionOrder(proposal_id(correction_said, "key:1", 1), correction_said, None)


def test_operators_need_nobodys_leave() -> None:
    """However large and late it is: two of them have approved it."""
    late = facts({LHR: END + 80 * HOUR_MS})
    metered = after([interval()])
    metered.approve(approved(slice_uuids=["GPU-1"], end_ms=NOON_MS + 300 * HOUR_MS), late)
    assert (60, 0, 0, 0, 60) == minutes(metered)
    assert {} == metered.waiting


def test_an_operators_correction_that_cannot_count_waits_where_it_is_kept() -> None:
    """For its tenant; for taken time; beside another content of its revision."""
    metered = after([interval()], [correction(NOON_MS, HALF, release=True)])
    metered.take([interval(NOON_MS, HALF, allocation_id="guest")])
    unknown = approved(revision=2, replacement={"tenant_id": "nobody"})
    metered.approve(unknown, facts())
    taken = approved(revision=3)
    metered.approve(taken, facts())
    beside = approved(revision=1, replacement={"tenant_id": B})
    metered.approve(beside, facts())
    assert {
        unknown.correction_id: "unknown-tenant",
        taken.correction_id: "conflict",
        beside.correction_id: "conflict",
    } == {name: cause.reason for name, cause in metered.waiting.items()}
    assert {A: 30, B: 30} == billed(metered)
    assert [] == reasons(metered)


def test_an_operators_correction_that_a_hub_said_already_counts() -> None:
    """It is the same; so it needs no second one, and waits for nothing."""
    metered = after([interval()], [correction()])
    metered.approve(approved(), facts())
    assert {} == metered.waiting
    assert (60, 0, 0, 0, 60) == minutes(metered)


def test_the_next_revision_is_above_all_that_concern_the_node() -> None:
    """A correction of all nodes is above those of every node."""
    known = [said(revision=3), said(revision=5, node_id="n2"), said(revision=4, node_id=None)]
    assert 1 == next_revision([], NodeId("n1"))
    assert 5 == next_revision(known, NodeId("n1"))
    assert 6 == next_revision(known, None)


def test_corrections_are_named_by_their_content() -> None:
    """So the same again has the same name, and a proposal also says whose it is."""
    assert hub_correction_id(said()) == hub_correction_id(said())
    assert hub_correction_id(said()) != hub_correction_id(said(revision=2))
    names = {proposal_id(said(), who, at) for who in ("key:1", "key:2") for at in (1, 2)}
    assert 4 == len(names)


def test_what_is_the_same_is_said_by_scope_and_content() -> None:
    """Order and repetition of slices do not matter; reasons and approvals neither."""
    first = said(slice_uuids=["a", "b"])
    assert is_same(first, structs.replace(first, reason="x", slice_uuids=["b", "a", "a"]))
    assert not is_same(first, structs.replace(first, slice_uuids=None))
    assert not is_same(first, structs.replace(first, revision=2))


def test_a_void_without_a_replacement_and_with_an_empty_one_are_the_same() -> None:
    """The second neither contradicts the first nor counts beside it."""
    metered = after([interval()], [correction()], [correction(replacement={}, action="void")])
    assert [] == reasons(metered)
    assert 1 == len(metered.corrections)


def test_time_is_released_and_taken_in_one_batch() -> None:
    """The stored row becomes another allocation's."""
    guest = interval(allocation_id="guest", tenant_id=B)
    metered = after([interval()], [correction(release=True), guest])
    assert (120, 60, 0, 0, 60) == minutes(metered)
    [(_, claim)] = metered.rows.values()
    assert "guest" == claim.allocation_id


def test_an_allocation_of_another_hub_is_another() -> None:
    """In one batch, under one name."""
    khi = interval(hub="khi", tenant_id=B)
    metered = after([interval(), khi, correction(), khi])
    assert (180, 60, 60, 0, 60) == minutes(metered)
    assert {B: 60} == billed(metered)


def test_a_defect_of_ours_is_loud() -> None:
    """A price that rated an hour is gone, or what a correction names was not loaded."""
    metered = after([interval()])
    series = PriceSeries("PKR", Sku("l40s-48"), PriceClass("on_demand"))
    left = PriceBook(facts().book.lines_of(series))
    with pytest.raises(LookupError, match="no price"):
        metered.take(
            [correction(replacement={"sku": "l40s-48"})], Reference(facts().currencies, left, {})
        )
    batch = engine.prepare([], facts(), approved=[approved()])
    with pytest.raises(LookupError, match="loaded"):
        engine.meter(batch, MeteringState({}, {}, []))
