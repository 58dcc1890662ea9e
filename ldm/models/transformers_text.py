"""Any text encoder of the transformers library, such as T5: prompts -> Conditioning."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.models.text import import_open_clip
from ldm.types import Conditioning


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
        import_open_clip()  # transformers imports torchvision where it finds it
        from tokenizers import Tokenizer
        from transformers import AutoConfig, AutoModelForTextEncoding

        architecture = json.loads(config.architecture)
        # Its buffers outside the state dict must be real also when the model is built on the meta device.
        with torch.device("cpu"):
            self.encoder = AutoModelForTextEncoding.from_config(AutoConfig.for_model(**architecture))
        self.tokenizer = Tokenizer.from_str(config.tokenizer)
        self.tokenizer.enable_truncation(config.context_length)
        self.tokenizer.enable_padding(length=config.context_length, pad_id=config.pad_id)
        entries = self.tokenizer.get_vocab_size()
        rows = self.encoder.get_input_embeddings().num_embeddings
        # A tokenizer made offline can silently have two entries; every prompt then reads the same.
        if not rows // 2 <= entries <= rows:
            raise ValueError(f"the tokenizer has {entries} entries and the text encoder {rows} rows: not a pair")

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Path, context_length: int) -> "TransformersText":
        """From a transformers folder with config.json and safetensors, and one with a tokenizer.json."""
        import_open_clip()
        from transformers import AutoConfig, AutoModelForTextEncoding

        file = tokenizer / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{tokenizer} has no tokenizer.json; save its tokenizer with transformers 5 first")
        architecture = AutoConfig.from_pretrained(folder, local_files_only=True)
        config = TransformersTextConfig(
            architecture.to_json_string(use_diff=False),
            file.read_text(encoding="utf-8"),
            context_length,
            architecture.pad_token_id or 0,
        )
        module = cls(config)
        module.encoder = AutoModelForTextEncoding.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, torch_dtype="auto"
        )
        return module.eval()

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
        ids, mask = (v.to(self.encoder.device) for v in self.tokenize(prompts))
        return Conditioning(context=self.encoder(input_ids=ids, attention_mask=mask)[0], mask=mask)
