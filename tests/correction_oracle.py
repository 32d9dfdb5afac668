"""The naive oracle of corrections: what usage comes to under them, importing nothing of ours.

Time is cut into ticks. Every tick of every slice is looked at alone: who reported it, and which
correction of that allocation has the highest revision there. Histories are free of two claims on
one tick, but where a void has released it, and of two contents of one revision; so order,
repetition and chunking are nothing that it could see.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

HOUR_MS = 3_600_000
TERMS = ("tenant_id", "project_id", "sku", "price_class")


class Line(NamedTuple):
    """An hour of an allocation on a node, under some terms."""

    hub: str
    node_id: str
    allocation_id: str
    tenant_id: str
    project_id: str
    sku: str
    price_class: str
    hour_ms: int


class Corrected(NamedTuple):
    """GPU-ns; voided time stands with the terms that it was reported under."""

    billed: dict[Line, int]
    voided: dict[Line, int]


def standing(corrections: Iterable[Any], at: Any) -> Any:
    """Return the correction of the highest revision at (hub, node, allocation, slice, instant)."""
    hub, node_id, allocation_id, slice_uuid, instant_ms = at
    found = None
    for said in corrections:
        if (
            (said["hub"], said["allocation_id"]) == (hub, allocation_id)
            and said["node_id"] in (None, node_id)
            and (said["slice_uuids"] is None or slice_uuid in said["slice_uuids"])
            and said["start_ms"] <= instant_ms < said["end_ms"]
            and (found is None or said["revision"] > found["revision"])
        ):
            found = said
    return found


def correct(usage: Iterable[Any], corrections: list[Any], tick_ms: int) -> Corrected:
    """Bill and void every tick that was reported; all edges lie on ticks."""
    reported: dict[Any, tuple[tuple[str, ...], int]] = {}
    for said in usage:
        for device in said["devices"]:
            for instant_ms in range(said["start_ms"], said["end_ms"], tick_ms):
                at = (
                    said["hub"],
                    said["node_id"],
                    said["allocation_id"],
                    device["slice_uuid"],
                    instant_ms,
                )
                reported[at] = (tuple(said[name] for name in TERMS), device["share_ppm"])
    billed: dict[Line, int] = defaultdict(int)
    voided: dict[Line, int] = defaultdict(int)
    for at, (own_terms, share_ppm) in reported.items():
        terms, found, sums = own_terms, standing(corrections, at), billed
        if found is not None and found["action"] == "void":
            sums = voided
        elif found is not None:
            others = [found["replacement"].get(name) for name in TERMS]
            terms = tuple(other or own for other, own in zip(others, own_terms, strict=True))
        hour_ms = at[-1] - at[-1] % HOUR_MS
        sums[Line._make((*at[:3], *terms, hour_ms))] += tick_ms * share_ppm
    return Corrected(dict(billed), dict(voided))


def is_free(corrections: list[Any], at: Any) -> bool:
    """Say whether another allocation may have a tick of an allocation."""
    found = standing(corrections, at)
    return found is not None and bool(found["release"])
