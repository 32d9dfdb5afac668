"""The environment is built by pip and make alone, in a path with a space, and only once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bootstrap

_BUILD_TOOLS = (
    "editables",
    "hatchling",
    "packaging",
    "pathspec",
    "pluggy",
    "tomlkit",
    "trove-classifiers",
)
_NO_NETWORK = ("NewConnectionError", "ConnectTimeout", "Network is unreachable", "dns error")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of our packages in a path with a space, with a lock of the build tools only."""
    root = tmp_path_factory.mktemp("elsewhere") / "a checkout"
    for package in bootstrap.PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(bootstrap.ROOT / package, root / package, ignore=ignored)
    (root / "deploy" / "local").mkdir(parents=True)
    for name in ("bootstrap.py", "uv.txt"):
        shutil.copy(bootstrap.ROOT / "deploy" / "local" / name, root / "deploy" / "local" / name)
    shutil.copy(bootstrap.ROOT / "pyproject.toml", root / "pyproject.toml")
    lock = (bootstrap.ROOT / "requirements.lock").read_text()
    (root / "requirements.lock").write_text(_build_tools(lock))
    return root


def _build_tools(lock: str) -> str:
    """Return the entries of the build tools in a lock file, hashes included."""
    found: list[str] = []
    keeps = False
    for line in lock.splitlines(keepends=True):
        if not line.startswith((" ", "#")):
            keeps = line.partition("==")[0] in _BUILD_TOOLS
        if keeps:
            found.append(line)
    return "".join(found)


def _bootstrap(root: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "deploy/local/bootstrap.py"],
        cwd=root,
        env=dict(os.environ) | env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_fresh_checkout_is_built_in_a_path_with_a_space(checkout: Path) -> None:
    """From Python and pip alone: our packages import, and the second time nothing is done."""
    first = _bootstrap(checkout, PIP_USER="1", PIP_REQUIRE_VIRTUALENV="1")
    said = first.stdout + first.stderr
    if first.returncode != 0 and any(sign in said for sign in _NO_NETWORK):
        pytest.skip("no package index can be reached from here")
    assert first.returncode == 0, said
    python = checkout / ".venv" / "bin" / "python"
    where = "import ledger; print(ledger.__file__)"
    answer = subprocess.run([python, "-c", where], capture_output=True, text=True, check=False)
    assert answer.stdout.strip().startswith(str(checkout)), answer.stderr
    second = _bootstrap(checkout)
    assert (0, "", "") == (second.returncode, second.stdout, second.stderr)


def test_a_changed_lock_is_noticed(checkout: Path) -> None:
    """The stamp covers the lock: another lock is another environment."""
    program = (
        "import bootstrap, pathlib; before = bootstrap._content();"
        "lock = bootstrap.ROOT / 'requirements.lock';"
        "lock.write_text(lock.read_text() + '# changed\\n');"
        "print(before == bootstrap._content())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=checkout / "deploy" / "local",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "False" == answer.stdout.strip()
