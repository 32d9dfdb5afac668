"""The ledger over HTTP: one resource per module.

Each endpoint reads in the order of its checks: who calls, what the path names, what the body says;
then it acts through `commands` or reads through `store`. What goes in and comes out stands beside
it; `approvals` is what all doors share that take two people, `requests` reads amounts and instants,
`problems` gives refusals their codes.
"""

from __future__ import annotations

from ledger.api.approvals import Approvals
from ledger.api.balances import Balances
from ledger.api.entries import Entries
from ledger.api.grants import Grants
from ledger.api.holds import Holds
from ledger.api.invoiced import InvoicedDocuments
from ledger.api.keys import Keys
from ledger.api.outcomes import Outcomes
from ledger.api.prepayments import Prepayments
from ledger.api.programmes import Programmes
from ledger.api.proposals import Proposals
from ledger.api.tenants import Tenants
from ledger.commands import Commands
from ledger.placement import TenantPartitions
from runtime.http import Resource
from runtime.service import Kit


def resources(kit: Kit, commands: Commands, partitions: TenantPartitions) -> tuple[Resource, ...]:
    """Wire every resource."""
    approvals = Approvals(kit, commands)
    return (
        Tenants(kit, commands, approvals),
        Programmes(kit, commands, approvals),
        Keys(kit, commands),
        Grants(kit, commands, approvals, partitions),
        Outcomes(kit, commands),
        Proposals(kit, approvals),
        Holds(kit, commands),
        Balances(kit, partitions),
        Entries(kit, approvals),
        InvoicedDocuments(kit, commands),
        Prepayments(kit, commands),
    )
