"""SDXL's refiner against diffusers': equal pictures by itself and after a base, and the names of the published file."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.checkpoints import compvis, diffusers
from ldm.checkpoints.layouts import unet_config
from ldm.checkpoints.model import KINDS
from ldm.diffusion.noise import ImageNoise
from ldm.images import to_pil
from ldm.models.text import TextConfig
from ldm.models.unet import UNetConfig
from ldm.pipeline import Companions, Given, Pipeline, Request
from tests.checkpoints.families import make

PROMPTS = ("a red circle", "a blue square, in oil")
SEEDS = (3, 4)
SIZE, STEPS = 32, 10
NOISE = ImageNoise(SEEDS, (4, SIZE // 2, SIZE // 2))()
MODULE = "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img"

PUBLISHED = UNetConfig(
    channels=384, depths=(0, 4, 4, 0), middle_depth=4, context_dim=1280, pooled_dim=1280, pooled_layers=2, size_dim=256,
    aesthetic=True, head_dim=64, linear_projection=True,
)  # fmt: skip
CLIP_G = TextConfig(width=1280, layers=32, heads=20, embed_dim=1280, skip=1, final_norm=False)
DOWN = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
WORDS = dict(
    in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=32, block_out_channels=[384, 768, 1536, 1536],
    down_block_types=DOWN, up_block_types=[name.replace("Down", "Up") for name in DOWN], cross_attention_dim=1280,
    attention_head_dim=[6, 12, 24, 24], transformer_layers_per_block=4, use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2560,
)  # fmt: skip
"""The published config.json, as far as it decides names, shapes or our config."""


def files(family: str, folder: Path) -> list[Path]:
    """A tiny random model of that family as a folder of diffusers and as a single file.

    A refiner of random weights hardly hears what it is told, and with a channel for each group of a norm no score at
    all: in this one text and score move the picture well beyond 1/255.
    """
    model, place = make(family, channels=64 if family == "refiner" else 32), folder / family
    if family == "refiner":
        louder: Any = model.components["denoiser"]
        for name, weight in louder.named_parameters():
            weight *= 8 if "attn2.to_v" in name or name.endswith("norm2.weight") else 1
        louder.pooled[0].weight[:, -256:] *= 30
    diffusers.write(model, place)
    compvis.write(model, place.with_suffix(".safetensors"))
    return [place, place.with_suffix(".safetensors")]


def ours(pipeline: Pipeline, **changes: Any) -> np.ndarray:
    """Pictures [N, H, W, 3] in 0..255."""
    wanted = Request(PROMPTS, SEEDS, **{"steps": STEPS, "guidance": 5.0, "width": SIZE, "height": SIZE} | changes)
    return np.stack([np.asarray(to_pil(image)) for image in pipeline(wanted)]).astype(int)


def library(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe: Any, image: Tensor, **words: Any) -> np.ndarray:
    given = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "np"} | words
    pictures = np.round(pipe(list(PROMPTS), image=image, **given).images * 255).astype(int)
    assert pictures.std() > 10  # a picture, not a colour
    return pictures


@pytest.fixture
def same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their noise is ours, and their latents of a picture the posterior's mean, as ours always are."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    monkeypatch.setattr(importlib.import_module(MODULE), "randn_tensor", lambda *_, **__: NOISE.clone())


@pytest.mark.usefixtures("same_start")
@pytest.mark.parametrize("scores", [(6.0, 2.5), (8.0, 1.25)])
def test_by_itself_from_a_picture(scores: tuple[float, float], tmp_path: Path) -> None:
    rough = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    picture = torch.nn.functional.interpolate(rough, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)
    folder, file = files("refiner", tmp_path)
    pipe = library(folder)
    assert type(pipe).__name__ == "StableDiffusionXLImg2ImgPipeline" and pipe.config.requires_aesthetics_score
    words: dict[str, Any] = {"aesthetic_score": scores[0], "negative_aesthetic_score": scores[1]}
    expected = theirs(pipe, picture, strength=0.7, negative_prompt=["fog"] * 2, **words)
    for path in (folder, file):
        given = Given(picture * 2 - 1, 0.7, "part")
        found = ours(Pipeline.load(path), given=given, negative="fog", aesthetic=scores)
        assert np.abs(found - expected).max() <= 1
    told = theirs(pipe, picture, strength=0.7, negative_prompt=["fog"] * 2, aesthetic_score=1.0)
    assert np.abs(told - expected).max() > 5  # the scores are heard


@pytest.mark.usefixtures("same_start")
@pytest.mark.parametrize(("switch", "heard"), [(0.8, 1), (0.3, 5)])
def test_after_a_base_with_the_same_latents(switch: float, heard: int, tmp_path: Path) -> None:
    """The base stops on its way, and the refiner goes on from there; each with its own text and null prompt.

    heard: by how much of 255 the picture moves at least if the refiner is not told what theirs is.
    """
    bases, refiners = files("sdxl", tmp_path), files("refiner", tmp_path)
    latents = library(bases[0])(
        list(PROMPTS), height=SIZE, width=SIZE, num_inference_steps=STEPS, guidance_scale=5.0, latents=NOISE,
        denoising_end=switch, output_type="latent",
    ).images  # fmt: skip
    expected = theirs(library(refiners[0]), latents, denoising_start=switch)
    for base, refiner in zip(bases, refiners, strict=True):
        pipeline, second = Pipeline.load(base), Pipeline.load(refiner)
        assert np.abs(ours(pipeline) - expected).max() > heard
        pipeline.companions = Companions(refiner=second)
        assert np.abs(ours(pipeline, switch=switch) - expected).max() <= 1
        assert np.abs(ours(pipeline, switch=switch, aesthetic=(2.5, 6.0)) - expected).max() > heard
        second.null_prompt = None  # as the base has it
        assert np.abs(ours(pipeline, switch=switch) - expected).max() > heard


def test_the_published_config_is_read() -> None:
    assert unet_config.from_diffusers(WORDS, "here") == PUBLISHED
    written = unet_config.to_diffusers(PUBLISHED, 128)
    assert unet_config.from_diffusers(written, "here") == PUBLISHED
    assert {key: written[key] for key in WORDS} == WORDS | {"transformer_layers_per_block": [1, 4, 4, 4]}


def test_the_converters_of_diffusers_turn_our_single_file_into_the_folder() -> None:
    """At the published size: names and shapes, which the library reads as it reads the published file."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import single_file_utils as single

    parts = {"unet": (PUBLISHED, compvis.DENOISER), "text": (CLIP_G, compvis.REFINER)}
    tensors: dict[str, Tensor] = {}
    for kind, (config, prefix) in parts.items():
        with torch.device("meta"):
            state = KINDS[kind][0](config).state_dict()
        tensors |= compvis.to_foreign(compvis.table(kind, config, (prefix,)), state)
    found = {part.name: part.config for part in compvis.find_parts(tensors, {})}
    assert found == {"denoiser": PUBLISHED, "text": CLIP_G}
    with torch.device("meta"):
        expected = UNet2DConditionModel.from_config(WORDS).state_dict()
    read = single.convert_ldm_unet_checkpoint(dict(tensors), WORDS)
    assert {k: v.shape for k, v in read.items()} == {k: v.shape for k, v in expected.items()}
    assert sum(v.numel() for v in read.values()) == 2_259_526_660
    text = single.convert_open_clip_checkpoint(None, dict(tensors), prefix=compvis.REFINER)
    assert {k: tuple(v.shape) for k, v in text.items()} == {
        k.removeprefix("text_encoder_2/"): v for k, v in read_manifest("sdxl-folder").items() if "encoder_2/" in k
    }


def read_manifest(name: str) -> dict[str, tuple[int, ...]]:
    from tests.parity.test_manifests import read

    return read(name)
