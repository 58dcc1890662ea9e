"""What reads the prompts of a model, as its settings say it: the layer that is heard, and the tokenizer."""

import hashlib
from typing import Any

from torch import nn

from ldm.models.text import VOCABULARY, VOCABULARY_SHA256, TextPair
from ldm.models.transformers_text import TransformersText


def text_record(text: nn.Module) -> dict[str, Any]:
    """layer: blocks that the context has gone through; final_norm: whether it then went through the last norm.

    tokenizer: its library; vocabulary: its entries; tokenizer_sha256: of its vocabulary and merges. JSON-able.
    """
    if isinstance(text, TextPair):
        return {"first": text_record(text.first), "second": text_record(text.second)}
    if isinstance(text, TransformersText):
        return {
            "layer": int(text.encoder.config.num_hidden_layers),
            "final_norm": True,
            "tokenizer": "tokenizers",
            "vocabulary": text.tokenizer.get_vocab_size(),
            "tokenizer_sha256": hashlib.sha256(text.config.tokenizer.encode()).hexdigest(),
        }
    config: Any = text.config
    return {
        "layer": config.layers - config.skip,
        "final_norm": config.final_norm,
        "tokenizer": config.tokenizer,
        "vocabulary": VOCABULARY,
        "tokenizer_sha256": VOCABULARY_SHA256,  # which every tokenizer of ours is held to
    }


def check_record(recorded: dict[str, Any] | None, text: nn.Module, source: str) -> None:
    """Raise ValueError, naming what, if a model's settings record another text encoder than `text`, which it holds.

    Models of others record nothing, and pass.
    """
    here, before = text_record(text), recorded or {}
    for name, value in here.items():
        if before and before.get(name) != value:
            raise ValueError(
                f"{source}: its text encoder was trained with {name} {before.get(name)!r}, and has {value!r}"
            )
