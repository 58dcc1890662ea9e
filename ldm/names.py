"""One clear line for a word that is not among the ones we know."""

from collections.abc import Iterable
from difflib import get_close_matches


def known(what: str, name: str, allowed: Iterable[str]) -> str:
    """Return `name` if it is allowed, else raise ValueError with the nearest word and the whole list."""
    words = sorted(allowed)
    if name in words:
        return name
    near = get_close_matches(name, words, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ";"
    raise ValueError(f"unknown {what} {name!r}{hint} known: {', '.join(words)}")
