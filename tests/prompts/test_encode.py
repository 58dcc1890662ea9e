"""Weighted and chunked encoding against the scheme written out once more, by hand, over ids."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ldm.adapters.textual_inversion import teach
from ldm.models.text import TextConfig, TextEncoder, TextPair, TextPairConfig
from ldm.models.transformers_text import TransformersText
from ldm.prompts.encode import chunks, encode, same_length, token_count
from ldm.types import Conditioning

SMALL = TextConfig(width=16, layers=3, heads=2, embed_dim=8, context_length=12, pad_id=49_407, embedding_std=1.0)
COMMA = 267


def encoder_of(config: TextConfig = SMALL, shift: float = 0.3) -> TextEncoder:
    """Random weights. The final norm has a bias, so that means are not near zero, as in trained encoders."""
    torch.manual_seed(0)
    encoder = TextEncoder(config).eval().requires_grad_(False)
    encoder.tower.ln_final.bias += shift
    return encoder


def by_hand(encoder: TextEncoder, rows: list[list[tuple[int, float]]]) -> Tensor:
    """Chunks of (id, weight) -> context [1, L, D]: weights in each chunk, and its mean restored."""
    parts = []
    for row in rows:
        empty = encoder.config.context_length - len(row) - 2
        ids = [49_406, *(i for i, _ in row), 49_407] + [encoder.config.pad_id] * empty
        weights = torch.tensor([1.0, *(w for _, w in row), 1.0] + [1.0] * empty)
        z = encoder.read(torch.tensor([ids])).context
        weighted = z * weights[:, None]
        parts.append(weighted * (z.mean() / weighted.mean()))
    return torch.cat(parts, dim=1)


def ids(encoder: TextEncoder, text: str) -> list[int]:
    return encoder.tokenize.bpe.encode(text)


@torch.no_grad()
@pytest.mark.parametrize("text", ["", "a red circle", "one, two three four five six seven eight nine"])
def test_a_plain_prompt_that_fits_is_what_the_encoder_gives_to_the_byte(text: str) -> None:
    for encoder in (encoder_of(), TextPair(TextPairConfig(SMALL, replace(SMALL, pad_id=0, skip=1))).eval()):
        told, alone = encode(encoder, [text]), encoder([text])
        assert torch.equal(told.context, alone.context) and torch.equal(told.pooled, alone.pooled)
        assert told.mask is None
        among = encode(encoder, ["x", text, "(y:2)", text])
        assert torch.equal(among.context[1], alone.context[0]) and torch.equal(among.context[3], alone.context[0])


@torch.no_grad()
def test_weights_by_their_formula() -> None:
    encoder = encoder_of()
    a, red, circle = ids(encoder, "a red circle")
    told = encode(encoder, ["a (red:1.5) [circle]"])
    torch.testing.assert_close(told.context, by_hand(encoder, [[(a, 1.0), (red, 1.5), (circle, 1 / 1.1)]]))
    plain = encoder(["a red circle"])
    assert told.context.mean().item() == pytest.approx(plain.context.mean().item(), rel=1e-5)
    assert (told.context - plain.context).abs().max() > 0.1
    assert torch.equal(told.pooled, plain.pooled)


@torch.no_grad()
def test_the_mean_is_left_where_it_says_nothing() -> None:
    """Behind a layer norm without a bias every row's mean is zero but for rounding."""
    encoder = encoder_of(shift=0.0)
    plain, weights = encoder(["a red circle"]).context, torch.ones(12)
    weights[2] = 1.5
    assert plain.mean().abs() < 1e-6
    torch.testing.assert_close(encode(encoder, ["a (red:1.5) circle"]).context, plain * weights[:, None])


@torch.no_grad()
def test_long_prompts_in_chunks() -> None:
    encoder = encoder_of()
    numbers = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    words = [f"{word} " for word in (*numbers, "red", "blue")]
    tokens = [ids(encoder, word)[0] for word in words]
    text = "".join(words[:9]) + f"({words[9]}{words[10]}:1.3)" + words[11]
    rows = list(zip(tokens, [1.0] * 9 + [1.3] * 2 + [1.0], strict=True))
    told = encode(encoder, [text])
    torch.testing.assert_close(told.context, by_hand(encoder, [rows[:10], rows[10:]]))
    assert torch.equal(told.pooled, encoder(["".join(words[:10])]).pooled)
    assert told.context.shape == (1, 24, 16) and told.mask is None
    assert token_count(encoder, text) == (12, 20)


def test_where_chunks_end() -> None:
    encoder = encoder_of(replace(SMALL, context_length=77))

    def rows(text: str) -> list[int]:
        found = chunks(encoder.tokenize, text)
        flat = [token for row in found for token, _ in row]
        if "BREAK" not in text:
            assert flat == ids(encoder, text)
        assert token_count(encoder, text) == (75 * (len(found) - 1) + len(found[-1]), 75 * len(found))
        return [len(row) for row in found]

    assert rows("") == [0] and rows("cat " * 75) == [75] and rows("cat " * 76) == [75, 1]
    assert rows("cat " * 55 + ", " + "dog " * 30) == [56, 30]  # 20 tokens from the comma on: they move
    assert rows("cat " * 54 + ", " + "dog " * 30) == [75, 10]  # 21: they do not
    assert rows("cat " * 74 + ", dog") == [75, 1] and rows("cat " * 75 + ", dog") == [75, 2]
    assert rows("cat " * 60 + ", " + "dog " * 5 + ", " + "cow " * 20) == [67, 20]  # the last of them
    assert rows("cat " * 60 + ", " + "dog " * 14 + ", cow") == [75, 2]  # where a comma comes next, nothing moves
    assert rows("cat BREAK dog dog BREAK BREAK") == [1, 2, 0] and rows("BREAK cat") == [0, 1]
    assert rows("cat " * 75 + "BREAK dog") == [75, 1]


def test_learned_words_stay_together() -> None:
    encoder = encoder_of(replace(SMALL, context_length=28))
    teach(encoder, "sks", torch.randn(8, 16))
    assert [len(row) for row in chunks(encoder.tokenize, "cat " * 20 + "sks dog")] == [20, 9]
    assert [len(row) for row in chunks(encoder.tokenize, "cat " * 18 + "sks dog")] == [26, 1]
    assert [len(row) for row in chunks(encoder.tokenize, "cat, " + "dog " * 20 + "sks")] == [22, 8]
    # full, and what follows the comma and the word do not fit into one chunk
    teach(encoder, "sks", torch.randn(10, 16))
    assert [len(row) for row in chunks(encoder.tokenize, "cat " * 6 + ", " + "dog " * 19 + "sks")] == [7, 19, 10]
    assert token_count(encoder, "a sks (SKS:1.2)") == (21, 26)


@torch.no_grad()
def test_texts_of_different_lengths_do_not_change_each_other() -> None:
    encoder = encoder_of()
    short, long = "a (red:1.5) circle", "cat " * 25
    told = encode(encoder, [short, long, short])
    assert told.context.shape == (3, 36, 16)
    assert torch.equal(told.context[0, :12], encode(encoder, [short]).context[0])
    assert torch.equal(told.context[1:2], encode(encoder, [long]).context)
    assert told.mask.tolist() == [[True] * 12 + [False] * 24, [True] * 36, [True] * 12 + [False] * 24]
    assert torch.equal(told.context[0], told.context[2]) and not told.context[0, 12:].any()
    # what a denoiser hears under the mask is what it hears of the short one alone
    q = torch.randn(1, 2, 5, 8)
    keys = told.context[:1].unflatten(2, (2, 8)).transpose(1, 2)
    from ldm.nn.attention import attention

    torch.testing.assert_close(attention(q, keys, keys, told.mask[:1]), attention(q, keys[:, :, :12], keys[:, :, :12]))


def test_each_distinct_chunk_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, seen = encoder_of(), []
    read = encoder.read
    monkeypatch.setattr(encoder, "read", lambda ids, skip: seen.append(ids.tolist()) or read(ids, skip))
    encode(encoder, ["cat " * 20 + "dog", "cat " * 10, "(cat:1.2) " + "cat " * 9, "dog"])
    assert len(seen) == 2 and all(len(ids) == 1 for ids in seen)


@torch.no_grad()
def test_clip_skip() -> None:
    encoder = encoder_of()
    other = TextEncoder(replace(SMALL, skip=1)).eval()
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(encode(encoder, ["a cat"], skip=1).context, other(["a cat"]).context)
    assert torch.equal(encode(other, ["a cat"], skip=0).context, encoder(["a cat"]).context)
    assert torch.equal(encode(other, ["a cat"]).context, other(["a cat"]).context)
    for skip in (-1, 3):
        with pytest.raises(ValueError, match=rf"skip must be in 0\.\.2 .* not {skip}"):
            encode(encoder, ["a cat"], skip=skip)


@torch.no_grad()
def test_the_pair_of_sdxl() -> None:
    second = replace(SMALL, width=24, embed_dim=6, pad_id=0, final_norm=False, skip=1)
    pair = TextPair(TextPairConfig(replace(SMALL, embed_dim=0), second)).eval()
    text = "a (red:1.5) circle and " + "one two " * 5
    told = encode(pair, [text, "a cat"])
    each = [encode(tower, [text, "a cat"]) for tower in (pair.first, pair.second)]
    assert torch.equal(told.context, torch.cat([e.context for e in each], dim=-1))
    assert torch.equal(told.pooled, each[1].pooled) and torch.equal(told.mask, each[0].mask)
    assert torch.equal(encode(pair, ["a cat"], skip=2).context[..., 16:], encode(pair.second, ["a cat"], 2).context)


def t5(length: int = 12) -> TransformersText:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5Config

    words = ["<pad>", "</s>", "<unk>", "a", "red", "circle", "blue", "square"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = T5Config(vocab_size=10, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, pad_token_id=0)
    torch.manual_seed(0)
    made = TransformersText.config_of(config.to_dict(), tokenizer.to_str(), length)
    return TransformersText(made).eval().requires_grad_(False)


@torch.no_grad()
def test_an_encoder_without_chunks() -> None:
    encoder = t5()
    for text in ("", "a red circle"):
        told, alone = encode(encoder, [text]), encoder([text])
        assert torch.equal(told.context, alone.context) and torch.equal(told.mask, alone.mask)
    told = encode(encoder, ["a (red circle:1.5) BREAK [blue] square", "a"])
    assert torch.equal(told.mask.sum(1), torch.tensor([6, 2]))
    weights = torch.tensor([1, 1.5, 1.5, 1 / 1.1, 1] + [1.0] * 7)
    torch.testing.assert_close(told.context[:1], encoder(["a red circle blue square"]).context * weights[:, None])
    assert token_count(encoder, "a (red:2) circle") == (3, 11)
    with pytest.raises(ValueError, match="has 12 tokens, and this text encoder reads 11 at most"):
        encode(encoder, ["a red " * 6])
    with pytest.raises(ValueError, match="clip skip is for CLIP"):
        encode(encoder, ["a"], skip=1)


def test_its_tokens_are_those_of_the_tokenizers_own_cut() -> None:
    from tokenizers import Tokenizer

    encoder = t5()
    own = Tokenizer.from_str(encoder.config.tokenizer)
    own.enable_truncation(12)
    own.enable_padding(length=12, pad_id=0)
    texts = ["", "a", "a red circle", "blue " * 11, "square a " * 20]
    expected = own.encode_batch(texts)
    found, mask = encoder.tokenize(texts)
    assert found.tolist() == [e.ids for e in expected] and mask.int().tolist() == [e.attention_mask for e in expected]


def test_cutting_in_training_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for encoder in (encoder_of(), t5()):
        caplog.clear()
        for _ in range(2):
            encoder(["a red circle", "blue square " * 20])
        assert [r.message.split(" is cut")[0] for r in caplog.records] == ["a prompt of 40 tokens"]


class Letters(nn.Module):
    def forward(self, prompts: list[str]) -> Conditioning:
        return Conditioning(context=torch.tensor([[[float(len(p))]] for p in prompts]))


def test_an_encoder_of_no_known_kind_reads_plain_texts() -> None:
    assert encode(Letters(), ["abc", r"a\(", "abc"]).context.flatten().tolist() == [3, 2, 3]
    assert token_count(Letters(), "abc") == (0, 0)
    for text in ("(a)", "a BREAK b"):
        with pytest.raises(ValueError, match="Letters reads plain prompts"):
            encode(Letters(), ["a", text])


def test_one_length_for_conditionings_from_elsewhere() -> None:
    short, long = Conditioning(context=torch.ones(1, 2, 3)), Conditioning(context=torch.ones(4, 5, 3))
    a, b = same_length([short, long])
    assert a.context.shape == (1, 5, 3) and a.mask.tolist() == [[True] * 2 + [False] * 3] and b.mask.all()
    assert same_length([short, short])[0] is short
    assert same_length([a, replace(short, context=torch.ones(1, 5, 3))])[1].mask.all()
