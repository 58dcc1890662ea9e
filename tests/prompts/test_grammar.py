"""The grammar of prompts against published examples and against evaluators that share no code with it."""

import random
import re

import pytest

from ldm.prompts.grammar import STRONGER, WEAKER, AdapterTag, Branch, Piece, parse, pieces


def pairs(text: str) -> list[list[tuple[str, float]]]:
    return [[(p.text, p.weight) for p in group] for group in pieces(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain words", [("plain words", 1)]),
        ("", []),
        ("one (strong) word", [("one ", 1), ("strong", 1.1), (" word", 1)]),
        (r"\(kept\] \\ \[", [(r"(kept] \ [", 1)]),
        ("(two)(neighbours)", [("twoneighbours", 1.1)]),
        ("[less]", [("less", 1 / 1.1)]),
        ("(x:1.3)(y: .5 )(z:+2)(w:-1)", [("x", 1.3), ("y", 0.5), ("z", 2.0), ("w", -1.0)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("12:30, f/2.8", [("12:30, f/2.8", 1)]),
        ("()[]", []),
        (r"a\b", [("ab", 1)]),  # a backslash before anything else says nothing
        # the example that everybody quotes, with the bracket that it lacks
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky)))).",
            [
                ("a ", 1.0),
                ("house", 1.5730000000000004),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641000000000006),
                (".", 1.0),
            ],
        ),
    ],
)
def test_attention(text: str, expected: list[tuple[str, float]]) -> None:
    assert pairs(text) == [expected]


def test_breaks() -> None:
    assert pairs("a BREAK b") == [[("a", 1)], [("b", 1)]]
    assert pairs("BREAK") == [[], []] and pairs("a\nBREAK\n") == [[("a", 1)], []]
    assert pairs("(a BREAK b:1.2) BREAKING") == [[("a", 1.2)], [("b", 1.2), (" BREAKING", 1)]]


def test_random_weights_against_a_tree() -> None:
    """Texts written from a tree of brackets; the weight of a leaf is the product of those above it."""
    rng = random.Random(0)

    def write(depth: int, weight: float) -> tuple[str, list[tuple[str, float]]]:
        text, leaves = "", []
        for _ in range(rng.randint(1, 3)):
            kind = rng.randint(0, 3) if depth else 0
            if kind == 0:
                character = rng.choice(["ab ", r"\(", r"\]", r"\\", ", "])
                text, leaves = text + character, [*leaves, (character.removeprefix("\\"), weight)]
                continue
            number = rng.choice([0.5, 1.25, 2.0])
            factor = (STRONGER, WEAKER, number)[kind - 1]
            inside, more = write(depth - 1, weight * factor)
            text += (f"({inside})", f"[{inside}]", f"({inside}:{number})")[kind - 1]
            leaves += more
        return text, leaves

    for _ in range(300):
        text, leaves = write(5, 1.0)
        (found,) = pieces(text)
        letters = [(c, p.weight) for p in found for c in p.text]
        expected = [(c, weight) for part, weight in leaves for c in part]
        assert [c for c, _ in letters] == [c for c, _ in expected]
        assert [w for _, w in letters] == pytest.approx([w for _, w in expected], rel=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("test", ["test"] * 10),
        ("a [b:3]", ["a "] * 3 + ["a b"] * 7),
        ("a [b: 3 ]", ["a "] * 3 + ["a b"] * 7),
        ("a [[[b]]:2]", ["a "] * 2 + ["a [[b]]"] * 8),
        ("[(a:2):3]", [""] * 3 + ["(a:2)"] * 7),
        ("a [b : c : 1] d", ["a b  d"] + ["a  c  d"] * 9),
        ("a[b:[c:d:2]:1]e", ["abe", "ace"] + ["ade"] * 8),
        ("a [b:.5] c", ["a  c"] * 5 + ["a b c"] * 5),
        ("[a::0.25]", ["a"] * 2 + [""] * 8),  # rounded down
        ("[a:b:1.0]", ["a"] * 10),
        ("[a:b:0]", ["b"] * 10),
        ("[a:b:99]", ["a"] * 10),
        ("[a|(b:1.1)]", ["a", "(b:1.1)"] * 5),
        ("[fe|]male", ["female", "male"] * 5),
        ("[fe|||]male", ["female", "male", "male", "male"] * 2 + ["female", "male"]),
        ("[[a|b]:c:4]", ["a", "b"] * 2 + ["c"] * 6),
        ("[a|[b:c:6]]", ["a", "b"] * 3 + ["a", "c"] * 2),
        ("([a:b:5]:1.2)", ["(a:1.2)"] * 5 + ["(b:1.2)"] * 5),
        ("[a] [a:b] [a:b:c:2]", ["[a] [a:b] [a:b:c:2]"] * 10),  # not of the form of an edit
        (r"[a\:1|b\|c]", [r"a\:1", r"b\|c"] * 5),
        ("a | b: c", ["a | b: c"] * 10),
    ],
)
def test_editing(text: str, expected: list[str]) -> None:
    (branch,) = parse(text).branches
    assert [branch.at(step, 10) for step in range(10)] == expected
    assert parse(text).texts(10) == tuple(dict.fromkeys(expected))


def test_random_edits_against_substitution() -> None:
    """The innermost `[..]` that holds no other is replaced by its text at a step, until there is none left."""
    rng = random.Random(1)

    def write(depth: int) -> str:
        text = ""
        for _ in range(rng.randint(1, 3)):
            kind = rng.randint(0, 4) if depth else 0
            a, b = (write(depth - 1), write(depth - 1)) if kind else ("", "")
            when = rng.choice(["0.3", "0.75", "2", "7", ".5"])
            text += (rng.choice("xyz "), f"[{a}:{b}:{when}]", f"[{a}:{when}]", f"[{a}|{b}|]", f"({a}:1.2)")[kind]
        return text

    def substituted(text: str, step: int, steps: int) -> str:
        def replace(match: re.Match[str]) -> str:
            inside = match[1].replace("(", "\0").replace(")", "\1")
            if "|" in inside:
                return inside.split("|")[step % (inside.count("|") + 1)]
            *parts, when = inside.split("\2")
            before, after = ["", *parts][-2:]
            first = int(float(when) * steps) if "." in when else int(when)
            return before if step < first else after

        text = re.sub(r":(?=1\.2\))", "\3", text).replace(":", "\2")  # which colons are an edit's
        while "[" in text:
            text = re.sub(r"\[([^\[\]]*)\]", replace, text)
        return text.replace("\0", "(").replace("\1", ")").replace("\3", ":")

    for _ in range(200):
        text, steps = write(4) + ".", rng.randint(1, 12)  # spaces at the end of a prompt are not kept
        (branch,) = parse(text).branches
        for step in range(steps):
            assert branch.at(step, steps) == substituted(text, step, steps)


def test_branches() -> None:
    assert parse("a cat").branches == (Branch(1.0, ("a cat",)),)
    found = parse("a cat :1.2 AND a dog AND a penguin:-.5 \n AND").branches
    assert [(b.weight, b.at(0, 1)) for b in found] == [(1.2, "a cat"), (1, " a dog"), (-0.5, " a penguin"), (1, "")]
    assert parse("a cat : 2 ").branches == (Branch(2.0, ("a cat",)),)  # also without AND
    assert parse("sANDy, (a:2)").branches == (Branch(1.0, ("sANDy, (a:2)",)),)
    assert parse("a:2", negative=True).branches == (Branch(1.0, ("a:2",)),)


def test_adapters() -> None:
    found = parse("a <lora:my style (v2):0.8>cat<lora:other> AND <lora:x:-1>b")
    assert found.adapters == (AdapterTag("my style (v2)", 0.8), AdapterTag("other", 1.0), AdapterTag("x", -1.0))
    assert found.texts(1) == ("a cat", " b")
    assert parse("i <3 <cat-toy>, a > b").adapters == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a (b", r"the '\(' at character 3 of 'a \(b' is never closed"),
        ("a b]", r"the '\]' at character 4 .* closes nothing"),
        ("(a [b) c]", r"the '\)' at character 6 .* meets the '\[' at character 4"),
        (r"\(a)", r"the '\)' at character 4 .* closes nothing; write \\\)"),
        ("<lora:x:1> (b", r"the '\(' at character 12"),
        ("(a AND b)", r"AND at character 4 of the prompt is inside the '\(' at character 1"),
        ("[a|b:0.5]", "unclear"),
        ("<hypernet:x:1>", "kind 'hypernet' are not known"),
        ("<lyco:x:1>", "kind 'lyco' are not known"),
        ("<lora:x:1:2>", "write <lora:name>"),
        ("<lora:x:much>", "'much' is no weight"),
        ("<lora:x:inf>", "'inf' is no weight"),
        ("(" * 5000 + ")" * 5000, "inside 100 brackets"),
    ],
)
def test_bad_prompts(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as told:
        parse(text)
    assert "\n" not in str(told.value) and len(str(told.value)) < 250


def test_bad_weights_and_negatives() -> None:
    with pytest.raises(ValueError, match=r"'1\.2\.3' is no weight, in '\(a:1\.2\.3\)'"):
        pieces("(a:1.2.3)")
    with pytest.raises(ValueError, match="AND at character 3 of the prompt is in a negative prompt"):
        parse("a AND b", negative=True)
    with pytest.raises(ValueError, match="cannot ask for adapters"):
        parse("a <lora:x:1>", negative=True)
    assert pieces("a") == ((Piece("a", 1.0),),)
