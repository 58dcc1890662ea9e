r"""AUTOMATIC1111's grammar of prompts, as text: what is drawn at which step, and how much each word counts.

    (x) (x:1.3) [x]             x counts 1.1 times, 1.3 times, 1/1.1 times as much; nested, the factors multiply
    \( \) \[ \] \\              these characters themselves
    [a:b:0.5] [a:b:12]          a, then b: from that fraction of the steps (a number with a point), or after step 12
    [b:0.5] [a::0.5]            nothing, then b; a, then nothing
    [a|b|c]                     a, b, c, a, ... from step to step
    a :1.2 AND b                two prompts at once, and how much each counts
    a BREAK b                   b begins a new chunk of the text encoder
    <lora:name:0.8>             an adapter of the model, and its weight

Where that program's result depends on how it recovers from an error, here is an error: brackets must be balanced.
On purpose unlike it: BREAK also works inside brackets, and a bare | or : does not switch editing off elsewhere.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

STRONGER, WEAKER = 1.1, 1 / 1.1
PARTNER = {")": "(", "]": "["}
DEEPEST = 100
"""Brackets that may be open at once."""

_TAG = re.compile(r"<(\w+):([^>]+)>")
_AND = re.compile(r"\bAND\b")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_BRANCH = re.compile(r"(.*?)(?:\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+)))?\s*", re.DOTALL)
_NUMBER = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
_SCHEDULE = re.compile(r"\\.|[^\\()\[\]:|]+|.", re.DOTALL)
_ATTENTION = re.compile(r"\\[()\[\]\\]|\\|[()\[\]]|:\s*([+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")


@dataclass(frozen=True)
class Piece:
    """Text that counts `weight` times."""

    text: str
    weight: float


@dataclass(frozen=True)
class AdapterTag:
    """An adapter that a prompt asks for by the name of its file."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Edit:
    """One text before a moment, another from there on; `fraction`: `when` counts in all steps, else in steps."""

    before: "Tree"
    after: "Tree"
    when: float
    fraction: bool


@dataclass(frozen=True)
class Alternation:
    """Texts that take turns, a step each."""

    options: tuple["Tree", ...]


Tree = tuple[str | Edit | Alternation, ...]
"""A text in which some places change from step to step."""


@dataclass(frozen=True)
class Branch:
    """One of the prompts that AND joins: how much it counts, and its text at each step."""

    weight: float
    tree: Tree

    def at(self, step: int, steps: int) -> str:
        """The text at `step` in 0..steps-1, with its attention weights and BREAKs, which `pieces` reads."""
        assert 0 <= step < steps
        return _resolved(self.tree, step, steps)


@dataclass(frozen=True)
class Prompt:
    """What a prompt asks for: one branch or several, and adapters."""

    branches: tuple[Branch, ...]
    adapters: tuple[AdapterTag, ...] = ()

    def texts(self, steps: int) -> tuple[str, ...]:
        """The distinct texts of all branches over all steps, in the order in which they come up."""
        return tuple(dict.fromkeys(b.at(step, steps) for step in range(steps) for b in self.branches))

    def words(self, steps: int) -> str:
        """What it says at the last step as words alone, without weights and what counts against the picture."""
        texts = [branch.at(steps - 1, steps) for branch in self.branches if branch.weight > 0]
        groups = (group for text in texts for group in pieces(text))
        return " ".join("".join(piece.text for piece in group).strip() for group in groups)


def parse(prompt: str, *, negative: bool = False) -> Prompt:
    """Read a whole prompt; a negative one is a single branch of weight 1, so a number at its end is text.

    Raises ValueError, one line, for brackets that do not pair (naming the character, counted from 1), for AND inside
    brackets or in a negative prompt, for a tag other than <lora:name> or <lora:name:weight>, for any tag in a
    negative prompt, and for `[..]` that is both an edit and an alternation.
    """
    _check(_TAG.sub(lambda tag: " " * len(tag[0]), prompt), negative)
    tags = tuple(_adapter(tag) for tag in _TAG.finditer(prompt))
    text = _TAG.sub("", prompt)
    if negative:
        if tags:
            raise ValueError(f"a negative prompt cannot ask for adapters, as {_shown(prompt)} does")
        return Prompt((Branch(1.0, _tree(text)),))
    return Prompt(tuple(_branch(part) for part in _AND.split(text)), tags)


def pieces(text: str) -> tuple[tuple[Piece, ...], ...]:
    """The attention weights of a text: runs of equal weight, in groups that BREAK separates; no text, no pieces.

    Raises ValueError, one line, for brackets that do not pair and for a weight that is no number.
    """
    _check(text, negative=False)
    found: list[tuple[str | None, float]] = []  # None is a BREAK
    opened: list[int] = []

    def close(factor: float) -> None:
        start = opened.pop()
        found[start:] = [(part, weight * factor) for part, weight in found[start:]]

    for token in _ATTENTION.finditer(text):
        word, weight = token[0], token[1]
        if word in ("(", "["):
            opened.append(len(found))
        elif word == ")":
            close(STRONGER)
        elif word == "]":
            close(WEAKER)
        elif weight is not None:
            close(_weight(weight, text))
        elif word.startswith("\\"):
            found.append((word[1:], 1.0))
        else:
            first, *rest = _BREAK.split(word)
            found.append((first, 1.0))
            for part in rest:
                found += [(None, 1.0), (part, 1.0)]
    return tuple(_merged(group) for group in _groups(found))


def _groups(found: list[tuple[str | None, float]]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    for part, weight in found:
        if part is None:
            yield group
            group = []
        elif part:
            group.append(Piece(part, weight))
    yield group


def _merged(group: list[Piece]) -> tuple[Piece, ...]:
    merged: list[Piece] = []
    for piece in group:
        if merged and merged[-1].weight == piece.weight:
            piece = Piece(merged.pop().text + piece.text, piece.weight)
        merged.append(piece)
    return tuple(merged)


def _check(prompt: str, negative: bool) -> None:
    """Brackets pair, and AND is where it can be."""
    opened: list[tuple[str, int]] = []
    joints = {match.start() for match in _AND.finditer(prompt)}
    escaped = False
    for place, character in enumerate(prompt):
        if place in joints and (opened or negative):
            where = (
                f"inside the {opened[-1][0]!r} at character {opened[-1][1] + 1}" if opened else "in a negative prompt"
            )
            raise ValueError(f"AND at character {place + 1} of the prompt is {where}; it can only join whole prompts")
        if escaped or character == "\\":
            escaped = not escaped
        elif character in "([":
            opened.append((character, place))
            if len(opened) > DEEPEST:
                raise ValueError(
                    f"the {character!r} at character {place + 1} is inside {DEEPEST} brackets; fewer, please"
                )
        elif character in PARTNER:
            last, where_opened = opened.pop() if opened else ("", 0)
            if last != PARTNER[character]:
                meets = f"meets the {last!r} at character {where_opened + 1}" if last else "closes nothing"
                raise ValueError(
                    f"unbalanced prompt: the {character!r} at character {place + 1} of {_shown(prompt)} {meets}; "
                    f"write \\{character} for the character itself"
                )
    if opened:
        last, place = opened[-1]
        raise ValueError(
            f"unbalanced prompt: the {last!r} at character {place + 1} of {_shown(prompt)} is never closed; "
            f"write \\{last} for the character itself"
        )


def _adapter(tag: re.Match[str]) -> AdapterTag:
    kind, (name, *weights) = tag[1], tag[2].split(":")
    if kind != "lora":
        raise ValueError(f"{tag[0]}: adapters of kind {kind!r} are not known here; known: <lora:name:weight>")
    if len(weights) > 1 or not name.strip():
        raise ValueError(f"{tag[0]}: write <lora:name> or <lora:name:weight>")
    return AdapterTag(name.strip(), _weight(weights[0], tag[0]) if weights else 1.0)


def _weight(number: str, where: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"{number!r} is no weight, in {_shown(where)}")
    return weight


def _branch(text: str) -> Branch:
    match = _BRANCH.fullmatch(text)
    assert match is not None  # its first part takes anything
    return Branch(float(match[2] or 1), _tree(match[1]))


def _tree(text: str) -> Tree:
    tokens = [token[0] for token in _SCHEDULE.finditer(text)]
    return _joined(_until(iter(tokens), "", "")[0])


def _until(tokens: Iterator[str], closer: str, separators: str) -> tuple[list[Tree], str]:
    """Up to the closer: the texts between the separators, and the separators; the brackets are known to pair."""
    parts: list[Tree] = [()]
    marks = ""
    for token in tokens:
        if token == closer:
            break
        if token == "[":
            parts[-1] += _square(*_until(tokens, "]", ":|"))
        elif token == "(":
            inside, _ = _until(tokens, ")", "")
            parts[-1] += ("(", *_joined(inside), ")")
        elif token in separators:
            parts.append(())
            marks += token
        else:
            parts[-1] += (token,)
    return [_compact(part) for part in parts], marks


def _square(parts: list[Tree], marks: str) -> Tree:
    """What `[..]` is: an edit, an alternation or, left as it is, a weaker text."""
    *texts, last = parts
    number = _NUMBER.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
    if marks in (":", "::") and number is not None:
        before, after = texts if len(texts) == 2 else ((), texts[0])
        return (Edit(before, after, float(number[1]), fraction="." in number[1]),)
    if "|" in marks and ":" in marks:
        raise ValueError("[..|..:..] in the prompt is unclear: write [[a|b]:c:0.5], [[a:b:0.5]|c], or \\: or \\|")
    if "|" in marks:
        return (Alternation(tuple(parts)),)
    return ("[", *_joined(parts, ":"), "]")


def _joined(parts: list[Tree], mark: str = "") -> Tree:
    joined: list[str | Edit | Alternation] = [*parts[0]]
    for part in parts[1:]:
        joined += [mark, *part]
    return _compact(tuple(joined))


def _compact(tree: Tree) -> Tree:
    """The same with neighbouring strings joined."""
    compact: list[str | Edit | Alternation] = []
    for node in tree:
        if isinstance(node, str) and compact and isinstance(last := compact[-1], str):
            compact[-1] = last + node
        else:
            compact.append(node)
    return tuple(compact)


def _resolved(tree: Tree, step: int, steps: int) -> str:
    return "".join(node if isinstance(node, str) else _resolved(_now(node, step, steps), step, steps) for node in tree)


def _now(node: Edit | Alternation, step: int, steps: int) -> Tree:
    if isinstance(node, Alternation):
        return node.options[step % len(node.options)]
    return node.before if step < int(node.when * steps if node.fraction else node.when) else node.after


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
