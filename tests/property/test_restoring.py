"""Metering comes back from a backup, or from nothing: the ledger books nothing twice."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hisab_contracts.charges import BucketTotal, HubWatermark
from hisab_contracts.ids import TenantId
from property.metered import Metered
from property.test_coverage import TENANTS, anything
from unit.ledger.values import CoreLedger, book
from unit.metering.hub_events import HOUR_MS, NOON_MS, watermark


class Downstream:
    """The ledger's core, and the watermark it keeps: only a higher revision than it knows."""

    def __init__(self) -> None:
        self.ledgers = {TenantId(name): CoreLedger(book(tenant_id=name)) for name in TENANTS}
        self.kept: HubWatermark | None = None

    @property
    def booked(self) -> list[int]:
        """How many entries each book has."""
        return [ledger.book.seq for ledger in self.ledgers.values()]

    @property
    def complete(self) -> tuple[Any, ...]:
        """Up to when, and but for what, as it was last told."""
        return () if self.kept is None else (self.kept.watermark_ms, self.kept.quarantined)

    def hear(self, totals: list[BucketTotal], told: HubWatermark | None) -> None:
        """Take what a batch states."""
        for total in totals:
            assert isinstance(self.ledgers[total.tenant_id].do(total), tuple)
        if told is not None and (self.kept is None or told.revision > self.kept.revision):
            self.kept = told


@st.composite
def a_life(draw: st.DrawFn) -> list[dict[str, Any]]:
    """What a single source says: usage of any kind, and watermarks that never go back."""
    said: list[dict[str, Any]] = []
    watermark_ms = NOON_MS
    for usage in draw(st.lists(anything(), min_size=2, max_size=16)):
        said.append(usage | {"node_id": "n1"})
        if draw(st.booleans()):
            watermark_ms += draw(st.integers(0, 2)) * HOUR_MS
            said.append(watermark(watermark_ms))
    return said


@pytest.mark.defect("M3", "M9", "F22", "F24")
@settings(max_examples=60, deadline=None)
@given(said=a_life(), size=st.integers(1, 5), again=st.integers(1, 5), data=st.data())
def test_metering_restored_to_any_earlier_point_and_replayed_adds_nothing_to_the_ledger(
    said: list[dict[str, Any]], size: int, again: int, data: st.DataObject
) -> None:
    """Not an entry more, however the replay is cut; and what it tells afterwards is heard."""
    metering, downstream = Metered(), Downstream()
    restore_at = data.draw(st.integers(0, (len(said) - 1) // size)) * size
    backup, now_ms = deepcopy(metering), NOON_MS
    for at in range(0, len(said), size):
        if at == restore_at:
            backup = deepcopy(metering)
        now_ms += 1_000
        downstream.hear(metering.take(said[at : at + size]), metering.state_hub(now_ms))
    booked = downstream.booked
    for at in range(restore_at, len(said), again):
        now_ms += 1_000
        downstream.hear(backup.take(said[at : at + again]), backup.state_hub(now_ms))
    assert booked == downstream.booked
    assert metering.outcome() == backup.outcome()
    backup.take([watermark(NOON_MS + 80 * HOUR_MS)])
    downstream.hear([], backup.state_hub(now_ms + 1_000))
    view = backup.view()
    assert NOON_MS + 80 * HOUR_MS == view.watermark_ms
    assert (view.watermark_ms, view.quarantined) == downstream.complete
