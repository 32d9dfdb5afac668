"""The simulated month is the same every time, and holds what its scenes need."""

from __future__ import annotations

from demo import replay, simulator
from demo.stream import AGAIN, HEADERS, Numbering
from hisab_contracts import events
from hisab_contracts.events import HubEvent, read_event


def test_the_month_is_the_same_every_time() -> None:
    """Seed and dates are fixed."""
    assert simulator.month() == simulator.month()


def test_every_record_is_an_event_by_the_contract() -> None:
    """What the driver writes, the contracts read."""
    numbering = Numbering()
    for said in simulator.month().said:
        record = numbering.record(said)
        assert isinstance(read_event(record.value, HEADERS, record.hub), HubEvent)


def test_the_month_has_resends_an_unknown_sku_and_one_dispute() -> None:
    """And grants' tenants compute only once they have grants."""
    said = simulator.month().said
    usage = [one.fact for one in said if isinstance(one.fact, events.Interval)]
    assert any(one.rank == AGAIN for one in said)
    assert any(fact.sku == simulator.NEW_SKU for fact in usage)
    assert [str(fact.allocation_id) for fact in usage].count("disputed-run") == 1
    early = {fact.tenant_id for fact in usage if fact.start_ms < simulator.GRANTS_FROM_MS}
    assert early <= set(replay.COMMERCIAL)


def test_every_source_ends_the_month_with_its_watermark() -> None:
    """July is complete once all of it was said, and not before."""
    last: dict[str, int] = {}
    for one in simulator.month().said:
        if isinstance(one.fact, events.Watermark):
            last[one.source] = one.fact.watermark_ms
        else:
            assert last[one.source] < simulator.UNTIL_MS
    assert {simulator.UNTIL_MS} == set(last.values())
    assert len(last) == 12
