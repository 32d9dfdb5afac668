"""What a fresh stack is seeded with and the demo computes from: every value stands here, once.

Hubs, tenants, prices, taxes, one programme and one legal entity, as the published interface names
them; the `Seeder` sends them to the services, the demo bills by them. `tests/oracle.py` repeats
what it needs on purpose: a test that took its figures from here would agree with any mistake.

No grants and no usage: who wants them makes them, as an outsider.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from hisab_contracts.ids import (
    HubCode,
    LegalEntityId,
    PriceClass,
    ProgrammeId,
    ProjectId,
    Sku,
    TenantId,
)
from hisab_contracts.reference import Role, TenantKind
from hisab_contracts.units import month_bounds_ms

# The order of hubs, tenants and SKUs matters: a replayed trace picks among them by position
# (`demo/replay.py`), so another order would move usage to other tenants and change every bill.

LAHORE: Final = HubCode("lhr")
KARACHI: Final = HubCode("khi")
ISLAMABAD: Final = HubCode("isb")
HUBS: Final[Mapping[HubCode, str]] = {
    LAHORE: "Lahore",
    KARACHI: "Karachi",
    ISLAMABAD: "Islamabad",
}
HEARTBEAT_MS: Final = 60_000

CURRENCY: Final = "PKR"
MICRO_PER_PKR: Final = 1_000_000
MICRO_PER_PAISA: Final = MICRO_PER_PKR // 100
COMMERCIAL_CREDIT_LIMIT_MICRO: Final = 10**15


@dataclass(frozen=True, slots=True)
class SeedTenant:
    """A tenant as the operator opens it."""

    name: str
    kind: TenantKind

    @property
    def credit_limit_micro(self) -> int:
        """How far it may go without credits: only a commercial tenant has a contract."""
        return COMMERCIAL_CREDIT_LIMIT_MICRO if self.kind == "commercial" else 0


RAVI_HEALTH: Final = TenantId("ravi-health")
FLOOD_WATCH: Final = TenantId("flood-watch")
TENANTS: Final[Mapping[TenantId, SeedTenant]] = {
    TenantId("indus-foundry"): SeedTenant("Indus Foundry", "commercial"),
    TenantId("chenab-robotics"): SeedTenant("Chenab Robotics", "commercial"),
    TenantId("makran-logistics"): SeedTenant("Makran Logistics", "commercial"),
    TenantId("khyber-media"): SeedTenant("Khyber Media", "commercial"),
    RAVI_HEALTH: SeedTenant("Ravi Health", "startup"),
    TenantId("sutlej-agri"): SeedTenant("Sutlej Agri", "startup"),
    TenantId("mehran-speech"): SeedTenant("Mehran Speech", "startup"),
    TenantId("soan-fintech"): SeedTenant("Soan Fintech", "startup"),
    TenantId("uni-karakoram"): SeedTenant("University of Karakoram", "university"),
    TenantId("uni-hingol"): SeedTenant("University of Hingol", "university"),
    FLOOD_WATCH: SeedTenant("Flood Watch", "programme"),
    TenantId("crop-watch"): SeedTenant("Crop Watch", "programme"),
}
COMMERCIAL: Final = tuple(t for t, tenant in TENANTS.items() if tenant.kind == "commercial")
"""Who gets monthly bills."""
FUNDED: Final = tuple(t for t, tenant in TENANTS.items() if tenant.kind != "commercial")
"""Who computes on grants."""
PROJECT: Final = ProjectId("main")
"""It exists with its tenant."""

PROGRAMME: Final = ProgrammeId("ignite")
PROGRAMME_NAME: Final = "Ignite"
PROGRAMME_BUDGET_MICRO: Final = 10**14
LEGAL_ENTITY: Final = LegalEntityId("ignite-haas")
LEGAL_ENTITY_NAME: Final = "Ignite HaaS"

H100: Final = Sku("h100-sxm-80")
H200: Final = Sku("h200-sxm-141")
A100: Final = Sku("a100-sxm-80")
L40S: Final = Sku("l40s-48")
B200: Final = Sku("b200-sxm-180")
PKR_PER_GPU_HOUR: Final[Mapping[Sku, int]] = {
    H100: 840,
    H200: 1100,
    A100: 420,
    L40S: 260,
    B200: 1450,
}

ON_DEMAND: Final = PriceClass("on_demand")
RESERVED: Final = PriceClass("reserved")
SPOT: Final = PriceClass("spot")
PERCENT_OF_LIST: Final[Mapping[PriceClass, int]] = {ON_DEMAND: 100, RESERVED: 80, SPOT: 50}
CLASS_OF_QOS: Final[Mapping[str, PriceClass]] = {
    "LS": ON_DEMAND,
    "Burstable": ON_DEMAND,
    "Guaranteed": RESERVED,
    "BE": SPOT,
}
"""On what terms a recorded trace's quality of service is sold."""
PRICES_VALID_FROM: Final = "2025-01-01T00:00:00.000Z"

FIRST_MONTH: Final = "2025-07"
EPOCH_MS: Final = month_bounds_ms(FIRST_MONTH)[0]
"""2025-07-01T00:00:00+05:00: where the demo's time begins, second 0 of a trace."""

STAFF: Final = (Role.OFFICER, Role.APPROVER, Role.FINANCE, Role.AUDITOR, Role.SCHEDULER)
"""Roles that get one key each, beside the operator, the hubs and the tenants."""


@dataclass(frozen=True, slots=True)
class SeedTaxRate:
    """An authority's rate for the hub in its territory, with the law it comes from."""

    hub: HubCode
    authority: str
    tax_bps: int
    citation: str


TAX_RATES: Final = (
    SeedTaxRate(
        LAHORE,
        "PRA",
        1600,
        "Punjab Sales Tax on Services Act 2012 (demonstration value, unconfirmed)",
    ),
    SeedTaxRate(
        KARACHI,
        "SRB",
        1500,
        "Sindh Sales Tax on Services Act 2011 (demonstration value, unconfirmed)",
    ),
    SeedTaxRate(
        ISLAMABAD,
        "FBR",
        1500,
        "ICT (Tax on Services) Ordinance 2001 (demonstration value, unconfirmed)",
    ),
)
TAX_VALID_FROM: Final = "2024-07-01"


def rate_micro(pkr_per_gpu_hour: int, price_class: PriceClass) -> int:
    """Return the price of a class in micro per GPU-hour, out of the price on demand."""
    return pkr_per_gpu_hour * MICRO_PER_PKR * PERCENT_OF_LIST[price_class] // 100


def price_list(pkr_per_gpu_hour: Mapping[Sku, int] = PKR_PER_GPU_HOUR) -> dict[str, object]:
    """Return the command that publishes these SKUs, each in every price class, open-ended."""
    return {
        "currency": CURRENCY,
        "valid_from": PRICES_VALID_FROM,
        "valid_until": None,
        "prices": [
            {
                "sku": sku,
                "price_class": price_class,
                "micro_per_gpu_hour": str(rate_micro(pkr, price_class)),
            }
            for sku, pkr in pkr_per_gpu_hour.items()
            for price_class in PERCENT_OF_LIST
        ],
    }
