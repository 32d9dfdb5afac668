"""What hubs say in these tests, in their own words: dictionaries and JSON, nothing of ours."""

from __future__ import annotations

import json
from typing import Any

HOUR_MS = 3_600_000
MINUTE_MS = 60_000
NOON_MS = 1_753_956_000_000
"""2025-07-31T10:00:00Z, the hour of the worked example."""
WHOLE = 1_000_000
HEADERS = [("content-type", b"application/cloudevents+json")]


def device(name: str = "GPU-1", part: str | None = None, share_ppm: int = WHOLE) -> dict[str, Any]:
    """A device, or one slice of it."""
    return {"device_uuid": name, "slice_uuid": part or name, "share_ppm": share_ppm}


def interval(
    start_ms: int = NOON_MS, end_ms: int = NOON_MS + HOUR_MS, **members: Any
) -> dict[str, Any]:
    """The data of a `usage.interval`: job-1 of ravi-health on GPU-1 of lhr/n1 unless said."""
    said: dict[str, Any] = {
        "hub": "lhr",
        "cluster": "c1",
        "node_id": "n1",
        "tenant_id": "ravi-health",
        "project_id": "main",
        "allocation_id": "job-1",
        "hold_id": None,
        "sku": "h100-sxm-80",
        "price_class": "on_demand",
        "state": "running",
        "devices": [device()],
        "start_ms": start_ms,
        "end_ms": end_ms,
        "energy_start_mj": None,
        "energy_end_mj": None,
    }
    return said | members


def started(started_ms: int, **members: Any) -> dict[str, Any]:
    """The data of an `allocation.started`: what an interval says, without its ends."""
    said = interval(**members) | {"started_ms": started_ms}
    return {name: value for name, value in said.items() if name not in {"start_ms", "end_ms"}}


def ended(ended_ms: int, reserved_gpu_ms: int, **members: Any) -> dict[str, Any]:
    """The data of an `allocation.ended`."""
    said: dict[str, Any] = {
        "hub": "lhr",
        "node_id": "n1",
        "tenant_id": "ravi-health",
        "project_id": "main",
        "allocation_id": "job-1",
        "ended_ms": ended_ms,
        "cause": "user",
        "reserved_gpu_ms": reserved_gpu_ms,
        "last_checkpoint_ms": None,
    }
    return said | members


def watermark(watermark_ms: int, **members: Any) -> dict[str, Any]:
    """The data of a `hub.watermark`."""
    return {"hub": "lhr", "node_id": "n1", "watermark_ms": watermark_ms} | members


def correction(
    start_ms: int = NOON_MS, end_ms: int = NOON_MS + HOUR_MS, **members: Any
) -> dict[str, Any]:
    """The data of a `usage.correction`: voids all of job-1 in that hour unless said."""
    said: dict[str, Any] = {
        "hub": "lhr",
        "node_id": "n1",
        "allocation_id": "job-1",
        "slice_uuids": None,
        "start_ms": start_ms,
        "end_ms": end_ms,
        "revision": 1,
        "action": "void",
        "release": False,
        "replacement": None,
        "reason": "test load",
        "approved_by": "ops-1",
    }
    if "replacement" in members:
        said["action"] = "replace"
    return said | members


TYPES = {
    "interval": "pk.hisab.usage.interval.v1",
    "started": "pk.hisab.allocation.started.v1",
    "ended": "pk.hisab.allocation.ended.v1",
    "watermark": "pk.hisab.hub.watermark.v1",
    "retired": "pk.hisab.source.retired.v1",
    "correction": "pk.hisab.usage.correction.v1",
}


def event(
    data: dict[str, Any], sequence: int, kind: str = "interval", epoch: str = "e1", **envelope: Any
) -> bytes:
    """A structured CloudEvent around data, from the source of its hub and node."""
    hub, node_id = data.get("hub", "lhr"), data.get("node_id") or "n1"
    said = {
        "specversion": "1.0",
        "type": TYPES[kind],
        "source": f"/hubs/{hub}/nodes/{node_id}/epochs/{epoch}",
        "id": f"{kind}-{sequence}",
        "time": "2025-07-31T10:00:00.000Z",
        "sequence": f"{sequence:020d}",
        "datacontenttype": "application/json",
        "data": data,
    }
    return json.dumps(said | envelope).encode()
