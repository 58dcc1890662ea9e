"""What a model file or folder is, for people: parts, sizes, types, and what does not fit."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.checkpoints import compvis, facts, textual_inversion
from ldm.checkpoints.files import read_json, read_tensors
from ldm.checkpoints.foreign import read_file
from ldm.checkpoints.load import base_of, find_model, format_of, load_model
from ldm.checkpoints.model import config_of, kind_of


def describe(path: str | Path) -> str:
    """Lines about the model, readable also when it does not load. Raises ValueError if there is none at all."""
    found = find_model(path)
    if textual_inversion.is_one(found):
        inversion = textual_inversion.read(found)
        sizes = " and ".join("x".join(map(str, v.shape)) for v in inversion.vectors)
        return f"{found}: a textual inversion for the word {inversion.word!r}, vectors {sizes}"
    lines = [f"{found}: {format_of(found)}"]
    if found.is_file():
        lines += _file(found)
    if (base := base_of(found)) is not None:
        lines += _put_on(found, base)
        if not read_json(found / "model.json")["components"]:
            return "\n".join(lines)
    try:
        model = load_model(found)
    except ValueError as error:
        return "\n".join([*lines, f"does not load: {error}"])
    for name, module in model.components.items():
        lines.append(_component(name, module))
    for key, value in model.settings.items():
        lines.append(f"  {key}: {value}")
    return "\n".join([*lines, *(f"  note: {note}" for note in model.notes)])


def _put_on(folder: Path, base: dict[str, Any]) -> list[str]:
    """What a fine-tuning added to a model, and to which."""
    lines = [f"  {base['settings'].get('method', 'something')}, trained on the model {base['model']}"]
    for file in sorted(folder.glob("*.safetensors")):
        tensors, _ = read_tensors(file)
        lines.append(f"  {file.name}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} numbers")
    return lines


def _component(name: str, module: nn.Module) -> str:
    count = sum(p.numel() for p in module.parameters())
    types = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters()})
    default = type(config_of(module))()
    differs = {k: v for k, v in vars(config_of(module)).items() if v != getattr(default, k)}
    return f"{name}: {kind_of(module)}, {count:,} parameters, {', '.join(types)}" + (
        f"; unlike Stable Diffusion 1: {_short(differs)}" if differs and len(str(differs)) < 600 else ""
    )


def _file(path: Path) -> list[str]:
    """Metadata, and for each part the tensors that are missing, unknown or of another shape."""
    tensors, metadata = read_file(path)
    lines = [f"  {key}: {_short(value)}" for key, value in sorted(metadata.items()) if key != "ldm"]
    types = Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())
    lines.append(f"  {len(tensors)} tensors: {', '.join(f'{n} {t}' for t, n in types.most_common())}")
    try:
        full = compvis.named(tensors, str(path))
        parts = compvis.find_parts(full, facts.recorded(metadata))
    except (ValueError, KeyError, IndexError):
        return lines
    for part in parts:
        lines += _misfits(part, {k: v for k, v in full.items() if k.startswith(part.prefixes)})
    unknown = compvis.left_over(full, parts)[1]
    return lines + ([f"  of no use here: {_list(unknown)}"] if unknown else [])


def _misfits(part: compvis.Part, tensors: dict[str, Tensor]) -> list[str]:
    expected = {name for entry in part.table() for name in entry.foreign}
    given = {k for k in tensors if not compvis.EXTRA.fullmatch(k)}
    found = [("missing", sorted(expected - given)), ("unknown", sorted(given - expected))]
    return [f"  {part.name}: {word} {_list(names)}" for word, names in found if names and part.kind != "dit"]


def _list(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 200 else f"{text[:200]}..."
