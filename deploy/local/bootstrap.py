"""Build the project's environment on a machine that has only Python, pip and make.

    python3 deploy/local/bootstrap.py            (standard library only; any Python from 3.11)

What it makes lies in the checkout: `.hisab/bootstrap` (the uv tool, put there by pip, which every
Python allows even where it refuses system-wide installs) and `.venv` (everything of
`requirements.lock`, checked against its hashes, and the five packages of the workspace). Downloads
are kept in the user's own pip and uv caches. A stamp of the lock, the manifests and the interpreter
makes the second time free.

Where pip is configured to look for packages, uv looks too, unless uv is configured itself.

Refusals: a Python below 3.11, or one without pip. Each is one printed line, with what to do.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGES: Final = (
    "contracts",
    "services/runtime",
    "services/metering",
    "services/ledger",
    "services/invoicing",
)
_TOOL: Final = ROOT / ".hisab" / "bootstrap"
_TOOL_LOCK: Final = Path(__file__).with_name("uv.txt")
_ENVIRONMENT: Final = ROOT / ".venv"
_STAMP: Final = _ENVIRONMENT / "hisab.stamp"
_INTERPRETER: Final = getattr(sys, "_base_executable", sys.executable)
"""The Python that made the virtual environment we may have been started in: that one has pip."""

_UV_NAMES: Final = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "no-index": "UV_NO_INDEX",
}


class Refused(Exception):
    """The environment cannot be built; the text says what to do."""


def main() -> int:
    """Build the environment unless it is already what it should be."""
    if sys.version_info < (3, 11):  # noqa: UP036  # The one script that meets an older Python.
        version = sys.version.split()[0]
        print(f"Hisab needs Python 3.11 or later; this is {version}", file=sys.stderr)
        return 2
    wanted = f"{_hash_place()}\n{_hash_inputs()}\n"
    if _read_stamp() == wanted:
        return 0
    _TOOL.mkdir(parents=True, exist_ok=True)
    with (_TOOL.parent / "bootstrap.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if _read_stamp() != wanted:  # Another `make` may have built it while this one waited.
                build(moved=_read_stamp().partition("\n")[0] != _hash_place())
                # Last: an environment whose building was interrupted has no stamp.
                _STAMP.write_text(wanted)
        except Refused as refusal:
            print(refusal, file=sys.stderr)
            return 1
    return 0


def _read_stamp() -> str:
    return _STAMP.read_text() if _STAMP.is_file() else ""


def _hash_place() -> str:
    """Name where the environment is and what runs it: its scripts hold both."""
    # By its file: `python3` and `python3.11` are one, and the environment's own Python says the
    # other name. Whoever ran `make` from within it had it cleared and built again under those that
    # were using it.
    interpreter = Path(_INTERPRETER).resolve()
    return hashlib.sha256(f"{ROOT} {interpreter} {sys.version}".encode()).hexdigest()


def _hash_inputs() -> str:
    """Name what the environment is made of: lock, manifests, this script."""
    inputs = [ROOT / "requirements.lock", _TOOL_LOCK, Path(__file__)]
    inputs += [ROOT / package / "pyproject.toml" for package in PACKAGES]
    digest = hashlib.sha256()
    for path in inputs:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def build(*, moved: bool) -> None:
    """Install uv into the checkout, then the locked environment, then our packages."""
    uv = _TOOL / "bin" / "uv"
    environment = _environment()
    if not _is_locked_version(uv):
        print("bootstrap: pip brings uv", flush=True)
        _run(
            [
                *(_INTERPRETER, "-m", "pip", "install", "--quiet", "--no-user", "--upgrade"),
                *("--require-hashes", "--target", str(_TOOL), "--requirement", str(_TOOL_LOCK)),
            ],
            environment,
            f"pip failed: if it said 'No module named pip', install pip for {_INTERPRETER}",
        )
    print("bootstrap: the locked environment into .venv", flush=True)
    environment |= _uv_settings_from_pip(environment)
    failed = "the environment could not be built: the reason stands above"
    how = "--clear" if moved else "--allow-existing"
    _run(
        [str(uv), "venv", "--quiet", how, "--python", _INTERPRETER, str(_ENVIRONMENT)],
        environment,
        failed,
    )
    install = [str(uv), "pip", "install", "--quiet", "--no-deps"]
    locked = ["--require-hashes", "--requirement", "requirements.lock"]
    _run([*install, *locked], environment, failed)
    sources = [argument for package in PACKAGES for argument in ("--editable", package)]
    _run([*install, "--no-build-isolation", *sources], environment, failed)


def _is_locked_version(uv: Path) -> bool:
    """Say whether the tool that is there is the one that is locked."""
    if not uv.is_file():
        return False
    answer = subprocess.run([str(uv), "--version"], capture_output=True, text=True, check=False)
    return f"uv=={' '.join(answer.stdout.split()[1:2])} " in _TOOL_LOCK.read_text()


def _environment() -> dict[str, str]:
    """Return the environment of pip and uv: the user's settings, less what would lead them away."""
    environment = dict(os.environ)
    for name in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"):
        environment.pop(name, None)
    environment |= {
        "PIP_REQUIRE_VIRTUALENV": "0",
        "PIP_ROOT_USER_ACTION": "ignore",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_WARN_SCRIPT_LOCATION": "1",
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_NO_PROGRESS": "1",
        "VIRTUAL_ENV": str(_ENVIRONMENT),
    }
    home = Path(environment.get("HOME", "/nonexistent"))
    if not os.access(home, os.W_OK):
        environment.setdefault("UV_CACHE_DIR", str(ROOT / ".hisab" / "cache" / "uv"))
        environment.setdefault("PIP_NO_CACHE_DIR", "1")
    return environment


def _uv_settings_from_pip(environment: Mapping[str, str]) -> dict[str, str]:
    """Translate the user's configuration of pip for uv, which does not read it."""
    if any(name.startswith(("UV_INDEX", "UV_DEFAULT_INDEX")) for name in environment):
        return {}
    answer = subprocess.run(
        [_INTERPRETER, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        check=False,
        env=dict(environment),
    )
    found: dict[str, str] = {}
    for line in answer.stdout.splitlines():
        key, separator, value = line.partition("=")
        name = _UV_NAMES.get(key.rpartition(".")[2])
        if separator and name is not None and name not in environment:
            found[name] = str(ast.literal_eval(value)).strip().replace("\n", " ")
    return found


def _run(command: Sequence[str], environment: Mapping[str, str], otherwise: str) -> None:
    done = subprocess.run(command, cwd=ROOT, env=dict(environment), check=False)
    if done.returncode != 0:
        raise Refused(f"bootstrap: {otherwise}")


if __name__ == "__main__":
    sys.exit(main())
