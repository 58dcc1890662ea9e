"""T2I-adapters for SDXL against diffusers': equal pictures, and the names of both of their formats."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.checkpoints import diffusers
from ldm.checkpoints.layouts import t2i_adapter as layout
from ldm.checkpoints.layouts.table import to_foreign
from ldm.checkpoints.load import load_model
from ldm.diffusion.noise import ImageNoise
from ldm.images import to_pil
from ldm.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from ldm.pipeline import Control, Pipeline, Request
from tests.checkpoints.families import make
from tests.parity.reference import converted, randomised

PROMPTS, SEEDS = ("a red circle", "a blue square, in oil"), (3, 4)
CONFIG = T2IAdapterConfig((32, 64, 128, 128), 2, 3, 4, xl=True)


def reference(seed: int = 8) -> Any:
    from diffusers import T2IAdapter as Reference

    return randomised(Reference.from_config(layout.to_diffusers(CONFIG)), seed)


def adapter(theirs: Any) -> T2IAdapter:
    """Ours with the same weights."""
    made: Any = converted(T2IAdapter(CONFIG), theirs, lambda keys: layout.diffusers(CONFIG, keys))
    return made.requires_grad_(False)


def hint(seed: int) -> torch.Tensor:
    rough = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(rough, size=(32, 32), mode="bicubic").clamp(0, 1)


def test_the_same_picture(tmp_path: Path) -> None:
    """On half of the steps as well, and two of them together."""
    import diffusers as library

    diffusers.write(make("sdxl"), tmp_path / "model")
    networks = [reference(8), reference(9)]
    base: Any = library.DiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    pipeline = Pipeline.load(tmp_path / "model")

    def theirs(network: Any, **words: Any) -> np.ndarray:
        pipe: Any = library.StableDiffusionXLAdapterPipeline(**base.components, adapter=network)
        pipe.set_progress_bar_config(disable=True)
        given = dict(num_inference_steps=10, guidance_scale=5.0, output_type="np", height=32, width=32)
        made = pipe(list(PROMPTS), latents=ImageNoise(SEEDS, (4, 16, 16))(), **given | words)
        return np.round(made.images * 255).astype(int)

    def ours(*controls: Control) -> np.ndarray:
        wanted = Request(PROMPTS, SEEDS, steps=10, guidance=5.0, width=32, height=32, controls=controls)
        return np.stack([np.asarray(to_pil(image)) for image in pipeline(wanted)]).astype(int)

    first, second = (adapter(network) for network in networks)
    expected = theirs(networks[0], image=hint(5), adapter_conditioning_scale=0.8)
    assert expected.std() > 10 and np.abs(ours() - expected).max() > 5
    assert np.abs(ours(Control(first, hint(5), 0.8)) - expected).max() <= 1
    expected = theirs(networks[0], image=hint(5), adapter_conditioning_factor=0.5)
    assert np.abs(ours(Control(first, hint(5), end=0.5)) - expected).max() <= 1
    both = library.MultiAdapter(networks)
    expected = theirs(both, image=[hint(5), hint(6)], adapter_conditioning_scale=[0.8, 0.4])
    assert np.abs(ours(Control(first, hint(5), 0.8), Control(second, hint(6), 0.4)) - expected).max() <= 1


def test_the_published_sizes() -> None:
    """Those of TencentARC's adapters for SDXL."""
    from diffusers import T2IAdapter as Reference

    config = T2IAdapterConfig(factor=16, xl=True)
    words = dict(in_channels=3, channels=[320, 640, 1280, 1280], num_res_blocks=2, downscale_factor=16)
    with torch.device("meta"):
        ours, theirs = T2IAdapter(config), Reference(**words, adapter_type="full_adapter_xl")
    assert layout.from_diffusers(dict(theirs.config), "here") == config
    written = to_foreign(layout.diffusers(config, ours.state_dict()), ours.state_dict())
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    single = to_foreign(layout.original(config, ours.state_dict()), ours.state_dict())
    assert layout.infer({k: tuple(v.shape) for k, v in single.items()}) == config
    assert {k for k in single if "in_conv.weight" in k} == {"body.2.in_conv.weight", "body.4.in_conv.weight"}


def test_a_folder_that_diffusers_saved(tmp_path: Path) -> None:
    network = reference()
    network.save_pretrained(tmp_path / "theirs")
    (read,) = load_model(tmp_path / "theirs").components.values()
    assert read.config == CONFIG
    ours = adapter(network).state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in read.state_dict().items())
