"""Any text encoder of the transformers library, such as T5: prompts -> Conditioning."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.text import import_open_clip
from ldm.models.words import LearnedWords, WordEmbedding
from ldm.nn.transfer import to_device
from ldm.types import Conditioning

log = logging.getLogger(__name__)

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
        self.tokenizer.no_truncation()  # cut and filled up here, where learned words are known
        self.tokenizer.no_padding()
        self.words = LearnedWords()
        self.told = False  # that prompts are cut
        entries = self.tokenizer.get_vocab_size()
        rows = self.encoder.get_input_embeddings().num_embeddings
        # A tokenizer made offline can silently have two entries; every prompt then reads the same.
        if not rows // 2 <= entries <= rows:
            raise ValueError(f"the tokenizer has {entries} entries and the text encoder {rows} rows: not a pair")
        self.start, self.end = _around(self.tokenizer)
        table = self.encoder.get_input_embeddings().weight
        for name, module in list(self.encoder.named_modules(remove_duplicate=False)):
            if isinstance(module, nn.Embedding) and module.weight is table:  # T5 has the same one in two places
                self.encoder.set_submodule(name, WordEmbedding(module, self.words))

    def train(self, mode: bool = True) -> "TransformersText":
        """As of any module, but the encoder stays in evaluation mode: dropout would change what a prompt says."""
        super().train(mode)
        self.encoder.eval()
        return self

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

    @property
    def room(self) -> int:
        """Tokens of a prompt that fit, beside those that the encoder puts around every text."""
        return self.config.context_length - len(self.start) - len(self.end)

    def tokens(self, prompt: str) -> list[tuple[int, int]]:
        """A prompt's ids, of any length and with nothing around them, each with the place in it where it ends.

        The place is that of the token's last character; of a learned word, whose ids are negative, its first.
        """
        tokens: list[tuple[int, int]] = []
        place = 0
        for part, word in self.words.found(prompt):
            if word:
                tokens += [(token, place) for token in self.words.ids(word)]
            elif part:
                # beside a learned word, a space is not a token of its own
                text = part if part == prompt else part.strip()
                encoded = self.tokenizer.encode(text, add_special_tokens=False)
                start = place + part.index(text)
                tokens += [
                    (i, start + max(end - 1, 0)) for i, (_, end) in zip(encoded.ids, encoded.offsets, strict=True)
                ]
            place += len(part)
        return tokens

    def rows(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """B times at most `room` ids -> ids [B, L] with what goes around them, and a mask [B, L]."""
        rows = torch.full((len(texts), self.config.context_length), self.config.pad_id)
        mask = torch.zeros_like(rows, dtype=torch.bool)
        for row, keep, ids in zip(rows, mask, texts, strict=True):
            whole = [*self.start, *ids, *self.end]
            row[: len(whole)], keep[: len(whole)] = torch.tensor(whole, dtype=torch.long), True
        return rows, mask

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B prompts -> ids [B, L] and a mask [B, L]; a prompt that is too long loses its tail, which is logged once."""
        texts = [[token for token, _ in self.tokens(prompt)] for prompt in prompts]
        longest = max(map(len, texts), default=0)
        if longest > self.room and not self.told:
            self.told = True
            log.warning("a prompt of %d tokens is cut to %d, as all longer ones are; said once", longest, self.room)
        return self.rows([text[: self.room] for text in texts])

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts -> Conditioning(context [B, L, width], mask [B, L]); one that is too long is cut."""
        return self.read(*self.tokenize(prompts))

    def read(self, ids: Tensor, mask: Tensor) -> Conditioning:
        """ids [B, L], of tokens and learned words, and a mask [B, L] -> what `forward` gives."""
        ids, mask = (to_device(v, self.encoder.device) for v in (ids, mask))
        return Conditioning(context=self.encoder(input_ids=ids, attention_mask=mask)[0], mask=mask)


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after every text."""
    inside, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    before = next(i for i in range(len(whole) + 1) if whole[i : i + len(inside)] == inside)
    return whole[:before], whole[before + len(inside) :]


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
