"""A recorded cluster trace becomes what three hubs would have said (INTERFACE section 4). Pure.

What the trace does not say (tenant, hub, node, SKU) is picked by the pod's name, so that two
replays agree. Refusals: `MissingColumns` for a file that cannot be replayed at all, `Unreadable`
for a row; a row without GPUs, without both times, or that ends before it begins is readable and
bills nothing.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from hashlib import sha256
from math import floor
from typing import Final, Literal, NewType

from demo.stream import (
    ENDED,
    STARTED_FIRST,
    Disturbance,
    Said,
    disturb,
    hourly,
    in_order,
    interval_said,
    source_of,
    watermark_said,
)
from hisab_contracts import events
from hisab_contracts.ids import (
    ID_PATTERN,
    AllocationId,
    DeviceId,
    HubCode,
    NodeId,
    PriceClass,
    ProjectId,
    Sku,
    SliceId,
    TenantId,
)
from hisab_contracts.units import hour_floor_ms

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
EPOCH_MS: Final = 1_751_310_000_000
"""2025-07-01T00:00:00+05:00: second 0 of a trace."""
CLOSING_MS: Final = 1_764_529_200_000
"""2025-12-01T00:00:00+05:00: the last watermark, after which November can close."""
MONTHS: Final = ("2025-07", "2025-08", "2025-09", "2025-10", "2025-11")
GRANT_MICRO: Final = 10**12

HUBS: Final = ("lhr", "khi", "isb")
NODES: Final = tuple(f"n{number:02d}" for number in range(16))
COMMERCIAL: Final = ("indus-foundry", "chenab-robotics", "makran-logistics", "khyber-media")
GRANTED: Final = (
    "ravi-health",
    "sutlej-agri",
    "mehran-speech",
    "soan-fintech",
    "uni-karakoram",
    "uni-hingol",
    "flood-watch",
    "crop-watch",
)
KIND_OF: Final = {
    **dict.fromkeys(COMMERCIAL, "commercial"),
    **dict.fromkeys(GRANTED[:4], "startup"),
    **dict.fromkeys(GRANTED[4:6], "university"),
    **dict.fromkeys(GRANTED[6:], "programme"),
}
SKUS: Final = ("h100-sxm-80", "h200-sxm-141", "a100-sxm-80", "l40s-48", "b200-sxm-180")
PRICE_CLASSES: Final = {
    "LS": "on_demand",
    "Burstable": "on_demand",
    "Guaranteed": "reserved",
    "BE": "spot",
}
_DAY_MS: Final = 24 * 3_600_000
_MOST_GPUS: Final = 64
_MOST_DIGITS: Final = 15
_NAME: Final = re.compile(ID_PATTERN)
_LONGEST_NAME: Final = 125
"""Leaves room for `/<device>` within the 128 characters of a device id."""

TimeMs = NewType("TimeMs", int)


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
    """A row that says nothing we could bill or leave out with a clear conscience."""

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
    header = [name.strip() for name in next(reader, [])]
    missing = tuple(name for name in NEEDED_COLUMNS if name not in header)
    if missing:
        return MissingColumns(missing)
    rows, pods, unreadable = 0, [], []
    for row in _rows(reader):
        if row == []:
            continue
        rows += 1
        match _pod(header, row, reader.line_num):
            case Pod() as pod:
                pods.append(pod)
            case Unreadable() as refused:
                unreadable.append(refused)
            case NotBillable():
                pass
    return Trace(rows, tuple(pods), tuple(unreadable))


def plan_of(trace: Trace, chaos_seed: int | None = None) -> list[Said]:
    """Return everything the hubs say for a trace, in emission order."""
    usage = [said for pod in trace.pods for said in _said_of(pod)]
    sources = [source_of(hub, node_id, "trace") for hub in HUBS for node_id in NODES]
    instants = watermark_instants(trace.pods)
    marks = [watermark_said(source, at_ms) for source in sources for at_ms in instants]
    plan = usage + marks
    if chaos_seed is not None:
        plan = disturb(plan, Disturbance(chaos_seed))
    return in_order(plan)


def watermark_instants(pods: Sequence[Pod]) -> list[int]:
    """Return when every source says its watermark: at first, after each UTC day, at the end.

    The first one makes every source known before any usage, so that no hub seems complete while a
    source has not spoken yet; the last one lets November close.
    """
    first_ms = hour_floor_ms(min([EPOCH_MS, *(pod.start_ms for pod in pods)]))
    end_ms = max([EPOCH_MS, *(pod.end_ms for pod in pods)])
    days = range(first_ms - first_ms % _DAY_MS + _DAY_MS, end_ms + 1, _DAY_MS)
    return sorted({first_ms, *days, end_ms, CLOSING_MS})


def pick(salt: str, name: str, choices: Sequence[str]) -> str:
    """Choose what the trace does not say, the same way in every replay."""
    digest = sha256(f"{salt}:{name}".encode()).digest()
    return choices[int.from_bytes(digest[:8], "big") % len(choices)]


def tenant_of(name: str) -> TenantId:
    """Return the tenant that a pod's name picks."""
    return TenantId(pick("tenant", name, COMMERCIAL + GRANTED))


def _rows(reader: Iterator[list[str]]) -> Iterator[list[str] | None]:
    """Yield rows; None for one the CSV reader itself cannot take."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield None


def _pod(header: Sequence[str], row: list[str] | None, line: int) -> Pod | NotBillable | Unreadable:
    """Read one row; never raises for what stands in it."""
    if row is None or len(row) != len(header):
        found = "no CSV row" if row is None else f"{len(row)} fields"
        return Unreadable(line, f"{found}, the header has {len(header)}")
    said = dict(zip(header, (value.strip() for value in row), strict=True))
    try:
        gpus = _whole("num_gpu", _number(said["num_gpu"]))
        share_ppm = _whole("gpu_milli", _number(said["gpu_milli"] or "0") * 1000)
        start_ms = _instant_ms(said["scheduled_time"])
        end_ms = _instant_ms(said["deletion_time"])
    except ValueError as error:
        return Unreadable(line, str(error))
    if gpus <= 0 or start_ms is None or end_ms is None or end_ms <= start_ms:
        return NotBillable()
    name, price_class = said["name"], PRICE_CLASSES.get(said["qos"])
    fault = _fault_of(name, gpus, share_ppm, start_ms, end_ms)
    if fault is not None or price_class is None:
        return Unreadable(line, fault or f"qos {said['qos']!r} is no price class")
    cause: Literal["user", "limit"] = "limit" if said["pod_phase"] == "Failed" else "user"
    return Pod(name, gpus, share_ppm, PriceClass(price_class), cause, start_ms, end_ms)


def _instant_ms(text: str) -> TimeMs | None:
    """Floor a decimal number of seconds to the millisecond; None for an absent one."""
    if not text:
        return None
    return TimeMs(EPOCH_MS + floor(_number(text) * 1000))


def _number(text: str) -> Decimal:
    """Read a finite decimal number of a size that means something; ValueError otherwise."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{text[:40]!r} is no decimal number") from None
    if not number.is_finite() or number.adjusted() > _MOST_DIGITS:
        raise ValueError(f"{text[:40]!r} is no number of a sensible size")
    return number


def _whole(name: str, number: Decimal) -> int:
    if number != number.to_integral_value():
        raise ValueError(f"{name} is not a whole number of its unit: {number}")
    return int(number)


def _fault_of(name: str, gpus: int, share_ppm: int, start_ms: int, end_ms: int) -> str | None:
    """Return what no event could carry, or None."""
    if _NAME.fullmatch(name) is None or len(name) > _LONGEST_NAME:
        return f"name {name[:40]!r} is no allocation id"
    if gpus > _MOST_GPUS:
        return f"num_gpu {gpus} is more than {_MOST_GPUS}"
    if not 1 <= share_ppm <= 1_000_000:
        return f"gpu_milli gives a share of {share_ppm} ppm"
    if not events.EARLIEST_MS <= start_ms < end_ms < events.LATEST_MS:
        return "its times lie outside 2020 to 2100"
    return None


def _said_of(pod: Pod) -> Iterator[Said]:
    """Return one pod's start, its usage cut at UTC hours, and its end."""
    hub, node_id = HubCode(pick("hub", pod.name, HUBS)), NodeId(pick("node", pod.name, NODES))
    source = source_of(hub, node_id, "trace")
    names = [f"{pod.name}/{number}" for number in range(pod.gpus)]
    devices = [events.Device(DeviceId(name), SliceId(name), pod.share_ppm) for name in names]
    tenant_id, allocation_id = tenant_of(pod.name), AllocationId(pod.name)
    sku, project_id = Sku(pick("sku", pod.name, SKUS)), ProjectId("main")
    started = events.Started(
        hub=hub,
        node_id=node_id,
        tenant_id=tenant_id,
        allocation_id=allocation_id,
        sku=sku,
        price_class=pod.price_class,
        devices=devices,
        started_ms=pod.start_ms,
        project_id=project_id,
    )
    yield Said(pod.start_ms, STARTED_FIRST, source, pod.name, started)
    for start_ms, end_ms in hourly(pod.start_ms, pod.end_ms):
        usage = events.Interval(
            hub=hub,
            node_id=node_id,
            tenant_id=tenant_id,
            allocation_id=allocation_id,
            sku=sku,
            price_class=pod.price_class,
            state="running",
            devices=devices,
            start_ms=start_ms,
            end_ms=end_ms,
            project_id=project_id,
        )
        yield interval_said(source, usage)
    ended = events.Ended(
        hub=hub,
        node_id=node_id,
        tenant_id=tenant_id,
        allocation_id=allocation_id,
        ended_ms=pod.end_ms,
        cause=pod.cause,
        reserved_gpu_ms=(pod.end_ms - pod.start_ms) * pod.gpus * pod.share_ppm // 1_000_000,
        project_id=project_id,
    )
    yield Said(pod.end_ms, ENDED, source, pod.name, ended)
