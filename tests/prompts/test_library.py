"""Files of prompts, wildcards and styles."""

from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from ldm.prompts.library import Line, Style, expand, read_prompts, read_styles, read_wildcards, styled


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_prompt_files(tmp_path: Path) -> None:
    lines = [
        "# a comment",
        'a cat\'s well--known "eye", (x:1.2)',
        "",
        "a dog --negative_prompt 'bad, ugly' cat --seed 3 --steps 20 --cfg_scale 7.5",
        '  --prompt "two words" more --width 512 --height 768 --sampler_name "Euler a" ',
    ]
    assert read_prompts(written(tmp_path / "a.txt", "\ufeff" + "\n".join(lines))) == [
        Line('a cat\'s well--known "eye", (x:1.2)'),
        Line("a dog", negative_prompt="bad, ugly cat", seed=3, steps=20, cfg_scale=7.5),
        Line("two words more", width=512, height=768, sampler_name="Euler a"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --step 3", "line 2: unknown option 'step', did you mean 'steps'"),
        ("a --steps many", "line 2: --steps needs a whole number, not 'many'"),
        ("a --steps", "--steps needs a whole number, not ''"),
        ("a --cfg_scale nan", "--cfg_scale needs a number, not 'nan'"),
        ("a --seed 1 2", "--seed needs a whole number, not '1 2'"),
        ("a --negative_prompt", "--negative_prompt needs a value"),
        ("a --negative_prompt it's", "cannot be read: No closing quotation"),
        ("a --seed 1 --seed 2", "it says twice what its seed is"),
        ("a --prompt b", "it says twice what its prompt is"),
    ],
)
def test_bad_prompt_files(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as told:
        read_prompts(written(tmp_path / "a.txt", f"fine\n{line}\n"))
    assert "a.txt" in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(written(tmp_path / "b.txt", "# nothing\n"))
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "missing.txt")


WILDCARDS = {"colour": ["red", "light __shade__"], "shade": ["blue", "{grey|dark grey}"], "sub/x-1": ["[a|b]"]}


def test_wildcards() -> None:
    assert expand("plain {x}, [a|b], a_b __ c \\{a|b\\}", 0, {}) == "plain {x}, [a|b], a_b __ c \\{a|b\\}"
    assert expand("__sub/x-1__, {__sub/x-1__}", 0, WILDCARDS) == "[a|b], {[a|b]}"
    text = "a __colour__ {circle|{big|small} square|}, __colour__"
    colours = ["red", "light blue", "light grey", "light dark grey"]
    shapes = ["circle", "big square", "small square", ""]
    possible = {f"a {a} {b}, {c}" for a, b, c in product(colours, shapes, colours)}
    found = [expand(text, seed, WILDCARDS) for seed in range(2000)]
    assert set(found) == possible
    # frozen: what a seed has drawn, every later version must draw again
    assert found[:3] == [
        "a light blue small square, light blue",
        "a red small square, red",
        "a light blue big square, light dark grey",
    ]


def test_options_are_equally_likely_and_draws_independent() -> None:
    """False alarm rate below 1e-6: a count of 9,000 draws at 1/9 is within 5.1 standard deviations (30) of 1,000."""
    counts = Counter(expand("{a|b|c} {a|b|c}", seed, {}) for seed in range(9000))
    assert len(counts) == 9 and max(abs(n - 1000) for n in counts.values()) < 5.1 * 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__color__", "unknown wildcard 'color', did you mean 'colour'"),
        ("a {b|c", "'{' of 'a {b|c' is never closed"),
        ("a b}", "the '}' at character 4"),
        ("{0.5::a|b}", "all equally likely; '0.5::a'"),
        ("{2$$a|b}", "all equally likely"),
        ("__loop__", "more than 20 deep"),
    ],
)
def test_bad_wildcards(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("$", r"\$").replace("{", r"\{").replace("|", r"\|")) as told:
        expand(text, 0, {**WILDCARDS, "loop": ["x __loop__"]})
    assert "\n" not in str(told.value)


def test_wildcard_folders(tmp_path: Path) -> None:
    written(tmp_path / "w/colour.txt", "red\n# no\n\n blue \n")
    written(tmp_path / "w/deep/er.txt", "__colour__")
    assert read_wildcards(tmp_path / "w") == {"colour": ("red", "blue"), "deep/er": ("__colour__",)}
    written(tmp_path / "w/empty.txt", "#")
    with pytest.raises(ValueError, match=r"empty\.txt holds no options"):
        read_wildcards(tmp_path / "w")
    with pytest.raises(ValueError, match="is no folder"):
        read_wildcards(tmp_path / "none")


def test_styles(tmp_path: Path) -> None:
    table = 'name,prompt,negative_prompt\nfilm,"a film still of {prompt}, grain",ugly\nink,"ink, thin",\n,,\n'
    styles = read_styles(written(tmp_path / "styles.csv", "\ufeff" + table))
    assert styles == {"film": Style("a film still of {prompt}, grain", "ugly"), "ink": Style("ink, thin", "")}
    assert styled("a cat", "", ["film", "ink"], styles) == ("a film still of a cat, grain, ink, thin", "ugly")
    assert styled("", "bad", ["ink", "film"], styles) == ("a film still of ink, thin, grain", "bad, ugly")
    with pytest.raises(ValueError, match="unknown style 'fil', did you mean 'film'"):
        styled("a", "", ["fil"], styles)
    with pytest.raises(ValueError, match="needs the columns"):
        read_styles(written(tmp_path / "bad.csv", "a,b\n1,2\n"))
