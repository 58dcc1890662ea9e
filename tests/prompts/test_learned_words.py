"""Textual inversion: learned words against transformers with added token rows, and by their own promises."""

import copy
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.adapters.textual_inversion import forget, learned_words, load_embeddings, teach
from ldm.checkpoints.textual_inversion import TextualInversion, write
from ldm.models.text import VOCABULARY, TextConfig, TextEncoder, TextPair, TextPairConfig, import_open_clip
from ldm.models.transformers_text import MODELS, TransformersText
from ldm.prompts.encode import encode, token_count
from tests.parity.reference import converted, error
from tests.parity.test_text import reference_of, table_for
from tests.prompts.test_encode import t5

SMALL = TextConfig(width=16, layers=3, heads=2, embed_dim=8, context_length=12, pad_id=49_407, activation="quick_gelu")
PROMPT = "a SKS_1 circle, <cat-toy>"


def vectors(n: int, width: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def encoder_of(config: TextConfig = SMALL) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("embed_dim", [0, 8])
def test_parity_with_added_tokens_of_transformers(embed_dim: int) -> None:
    """diffusers adds n tokens and n rows for a word of n vectors; their ids are then written in its place."""
    import_open_clip()  # transformers imports torchvision, which needs our help beside a CPU build of torch
    config = replace(SMALL, embed_dim=embed_dim)
    reference = reference_of(config, torch.float32)
    ours = converted(TextEncoder(config), reference, table_for(reference, config))
    one, two = vectors(1), vectors(3, seed=1)
    teach(ours, "sks_1", one)
    teach(ours, "<cat-toy>", two)
    reference.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    reference.get_input_embeddings().weight[VOCABULARY:] = torch.cat([one, two])
    encode_text = ours.tokenize.bpe.encode
    ids = [49_406, *encode_text("a"), VOCABULARY, *encode_text("circle,"), *range(VOCABULARY + 1, VOCABULARY + 4)]
    ids = torch.tensor([[*ids, *[49_407] * (12 - len(ids))]])
    told = reference(ids, output_hidden_states=True)
    for cond in (ours([PROMPT]), encode(ours, [PROMPT])):
        assert error(cond.context, told.last_hidden_state) <= 1e-5
    assert error(encode(ours, [PROMPT], skip=1).context, ours.tower.ln_final(told.hidden_states[-2])) <= 1e-5
    if embed_dim:
        assert error(ours([PROMPT]).pooled, told.text_embeds) <= 1e-5


@torch.no_grad()
def test_vectors_of_known_tokens_change_nothing() -> None:
    encoder = encoder_of()
    plain = encoder(["a red cat, red"])
    rows = encoder.tower.token_embedding.weight[encoder.tokenize.bpe.encode("red cat")]
    teach(encoder, "zorp", rows)
    for text in ("a zorp, red", "a ZORP , red"):
        assert torch.equal(encoder([text]).context, plain.context)
        assert torch.equal(encoder([text]).pooled, plain.pooled)
        assert torch.equal(
            encoder.features(encoder.tokenize([text])), encoder.features(encoder.tokenize(["a red cat, red"]))
        )
    assert token_count(encoder, "a (zorp:1.2)") == (3, 10) and encoder.tokenize.length("a zorp") == 5


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("sks", 1), ("a SkS.", 1), ("sks,sks sks's", 3), ("sks2", 0), ("asks", 0), ("sks_", 0), ("mask-sks-x", 1),
        ("<toy>", 1), ("a<TOY>b", 1), ("toy", 0), ("<sks>", 1), ("<sks> <toy>sks", 3), ("sks\nsks", 2),
        ("sKs \u017fks", 2),
        ("*", 1), ("a*b", 1), ("big sks", 1), ("big  sks", 1), ("big*sks*", 3),
    ],
)  # fmt: skip
def test_whole_words_in_upper_or_lower_case(text: str, times: int) -> None:
    encoder = encoder_of()
    for i, word in enumerate(("sks", "<toy>", "*", "big sks")):
        teach(encoder, word, vectors(1, seed=i))
    assert sum(unit[0] < 0 for unit in encoder.tokenize.units(text)) == times


@torch.no_grad()
def test_the_longest_word_is_found_and_others_keep_their_vectors() -> None:
    encoder = encoder_of()
    expected = {word: vectors(n, seed=n) for n, word in enumerate(("sks", "sks dog", "x"), start=1)}
    for word, table in expected.items():
        teach(encoder, word, table)

    def seen(text: str) -> Tensor:
        return encoder.tower.token_embedding(encoder.tokenize([text]))[0, 1:]

    assert learned_words(encoder) == ("sks", "sks dog", "x")
    assert torch.equal(seen("sks dog")[:2], expected["sks dog"])
    assert torch.equal(seen("x sks")[:4], torch.cat([expected["x"], expected["sks"]]))
    forget(encoder, "SKS")
    assert torch.equal(seen("x sks dog")[:5], torch.cat([expected["x"], expected["sks dog"]]))
    teach(encoder, "X", vectors(1, seed=9))
    assert torch.equal(seen("x")[:1], vectors(1, seed=9)) and learned_words(encoder) == ("sks dog", "x")
    with pytest.raises(ValueError, match="unknown learned word 'sks'"):
        forget(encoder, "sks")
    forget(encoder, "x"), forget(encoder, "sks dog")
    assert torch.equal(
        seen("x sks dog"), encoder_of().tower.token_embedding(encoder_of().tokenize(["x sks dog"]))[0, 1:]
    )


def test_gradients_reach_the_vectors_and_nothing_else_changes() -> None:
    encoder = encoder_of()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    encoder.requires_grad_(False)
    used, unused = nn.Parameter(vectors(2)), nn.Parameter(vectors(1, seed=3))
    teach(encoder, "sks", used), teach(encoder, "other", unused)
    assert encoder.state_dict().keys() == before.keys() and len(list(encoder.parameters())) == len(before)
    for call in (encoder, lambda texts: encode(encoder, [f"({t}:1.2)" for t in texts])):
        used.grad = unused.grad = None
        call(["a sks circle", "sks"]).context.square().sum().backward()
        assert used.grad.abs().min() > 0 and not unused.grad.any()
    eps, direction = 1e-3, vectors(2, seed=5)
    encoder.double()

    def value(step: float) -> Tensor:
        teach(encoder, "sks", (used.detach() + step * direction).double())
        return encoder(["a sks circle", "sks"]).context[..., 0].sum()

    used.grad = None
    teach(encoder, "sks", used)
    encoder(["a sks circle", "sks"]).context[..., 0].sum().backward()
    slope = (value(eps) - value(-eps)) / (2 * eps)
    assert (used.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4)
    assert all(torch.equal(v.float(), before[k]) for k, v in encoder.state_dict().items())


def test_copies_learn_by_themselves() -> None:
    encoder = encoder_of()
    teach(encoder, "sks", nn.Parameter(vectors(1)))
    other = copy.deepcopy(encoder)
    forget(other, "sks")
    assert learned_words(encoder) == ("sks",) and learned_words(other) == ()
    assert (other.tokenize(["sks"]) >= 0).all() and (encoder.tokenize(["sks"]) < 0).any()


@torch.no_grad()
def test_a_pair_and_an_encoder_of_transformers() -> None:
    pair = TextPair(TextPairConfig(SMALL, replace(SMALL, width=24))).eval()
    teach(pair, "sks", (vectors(2), vectors(2, 24)))
    teach(pair.first, "zorp", vectors(2)), teach(pair.second, "zorp", vectors(2, 24))
    assert learned_words(pair)[0] == "sks" and torch.equal(pair(["a sks"]).context, pair(["a zorp"]).context)
    forget(pair, "sks")
    assert not torch.equal(pair(["a sks"]).context, pair(["a zorp"]).context)
    encoder = t5()
    plain = encoder(["a red circle, blue"])
    teach(encoder, "sks", encoder.encoder.get_input_embeddings().weight[[4, 5]])
    assert torch.equal(encoder(["a sks, blue"]).context, plain.context)
    weighted = encode(encoder, ["a (red circle:1.5), blue"])
    torch.testing.assert_close(encode(encoder, ["a (sks:1.5), blue"]).context, weighted.context)
    weighted = encode(encoder, ["red circle a (blue:1.5) square"])
    assert torch.equal(encode(encoder, ["sks a (blue:1.5) square"]).context, weighted.context)
    assert token_count(encoder, "a sks") == (3, 11)


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_every_encoder_of_transformers_learns_words(kind: str) -> None:
    """A word with the vectors of two tokens is those two tokens, also where spaces are part of tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", "▁a", "▁red", "▁circle", "▁"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    t5_sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    common = dict(model_type=kind, vocab_size=8, pad_token_id=1, max_position_embeddings=40)
    architecture = common | (t5_sizes if "t5" in kind else sizes)
    torch.manual_seed(0)
    encoder = TransformersText(TransformersText.config_of(architecture, tokenizer.to_str(), 12)).eval()
    assert (encoder.start, encoder.end) == ([0], [2])
    plain, state = encoder(["a red circle a"]), encoder.state_dict().keys()
    teach(encoder, "sks", encoder.encoder.get_input_embeddings().weight[[5, 6]])
    taught = encoder(["a sks a"])
    assert torch.equal(taught.context, plain.context) and torch.equal(taught.mask, plain.mask)
    assert encoder.state_dict().keys() == state
    torch.testing.assert_close(encode(encoder, ["a [sks] a"]).context, encode(encoder, ["a [red circle] a"]).context)


@pytest.mark.parametrize(
    ("word", "table", "message"),
    [
        ("x", vectors(1, 768), r"are 768 wide \(Stable Diffusion 1\); this text encoder takes 16 wide"),
        ("x", vectors(1, 1024), r"1024 wide \(Stable Diffusion 2\)"),
        ("x", (vectors(1, 768), vectors(1, 1280)), r"768 \+ 1280 wide \(SDXL\)"),
        ("x", vectors(0), "has 0 vectors; a word has 1..10"),
        ("x", vectors(11), "has 11 vectors"),
        ("x", vectors(1)[0], r"must be \[n, width\], not \[\[16\]\]"),
        ("x", vectors(1) / 0, "NaN or infinity"),
        (" ", vectors(1), "must have no space at its ends"),
        ("", vectors(1), "be something"),
        (" x", vectors(1), "no space at its ends"),
    ],
)
def test_what_cannot_be_taught(word: str, table: Tensor, message: str) -> None:
    encoder = encoder_of()
    with pytest.raises(ValueError, match=message) as told:
        teach(encoder, word, table)
    assert "\n" not in str(told.value) and not learned_words(encoder)
    with pytest.raises(ValueError, match="this is a Linear"):
        teach(nn.Linear(1, 1), "x", vectors(1))


def test_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "embeddings"
    (folder / "deep").mkdir(parents=True)
    write(TextualInversion("one", (vectors(2),)), folder / "one.safetensors", "native")
    write(TextualInversion("<Two>", (vectors(1, seed=1),)), folder / "deep/b.safetensors", "diffusers")
    write(TextualInversion("big", (vectors(1, 768),)), folder / "big.safetensors", "native")
    (folder / "notes.txt").write_text("x")
    (folder / "broken.pt").write_bytes(b"x")
    encoder = encoder_of()
    with caplog.at_level(logging.WARNING):
        assert load_embeddings(encoder, folder) == ["<two>", "one"]
    assert [Path(r.message.split()[2].rstrip(":")).name for r in caplog.records] == ["big.safetensors", "broken.pt"]
    assert torch.equal(encoder.words.vectors["one"], vectors(2))
    assert load_embeddings(encoder, folder / "one.safetensors") == ["one"]
    with pytest.raises(ValueError, match=r"big\.safetensors: the vectors of 'big' are 768 wide \(Stable Diffusion 1\)"):
        load_embeddings(encoder, folder / "big.safetensors")
    with pytest.raises(ValueError, match="does not exist"):
        load_embeddings(encoder, tmp_path / "none")
    write(TextualInversion("ONE", (vectors(1),)), folder / "c.safetensors", "diffusers")
    with pytest.raises(ValueError, match=r"c\.safetensors and .*one\.safetensors both teach the word 'one'"):
        load_embeddings(encoder_of(), folder)
