"""The deployable shape is well-formed, checked without an engine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from compose_file import DEPLOY, ROOT, SERVICES, load, read_dockerfile

TOOLS = Path(sys.executable).parent
SCHEMA: tuple[str | Path, ...] = (
    TOOLS / "check-jsonschema",
    "--builtin-schema",
    "vendor.compose-spec",
)


def settings_read() -> set[str]:
    """Return every setting that the runtime kit or a service reads."""
    sources = (ROOT / "services").glob("*/src/*/*.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    return set(re.findall(r'"(HISAB_[A-Z_]+|OTEL_[A-Z_]+)"', text))


def test_dockerfile_passes_its_linter() -> None:
    """Hadolint has nothing to say."""
    done = subprocess.run(
        [TOOLS / "hadolint", DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (0, "") == (done.returncode, done.stdout + done.stderr)


def test_compose_file_keeps_the_compose_specification() -> None:
    """The schema of the specification, which the tool carries along, accepts the file."""
    done = subprocess.run(
        [*SCHEMA, DEPLOY / "compose.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_bad_files_are_found(tmp_path: Path) -> None:
    """Both linters can fail."""
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp && sudo apt-get install x\n")
    (tmp_path / "compose.yaml").write_text("services: {a: {image: 7, portz: []}}\n")
    hadolint: list[str | Path] = [TOOLS / "hadolint", tmp_path / "Dockerfile"]
    for command in (hadolint, [*SCHEMA, tmp_path / "compose.yaml"]):
        assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_at_most_six_containers() -> None:
    """Three services, a database server and a broker: nothing else by default."""
    services = load()["services"]
    default = [name for name, service in services.items() if not service.get("profiles")]
    assert len(default) <= 6
    assert set(SERVICES) <= set(default)


def test_no_secret_has_a_default() -> None:
    """Every password and key comes from outside, and its absence stops the start.

    But for invoicing's: the ledger makes it, so it can only come after the first start.
    """
    values = [
        str(value)
        for service in load()["services"].values()
        for name, value in service["environment"].items()
        if name != "HISAB_LEDGER_KEY"
    ]
    used = [use for value in values for use in re.findall(r"\$\{([A-Z_]+)([^}]*)\}", value)]
    secret = [use for use in used if use[0].endswith(("PASSWORD", "KEY", "SECRET"))]
    assert len(secret) >= 11
    assert [] == [name for name, otherwise in secret if otherwise != ":?"]
    dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"(?i)(password|secret|token|_key)=", dockerfile) is None


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_told_what_it_reads_and_nothing_else(name: str) -> None:
    """Each setting of the compose file is one the service reads; each required one is there."""
    environment = set(load()["services"][name]["environment"])
    assert environment - settings_read() == set()
    required = {"HISAB_KAFKA", "HISAB_DB_OWNER", "HISAB_DB_API", "HISAB_DB_WRITER"}
    assert required - environment == set()


@pytest.mark.parametrize("name", SERVICES)
def test_service_runs_without_privileges(name: str) -> None:
    """Read-only, without capabilities; serving forgets the owner; one build argument."""
    service = load()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "env -u HISAB_DB_OWNER service serve" in service["entrypoint"][-1]
    assert service["build"]["args"] == {"SERVICE": name}
    for part in ("api", "writer", "owner"):
        assert f"{name}_{part}:" in service["environment"][f"HISAB_DB_{part.upper()}"]


def test_image_runs_as_nobody_in_particular() -> None:
    """The last stage names a numeric user that is not root."""
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users
    assert int(users[-1].split(":")[0]) > 0


def test_what_the_image_copies_is_not_ignored() -> None:
    """Every path the Dockerfile copies exists, and .dockerignore lets it through."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = [
        found.arguments
        for found in read_dockerfile(text)
        if found.keyword == "COPY" and "--from" not in found.arguments
    ]
    copied = [word for line in lines for word in line.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_through = [line[1:] for line in ignored if line.startswith("!")]
    assert len(copied) >= 5
    for path in copied:
        for name in SERVICES if "${SERVICE}" in path else ("",):
            real = path.replace("${SERVICE}", name)
            assert (ROOT / real).exists()
            assert any(
                real == kept or real.startswith(f"{kept}/") or kept.startswith(f"{real}/")
                for kept in let_through
            ), real


def test_database_server_makes_every_role_that_is_used() -> None:
    """init.sh is given a password for every role that a service connects as."""
    given = set(load()["services"]["postgres"]["environment"])
    expected = {
        f"{name}_{part}_PASSWORD".upper()
        for name in SERVICES
        for part in ("owner", "api", "writer")
    }
    assert expected - given == set()
    done = subprocess.run(["sh", "-n", DEPLOY / "postgres/init.sh"], check=False)
    assert done.returncode == 0
