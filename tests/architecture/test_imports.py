"""The import order: every module has a place in it, and the places say what is pure."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from architecture.source import (
    ROOT,
    SERVICES,
    configuration,
    is_pure,
    is_store,
    package_modules,
)


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter over the packages of a folder that looks like the project."""
    sources = [folder / "contracts/src", *sorted((folder / "services").glob("*/src"))]
    program = (
        f"import sys; sys.path[:0] = {[str(path) for path in sources]!r}; "
        "from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def copy(folder: Path) -> Path:
    """Copy the sources of the five packages and their configuration."""
    for source in (ROOT / "contracts/src", *sorted((ROOT / "services").glob("*/src"))):
        shutil.copytree(
            source,
            folder / source.relative_to(ROOT),
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_imports_keep_the_order() -> None:
    """Rules 2 and 6: every module has its place and imports only what lies below it."""
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_unplaced_module_breaks_the_order(tmp_path: Path) -> None:
    """Rule 6: a new module that nobody placed fails, by name."""
    folder = copy(tmp_path)
    (folder / "services/ledger/src/ledger/unplaced.py").write_text('"""New."""\n')
    done = lint(folder)
    assert done.returncode != 0
    assert "ledger.unplaced" in done.stdout


def test_core_that_imports_its_shell_breaks_the_order(tmp_path: Path) -> None:
    """Rule 2: a module that decides and imports what stands above it fails."""
    folder = copy(tmp_path)
    path = folder / "services/ledger/src/ledger/grants.py"
    path.write_text(path.read_text() + "\nimport ledger.book\n")
    done = lint(folder)
    assert done.returncode != 0
    assert "ledger.grants is not allowed to import ledger.book" in done.stdout


def layers(package: str) -> list[list[str]]:
    """Return the import order of a package, from the outside to the core."""
    for contract in configuration()["tool"]["importlinter"]["contracts"]:
        if contract["id"] == package:
            return [re.findall(r"\w+", layer) for layer in contract["layers"]]
    raise LookupError(package)


def test_what_lies_below_the_store_is_pure_and_nothing_else() -> None:
    """Rule 3: a service's modules below its stores are those that decide."""
    for package in SERVICES:
        order = layers(package)
        lowest = max(
            place
            for place, names in enumerate(order)
            if any(is_store(f"{package}.{name}") for name in names)
        )
        pure = {name for names in order[lowest + 1 :] for name in names}
        listed = {
            module.leaf
            for module in package_modules()
            if module.package == package and is_pure(module.name)
        }
        assert pure == listed, package


def test_every_placed_module_exists() -> None:
    """The order names no module that is gone."""
    existing = {module.name for module in package_modules()}
    for package in ("hisab_contracts", "runtime", *SERVICES):
        placed = {f"{package}.{name}" for names in layers(package) for name in names}
        assert placed - existing == set()
