"""How what a command makes is named."""

from __future__ import annotations

from ledger.commands import id_from_command


def test_ids_come_from_the_command_that_makes_the_thing() -> None:
    """A repeat names the same thing; scope and key cannot run into each other."""
    assert id_from_command("g", "t", "k") == id_from_command("g", "t", "k")
    assert id_from_command("g", "t", "k") != id_from_command("h", "t", "k")
    assert id_from_command("g", "a", "bc") != id_from_command("g", "ab", "c")
    assert 21 == len(id_from_command("g", "t", "k"))
