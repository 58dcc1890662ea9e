"""Other models that steer a pipeline."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.load import load_model
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.models.classifier import log_prob
from ldm.models.clip import CLIP
from ldm.pipeline.request import Request


@dataclass(frozen=True)
class Companions:
    """Other models that steer a pipeline: a weaker denoiser as the negative, a noisy classifier, a CLIP, a refiner.

    The adapters that prompts ask for are put on the pipeline's own networks alone, and reach none of these.
    """

    weak: Any = None
    classifier: Any = None
    clip: Any = None
    weak_name: str = ""  # what the pictures' settings call it
    refiner: Any = None  # a Pipeline with the same latents and noise, which draws the last steps

    @classmethod
    def load(
        cls,
        weak: str | Path = "",
        classifier: str | Path = "",
        clip: str | Path = "",
        *,
        device: str = "cpu",
        diffusion: Diffusion | None = None,
    ) -> "Companions":
        """From model or run folders; "" leaves one out.

        diffusion: of the pipeline. Raises ValueError for a folder without what is needed, and for a weak model or a
        classifier that was trained with other noise.
        """

        def parts(path: str | Path, *names: str, dtype: torch.dtype | None = torch.float32) -> list[Any]:
            found = load_model(path, names, dtype=dtype)
            if diffusion is not None and names[0] in ("denoiser", "classifier"):
                words = found.settings.get("diffusion", {})
                theirs = DiffusionConfig(
                    **{k: v for k, v in words.items() if k in DiffusionConfig.__dataclass_fields__}
                )
                check_noise(f"the {names[0]} of {path}", theirs, diffusion.config, outputs=names[0] == "denoiser")
            return [part.to(device).eval().requires_grad_(False) for part in found.require(*names)]

        return cls(
            parts(weak, "denoiser", dtype=torch.float32 if device == "cpu" else None)[0] if weak else None,
            parts(classifier, "classifier")[0] if classifier else None,
            CLIP(*parts(clip, "text", "image")).to(device).eval().requires_grad_(False) if clip else None,
            weak_name=Path(weak).name if weak else "",
        )

    def check(self, request: Request) -> None:
        """Raise ValueError for a request that needs one that is not there, or leaves one without effect."""
        steering = request.steering
        if self.weak is not None and request.negative:
            raise ValueError("a weak model stands in for the negative prompt; give one of the two")
        if self.weak is not None and request.guidance == 1 and not request.plus_plus:
            raise ValueError("a weak model does nothing at guidance 1; give more")
        for wanted, there, name in (
            (steering.label, self.classifier, "label needs a classifier"),
            (steering.clip_scale, self.clip, "clip_scale needs a CLIP"),
        ):
            if wanted and there is None:
                raise ValueError(f"{name}, and the pipeline has none")
        if steering.label:
            log_prob(self.classifier, [steering.label])


_NOISE = ("schedule", "train_steps", "beta_start", "beta_end", "zero_snr", "shift", "dynamic_shift")


def check_noise(name: str, theirs: DiffusionConfig, ours: DiffusionConfig, *, outputs: bool) -> None:
    """Raise ValueError unless t means the same noise to both, and with `outputs` what is predicted the same thing."""
    for key in (*_NOISE, *(["prediction"] if outputs else [])):
        if getattr(theirs, key) != getattr(ours, key):
            raise ValueError(
                f"{name} was trained with {key}={getattr(theirs, key)}, the model with {getattr(ours, key)}"
            )
