"""Measure: `python tests/bench [NAME ...]` writes `.hisab/bench.json` (`make bench`).

`--long` measures what grows instead, at two sizes (`make bench-long`): by hand, not in CI.

Each figure runs on a stack of its own, with its baseline in the same minute on the same machine:
machines are shared and noisy, so ratios count and absolute values are indications. With names, only
those figures run and replace their old rows.
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine
from typing import Any

import asyncpg

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(ROOT / "deploy" / "local"), str(ROOT / "tests")]

import invoicing_gap_scan  # noqa: E402
import ledger_charges  # noqa: E402
import ledger_growth  # noqa: E402
import metering_events  # noqa: E402
import metering_growth  # noqa: E402
import metering_usage  # noqa: E402
import path_freshness  # noqa: E402

from stack import Stack, running  # noqa: E402

TARGET = ROOT / ".hisab" / "bench.json"

Measure = Callable[[Stack], Coroutine[Any, Any, list[dict[str, Any]]]]


async def _freshness(stack: Stack) -> list[dict[str, Any]]:
    return [await path_freshness.measure(stack.content())]


FIGURES: dict[str, Measure] = {
    "metering.events": metering_events.measure,
    "metering.usage_month": metering_usage.measure,
    "ledger.charges": ledger_charges.measure,
    "path.freshness": _freshness,
}
"""`ledger.charges` brings `ledger.charges_hot` and `_terms` along: it is their baseline."""

LONG_FIGURES: dict[str, Measure] = {
    "metering.endings": metering_growth.measure_endings,
    "metering.quarantine_list": metering_growth.measure_quarantine_list,
    "metering.look": metering_growth.measure_look,
    "metering.backfill": metering_growth.measure_backfill,
    "invoicing.gap_scan": invoicing_gap_scan.measure,
    "ledger.sequencer_catchup": ledger_growth.measure,
}
"""What grows, measured at two sizes; a figure's `growth` is cost per row at the larger size over
that at the smaller one. The sequencer's figure brings that of the audit along."""


def main(arguments: list[str]) -> int:
    """Run the named figures, or all, one after another; print and write them."""
    names = [argument for argument in arguments if argument != "--long"]
    figures = LONG_FIGURES if "--long" in arguments else FIGURES
    unknown = [name for name in names if name not in figures]
    if unknown:
        print(f"no figure {', '.join(unknown)}; there are {', '.join(figures)}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    for name in names or list(figures):
        print(f"{name}: starting a stack", flush=True)
        with tempfile.TemporaryDirectory() as folder, running(pathlib.Path(folder)) as stack:
            versions = asyncio.run(_versions(stack))
            for figure in asyncio.run(figures[name](stack)):
                rows.append(figure)
                print(json.dumps(figure), flush=True)
    _write(rows, versions)
    return 0


async def _versions(stack: Stack) -> dict[str, str]:
    """Say which PostgreSQL and which Kafka answer; without Apache Kafka, what stands in for it."""
    connection = await asyncpg.connect(stack.database("ledger", "reader"))
    try:
        postgres = str(await connection.fetchval("show server_version"))
    finally:
        await connection.close()
    kafka = stack.provider["kafka"]
    if kafka == "kraft":
        pom = (ROOT / "deploy" / "local" / "pom.xml").read_text()
        found = re.search(r"kafka_2\.13</artifactId>\s*<version>([^<]+)", pom)
        kafka = found[1] if found else kafka
    return {"postgres": postgres, "kafka": kafka}


def _write(rows: list[dict[str, Any]], versions: dict[str, str]) -> None:
    """Merge the rows into bench.json and replace it in one step."""
    before = json.loads(TARGET.read_text())["figures"] if TARGET.exists() else []
    measured = {row["name"] for row in rows}
    figures = [row for row in before if row["name"] not in measured] + rows
    content = {"format": 1, "machine": _machine(versions), "figures": figures}
    TARGET.parent.mkdir(exist_ok=True)
    partial = TARGET.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(TARGET)
    print(f"written: {TARGET.relative_to(ROOT)}")


def _machine(versions: dict[str, str]) -> dict[str, Any]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpus": os.cpu_count(),
        "memory_mib": pages // 2**20,
        "python": platform.python_version(),
        **versions,
        "commit": _commit(),
    }


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
