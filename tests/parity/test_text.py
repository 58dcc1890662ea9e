"""Text encoders against transformers and open_clip with random weights."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm.checkpoints.layouts import text as layout
from ldm.checkpoints.layouts.table import Entry, to_native
from ldm.checkpoints.load import load_model
from ldm.models.text import TextConfig, TextEncoder, TextPair, TextPairConfig, import_open_clip
from ldm.models.transformers_text import TransformersText
from tests.parity.reference import LIMIT, converted, error, randomised

PROMPTS = ["a red circle", "", "a much longer prompt, with commas, that is cut at the end of the context"]
SMALL = TextConfig(width=16, layers=3, heads=2, embed_dim=0, context_length=12, activation="quick_gelu", pad_id=49_407)


def table_for(reference: torch.nn.Module, config: TextConfig) -> Callable[[Iterable[str]], list[Entry]]:
    """transformers dropped the prefix `text_model.` in 5.6, but not with a projection."""

    def table(keys: Iterable[str]) -> list[Entry]:
        wrapped = any(k.startswith(layout.WRAPPER) for k in reference.state_dict())
        drop = "" if wrapped else layout.WRAPPER
        entries = layout.transformers(config, keys)
        return [Entry(e.native, tuple(n.removeprefix(drop) for n in e.foreign), e.how) for e in entries]

    return table


def reference_of(config: TextConfig, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = layout.to_transformers(config)
    kind = CLIPTextModelWithProjection if config.embed_dim else CLIPTextModel
    assert words["architectures"] == [kind.__name__]
    return randomised(kind(CLIPTextConfig(**words))).to(dtype)


def test_configs_in_the_words_of_transformers() -> None:
    for config in (SMALL, replace(SMALL, embed_dim=8, activation="gelu")):
        assert layout.from_transformers(layout.to_transformers(config), "here", pad_id=49_407) == config
    with pytest.raises(ValueError, match="vocab_size"):
        layout.from_transformers(layout.to_transformers(SMALL) | {"vocab_size": 1000}, "here", pad_id=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("embed_dim", "activation"), [(0, "quick_gelu"), (8, "gelu")])
@torch.no_grad()
def test_clip_of_transformers(embed_dim: int, activation: str, dtype: torch.dtype) -> None:
    config = replace(SMALL, embed_dim=embed_dim, activation=activation)
    reference = reference_of(config, dtype)
    ours = converted(TextEncoder(config), reference, table_for(reference, config))
    told = reference(ours.tokenize(PROMPTS), output_hidden_states=True)
    cond = ours(PROMPTS)
    assert error(cond.context, told.last_hidden_state) <= LIMIT[dtype]
    assert error(cond.pooled, told.text_embeds if embed_dim else told.pooler_output) <= LIMIT[dtype]
    # clip-skip as people mean it, through the final norm, and SDXL's, without it
    for norm in (True, False):
        skipping = TextEncoder(replace(config, skip=1, final_norm=norm)).to(dtype).eval()
        skipping.load_state_dict(ours.state_dict())
        expected = told.hidden_states[-2]
        expected = ours.tower.ln_final(expected) if norm else expected
        assert error(skipping(PROMPTS).context, expected) <= LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_tower_of_open_clip(dtype: torch.dtype) -> None:
    """Penultimate layer by open_clip's own recipe: the tower without its last block."""
    import_open_clip()
    from open_clip.transformer import TextTransformer

    config = replace(SMALL, embed_dim=8, activation="gelu", pad_id=0, skip=1)
    reference = TextTransformer(
        context_length=12, vocab_size=49_408, width=16, heads=2, layers=3, output_dim=8, output_tokens=True
    )
    reference = randomised(reference).to(dtype)
    ours = converted(TextEncoder(config), reference, layout.open_clip)
    ids = ours.tokenize(PROMPTS)
    pooled, _ = reference(ids)
    del reference.transformer.resblocks[2]
    _, penultimate = reference(ids)
    assert error(ours(PROMPTS).context, penultimate) <= LIMIT[dtype]
    assert error(ours(PROMPTS).pooled, pooled) <= LIMIT[dtype]


@torch.no_grad()
def test_sdxl_pair() -> None:
    first = replace(SMALL, skip=1, final_norm=False)
    second = replace(first, width=24, embed_dim=8, activation="gelu", pad_id=0)
    pair = TextPair(TextPairConfig(first, second)).eval()
    references = [reference_of(config, torch.float32) for config in (first, second)]
    for ours, config, reference in zip((pair.first, pair.second), (first, second), references, strict=True):
        converted(ours, reference, table_for(reference, config))
    told = [
        reference(encoder.tokenize(PROMPTS), output_hidden_states=True)
        for reference, encoder in zip(references, (pair.first, pair.second), strict=True)
    ]
    cond = pair(PROMPTS)
    assert error(cond.context, torch.cat([t.hidden_states[-2] for t in told], dim=-1)) <= 1e-5
    assert error(cond.pooled, told[1].text_embeds) <= 1e-5
    assert (pair.context_dim, pair.pooled_dim) == (40, 8)


@torch.no_grad()
def test_any_encoder_of_transformers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import T5Config, T5EncoderModel

    words = ["<pad>", "</s>", "<unk>", "a", "red", "circle", "blue", "square"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = T5Config(vocab_size=10, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, pad_token_id=0)
    reference = randomised(T5EncoderModel(config))
    reference.save_pretrained(tmp_path)
    (ours,) = load_model(tmp_path).require("text")
    prompts = ["a red circle", "blue"]
    cond = ours(prompts)
    ids = torch.zeros(2, 77, dtype=torch.long)
    ids[0, :3], ids[1, 0] = torch.tensor([3, 4, 5]), 6
    assert torch.equal(ours.tokenize(prompts)[0], ids)
    assert cond.mask is not None and torch.equal(cond.mask, ids > 0)
    assert error(cond.context, reference(ids, attention_mask=ids > 0).last_hidden_state) <= 1e-5
    again = TransformersText(ours.config).eval()
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(prompts).context, cond.context)


T5 = dict(vocab_size=10, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, pad_token_id=0)


@pytest.mark.parametrize("how", ["missing", "unknown", "NaN", "truncated", "tokenizer", "code", "model"])
def test_a_spoiled_encoder_of_transformers_is_refused(how: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models
    from transformers import T5Config, T5EncoderModel

    words = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "circle"])}
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    T5EncoderModel(T5Config(**T5)).save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("SelfAttention.q.weight"))
    spoiled = {"missing": {k: v for k, v in tensors.items() if k != key}, "unknown": tensors | {"x": torch.ones(2)}}
    spoiled["NaN"] = tensors | {key: tensors[key] * float("nan")}
    if how in spoiled:
        save_file(spoiled[how], file)
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-50])
    elif how == "tokenizer":
        Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    elif how == "code":  # neither asked for nor run
        config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "evil.Evil"}}))
        assert load_model(tmp_path).components["text"]
        return
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llama"}))
    with pytest.raises(ValueError) as told:
        load_model(tmp_path)
    assert "\n" not in str(told.value)


def test_a_lost_tensor_is_named() -> None:
    encoder = TextEncoder(SMALL)
    table = layout.transformers(SMALL, encoder.state_dict())
    with pytest.raises(ValueError, match=r"file.*missing text_model\.embeddings"):
        to_native(table, {}, "file")
