"""Who sells: the legal entities whose invoices are numbered.

One legal entity sells in this version. Its name is printed on every invoice, so it is fixed with
the first registration: another name under the same id would change what a recomputed invoice says.

Refusals of a registration, in order: `SecondSeller`, `SellerNameDiffers`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from hisab_contracts.ids import LegalEntityId

INVOICE_SERIES: Final = "INV"
"""The series in which a seller's invoices are numbered."""


@dataclass(frozen=True, slots=True)
class Seller:
    """A legal entity that issues invoices, and the series they are numbered in."""

    legal_entity_id: LegalEntityId
    name: str
    series: str


@dataclass(frozen=True, slots=True)
class SecondSeller:
    """Another legal entity sells already."""


@dataclass(frozen=True, slots=True)
class SellerNameDiffers:
    """This legal entity is registered under another name."""


SellerRefused = SecondSeller | SellerNameDiffers
"""Why nobody is registered, in order of precedence."""


def register_seller(
    sellers: Iterable[Seller], legal_entity_id: LegalEntityId, name: str
) -> Seller | SellerRefused:
    """Decide what a registration comes to: a new seller, or the one that is registered already."""
    for seller in sellers:
        if seller.legal_entity_id != legal_entity_id:
            return SecondSeller()
        return seller if seller.name == name else SellerNameDiffers()
    return Seller(legal_entity_id, name, INVOICE_SERIES)
