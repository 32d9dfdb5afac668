"""`report.html`: one file, no network, figures drawn as inline SVG. Pure: figures in, text out.

Pictures are drawn from what the services answered: the identity from metering's reconciliation,
GPU-hours and balances from the ledger's entries, invoices from invoicing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

import seed
from demo.api import Json
from demo.readback import IDENTITY_SIDES, ServiceFigures
from demo.screen import gpu_hours, pkr, pkr_of_minor
from demo.stream import DAY_MS
from demo.style import STYLE
from hisab_contracts.units import (
    GPU_NS_PER_GPU_HOUR,
    instant_ms,
    karachi_date_on,
    month_bounds_ms,
)

_WIDTH: Final = 960
_HEIGHT: Final = 250
_LEFT: Final = 64
_RIGHT: Final = 132
_TOP: Final = 12
_BOTTOM: Final = 26
_SIDES: Final = (*IDENTITY_SIDES[1:], "voided")
"""What the reported time is made of."""
_PALETTE: Final = 8


@dataclass(frozen=True, slots=True)
class Line:
    """One series: a value per day, in whatever unit its chart has."""

    name: str
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Days:
    """What the entries add up to, by Karachi day of the months shown."""

    first: int
    labels: tuple[str, ...]
    gpu_hours: tuple[Line, ...]
    credit: tuple[Line, ...]
    owed: tuple[Line, ...]


def render_page(content: Json, figures: ServiceFigures, folder: Path) -> str:
    """Return the whole page; links to PDFs are relative to `folder`."""
    days = days_of(figures, sorted(figures.periods))
    blocks = (
        _head(content),
        _tiles(content, figures),
        _section(
            "Every reported GPU-nanosecond is accounted for",
            "reported = billed + duplicate + quarantined + voided, hub by hub, in GPU-hours",
            _identity(figures.hubs),
        ),
        _section(
            "GPU-hours per hub",
            "billed, by day of use (Asia/Karachi), out of the ledger's charge entries",
            _bars(days.labels, days.gpu_hours, "GPU-hours"),
        ),
        _section(
            "Credit left",
            "granted lots after each day's usage, in PKR",
            _lines(days.labels, days.credit, "PKR"),
        ),
        _section(
            "Receivable",
            "usage of commercial tenants, adding up until the month is invoiced, in PKR",
            _lines(days.labels, days.owed, "PKR"),
        ),
        _section(
            "Invoices",
            "numbers are gapless; each PDF is the bytes whose hash is stated",
            _invoices(content, folder),
        ),
        _section("Sums that must be zero", "", _checks(content, figures)),
        _section("Tenants", "what was charged, and who pays for it, in PKR", _tenants(content)),
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Hisab demo</title><style>{STYLE}</style></head><body><main>"
        f"{''.join(blocks)}</main></body></html>\n"
    )


def days_of(figures: ServiceFigures, months: Sequence[str]) -> Days:
    """Add up the entries of all books by day."""
    from_ms = month_bounds_ms(months[0])[0]
    until_ms = month_bounds_ms(months[-1])[1]
    count = (until_ms - from_ms) // DAY_MS
    used: defaultdict[str, list[int]] = defaultdict(lambda: [0] * count)
    credit: defaultdict[str, list[int]] = defaultdict(lambda: [0] * count)
    owed: defaultdict[str, list[int]] = defaultdict(lambda: [0] * count)
    day_of = _DayIndex(from_ms, count)
    for tenant, book in figures.entries.items():
        for entry in book:
            day = day_of(str(entry["effective_at"]))
            if day is None:
                continue
            charge = entry.get("charge")
            if charge is not None:
                used[charge["hub"]][day] += int(charge["gpu_ns"])
            for posting in entry["postings"]:
                account, micro = str(posting["account"]), int(posting["posting_micro"])
                if account.startswith("lot:"):
                    credit[tenant][day] += micro
                # Not `invoiced`: it moves the month's receivable away; the chart is of the usage.
                elif account == "receivable" and entry["kind"] != "invoiced":
                    owed[tenant][day] -= micro
    labels = tuple(f"{karachi_date_on(from_ms + day * DAY_MS):%m-%d}" for day in range(count))
    hours = {hub: [value // GPU_NS_PER_GPU_HOUR for value in used[hub]] for hub in figures.hubs}
    return Days(
        first=from_ms,
        labels=labels,
        gpu_hours=tuple(Line(hub, tuple(values)) for hub, values in hours.items()),
        credit=_running_totals(credit),
        owed=_running_totals(owed),
    )


class _DayIndex:
    """Finds the day of an instant's text; entries repeat a few hours, so answers are kept."""

    def __init__(self, from_ms: int, count: int) -> None:
        self._from_ms, self._count = from_ms, count
        self._found: dict[str, int | None] = {}

    def __call__(self, text: str) -> int | None:
        if text not in self._found:
            day = (instant_ms(text) - self._from_ms) // DAY_MS
            self._found[text] = day if 0 <= day < self._count else None
        return self._found[text]


def _running_totals(changes: Mapping[str, Sequence[int]]) -> tuple[Line, ...]:
    """Turn daily changes in micro-units into daily balances in whole units."""
    lines = []
    for name, values in sorted(changes.items()):
        total, balances = 0, []
        for value in values:
            total += value
            balances.append(total // seed.MICRO_PER_PKR)
        if any(balances):
            lines.append(Line(name, tuple(balances)))
    return tuple(lines)


def _head(content: Json) -> str:
    source, provider, seconds = content["source"], content["provider"], content["seconds"]
    what = (
        f"{source['rows']:,} rows of a recorded trace, {source['billable']:,} of them billable"
        if source["kind"] == "trace"
        else f"a simulated month, {escape(str(source['period']))}"
    )
    state = (
        '<span class="good">all differences are 0</span>'
        if content["ok"]
        else '<span class="bad">something differs</span>'
    )
    return (
        f"<header><h1>Hisab</h1><p>{what}, on Kafka {escape(str(provider['kafka']))} and"
        f" PostgreSQL {escape(str(provider['postgres']))}, in {seconds['total']} s. {state}</p>"
        "</header>"
    )


def _tiles(content: Json, figures: ServiceFigures) -> str:
    reported = sum(int(hub["reported_gpu_ns"]) for hub in figures.hubs.values())
    invoiced = sum(int(invoice["total_minor"]) for invoice in content["invoices"])
    rerun, fresh, records = content["rerun"], content["freshness_ms"], content["records"]
    tiles = [
        ("records read", f"{records['read']:,}", f"{records['sent']:,} sent"),
        ("GPU-hours", gpu_hours(reported).partition(".")[0], "reported"),
        (
            "charged",
            pkr(content["charges"]["charged_micro"]).partition(".")[0],
            f"PKR, {content['charges']['count']:,} buckets",
        ),
        (
            "invoices",
            str(len(content["invoices"])),
            f"{pkr_of_minor(invoiced)} PKR with tax",
        ),
        ("reruns", f"{rerun['identical']} of {rerun['compared']}", "byte for byte the same"),
    ]
    if fresh is not None:
        tiles.append(("event to balance", f"{fresh['p99']} ms", f"p99 of {fresh['samples']} live"))
    return (
        '<div class="tiles">'
        + "".join(
            f"<div><small>{escape(name)}</small><b>{escape(value)}</b>"
            f"<small>{escape(note)}</small></div>"
            for name, value, note in tiles
        )
        + "</div>"
    )


def _section(title: str, note: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(note)}</p>{body}</section>"


def _identity(hubs: Mapping[str, Json]) -> str:
    """One bar per hub, and a table with the same figures."""
    most = max([1, *(int(hub["reported_gpu_ns"]) for hub in hubs.values())])
    width, row = _WIDTH - 2 * _LEFT, 34
    parts, table = [], []
    for number, (hub, answer) in enumerate(hubs.items()):
        y, x = number * row, _LEFT
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 19}" class="end">{escape(hub)}</text>')
        for side in _SIDES:
            value = int(answer[f"{side}_gpu_ns"])
            if value == 0:
                continue
            long = max(2, value * width // most)
            tip = f"{hub}: {gpu_hours(value)} GPU-hours {side}"
            parts.append(
                f'<rect x="{x}" y="{y + 4}" width="{long}" height="22" class="{side}">'
                f"<title>{escape(tip)}</title></rect>"
            )
            x += long + 2
        cells = [gpu_hours(answer[f"{side}_gpu_ns"]) for side in ("reported", *_SIDES)]
        table.append([hub, *cells, f"{answer['difference_gpu_ns']} GPU-ns"])
    drawn = _svg("".join(parts), len(hubs) * row + 4, "the identity as bars")
    legend = _legend((side, side) for side in _SIDES)
    return legend + drawn + _table(("hub", "reported", *_SIDES, "difference"), table)


def _bars(labels: Sequence[str], lines: Sequence[Line], unit: str) -> str:
    """Stacked bars, one per day."""
    totals = [sum(values) for values in zip(*(line.values for line in lines), strict=True)]
    frame = _Frame(labels, _nice(max([1, *totals])))
    parts = [frame.axes(unit)]
    step = frame.width / max(1, len(labels))
    thick = max(1.0, step * 0.8)
    for day, label in enumerate(labels):
        base = 0
        for number, line in enumerate(lines):
            value = line.values[day]
            if value:
                top, bottom = frame.y(base + value), frame.y(base)
                parts.append(
                    f'<rect x="{_LEFT + day * step:.1f}" y="{top:.1f}" width="{thick:.1f}"'
                    f' height="{max(0.5, bottom - top):.1f}" class="c{number % _PALETTE}">'
                    f"<title>{escape(f'{label} {line.name}: {value:,} {unit}')}</title></rect>"
                )
            base += value
    legend = _legend((line.name, f"c{number % _PALETTE}") for number, line in enumerate(lines))
    return legend + _svg("".join(parts), _HEIGHT, unit)


def _lines(labels: Sequence[str], lines: Sequence[Line], unit: str) -> str:
    """One line per series, each named at its end."""
    if not lines:
        return "<p>nothing to draw</p>"
    most = _nice(max([1, *(value for line in lines for value in line.values)]))
    frame = _Frame(labels, most)
    step = frame.width / max(1, len(labels) - 1)
    parts = [frame.axes(unit)]
    ends = _apart([frame.y(line.values[-1]) for line in lines])
    for number, line in enumerate(lines):
        points = " ".join(
            f"{_LEFT + day * step:.1f},{frame.y(value):.1f}"
            for day, value in enumerate(line.values)
        )
        tip = f"{line.name}: {line.values[-1]:,} {unit} at the end"
        parts.append(
            f'<polyline points="{points}" class="l{number % _PALETTE}">'
            f"<title>{escape(tip)}</title></polyline>"
            f'<text x="{_WIDTH - _RIGHT + 8}" y="{ends[number] + 4:.1f}"'
            f' class="t{number % _PALETTE}">{escape(line.name)}</text>'
        )
    return _svg("".join(parts), _HEIGHT, unit)


@dataclass(frozen=True, slots=True)
class _Frame:
    """Axes: days to the right, values from zero up."""

    labels: Sequence[str]
    most: int

    @property
    def width(self) -> int:
        return _WIDTH - _LEFT - _RIGHT

    def y(self, value: int) -> float:
        """Return the height of a value on the page."""
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - value / self.most)

    def axes(self, unit: str) -> str:
        """Return grid, ticks and labels."""
        parts = []
        for quarter in range(5):
            value = self.most * quarter // 4
            y = self.y(value)
            parts.append(
                f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" class="grid"/>'
                f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" class="end">{_short(value)}</text>'
            )
        days = len(self.labels)
        for day in range(0, days, max(1, days // 8)):
            x = _LEFT + (day + 0.4) * self.width / max(1, days)
            parts.append(
                f'<text x="{x:.1f}" y="{_HEIGHT - 8}" class="mid">{escape(self.labels[day])}</text>'
            )
        parts.append(f"<title>{escape(unit)}</title>")
        return "".join(parts)


def _apart(heights: Sequence[float]) -> list[float]:
    """Move labels that would overlap apart, in their order."""
    placed = list(heights)
    lowest = _TOP - 14.0
    for number in sorted(range(len(heights)), key=lambda index: heights[index]):
        placed[number] = max(heights[number], lowest + 14)
        lowest = placed[number]
    over = max(0.0, lowest - (_HEIGHT - _BOTTOM))
    return [height - over for height in placed]


def _nice(most: int) -> int:
    """Return a round number at or above, divisible by four."""
    scale = 1
    while scale * 40 < most:
        scale *= 10
    return next(step * scale for step in (4, 8, 12, 16, 20, 24, 32, 40) if step * scale >= most)


def _short(value: int) -> str:
    """Write a number for an axis: 1.2 M, 300 k."""
    for size, suffix in ((1_000_000, " M"), (1_000, " k")):
        if value >= size:
            tenths = value * 10 // size
            return f"{tenths // 10}{f'.{tenths % 10}' if tenths % 10 else ''}{suffix}"
    return str(value)


def _invoices(content: Json, folder: Path) -> str:
    rows = [
        [
            _link(invoice, folder),
            escape(str(invoice["tenant_id"])),
            escape(str(invoice["period"])),
            pkr_of_minor(invoice["net_minor"]),
            pkr_of_minor(invoice["tax_minor"]),
            f"<b>{pkr_of_minor(invoice['total_minor'])}</b>",
            f"<code>{escape(str(invoice['pdf_sha256'])[:12])}</code>",
        ]
        for invoice in content["invoices"]
    ]
    columns = ("number", "tenant", "month", "net", "tax", "total PKR", "PDF hash")
    return _raw_table(columns, rows, names=3)


def _link(invoice: Json, folder: Path) -> str:
    name = Path(str(invoice["pdf"])).name
    where = f"{folder.joinpath('invoices').name}/{name}"
    return f'<a href="{escape(where)}">{escape(str(invoice["number"]))}</a>'


def _checks(content: Json, figures: ServiceFigures) -> str:
    rows = [[row["check"], f"{row['difference_micro']} micro"] for row in content["reconciliation"]]
    rows.append(
        [
            "reported = billed + duplicate + quarantined + voided",
            f"{content['gpu_ms']['difference']} GPU-ns",
        ]
    )
    steps = [
        [month, str(step["step"]), pkr(step["micro"])]
        for month, period in sorted(figures.periods.items())
        for step in period["steps"]
    ]
    waterfall = _table(("month", "from the ledger to the invoices", "PKR"), steps, names=2)
    return (
        _table(("check", "difference"), rows)
        + f"<details><summary>each month's steps</summary>{waterfall}</details>"
    )


def _tenants(content: Json) -> str:
    sides = ("charged", "funded", "invoiced", "receivable", "unfunded", "available")
    rows = [
        [tenant["tenant_id"], tenant["kind"], *(pkr(tenant[f"{side}_micro"]) for side in sides)]
        for tenant in content["tenants"]
    ]
    return _table(("tenant", "kind", *sides), rows, names=2)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> str:
    return _raw_table(columns, [[escape(cell) for cell in row] for row in rows], names)


def _raw_table(columns: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> str:
    """Return a table of cells that are HTML already; the first `names` columns are no numbers."""
    head = _cells("th", [escape(column) for column in columns], names)
    body = "".join(f"<tr>{_cells('td', row, names)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _cells(tag: str, cells: Sequence[str], names: int) -> str:
    left = f'<{tag} class="name">'
    return "".join(
        f"{left if column < names else f'<{tag}>'}{cell}</{tag}>"
        for column, cell in enumerate(cells)
    )


def _legend(items: Iterable[tuple[str, str]]) -> str:
    return (
        '<p class="legend">'
        + "".join(
            f'<span><svg width="11" height="11"><rect width="11" height="11" class="{kind}"/></svg>'
            f" {escape(name)}</span>"
            for name, kind in items
        )
        + "</p>"
    )


def _svg(body: str, height: int, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'
    )
