"""`python deploy/demo`: the whole of Hisab in one minute, on real components.

Without DATA three simulated hubs play one past month and then emit live; with DATA=<csv> a recorded
cluster trace is replayed, and CHAOS=<seed> disturbs it. KEEP=1 leaves the stack running. The driver
is an outsider: it speaks Kafka and HTTP, and reads every figure back from the services.

Exit codes: 0 all sums agree · 1 something differs or failed · 2 the request or the file cannot be
used, and nothing was started.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

_DEPLOY: Final = Path(__file__).resolve().parents[1]
# Run as a folder, Python looks for modules in it; ours are the package `demo` and the seed values
# of the local stack.
sys.path[:1] = [str(_DEPLOY), str(_DEPLOY / "local")]

import seed  # noqa: E402
from demo import live, readback, replay, report, scenes, simulator, summary  # noqa: E402
from demo.api import Api, Json  # noqa: E402
from demo.emitter import Emitter  # noqa: E402
from demo.local_stack import LocalStack  # noqa: E402
from demo.scenes import Stage  # noqa: E402
from demo.screen import Screen, gpu_hours, pkr, pkr_of_minor  # noqa: E402
from demo.stream import Numbering, Record  # noqa: E402

ROOT: Final = _DEPLOY.parent
GRANT_MICRO: Final = 3_000_000_000_000
_CANCEL_AGAIN_S: Final = 2
UNDECODABLE: Final = b"\xff\xfe this was never an event \x00"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line and the environment ask for."""

    data: Path | None
    chaos: int | None
    keep: bool
    folder: Path
    live_seconds: float


@dataclass(frozen=True, slots=True)
class PlayResult:
    """What a play leaves behind for the summary."""

    source: Json
    months: tuple[str, ...]
    seconds: dict[str, float]
    hold_refused: Json
    pdfs: dict[str, Path]
    freshness_ms: Json | None


class Stopwatch:
    """Seconds by step, one decimal."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return round(seconds, 1)

    def total(self) -> float:
        """Return the seconds since the start."""
        return round(time.monotonic() - self._began, 1)


def main(arguments: list[str], environment: dict[str, str]) -> int:
    """Read the options, refuse what cannot be replayed, then run."""
    screen = Screen()
    try:
        options = options_of(arguments, environment)
        trace = None if options.data is None else read_trace_file(options.data)
    except UnusableError as refused:
        print(f"demo: {refused}", file=sys.stderr)
        return 2
    stack = LocalStack(options.folder / "demo" / "stack", options.keep)
    try:
        ok = asyncio.run(run_interruptible(run(options, trace, stack, screen)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        screen.bad("interrupted")
        ok = False
    except Exception as failure:  # noqa: BLE001 -- Whatever it is, a person reads it as a failure.
        screen.bad(f"{type(failure).__name__}: {failure}")
        ok = False
    finally:
        if options.keep:
            show_addresses(screen, stack)
        else:
            stack.down()
    if not ok:
        screen.bad("FAIL")
    return 0 if ok else 1


async def run_interruptible(work: Coroutine[None, None, bool]) -> bool:
    """Do the work; SIGINT and SIGTERM cancel it, again until it ends: a library may swallow one."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        if not task.done():
            task.cancel()
            loop.call_later(_CANCEL_AGAIN_S, interrupt)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    return await task


class UnusableError(Exception):
    """The request or the file cannot be used; nothing was started."""


def options_of(arguments: list[str], environment: dict[str, str]) -> Options:
    """Read flags, then the environment (what `make demo DATA=... CHAOS=... KEEP=1` sets)."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", default=environment.get("DATA", ""))
    parser.add_argument("--chaos", default=environment.get("CHAOS", ""))
    keep = environment.get("KEEP", "") not in {"", "0"}
    parser.add_argument("--keep", action="store_true", default=keep)
    parser.add_argument("--folder", type=Path, default=ROOT / ".hisab")
    parser.add_argument("--live-seconds", type=float, default=20)
    given = parser.parse_args(arguments)
    try:
        chaos = int(given.chaos) if given.chaos else None
    except ValueError as error:
        raise UnusableError(f"CHAOS is a whole number, the seed; got {given.chaos!r}") from error
    return Options(
        data=Path(given.data) if given.data else None,
        chaos=chaos,
        keep=given.keep,
        folder=given.folder.resolve(),
        live_seconds=given.live_seconds,
    )


def read_trace_file(path: Path) -> replay.Trace:
    """Read the trace; `UnusableError` when it cannot be replayed."""
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
            trace = replay.read_trace(lines)
    except OSError as error:
        raise UnusableError(f"cannot read {path}: {error.strerror}") from error
    if isinstance(trace, replay.MissingColumns):
        names = ", ".join(trace.names)
        raise UnusableError(f"{path} lacks the needed columns: {names}")
    return trace


async def run(
    options: Options, trace: replay.Trace | None, stack: LocalStack, screen: Screen
) -> bool:
    """Start the stack, play, read back, write the summary and the report."""
    watch = Stopwatch()
    out = options.folder / "demo"
    (out / "invoices").mkdir(parents=True, exist_ok=True)
    (options.folder / "demo-summary.json").unlink(missing_ok=True)
    screen.scene("The stack: a broker, a database server and three services")
    await stack.up(screen.say)
    start_s = watch.lap()
    async with Api(stack.description) as api:
        provider = dict(api.stack["provider"])
        screen.say(f"kafka: {provider['kafka']}, postgres: {provider['postgres']}")
        async with Emitter(api.stack["kafka"]["bootstrap_servers"]) as emitter:
            stage = Stage(api, emitter, screen)
            if trace is None:
                played = await play_month(stage, options, out, watch)
            else:
                played = await play_trace(stage, options, trace, out, watch)
        screen.scene("Everything is read back, and every sum comes to zero")
        figures = await readback.read_all(api, played.months)
    scenes.show_sums(screen, figures.hubs, summary.compare_sums(figures))
    content = summary.summary_of(
        summary.Run(
            source=played.source,
            provider=provider,
            seconds={"start": start_s, **played.seconds, "total": watch.total()},
            sent=emitter.sent,
            hold_refused=played.hold_refused,
            pdfs={name: display_path(path) for name, path in played.pdfs.items()},
            freshness_ms=played.freshness_ms,
            report=display_path(out / "report.html"),
        ),
        figures,
    )
    page = report.render_page(content, figures, out)
    (out / "report.html").write_text(page, encoding="utf-8")
    summary.write_summary(options.folder / "demo-summary.json", content)
    show_summary(screen, content, figures, options.folder)
    return bool(content["ok"])


async def play_month(stage: Stage, options: Options, out: Path, watch: Stopwatch) -> PlayResult:
    """The simulated month, scene by scene, then live."""
    screen = stage.screen
    month, numbering = simulator.plan_month(), Numbering()
    records = numbering.write_records(month.plan)
    gc.freeze()  # They live to the end: the collector need not go through them again.
    parts = cut_records(
        records,
        (month.first_days_until_ms, month.unknown_until_ms, month.kill_at_ms, simulator.UNTIL_MS),
    )

    screen.scene(f"Three hubs report their first days of {simulator.MONTH}")
    await stage.emitter.emit_bytes(records[0].hub, UNDECODABLE)
    await scenes.report_usage(stage, "1 to 4 July", parts[0])
    await scenes.show_identity(stage)

    screen.scene("A grant takes two people")
    await scenes.make_grants(stage, seed.FUNDED, GRANT_MICRO, simulator.GRANTS_FROM_MS)

    screen.scene("May this job start?")
    refused = await scenes.refuse_hold(stage)

    screen.scene("Usage that nobody can price yet waits, whole, and is released")
    await scenes.report_usage(stage, "5 to 16 July", parts[1])
    await scenes.show_open_month(stage, simulator.MONTH)
    await scenes.release_unknown_sku(
        stage, simulator.NEW_SKU_HUB, simulator.NEW_SKU, simulator.NEW_SKU_PKR
    )
    await scenes.dismiss_conflict(stage, simulator.DISPUTED_NODE.hub)

    screen.scene("The ledger is killed in the middle of the stream")
    await scenes.kill_ledger(stage, parts[2], parts[3])
    replay_s = watch.lap()

    screen.scene("The month closes by watermark")
    await scenes.show_open_month(stage, simulator.MONTH)
    await scenes.report_usage(stage, "the hubs' last word on July", parts[4])
    await scenes.close_month(stage, simulator.MONTH)
    screen.good(f"{simulator.MONTH} is closed")
    pdfs = await scenes.show_invoices(stage, (simulator.MONTH,), out / "invoices")
    close_s = watch.lap()

    screen.scene(f"Live: a balance falls for {options.live_seconds:.0f} s")
    freshness = await live.emit_live(stage, numbering, options.live_seconds)
    await stage.wait_until_drained()
    return PlayResult(
        source={"kind": "simulator", "seed": simulator.SEED, "period": simulator.MONTH},
        months=(simulator.MONTH,),
        seconds={"replay": replay_s, "close": close_s, "live": watch.lap()},
        hold_refused=refused,
        pdfs=pdfs,
        freshness_ms=dict(freshness),
    )


async def play_trace(
    stage: Stage, options: Options, trace: replay.Trace, out: Path, watch: Stopwatch
) -> PlayResult:
    """A recorded trace: grants, all of its usage, five months closed."""
    screen = stage.screen
    content = (options.data or Path()).read_bytes()
    screen.scene(f"The trace: {trace.rows} rows, {len(trace.pods)} of them billable")
    for row in trace.unreadable:
        screen.bad(f"line {row.line} cannot be read: {row.reason}")
    await scenes.make_grants(stage, seed.FUNDED, replay.GRANT_MICRO, seed.EPOCH_MS)

    screen.scene("Three hubs report what the trace recorded")
    records = Numbering().write_records(replay.plan_trace(trace, options.chaos))
    gc.freeze()  # They live to the end: the collector need not go through them again.
    await scenes.report_usage(stage, "the trace", records)
    await scenes.show_identity(stage)
    replay_s = watch.lap()

    screen.scene("May this job start?")
    refused = await scenes.refuse_hold(stage)

    screen.scene("The months close by watermark")
    for month in replay.MONTHS:
        await scenes.close_month(stage, month)
    screen.good(f"{', '.join(replay.MONTHS)} are closed")
    pdfs = await scenes.show_invoices(stage, replay.MONTHS, out / "invoices")
    await stage.wait_until_drained()
    unreadable = [{"line": row.line, "reason": row.reason} for row in trace.unreadable]
    return PlayResult(
        source={
            "kind": "trace",
            "sha256": sha256(content).hexdigest(),
            "rows": trace.rows,
            "billable": len(trace.pods),
            "unreadable": len(unreadable),
            "unreadable_rows": unreadable,
            "chaos": options.chaos,
        },
        months=replay.MONTHS,
        seconds={"replay": replay_s, "close": watch.lap()},
        hold_refused=refused,
        pdfs=pdfs,
        freshness_ms=None,
    )


def cut_records(records: list[Record], edges_ms: tuple[int, ...]) -> list[list[Record]]:
    """Cut records, which are in order, at instants; what falls on an edge comes after it."""
    parts: list[list[Record]] = [[] for _ in range(len(edges_ms) + 1)]
    for record in records:
        parts[sum(record.order_ms >= edge for edge in edges_ms)].append(record)
    return parts


def show_summary(
    screen: Screen, content: Json, figures: readback.ServiceFigures, folder: Path
) -> None:
    """End with the few figures that matter."""
    screen.scene("Summary")
    records, reported = (
        content["records"],
        sum(int(hub["reported_gpu_ns"]) for hub in figures.hubs.values()),
    )
    screen.say(
        f"records {records['sent']} sent = {records['accepted']} accepted"
        f" + {records['duplicate']} duplicate + {records['quarantined']} quarantined"
    )
    screen.say(
        f"{gpu_hours(reported)} GPU-hours reported, {pkr(content['charges']['charged_micro'])} PKR"
        f" charged in {content['charges']['count']} buckets, {content['entries']} ledger entries"
    )
    totals = sum(int(invoice["total_minor"]) for invoice in content["invoices"])
    rerun = content["rerun"]
    screen.say(
        f"{len(content['invoices'])} invoices of {pkr_of_minor(totals)} PKR,"
        f" {rerun['identical']} of {rerun['compared']} recomputed identically"
    )
    fresh = content["freshness_ms"]
    if fresh is not None:
        screen.say(
            f"event to balance: p50 {fresh['p50']} ms, p99 {fresh['p99']} ms of {fresh['samples']}"
        )
    seconds = " ".join(f"{name} {value}" for name, value in content["seconds"].items())
    screen.say(f"seconds: {seconds}")
    screen.say(f"{folder / 'demo-summary.json'}, {content['report']}")
    if content["ok"]:
        screen.good("all differences are 0")
        return
    for fault in summary.find_faults(content, figures):
        screen.bad(fault)


def show_addresses(screen: Screen, stack: LocalStack) -> None:
    """Show how to go on with a stack that was kept."""
    if not stack.description.exists():
        return
    screen.scene("The stack stays up")
    content = Api(stack.description).stack
    for name, service in content["services"].items():
        screen.say(f"{name:<10} {service['url']}/v1/status")
    screen.say(f"kafka      {content['kafka']['bootstrap_servers']}")
    screen.say(f"keys in    {stack.description}")
    screen.say(f"to end it  {stack.down_command}")


def display_path(path: Path) -> str:
    """Write a path relative to the checkout where it lies in it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
