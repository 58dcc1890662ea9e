"""What goes by a picture, against diffusers' pipelines with the same weights, latents and noise: equal pictures.

Where theirs draws from the autoencoder's posterior, its mean is taken on both sides: ours always takes the mean.
"""

import importlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.checkpoints import diffusers
from ldm.checkpoints.layouts import t2i_adapter as adapter_layout
from ldm.checkpoints.layouts import unet as layout
from ldm.checkpoints.layouts.unet_config import controlnet_to_diffusers
from ldm.diffusion.noise import ImageNoise
from ldm.images import to_pil
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from ldm.models.text import TextEncoder
from ldm.pipeline import Control, Given, Pipeline, Request
from ldm.pipeline.inputs import reseeded
from tests.checkpoints.families import CLIP, SMALL, make, text_to_image
from tests.parity.reference import converted, randomised

PROMPTS = ("a red circle", "a blue square, in oil")
SEEDS = (3, 4)
SIZE, LATENT = 32, 16
NOISE = ImageNoise(SEEDS, (4, LATENT, LATENT))()
STEPS = 10  # of 1,000: with what does not divide, theirs start elsewhere


def drawing(seed: int, channels: int = 3) -> Tensor:
    """Smooth pictures [2, C, 32, 32] in [0, 1]."""
    rough = torch.rand(2, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(rough, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)


PICTURE = drawing(1) * 2 - 1
MASK = torch.zeros(1, 1, SIZE, SIZE)
MASK[..., 8:24, 12:26] = 1  # of whole latents, which ours and theirs tell apart in the same way


class Both:
    """A tiny random model in ours and, as a folder that we wrote, in theirs; both with the same noise."""

    def __init__(self, family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        editing = text_to_image(SMALL | dict(in_channels=8), TextEncoder(CLIP))
        diffusers.write(editing if family == "editing" else make(family), folder)
        self.folder, self.monkeypatch = folder, monkeypatch
        self.ours = Pipeline.load(folder)
        monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())

    def pictures(self, request: Request, *, whole: bool = True) -> np.ndarray:
        """Ours, [N, H, W, 3] in 0..255; with `whole` off those of the decoder, before known pixels are put back."""
        *_, last = self.ours.stream(request)
        images = self.ours.pictures(request, last) if whole else self.ours.decode(last.x)
        return np.stack([np.asarray(to_pil(image)) for image in images]).astype(int)

    def theirs(self, module: str, name: str, parts: dict[str, Any], **words: Any) -> np.ndarray:
        """Theirs, by that pipeline of diffusers.pipelines, with more parts than ours has."""
        import diffusers as library

        source = importlib.import_module(f"diffusers.pipelines.{module}")
        self.monkeypatch.setattr(source, "randn_tensor", lambda shape, **_: NOISE[:, : shape[1]].clone())
        base: Any = library.StableDiffusionPipeline.from_pretrained(self.folder, local_files_only=True)
        known = inspect.signature(getattr(source, name)).parameters
        pipe = getattr(source, name)(**{k: v for k, v in base.components.items() if k in known} | parts)
        pipe.set_progress_bar_config(disable=True)
        made = pipe(list(PROMPTS), num_inference_steps=STEPS, output_type="np", **{"guidance_scale": 5.0} | words)
        images = np.round(made.images * 255).astype(int)
        assert images.std() > 10  # a picture, not a colour
        return images


PLAIN = {"safety_checker": None, "requires_safety_checker": False}


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda family: Both(family, tmp_path / "model", monkeypatch)


def request(**changes: Any) -> Request:
    return Request(PROMPTS, SEEDS, **{"steps": STEPS, "guidance": 5.0, "width": SIZE, "height": SIZE} | changes)


@pytest.mark.parametrize(("family", "strength"), [("sd1", 0.7), ("sd2", 0.34), ("sd1", 1.0)])
def test_img2img(both: Any, family: str, strength: float) -> None:
    """With strength_steps "part", which is theirs; "all" steps as often as asked for."""
    pair = both(family)
    found = pair.pictures(request(given=Given(PICTURE, strength, "part")))
    module, name = "stable_diffusion.pipeline_stable_diffusion_img2img", "StableDiffusionImg2ImgPipeline"
    expected = pair.theirs(module, name, PLAIN, image=PICTURE / 2 + 0.5, strength=strength)
    assert np.abs(found - expected).max() <= 1


INPAINT = "stable_diffusion.pipeline_stable_diffusion_inpaint", "StableDiffusionInpaintPipeline"


@pytest.mark.parametrize("strength", [None, 0.7])
def test_a_model_for_inpainting(both: Any, strength: float | None) -> None:
    """Ours then puts the known pixels back as they were given; theirs leaves them to the autoencoder."""
    pair = both("inpainting")
    given = Given(PICTURE, strength, "part", mask=MASK)
    expected = pair.theirs(
        *INPAINT, PLAIN, image=PICTURE / 2 + 0.5, mask_image=MASK.expand(2, -1, -1, -1), height=SIZE, width=SIZE,
        strength=1.0 if strength is None else strength,
    )  # fmt: skip
    assert np.abs(pair.pictures(request(given=given), whole=False) - expected).max() <= 1
    kept, picture = MASK[0, 0].numpy() == 0, np.stack([np.asarray(to_pil(image)) for image in PICTURE])
    assert np.array_equal(pair.pictures(request(given=given))[:, kept], picture[:, kept])


def test_any_model_that_keeps_what_is_known(both: Any) -> None:
    """With a strength: then what is known carries the start noise alone all the way, in both."""
    pair = both("sd1")
    given = Given(PICTURE, 0.7, "part", mask=MASK)
    expected = pair.theirs(
        *INPAINT, PLAIN, image=PICTURE / 2 + 0.5, mask_image=MASK.expand(2, -1, -1, -1), height=SIZE, width=SIZE,
        strength=0.7,
    )  # fmt: skip
    assert np.abs(pair.pictures(request(given=given), whole=False) - expected).max() <= 1


def test_a_model_that_is_shown_a_depth(both: Any) -> None:
    pair, depth = both("depth"), drawing(2, 1) * 7
    found = pair.pictures(request(given=Given(PICTURE, 0.7, "part"), depth=depth))
    module, name = "stable_diffusion.pipeline_stable_diffusion_depth2img", "StableDiffusionDepth2ImgPipeline"
    expected = pair.theirs(
        module, name, {"depth_estimator": None}, image=PICTURE / 2 + 0.5, depth_map=depth[:, 0], strength=0.7
    )
    assert np.abs(found - expected).max() <= 1


def test_a_model_for_editing(both: Any) -> None:
    pair = both("editing")
    given = Given(PICTURE, image_guidance=1.7)
    expected = pair.theirs(
        "stable_diffusion.pipeline_stable_diffusion_instruct_pix2pix", "StableDiffusionInstructPix2PixPipeline",
        PLAIN, image=PICTURE / 2 + 0.5, image_guidance_scale=1.7, latents=NOISE,
    )  # fmt: skip
    assert np.abs(pair.pictures(request(given=given)) - expected).max() <= 1


def test_a_model_that_enlarges(both: Any) -> None:
    import diffusers as library

    pair = both("x4 upscaler")
    low_res = library.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02)
    small = torch.nn.functional.avg_pool2d(PICTURE, 2)
    given = Given(small, noise_level=7)
    noise = ImageNoise(reseeded(SEEDS, "small picture"), (3, LATENT, LATENT))()
    noised = low_res.add_noise(small, noise, torch.tensor([7]))
    low_res.add_noise = lambda image, *_: noised  # theirs draws it, and the start, from one generator
    expected = pair.theirs(
        "stable_diffusion.pipeline_stable_diffusion_upscale", "StableDiffusionUpscalePipeline",
        {"low_res_scheduler": low_res}, image=small / 2 + 0.5, noise_level=7, latents=NOISE,
    )  # fmt: skip
    assert np.abs(pair.pictures(request(given=given)) - expected).max() <= 1


def controlnet(pair: Both, seed: int) -> tuple[ControlNet, Any]:
    """The same random ControlNet for the pair's U-Net in ours and in theirs."""
    from diffusers import ControlNetModel

    config = ControlNetConfig(pair.ours.denoiser.config, hint_widths=(8, 16))
    reference = randomised(ControlNetModel.from_config(controlnet_to_diffusers(config)), seed)
    ours = converted(ControlNet(config), reference, lambda keys: layout.controlnet_diffusers(config, keys))
    return ours.eval().requires_grad_(False), reference  # type: ignore[return-value]


def test_a_controlnet_on_a_stretch_of_the_steps(both: Any) -> None:
    pair, hint = both("sd1"), drawing(5)
    ours, reference = controlnet(pair, 8)
    steered = request(controls=(Control(ours, hint, weight=0.7, start=0.1, end=0.8),))
    expected = pair.theirs(
        "controlnet.pipeline_controlnet", "StableDiffusionControlNetPipeline", PLAIN | {"controlnet": reference},
        image=hint, latents=NOISE, controlnet_conditioning_scale=0.7, control_guidance_start=0.1,
        control_guidance_end=0.8,
    )  # fmt: skip
    assert np.abs(pair.pictures(steered) - expected).max() <= 1
    assert np.abs(pair.pictures(request()) - expected).max() > 5


def test_several_controlnets(both: Any) -> None:
    pair, hints = both("sd1"), [drawing(5), drawing(6)]
    networks = [controlnet(pair, seed) for seed in (8, 9)]
    controls = (
        Control(networks[0][0], hints[0], weight=0.7, end=0.5),
        Control(networks[1][0], hints[1], weight=1.2, start=0.3),
    )
    expected = pair.theirs(
        "controlnet.pipeline_controlnet", "StableDiffusionControlNetPipeline",
        PLAIN | {"controlnet": [theirs for _, theirs in networks]}, image=hints, latents=NOISE,
        controlnet_conditioning_scale=[0.7, 1.2], control_guidance_start=[0.0, 0.3], control_guidance_end=[0.5, 1.0],
    )  # fmt: skip
    assert np.abs(pair.pictures(request(controls=controls)) - expected).max() <= 1


@pytest.mark.parametrize("channels", [3, 1])
def test_a_t2i_adapter(both: Any, channels: int) -> None:
    from diffusers import T2IAdapter as Reference

    pair, hint = both("sd1"), drawing(5, channels)
    config = T2IAdapterConfig((32, 64), 2, channels, 2)
    words = adapter_layout.to_diffusers(config)
    reference = randomised(Reference.from_config(words), 8)
    assert adapter_layout.from_diffusers(dict(reference.config), "here") == config
    ours = converted(T2IAdapter(config), reference, lambda keys: adapter_layout.diffusers(config, keys))
    steered = request(controls=(Control(ours, hint, weight=0.8),))
    expected = pair.theirs(
        "t2i_adapter.pipeline_stable_diffusion_adapter", "StableDiffusionAdapterPipeline",
        PLAIN | {"adapter": reference}, image=hint, latents=NOISE, height=SIZE, width=SIZE,
        adapter_conditioning_scale=0.8,
    )  # fmt: skip
    assert np.abs(pair.pictures(steered) - expected).max() <= 1
    assert np.abs(pair.pictures(request()) - expected).max() > 5
