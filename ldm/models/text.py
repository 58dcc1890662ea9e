"""Prompts -> Conditioning, over open_clip's text tower and its own BPE vocabulary."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.words import LearnedWords, WordEmbedding
from ldm.nn.transfer import to_device
from ldm.types import Conditioning

log = logging.getLogger(__name__)

VOCABULARY = 49_408
"""Entries of CLIP's BPE vocabulary, its start and end tokens included."""
START, END = 49_406, 49_407
"""Ids of the tokens that open and close every text."""
VOCABULARY_SHA256 = "f9ed75c7303813705c2bd2d90308476118d3b77bfe42f07a33a57b44c175e2bc"
"""Of its entries in the order of their ids and its merges in the order of their ranks, a line each."""


def import_open_clip() -> ModuleType:
    """open_clip, importable also beside a CPU build of torch.

    PyPI's torchvision is built against CUDA torch; beside the CPU build its compiled part does not load,
    and `import torchvision` then fails on the schemas of two operators it expects to exist. We use
    neither operator, so declaring them is enough. Only done when they are missing.
    """
    if not hasattr(torch.ops.torchvision, "nms"):
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _keep_alive.append(library)
    import open_clip

    return open_clip


_keep_alive: list[Any] = []
"""torch drops the definitions of a Library when it is garbage-collected."""


@dataclass(frozen=True)
class TextConfig:
    """Sizes and conventions; the defaults are CLIP ViT-L/14's text tower as Stable Diffusion 1 uses it."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    embed_dim: int = 768  # of the joint image-text space; 0 = no projection into it
    context_length: int = 77
    skip: int = 0  # last blocks that the context leaves out: 1 = penultimate layer ("clip skip 2")
    final_norm: bool = True  # whether the context goes through the final norm (not in SDXL)
    activation: str = "gelu"  # gelu | quick_gelu
    pad_id: int = 0  # what fills a prompt up: 0 (open_clip) | 49407 (Stable Diffusion 1)
    embedding_std: float = 0.0  # of fresh token and position embeddings; 0 = open_clip's own (0.02 and 0.01)
    tokenizer: str = "open_clip"  # its BPE and text cleaning (ftfy, HTML entities, lower case)

    def __post_init__(self) -> None:
        if not 0 <= self.skip < self.layers:
            raise ValueError(f"text: skip must be in 0..{self.layers - 1} for {self.layers} layers, not {self.skip}")
        for name, allowed in (
            ("activation", ("gelu", "quick_gelu")),
            ("tokenizer", ("open_clip",)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"text: {name} must be one of {allowed}, not {getattr(self, name)!r}")


class Tokenizer:
    """open_clip's byte-pair encoding: prompts -> ids [B, context_length], start token first, end token kept.

    words: those that the encoder has learned besides; their ids are negative.
    """

    def __init__(self, context_length: int, pad_id: int, words: LearnedWords | None = None) -> None:
        import_open_clip()
        from open_clip.tokenizer import SimpleTokenizer

        self.bpe = SimpleTokenizer(context_length=context_length)
        self.context_length, self.pad_id = context_length, pad_id
        self.words = LearnedWords() if words is None else words
        self.told = False  # that prompts are cut
        lines = [*self.bpe.encoder, *map(" ".join, self.bpe.bpe_ranks)]
        if hashlib.sha256("\n".join(lines).encode()).hexdigest() != VOCABULARY_SHA256:
            raise ValueError(
                f"the tokenizer of the installed open_clip is not CLIP's: it has {self.bpe.vocab_size} entries, of "
                f"{VOCABULARY}, or others in another order; the text encoders here were trained with CLIP's"
            )

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> int64 ids [B, L]; a prompt that is too long loses its tail, which is logged once."""
        return self.rows([self._cut(prompt) for prompt in prompts])

    def units(self, prompt: str) -> list[tuple[int, ...]]:
        """A prompt's ids without start and end, of any length, in units that stay together: tokens, learned words."""
        units: list[tuple[int, ...]] = []
        for part in self.words.split(prompt):
            units += [(token,) for token in self.bpe.encode(part)] if isinstance(part, str) else [part]
        return units

    def rows(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """B times at most L - 2 ids -> [B, L], each with start and end and filled up."""
        rows = torch.full((len(texts), self.context_length), self.pad_id)
        for row, ids in zip(rows, texts, strict=True):
            row[: len(ids) + 2] = torch.tensor([START, *ids, END])
        return rows

    def length(self, prompt: str) -> int:
        """Tokens of a prompt before any cut, start and end included."""
        return sum(map(len, self.units(prompt))) + 2

    def _cut(self, prompt: str) -> list[int]:
        ids = [token for unit in self.units(prompt) for token in unit]
        room = self.context_length - 2
        if len(ids) > room and not self.told:
            self.told = True
            log.warning("a prompt of %d tokens is cut to %d, as all longer ones are; said once", len(ids), room)
        return ids[:room]


def clip_vocabulary() -> tuple[dict[str, int], str]:
    """CLIP's vocabulary and merges in the files and spelling of transformers: vocab.json, merges.txt."""
    import_open_clip()
    from open_clip.tokenizer import SimpleTokenizer

    bpe = SimpleTokenizer()
    spelling = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    merges = "\n".join(" ".join(pair) for pair in bpe.bpe_ranks)
    return {spelling.get(word, word): i for word, i in bpe.encoder.items()}, f"#version: 0.2\n{merges}\n"


class TextEncoder(nn.Module):
    """CLIP's causal text transformer (Radford et al. 2021, sec. 2.4).

    `encoder(prompts)` -> Conditioning with context [B, L, width]; `features` gives the joint embedding.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        import_open_clip()
        from open_clip.transformer import QuickGELU, TextTransformer

        self.words = LearnedWords()
        self.tokenize = Tokenizer(config.context_length, config.pad_id, self.words)
        self.tower = TextTransformer(
            context_length=config.context_length,
            vocab_size=VOCABULARY,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            output_dim=config.embed_dim or None,
            act_layer=QuickGELU if config.activation == "quick_gelu" else nn.GELU,
            output_tokens=True,
        )
        if config.embedding_std:
            # open_clip's small start suits a long training; after a short one the words are lost beside what the
            # layers add to them, and their order most of all.
            nn.init.normal_(self.tower.token_embedding.weight, std=config.embedding_std)
            nn.init.normal_(self.tower.positional_embedding, std=config.embedding_std)
        self.tower.token_embedding = WordEmbedding(self.tower.token_embedding, self.words)
        # Not part of a state dict, so it must be real also when the model is built on the meta device.
        mask = torch.full((config.context_length, config.context_length), float("-inf"), device="cpu")
        self.tower.register_buffer("attn_mask", mask.triu_(1), persistent=False)

    @property
    def context_dim(self) -> int:
        """Width of the context."""
        return self.config.width

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled embedding."""
        return self.config.embed_dim or self.config.width

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts -> Conditioning(context [B, L, width], pooled [B, embed_dim]) for a denoiser.

        pooled is the prompt's place in the joint image-text space, not scaled to unit length; without a
        projection into that space, the end token's state. A prompt that is too long is cut.
        """
        return self.read(self.tokenize(prompts))

    def read(self, ids: Tensor, skip: int | None = None) -> Conditioning:
        """ids [B, L], of tokens and learned words -> what `forward` gives; skip: in place of that of the config."""
        layer = -1 - (self.config.skip if skip is None else skip)
        ids = to_device(ids, self.tower.positional_embedding.device)
        hidden = self.tower.forward_intermediates(
            ids, indices=[layer], normalize_intermediates=self.config.final_norm, output_fmt="NLC"
        )
        return Conditioning(context=hidden["text_intermediates"][0], pooled=hidden["text_features"])

    def features(self, ids: Tensor) -> Tensor:
        """ids [B, L] -> unit vectors [B, embed_dim] of the joint image-text space."""
        return F.normalize(self.tower(ids)[0], dim=-1)


@dataclass(frozen=True)
class TextPairConfig:
    """Two text encoders side by side; the defaults are SDXL's: CLIP ViT-L and OpenCLIP ViT-bigG."""

    first: TextConfig = TextConfig(embed_dim=0, skip=1, final_norm=False, activation="quick_gelu", pad_id=49_407)
    second: TextConfig = TextConfig(width=1280, layers=32, heads=20, embed_dim=1280, skip=1, final_norm=False)


class TextPair(nn.Module):
    """Two encoders read the same prompts: contexts joined by channel, the pooled embedding of the second."""

    def __init__(self, config: TextPairConfig) -> None:
        super().__init__()
        self.config = config
        self.first, self.second = TextEncoder(config.first), TextEncoder(config.second)

    @property
    def context_dim(self) -> int:
        """Width of the joined context."""
        return self.first.context_dim + self.second.context_dim

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled embedding."""
        return self.second.pooled_dim

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts -> Conditioning(context [B, L, both widths], pooled [B, embed_dim of the second])."""
        first, second = self.first(prompts), self.second(prompts)
        assert first.context is not None and second.context is not None
        return Conditioning(context=torch.cat([first.context, second.context], dim=-1), pooled=second.pooled)
