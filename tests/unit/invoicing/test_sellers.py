"""Who sells: one legal entity, fixed with its first registration."""

from __future__ import annotations

from hisab_contracts.ids import LegalEntityId
from invoicing.core.sellers import SecondSeller, Seller, SellerNameDiffers, register_seller

IGNITE = LegalEntityId("ignite-haas")
SELLER = Seller(IGNITE, "Ignite HaaS", "INV")


def test_the_first_legal_entity_that_registers_sells_in_the_series_inv() -> None:
    """Registering it again changes nothing."""
    assert SELLER == register_seller([], IGNITE, "Ignite HaaS")
    assert SELLER == register_seller([SELLER], IGNITE, "Ignite HaaS")


def test_a_second_seller_and_another_name_are_refused() -> None:
    """Whose name is printed on invoices cannot change."""
    assert SecondSeller() == register_seller([SELLER], LegalEntityId("another"), "Another")
    assert SellerNameDiffers() == register_seller([SELLER], IGNITE, "Ignite")
