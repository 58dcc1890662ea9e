"""The options of `ldm generate` as they were typed, by what they are about."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ldm.cli.pictures import Pictures

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Models:
    """What is loaded."""

    model: str = ""
    lora: tuple[str, ...] = ()
    loras: str = ""
    embeddings: tuple[str, ...] = ()
    weak: str = ""
    classifier: str = ""
    clip: str = ""
    refiner: str = ""
    prediction: str = ""
    ema: bool = False
    dtype: str = ""
    low_memory: bool = False
    device: str = "auto"

    def torch_dtype(self) -> "torch.dtype | None":
        """What the weights are computed in; None leaves it to the model. Raises ValueError for an unknown word."""
        import torch

        from ldm.names import known

        return getattr(torch, DTYPES[known("dtype", self.dtype, DTYPES)]) if self.dtype else None


@dataclass(frozen=True)
class Drawing:
    """How an image is drawn."""

    negative: str = ""
    steps: int = 50
    sampler: str = "ddim"
    eta: float = 0.0
    variance: str = ""
    spacing: str = ""
    guidance: float = 5.0
    steer: tuple[str, ...] = ()
    upscale: float = 1.0
    upscale_by: str = "bicubic"
    upscale_strength: float = 0.7
    upscale_steps: int = 0
    refiner_switch: float = 0.8
    aesthetic: str = "6,2.5"
    clip_skip: int = 0
    plain: bool = False
    size: str = ""
    batch: int = 16

    def sides(self) -> tuple[int | None, int | None]:
        """Width and height of --size, "N" or "WxH"; "" is the model's own. Raises ValueError for anything else."""
        if not self.size:
            return None, None
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", self.size.strip().lower())
        if match is None:
            raise ValueError(f"--size must be N or WxH, such as 512 or 768x512, got {self.size!r}")
        return int(match[1]), int(match[2] or match[1])

    def scores(self) -> tuple[float, float]:
        """The two of --aesthetic, "SCORE,SCORE". Raises ValueError for anything else."""
        try:
            ours, negative = map(float, self.aesthetic.split(","))
        except ValueError as error:
            message = f"--aesthetic must be SCORE,SCORE, such as 6,2.5, got {self.aesthetic!r}"
            raise ValueError(message) from error
        return ours, negative


@dataclass(frozen=True)
class Asked:
    """Which images are wanted."""

    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None
    wildcards: Path | None = None
    styles: Path | None = None
    style: tuple[str, ...] = ()
    count: int = 1
    seed: int = 0
    variation: str = ""


def gathered(kind: type[T], given: Mapping[str, Any]) -> T:
    """One of the classes here from options by name: lists become tuples, and those that were not given ()."""
    values = {}
    for field in fields(kind):  # type: ignore[arg-type]
        value = given[field.name]
        many = field.default == () and not isinstance(value, str)
        values[field.name] = tuple(value or ()) if many else value
    return kind(**values)


def recorded(*parts: Models | Drawing | Pictures) -> dict[str, Any]:
    """All options in them by name, as JSON has them."""
    found = {name: value for part in parts for name, value in asdict(part).items()}
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in found.items()
    }
