"""The simulated month is the same every time, and holds what its scenes need."""

from __future__ import annotations

import seed
from demo import simulator
from demo.stream import HEADERS, Numbering, Rank
from hisab_contracts import events
from hisab_contracts.events import HubEvent, read_event


def test_the_month_is_the_same_every_time() -> None:
    """Seed and dates are fixed."""
    assert simulator.plan_month() == simulator.plan_month()


def test_every_record_is_an_event_by_the_contract() -> None:
    """What the driver writes, the contracts read."""
    for record in Numbering().write_records(simulator.plan_month().plan):
        assert isinstance(read_event(record.value, HEADERS, record.hub), HubEvent)


def test_the_month_has_resends_an_unknown_sku_and_one_dispute() -> None:
    """And grants' tenants compute only once they have grants."""
    plan = simulator.plan_month().plan
    usage = [event.fact for event in plan if isinstance(event.fact, events.Interval)]
    assert any(event.rank == Rank.RESENT for event in plan)
    assert any(fact.sku == simulator.NEW_SKU for fact in usage)
    assert [fact.allocation_id for fact in usage].count(simulator.DISPUTED_RUN) == 1
    early = {fact.tenant_id for fact in usage if fact.start_ms < simulator.GRANTS_FROM_MS}
    assert early <= set(seed.COMMERCIAL)


def test_every_source_ends_the_month_with_its_watermark() -> None:
    """July is complete once all of it was reported, and not before."""
    last: dict[str, int] = {}
    for event in simulator.plan_month().plan:
        if isinstance(event.fact, events.Watermark):
            last[event.source] = event.fact.watermark_ms
        else:
            assert last[event.source] < simulator.UNTIL_MS
    assert {simulator.UNTIL_MS} == set(last.values())
    assert len(last) == 12
