"""What a usage report over a month of 2 000 tenants costs: out of the sums, and out of buckets.

A month of buckets is written as the service's writer would, one per tenant and hour, of two SKUs;
the running service adds them up by itself. Then the whole month is asked for over HTTP, again and
again, by tenant, hub, SKU, class and month. The baseline is the statement that reads the same out
of the buckets, in the same minute; both must come to the same sums, or there is no figure.
"""

from __future__ import annotations

import asyncio
import csv
import time
from typing import Any

import asyncpg
import httpx2

from stack import Stack

TENANTS = 2_000
DAYS = 31
FIRST_MS = 1_751_310_000_000
"""2025-07-01 in Karachi."""
DAY_MS = 86_400_000
ANSWERS = 40
BASELINES = 5
PATIENCE_S = 900
WINDOW = {"from": "2025-06-30T19:00:00.000Z", "until": "2025-07-31T19:00:00.000Z"}
GROUPED = "tenant_id,hub,sku,price_class,month"

_FILL = """
insert into buckets (bucket_id, tenant_id, project_id, allocation_id, hub, node_id, rate_line_id,
                     price_version, sku, price_class, hour_ms, gpu_ns, charge_micro)
select md5(t.number || '/' || h.hour_ms)::uuid, 'bench-' || t.number, 'main', 'job-' || t.number,
       (array['lhr', 'khi', 'isb'])[1 + t.number % 3], 'n' || t.number % 500, 'bench', 'bench',
       (array['h100-sxm-80', 'l40s-48'])[1 + (h.hour_ms / 3600000 % 2)::int], 'on_demand',
       h.hour_ms, 3600000000000 - t.number, 840000000 - t.number
  from generate_series(1, $1::int) as t (number),
       generate_series($2::bigint, $3::bigint - 1, 3600000) as h (hour_ms)
"""
_WAITING = "select count(*) from usage_changes"
_FROM_BUCKETS = """
select tenant_id, hub, sku, price_class, billing_month(hour_ms) as month, sum(gpu_ns) as gpu_ns,
       sum(charge_micro) as charge_micro
  from buckets
 where hour_ms >= $1 and hour_ms < $2
 group by tenant_id, hub, sku, price_class, billing_month(hour_ms)
 order by tenant_id, hub, sku, price_class, month
"""
_ROWS = """
select (select count(*) from usage_hours) as hours, (select count(*) from usage_days) as days,
       pg_total_relation_size('usage_hours') as hours_bytes,
       pg_total_relation_size('usage_days') as days_bytes,
       pg_total_relation_size('buckets') as buckets_bytes
"""


async def measure(stack: Stack) -> list[dict[str, Any]]:
    """Fill a month, wait until it is added up, and ask for it."""
    connection = await asyncpg.connect(stack.database("metering", "writer"))
    try:
        for day in range(DAYS):
            from_ms = FIRST_MS + day * DAY_MS
            await connection.execute(_FILL, TENANTS, from_ms, from_ms + DAY_MS)
        filled = time.perf_counter()
        while await connection.fetchval(_WAITING):
            if time.perf_counter() - filled > PATIENCE_S:
                raise RuntimeError("the service does not add usage up")
            await asyncio.sleep(0.2)
        folded_s = time.perf_counter() - filled
        await connection.execute("analyze buckets")
        window = (FIRST_MS, FIRST_MS + DAYS * DAY_MS)
        baselines = []
        rows: list[asyncpg.Record] = []
        for _ in range(BASELINES):
            began = time.perf_counter()
            rows = await connection.fetch(_FROM_BUCKETS, *window)
            baselines.append(time.perf_counter() - began)
        expected = [tuple(map(str, row.values())) for row in rows]
        answers = await _ask(stack, expected)
        stored = await connection.fetchrow(_ROWS)
    finally:
        await connection.close()
    if stored is None:
        raise RuntimeError("an aggregate has one row")
    bare_s = sorted(baselines)[BASELINES // 2]
    answers.sort()
    return [
        {
            "name": "metering.usage_month",
            "value": round(answers[ANSWERS // 2] * 1_000, 1),
            "unit": "ms",
            "work": TENANTS * DAYS * 24,
            "seconds": round(sum(answers), 2),
            "p50_ms": round(answers[ANSWERS // 2] * 1_000, 1),
            "p99_ms": round(answers[-1] * 1_000, 1),
            "lines": len(expected),
            "folded_s": round(folded_s, 1),
            "rows_of_hours": stored["hours"],
            "rows_of_days": stored["days"],
            "bytes_of_an_hour": stored["hours_bytes"] // stored["hours"],
            "bytes_of_a_day": stored["days_bytes"] // stored["days"],
            "bytes_of_a_bucket": stored["buckets_bytes"] // (TENANTS * DAYS * 24),
            "baseline": {"name": "the same out of buckets (ms)", "value": round(bare_s * 1_000, 1)},
            "ratio": round(bare_s / answers[ANSWERS // 2], 2),
        }
    ]


async def _ask(stack: Stack, expected: list[tuple[str, ...]]) -> list[float]:
    """Ask for the month as CSV; how long each answer took."""
    members = ("tenant_id", "hub", "sku", "price_class", "month", "gpu_ns", "charge_micro")
    headers = {"Authorization": f"Bearer {stack.key('auditor')}", "Accept": "text/csv"}
    seconds: list[float] = []
    text = ""
    async with httpx2.AsyncClient(
        base_url=stack.url("metering"), timeout=120, trust_env=False, headers=headers
    ) as client:
        for _ in range(ANSWERS):
            began = time.perf_counter()
            answer = await client.get("/v1/usage", params=WINDOW | {"group_by": GROUPED})
            seconds.append(time.perf_counter() - began)
            answer.raise_for_status()
            text = answer.text
        found = [
            tuple(line[member] for member in members) for line in csv.DictReader(text.splitlines())
        ]
    if found != expected:
        raise RuntimeError(f"wrong sums: {len(found)} lines, {len(expected)} expected")
    return seconds
