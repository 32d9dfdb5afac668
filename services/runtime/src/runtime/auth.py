"""API keys: made, hashed, looked up; who may do what.

Theory. A secret is 32 random bytes behind a prefix, shown once; its SHA-256 is stored (256 bits of
entropy need no slow hash). Every service keeps `access_keys` from the compacted access topic; the
service that makes keys also writes its own table at once. Look-ups, in vain or not, are cached for
a second at most, so a revocation works everywhere within five, and so does a new key; unknown keys
have a cache of their own, so that no flood of them drives the known ones out. Every cache forgets
its oldest beyond 10 000. Invented keys cost a look-up each, so an address may ask for so many only,
and all of them share four connections of the pool. A key that was good when it was last looked up
is asked for again without a count. One look-up serves all who come with the same key meanwhile.

Refusals: no key, an unknown, expired or revoked one: 401. Too often: 429. A role the endpoint does
not name: 403. Another tenant's thing: 404, so that nothing is told about what exists.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import secrets
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
from starlette.requests import Request

from hisab_contracts import topics
from hisab_contracts.units import optional_moment_of, optional_ms_of
from runtime.consumer import Batch
from runtime.database import ALL_TENANTS, Database
from runtime.http import CALLER, Problem, operation_asked
from runtime.kafka import Message
from runtime.throttle import Throttle, keep_newest, party_of

if TYPE_CHECKING:
    from runtime.database import Connection

SECRET_PREFIX: Final = "hsb_"  # noqa: S105 - what every secret begins with
CACHE_S: Final = 1
FIRST_LOOK_UPS: Final = 4

_SECRET = re.compile(rf"{SECRET_PREFIX}[A-Za-z0-9_-]{{43}}")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling, as the key says."""

    key_id: str
    role: str
    """One of the roles that the service gave to `Access`."""
    tenant_id: str | None
    """Set for a tenant's key, and only there."""
    bound_to: str | None
    """What else a key is for, and only there: the service's roles say what it names."""

    @property
    def actor(self) -> str:
        """Who did it, as records of what was done name it."""
        return f"key:{self.key_id}"

    @property
    def role_scope(self) -> str:
        """The scope of idempotency keys of commands that are about no tenant: one per role.

        The slash keeps it apart from every tenant's scope: no tenant's id has one (decision 0008).
        """
        return f"/{self.role}"

    @property
    def sees(self) -> str:
        """What row-level security is told: the key's tenant, or every tenant."""
        return ALL_TENANTS if self.tenant_id is None else self.tenant_id


class AccessKey(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `access_keys`, and the message on the access topic (JSON, keyed by key_id).

    The same record as `hisab_contracts.reference.AccessRecord`, without its vocabulary.
    """

    key_id: str
    sha256: str
    role: str
    tenant_id: str | None
    bound_to: str | None = msgspec.field(name="hub")
    expires_at_ms: int | None
    revoked: bool


@dataclass(frozen=True, slots=True)
class MintedKey:
    """A new key: the secret for its owner, the row for the table."""

    secret: str
    access_key: AccessKey


def mint(
    key_id: str, role: str, *, tenant_id: str | None = None, bound_to: str | None = None
) -> MintedKey:
    """Make a key. The secret exists nowhere else."""
    random = base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
    secret = SECRET_PREFIX + random
    return MintedKey(secret, key_of(secret, key_id, role, tenant_id=tenant_id, bound_to=bound_to))


def key_of(
    secret: str,
    key_id: str,
    role: str,
    *,
    tenant_id: str | None = None,
    bound_to: str | None = None,
) -> AccessKey:
    """Return the row of a secret that was made elsewhere (the first operator's)."""
    if _SECRET.fullmatch(secret) is None:
        raise ValueError(f"a secret is {SECRET_PREFIX} and 43 characters of URL-safe base64")
    return AccessKey(
        key_id=key_id,
        sha256=_sha256(secret),
        role=role,
        tenant_id=tenant_id,
        bound_to=bound_to,
        expires_at_ms=None,
        revoked=False,
    )


def access_message(access_key: AccessKey) -> Message:
    """Return the message that tells every service about a key."""
    return Message(
        topics.ACCESS, key=access_key.key_id.encode(), value=msgspec.json.encode(access_key)
    )


async def keep_access_keys(batch: Batch, connection: Connection) -> None:
    """Handle the access topic: its keys are stored in their order. Other topics are ignored.

    Raises `msgspec.DecodeError` for a message that cannot be read: it may be a revocation, and to
    pass over that would leave a door open. The consumer stops there, loudly.
    """
    access_keys = [
        msgspec.json.decode(record.value, type=AccessKey)
        for record in batch.records
        if record.topic == topics.ACCESS and record.value is not None
    ]
    await store_keys(connection, access_keys)


_KEY_COLUMNS: Final = "key_id, sha256, role, tenant_id, hub, expires_at, revoked"
_SELECT_KEYS = "select " + _KEY_COLUMNS + " from access_keys"
# That a revocation stays is decided here, where the row is locked: two writers may bring the same
# key, and the older of them last.
_STORE_KEYS = (
    "insert into access_keys as k ("
    + _KEY_COLUMNS
    + ") select "
    + _KEY_COLUMNS
    + """
  from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::timestamptz[],
              $7::boolean[]) as n ("""
    + _KEY_COLUMNS
    + """)
 order by key_id
on conflict (key_id) do update
   set expires_at = excluded.expires_at, revoked = k.revoked or excluded.revoked
"""
)


async def store_keys(connection: Connection, access_keys: Iterable[AccessKey]) -> None:
    """Write keys: the newest of each counts, and a revocation stays, whatever comes after it.

    Of a known key only expiry and revocation can change.
    """
    newest: dict[str, AccessKey] = {}
    for key in access_keys:
        earlier = newest.get(key.key_id)
        if earlier is not None and earlier.revoked:
            # As in the statement, which sees one row per key: a revocation is never taken back.
            newest[key.key_id] = msgspec.structs.replace(key, revoked=True)
        else:
            newest[key.key_id] = key
    keys = list(newest.values())
    if not keys:
        return
    await connection.execute(
        _STORE_KEYS,
        [key.key_id for key in keys],
        [key.sha256 for key in keys],
        [key.role for key in keys],
        [key.tenant_id for key in keys],
        [key.bound_to for key in keys],
        [optional_moment_of(key.expires_at_ms) for key in keys],
        [key.revoked for key in keys],
    )


_LACKING_KEYS = """
select n.key_id
  from unnest($1::text[], $2::boolean[]) as n (key_id, revoked)
  left join access_keys k on k.key_id = n.key_id
 where k.key_id is null or (n.revoked and not k.revoked)
 order by n.key_id
"""


async def lacking_keys(connection: Connection, published: Iterable[AccessKey]) -> list[str]:
    """Return those of these keys that are not stored, or whose revocation is not."""
    keys = list(published)
    rows = await connection.fetch(
        _LACKING_KEYS, [key.key_id for key in keys], [key.revoked for key in keys]
    )
    return [row["key_id"] for row in rows]


_KEY_BY_ID = _SELECT_KEYS + " where key_id = $1"


async def find_access_key(connection: Connection, key_id: str) -> AccessKey | None:
    """Find a key by its id, as stored: valid or not, and never its secret."""
    return await _find_key(connection, _KEY_BY_ID, key_id)


_ANY_KEY_OF_ROLE = """
select exists (select from access_keys where role = $1)
"""


async def any_key_of_role(connection: Connection, role: str) -> bool:
    """Say whether a key of this role was ever made, valid or not."""
    return bool(await connection.fetchval(_ANY_KEY_OF_ROLE, role))


_VALID_KEY = (
    _SELECT_KEYS
    + " where sha256 = $1 and not revoked"
    + " and (expires_at is null or expires_at > clock_timestamp())"
)


async def _find_principal(database: Database, sha256: str) -> Principal | None:
    """Find whose key this is, unless it is revoked or has expired."""
    async with database.connection() as connection:
        key = await _find_key(connection, _VALID_KEY, sha256)
    if key is None:
        return None
    return Principal(
        key_id=key.key_id, role=key.role, tenant_id=key.tenant_id, bound_to=key.bound_to
    )


async def _find_key(connection: Connection, query: str, value: str) -> AccessKey | None:
    row = await connection.fetchrow(query, value)
    if row is None:
        return None
    return AccessKey(
        key_id=row["key_id"],
        sha256=row["sha256"],
        role=row["role"],
        tenant_id=row["tenant_id"],
        bound_to=row["hub"],
        expires_at_ms=optional_ms_of(row["expires_at"]),
        revoked=row["revoked"],
    )


@dataclass(frozen=True, slots=True)
class AccessLimits:
    """How much is taken from one key, and how many unknown keys from one address.

    Only keys that nobody knows are counted by address: hubs and benchmarks behind one address keep
    all they have as long as their keys are good. A key that comes for the first time is refused
    only where the count of its address is used up.
    """

    requests_per_s: int = 5_000
    """Of one key, on average; twice as many at once."""
    unknown_keys_per_s: int = 20
    """From one address, on average."""
    unknown_keys_limit: int = 200
    """From one address, before the average counts."""


class Access:
    """Who a request comes from. One per process."""

    def __init__(
        self,
        database: Database,
        roles: Collection[str],
        limits: AccessLimits = AccessLimits(),
    ) -> None:
        """Look keys up through this pool (the `api` role), within these limits.

        A key whose role is not among `roles` opens nothing.
        """
        self._database = database
        self._roles = frozenset(roles)
        # Kept beyond its time, until it is found to be good no more.
        self._found: dict[str, tuple[float, Principal]] = {}
        self._unknown: dict[str, float] = {}
        # One look-up per key, for all who come with it meanwhile.
        self._looking: dict[str, asyncio.Task[Principal | None]] = {}
        self._keys = Throttle(limits.requests_per_s, 2 * limits.requests_per_s)
        self._addresses = Throttle(limits.unknown_keys_per_s, limits.unknown_keys_limit)
        # Of the pool's connections, so many at most look for keys that may be invented.
        self._first_look_ups = asyncio.Semaphore(FIRST_LOOK_UPS)

    async def authorise(self, request: Request) -> Principal:
        """Return who calls, as the endpoint's own `roles` demand.

        Raises `Problem` 401 without a valid key, 429 for one that asks too often (or for an address
        that invents keys), 403 for a key of another role.
        """
        principal = await self._principal(request)
        if principal is None:
            raise Problem("unauthenticated", "send Authorization: Bearer <key>")
        wait_s = self._keys.take(principal.key_id, time.monotonic())
        if wait_s:
            raise Problem("too-many-requests", "this key asks too often", retry_after_s=wait_s)
        roles = operation_asked(request).roles
        if roles and principal.role not in roles:
            raise Problem("forbidden", f"this takes a key of role {' or '.join(roles)}")
        setattr(request.state, CALLER, (principal.sees, principal.bound_to))
        return principal

    async def _principal(self, request: Request) -> Principal | None:
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or _SECRET.fullmatch(secret) is None:
            return None
        party = party_of(None if request.client is None else request.client.host)
        # Looked up by the hash: no secret is kept in memory longer than its request.
        return await self._whose(_sha256(secret), party)

    async def _whose(self, sha256: str, party: str) -> Principal | None:
        now_s = time.monotonic()
        until_s, principal = self._found.get(sha256, (now_s, None))
        if now_s < until_s:
            return principal
        if now_s < self._unknown.get(sha256, now_s):
            return None
        looking = self._looking.get(sha256)
        if looking is None:
            looking = asyncio.create_task(self._look_up(sha256, party))
            self._looking[sha256] = looking
            looking.add_done_callback(lambda _: self._looking.pop(sha256))
        # Whoever goes away takes the answer from nobody else who waits for it.
        return await asyncio.shield(looking)

    async def _look_up(self, sha256: str, party: str) -> Principal | None:
        """Look a key up; one that was not good when last seen is counted, unless it is now."""
        if sha256 in self._found:
            # Whoever invents keys at the same address must not lock it out.
            return await self._find(sha256)
        async with self._first_look_ups:
            wait_s = self._addresses.take(party, time.monotonic())
            if wait_s:
                raise Problem(
                    "too-many-requests", "too many unknown keys from here", retry_after_s=wait_s
                )
            is_unknown = False
            try:
                principal = await self._find(sha256)
                is_unknown = principal is None
            finally:
                # Counted is what nobody knows: no good key, and no outage.
                if not is_unknown:
                    self._addresses.give_back(party)
        return principal

    async def _find(self, sha256: str) -> Principal | None:
        # Counted from before the look-up, so that a change is never seen later than that.
        until_s = time.monotonic() + CACHE_S
        principal = await _find_principal(self._database, sha256)
        if principal is not None and principal.role not in self._roles:
            principal = None
        if principal is None:
            self._found.pop(sha256, None)
            keep_newest(self._unknown, sha256, until_s)
        else:
            keep_newest(self._found, sha256, (until_s, principal))
        return principal


def require_own_tenant(principal: Principal, tenant_id: str) -> None:
    """Raise `Problem` 404 when a tenant's key asks for another tenant."""
    if principal.tenant_id not in (None, tenant_id):
        raise Problem("not-found", "no such tenant")


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
