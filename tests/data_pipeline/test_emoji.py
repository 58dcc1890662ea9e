"""Emoji: needs Debian's fonts-noto-color-emoji and unicode-cldr-core, and fails without them."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.sources import Rejected, Sample
from data_pipeline.sources.emoji import TONES, EmojiConfig, EmojiSource, held_out, read_names

SAMPLES = {
    "👩🏽‍🚀": "woman astronaut: medium skin tone",
    "🇫🇷": "flag: France",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f": "flag: England",
    "👨‍👩‍👧": "family: man, woman, girl",
    "#⃣": "keycap: #",
    "😀": "grinning face",
    "❤": "red heart",
}


@pytest.fixture(scope="module")
def everything() -> EmojiSource:
    return EmojiSource(EmojiConfig(split="all"))


def find(source: EmojiSource, text: str) -> Sample:
    return source[[e.text for e in source.emoji].index(text)]


def test_names_and_pictures(everything: EmojiSource) -> None:
    pictures = set()
    for text, name in SAMPLES.items():
        sample = find(everything, text)
        assert sample.captions[0] == name
        assert sample.image.mode == "RGB" and sample.image.size == (136, 136)
        pixels = np.asarray(sample.image).astype(int)
        assert (pixels[0, 0] == 255).all() and 0.1 < (pixels.min(-1) < 250).mean() < 0.95
        pictures.add(sample.image.tobytes())
    assert len(pictures) == len(SAMPLES)


def test_pictures_show_the_colours_they_are_named_after(everything: EmojiSource) -> None:
    for text, colour in (("🔴", (230, 50, 50)), ("🟢", (100, 170, 50)), ("🔵", (60, 130, 230))):
        centre = np.asarray(find(everything, text).image)[68, 68].astype(int)
        assert np.argmax(centre) == np.argmax(colour)
    tones = [np.asarray(find(everything, chr(tone)).image)[68, 68].mean() for tone in TONES]
    assert tones == sorted(tones, reverse=True)


def test_captions_and_meta(everything: EmojiSource) -> None:
    sample = find(everything, "👩🏽‍🚀")
    assert sample.captions == (
        "woman astronaut: medium skin tone",
        "woman astronaut: medium skin tone, rocket",
        "astronaut, medium skin tone, rocket, woman",
    )
    assert sample.key == "1f469-1f3fd-200d-1f680"
    assert sample.meta["codepoints"] == ["U+1F469", "U+1F3FD", "U+200D", "U+1F680"]
    assert (sample.meta["tones"], sample.meta["kind"], sample.meta["base"]) == (["medium"], "toned", "👩‍🚀")
    pair = find(everything, "🧑🏻‍🤝‍🧑🏿")
    assert pair.meta["tones"] == ["light", "dark"]


def test_splits_part_the_whole(everything: EmojiSource) -> None:
    train, held = (EmojiSource(EmojiConfig(split=s)).emoji for s in ("train", "heldout"))
    assert set(train) | set(held) == set(everything.emoji) and not set(train) & set(held)
    toned = [e for e in everything.emoji if e.tones]
    assert all(e.tones for e in held) and 0.08 < len(held) / len(toned) < 0.12
    in_training = [e for e in train if e.tones]
    assert {e.base for e in held} <= {e.base for e in in_training}
    assert {e.base for e in in_training} == {e.base for e in toned}
    counts = Counter(t for e in in_training for t in e.tones)
    assert set(counts) == set(TONES.values()) and min(counts.values()) > 300
    assert set(Counter(t for e in held for t in e.tones)) == set(TONES.values())


def test_held_out_does_not_depend_on_the_order(everything: EmojiSource) -> None:
    assert held_out(everything.emoji) == held_out(everything.emoji[::-1])


@pytest.mark.slow
def test_all_are_drawn_or_rejected(everything: EmojiSource) -> None:
    kinds: Counter[str] = Counter()
    keys = set()
    for i in range(len(everything)):
        try:
            sample = everything[i]
            kinds[sample.meta["kind"]] += 1
            keys.add(sample.key)
        except Rejected as rejected:
            kinds[rejected.reason] += 1
            assert len(rejected.detail.split(" ")[0]) == 1  # single text symbols only, no real emoji
    assert sum(kinds.values()) == len(everything)
    assert len(keys) == len(everything) - kinds["not one glyph"] > 3500
    assert kinds["flag"] > 255 and kinds["toned"] > 1600 and kinds["plain"] > 1200 and kinds["keycap"] == 12
    assert kinds["not one glyph"] < 450


def test_other_languages_and_sizes() -> None:
    source = EmojiSource(EmojiConfig(language="de_CH", size=48))
    sample = find(source, "😀")
    assert sample.captions[0] == "grinsendes Gesicht" and sample.image.size == (48, 48)
    assert len(source) > 3500


def test_travels_to_other_processes(everything: EmojiSource) -> None:
    everything[0]
    copy = pickle.loads(pickle.dumps(everything))
    assert copy[5] == everything[5] and copy.fingerprint == everything.fingerprint


def test_says_how_to_get_what_is_missing(tmp_path: Path) -> None:
    hint = r"apt-get install fonts-noto-color-emoji unicode-cldr-core, or give font=PATH cldr=PATH"
    with pytest.raises(ValueError, match=rf"no emoji font at /nowhere; .*{hint}"):
        EmojiSource(EmojiConfig(font="/nowhere"))
    with pytest.raises(ValueError, match=rf"no CLDR annotations in /nowhere; .*{hint}"):
        EmojiSource(EmojiConfig(cldr="/nowhere"))
    (tmp_path / "font.ttf").write_text("not a font")
    with pytest.raises(ValueError, match=r"font\.ttf is not a font"):
        EmojiSource(EmojiConfig(font=str(tmp_path / "font.ttf")))[0]


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="split='test': allowed are train, heldout, all"):
        EmojiSource(EmojiConfig(split="test"))
    with pytest.raises(ValueError, match="size=0"):
        EmojiSource(EmojiConfig(size=0))
    with pytest.raises(ValueError, match=r"language='\.\./x': CLDR has af, am, "):
        read_names(Path(EmojiConfig.cldr), "../x")
