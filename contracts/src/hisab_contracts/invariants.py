"""What must always be true: the one way in which code of ours stops on its own defects.

An invariant is not a refusal. A refusal answers somebody who asked for what cannot be done; a
broken invariant means that our own state contradicts itself, so nothing may be built on it or
committed. It is not an `assert`, because `python -O` removes those. The same fact also stands as a
constraint in the schema.
"""

from __future__ import annotations


class InvariantBroken(Exception):
    """A defect of ours: the state contradicts itself. Nothing may be committed."""


def invariant(holds: object, what: str) -> None:
    """Raise `InvariantBroken` unless a fact that must always be true is true.

    `what` states the fact, in words, as it should be.
    """
    if not holds:
        raise InvariantBroken(what)
