"""Any text encoder of the transformers library, such as T5: prompts -> Conditioning."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.text import import_open_clip
from ldm.nn.transfer import to_device
from ldm.types import Conditioning

MODELS = ("t5", "umt5", "bert", "roberta", "xlm-roberta")
RUNS_CODE = (
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "quantization_config",
)
"""Keys of a configuration that can make the library fetch or run something."""


@dataclass(frozen=True)
class TransformersTextConfig:
    """The encoder and its tokenizer whole, as text, so that one file holds all it takes to read a prompt."""

    architecture: str = "???"  # JSON of the transformers configuration
    tokenizer: str = "???"  # JSON of the tokenizers library (tokenizer.json)
    context_length: int = 77
    pad_id: int = 0


class TransformersText(nn.Module):
    """The last hidden states of the encoder, and a mask that is True where there is a token.

    There is no pooled embedding: encoders such as T5 have none.
    """

    def __init__(self, config: TransformersTextConfig) -> None:
        super().__init__()
        self.config = config
        # Its buffers outside the state dict must be real also when the model is built on the meta device.
        with torch.device("cpu"):
            self.encoder = _encoder(config)
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_str(config.tokenizer)
        except Exception as error:  # the library's errors are plain ones
            raise ValueError(f"no tokenizer can be made of this configuration: {error}") from error
        self.tokenizer.enable_truncation(config.context_length)
        self.tokenizer.enable_padding(length=config.context_length, pad_id=config.pad_id)
        entries = self.tokenizer.get_vocab_size()
        rows = self.encoder.get_input_embeddings().num_embeddings
        # A tokenizer made offline can silently have two entries; every prompt then reads the same.
        if not rows // 2 <= entries <= rows:
            raise ValueError(f"the tokenizer has {entries} entries and the text encoder {rows} rows: not a pair")

    @staticmethod
    def config_of(architecture: dict[str, Any], tokenizer: str, context_length: int) -> TransformersTextConfig:
        """From the contents of config.json and tokenizer.json."""
        kept = {k: v for k, v in architecture.items() if k not in RUNS_CODE}
        return TransformersTextConfig(json.dumps(kept), tokenizer, context_length, kept.get("pad_token_id") or 0)

    @staticmethod
    def tied(config: TransformersTextConfig) -> dict[str, str]:
        """Names of all parameters -> the first name of the same one. Builds nothing for real."""
        owners: dict[int, str] = {}
        with torch.device("meta"):
            named = _encoder(config).named_parameters(prefix="encoder", remove_duplicate=False)
            return {name: owners.setdefault(id(parameter), name) for name, parameter in named}

    @property
    def context_dim(self) -> int:
        """Width of the context."""
        width: int = self.encoder.config.hidden_size
        return width

    @property
    def pooled_dim(self) -> int:
        """0: there is no pooled embedding."""
        return 0

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B prompts -> ids [B, L] and a mask [B, L]; a prompt that is too long loses its tail."""
        encoded = self.tokenizer.encode_batch(list(prompts))
        return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded]).bool()

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts -> Conditioning(context [B, L, width], mask [B, L])."""
        ids, mask = (to_device(v, self.encoder.device) for v in self.tokenize(prompts))
        return Conditioning(context=self.encoder(input_ids=ids, attention_mask=mask)[0], mask=mask)


def _encoder(config: TransformersTextConfig) -> Any:
    import_open_clip()  # transformers imports torchvision where it finds it
    from transformers import AutoConfig, AutoModelForTextEncoding

    architecture = json.loads(config.architecture)
    if architecture.get("model_type") not in MODELS:
        raise ValueError(
            f"a text encoder of transformers is one of {', '.join(MODELS)}, not {architecture.get('model_type')!r}"
        )
    architecture = {k: v for k, v in architecture.items() if k not in RUNS_CODE}
    try:
        found = AutoConfig.for_model(**architecture)
        return AutoModelForTextEncoding.from_config(found, trust_remote_code=False)
    except Exception as error:  # the library has errors of its own, also plain ones
        raise ValueError(f"no text encoder can be made of this configuration: {error}") from error
