"""Captions: decoded and cleaned, or rejected with a reason."""

import numpy as np
import pytest

from data_pipeline.captions import choose_caption, clean_caption, clean_captions, decode_caption
from data_pipeline.sources import Rejected


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [
        ("  a \t cat\r\n on\u00a0a\u3000mat ", "a cat on a mat"),
        ("cafe\u0301", "café"),
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


def test_choice() -> None:
    captions = ("a", "b", "c")
    rng = np.random.default_rng(0)
    assert {choose_caption(captions, "first", rng) for _ in range(9)} == {"a"}
    drawn = [choose_caption(captions, "random", rng) for _ in range(300)]
    assert all(70 < drawn.count(c) < 130 for c in captions)
    with pytest.raises(ValueError, match="caption='all': allowed are first, random"):
        choose_caption(captions, "all", rng)
