"""Stacks and tests that run side by side never take a port of each other."""

from __future__ import annotations

from itertools import islice

from children import free_ports

BEGIN = 7
PORTS = 30
"""More than one asker's row has."""


def test_ports_that_somebody_was_given_are_no_other_askers() -> None:
    """Nobody listens on them yet, and both begin at the same place: they stay apart."""
    first, second = free_ports(BEGIN), free_ports(BEGIN)
    given = [next(first), next(second), *islice(first, PORTS), *islice(second, PORTS)]
    assert len(given) == len(set(given))


def test_ports_are_given_again_when_their_asker_is_gone() -> None:
    """All rows are to be had, one after another, as often as somebody asks."""
    for number in range(2_000):
        assert 20_000 <= next(free_ports(number)) < 32_000
