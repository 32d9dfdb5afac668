"""A recorded cluster trace becomes what three hubs would have reported. Pure.

What the trace does not record (tenant, hub, node, SKU) is picked by the pod's name, so that two
replays agree. The rules are published: others replay the same file and expect the same bills.

Refusals: `MissingColumns` for a file that cannot be replayed at all, `Unreadable` for a row; a row
without GPUs, without both times, or that ends before it begins is readable and bills nothing.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from hashlib import sha256
from math import floor
from typing import Final, Literal, NewType, TypeVar

import seed
from demo.stream import (
    Disturbance,
    Node,
    PlannedEvent,
    daily_instants,
    disturb,
    order_plan,
    run_events,
    watermark_event,
    whole_slices,
)
from hisab_contracts import events
from hisab_contracts.ids import ID_PATTERN, AllocationId, NodeId, PriceClass, TenantId
from hisab_contracts.units import WHOLE_DEVICE_PPM, hour_floor_ms, month_bounds_ms

NEEDED_COLUMNS: Final = (
    "name",
    "num_gpu",
    "gpu_milli",
    "qos",
    "pod_phase",
    "creation_time",
    "deletion_time",
    "scheduled_time",
)
MONTHS: Final = (seed.FIRST_MONTH, "2025-08", "2025-09", "2025-10", "2025-11")
LAST_WATERMARK_MS: Final = month_bounds_ms(MONTHS[-1])[1]
"""2025-12-01T00:00:00+05:00: once every source has passed it, November can close."""
GRANT_MICRO: Final = 10**12

NODES: Final = tuple(NodeId(f"n{number:02d}") for number in range(16))
_EPOCH: Final = "trace"
_MOST_GPUS: Final = 64
_MOST_DIGITS: Final = 15
_NAME: Final = re.compile(ID_PATTERN)
_LONGEST_NAME: Final = 125
"""Leaves room for `/<device>` within the 128 characters of a device id."""

TimeMs = NewType("TimeMs", int)
Choice = TypeVar("Choice")


@dataclass(frozen=True, slots=True)
class Pod:
    """A billable row: one allocation."""

    name: str
    gpus: int
    share_ppm: int
    price_class: PriceClass
    cause: Literal["user", "limit"]
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class NotBillable:
    """A row that used no GPU."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that can neither be billed nor be left out as one that used no GPU."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class MissingColumns:
    """The file cannot be replayed: these columns are not in its header."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """All rows of a file: `rows` = billable + not billable + unreadable."""

    rows: int
    pods: tuple[Pod, ...]
    unreadable: tuple[Unreadable, ...]


def read_trace(lines: Iterable[str]) -> Trace | MissingColumns:
    """Read a trace from the lines of its CSV file, the header first."""
    reader = csv.reader(lines)
    # A first row that is no CSV has no columns: all are missing.
    header = [name.strip() for name in next(_each_row(reader), None) or []]
    missing = tuple(name for name in NEEDED_COLUMNS if name not in header)
    if missing:
        return MissingColumns(missing)
    rows, pods, unreadable = 0, [], []
    for row in _each_row(reader):
        if row == []:
            continue
        rows += 1
        match _parse_pod(header, row, reader.line_num):
            case Pod() as pod:
                pods.append(pod)
            case Unreadable() as refused:
                unreadable.append(refused)
            case NotBillable():
                pass
    return Trace(rows, tuple(pods), tuple(unreadable))


def plan_trace(trace: Trace, chaos_seed: int | None = None) -> list[PlannedEvent]:
    """Return everything the hubs report for a trace, in emission order."""
    usage = [event for pod in trace.pods for event in _events_of(pod)]
    nodes = [Node(hub, node_id) for hub in seed.HUBS for node_id in NODES]
    instants = watermark_instants(trace.pods)
    watermarks = [watermark_event(node, _EPOCH, at_ms) for node in nodes for at_ms in instants]
    plan = usage + watermarks
    if chaos_seed is not None:
        plan = disturb(plan, Disturbance(chaos_seed))
    return order_plan(plan)


def watermark_instants(pods: Sequence[Pod]) -> list[int]:
    """Return when every source emits its watermark: at first, after each UTC day, at the end.

    The first one makes every source known before any usage, so that no hub seems complete while a
    source has not reported yet; the last one lets November close.
    """
    first_ms = hour_floor_ms(min([seed.EPOCH_MS, *(pod.start_ms for pod in pods)]))
    end_ms = max([seed.EPOCH_MS, *(pod.end_ms for pod in pods)])
    return sorted({*daily_instants(first_ms, end_ms), LAST_WATERMARK_MS})


def pick(salt: str, name: str, choices: Sequence[Choice]) -> Choice:
    """Choose what the trace does not record, the same way in every replay."""
    digest = sha256(f"{salt}:{name}".encode()).digest()
    return choices[int.from_bytes(digest[:8], "big") % len(choices)]


def tenant_of(name: str) -> TenantId:
    """Return the tenant that a pod's name picks."""
    return pick("tenant", name, tuple(seed.TENANTS))


def _each_row(reader: Iterator[list[str]]) -> Iterator[list[str] | None]:
    """Yield rows; None for one the CSV reader itself cannot take."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield None


def _parse_pod(
    header: Sequence[str], row: list[str] | None, line: int
) -> Pod | NotBillable | Unreadable:
    """Read one row; never raises for what stands in it."""
    if row is None or len(row) != len(header):
        found = "no CSV row" if row is None else f"{len(row)} fields"
        return Unreadable(line, f"{found}, the header has {len(header)}")
    fields = dict(zip(header, (value.strip() for value in row), strict=True))
    try:
        gpus = _require_whole("num_gpu", _parse_number(fields["num_gpu"]))
        share_ppm = _require_whole("gpu_milli", _parse_number(fields["gpu_milli"] or "0") * 1000)
        start_ms = _parse_instant_ms(fields["scheduled_time"])
        end_ms = _parse_instant_ms(fields["deletion_time"])
    except ValueError as error:
        return Unreadable(line, str(error))
    if gpus <= 0 or start_ms is None or end_ms is None or end_ms <= start_ms:
        return NotBillable()
    name, price_class = fields["name"], seed.CLASS_OF_QOS.get(fields["qos"])
    fault = _find_fault(name, gpus, share_ppm, start_ms, end_ms)
    if fault is not None or price_class is None:
        return Unreadable(line, fault or f"qos {fields['qos']!r} is no price class")
    cause: Literal["user", "limit"] = "limit" if fields["pod_phase"] == "Failed" else "user"
    return Pod(name, gpus, share_ppm, price_class, cause, start_ms, end_ms)


def _parse_instant_ms(text: str) -> TimeMs | None:
    """Floor a decimal number of seconds to the millisecond; None for an absent one."""
    if not text:
        return None
    return TimeMs(seed.EPOCH_MS + floor(_parse_number(text) * 1000))


def _parse_number(text: str) -> Decimal:
    """Read a finite decimal number of a size that means something; ValueError otherwise."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{text[:40]!r} is no decimal number") from None
    if not number.is_finite() or number.adjusted() > _MOST_DIGITS:
        raise ValueError(f"{text[:40]!r} is no number of a sensible size")
    return number


def _require_whole(name: str, number: Decimal) -> int:
    if number != number.to_integral_value():
        raise ValueError(f"{name} is not a whole number of its unit: {number}")
    return int(number)


def _find_fault(name: str, gpus: int, share_ppm: int, start_ms: int, end_ms: int) -> str | None:
    """Return what no event could carry, or None."""
    if _NAME.fullmatch(name) is None or len(name) > _LONGEST_NAME:
        return f"name {name[:40]!r} is no allocation id"
    if gpus > _MOST_GPUS:
        return f"num_gpu {gpus} is more than {_MOST_GPUS}"
    if not 1 <= share_ppm <= WHOLE_DEVICE_PPM:
        return f"gpu_milli gives a share of {share_ppm} ppm"
    if not events.EARLIEST_MS <= start_ms < end_ms < events.LATEST_MS:
        return "its times lie outside 2020 to 2100"
    return None


def _events_of(pod: Pod) -> Iterator[PlannedEvent]:
    """Return one pod's start, its usage cut at UTC hours, and its end."""
    node = Node(pick("hub", pod.name, tuple(seed.HUBS)), pick("node", pod.name, NODES))
    run = events.Interval(
        hub=node.hub,
        node_id=node.node_id,
        tenant_id=tenant_of(pod.name),
        allocation_id=AllocationId(pod.name),
        sku=pick("sku", pod.name, tuple(seed.PKR_PER_GPU_HOUR)),
        price_class=pod.price_class,
        state="running",
        # The trace names no devices, so every pod gets devices of its own: nobody can share them.
        devices=whole_slices((f"{pod.name}/{n}" for n in range(pod.gpus)), pod.share_ppm),
        start_ms=pod.start_ms,
        end_ms=pod.end_ms,
        project_id=seed.PROJECT,
    )
    yield from run_events(node.source(_EPOCH), run, pod.cause)
