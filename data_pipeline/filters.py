"""Which samples are worth training on: small measures with thresholds, all off until they are set."""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields

import numpy as np
from PIL import Image

from data_pipeline.sources import Rejected, Sample

GRAY_SIDE_PX = 256
SIMILARITY = "similarity"  # the score column that stands in for a model
SCRIPTS = (
    *("ARABIC", "ARMENIAN", "BENGALI", "CJK", "CYRILLIC", "DEVANAGARI", "ETHIOPIC", "GEORGIAN", "GREEK", "GUJARATI"),
    *("GURMUKHI", "HANGUL", "HEBREW", "HIRAGANA", "KANNADA", "KATAKANA", "KHMER", "LAO", "LATIN", "MALAYALAM"),
    *("MONGOLIAN", "MYANMAR", "ORIYA", "SINHALA", "TAMIL", "TELUGU", "THAI", "TIBETAN"),
)
_MAX_PATTERNS, _MAX_PATTERN_CHARACTERS = 100, 200
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{]")

# Cosine similarity of a picture and the best of its captions, -1 to 1, e.g. by a CLIP model. Deterministic.
Similarity = Callable[[Image.Image, tuple[str, ...]], float]


@dataclass(frozen=True)
class FilterConfig:
    """What a sample must have; None and empty mean off. Captions: every one of a sample must pass.

    min_side_px, max_side_px: the shorter, the longer side. max_aspect: longer / shorter side.
    min_sharpness: variance of the Laplacian, see `sharpness`. min_entropy: bits, see `entropy` (0 is one flat colour).
    scripts: of SCRIPTS; the share of a caption's letters in them is at least min_script_share. Not a language
    detector: LATIN passes English and Turkish alike.
    deny: regular expressions (case does not matter) none of which may be found in a caption.
    min_scores, max_scores: column of meta["scores"] -> threshold; missing_score: "reject" or "keep" samples without.
    min_similarity: picture to caption, by the model given to `check`, else by the score column "similarity".
    """

    min_side_px: int | None = None
    max_side_px: int | None = None
    max_aspect: float | None = None
    min_caption_characters: int | None = None
    max_caption_characters: int | None = None
    min_caption_words: int | None = None
    max_caption_words: int | None = None
    scripts: tuple[str, ...] = ()
    min_script_share: float = 0.9
    deny: tuple[str, ...] = ()
    min_scores: dict[str, float] = field(default_factory=dict)
    max_scores: dict[str, float] = field(default_factory=dict)
    missing_score: str = "reject"
    min_entropy: float | None = None
    min_sharpness: float | None = None
    min_similarity: float | None = None

    def __post_init__(self) -> None:
        numbers = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("min_scores", "max_scores"):
            numbers |= {f"{name}.{column}": value for column, value in numbers[name].items()}
        for name, value in numbers.items():
            if isinstance(value, int | float) and not math.isfinite(value):
                raise ValueError(f"{name}={value}: a threshold is a finite number")
        for measure in ("side_px", "caption_characters", "caption_words"):
            low, high = getattr(self, f"min_{measure}"), getattr(self, f"max_{measure}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{measure}={low} is above max_{measure}={high}: nothing would pass")
        if unknown := sorted(set(self.scripts) - set(SCRIPTS)):
            raise ValueError(f"scripts: {', '.join(unknown)}: allowed are {', '.join(SCRIPTS)}")
        if not 0 <= self.min_script_share <= 1:
            raise ValueError(f"min_script_share={self.min_script_share}: allowed are 0 to 1")
        if self.missing_score not in ("reject", "keep"):
            raise ValueError(f"missing_score={self.missing_score!r}: allowed are reject, keep")
        _check_patterns(self.deny)


def _check_patterns(patterns: tuple[str, ...]) -> None:
    if len(patterns) > _MAX_PATTERNS:
        raise ValueError(f"deny: {len(patterns)} patterns, at most {_MAX_PATTERNS}; join some with |")
    for pattern in patterns:
        if not 0 < len(pattern) <= _MAX_PATTERN_CHARACTERS:
            raise ValueError(f"deny: {pattern[:40]!r}: a pattern has 1 to {_MAX_PATTERN_CHARACTERS} characters")
        if _REPEATED_GROUP.search(pattern):
            raise ValueError(
                f"deny: {pattern!r} repeats a group, which can take exponential time; repeat characters only"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"deny: {pattern!r} is not a regular expression: {error}") from error


def check(sample: Sample, config: FilterConfig, similarity: Similarity | None = None) -> None:
    """Raise Rejected with the filter's name (a field of `config`) as reason; the detail has value and threshold.

    Cheap filters come first. Without `similarity`, min_similarity uses the provided score.
    """
    for name, value in _lengths(sample).items():
        _compare(name, value, getattr(config, name))
    if config.scripts:
        share = min(script_share(caption, config.scripts) for caption in sample.captions)
        if share < config.min_script_share:
            raise Rejected("scripts", f"{share:.3g} of the letters, at least {config.min_script_share:g}")
    for pattern in config.deny:
        for caption in sample.captions:
            if found := re.search(pattern, caption, re.IGNORECASE):
                raise Rejected("deny", f"{found[0][:80]!r} matches {pattern!r}")
    for kind, thresholds in (("min_scores", config.min_scores), ("max_scores", config.max_scores)):
        for column, threshold in thresholds.items():
            _compare_score(f"{kind}.{column}", column, threshold, sample, config)
    if config.min_entropy is not None:
        _compare("min_entropy", entropy(sample.image), config.min_entropy)
    if config.min_sharpness is not None:
        _compare("min_sharpness", sharpness(sample.image), config.min_sharpness)
    if config.min_similarity is not None:
        if similarity is None:
            _compare_score("min_similarity", SIMILARITY, config.min_similarity, sample, config)
        else:
            _compare("min_similarity", similarity(sample.image, sample.captions), config.min_similarity)


def _lengths(sample: Sample) -> dict[str, float]:
    """Field of FilterConfig -> what it bounds, for all that costs nothing to measure."""
    sides = sample.image.size
    characters = [len(caption) for caption in sample.captions]
    words = [len(caption.split()) for caption in sample.captions]
    return {
        "min_side_px": min(sides),
        "max_side_px": max(sides),
        "max_aspect": max(sides) / min(sides),
        "min_caption_characters": min(characters),
        "max_caption_characters": max(characters),
        "min_caption_words": min(words),
        "max_caption_words": max(words),
    }


def _compare(name: str, value: float, threshold: float | None) -> None:
    """A name that begins with min_ wants at least, max_ at most, the threshold. A value that is no number fails."""
    if threshold is None:
        return
    if name.startswith("min_") and not value >= threshold:
        raise Rejected(name, f"{value:.6g}, at least {threshold:g}")
    if name.startswith("max_") and not value <= threshold:
        raise Rejected(name, f"{value:.6g}, at most {threshold:g}")


def _compare_score(name: str, column: str, threshold: float, sample: Sample, config: FilterConfig) -> None:
    value = sample.meta.get("scores", {}).get(column)
    if isinstance(value, int | float) and math.isfinite(value):
        _compare(name, value, threshold)
    elif config.missing_score == "reject":
        raise Rejected("missing score", column)


def entropy(image: Image.Image) -> float:
    """-sum p log2 p over the 256 gray levels (Rec. 601) of the picture: 0 bits for one flat colour, 8 at most."""
    counts = np.array(image.convert("L").histogram(), dtype=np.float64)
    shares = counts[counts > 0] / counts.sum()
    return float(np.sum(shares * np.log2(1 / shares)))


def sharpness(image: Image.Image) -> float:
    """Variance of the 4-neighbour Laplacian of the gray picture, 0..255, its longer side brought to 256 pixels.

    The fixed size makes it a property of the scene as seen at that size: a larger copy of a picture has the same, a
    small picture that would have to be blown up is blurred. Measure: Pech-Pacheco et al. 2000. 0 without an inside.
    """
    scale = GRAY_SIDE_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    gray = np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS)).astype(np.float64)
    if min(gray.shape) < 3:
        return 0.0
    inside = gray[1:-1, 1:-1]
    laplacian = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:] - 4 * inside
    return float(laplacian.var())


def script_share(caption: str, scripts: Iterable[str]) -> float:
    """The share of the caption's letters that belong to `scripts`; 1 without letters.

    A letter's script is the first word of its Unicode name, after compatibility forms (full width, ligatures,
    mathematical letters) became plain ones. Marks and modifier letters are not counted.
    """
    letters = [c for c in unicodedata.normalize("NFKC", caption) if unicodedata.category(c) in ("Lu", "Ll", "Lt", "Lo")]
    allowed = set(scripts)
    inside = sum(unicodedata.name(c, "").partition(" ")[0] in allowed for c in letters)
    return inside / len(letters) if letters else 1.0
