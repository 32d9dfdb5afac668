"""How much one party may ask for: token buckets, as many as there is room for. Pure.

A bucket fills at a steady rate up to its size; what is asked for is taken out, and an empty one
refuses. A party that was not heard of has a full one. Nobody can fill the memory by inventing
parties: beyond `MOST_PARTIES` the one that was silent longest is forgotten, which gives it a full
bucket again. So whoever has that many names has that many buckets, and no more can be had from it.

Refusal: the seconds after which there will be room again.
"""

from __future__ import annotations

import ipaddress
import math
from typing import Final, TypeVar

V = TypeVar("V")

MOST_PARTIES: Final = 10_000


class Throttle:
    """Token buckets by name: `per_s` on average, `burst` at once."""

    def __init__(self, per_s: int, burst: int) -> None:
        """Begin with every bucket full."""
        self._per_s = per_s
        self._burst = burst
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, party: str, now_s: float) -> int:
        """Take one; return 0, or the whole seconds after which one can be had."""
        level, at_s = self._levels.get(party, (float(self._burst), now_s))
        level = min(float(self._burst), level + (now_s - at_s) * self._per_s)
        taken = level >= 1
        keep_newest(self._levels, party, (level - 1 if taken else level, now_s))
        return 0 if taken else math.ceil((1 - level) / self._per_s)

    def give_back(self, party: str) -> None:
        """Give back what was taken and is not to count."""
        if party in self._levels:
            level, at_s = self._levels[party]
            self._levels[party] = min(float(self._burst), level + 1), at_s


def keep_newest(cache: dict[str, V], name: str, value: V) -> None:
    """Keep a value as the newest of a cache; beyond its bound the oldest is forgotten."""
    cache.pop(name, None)
    if len(cache) >= MOST_PARTIES:
        del cache[next(iter(cache))]
    cache[name] = value


def party_of(address: str | None) -> str:
    """Name the party behind an address: an IPv6 network of 64 bits is one household's."""
    try:
        parsed = ipaddress.ip_address(address or "")
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, 64), strict=False))
