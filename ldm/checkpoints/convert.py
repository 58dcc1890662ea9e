"""From one format to another, checked by running both."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints import compvis, diffusers, textual_inversion
from ldm.checkpoints.files import commit
from ldm.checkpoints.load import load_model, save_model
from ldm.checkpoints.model import LoadedModel, config_of, kind_of
from ldm.names import known
from ldm.types import Conditioning

FORMATS = ("native", "compvis", "diffusers")
SAMPLED = (
    "schedule", "prediction", "beta_start", "beta_end", "shift", "dynamic_shift", "spacing", "zero_snr", "sigma_min",
    "sigma_max",
)  # fmt: skip
"""What of the diffusion sampling depends on; the rest is of training alone."""
OWN_KINDS = ("autoencoder_vq", "classifier", "perceptual")
"""Components that no other format knows."""
LIMIT = 1e-4
"""How far outputs may be apart, relative to the largest: equal weights at other addresses add up in another order."""


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    dtype: torch.dtype | None = None,
    ema: bool = False,
    prediction: str | None = None,
) -> tuple[str, ...]:
    """Write the model at `source` to `target` in format `to`; returns what was assumed or changed on the way.

    The result is read back and its outputs on random input compared with the source's before it gets its name.
    Raises ValueError, and leaves nothing behind, if the format cannot hold the model or the outputs differ.
    """
    known("format", to, FORMATS)
    if target.exists():
        raise ValueError(f"{target} exists; nothing is overwritten")
    if textual_inversion.is_one(source):
        if dtype is not None or ema or prediction:
            raise ValueError(f"{source} is a textual inversion: it has no --dtype, --ema or --prediction")
        textual_inversion.write(textual_inversion.read(source), target, to)
        return ()
    if (to == "compvis") != (target.suffix == ".safetensors"):
        kind = ".safetensors file" if to == "compvis" else "folder"
        raise ValueError(f"--to {to} writes a {kind}, not {target.name!r}")
    model = load_model(source, prediction=prediction, ema=ema, dtype=dtype)
    own = [kind_of(part) for part in model.components.values() if kind_of(part) in OWN_KINDS]
    if own and to != "native":
        raise ValueError(f"format {to} has no words for the {own[0]} of {source}")
    stage = target.parent / f".check-{target.name}"
    try:
        notes = write(model, stage, to)
        again = load_model(stage)
        check(model, again, exact=not notes)
        stage.rename(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True) if stage.is_dir() else stage.unlink(missing_ok=True)
    return model.notes + notes + lost(model, again)


def lost(model: LoadedModel, again: LoadedModel) -> tuple[str, ...]:
    """A note for each thing that the format did not keep."""
    notes = []
    for key in ("size", "null_prompt", "diffusion") if "diffusion" in model.settings else ():
        before, after = model.settings.get(key), again.settings.get(key)
        if key == "diffusion" and isinstance(before, dict) and isinstance(after, dict):
            before = {k: v for k, v in before.items() if k in SAMPLED}
            after = {k: after.get(k, v) for k, v in before.items()}
        if before is not None and before != after:
            notes.append(f"the format does not keep {key}: {before!r}")
    if (model.folder / textual_inversion.WORD).is_file():
        notes.append(f"the word that it was taught stays a file of its own: {model.folder / textual_inversion.WORD}")
    missing = [name for name in model.extra if name not in again.extra and name not in ("v_pred", "ztsnr")]
    if missing:
        notes.append(f"{len(missing)} tensors that no component uses were left out, such as {missing[0]}")
    return tuple(notes)


def write(model: LoadedModel, target: Path, to: str) -> tuple[str, ...]:
    """The model in format `to`; returns notes on what the format made necessary."""
    if to == "compvis":
        return compvis.write(model, target)
    if to == "diffusers":
        return diffusers.write(model, target)
    with commit(target) as stage:
        save_model(stage, model.components, model.settings, model.name, model.extra)
    return ()


def check(model: LoadedModel, again: LoadedModel, *, exact: bool) -> None:
    """Raise ValueError unless both models' components say the same of the same random input, in float32.

    exact: their tensors must be equal too, to the bit; not so where weights had to be recomputed.
    """
    for name in model.components:
        if name not in again.components:
            raise ValueError(f"the conversion lost the {name}")
        mine, theirs = model.components[name], again.components[name]
        state = theirs.state_dict()
        for key, tensor in mine.state_dict().items():
            # the latents' scale passes through a decimal
            if exact and key != "latent_std" and not torch.equal(state[key], tensor):
                raise ValueError(f"the conversion changed {name}.{key}")
        # A text encoder without a projection says one thing less than one with it.
        for before, after in zip(probe(mine), probe(theirs), strict=False):
            error = float((before - after).abs().max() / before.abs().max().clamp(min=1e-12))
            if not error <= LIMIT:
                raise ValueError(f"the conversion changed what the {name} says, by {error:.1e} of its largest output")


@torch.inference_mode()
def probe(module: nn.Module) -> list[Tensor]:
    """What a component says of fixed random input, computed in float32."""
    home = next(module.parameters()).dtype
    module.float()
    try:
        return [part.float() for part in _outputs(module)]
    finally:
        module.to(home)


def _outputs(module: Any) -> list[Tensor]:
    kind, config = kind_of(module), config_of(module)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if kind == "autoencoder":
        side = 4 * module.factor
        latent = noise(1, config.latent_channels, 4, 4)
        return [module.encode(noise(1, config.image_channels, side, side).clamp(-1, 1)), module.decode(latent)]
    if kind in ("text", "text_pair", "transformers_text"):
        told = module(["a red circle to the left of a blue square", ""])
        projected = kind == "text_pair" or getattr(config, "embed_dim", 0) != 0
        return [told.context, told.pooled] if projected else [told.context]
    if kind == "image":
        return [module(noise(1, 3, config.size, config.size).clamp(-1, 1))]
    if kind == "t2i_adapter":
        side = 4 * 2 ** len(config.channels)
        hinted = side * module.hint_factor
        told = Conditioning(control=(noise(1, config.hint_channels, hinted, hinted),))
        return list(module(noise(1, 4, side, side), torch.tensor([500.0]), told))
    network = config.unet if kind == "controlnet" else config
    side = 4 * (module.encoder.factor if kind == "controlnet" else module.factor)
    pooled, sized, classes = (int(getattr(network, name, 0)) for name in ("pooled_dim", "size_dim", "classes"))
    hint_side = side * module.hint_factor if kind == "controlnet" else 0
    hint = (noise(1, config.hint_channels, hint_side, hint_side),) if kind == "controlnet" else ()
    cond = Conditioning(
        context=noise(1, 7, network.context_dim) if network.context_dim else None,
        pooled=noise(1, pooled) if pooled else None,
        sizes=torch.tensor([[512, 512, 0, 0, 512, 512]])[:, : network.sizes] if sized else None,
        label=torch.tensor([classes - 1]) if classes else None,
        control=hint,
    )
    output = module(noise(1, network.in_channels, side, side), torch.tensor([500.0]), cond)
    return list(output) if isinstance(output, tuple) else [output]
