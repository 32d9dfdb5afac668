"""Says where a newer schema would refuse what an older one took.

Made for the schemas of this project, not for every schema: a keyword that is not known below counts
as a narrowing, so that the check errs on the safe side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from generate import ANNOTATIONS

LOWER_IS_WIDER = frozenset({"minimum", "exclusiveMinimum", "minLength", "minItems"})
HIGHER_IS_WIDER = frozenset({"maximum", "exclusiveMaximum", "maxLength", "maxItems"})
CHOICES = frozenset({"oneOf", "anyOf", "prefixItems"})


def narrowings(old: Any, new: Any, place: str = "") -> list[str]:
    """Return every place where `new` may refuse what `old` takes."""
    return list(_narrowings(old, new, place))


def _narrowings(old: Any, new: Any, place: str) -> Iterator[str]:
    if not isinstance(old, dict) or not isinstance(new, dict):
        if old != new:
            yield f"{place}: {old!r} became {new!r}"
        return
    new = _among_choices(old, new)
    for word in sorted((set(old) | set(new)) - ANNOTATIONS - {"$id", "$schema"}):
        here = f"{place}/{word}"
        was: Any = old.get(word)
        now: Any = new.get(word)
        if word in {"properties", "$defs"}:
            for name, part in (was or {}).items():
                if name in (now or {}):
                    yield from _narrowings(part, now[name], f"{here}/{name}")
                else:
                    yield f"{here}/{name}: gone"
        elif word == "required":
            for name in sorted(set(now or ()) - set(was or ())):
                yield f"{here}: {name} is demanded"
        elif word in CHOICES and was and now and len(now) >= len(was):
            for number, part in enumerate(was):
                yield from _narrowings(part, now[number], f"{here}/{number}")
        elif word == "items":
            yield from _narrowings(was, now, here)
        elif was != now and not _is_wider(word, was, now):
            yield f"{here}: {was!r} became {now!r}"


def _among_choices(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return the choice that takes what was the only shape, if a schema has become a choice."""
    for word in ("oneOf", "anyOf"):
        if word in old or word not in new or "$ref" not in old:
            continue
        for choice in new[word]:
            if choice.get("$ref") == old["$ref"]:
                rest = {name: part for name, part in new.items() if name != word}
                return {**rest, **choice}
    return new


def _is_wider(word: str, was: Any, now: Any) -> bool:
    """Say whether a bound that changed lets at least everything through that it did before."""
    if word == "enum" and was is not None and now is not None:
        return set(was) <= set(now)
    bounds = LOWER_IS_WIDER | HIGHER_IS_WIDER
    if now is None:
        return word in bounds or word == "pattern"
    if was is None or word not in bounds:
        return False
    return bool(now <= was) if word in LOWER_IS_WIDER else bool(now >= was)
