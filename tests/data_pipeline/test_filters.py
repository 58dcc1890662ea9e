"""Each filter at its threshold, its measure against a closed form."""

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image

from data_pipeline.filters import SCRIPTS, FilterConfig, check, entropy, script_share, sharpness
from data_pipeline.sources import Rejected, Sample

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 45, 3), dtype=np.uint8))


def sample(captions: tuple[str, ...] = ("a red cat", "кот"), scores: dict | None = None) -> Sample:
    return Sample("k", PICTURE, captions, {} if scores is None else {"scores": scores})


def outcome(given: Sample, config: FilterConfig, similarity: object = None) -> str:
    try:
        check(given, config, similarity)
        return "passes"
    except Rejected as rejected:
        return str(rejected)


@pytest.mark.parametrize(
    ("name", "passes", "fails", "said"),
    [
        ("min_side_px", 30, 31, "30, at least 31"),
        ("max_side_px", 45, 44, "45, at most 44"),
        ("max_aspect", 1.5, 1.49, "1.5, at most 1.49"),
        ("min_caption_characters", 3, 4, "3, at least 4"),
        ("max_caption_characters", 9, 8, "9, at most 8"),
        ("min_caption_words", 1, 2, "1, at least 2"),
        ("max_caption_words", 3, 2, "3, at most 2"),
        ("scripts", ("LATIN", "CYRILLIC"), ("LATIN",), "0 of the letters, at least 0.9"),
        ("deny", (r"\bdog\b", "^red"), ("dog", "RED [a-c]+"), "'red ca' matches 'RED [a-c]+'"),
        ("min_entropy", 7.4, 8, "at least 8"),
        ("min_sharpness", 1, 1e6, "at least 1e+06"),
    ],
)
def test_thresholds(name: str, passes: object, fails: object, said: str) -> None:
    assert outcome(sample(), FilterConfig(**{name: passes})) == "passes"
    reason = outcome(sample(), FilterConfig(**{name: fails}))
    assert reason.startswith(f"{name}: ") and said in reason


def test_all_are_off_by_default() -> None:
    assert outcome(sample(("x" * 9999,)), FilterConfig()) == "passes"
    on = {f.name for f in dataclasses.fields(FilterConfig) if getattr(FilterConfig(), f.name) not in (None, (), {})}
    assert on == {"min_script_share", "missing_score"}


def test_scores() -> None:
    config = FilterConfig(min_scores={"aesthetic": 5}, max_scores={"unsafe": 0.1})
    good = {"aesthetic": 5, "unsafe": 0.1}
    assert outcome(sample(scores=good), config) == "passes"
    assert outcome(sample(scores=good | {"aesthetic": 4.99}), config) == "min_scores.aesthetic: 4.99, at least 5"
    assert outcome(sample(scores=good | {"unsafe": 0.5}), config) == "max_scores.unsafe: 0.5, at most 0.1"
    keep = dataclasses.replace(config, missing_score="keep")
    for value in (None, math.nan, "5"):
        for scores in (good | {"unsafe": value}, {"aesthetic": 9}):
            assert outcome(sample(scores=scores), config) == "missing score: unsafe"
            assert outcome(sample(scores=scores), keep) == "passes"
    assert outcome(sample(), config) == "missing score: aesthetic"


def test_similarity() -> None:
    config = FilterConfig(min_similarity=0.3)
    asked = []

    def model(image: Image.Image, captions: tuple[str, ...]) -> float:
        asked.append((image, captions))
        return 0.25

    assert outcome(sample(scores={"similarity": 0.9}), config, model) == "min_similarity: 0.25, at least 0.3"
    assert asked == [(PICTURE, sample().captions)]
    assert outcome(sample(scores={"similarity": 0.3}), config) == "passes"
    assert outcome(sample(scores={"similarity": 0.2}), config) == "min_similarity: 0.2, at least 0.3"
    assert outcome(sample(), config) == "missing score: similarity"
    assert outcome(sample(), config, lambda *_: math.nan).startswith("min_similarity: nan")
    assert outcome(sample(), FilterConfig(), model) == "passes" and len(asked) == 1


def gray(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")


def test_entropy() -> None:
    assert entropy(Image.new("RGB", (9, 9), "teal")) == 0
    assert entropy(gray(np.array([[0, 255]]))) == 1
    assert entropy(gray(np.arange(256.0)[None])) == 8
    assert entropy(gray(np.array([[0, 0, 0, 9]]))) == pytest.approx(2 - 0.75 * math.log2(3))


def test_sharpness() -> None:
    """4-neighbour Laplacian: of a ramp 0; of a checkerboard +-4 x 255; of A cos(w x) it is 2 (cos w - 1) times it."""
    x = np.arange(256.0)
    assert sharpness(gray(np.broadcast_to(x, (256, 256)))) == 0
    assert sharpness(gray(np.indices((256, 256)).sum(0) % 2 * 255.0)) == pytest.approx((4 * 255) ** 2, rel=1e-3)
    w = 2 * np.pi * 16 / 256
    wave = np.broadcast_to(127 + 100 * np.cos(w * x), (256, 256))
    exact = 100**2 / 2 * (2 - 2 * np.cos(w)) ** 2
    assert sharpness(gray(wave)) == pytest.approx(exact, rel=0.05)  # 8-bit rounding adds 20 / 12 = 1.7
    assert sharpness(Image.new("RGB", (5000, 2))) == 0


def test_sharpness_does_not_depend_on_size() -> None:
    scene = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found = [sharpness(Image.fromarray(scene).resize((n, n), Image.Resampling.BICUBIC)) for n in (512, 1024, 2048)]
    assert max(found) < 1.1 * min(found)
    blurred = Image.fromarray(scene).resize((16, 16)).resize((512, 512), Image.Resampling.BICUBIC)
    assert sharpness(blurred) < found[0] / 10


@pytest.mark.parametrize(
    ("text", "scripts", "share"),
    [
        ("a red cat, 2 of 3!", ("LATIN",), 1),
        ("123 !? 😀", ("LATIN",), 1),
        ("cat кот", ("LATIN",), 0.5),
        ("ｆｕｌｌ ﬁ 𝐁", ("LATIN",), 1),
        ("猫とネコー", ("CJK", "HIRAGANA"), 0.5),
        ("猫とネコー", ("CJK", "HIRAGANA", "KATAKANA"), 1),
        ("고양이", ("HANGUL",), 1),
        ("bu\u0308cher", ("LATIN",), 1),
    ],
)
def test_scripts(text: str, scripts: tuple[str, ...], share: float) -> None:
    assert script_share(text, scripts) == share


def test_every_script_has_letters() -> None:
    import unicodedata

    names = {unicodedata.name(chr(c), "").partition(" ")[0] for c in range(0x41, 0x3100) if chr(c).isalpha()}
    assert set(SCRIPTS) - names == {"CJK", "HANGUL"} - names
    assert unicodedata.name("猫").startswith("CJK") and unicodedata.name("고").startswith("HANGUL")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"min_entropy": math.nan}, "min_entropy=nan"),
        ({"min_scores": {"a": math.inf}}, "min_scores.a=inf"),
        ({"min_side_px": 9, "max_side_px": 8}, "min_side_px=9 is above max_side_px=8"),
        ({"scripts": ("Latin",)}, "scripts: Latin: allowed are ARABIC"),
        ({"min_script_share": 2}, "min_script_share=2"),
        ({"missing_score": "drop"}, "missing_score='drop': allowed are reject, keep"),
        ({"deny": ("a(",)}, "is not a regular expression"),
        ({"deny": ("",)}, "a pattern has 1 to 200"),
        ({"deny": ("(a|a)*b",)}, "repeats a group"),
        ({"deny": ("x",) * 101}, "101 patterns, at most 100"),
    ],
)
def test_bad_settings(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FilterConfig(**settings)
