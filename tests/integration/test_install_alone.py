"""Each service installs and starts alone, with its own dependencies only, all of them locked."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("metering", "ledger", "invoicing")
OURS = {"hisab-contracts", "hisab-runtime", *SERVICES}

pytestmark = pytest.mark.slow


def uv() -> str:
    """Return the uv that built this environment, or any other; skip without one."""
    built = ROOT / ".hisab/bootstrap/bin/uv"
    found = str(built) if built.exists() else shutil.which("uv")
    if found is None:
        pytest.skip("uv is not here: `make environment` brings it")
    return found


def run(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout, without what would lead Python elsewhere."""
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**environment, "UV_LINK_MODE": "copy", "UV_PYTHON_DOWNLOADS": "never", **more},
        capture_output=True,
        text=True,
        check=False,
    )


def ok(*command: str, **more: str) -> str:
    """Run a command that must succeed, and return what it said."""
    done = run(*command, **more)
    if done.returncode != 0 and re.search(
        r"error sending request|dns error|timed out", done.stderr
    ):
        pytest.skip(f"the package index is not reachable: {done.stderr.strip()[-160:]}")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the five wheels with the locked backend of this environment."""
    folder = tmp_path_factory.mktemp("wheels")
    sources = ["contracts", *(f"services/{name}" for name in ("runtime", *SERVICES))]
    for source in sources:
        how = ["--wheel", "--no-build-isolation", "--python", sys.executable]
        ok(uv(), "build", "--quiet", *how, "--out-dir", str(folder), source)
    return folder


def locked() -> dict[str, str]:
    """Return every locked package with its version."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^\s;]+)", text, flags=re.MULTILINE))


def direct(manifest: str) -> set[str]:
    """Return what a package asks for itself."""
    project = tomllib.loads((ROOT / manifest / "pyproject.toml").read_text(encoding="utf-8"))
    return {re.split(r"[\[<>=!~; ]", name)[0] for name in project["project"]["dependencies"]}


@pytest.mark.parametrize("service", SERVICES)
def test_service_installs_and_starts_alone(service: str, wheels: Path, tmp_path: Path) -> None:
    """A fresh environment with one service: it starts, and nobody else's dependency is there."""
    environment = tmp_path / "environment"
    python = str(environment / "bin/python")
    ok(uv(), "venv", "--quiet", "--python", sys.executable, str(environment))
    ours = [
        str(next(wheels.glob(f"{name}-*.whl")))
        for name in ("hisab_contracts", "hisab_runtime", service)
    ]
    lock = ["--constraint", "requirements.lock", "--verify-hashes"]
    ok(uv(), "pip", "install", "--quiet", "--python", python, *lock, *ours)

    listed = ok(uv(), "pip", "list", "--python", python, "--format", "freeze")
    installed = dict(line.split("==") for line in listed.splitlines() if "==" in line)
    assert OURS & set(installed) == {"hisab-contracts", "hisab-runtime", service}
    others = [name for name in SERVICES if name != service]
    mine = direct(f"services/{service}") | direct("services/runtime") | direct("contracts")
    foreign = {need for name in others for need in direct(f"services/{name}")} - mine - OURS
    assert foreign & set(installed) == set()
    known = locked()
    assert {k: v for k, v in installed.items() if k not in OURS and known.get(k) != v} == {}

    ok(python, "-I", "-c", f"import {service}.__main__")
    assert '"openapi"' in ok(python, "-I", "-m", service, "openapi")
    refused = run(python, "-I", "-m", service, "serve", HISAB_KAFKA="")
    assert refused.returncode != 0
    assert "HISAB_" in refused.stderr + refused.stdout


@pytest.mark.defect("F73")
def test_wheel_that_is_not_the_locked_one_does_not_install(tmp_path: Path) -> None:
    """A package whose file does not have the locked hash is refused, whatever its name says."""
    package = "certifi"
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    block = re.search(rf"^{package}==.*?(?=^\S|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert block is not None
    wrong = hashlib.sha256(b"not the file that was locked").hexdigest()
    lock = tmp_path / "requirements.lock"
    lock.write_text(re.sub(r"sha256:[0-9a-f]{64}", f"sha256:{wrong}", block[0]))
    environment = tmp_path / "environment"
    ok(uv(), "venv", "--quiet", "--python", sys.executable, str(environment))
    done = run(
        *(uv(), "pip", "install", "--python", str(environment / "bin/python")),
        *("--verify-hashes", "--constraint", str(lock), package),
    )
    assert done.returncode != 0
    assert "hash" in done.stderr.lower()
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    assert not (site / package).exists()
