"""The whole pipeline against diffusers' with the same tiny weights: equal pictures, each opening the other's files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.checkpoints import compvis, diffusers
from ldm.checkpoints.layouts.text import WRAPPER
from ldm.diffusion.noise import ImageNoise
from ldm.images import to_pil
from ldm.pipeline import Pipeline, Request
from tests.checkpoints.families import make

PROMPTS = ("a red circle", "a blue square, in oil")
SEEDS = (3, 4)


def ours(model: Path, sampler: str, steps: int) -> np.ndarray:
    """Pictures [N, H, W, 3], 0..255."""
    request = Request(PROMPTS, SEEDS, steps=steps, sampler=sampler, guidance=5.0)
    return np.stack([np.asarray(to_pil(image)) for image in Pipeline.load(model)(request)]).astype(int)


def theirs(folder: Path, scheduler: str, steps: int, size: int) -> np.ndarray:
    """The same by diffusers, from the same noise."""
    import diffusers as library

    pipe: Any = library.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(library, scheduler).from_config(pipe.scheduler.config, skip_prk_steps=True)
    latents = ImageNoise(SEEDS, (4, size // 2, size // 2))()
    made = pipe(
        list(PROMPTS), height=size, width=size, num_inference_steps=steps, guidance_scale=5.0, latents=latents,
        output_type="np",
    )  # fmt: skip
    return np.round(made.images * 255).astype(int)


DDIM, PLMS = ("ddim", "DDIMScheduler"), ("plms", "PNDMScheduler")


# Not PLMS for Stable Diffusion 2: diffusers extrapolates the raw v there, Stability's sampler and ours eps.
@pytest.mark.parametrize(
    ("family", "names"), [("sd1", DDIM), ("sd1", PLMS), ("sd2", DDIM), ("sdxl", DDIM), ("sdxl", PLMS)]
)
def test_the_same_picture(family: str, names: tuple[str, str], tmp_path: Path) -> None:
    """Ours opens a CompVis-named file, theirs the folder that we wrote."""
    sampler, scheduler = names
    model = make(family)
    diffusers.write(model, tmp_path / "folder")
    compvis.write(model, tmp_path / "file.safetensors")
    expected = theirs(tmp_path / "folder", scheduler, steps=10, size=32)
    assert expected.std() > 10  # a picture, not a colour
    for path in (tmp_path / "folder", tmp_path / "file.safetensors"):
        assert np.abs(ours(path, sampler, steps=10) - expected).max() <= 1


def test_a_folder_that_diffusers_saved(tmp_path: Path) -> None:
    import diffusers as library

    diffusers.write(make("sd1"), tmp_path / "a")
    pipe: Any = library.StableDiffusionPipeline.from_pretrained(tmp_path / "a", local_files_only=True)
    assert len(pipe.tokenizer) == 49_408
    pipe.save_pretrained(tmp_path / "b")
    assert np.array_equal(ours(tmp_path / "a", "ddim", 3), ours(tmp_path / "b", "ddim", 3))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "refiner", "inpainting"])
@torch.no_grad()
def test_the_library_reads_our_single_file(family: str, tmp_path: Path) -> None:
    """Its own reader of CompVis files gives the tensors that its folder has: our names are the published ones."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
    from safetensors.torch import load_file

    model = make(family)
    diffusers.write(model, tmp_path / "folder")
    compvis.write(model, tmp_path / "file.safetensors")
    for place, read in (("unet", convert_ldm_unet_checkpoint), ("vae", convert_ldm_vae_checkpoint)):
        expected = load_file(tmp_path / "folder" / place / f"{diffusers.WEIGHTS}.safetensors")
        config = diffusers.read_json(tmp_path / "folder" / place / "config.json")
        found = read(load_file(tmp_path / "file.safetensors"), config)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k].squeeze(), expected[k].squeeze()) for k in expected)


def test_text_keys_are_written_in_their_old_form(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    diffusers.write(make("sd1"), tmp_path / "folder")
    assert all(k.startswith(WRAPPER) for k in load_file(tmp_path / "folder/text_encoder/model.safetensors"))
