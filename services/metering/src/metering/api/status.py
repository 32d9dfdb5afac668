"""`/v1/status`: how far metering is, and what the last comparison with the ledger has found."""

from __future__ import annotations

import msgspec
from fastapi import Request, Response

from hisab_contracts.units import instant_text
from metering.store import booked
from runtime.http import ANY_KEY, get
from runtime.service import Kit, Parts, Service, StatusAnswer, StatusResource


class ReconcileView(msgspec.Struct, frozen=True):
    """The last run of `python -m metering reconcile`."""

    at: str
    differences: int
    """Buckets that differed when it ended: after a repair, 0."""


class MeteringStatus(StatusAnswer, frozen=True, kw_only=True):
    """How far metering is; `reconcile` is null before the first run."""

    reconcile: ReconcileView | None


class ReconciledStatus(StatusResource):
    """`/v1/status` of metering."""

    def __init__(self, service: Service, kit: Kit, parts: Parts) -> None:
        """Report on these parts, and on what `reconcile` stores."""
        super().__init__(service, kit, parts)
        self._database = kit.writer

    @get("/v1/status", roles=ANY_KEY, answer=MeteringStatus)
    async def status(self, request: Request) -> Response:
        """How far metering is: drained when lag and depth are both 0."""
        return await super().status(request)

    async def look(self) -> MeteringStatus:
        """Look how far metering is, and what `reconcile` has stored."""
        answer = await super().look()
        async with self._database.connection() as connection:
            last = await booked.last_run(connection)
        reconcile = (
            None
            if last is None
            else ReconcileView(instant_text(last.finished_ms), last.difference_count)
        )
        return MeteringStatus(**msgspec.structs.asdict(answer), reconcile=reconcile)
