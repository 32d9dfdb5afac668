"""A trace's rows become events by the published rules, and nothing is skipped silently."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import oracle
from demo.replay import MissingColumns, Trace, plan_trace, read_trace, watermark_instants
from demo.stream import Numbering, Record

HEADER = "name,num_gpu,gpu_milli,qos,pod_phase,creation_time,deletion_time,scheduled_time"
ROOT = Path(__file__).resolve().parents[3]
RECORDED = Path(
    os.environ.get("HISAB_TRACE", ROOT.parent / "shared" / "data" / "openb_pod_list_default.csv")
)


def trace(*rows: str) -> Trace:
    """Read rows under the needed header."""
    found = read_trace([f"{line}\n" for line in (HEADER, *rows)])
    assert isinstance(found, Trace)
    return found


def records(found: Trace, chaos: int | None = None) -> list[Record]:
    """Write the plan of a trace."""
    return Numbering().write_records(plan_trace(found, chaos))


def events(found: Trace, chaos: int | None = None) -> list[dict[str, Any]]:
    """Decode every record of a plan."""
    return [json.loads(record.value) for record in records(found, chaos)]


def usage(emitted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the intervals."""
    return [event["data"] for event in emitted if event["type"] == "pk.hisab.usage.interval.v1"]


def test_missing_columns_are_all_named() -> None:
    """A file that cannot be replayed says what it lacks."""
    found = read_trace(["name,num_gpu,qos\n", "p,1,LS\n"])
    missing = ("gpu_milli", "pod_phase", "creation_time", "deletion_time", "scheduled_time")
    assert MissingColumns(missing) == found


def test_an_empty_file_lacks_every_column() -> None:
    """No header is no trace."""
    found = read_trace([])
    assert isinstance(found, MissingColumns)
    assert HEADER.split(",") == list(found.names)


def test_times_are_floored_to_the_millisecond() -> None:
    """1.0019 s and 2.9999 s are 1001 ms and 2999 ms after the epoch; below zero is floored too."""
    found = trace("p,1,1000,LS,Running,0,2.9999,1.0019", "q,1,1000,LS,Running,0,0.5,-0.0001")
    epoch = 1_751_310_000_000
    times = [(pod.start_ms - epoch, pod.end_ms - epoch) for pod in found.pods]
    assert [(1001, 2999), (-1, 500)] == times


def test_rows_that_use_no_gpu_time_are_readable_and_bill_nothing() -> None:
    """No GPU, an absent time, or an end at or before the start after flooring."""
    found = trace(
        "a,0,0,LS,Running,0,100,0",
        "b,1,1000,BE,Pending,5,,",
        "c,1,1000,LS,Running,0,100,",
        "d,1,1000,LS,Running,0,1.0009,1.0001",
        "e,1,1000,LS,Running,0,5,9",
    )
    assert (5, (), ()) == (found.rows, found.pods, found.unreadable)


@pytest.mark.parametrize(
    "row",
    [
        "p,two,1000,LS,Running,0,100,0",
        "p,1,NaN,LS,Running,0,100,0",
        "p,1,1000,LS,Running,0,Infinity,0",
        "p,1,1000,LS,Running,0,1e999999999,0",
        "p,1,1000,LS,Running,0,soon,0",
        "p,1,1000,Best,Running,0,100,0",
        "p,1,0,LS,Running,0,100,0",
        "p,1,1001,LS,Running,0,100,0",
        "p,65,1000,LS,Running,0,100,0",
        "no/slash,1,1000,LS,Running,0,100,0",
        ",1,1000,LS,Running,0,100,0",
        "p,1,1000,LS,Running,0,99999999999,0",
        "p,1,1000",
        "p,1,1000,LS,Running,0,100,0,more",
    ],
)
def test_a_row_that_cannot_be_read_is_listed_with_its_line(row: str) -> None:
    """It is counted, named, and the rows around it are read."""
    found = trace("a,1,1000,LS,Running,0,100,0", row, "b,1,1000,LS,Running,0,100,0")
    assert (3, ["a", "b"], [3]) == (
        found.rows,
        [pod.name for pod in found.pods],
        [refused.line for refused in found.unreadable],
    )


def test_usage_is_cut_at_utc_hours_and_emitted_in_order_of_its_end() -> None:
    """A pod of 90 minutes is two intervals; the order is (end, name, start)."""
    intervals = usage(events(trace("b,2,1000,LS,Failed,0,5400,0", "a,1,500,BE,Running,0,3600,60")))
    hour = 3_600_000
    epoch = 1_751_310_000_000
    expected = [
        ("a", epoch + 60_000, epoch + hour, 500_000, "spot"),
        ("b", epoch, epoch + hour, 1_000_000, "on_demand"),
        ("b", epoch + hour, epoch + hour + hour // 2, 1_000_000, "on_demand"),
    ]
    assert expected == [
        (
            data["allocation_id"],
            data["start_ms"],
            data["end_ms"],
            data["devices"][0]["share_ppm"],
            data["price_class"],
        )
        for data in intervals
    ]


def test_a_failed_pod_ended_at_its_limit_and_never_by_the_infrastructure() -> None:
    """`pod_phase` Failed is cause `limit`, all else `user`."""
    emitted = events(trace("f,1,1000,LS,Failed,0,60,0", "r,1,1000,LS,Running,0,60,0"))
    ended = [event["data"] for event in emitted if "cause" in event["data"]]
    causes = {data["allocation_id"]: data["cause"] for data in ended}
    assert {"f": "limit", "r": "user"} == causes


def test_every_source_emits_watermarks_after_each_day_at_the_end_and_for_november() -> None:
    """First one before any usage, the last at 2025-12-01 in Karachi."""
    found = trace("p,1,1000,LS,Running,0,100000,0")
    day = 1_751_328_000_000
    expected = [1_751_310_000_000, day, 1_751_410_000_000, 1_764_529_200_000]
    assert expected == watermark_instants(found.pods)


@pytest.mark.parametrize("chaos", [None, 7])
def test_no_source_reports_usage_before_its_own_watermark(chaos: int | None) -> None:
    """Disturbed or not, and its sequence counts 1, 2, 3 ... with resends under their old number."""
    found = trace(*(f"p{n},1,1000,LS,Running,0,{n * 9000 + 250000},{n * 5000}" for n in range(60)))
    watermark: dict[str, int] = {}
    last: dict[str, int] = {}
    for event in events(found, chaos):
        source, sequence, data = event["source"], int(event["sequence"]), event["data"]
        assert sequence <= last.get(source, 0) + 1
        last[source] = max(sequence, last.get(source, 0))
        if "watermark_ms" in data:
            assert data["watermark_ms"] > watermark.get(source, 0)
            watermark[source] = data["watermark_ms"]
        elif "start_ms" in data:
            assert data["start_ms"] >= watermark[source]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_chaos_changes_records_but_nothing_that_is_billed(seed: int) -> None:
    """More is reported and more is duplicate; each bucket has the same GPU time."""
    found = trace(
        *(f"p{n},{n % 3 + 1},1000,BE,Failed,0,{n * 7000 + 90000}.5,{n * 50}" for n in range(40))
    )
    calm, wild = usage(events(found)), usage(events(found, seed))
    expected, actual = oracle.meter(calm), oracle.meter(wild)
    assert expected.buckets == actual.buckets
    assert expected.duplicate_gpu_ns == 0
    assert actual.duplicate_gpu_ns > 0
    assert actual.conflict_gpu_ns == 0
    assert wild != calm


def test_two_replays_emit_the_same_bytes() -> None:
    """Nothing is drawn from a clock or a random source."""
    found = trace("p,1,1000,LS,Running,0,100000,0", "q,8,1000,BE,Failed,0,90000.25,7")
    for chaos in (None, 5):
        assert records(found, chaos) == records(found, chaos)


def test_the_recorded_trace_is_reported_as_published() -> None:
    """6,203 billable pods, 59,362 intervals, and the GPU time of an independent calculation."""
    if not RECORDED.exists():
        pytest.skip("the recorded trace is not on this machine (HISAB_TRACE)")
    with RECORDED.open(newline="") as lines:
        found = read_trace(lines)
    assert isinstance(found, Trace)
    assert (8152, 6203, 0) == (found.rows, len(found.pods), len(found.unreadable))
    reported = usage(events(found))
    assert reported == [
        {**data, **dict.fromkeys(("hold_id", "energy_start_mj", "energy_end_mj"))}
        | {"project_id": "main", "state": "running"}
        for data in oracle.trace_usage(RECORDED)
    ]
    assert len(reported) == 59_362
    reported_gpu_ns = sum(
        (data["end_ms"] - data["start_ms"]) * device["share_ppm"]
        for data in reported
        for device in data["devices"]
    )
    assert reported_gpu_ns // 1_000_000 == 185_294_426_970
