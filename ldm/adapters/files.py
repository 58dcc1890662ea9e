"""Adapters in files: kohya's, diffusers', peft's and LyCORIS' in, the first three and our own out."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.adapters import bundled, peft_folder
from ldm.adapters.adapter import Adapter, Factors, folded, kind_of, rank_of, shape_of, without_core
from ldm.adapters.fused import PARTS
from ldm.checkpoints import facts
from ldm.checkpoints.files import all_finite, commit_file, save_tensors
from ldm.checkpoints.foreign import read_file
from ldm.checkpoints.layouts import lora
from ldm.checkpoints.layouts.lora import LEAVES, Network, Place
from ldm.checkpoints.model import BROKEN, KINDS, config_of, from_plain
from ldm.checkpoints.model import kind_of as kind_of_module
from ldm.names import known

DIALECTS = ("kohya", "diffusers", "peft", "native")
WITH_WORDS = ("kohya", "native")
"""Those with names for learned words."""
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
HASHES = ("sshs_model_hash", "modelspec.hash_sha256")
WHOLE: tuple[set[str], ...] = (
    {"down", "up"},
    {"down", "up", "magnitude"},
    {f"hada_w{i}_{x}" for i in (1, 2) for x in "ab"},
    *(first | second for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
      for second in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})),
)  # fmt: skip
"""The factors, besides alpha, that make one change."""


def read(path: str | Path, components: Mapping[str, nn.Module] | None = None) -> Adapter:
    """An adapter of any dialect: a .safetensors or pickled file, a peft folder, or a folder with diffusers' file.

    components: the model it is for, where names alone would not tell which layer is meant: files without our own
    record for networks of no published family. Tucker's cores are multiplied into the factors beside them, changes of
    fused projections taken apart. Raises ValueError naming the file for what it cannot be: keys of no dialect, a
    change or a word that is not whole or not finite.
    """
    path = Path(path)
    if (path / DIFFUSERS_FILE).is_file():
        path = path / DIFFUSERS_FILE
    tensors, metadata, configs = peft_folder.read(path) if path.is_dir() else _read_file(path)
    tensors, words = bundled.parted(tensors, path)
    found = {name: _whole(name, f, path) for name, f in _by_module(tensors, path).items()}
    for name, factors in found.items():
        peft_folder.scale(name, factors, configs)
    networks, names = _named(found, metadata, components or {}, path)
    parts: dict[str, dict[str, Factors]] = {}
    for name, factors in found.items():
        component, module, place = names[name]
        part = parts.setdefault(component, {})
        try:
            factors = _turned(module, factors) if place.turned else factors
            part |= _in_three(module, factors) if module.endswith(".qkv") else {module: factors}
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    plain = {str(k): str(v) for k, v in metadata.items() if k not in ("ldm", "format", peft_folder.METADATA)}
    return Adapter(parts, {name: networks[name] for name in parts}, plain, words)


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, dict[str, Any]]]:
    if not path.is_file():
        raise ValueError(f"no adapter at {str(path)!r}: it is neither a file nor a folder of peft's or diffusers'")
    tensors, metadata = read_file(path)
    return tensors, metadata, peft_folder.configs_of(metadata, path)


def _by_module(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """Factors by the module's name in the file."""
    ends = "|".join(re.escape(leaf) for leaf in sorted(LEAVES, key=len, reverse=True))
    pattern = re.compile(rf"(.+)\.({ends})")
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = pattern.fullmatch(key)
        if match is None:
            unknown.append(key)
        else:
            found.setdefault(match[1], {})[LEAVES[match[2]]] = tensor.float()
    _refuse(unknown, path)
    return found


def _refuse(unknown: list[str], path: Path) -> None:
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(f"{path} is no adapter that is known here: it has {', '.join(unknown[:3])}{more}")


def _whole(name: str, factors: dict[str, Tensor], path: Path) -> Factors:
    """The factors of one module, plain and checked; alpha is the rank where the file has none."""
    bad = [key for key, tensor in factors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"{path} holds NaN or infinity, first in {name}")
    shapeless = any(t.ndim < 2 or not t.numel() for key, t in factors.items() if key not in ("alpha", "magnitude"))
    if shapeless or ("alpha" in factors and factors["alpha"].numel() != 1):
        raise ValueError(f"{path}: the factors of {name} are no matrices with a number alpha")
    try:
        factors = without_core(factors)
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {error}") from error
    if factors.keys() - {"alpha"} not in WHOLE:
        raise ValueError(f"{path}: {name} has only {', '.join(sorted(factors))}, which is no whole change")
    made = {key: tensor for key, tensor in factors.items() if key not in ("alpha", "magnitude")}
    for left, right in (("up", "down"), *((f"{w}_a", f"{w}_b") for w in ("hada_w1", "hada_w2", "lokr_w1", "lokr_w2"))):
        if left in made and made[left].shape[1] != made[right].shape[0]:
            raise ValueError(
                f"{path}: the factors of {name} have {made[left].shape[1]} and {made[right].shape[0]} ranks"
            )
    shapes = {(made[f"hada_w{i}_a"].shape[0], made[f"hada_w{i}_b"].shape[1]) for i in (1, 2) if "hada_w1_a" in made}
    if len(shapes) > 1:
        raise ValueError(f"{path}: the two products of {name} have different shapes")
    made["alpha"] = factors.get("alpha", torch.tensor(float(rank_of(made) or 1))).reshape(())
    if "magnitude" in factors:
        magnitude, outputs = factors["magnitude"], shape_of(made)[0]
        if magnitude.numel() != outputs or (magnitude.ndim == 2 and magnitude.shape[0] == 1 < outputs):
            raise ValueError(f"{path}: the magnitudes of {name} are not one an output, and no others are known here")
        made["magnitude"] = magnitude.flatten()
    return made


def _named(
    found: Mapping[str, Factors], metadata: Mapping[str, Any], components: Mapping[str, nn.Module], path: Path
) -> tuple[dict[str, Network], dict[str, tuple[str, str, Place]]]:
    """The networks that the file's names are of, and what each name means in them."""
    recorded = _recorded(metadata)
    given = {name: (kind_of_module(components[name]), config_of(components[name])) for name in components}
    given = {name: network for name, network in given.items() if name in ("denoiser", "text")}
    for networks in filter(None, (recorded, given)):
        names = lora.index(networks)
        if found.keys() <= names.keys():
            return networks, names
    networks = lora.infer({name: shape_of(factors) for name, factors in found.items()})
    names = lora.index(networks)
    _refuse([name for name in found if name not in names], path)
    return networks, names


def _recorded(metadata: Mapping[str, Any]) -> dict[str, Network]:
    """The networks that a file of ours was written for; none for a file of others."""
    try:
        written = facts.recorded(metadata).get("components", {})
        return {name: (c["kind"], from_plain(KINDS[c["kind"]][1], c["config"])) for name, c in written.items()}
    except (*BROKEN, ValueError):
        return {}


ROWS = ("up", "magnitude", "hada_w1_a", "hada_w2_a")
"""Factors with a row for each output."""


def _turned(module: str, factors: Factors) -> Factors:
    """With the two halves of the outputs swapped. Raises ValueError where the factors do not come apart so."""
    if kind_of(factors) == "lokr":
        raise ValueError(f"a LoKr of {module} cannot be moved between programs: its halves are not theirs")
    return {k: torch.cat(t.chunk(2)[::-1]) if k in ROWS else t for k, t in factors.items()}


def _in_three(module: str, factors: Factors) -> dict[str, Factors]:
    """The change of a fused projection as those of its parts. Raises ValueError where it does not come apart so."""
    if kind_of(factors) == "lokr" or shape_of(factors)[0] % 3:
        raise ValueError(
            f"a {kind_of(factors)} of {module}, {shape_of(factors)[0]} outputs, does not come apart in q, k and v"
        )
    thirds = {k: t.chunk(3) for k, t in factors.items() if k in ROWS}
    return {f"{module}.{x}": factors | {k: t[i] for k, t in thirds.items()} for i, x in enumerate(PARTS)}


def write(
    adapter: Adapter,
    path: str | Path,
    to: str,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an adapter, atomically: to kohya (AUTOMATIC1111, ComfyUI), diffusers, peft or native.

    kohya and native are a .safetensors file, diffusers that or a folder, peft a folder, with one more within for
    each component where there are several. metadata: of the file, by default the adapter's own (`ldm.adapters.facts`
    makes it). dtype: of the factors, by default float32. Raises ValueError for what the dialect has no words for, and
    for numbers that are not finite in that type.
    """
    place = destination(path, to)
    if adapter.words and to not in WITH_WORDS:
        raise ValueError(f"{to} has no names for learned words, and the adapter brings {', '.join(adapter.words)}")
    if not adapter.parts and to not in WITH_WORDS:
        raise ValueError(f"the adapter changes no layer: there is nothing in it that {to} has names for")
    told = {k: v for k, v in (adapter.metadata if metadata is None else metadata).items() if k not in HASHES}
    dtype = dtype or torch.float32
    for component, part in adapter.parts.items():
        for module, factors in part.items():
            if not all_finite({name: tensor.to(dtype) for name, tensor in factors.items()}):
                raise ValueError(
                    f"{component}.{module} of the adapter has no finite numbers in {dtype}; nothing is written"
                )
    if to == "peft":
        peft_folder.write(adapter, _as_theirs(adapter), place, dtype)
        return
    words = bundled.tensors_of(adapter.words)
    if not all_finite({name: table.to(dtype) for name, table in words.items()}):
        raise ValueError(f"the words of the adapter have no finite numbers in {dtype}; nothing is written")
    tensors = {"kohya": _kohya, "diffusers": _diffusers, "native": native_tensors}[to](adapter)
    record = record_of(adapter)
    tensors = {name: t if name.endswith("alpha") else t.to(dtype) for name, t in tensors.items()}
    with commit_file(place) as stage:
        save_tensors(stage, tensors, record, {"format": "pt"} | told)
        if to == "kohya":  # the hash is of the tensors' bytes, which must be written to be known
            save_tensors(stage, tensors, record, {"format": "pt"} | told | _hashes(stage))


def destination(path: str | Path, to: str) -> Path:
    """The file or folder that `write` would make. Raises ValueError for an unknown dialect or another suffix."""
    path = Path(path)
    known("dialect", to, DIALECTS)
    if to == "diffusers" and path.suffix != ".safetensors":
        return path / DIFFUSERS_FILE
    if (path.suffix == ".safetensors") == (to == "peft"):
        kind = "folder" if to == "peft" else ".safetensors file"
        raise ValueError(f"an adapter for {to} is a {kind}, not {path.name!r}")
    return path


def _hashes(file: Path) -> dict[str, str]:
    """kohya's names for the sha256 of what follows a safetensors' header."""
    with file.open("rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return dict(zip(HASHES, (digest, f"0x{digest}"), strict=True))


def _as_theirs(adapter: Adapter) -> dict[str, dict[str, tuple[Place, Factors]]]:
    """component -> module -> its place in other programs, and its factors as they have them."""
    made: dict[str, dict[str, tuple[Place, Factors]]] = {}
    for component, part in adapter.parts.items():
        places = lora.places(adapter.networks[component], part)
        made[component] = {
            module: (places[module], _as_placed(module, factors, places[module])) for module, factors in part.items()
        }
    return made


def _as_placed(module: str, factors: Factors, place: Place) -> Factors:
    factors = _turned(module, factors) if place.turned else factors
    if place.matrix and "down" in factors:  # a 1x1 convolution of ours
        return factors | {"down": factors["down"].flatten(1), "up": factors["up"].flatten(1)}
    return factors


def _kohya(adapter: Adapter) -> dict[str, Tensor]:
    if cut := [word for word in adapter.words if "." in word]:
        raise ValueError(f"kohya's readers take the word {cut[0]!r} to end at its dot; write it as native")
    tensors = {}
    for component, part in _as_theirs(adapter).items():
        for module, (place, factors) in part.items():
            name = lora.kohya_name(component, adapter.networks[component], module, place)
            for factor, tensor in factors.items():
                if factor == "magnitude":  # one number an output, in the shape of the weight
                    tensor = tensor.view(-1, *(1,) * (factors["down"].ndim - 1))
                tensors[f"{name}.{lora.KOHYA.get(factor, factor)}"] = tensor
    return tensors | bundled.tensors_of(adapter.words)


def _diffusers(adapter: Adapter) -> dict[str, Tensor]:
    """With alpha / rank in the factors, so that nobody needs to know it."""
    tensors: dict[str, Tensor] = {}
    for component, part in _as_theirs(adapter).items():
        for module, (place, factors) in part.items():
            if "down" not in factors:
                raise ValueError(f"diffusers has no names for a {kind_of(factors)}; write it to kohya or peft")
            name = lora.diffusers_name(component, adapter.networks[component], module, place)
            for leaf, tensor in peft_folder.leaves(folded(factors)).items():
                # The library writes magnitudes without .weight, and then does not find those of its text encoder.
                whole = leaf if leaf.endswith(".weight") else f"{leaf}.weight"
                tensors[f"{name}.{whole}"] = tensor
    return tensors


def record_of(adapter: Adapter) -> dict[str, Any]:
    """What our files say of the networks that the adapter is for."""
    return {"components": {n: {"kind": k, "config": asdict(c)} for n, (k, c) in adapter.networks.items()}}


def native_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Every factor by component, native module and its own name; words as in the files of others."""
    factors = {
        f"{component}.{module}.{factor}": tensor
        for component, part in adapter.parts.items()
        for module, factors in part.items()
        for factor, tensor in factors.items()
    }
    return factors | bundled.tensors_of(adapter.words)
