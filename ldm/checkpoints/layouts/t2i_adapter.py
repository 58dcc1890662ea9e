"""What diffusers and TencentARC's own files call the parts of a T2I-adapter."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ldm.checkpoints.layouts.table import Entry, Shapes, entries, fixed
from ldm.models.t2i_adapter import T2IAdapterConfig


def diffusers(config: T2IAdapterConfig, keys: Iterable[str]) -> list[Entry]:
    """The table for T2IAdapter."""
    return _table(config, keys, "adapter.", lambda i: f"body.{i}", lambda i, j: f"body.{i}.resnets.{j}")


def original(config: T2IAdapterConfig, keys: Iterable[str]) -> list[Entry]:
    """The table for TencentARC's files: all blocks in one row, a level's change of width in its first block."""
    n = config.blocks
    return _table(config, keys, "", lambda i: f"body.{i * n}", lambda i, j: f"body.{i * n + j}")


def _table(
    config: T2IAdapterConfig,
    keys: Iterable[str],
    prefix: str,
    level: Callable[[int], str],
    block: Callable[[int, int], str],
) -> list[Entry]:
    """level: where theirs has the change of width of a level; block: where a block of it is."""
    modules = [("conv_in", f"{prefix}conv_in")]
    for i in range(len(config.channels)):
        modules.append((f"levels.{i}.project", f"{prefix}{level(i)}.in_conv"))
        for j in range(config.blocks):
            theirs = f"{prefix}{block(i, j)}.block"
            modules += [(f"levels.{i}.blocks.{j}.conv{k}", f"{theirs}{k}") for k in (1, 2)]
    return entries(keys, modules)


def from_diffusers(words: Mapping[str, Any], source: str) -> T2IAdapterConfig:
    """From the config.json of a T2IAdapter. Raises ValueError, naming `source`, for another kind of it."""
    fixed(words, {"adapter_type": ("full_adapter", "full_adapter_xl")}, source)
    return T2IAdapterConfig(
        tuple(words["channels"]),
        words["num_res_blocks"],
        words["in_channels"],
        words["downscale_factor"],
        words["adapter_type"] == "full_adapter_xl",
    )


def to_diffusers(config: T2IAdapterConfig) -> dict[str, Any]:
    """The config.json of a T2IAdapter."""
    return {
        "_class_name": "T2IAdapter",
        "adapter_type": "full_adapter_xl" if config.xl else "full_adapter",
        "channels": list(config.channels),
        "num_res_blocks": config.blocks,
        "in_channels": config.hint_channels,
        "downscale_factor": config.factor,
    }


def infer(shapes: Shapes) -> T2IAdapterConfig:
    """The config of TencentARC's file from names and shapes: 8 px a latent, 2 blocks a level, as all of them have.

    Raises ValueError for a file with other blocks, as light adapters have.
    """
    found = {int(match[1]): name for name in shapes if (match := re.fullmatch(r"body\.(\d+)\.block1\.weight", name))}
    widths = [shapes[found[i]][0] for i in sorted(found)]
    told = shapes.get("conv_in.weight", (0, 0))[1]  # 1 or 3 channels of 8 x 8 px, or of 16 x 16 in SDXL's
    whole = found and sorted(found) == [*range(len(found))] and widths[::2] == widths[1::2]
    if not whole or told not in (64, 192, 256, 768):
        raise ValueError("it is a T2I-adapter of another kind than those of full size for Stable Diffusion 1, 2 and XL")
    xl = told in (256, 768)
    factor = 16 if xl else 8
    return T2IAdapterConfig(tuple(widths[::2]), 2, told // factor**2, factor, xl)
