"""Captions: decoded and cleaned, or rejected with a reason."""

import numpy as np
import pytest

from data_pipeline.captions import (
    CaptionConfig,
    choose_caption,
    clean_caption,
    clean_captions,
    clean_weights,
    decode_caption,
)
from data_pipeline.sources import Rejected


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [
        ("  a \t cat\r\n on\u00a0a\u3000mat ", "a cat on a mat"),
        ("cafe\u0301", "café"),
        ("cafe\0\u0301", "café"),
        ("nul\0 and \x07bell", "nul and bell"),
        ("\ufeffmark", "mark"),
        ("half\ud800 pair", "half pair"),
        ("👩\u200d🚀 stays joined", "👩\u200d🚀 stays joined"),
        ("קוֹל", "קוֹל"),
        ("<b>html</b> stays", "<b>html</b> stays"),
        (" \0 \n", ""),
    ],
)
def test_cleaning(given: str, cleaned: str) -> None:
    assert clean_caption(given) == cleaned
    assert clean_caption(cleaned) == cleaned
    cleaned.encode("utf-8")


def test_several_captions() -> None:
    assert clean_captions(["b ", "", " a", "b"]) == ("b", "a")


@pytest.mark.parametrize(
    ("texts", "reason"),
    [([], "empty caption"), ([" ", "\n"], "empty caption"), (["x" * 10**6], "caption too long")],
)
def test_rejections(texts: list[str], reason: str) -> None:
    with pytest.raises(Rejected) as rejected:
        clean_captions(texts)
    assert rejected.value.reason == reason


def test_decoding() -> None:
    assert decode_caption("\ufeffné".encode()) == "né"
    for data in ("né".encode("latin-1"), "né".encode("utf-16"), b"\xed\xa0\x80", b"\xc0\x80"):
        with pytest.raises(Rejected, match="caption is not UTF-8"):
            decode_caption(data)


def draw(count: int, config: CaptionConfig, captions: tuple[str, ...], weights: list[float] | None = None) -> list[str]:
    return [choose_caption(captions, weights, config, np.random.default_rng(i)) for i in range(count)]


def test_choice() -> None:
    """Bounds of 5 standard deviations: a false alarm in a million for each count."""
    captions = ("bb", "ccc", "a", "ddd", "e")
    for choice, only in (("first", "bb"), ("longest", "ccc"), ("shortest", "a")):
        assert set(draw(9, CaptionConfig(choice), captions)) == {only}
    drawn = draw(2000, CaptionConfig("random"), captions)
    assert all(abs(drawn.count(c) - 400) < 90 for c in captions)
    assert drawn == draw(2000, CaptionConfig("weighted"), captions)  # no weights: all equal
    drawn = draw(2000, CaptionConfig("weighted"), captions, [6, 0, 3, 1, 0])
    expected = {"bb": 1200, "ccc": 0, "a": 600, "ddd": 200, "e": 0}
    assert all(abs(drawn.count(c) - n) <= 5 * (n * (1 - n / 2000)) ** 0.5 for c, n in expected.items())


def test_weights_follow_their_captions() -> None:
    texts = ["a", " ", "b", "a ", "c"]
    assert clean_captions(texts) == ("a", "b", "c")
    assert clean_weights(texts, [1, 5, 2, 3, 0]) == (4, 2, 0)
    for weights in ([1, 1], [1, 1, 1, 1, -1], [float("nan")] * 5, [0, 1, 0, 0, 0], [1e308] * 5):
        with pytest.raises(Rejected, match="bad caption weights"):
            clean_weights(texts, weights)


def test_dropout() -> None:
    """Binomial(2000, 0.1): 200 give or take 5 x 13.4."""
    drawn = draw(2000, CaptionConfig(dropout=0.1, templates=("a photo of {}",)), ("cat",))
    assert set(drawn) == {"", "a photo of cat"} and abs(drawn.count("") - 200) < 67
    assert set(draw(50, CaptionConfig(dropout=1), ("cat",))) == {""}


def test_tags_keep_their_head_and_lose_none() -> None:
    tags = [str(i) for i in range(8)]
    config = CaptionConfig(shuffle_tags=True, keep_tags=2)
    drawn = [text.split(", ") for text in draw(2000, config, (" 0,1 , 2,3,,4, 5,6,7,",))]
    assert all(d[:2] == ["0", "1"] and sorted(d) == tags for d in drawn)
    third = [d[2] for d in drawn]  # each of 6 tags stands third 333 times, give or take 5 x 16.7
    assert all(abs(third.count(tag) - 333) < 84 for tag in tags[2:])


def test_tag_dropout() -> None:
    config = CaptionConfig(tag_dropout=0.25, keep_tags=1, separator=" | ")
    drawn = [text.split("| ") for text in draw(2000, config, ("x | a | b | c",))]
    drawn = [[tag.strip() for tag in tags] for tags in drawn]
    assert all(d[0] == "x" and d == sorted(d, key="xabc".index) for d in drawn)
    assert all(abs(sum(tag in d for d in drawn) - 1500) < 97 for tag in "abc")  # 5 x 19.4
    assert set(draw(9, CaptionConfig(tag_dropout=1, templates=("a {}",)), ("a, b",))) == {""}


def test_templates() -> None:
    config = CaptionConfig(templates=("a photo of {}", "{}!"))
    drawn = draw(400, config, ("a {} of 5",))
    assert set(drawn) == {"a photo of a {} of 5", "a {} of 5!"}
    assert abs(drawn.count("a {} of 5!") - 200) < 50


def test_what_is_off_draws_nothing() -> None:
    rng = np.random.default_rng(3)
    choose_caption(("a, b", "c"), [1, 2], CaptionConfig("longest", keep_tags=3, templates=("{}",)), rng)
    assert rng.random() == np.random.default_rng(3).random()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"choice": "all"}, "caption='all': allowed are first, random"),
        ({"dropout": 1.5}, "dropout=1.5: allowed are chances"),
        ({"tag_dropout": float("nan")}, "tag_dropout=nan"),
        ({"keep_tags": -1}, "keep_tags=-1"),
        ({"separator": " "}, "separator=' '"),
        ({"templates": ("a photo",)}, "template 'a photo': needs {} once"),
    ],
)
def test_bad_settings(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CaptionConfig(**settings)
