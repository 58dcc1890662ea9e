"""A rename table: one entry for each tensor of ours, and the two functions that read it in either direction."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Modules = Iterable[tuple[str, str]]
"""(our module, their module): all parameters and buffers of the one have the same leaf names in the other."""


@dataclass(frozen=True)
class Entry:
    """One tensor of ours and what another layout makes of it.

    foreign: usually one name. how, with several names: "join" = ours is theirs joined along the first axis (fused
    q, k, v); "copies" = theirs are equal copies of ours. With one name: "same"; "matrix" = theirs is [O, I] where
    ours is a 1x1 convolution [O, I, 1, 1]; "transpose"; "halves" = the two halves of the first axis are swapped.
    """

    native: str
    foreign: tuple[str, ...]
    how: str = "same"


def entries(keys: Iterable[str], modules: Modules, special: Iterable[Entry] = ()) -> list[Entry]:
    """Entries for all of our `keys`: those of `special` as they are, the rest by their module's name.

    Raises ValueError for a key that neither names: a table must be whole.
    """
    fixed = {entry.native: entry for entry in special}
    renamed = dict(modules)

    def entry(key: str) -> Entry:
        module, _, leaf = key.rpartition(".")
        if key in fixed:
            return fixed[key]
        if module not in renamed:
            raise ValueError(f"the layout has no name for {key}")
        return Entry(key, (f"{renamed[module]}.{leaf}",))

    return [entry(key) for key in keys]


def to_native(table: Iterable[Entry], tensors: Mapping[str, Tensor], source: str) -> Tensors:
    """Their tensors under our names; nothing may be missing or left over.

    Raises ValueError, naming `source` and the tensors, if something is.
    """
    table = list(table)
    expected = [name for entry in table for name in entry.foreign]
    wrong = [f"missing {name}" for name in expected if name not in tensors]
    wrong += [f"unknown {name}" for name in tensors.keys() - set(expected)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{source} does not fit this model: {'; '.join(wrong[:3])}{more}")
    return {entry.native: _join(entry, [tensors[name] for name in entry.foreign], source) for entry in table}


def to_foreign(table: Iterable[Entry], tensors: Mapping[str, Tensor]) -> Tensors:
    """Our tensors under their names."""
    return {name: part for entry in table for name, part in _split(entry, tensors[entry.native])}


def fixed(config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], source: str) -> None:
    """Raise ValueError, naming `source` and the key, where a foreign config asks for what we do not vary."""
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise ValueError(f"{source}: {key} {config[key]!r} is not supported; it must be {values[0]!r}")


def _join(entry: Entry, parts: list[Tensor], source: str) -> Tensor:
    first, *rest = parts
    if entry.how == "join":
        return torch.cat(parts)
    if entry.how == "copies":
        different = [name for name, part in zip(entry.foreign[1:], rest, strict=True) if not torch.equal(part, first)]
        if different:
            raise ValueError(f"{source}: {different[0]} should equal {entry.foreign[0]} and does not")
        return first
    if entry.how == "matrix":
        return first if first.ndim == 4 else first[:, :, None, None]
    return _turned(entry, first)


def _split(entry: Entry, tensor: Tensor) -> list[tuple[str, Tensor]]:
    if entry.how == "join":
        return list(zip(entry.foreign, tensor.chunk(len(entry.foreign)), strict=True))
    if entry.how == "matrix":
        tensor = tensor[:, :, 0, 0]
    if entry.how == "copies":  # of their own: a file cannot hold one tensor under two names
        return [(name, tensor.clone()) for name in entry.foreign]
    return [(entry.foreign[0], _turned(entry, tensor))]


def _turned(entry: Entry, tensor: Tensor) -> Tensor:
    """What is the same in both directions."""
    if entry.how == "transpose":
        return tensor.T
    return torch.cat(tensor.chunk(2)[::-1]) if entry.how == "halves" else tensor
