"""The HTTP side: a thin client of the three services, as anybody could write it.

Addresses and keys come from `stack.json`, which is read again whenever a service does not answer:
a service that was killed is back within seconds, and asking again is safe because every command
carries an idempotency key made of its content.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx2

import retries

_PAGE: Final = 1000

Json = dict[str, Any]


class RefusedError(Exception):
    """A service refused a call; `problem` is its problem document."""

    def __init__(self, call: str, status: int, problem: Json) -> None:
        super().__init__(f"{call}: {status} {problem.get('code')}: {problem.get('detail')}")
        self.status = status
        self.problem = problem


class Api:
    """Calls by (service, path, key). `key` is a role, or `hub:<code>`, or `tenant:<id>`."""

    def __init__(self, stack_file: Path) -> None:
        self._stack_file = stack_file
        self.stack: Json = json.loads(stack_file.read_bytes())
        self._client = httpx2.AsyncClient(timeout=retries.ANSWER_PATIENCE_S, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    @property
    def services(self) -> list[str]:
        """The services of this stack."""
        return list(self.stack["services"])

    @property
    def hubs(self) -> list[str]:
        """The hubs of this stack."""
        return list(self.stack["topics"]["hub"])

    def reload(self) -> Json:
        """Read `stack.json` again: a process that came back has another number."""
        self.stack = json.loads(self._stack_file.read_bytes())
        return self.stack

    def secret(self, key: str) -> str:
        """Return the API key of a role, a hub or a tenant."""
        group, _, name = key.partition(":")
        found = self.stack["keys"][group]
        return str(found[name] if name else found)

    def url(self, service: str, path: str) -> str:
        """Return the address of a path of a service."""
        return f"{self.stack['services'][service]['url']}{path}"

    async def get(self, service: str, path: str, key: str, **query: object) -> Json:
        """Read something."""
        answer = await self._call("GET", service, path, key, query=query)
        return _require_object(answer)

    async def get_bytes(self, service: str, path: str, key: str) -> bytes:
        """Download a document."""
        return (await self._call("GET", service, path, key)).content

    async def post(self, service: str, path: str, key: str, body: Json, attempt: int = 1) -> Json:
        """Command something; a repeat of the same attempt gets the first answer."""
        text = json.dumps(body, sort_keys=True)
        idempotency_key = sha256(f"{service} {path} {attempt} {text}".encode()).hexdigest()[:40]
        answer = await self._call(
            "POST", service, path, key, body=body, idempotency_key=idempotency_key
        )
        return _require_object(answer)

    async def items(self, service: str, path: str, key: str, **query: object) -> list[Json]:
        """Read a whole list, page by page."""
        found: list[Json] = []
        cursor: object = None
        while True:
            page = {"limit": _PAGE, "cursor": cursor}
            answer = await self.get(service, path, key, **query, **page)
            found.extend(answer["items"])
            cursor = answer["next"]
            if cursor is None:
                return found

    async def _call(
        self,
        method: str,
        service: str,
        path: str,
        key: str,
        *,
        query: Json | None = None,
        body: Json | None = None,
        idempotency_key: str | None = None,
    ) -> httpx2.Response:
        """Call until the answer is more than "later"; `RefusedError` when it is a refusal."""
        parameters = {
            name: str(value) for name, value in (query or {}).items() if value is not None
        }
        headers = {"authorization": f"Bearer {self.secret(key)}"}
        if idempotency_key is not None:
            headers["idempotency-key"] = idempotency_key

        async def send() -> httpx2.Response:
            return await self._client.request(
                method, self.url(service, path), params=parameters, headers=headers, json=body
            )

        # Nobody answers: a service that was killed comes back, maybe at another address.
        answer = await retries.call(send, lost=self.reload)
        return _require_success(answer, f"{method} {service} {path}")


def _require_success(answer: httpx2.Response, call: str) -> httpx2.Response:
    if answer.is_success:
        return answer
    try:
        problem = answer.json()
    except ValueError:
        problem = {"code": None, "detail": answer.text[:200]}
    raise RefusedError(call, answer.status_code, problem if isinstance(problem, dict) else {})


def _require_object(answer: httpx2.Response) -> Json:
    content = answer.json()
    if not isinstance(content, dict):
        raise TypeError(f"{answer.url} answered no JSON object")
    return content
