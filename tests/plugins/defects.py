"""Which known defect is shown absent by which test, and how that test last ended.

A test carries `@pytest.mark.defect("M6")`. As a pytest plugin this module remembers, in pytest's
cache, how each such test last ended. Run as a program (`make defects`) it collects the marked tests
and lists every number of `defects.txt`: its tests, their last result, and what has none.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

CACHE_KEY = "hisab/defects"
CATALOGUE = Path(__file__).with_name("defects.txt")
LENGTHS = {"M": 36, "L": 28, "I": 35, "F": 75}
"""How many there are: metering, ledger, invoicing defects of other systems, and faults."""


def catalogue() -> dict[str, str]:
    """Return every number with its title, in order."""
    lines = CATALOGUE.read_text(encoding="utf-8").splitlines()
    pairs = (line.split(" ", 1) for line in lines if line and not line.startswith("#"))
    return {number: title.strip() for number, title in pairs}


def numbers_of(item: pytest.Item) -> Iterator[str]:
    """Yield the numbers that a test is marked with."""
    for marker in item.iter_markers("defect"):
        yield from marker.args


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a number that is not in the catalogue, and hand the numbers on to the reports."""
    known = catalogue()
    for item in items:
        numbers = list(numbers_of(item))
        unknown = set(numbers) - set(known)
        if unknown:
            raise pytest.UsageError(f"{item.nodeid}: no such defect: {', '.join(sorted(unknown))}")
        if numbers:
            item.user_properties.append(("defects", numbers))


class Recorder:
    """Gathers how marked tests end, in the process that reports."""

    def __init__(self, config: pytest.Config) -> None:
        """Begin with nothing seen."""
        self._config = config
        self._ended: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome; a failure in any phase stays a failure."""
        if not any(name == "defects" for name, _ in report.user_properties):
            return
        before = self._ended.get(report.nodeid)
        if before in {None, "passed"}:
            self._ended[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        """Keep the outcomes beside those of earlier runs."""
        cache = self._config.cache
        if self._ended and cache is not None:
            cache.set(CACHE_KEY, {**cache.get(CACHE_KEY, {}), **self._ended})


def pytest_configure(config: pytest.Config) -> None:
    """Record where the results arrive: not in the workers of a distributed run."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config))


class Collector:
    """Remembers the marked tests of a collection that runs nothing."""

    def __init__(self) -> None:
        """Begin with nothing found."""
        self.found: dict[str, list[str]] = {}
        self.results: dict[str, str] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note each marked test by number, and what the cache knows of it."""
        for item in session.items:
            for number in numbers_of(item):
                self.found.setdefault(number, []).append(item.nodeid)
        if session.config.cache is not None:
            self.results = session.config.cache.get(CACHE_KEY, {})


def table(found: dict[str, list[str]], results: dict[str, str]) -> Iterator[str]:
    """Yield the list: a line for each number, its tests below, and the sums."""
    known = catalogue()
    for number, title in known.items():
        tests = sorted(found.get(number, ()))
        ends = [results.get(test, "not run") for test in tests]
        yield f"{_verdict(ends):8} {number:4} {title}"
        cases: dict[str, list[str]] = {}
        for test, end in zip(tests, ends, strict=True):
            cases.setdefault(re.sub(r"\[.*", "", test), []).append(end)
        for test, case_ends in cases.items():
            yield f"              {test} ({len(case_ends)}: {_verdict(case_ends)})"
    for letter in LENGTHS:
        mine = [number for number in known if number.startswith(letter)]
        without = [number for number in mine if number not in found]
        yield (
            f"{letter}: {len(mine) - len(without)} of {len(mine)} have a test"
            + (f"; none: {' '.join(without)}" if without else "")
        )


def _verdict(ends: Sequence[str]) -> str:
    if not ends:
        return "none"
    for end in ("failed", "not run", "skipped"):
        if end in ends:
            return end
    return "passed"


def main() -> int:
    """Collect, print the list; the exit code is 1 when a marked test failed last time."""
    collector = Collector()
    quiet = ["-p", "no:terminal", "-o", "addopts=--import-mode=importlib --strict-markers"]
    code = pytest.main([*quiet, "--collect-only", "-m", "defect"], plugins=[collector])
    if code not in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}:
        print("the tests cannot be collected: run pytest --collect-only", file=sys.stderr)
        return int(code)
    print("\n".join(table(collector.found, collector.results)))
    failed = [test for test, end in collector.results.items() if end == "failed"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
