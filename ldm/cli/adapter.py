"""`ldm adapter`: LoRA and its kin merged, extracted, resized, combined, converted, inspected."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ldm.adapters.adapter import Adapter
    from ldm.checkpoints.textual_inversion import TextualInversion

app = typer.Typer(no_args_is_help=True)
DTYPES = ("float32", "float16", "bfloat16")

Source = Annotated[Path, typer.Argument(help="A file or folder of kohya's, diffusers', peft's or our own.")]
Weighted = Annotated[list[str], typer.Argument(help="Adapters, each with its weight: FILE or FILE:0.8.")]
Target = Annotated[Path, typer.Argument(help="A new .safetensors file, or a new folder.")]
To = Annotated[str, typer.Option(help="kohya (A1111, ComfyUI), diffusers, peft or native.")]
Dtype = Annotated[str, typer.Option(help="Of the tensors: float32, float16 or bfloat16.")]


@app.command()
def merge(
    model: Annotated[Path, typer.Argument(help="A run or model folder, a folder of diffusers, or a single file.")],
    adapters: Weighted,
    out: Annotated[Path, typer.Option(help="The new model: a folder, or a .safetensors file for compvis.")],
    to: Annotated[str, typer.Option(help="native, compvis or diffusers.")] = "native",
) -> None:
    """Write a model with adapters in its weights for good; words of theirs and of its own go to files of their own.

    Example: ldm adapter merge sd15 zorp.safetensors:0.8 --out sd15-zorp
    """
    from ldm.adapters import bundled, files
    from ldm.adapters.lora import merge as put_into
    from ldm.checkpoints import convert as conversion
    from ldm.checkpoints.load import load_model
    from ldm.names import known

    known("format", to, conversion.FORMATS)
    _check_new(out)
    if (to == "compvis") != (out.suffix == ".safetensors"):
        raise ValueError(f"--to {to} writes a {'.safetensors file' if to == 'compvis' else 'folder'}, not {out.name!r}")
    loaded = load_model(model)
    read = [(files.read(path, loaded.components), weight) for path, weight in map(_weighted, adapters)]
    every = bundled.united([bundled.word_in(loaded.folder), *(adapter.words for adapter, _ in read)])
    words = bundled.by_themselves(every, out.parent)
    for adapter, weight in read:
        put_into(loaded.components, adapter, weight)
    for note in loaded.notes + conversion.write(loaded, out, to):
        typer.echo(f"note: {note}")
    typer.echo(f"{out}: {model} with {', '.join(adapters)}")
    _write_words(words, "a model")


@app.command()
def extract(
    tuned: Annotated[Path, typer.Argument(help="The model that has learned something.")],
    base: Annotated[Path, typer.Argument(help="The model that it started from.")],
    target: Target,
    rank: Annotated[int, typer.Option(help="Of the LoRA, at most.")] = 16,
    to: To = "kohya",
    dtype: Dtype = "float32",
) -> None:
    """The LoRA that is nearest to what one model has over another; it brings the word that the model was taught.

    Example: ldm adapter extract my-sd15 sd15 mine.safetensors --rank 32
    """
    from ldm.adapters import bundled
    from ldm.adapters.adapter import COMPONENTS
    from ldm.adapters.algebra import extract as taken
    from ldm.checkpoints.load import load_model

    _check_target(target, to, dtype)
    mine, theirs = (load_model(path, COMPONENTS) for path in (tuned, base))
    adapter = taken(mine.components, theirs.components, rank)
    _write(replace(adapter, words=bundled.word_in(mine.folder)), target, to, dtype)


@app.command()
def resize(
    source: Source,
    target: Target,
    rank: Annotated[int, typer.Option(help="The new rank, at most.")],
    to: To = "kohya",
    dtype: Dtype = "float32",
) -> None:
    """The nearest LoRA of a smaller rank.

    Example: ldm adapter resize big.safetensors small.safetensors --rank 8
    """
    from ldm.adapters import algebra, files

    _check_target(target, to, dtype)
    _write(algebra.resize(files.read(source), rank), target, to, dtype)


@app.command()
def combine(
    adapters: Weighted,
    out: Annotated[Path, typer.Option(help="A new .safetensors file, or a new folder.")],
    rank: Annotated[int, typer.Option(help="Of the result, at most; 0 = the sum of all ranks, exact.")] = 0,
    to: To = "kohya",
    dtype: Dtype = "float32",
) -> None:
    """One LoRA that is the weighted sum of several.

    Example: ldm adapter combine zorp.safetensors:0.7 ink.safetensors:0.5 --out both.safetensors
    """
    from ldm.adapters import algebra, files

    _check_target(out, to, dtype)
    read = [(files.read(path), weight) for path, weight in map(_weighted, adapters)]
    _write(algebra.combine(read, rank or None), out, to, dtype)


@app.command()
def convert(
    source: Source,
    target: Target,
    to: To,
    model: Annotated[Path | None, typer.Option(help="The model it is for, if its names do not tell.")] = None,
    dtype: Dtype = "float32",
) -> None:
    """Write an adapter in another dialect.

    Example: ldm adapter convert pytorch_lora_weights.safetensors zorp.safetensors --to kohya --dtype float16
    """
    from ldm.adapters import files
    from ldm.adapters.adapter import COMPONENTS
    from ldm.checkpoints.load import load_model

    _check_target(target, to, dtype)
    components = load_model(model, COMPONENTS).components if model else None
    _write(files.read(source, components), target, to, dtype)


@app.command()
def inspect(source: Source) -> None:
    """Say what an adapter is: kind, base, ranks, layers, metadata."""
    from ldm.adapters import files
    from ldm.adapters.adapter import base_of

    adapter = files.read(source)
    numbers = sum(tensor.numel() for part in adapter.parts.values() for f in part.values() for tensor in f.values())
    layers = ", ".join(f"{len(part)} of the {name}" for name, part in adapter.parts.items())
    ranks = ", ".join(str(rank) if rank else "whole" for rank in adapter.ranks)
    if adapter.parts:
        typer.echo(f"{source}: {adapter.kind} for {base_of(adapter) or 'a base that its tensors do not tell'}")
        typer.echo(f"rank {ranks}; layers: {layers}; {numbers:,} numbers")
    else:
        typer.echo(f"{source}: words alone")
    for word, tables in adapter.words.items():
        typer.echo(
            f"brings the word {word!r}: {len(tables[0])} vectors, {' + '.join(str(t.shape[1]) for t in tables)} wide"
        )
    for key, value in sorted(adapter.metadata.items()):
        typer.echo(f"  {key}: {value if len(value) <= 100 else value[:100] + '...'}")


def _weighted(told: str) -> tuple[Path, float]:
    """A file and its weight, 1 where none is given."""
    name, colon, weight = told.rpartition(":")
    if not colon or Path(told).exists():
        return Path(told), 1.0
    try:
        return Path(name), float(weight)
    except ValueError:
        raise ValueError(f"{weight!r} in {told!r} is no weight; write FILE:0.8") from None


def _check_new(target: Path) -> None:
    if target.exists():
        raise ValueError(f"{target} exists; nothing is overwritten")


def _check_target(target: Path, to: str, dtype: str) -> None:
    """Before any work."""
    from ldm.adapters.files import destination
    from ldm.names import known

    _check_new(target)
    destination(target, to)
    known("dtype", dtype, DTYPES)


def _write(adapter: "Adapter", target: Path, to: str, dtype: str) -> None:
    """Write it with what its tensors say in the metadata, words beside it if they must be, and say what was written."""
    import torch

    from ldm.adapters import bundled, files
    from ldm.adapters.facts import metadata

    words = {}
    if to not in files.WITH_WORDS:
        words, adapter = bundled.by_themselves(adapter.words, target.parent), replace(adapter, words={})
    kept = {"title": "modelspec.title", "resolution": "modelspec.resolution"}
    stated = {name: adapter.metadata[key] for name, key in kept.items() if key in adapter.metadata}
    told = dict(adapter.metadata) | metadata(adapter, {"title": target.stem} | stated)
    files.write(adapter, target, to, told, getattr(torch, dtype))
    layers = sum(len(part) for part in adapter.parts.values())
    said = f"{adapter.kind}, rank {', '.join(map(str, adapter.ranks))}, {layers} layers" if layers else "words alone"
    typer.echo(f"{target}: {said}")
    _write_words(words, to)


def _write_words(words: "Mapping[Path, TextualInversion]", what: str) -> None:
    """Words by themselves, each said."""
    from ldm.adapters import bundled

    bundled.write_words(words)
    for path, inversion in words.items():
        typer.echo(f"{path}: the word {inversion.word!r} by itself, which {what} has no place for")
