"""The environment is built by pip and make alone, in a path with a space, and only once."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
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
        "import bootstrap, pathlib; before = bootstrap._hash_inputs();"
        "lock = bootstrap.ROOT / 'requirements.lock';"
        "lock.write_text(lock.read_text() + '# changed\\n');"
        "print(before == bootstrap._hash_inputs())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=checkout / "deploy" / "local",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "False" == answer.stdout.strip()


def test_one_interpreter_has_one_place_whatever_it_is_called(
    checkout: Path, tmp_path: Path
) -> None:
    """The environment's own Python, and a link to the one that made it: nothing is built again."""
    link = tmp_path / "python"
    link.symlink_to(bootstrap._INTERPRETER)
    places = {
        subprocess.run(
            [python, "-c", "import bootstrap; print(bootstrap._hash_place())"],
            cwd=checkout / "deploy" / "local",
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for python in (bootstrap._INTERPRETER, link, sys.executable)
    }
    assert 1 == len(places)


@pytest.mark.slow
def test_an_ordinary_user_needs_neither_venv_nor_a_pip_of_her_own(checkout: Path) -> None:
    """On a Python that the system manages (PEP 668), without `venv` and `ensurepip`.

    Outside the checkout only caches in the home are written, and nothing is re-permissioned.
    """
    python = Path("/usr/bin/python3")
    if _says(python, "import sys; print(sys.version_info >= (3, 11))") != "True":
        pytest.skip("needs a system Python 3.11 or later")
    if not _says(python, "import pip; print(pip.__version__)"):
        pytest.skip("needs the pip of the system Python")
    with tempfile.TemporaryDirectory(prefix="hisab-", dir="/tmp") as place:
        outside = Path(place)
        home, blocked, mine = outside / "home", outside / "blocked", outside / "a checkout"
        for folder in (home, blocked):
            folder.mkdir()
        for name in ("venv", "ensurepip"):
            (blocked / f"{name}.py").write_text("raise ImportError('not on this system')\n")
        (mine / "deploy" / "local").mkdir(parents=True)
        ignored = shutil.ignore_patterns(".venv", ".hisab", "__pycache__", "*.egg-info")
        shutil.copytree(checkout, mine, ignore=ignored, dirs_exist_ok=True)
        (home / "kept").mkdir(mode=0o700)
        user = _hand_to_somebody(outside)
        before = _modes(outside, mine)
        done = subprocess.run(
            [python, "deploy/local/bootstrap.py"],
            cwd=mine,
            env=_plain_environment() | {"HOME": str(home), "PYTHONPATH": str(blocked)},
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            capture_output=True,
            text=True,
            check=False,
        )
        said = done.stdout + done.stderr
        if done.returncode != 0 and any(sign in said for sign in _NO_NETWORK):
            pytest.skip("no package index can be reached from here")
        assert 0 == done.returncode, said
        assert (mine / ".venv" / "bin" / "python").exists()
        after = {
            path: mode
            for path, mode in _modes(outside, mine).items()
            if not path.startswith(("home/.cache", "blocked/__pycache__"))
        }
        assert before == after


def _says(python: Path, program: str) -> str:
    """Return what a program of one line prints; nothing when it fails."""
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _plain_environment() -> dict[str, str]:
    """Return the settings of pip and of the network, and nothing of this project's."""
    kept = ("PIP_", "UV_", "SSL_", "HTTP", "http", "NO_PROXY", "no_proxy", "LANG")
    return {k: v for k, v in os.environ.items() if k.startswith(kept)} | {"PATH": "/usr/bin:/bin"}


def _hand_to_somebody(folder: Path) -> int | None:
    """Give a folder to an ordinary user, where we may; None when we are one ourselves."""
    if os.geteuid() != 0:
        return None
    somebody = pwd.getpwnam("nobody").pw_uid
    for path in (folder, *folder.rglob("*")):
        os.chown(path, somebody, somebody, follow_symlinks=False)
    return somebody


def _modes(outside: Path, but: Path) -> dict[str, int]:
    """Return the permissions of everything outside the checkout."""
    return {
        str(path.relative_to(outside)): path.lstat().st_mode
        for path in (outside, *outside.rglob("*"))
        if not path.is_relative_to(but)
    }
