"""Weighted prompts of any length -> Conditioning, as AUTOMATIC1111 reads them.

A CLIP encoder reads 75 tokens at a time: a long prompt is encoded in chunks whose contexts follow each other. Weights
multiply the rows of the context; in each chunk the mean of all its values is then put back to what it was.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.text import TextEncoder, TextPair, Tokenizer
from ldm.models.transformers_text import TransformersText
from ldm.prompts.grammar import pieces
from ldm.types import Conditioning

BACKTRACK = 20
"""A full chunk ends at its last comma if at most so many tokens, the comma included, would move to the next."""

Tokens = list[tuple[int, float]]
"""Ids and how much each counts."""


def encode(encoder: nn.Module, texts: Sequence[str], skip: int | None = None) -> Conditioning:
    """B texts with attention weights and BREAKs -> Conditioning with context [B, L, D], each distinct text read once.

    Texts of different numbers of chunks get a mask, which hides what a text does not have, so that no text changes
    what another gives. Every chunk is read by itself: a plain text that fits one gives what `encoder([text])` gives,
    to the byte, whatever it is encoded with. pooled is that of the first chunk, without weights.
    An encoder without chunks (T5) has its rows multiplied, and BREAK is a space; one of no known kind is given plain
    texts as they are.

    skip: last blocks of a CLIP encoder that the context leaves out (AUTOMATIC1111's "clip skip" less 1); None = the
    encoder's own. Raises ValueError for a skip that it cannot do, a text that is too long for an encoder without
    chunks, weights that an unknown encoder cannot have, and as `pieces` does.
    """
    check_skip(encoder, skip)
    distinct = list(dict.fromkeys(texts))
    told = same_length(_read(encoder, distinct, skip))
    row = {text: i for i, text in enumerate(distinct)}
    return Conditioning.cat(told)[[row[text] for text in texts]]


def token_count(encoder: nn.Module, text: str) -> tuple[int, int]:
    """How many tokens a text takes, and how many the chunks that it needs can hold: (80, 150).

    Start and end are not counted; a chunk that is left before it is full counts fully. An encoder of no known kind
    counts nothing: (0, 0).
    """
    if isinstance(encoder, TransformersText):
        return len(_weighted_tokens(encoder, text)), encoder.room
    if isinstance(encoder, TextPair):
        return token_count(encoder.first, text)
    if not isinstance(encoder, TextEncoder):
        return 0, 0
    room, found = encoder.tokenize.context_length - 2, chunks(encoder.tokenize, text)
    return room * (len(found) - 1) + len(found[-1]), room * len(found)


def chunks(tokenize: Tokenizer, text: str) -> list[Tokens]:
    """The tokens of a text in chunks of at most context_length - 2, one at least; BREAK begins a new one.

    A learned word is never torn apart. A full chunk is left at its last comma if that is near.
    """
    room, comma = tokenize.context_length - 2, tokenize.bpe.encoder[",</w>"]
    found: list[Tokens] = []
    for group in pieces(text):
        found.append([])
        for piece in group:
            for unit in tokenize.units(piece.text):
                if len(found[-1]) + len(unit) > room:
                    full = len(found[-1]) == room and unit != (comma,)
                    found.append(_taken_after(comma, found[-1]) if full else [])
                if len(found[-1]) + len(unit) > room:  # what moved leaves no room for a learned word
                    found.append([])
                found[-1] += [(token, piece.weight) for token in unit]
    return found[:-1] if len(found) > 1 and not found[-1] else found


def same_length(parts: Iterable[Conditioning]) -> list[Conditioning]:
    """The same with contexts of one length: shorter ones are filled up with rows of zeros that a mask hides.

    Conditionings of one length are passed as they are, but get a mask each if one of them has one.
    """
    parts = list(parts)
    if any(part.context is None for part in parts):
        return parts
    longest = max((part.context.shape[1] for part in parts if part.context is not None), default=0)
    masked = any(part.mask is not None or _length(part) < longest for part in parts)
    return [_filled(part, longest) if masked else part for part in parts]


def _read(encoder: nn.Module, texts: list[str], skip: int | None) -> list[Conditioning]:
    """One conditioning of one row a text."""
    if isinstance(encoder, TextPair):
        pairs = zip(_read(encoder.first, texts, skip), _read(encoder.second, texts, skip), strict=True)
        return [Conditioning(context=torch.cat([_context(a), _context(b)], dim=-1), pooled=b.pooled) for a, b in pairs]
    if isinstance(encoder, TransformersText):
        return [_whole(encoder, text) for text in texts]
    if isinstance(encoder, TextEncoder):
        return _chunked(encoder, texts, skip)
    return [_plain(encoder, text) for text in texts]


def _chunked(encoder: TextEncoder, texts: list[str], skip: int | None) -> list[Conditioning]:
    known: dict[tuple[int, ...], Conditioning] = {}
    told = []
    for text in texts:
        parts = []
        for chunk in chunks(encoder.tokenize, text):
            ids = tuple(token for token, _ in chunk)
            if ids not in known:
                known[ids] = encoder.read(encoder.tokenize.rows([ids]), skip)
            parts.append((known[ids], [1.0, *(weight for _, weight in chunk)]))
        context = torch.cat([_emphasised(_context(part), weights) for part, weights in parts], dim=1)
        told.append(Conditioning(context=context, pooled=parts[0][0].pooled))
    return told


def _whole(encoder: TransformersText, text: str) -> Conditioning:
    check_texts(encoder, [text])
    tokens = _weighted_tokens(encoder, text)
    told: Conditioning = encoder.read(*encoder.rows([[token for token, _ in tokens]]))
    weights = [*[1.0] * len(encoder.start), *(weight for _, weight in tokens)]
    return replace(told, context=_context(told) * _rows(weights, _context(told)))


def _plain(encoder: nn.Module, text: str) -> Conditioning:
    check_texts(encoder, [text])
    (only,) = pieces(text)
    told: Conditioning = encoder(["".join(piece.text for piece in only)])
    return told


def _weighted_tokens(encoder: TransformersText, text: str) -> Tokens:
    """The text is made tokens of as a whole; each counts as the piece does in which it ends."""
    groups = pieces(text)
    whole = " ".join("".join(piece.text for piece in group) for group in groups)
    weights: list[float] = []  # of each character
    for number, group in enumerate(groups):
        weights += [1.0] * (number > 0)
        weights += [piece.weight for piece in group for _ in piece.text]
    return [(token, weights[place]) for token, place in encoder.tokens(whole)]


def _taken_after(comma: int, chunk: Tokens) -> Tokens:
    """What comes after the last comma of a full chunk, taken from it; nothing if the comma is not near the end."""
    near = [i for i, (token, _) in enumerate(chunk) if token == comma and len(chunk) - i <= BACKTRACK]
    taken = chunk[near[-1] + 1 :] if near else []
    del chunk[len(chunk) - len(taken) :]
    return taken


def _emphasised(context: Tensor, weights: list[float]) -> Tensor:
    """Rows [1, L, D] times their weights, the rest 1, then all scaled so that the mean is the one before.

    Where rows agree in the sign of their means, the mean changes by a factor between the least and the largest
    weight. Another factor says that the means cancel, as they can after a layer norm; then nothing is scaled.
    """
    if all(weight == 1 for weight in weights):
        return context
    before = context.to(torch.promote_types(context.dtype, torch.float32))
    after = before * _rows(weights, before)
    mean, changed = before.mean(), after.mean()
    factor = (changed / mean).detach()
    sound = (factor > 0) & (factor >= min(1, *weights)) & (factor <= max(1, *weights))
    return (after * (torch.where(sound, mean, 1) / torch.where(sound, changed, 1))).to(context)


def _rows(weights: list[float], context: Tensor) -> Tensor:
    """[L, 1], filled up with 1 to the length of the context [1, L, D]."""
    return F.pad(torch.tensor(weights), (0, context.shape[1] - len(weights)), value=1.0).to(context)[:, None]


def check_skip(encoder: nn.Module, skip: int | None) -> None:
    """Raise ValueError for a clip skip that the encoder cannot do."""
    if skip is None:
        return
    towers = [encoder.first, encoder.second] if isinstance(encoder, TextPair) else [encoder]
    for tower in towers:
        if not isinstance(tower, TextEncoder):
            raise ValueError(f"clip skip is for CLIP text encoders, and this one is a {type(tower).__name__}")
        if not 0 <= skip < tower.config.layers:
            allowed = tower.config.layers - 1
            raise ValueError(f"skip must be in 0..{allowed} for a text encoder of {allowed + 1} layers, not {skip}")


def check_texts(encoder: nn.Module, texts: Iterable[str]) -> None:
    """Raise ValueError for a text that the encoder cannot read: too long for one without chunks, or with weights."""
    if isinstance(encoder, TextEncoder):
        return
    if isinstance(encoder, TextPair):
        texts = list(texts)
        check_texts(encoder.first, texts)
        check_texts(encoder.second, texts)
        return
    for text in texts:
        if isinstance(encoder, TransformersText):
            count = len(_weighted_tokens(encoder, text))
            if count > encoder.room:
                raise ValueError(
                    f"the prompt has {count} tokens, and this text encoder reads {encoder.room} at most: {text[:60]!r}"
                )
        elif any(piece.weight != 1 for group in pieces(text) for piece in group) or len(pieces(text)) > 1:
            raise ValueError(f"{type(encoder).__name__} reads plain prompts, without weights or BREAK: {text[:60]!r}")


def _context(told: Conditioning) -> Tensor:
    assert told.context is not None
    return told.context


def _length(told: Conditioning) -> int:
    return _context(told).shape[1]


def _filled(told: Conditioning, length: int) -> Conditioning:
    context, missing = _context(told), length - _length(told)
    mask = told.mask if told.mask is not None else context.new_ones(context.shape[:2], dtype=torch.bool)
    return replace(told, context=F.pad(context, (0, 0, 0, missing)), mask=F.pad(mask, (0, missing), value=False))
