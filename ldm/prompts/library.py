"""Prompts that people keep: files of prompts, wildcards that chance fills in, and styles."""

import csv
import hashlib
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ldm.names import known

DEEPEST = 20
"""Wildcards and variants that may be inside one another."""

_OPTION = re.compile(r"(?:^|\s)--(?=[A-Za-z])")
_UNEQUAL = re.compile(r"\s*[\d.]+::|\s*[\d-]+\$\$")
_CHANCE = re.compile(r"\\.|__(?!_)(?:[\w/-]*?[^\W_])__|[{}|]|[^\\_{}|]+|.", re.DOTALL)


@dataclass(frozen=True)
class Line:
    """One line of a prompt file; None where it says nothing. Names are AUTOMATIC1111's."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    sampler_name: str | None = None


@dataclass(frozen=True)
class Style:
    """What a style adds to a prompt and to a negative one: in the place of `{prompt}` in it, or after it."""

    prompt: str = ""
    negative_prompt: str = ""


Wildcards = Mapping[str, Sequence[str]]
"""By name, what `__name__` can be."""


def read_prompts(path: str | Path) -> list[Line]:
    """A prompt a line, as it is; lines that are empty or begin with # are left out.

    A line may go on with options, `--negative_prompt "a, b" --seed 3 --steps 20 --cfg_scale 7 --width 512 --height 512
    --sampler_name "Euler a"`, or begin with `--prompt "..."`. Raises ValueError naming file and line for an option
    that is unknown or has no value that fits, and for a file without prompts.
    """
    lines = _lines(Path(path))
    if not lines:
        raise ValueError(f"{path} holds no prompts")
    found = []
    for number, line in lines:
        try:
            found.append(_line(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return found


def read_wildcards(folder: str | Path) -> dict[str, tuple[str, ...]]:
    """Every NAME.txt in a folder and below, an option a line; `__colours/warm__` is colours/warm.txt.

    Lines that are empty or begin with # are left out. Raises ValueError for no folder and for a file without options.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; wildcards are a folder of .txt files, an option a line")
    found = {}
    for file in sorted(folder.rglob("*.txt")):
        options = tuple(line for _, line in _lines(file))
        if not options:
            raise ValueError(f"{file} holds no options for a wildcard")
        found[file.relative_to(folder).with_suffix("").as_posix()] = options
    return found


def expand(prompt: str, seed: int, wildcards: Wildcards) -> str:
    """Put one option in the place of each `__name__` and of each `{a|b|c}`, also of those in what was chosen.

    The choice depends on the prompt, the seed and the wildcards alone, and all options are equally likely; `\\{`,
    `\\|`, `\\}` are no variants, nor is `{a}`. Raises ValueError for a wildcard that is not known, with the nearest
    name, for wildcards that contain themselves, for a brace without its partner, and for `{0.5::a|b}` and `{2$$a|b}`.
    """
    return _expanded(prompt, _draws(seed), wildcards, 0)


def read_styles(path: str | Path) -> dict[str, Style]:
    """AUTOMATIC1111's styles.csv: name, prompt, negative_prompt. Raises ValueError for a file that is not that."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a table of styles: {error}") from error
    if not rows or not {"name", "prompt"} <= rows[0].keys():
        raise ValueError(f"{path} holds no styles: it needs the columns name, prompt and negative_prompt, and a row")
    return {row["name"]: Style(row["prompt"] or "", row.get("negative_prompt") or "") for row in rows if row["name"]}


def styled(prompt: str, negative: str, names: Iterable[str], styles: Mapping[str, Style]) -> tuple[str, str]:
    """The prompt and the negative one in these styles, one after the other. Raises ValueError for an unknown name."""
    for name in names:
        style = styles[known("style", name, styles)]
        prompt, negative = _merged(prompt, style.prompt), _merged(negative, style.negative_prompt)
    return prompt, negative


def _lines(path: Path) -> list[tuple[int, str]]:
    """Numbers from 1 and texts of the lines that say something."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a text file: {error}") from error
    stripped = ((number, line.strip()) for number, line in enumerate(lines, start=1))
    return [(number, line) for number, line in stripped if line and not line.startswith("#")]


def _line(line: str) -> Line:
    options = _OPTION.search(line)
    if options is None:
        return Line(line)
    said: dict[str, Any] = {}
    prompt = line[: options.start()].strip()
    if prompt:
        said["prompt"] = prompt
    try:
        words = shlex.split(line[options.start() :])
    except ValueError as error:
        raise ValueError(f"its options cannot be read: {error}; put a value with ' in it between \"") from error
    starts = [i for i, word in enumerate(words) if word.startswith("--")] + [len(words)]
    for start, end in pairwise(starts):
        name = known("option", words[start][2:], Line.__dataclass_fields__)
        if name in said:
            raise ValueError(f"it says twice what its {name} is")
        said[name] = _value(name, words[start + 1 : end])
    return Line(**{"prompt": "", **said})


def _value(name: str, words: list[str]) -> str | int | float:
    value = " ".join(words)
    if name in ("prompt", "negative_prompt", "sampler_name"):
        if words:
            return value
        raise ValueError(f"--{name} needs a value")
    try:
        number = float(value) if name == "cfg_scale" else int(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"--{name} needs {'a' if name == 'cfg_scale' else 'a whole'} number, not {value!r}")
    return number


def _draws(seed: int) -> Iterator[int]:
    """Numbers that look random, the same ones on every machine and by every version of Python."""
    number = 0
    while True:
        yield int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest())
        number += 1


def _expanded(text: str, draws: Iterator[int], wildcards: Wildcards, depth: int) -> str:
    if depth > DEEPEST:
        raise ValueError(f"wildcards and variants are more than {DEEPEST} deep; does one contain itself? {text[:60]!r}")
    options, out = [""], []
    level = 0
    for match in _CHANCE.finditer(text):
        token = match[0]
        if token == "}" and level == 0:
            raise ValueError(f"the '}}' at character {match.start() + 1} of {text[:60]!r} closes nothing")
        level += (token == "{") - (token == "}")
        if level == 0 and token == "}":
            out.append(_variant(options, draws, wildcards, depth))
            options = [""]
        elif level == 1 and token == "{":
            continue
        elif level == 1 and token == "|":
            options.append("")
        elif level:
            options[-1] += token
        elif len(token) > 4 and token.startswith("__"):
            chosen = wildcards[known("wildcard", token[2:-2], wildcards)]
            out.append(_expanded(chosen[next(draws) % len(chosen)], draws, wildcards, depth + 1))
        else:
            out.append(token)
    if level:
        raise ValueError(f"a '{{' of {text[:60]!r} is never closed")
    return "".join(out)


def _variant(options: list[str], draws: Iterator[int], wildcards: Wildcards, depth: int) -> str:
    if len(options) == 1:
        return "{" + _expanded(options[0], draws, wildcards, depth + 1) + "}"
    for option in options:
        if _UNEQUAL.match(option):
            raise ValueError(f"of {{a|b}} one is taken, all equally likely; {option!r} asks for something else")
    return _expanded(options[next(draws) % len(options)], draws, wildcards, depth + 1)


def _merged(prompt: str, style: str) -> str:
    if "{prompt}" in style:
        return style.replace("{prompt}", prompt)
    return ", ".join(part for part in (prompt.strip(), style.strip()) if part)
