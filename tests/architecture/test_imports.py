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
    path = folder / "services/ledger/src/ledger/core/grants.py"
    path.write_text(path.read_text() + "\nimport ledger.core.book\n")
    done = lint(folder)
    assert done.returncode != 0
    assert "ledger.core.grants is not allowed to import ledger.core.book" in done.stdout


def test_store_that_imports_its_api_breaks_the_order(tmp_path: Path) -> None:
    """Rule 5: the four floors stand on each other, and none reaches up."""
    folder = copy(tmp_path)
    path = folder / "services/ledger/src/ledger/store/books.py"
    path.write_text(path.read_text() + "\nimport ledger.api\n")
    done = lint(folder)
    assert done.returncode != 0
    assert "ledger.store is not allowed to import ledger.api" in done.stdout


def contracts_of_order() -> list[tuple[str, list[str]]]:
    """Return each container of the import order with all modules that are placed in it."""
    return [
        (container, [name for layer in contract["layers"] for name in re.findall(r"\w+", layer)])
        for contract in configuration()["tool"]["importlinter"]["contracts"]
        for container in contract.get("containers", ())
    ]


def test_every_service_has_the_four_floors() -> None:
    """Rule 5: core and store stand at the bottom, in this order, and api near the top."""
    for service in SERVICES:
        (placed,) = [names for container, names in contracts_of_order() if container == service]
        assert ["store", "core"] == placed[-2:], service
        assert "api" in placed[:2], service


def test_what_decides_is_pure_and_what_holds_sql_is_a_store() -> None:
    """Rules 3 and 23: the folder says it, and no module outside the folders claims it."""
    for module in package_modules():
        if module.package in SERVICES:
            floor = module.name.split(".")[1:2]
            assert (floor == ["core"]) == is_pure(module.name), module.name
            assert (floor == ["store"]) == is_store(module.name), module.name


def test_every_order_is_exhaustive() -> None:
    """Rule 6: a module that nobody placed fails, in every package and on every floor."""
    for contract in configuration()["tool"]["importlinter"]["contracts"]:
        if "containers" in contract:
            assert contract["exhaustive"], contract["id"]
    containers = {container for container, _ in contracts_of_order()}
    floors = {f"{service}.{floor}" for service in SERVICES for floor in ("core", "store", "api")}
    assert floors <= containers


def test_every_placed_module_exists() -> None:
    """The order names no module that is gone."""
    existing = {module.name for module in package_modules()}
    for container, names in contracts_of_order():
        placed = {f"{container}.{name}" for name in names}
        assert placed - existing == set()
