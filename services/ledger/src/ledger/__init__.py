"""The ledger: immutable books of credit grants, holds and charges (DESIGN section 6)."""

__version__ = "0.1.0"
