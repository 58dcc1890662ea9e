"""The pipeline with small random modules: what it asks of them, in what order, and what it promises."""

import itertools
import os
import re
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import ldm.cli.generate
import ldm.pipeline.pipeline
from ldm.checkpoints.model import LoadedModel
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.diffusion.samplers import SAMPLERS
from ldm.images import read_settings
from ldm.pipeline import Pipeline, Request, Steering, pairs
from ldm.types import Conditioning


class Autoencoder(nn.Module):
    factor, latent_channels = 4, 4

    def __init__(self):
        super().__init__()
        self.out = nn.ConvTranspose2d(4, 3, 4, stride=4)

    def decode(self, latent):
        return self.out(latent)


class Text(nn.Module):
    """Context [B, 3, 8] from the letters of each prompt."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, prompts):
        self.asked.append(list(prompts))
        rows = [torch.randn(3, 8, generator=torch.Generator().manual_seed(sum(map(ord, p)))) for p in prompts]
        return Conditioning(context=torch.stack(rows))


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.text, self.last = (
            nn.Conv2d(4, 16, 3, padding=1),
            nn.Linear(8, 16),
            nn.Conv2d(16, 4, 3, padding=1),
        )
        self.batches = []

    def forward(self, x, t, cond):
        self.batches.append(len(x))
        assert not torch.is_grad_enabled()
        told = self.text(cond.context).mean(1) + (t / 1000)[:, None].to(x.dtype)
        return self.last(torch.nn.functional.silu(self.first(x) + told[:, :, None, None]))


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    diffusion = Diffusion.from_config(DiffusionConfig())
    return Pipeline(Autoencoder(), Text(), Denoiser(), diffusion, size=16, null_prompt="nothing", name="tiny")


REQUEST = Request(*pairs(["a cat", "a dog"], count=3, seed=5), steps=4, batch=4)


def test_pairs_give_every_prompt_the_same_seeds():
    assert pairs(["a", "b"], count=2, seed=7) == (("a", "a", "b", "b"), (7, 8, 7, 8))
    with pytest.raises(ValueError, match="single string"):
        pairs("a cat")
    with pytest.raises(ValueError, match="count must be at least 1"):
        pairs(["a"], count=0)


def test_images_come_out_in_order_and_range(pipeline):
    images = pipeline(REQUEST)
    assert images.shape == (6, 3, 16, 16) and images.dtype == torch.float32
    assert images.abs().max() <= 1 and images.isfinite().all()
    assert not images.is_inference()
    assert pipeline(replace(REQUEST, width=32, height=8)).shape == (6, 3, 8, 32)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_is_the_same_alone_and_in_any_batch(pipeline, name):
    """To the byte at batch 1; torch's kernels sum in another order for another batch size, hence a tolerance."""
    request = replace(REQUEST, sampler=name)
    one_by_one = pipeline(replace(request, batch=1))
    for batch in (2, 4, 6, 100):
        assert (pipeline(replace(request, batch=batch)) - one_by_one).abs().max() < 1e-5
    for i in (0, 4):
        alone = replace(request, prompts=request.prompts[i : i + 1], seeds=request.seeds[i : i + 1])
        assert torch.equal(pipeline(alone), one_by_one[i : i + 1])
    assert not torch.equal(one_by_one[0], one_by_one[1]) and not torch.equal(one_by_one[0], one_by_one[3])


def test_a_request_repeats_to_the_byte(pipeline):
    request = replace(REQUEST, sampler="ddim", eta=0.7)
    assert torch.equal(pipeline(request), pipeline(request))


def test_stream_numbers_the_steps_of_all_batches(pipeline):
    steps = list(pipeline.stream(REQUEST))
    assert [step.index for step in steps] == list(range(8)) and pipeline.steps(REQUEST) * REQUEST.batches == 8
    assert [len(step.x) for step in steps] == [4] * 4 + [2] * 4
    images = torch.cat([pipeline.decode(steps[3].x), pipeline.decode(steps[7].x)])
    assert torch.equal(images, pipeline(REQUEST))
    assert torch.allclose(steps[7].x, steps[7].x0)  # trailing ends at the clean level


def test_progress_counts_to_the_end(pipeline):
    seen = []
    pipeline(REQUEST, lambda done, total: seen.append((done, total)))
    assert seen == [(k, 8) for k in range(1, 9)]


def test_the_caller_may_stop_and_is_never_in_inference_mode(pipeline):
    for step in itertools.islice(pipeline.stream(REQUEST), 2):
        assert not torch.is_inference_mode_enabled()
        assert torch.ones(1, requires_grad=True).mul(2).requires_grad
        assert pipeline.decode(step.x0).shape == (4, 3, 16, 16)
    assert not torch.is_inference_mode_enabled()
    assert len(pipeline.denoiser.batches) == 2


def test_each_prompt_is_encoded_once(pipeline):
    pipeline(replace(REQUEST, batch=1, negative="fog"))
    assert sorted(pipeline.text.asked) == [["a cat"], ["a dog"], ["fog"]]


def test_an_empty_negative_is_the_null_prompt_of_the_model(pipeline):
    plain = pipeline(REQUEST)
    assert pipeline.text.asked == [["a cat"], ["a dog"], ["nothing"]]
    assert torch.equal(plain, pipeline(replace(REQUEST, negative="nothing")))
    assert not torch.equal(plain, pipeline(replace(REQUEST, negative="fog")))


def test_guidance_one_neither_encodes_nor_runs_uncond(pipeline):
    pipeline(replace(REQUEST, guidance=1.0))
    assert pipeline.text.asked == [["a cat"], ["a dog"]]
    assert pipeline.denoiser.batches == [4] * 4 + [2] * 4


def test_guidance_runs_both_halves_at_once(pipeline):
    pipeline(REQUEST)
    assert pipeline.denoiser.batches == [8] * 4 + [4] * 4


def test_a_half_precision_network_is_sampled_in_float32(pipeline):
    pipeline.denoiser.bfloat16(), pipeline.autoencoder.bfloat16()
    steps = list(pipeline.stream(REQUEST))
    assert steps[-1].x.dtype == torch.float32
    assert pipeline(REQUEST).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ()}, "one or more prompts"),
        ({"prompts": "a cat"}, "tuple of one or more prompts"),
        ({"seeds": (1,)}, "each image needs a prompt and a seed, got 6 and 1"),
        ({"seeds": (-1, 0, 0, 0, 0, 0)}, "seeds must be in"),
        ({"steps": 0}, "steps and batch must be at least 1"),
        ({"batch": 0}, "steps and batch must be at least 1"),
        ({"sampler": "plsm"}, "did you mean 'plms'"),
        ({"sampler": "plms", "eta": 1.0}, "eta is for sampler 'ddim'"),
        ({"guidance": float("inf")}, "finite"),
        ({"steps": 1001}, r"steps must be in 1\.\.1000"),
        ({"spacing": "quad"}, "unknown spacing"),
        ({"width": 18}, "multiples of 4 px, got 18x16"),
        ({"height": 0}, "multiples of 4 px, got 16x0"),
    ],
)
def test_bad_requests_fail_before_any_work(pipeline, change, message):
    with pytest.raises(ValueError, match=message):
        pipeline.stream(replace(REQUEST, **change))
    assert pipeline.text.asked == [] and pipeline.denoiser.batches == []


def test_a_denoiser_may_need_larger_multiples(pipeline):
    pipeline.denoiser.factor = 2
    with pytest.raises(ValueError, match="multiples of 8 px, got 12x16"):
        pipeline.stream(replace(REQUEST, width=12))


@pytest.fixture
def loads(pipeline, monkeypatch, tmp_path):
    """`load_tuned` gives the small model; the list holds what was asked for."""
    asked = []
    settings = {"diffusion": asdict(DiffusionConfig()), "size": 16, "null_prompt": "nothing"}
    parts = {"autoencoder": pipeline.autoencoder, "text": pipeline.text, "denoiser": pipeline.denoiser}

    def load_tuned(path, names=None, **options):
        asked.append(path)
        return LoadedModel(parts, settings, "tiny", tmp_path)

    monkeypatch.setattr(ldm.pipeline.pipeline, "load_tuned", load_tuned)
    return asked, parts, settings


def test_load_puts_the_parts_together(pipeline, loads):
    _, parts, _ = loads
    parts["denoiser"].train()
    loaded = Pipeline.load("somewhere")
    assert not loaded.denoiser.training and loaded.name == "tiny"
    assert torch.equal(loaded(REQUEST), pipeline(REQUEST))
    del parts["denoiser"]
    with pytest.raises(ValueError, match="holds autoencoder, text; this needs denoiser"):
        Pipeline.load("somewhere")


@pytest.mark.parametrize("change", [{"diffusion": {"new": 1}}, {"diffusion": {}, "size": None}])
def test_settings_of_another_version_are_refused(loads, change):
    _, _, settings = loads
    settings.update(change)
    if change.get("size", 1) is None:
        del settings["size"]
    with pytest.raises(ValueError, match="somewhere was made by another version"):
        Pipeline.load("somewhere")


def run(*words):
    app = ldm.cli.generate.typer.Typer()
    app.command()(ldm.cli.generate.generate)
    return CliRunner().invoke(app, ["model", *map(str, words), "--device", "cpu"])


def test_generate_writes_numbered_images_with_their_settings(pipeline, loads, tmp_path):
    out = tmp_path / "deep" / "out"
    words = ["a cat", "a dog", "--count", 2, "--seed", 5, "--steps", 4, "--batch", 1, "--negative", "fog", "--out", out]
    result = run(*words)
    assert result.exit_code == 0, result.output
    names = ["00000-5.png", "00001-6.png", "00002-5.png", "00003-6.png", "grid-00000.png"]
    assert sorted(os.listdir(out)) == names
    assert result.stdout.split() == [str(out / name) for name in names]
    settings = read_settings(out / "00003-6.png")
    assert settings["Prompt"] == "a dog" and settings["Seed"] == 6 and settings["Size"] == "16x16"
    assert settings["Negative prompt"] == "fog" and settings["Model"] == "tiny" and settings["Steps"] == 4
    with Image.open(out / "00000-5.png") as image:
        assert image.size == (16, 16) and image.text["parameters"].startswith("a cat\nNegative prompt: fog\nSteps: 4")

    before = {name: (out / name).read_bytes() for name in names}
    assert run(*words).exit_code == 0
    again = sorted(set(os.listdir(out)) - set(names))
    assert again == ["00004-5.png", "00005-6.png", "00006-5.png", "00007-6.png", "grid-00001.png"]
    assert {name: (out / name).read_bytes() for name in names} == before
    assert (out / "00004-5.png").read_bytes() == before["00000-5.png"]


def test_generate_leaves_other_files_alone(loads, tmp_path):
    (tmp_path / "00041-notes.png").touch(), (tmp_path / "99999.txt").touch()
    assert run("a cat", "--steps", 1, "--size", "8x12", "--out", tmp_path).exit_code == 0
    assert sorted(os.listdir(tmp_path)) == ["00041-notes.png", "00042-0.png", "99999.txt"]
    with Image.open(tmp_path / "00042-0.png") as image:
        assert image.size == (8, 12)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "8by8"], "--size must be N or WxH"),
        (["--sampler", "dimm"], "did you mean 'ddim'"),
        (["--steps", 0], "at least 1"),
        (["--count", 0], "count must be at least 1"),
        (["--seed", -1], "seeds must be in"),
    ],
)
def test_generate_checks_before_it_loads(loads, tmp_path, words, message):
    result = run("a cat", *words, "--out", tmp_path / "out")
    assert isinstance(result.exception, ValueError) and re.search(message, str(result.exception))
    assert loads[0] == [] and not (tmp_path / "out").exists()


def test_generate_makes_no_folder_for_what_the_model_cannot_draw(loads, tmp_path):
    result = run("a cat", "--size", 10, "--out", tmp_path / "out")
    assert "multiples of 4 px" in str(result.exception) and not (tmp_path / "out").exists()


def test_compvis_spacing_takes_the_steps_it_can(pipeline):
    """30 asked for are 31 there; the pictures still come at the end of a batch."""
    request = replace(REQUEST, steps=30, spacing="compvis")
    assert pipeline.steps(request) == 31
    steps = [step.index for step in pipeline.stream(request)]
    assert steps == list(range(31 * request.batches))
    assert pipeline(request).shape[0] == len(request.prompts)


def test_projected_guidance_and_intervals_reach_the_pictures(pipeline):
    plain = replace(REQUEST, guidance=6.0)
    requests = {name: replace(plain, steering=Steering(**change)) for name, change in GUIDANCE.items()}
    pictures = {name: pipeline(request) for name, request in requests.items()}
    assert torch.equal(pictures["plain"], pipeline(plain))
    different = [name for name in GUIDANCE if not torch.equal(pictures[name], pictures["plain"])]
    assert different == ["interval", "projected"]
    assert torch.equal(pipeline(requests["projected"]), pictures["projected"])  # nothing is remembered
    settings = pipeline.settings(requests["projected"], 0)
    assert (settings["Steering parallel"], settings["Steering momentum"]) == (0.0, -0.5)
    for bad, message in (({"interval": (5.0, 1.0)}, "low <= high"), ({"rescale": 2.0}, "rescale")):
        with pytest.raises(ValueError, match=message):
            replace(plain, steering=Steering(**bad))


GUIDANCE = {
    "plain": {},
    "interval": {"interval": (0.0, 400.0)},
    "whole interval": {"interval": (0.0, 1000.0)},
    "projected": {"parallel": 0.0, "momentum": -0.5, "norm": 15.0},
}


def test_samplers_by_the_names_people_type(pipeline):
    typed = replace(REQUEST, sampler="DPM++ 2M Karras")
    ours = replace(REQUEST, sampler="dpmpp_2m", spacing="karras")
    assert torch.equal(pipeline(typed), pipeline(ours))
    assert pipeline.settings(typed, 0)["Spacing"] == "karras"
    with pytest.raises(ValueError, match="did you mean"):
        replace(REQUEST, sampler="dpm++ 2n")


def test_the_list_of_samplers():
    result = run("--list-samplers")
    assert result.exit_code == 0 and "dpmpp_2m" in result.output and "karras" in result.output
