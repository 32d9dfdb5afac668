"""What a person sees: a progress display on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

import seed
from hisab_contracts.units import GPU_NS_PER_GPU_HOUR

_PLAIN_WIDTH: Final = 160
_QUARTERS: Final = 4

Advance = Callable[[int, str], None]
"""Called with how much more is done, and a word about where we are."""


class Screen:
    """Prints for a person; knows whether somebody watches a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(highlight=False)
        if not console.is_terminal:
            # Rich would wrap at 80 columns, and a line in a file or a pipe is for grep.
            console.width = _PLAIN_WIDTH
        self._console = console

    @property
    def is_terminal(self) -> bool:
        """Whether lines can be drawn over."""
        return self._console.is_terminal

    def scene(self, title: str) -> None:
        """Begin a chapter."""
        self._console.print()
        self._console.print(Text(f"== {title}", style="bold cyan"))

    def say(self, text: str, style: str = "") -> None:
        """Print one line as it is."""
        self._console.print(Text(f"   {text}", style=style), soft_wrap=True)

    def good(self, text: str) -> None:
        """Print something that is as it should be."""
        self.say(text, "green")

    def bad(self, text: str) -> None:
        """Print something that is not."""
        self.say(text, "bold red")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; the first column is text, the others are figures."""
        table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        with self._console.capture() as capture:
            self._console.print(table)
        for line in capture.get().rstrip("\n").split("\n"):
            self._console.print(Text.from_ansi(f"   {line}".rstrip()), soft_wrap=True)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Advance]:
        """Show how far a long step is."""
        if self.is_terminal:
            with self._bar(label, total) as advance:
                yield advance
        else:
            yield _quarters(label, total, self.say)

    @contextmanager
    def live(self) -> Iterator[Callable[[str], None]]:
        """Show one line that is drawn over on a terminal, and repeated elsewhere."""
        if not self.is_terminal:
            yield self.say
            return
        with Live(console=self._console, refresh_per_second=10) as drawn:
            yield lambda text: drawn.update(Text(f"   {text}", style="bold"))

    @contextmanager
    def _bar(self, label: str, total: int) -> Iterator[Advance]:
        columns = (
            TextColumn("   {task.description}"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console) as bar:
            task = bar.add_task(label, total=total, note="")

            def advance(done: int, note: str) -> None:
                bar.update(task, advance=done, note=note)

            yield advance


def _quarters(label: str, total: int, say: Callable[[str], None]) -> Advance:
    """Return an advance that prints a line each quarter of the way."""
    done = shown = 0

    def advance(more: int, note: str) -> None:
        nonlocal done, shown
        done += more
        if total and (quarter := min(done, total) * _QUARTERS // total) > shown:
            shown = quarter
            say(f"{label}: {min(done, total)} of {total}  {note}".rstrip())

    return advance


def pkr(micro: int | str) -> str:
    """Write micro-units as PKR with two decimals, for eyes only."""
    whole, part = divmod(abs(int(micro)), seed.MICRO_PER_PKR)
    return f"{'-' if int(micro) < 0 else ''}{whole:,}.{part // seed.MICRO_PER_PAISA:02d}"


def pkr_between(before_micro: int | str, after_micro: int | str) -> str:
    """Write by how much an amount fell, out of both as `pkr` writes them: the three then agree."""
    return pkr_of_minor(_minor_shown(int(before_micro)) - _minor_shown(int(after_micro)))


def _minor_shown(micro: int) -> int:
    return (abs(micro) // seed.MICRO_PER_PAISA) * (-1 if micro < 0 else 1)


def pkr_of_minor(minor: int | str) -> str:
    """Write paisa as PKR."""
    whole, part = divmod(abs(int(minor)), 100)
    return f"{'-' if int(minor) < 0 else ''}{whole:,}.{part:02d}"


def gpu_hours(used_gpu_ns: int | str) -> str:
    """Write GPU-nanoseconds as GPU-hours with two decimals, for eyes only."""
    hundredths = abs(int(used_gpu_ns)) * 100 // GPU_NS_PER_GPU_HOUR
    return f"{hundredths // 100:,}.{hundredths % 100:02d}"
