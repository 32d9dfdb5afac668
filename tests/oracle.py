"""The naive oracle: what a replay must bill, computed plainly, importing nothing of ours.

Usage is an iterable of interval `data` dictionaries in order of arrival. Each is cut at what is
covered on its devices already: what nobody covers is billed, what the same claim covers is a
duplicate, the rest is a conflict. All integers: 1 GPU-ns = 1 ms of 1 ppm.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from hashlib import sha256
from itertools import pairwise
from math import floor
from pathlib import Path
from typing import Any, NamedTuple

HOUR_MS = 3_600_000
EPOCH_MS = 1_751_310_000_000  # 2025-07-01T00:00:00+05:00
SKUS = ("h100-sxm-80", "h200-sxm-141", "a100-sxm-80", "l40s-48", "b200-sxm-180")
PKR_PER_GPU_HOUR = dict(zip(SKUS, (840, 1100, 420, 260, 1450), strict=True))
PERCENT = {"on_demand": 100, "reserved": 80, "spot": 50}
MICRO_PER_GPU_HOUR = {
    (s, c): pkr * 10_000 * pct for s, pkr in PKR_PER_GPU_HOUR.items() for c, pct in PERCENT.items()
}
TAX_BPS = {"lhr": 1600, "khi": 1500, "isb": 1500}
COMMERCIAL = ("indus-foundry", "chenab-robotics", "makran-logistics", "khyber-media")
OTHERS = ("ravi-health", "sutlej-agri", "mehran-speech", "soan-fintech",
          "uni-karakoram", "uni-hingol", "flood-watch", "crop-watch")  # fmt: skip
CLASS = {"LS": "on_demand", "Burstable": "on_demand", "Guaranteed": "reserved", "BE": "spot"}


class Bucket(NamedTuple):
    """What is rated as one: an allocation's use of one SKU and class in one UTC hour."""

    tenant_id: str
    project_id: str
    allocation_id: str
    hub: str
    node_id: str
    sku: str
    price_class: str
    hour_ms: int


class Metered(NamedTuple):
    """Billed GPU-ns per bucket, and the identity's other sides."""

    buckets: dict[Bucket, int]
    reported_gpu_ns: int
    duplicate_gpu_ns: int
    conflict_gpu_ns: int


def meter(usage: Any) -> Metered:
    """Bill every instant of every device slice at most once, to whom it was reported first for."""
    owned: dict[Any, list[Any]] = defaultdict(list)  # device -> [from, until, slice, claim]
    buckets: dict[Bucket, int] = defaultdict(int)
    reported = duplicate = conflict = 0
    for data in usage:
        who = tuple(({"project_id": "main"} | data)[name] for name in Bucket._fields[:-1])
        for device in data["devices"]:
            name, slice_name = device["device_uuid"], device["slice_uuid"]
            share, claim = device["share_ppm"], (who, device["share_ppm"])
            spans = owned[data["hub"], data["node_id"], name]
            rivals = [s for s in spans if s[2] == slice_name or name in (s[2], slice_name)]
            edges = {data["start_ms"], data["end_ms"]}
            edges |= {t for s in rivals for t in s[:2] if data["start_ms"] < t < data["end_ms"]}
            cuts = sorted(edges)
            for start, end in pairwise(cuts):
                gpu_ns = (end - start) * share
                reported += gpu_ns
                over = [s for s in rivals if s[0] < end and start < s[1]]
                if not over:
                    if spans and spans[-1][1:] == [start, slice_name, claim]:
                        spans[-1][1] = end
                    else:
                        spans.append([start, end, slice_name, claim])
                    for hour in range(start - start % HOUR_MS, end, HOUR_MS):
                        part = min(end, hour + HOUR_MS) - max(start, hour)
                        buckets[Bucket._make((*who, hour))] += part * share
                elif all(s[2:] == [slice_name, claim] for s in over):
                    duplicate += gpu_ns
                else:
                    conflict += gpu_ns
    return Metered(dict(buckets), reported, duplicate, conflict)


def rate(buckets: dict[Bucket, int], prices: Any = None) -> dict[Bucket, int]:
    """Price each bucket's total in micro-units, floor once per bucket."""
    prices = prices or MICRO_PER_GPU_HOUR
    return {b: n * prices[b.sku, b.price_class] // 3_600_000_000_000 for b, n in buckets.items()}


def month_of(instant_ms: int) -> str:
    """Name the Asia/Karachi month (UTC+5) of an instant, `yyyy-mm`."""
    local = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=instant_ms + 5 * HOUR_MS)
    return f"{local:%Y-%m}"


def bills(charges: dict[Bucket, int], commercial: Any = COMMERCIAL) -> dict[Any, tuple[int, int]]:
    """Bill (tenant, month) -> (net_minor, tax_minor): rounded half up, once per line."""
    lines: dict[Any, int] = defaultdict(int)
    for b, micro in charges.items():
        if b.tenant_id in commercial:
            lines[b.tenant_id, month_of(b.hour_ms), b.hub, b.sku, b.price_class] += micro
    totals: dict[Any, tuple[int, int]] = {}
    for (tenant, month, hub, _, _), micro in lines.items():
        net = (micro + 5_000) // 10_000
        tax = (net * TAX_BPS[hub] + 5_000) // 10_000
        before = totals.get((tenant, month), (0, 0))
        totals[tenant, month] = (before[0] + net, before[1] + tax)
    return {key: total for key, total in totals.items() if total[0]}


def trace_usage(path: Path) -> list[dict[str, Any]]:
    """Turn a recorded trace into hourly intervals, by the rules that the README's replay states."""
    usage = []
    for row in csv.DictReader(path.open(newline="")):
        name = row["name"]
        try:
            gpus, share = int(row["num_gpu"]), int(row["gpu_milli"]) * 1000
            start = EPOCH_MS + floor(1000 * Decimal(row["scheduled_time"]))
            end = EPOCH_MS + floor(1000 * Decimal(row["deletion_time"]))
        except (InvalidOperation, ValueError, TypeError):
            continue
        said = {
            "hub": pick("hub", name, list(TAX_BPS)),
            "node_id": pick("node", name, [f"n{i:02d}" for i in range(16)]),
            "tenant_id": pick("tenant", name, COMMERCIAL + OTHERS),
            "allocation_id": name,
            "sku": pick("sku", name, SKUS),
            "price_class": CLASS[row["qos"]],
            "devices": [
                {"device_uuid": f"{name}/{i}", "slice_uuid": f"{name}/{i}", "share_ppm": share}
                for i in range(gpus)
            ],
        }
        billable = gpus > 0 and end > start
        for hour in range(start - start % HOUR_MS, end, HOUR_MS) if billable else ():
            cut = {"start_ms": max(start, hour), "end_ms": min(end, hour + HOUR_MS)}
            usage.append(said | cut)
    return sorted(usage, key=lambda u: (u["end_ms"], u["allocation_id"], u["start_ms"]))


def pick(salt: str, name: str, xs: Any) -> Any:
    """Choose what the trace does not say, by the pod's name."""
    return xs[int.from_bytes(sha256(f"{salt}:{name}".encode()).digest()[:8], "big") % len(xs)]
