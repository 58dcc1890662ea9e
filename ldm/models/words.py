"""Words that stand for vectors of their own in what a text encoder reads (Gal et al. 2023, textual inversion)."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class LearnedWords:
    """The learned words of one text encoder: found in a text as whole words, upper or lower case, longest first.

    vectors: word in lower case -> [n, width]. The n ids of a word are negative, so that they are no token's, and
    change when a word is learned or forgotten. No part of a state dict: a model stays the model that it was.
    """

    def __init__(self) -> None:
        self.vectors: dict[str, Tensor] = {}
        self._ids: dict[str, tuple[int, ...]] = {}
        self._pattern: re.Pattern[str] | None = None

    def __bool__(self) -> bool:
        return bool(self.vectors)

    def learn(self, word: str, vectors: Tensor) -> None:
        """From now on `word` is `vectors` [n, width]; a parameter stays one, and gradients reach it."""
        self.vectors[word.lower()] = vectors
        self._index()

    def forget(self, word: str) -> None:
        """From now on `word` is text like any other."""
        del self.vectors[word.lower()]
        self._index()

    def split(self, text: str) -> Iterator[str | tuple[int, ...]]:
        """The text in order: text that holds no learned word, or the ids of a learned word."""
        for part, word in self.found(text):
            yield self._ids[word] if word else part

    def found(self, text: str) -> Iterator[tuple[str, str]]:
        """The text in order: (part of it, the learned word that it is, or ""); the parts joined are the text."""
        end = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            assert match.lastindex is not None
            yield text[end : match.start()], ""
            yield match[0], list(self._ids)[match.lastindex - 1]
            end = match.end()
        yield text[end:], ""

    def ids(self, word: str) -> tuple[int, ...]:
        """The ids of a learned word."""
        return self._ids[word]

    def table(self) -> Tensor:
        """[ids, width]: id -1 is its first row, -2 its second."""
        return torch.cat([self.vectors[word] for word in self._ids])

    def _index(self) -> None:
        words = sorted(self.vectors, key=lambda word: (-len(word), word))
        self._ids, used = {}, 0
        for word in words:
            n = len(self.vectors[word])
            self._ids[word] = tuple(-1 - i for i in range(used, used + n))
            used += n
        self._pattern = re.compile("|".join(f"({_whole(word)})" for word in words), re.IGNORECASE) if words else None


class WordEmbedding(nn.Embedding):
    """A table of token embeddings that also knows learned words; without them it is `base` itself."""

    def __init__(self, base: nn.Embedding, words: LearnedWords) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, base.padding_idx, _weight=base.weight)
        self.weight = base.weight  # the same parameter, which may be tied to others
        self.words = words

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, L] -> [B, L, width]; negative ids are those of learned words."""
        if not self.words:
            return super().forward(ids)
        tokens = super().forward(ids.clamp(min=0))
        learned = self.words.table().to(tokens)[(-1 - ids).clamp(min=0)]
        return torch.where(ids[..., None] < 0, learned, tokens)


def says(text: str, word: str) -> bool:
    """Whether the text has the word, as a text encoder that has learned it finds it."""
    return re.search(_whole(word), text, re.IGNORECASE) is not None


def _whole(word: str) -> str:
    """A pattern for the word where no letter, digit or underscore goes on at either end of it."""
    start, end = (r"\w" if re.match(r"\w", word[i]) else "" for i in (0, -1))
    return (f"(?<!{start})" if start else "") + re.escape(word) + (f"(?!{end})" if end else "")
