"""When a billing month may be closed: by what the hubs say, never by a clock.

A month is *complete* when every hub that has ever emitted says, in every partition, that all usage
before the month's end has been stated (its watermark), and no known tenant's GPU time of that
month waits in quarantine. Watermarks travel in-band behind the charges they cover, so a partition
whose watermark has passed has also been read that far: no lag needs to be asked for. All partitions
count, whoever's tenants they carry: it is simpler, and the month's sums are then complete for
everybody.

Before any hub has emitted nothing is known to be complete, so no month is: closing then would make
everything that follows late. A month that lies before all usage is closable as soon as every hub's
watermark has passed it; it closes without invoices.

`blockers` lists everything in the way, in a fixed order. The first kinds are matters of
completeness, which finance may override on the record; the last (`LASTING`) leave nothing to bill
by and cannot be overridden.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from hisab_contracts.charges import OpenQuarantine, SourceBehind
from hisab_contracts.ids import HubCode, TenantId
from hisab_contracts.units import instant_text, month_bounds_ms

LASTING: Final = frozenset({"entry-gap", "tenant-unknown", "legal-entity-missing", "tax-missing"})
"""Kinds of blockers that no override can help: nothing correct can be computed."""


@dataclass(frozen=True, slots=True)
class HubMark:
    """What a hub's newest watermark in one partition said."""

    partition: int
    hub: HubCode
    revision: int
    watermark_ms: int | None
    silent: bool
    quarantined: tuple[OpenQuarantine, ...]
    behind: tuple[SourceBehind, ...]


@dataclass(frozen=True, slots=True)
class Blocker:
    """One thing that keeps a month open, and where to look."""

    kind: str
    hub: HubCode | None
    source: str | None
    tenant_id: TenantId | None
    detail: str


@dataclass(frozen=True, slots=True)
class MonthState:
    """All that decides whether a month may be closed."""

    month: str
    partitions: int
    marks: tuple[HubMark, ...]
    quarantined_tenants: frozenset[TenantId]
    """Those of the tenants named by `marks` whom we know: others are listed and block nobody."""
    broken_books: tuple[TenantId, ...]
    """Tenants some of whose entries are still missing here: they are being fetched."""
    unknown_tenants: tuple[TenantId, ...]
    """Tenants with charges in the month of whom nothing has been said yet."""
    taxed_hubs: frozenset[HubCode]
    """Hubs with a tax row on the month's tax point."""
    billed_hubs: tuple[HubCode, ...]
    """Hubs at which commercial tenants used something in the month."""
    tax_point_on: dt.date
    has_seller: bool


def blockers(state: MonthState) -> tuple[Blocker, ...]:
    """List what keeps a month open, in a fixed order; empty when it may be closed."""
    return (
        *_incomplete_hubs(state),
        *_open_quarantine(state),
        *(
            Blocker("entry-gap", None, None, tenant, "entries are missing and being fetched")
            for tenant in state.broken_books
        ),
        *(
            Blocker("tenant-unknown", None, None, tenant, "nothing says yet who this tenant is")
            for tenant in state.unknown_tenants
        ),
        *_nothing_to_bill_by(state),
    )


def complete_until(marks: Iterable[HubMark], partitions: int) -> Mapping[HubCode, int | None]:
    """Return, for each hub that has emitted, the instant its usage is complete to everywhere.

    None while any partition has no watermark of that hub.
    """
    lowest: dict[HubCode, int | None] = {}
    for hub, by_partition in _by_hub(marks).items():
        known = [by_partition[p].watermark_ms for p in range(partitions) if p in by_partition]
        stated = [watermark for watermark in known if watermark is not None]
        lowest[hub] = min(stated) if len(stated) == partitions else None
    return lowest


def _by_hub(marks: Iterable[HubMark]) -> dict[HubCode, dict[int, HubMark]]:
    by_hub: dict[HubCode, dict[int, HubMark]] = {}
    for mark in sorted(marks, key=lambda mark: (mark.hub, mark.partition)):
        by_hub.setdefault(mark.hub, {})[mark.partition] = mark
    return by_hub


def _incomplete_hubs(state: MonthState) -> Iterable[Blocker]:
    if not state.marks:
        yield Blocker("no-watermark", None, None, None, "no hub has emitted anything yet")
        return
    end_ms = month_bounds_ms(state.month)[1]
    complete = complete_until(state.marks, state.partitions)
    for hub, by_partition in _by_hub(state.marks).items():
        until_ms = complete[hub]
        if until_ms is None or until_ms < end_ms:
            newest = max(by_partition.values(), key=lambda mark: (mark.revision, mark.partition))
            yield from _behind(newest, until_ms, end_ms)


def _behind(mark: HubMark, until_ms: int | None, end_ms: int) -> Iterable[Blocker]:
    """Name the sources that hold a hub back; the hub itself when none is named."""
    kind = "silent-hub" if mark.silent else "watermark"
    needed = f"complete until {_instant(until_ms)}, needed until {_instant(end_ms)}"
    named = [
        source
        for source in mark.behind
        if source.watermark_ms is None or source.watermark_ms < end_ms
    ]
    for source in named:
        detail = f"{source.reason}; its watermark is {_instant(source.watermark_ms)}; hub {needed}"
        yield Blocker(kind, mark.hub, source.source, None, detail)
    if not named:
        yield Blocker(kind, mark.hub, None, None, f"hub {needed}")


def _open_quarantine(state: MonthState) -> Iterable[Blocker]:
    """Per hub and tenant the most that any partition still reports."""
    waiting: dict[tuple[HubCode, TenantId], int] = {}
    for mark in state.marks:
        for item in mark.quarantined:
            if item.month == state.month and item.tenant_id in state.quarantined_tenants:
                place = (mark.hub, item.tenant_id)
                waiting[place] = max(waiting.get(place, 0), item.quarantined_gpu_ns)
    for (hub, tenant_id), waiting_gpu_ns in sorted(waiting.items()):
        if waiting_gpu_ns > 0:
            detail = f"{waiting_gpu_ns} GPU-ns of this month wait in quarantine"
            yield Blocker("quarantine", hub, None, tenant_id, detail)


def _nothing_to_bill_by(state: MonthState) -> Sequence[Blocker]:
    found = [
        Blocker("tax-missing", hub, None, None, f"no tax row covers {state.tax_point_on}")
        for hub in sorted(set(state.billed_hubs) - state.taxed_hubs)
    ]
    if not state.has_seller:
        detail = "no legal entity that sells is registered"
        found.insert(0, Blocker("legal-entity-missing", None, None, None, detail))
    return found


def _instant(instant_ms: int | None) -> str:
    return "not stated" if instant_ms is None else instant_text(instant_ms)
