"""Whether there is room for what is asked, estimated before it is begun."""

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.options import Models

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline, Request

DECODER_MAPS, UNET_MAPS = 4, 8
"""Maps that are held at once where maps are largest: a block's input, its norm, its convolution's output, their sum; in
a U-Net also what its transformers make of them. Measured on a CPU: within 1.2 times for decoders of 512 px, 1.7 for
U-Nets."""
UNUSED = re.compile(r"safety_checker|optimizer|(^|/)train/|model_ema")


def check_weights(models: Models, device: str) -> None:
    """Raise ValueError if the weights alone are more than is free where they are to be."""
    path, free = Path(models.model), free_bytes(device)
    dtype = models.torch_dtype()
    itemsize = dtype.itemsize if dtype is not None else 4 if device == "cpu" else 0
    needed = weight_bytes(path, itemsize)
    if free is not None and needed > free and not (models.low_memory and device != "cpu"):
        ways = ["--dtype bf16"] * (itemsize != 2) + ["--low-memory"] * (device != "cpu") + ["a smaller model"]
        raise ValueError(
            f"the weights of {path} take about {_size(needed)}, and {_size(free)} are free on {device}: "
            f"try {', '.join(ways)}"
        )


def check_activations(pipeline: "Pipeline", request: "Request", device: str, *, low_memory: bool) -> None:
    """Raise ValueError if drawing a batch takes more than is free now, the weights being loaded."""
    free, needed = free_bytes(device), activation_bytes(pipeline, request, low_memory=low_memory)
    if free is not None and needed > free:
        width, height = _largest(pipeline, request)
        ways = ["--low-memory"] * (not low_memory) + ["a smaller --batch"] * (len(request.prompts) > 1)
        raise ValueError(
            f"{len(request.prompts)} pictures of {width}x{height} px at a time take about {_size(needed)} beside the"
            f" weights, and {_size(free)} are free on {device}: try {', '.join([*ways, 'a smaller --size'])}"
        )


def free_bytes(device: str) -> int | None:
    """Memory that can still be taken on a device; None where that cannot be told."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB", lines, re.MULTILINE)
    return int(match[1]) * 1024 if match and device == "cpu" else None


def weight_bytes(path: Path, itemsize: int = 0) -> int:
    """Bytes of the weights in a model file or folder, each number `itemsize` bytes; 0 is as they are stored.

    Of safetensors by their headers; of pickles the size of the file. Of a folder, all that is in it, but in each
    subfolder one variant: whole before fp16, safetensors before pickles.
    """
    if path.is_file():
        return _file_bytes(path, itemsize)
    by_folder: dict[Path, dict[tuple[bool, bool], int]] = {}
    for file in path.rglob("*"):
        if file.suffix in (".safetensors", ".bin") and not UNUSED.search(file.relative_to(path).as_posix()):
            variant = file.suffix == ".bin", "fp16" in file.name
            sizes = by_folder.setdefault(file.parent, {})
            sizes[variant] = sizes.get(variant, 0) + _file_bytes(file, itemsize)
    return sum(sizes[min(sizes)] for sizes in by_folder.values())


def activation_bytes(pipeline: "Pipeline", request: "Request", *, low_memory: bool) -> int:
    """What drawing one batch holds besides weights, by the largest maps of the denoiser or, if more, the decoder.

    A U-Net also holds what it hands across; with guidance its rows are twice as many. With low memory pictures are
    decoded one at a time and in tiles of 512 px. Of networks of other kinds than are known nothing is counted.
    """
    width, height = _largest(pipeline, request)
    factor, rows = pipeline.autoencoder.factor, len(request.prompts)
    guided = 2 if request.guidance != 1 or request.plus_plus else 1
    denoiser = guided * rows * _denoiser_numbers(pipeline.denoiser, height // factor, width // factor)
    decoder = _decoder_numbers(pipeline.autoencoder, height, width) * rows
    if low_memory:
        decoder = _decoder_numbers(pipeline.autoencoder, min(height, 512), min(width, 512))
    sizes = (next(module.parameters()).element_size() for module in (pipeline.denoiser, pipeline.autoencoder))
    return max(numbers * size for numbers, size in zip((denoiser, decoder), sizes, strict=True))


def _denoiser_numbers(denoiser: Any, height: int, width: int) -> int:
    """Numbers that one row of [h, w] latents makes it hold."""
    config: Any = getattr(denoiser, "config", None)
    if hasattr(config, "multipliers"):  # a U-Net
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        areas = [math.ceil(height / 2**i) * math.ceil(width / 2**i) for i in range(len(widths))]
        across = sum((config.blocks + 1) * channels * area for channels, area in zip(widths, areas, strict=True))
        joined = max((a + b) * area for a, b, area in zip(widths, [*widths[1:], widths[-1]], areas, strict=True))
        return across + UNET_MAPS * joined
    patch = getattr(config, "patch", 1)
    tokens = (height // patch) * (width // patch)
    return tokens * getattr(config, "width", 0) * UNET_MAPS  # the feed-forward is 4 times as wide


def _decoder_numbers(autoencoder: Any, height: int, width: int) -> int:
    """Numbers that decoding one picture of [H, W] px holds."""
    config: Any = getattr(autoencoder, "config", None)
    if not hasattr(config, "multipliers"):
        return 0
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    largest = max(
        max(pair) * (height >> level) * (width >> level)
        for level, pair in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True))  # what comes from below
    )
    return DECODER_MAPS * largest


def _largest(pipeline: "Pipeline", request: "Request") -> tuple[int, int]:
    """Width and height of the last pass, px."""
    width, height = pipeline.size_of(request)
    scale = 1.0 if request.upscale is None else request.upscale.scale
    return round(width * scale), round(height * scale)


def _file_bytes(path: Path, itemsize: int) -> int:
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return size
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(min(size, int.from_bytes(file.read(8), "little"))))
        shapes = [(t["shape"], t["data_offsets"]) for name, t in header.items() if name != "__metadata__"]
        stored = (math.prod(shape) * itemsize if itemsize else end - start for shape, (start, end) in shapes)
        return sum(stored)
    except (ValueError, TypeError, KeyError, AttributeError):  # damaged: for the loader to say
        return size


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
