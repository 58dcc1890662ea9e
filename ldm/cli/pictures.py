"""What `ldm generate` is given besides prompts: pictures, and the networks that they are for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.checkpoints.model import LoadedModel
    from ldm.pipeline import Control, Given, Pipeline, Request, Upscale

CONTROLS = ("controlnet", "t2i_adapter")

NUMBER = r"-?(?:\d+\.?\d*|\.\d+)"
CONTROL = re.compile(
    rf"(?P<model>[^=]+)=(?P<picture>.+?)(:(?P<weight>{NUMBER})(:(?P<start>{NUMBER})-(?P<end>{NUMBER}))?)?"
)


@dataclass(frozen=True)
class Pictures:
    """The options of `ldm generate` about pictures, as they were typed."""

    image: Path | None = None
    strength: float | None = None
    mask: Path | None = None
    mask_blur: float = 0.0
    mask_full_resolution: int | None = None
    mask_invert: bool = False
    mask_fill: str = "original"
    outpaint: str = ""
    resample: int = 1
    measure: str = ""
    shows: str | None = None
    depth: Path | None = None
    image_guidance: float = 1.5
    noise_level: int = 20
    control: tuple[str, ...] = ()

    def given(self, width: int | None, height: int | None, multiple: int = 64) -> "Given | None":
        """The picture to go by.

        With a size it is scaled to that, but not as a measurement, nor where only a part of it is drawn. multiple: of
        what the model can draw, px, for outpainting. Raises ValueError for what does not go together.
        """
        from ldm.images import open_mask, open_picture
        from ldm.pipeline import Given, outpaint

        if self.image is None:
            self._check_alone()
            return None
        sides = self._sides()
        whole = sides is None and not self.measure and self.mask_full_resolution is None
        size = (width, height) if whole and width is not None and height is not None else None
        image = open_picture(self.image, size)
        if size is not None and self.mask is not None:
            Given(open_picture(self.image), mask=open_mask(self.mask))  # of one size also before they are scaled
        if sides is None:
            mask = None if self.mask is None else open_mask(self.mask, size)
            given = Given(image, self.strength, mask=mask, measure=self.measure, shows=self.shows)
        else:
            given = outpaint(image, sides, multiple=multiple, strength=self.strength)
        if self.mask_invert and given.mask is None:
            raise ValueError("--mask-invert goes with a --mask")
        return replace(
            given,
            mask=1 - given.mask if self.mask_invert and given.mask is not None else given.mask,
            mask_blur=self.mask_blur,
            padding=self.mask_full_resolution,
            fill=self.mask_fill,
            resample=self.resample,
            image_guidance=self.image_guidance,
            noise_level=self.noise_level,
        )

    def check_files(self) -> None:
        """Raise ValueError for controls that cannot be read, and for pictures that are not there."""
        from torch import zeros

        from ldm.pipeline import Control

        for text in self.control:
            Control(None, zeros(1, 1, 1, 1), *_numbers(_parsed(text)))
        wanted = [Path(_parsed(text)["picture"]) for text in self.control] + ([self.depth] if self.depth else [])
        for path in wanted:
            if not path.is_file():
                raise ValueError(f"no picture {str(path)!r}")

    def complete(
        self, request: "Request", pipeline: "Pipeline", networks: Mapping[str, "LoadedModel"]
    ) -> dict[str, Any]:
        """What of the request depends on the model: the outpainted canvas, the depth and the controls, scaled.

        networks: by path, those that the controls name, where they are to run.
        """
        from ldm.pipeline.canvas import open_depth

        found: dict[str, Any] = {}
        if self.outpaint:
            found["given"] = self.given(None, None, pipeline.multiple)
            request = replace(request, **found)
        size = pipeline.size_of(request)
        if request.given is not None and request.given.padding is not None:
            height, width = request.given.image.shape[2:]  # of which a part is cut out, with the picture's
            size = width, height
        found["controls"] = tuple(_control(text, size, networks) for text in self.control)
        found["depth"] = None if self.depth is None else open_depth(self.depth, size)
        return found

    def networks(self, device: str) -> dict[str, "LoadedModel"]:
        """By path, the networks of the controls, on the device. Raises ValueError for other models."""
        paths = dict.fromkeys(_parsed(text)["model"] for text in self.control)
        return {path: _network(path, device) for path in paths}

    def files(self) -> list[Path]:
        """Every picture and network that is named."""
        named = [path for path in (self.image, self.mask, self.depth) if path is not None]
        words = [_parsed(text) for text in self.control]
        return [*map(Path, named), *(Path(word[kind]) for word in words for kind in ("model", "picture"))]

    def _check_alone(self) -> None:
        unused = Pictures(depth=self.depth, control=self.control)
        for name in self.__dataclass_fields__:
            if getattr(self, name) != getattr(unused, name):
                raise ValueError(f"--{name.replace('_', '-')} and the like go with an --image")

    def _sides(self) -> tuple[int, ...] | None:
        if not self.outpaint:
            return None
        for name in ("mask", "measure", "shows"):
            if getattr(self, name) not in (None, ""):
                raise ValueError(f"--outpaint makes its own mask; it does not go with --{name}")
        if not re.fullmatch(r"\d+(,\d+){3}", self.outpaint):
            raise ValueError(f"--outpaint must be LEFT,RIGHT,TOP,BOTTOM px, such as 64,64,0,0, got {self.outpaint!r}")
        return tuple(map(int, self.outpaint.split(",")))


def upscale_of(scale: float, how: str, strength: float, steps: int) -> "Upscale | None":
    """The second pass that --upscale asks for; at 1 there is none."""
    from ldm.pipeline import Upscale

    if scale == 1:
        return None
    return Upscale(scale, strength, how, steps or None)


def _network(path: str, device: str) -> "LoadedModel":
    """A ControlNet or T2I-adapter on the device."""
    import torch

    from ldm.checkpoints.load import load_model
    from ldm.nn.cpu import for_cpu

    model = load_model(path, CONTROLS, dtype=torch.float32 if device == "cpu" else None)
    if not model.components:
        raise ValueError(f"{path} holds neither a ControlNet nor a T2I-adapter")
    for name, network in model.components.items():
        model.components[name] = for_cpu(network.to(device).eval())
    return model


def _control(text: str, size: tuple[int, int], networks: Mapping[str, "LoadedModel"]) -> "Control":
    """MODEL=PICTURE[:WEIGHT[:START-END]] with the network and the picture scaled to the size."""
    from ldm.images import open_mask, open_picture
    from ldm.pipeline import Control

    words = _parsed(text)
    model = networks[words["model"]]
    network: Any = next(model.components[name] for name in CONTROLS if name in model.components)
    grey = network.config.hint_channels == 1
    picture = open_mask(words["picture"], size) if grey else open_picture(words["picture"], size) / 2 + 0.5
    return Control(network, picture, *_numbers(words), name=model.name)


def _numbers(words: dict[str, str]) -> tuple[float, float, float]:
    """Weight, start and end."""
    return float(words["weight"] or 1), float(words["start"] or 0), float(words["end"] or 1)


def _parsed(text: str) -> dict[str, str]:
    """model, picture, and weight, start and end where they are given, else ""."""
    match = CONTROL.fullmatch(text)
    if match is None:
        raise ValueError(f"--control must be MODEL=PICTURE[:WEIGHT[:START-END]], got {text!r}")
    return match.groupdict("")
