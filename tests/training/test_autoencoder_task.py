"""The first stage's losses are their formulas; its two sides train as one process, as two, and after a resume."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import Batch
from ldm.checkpoints.load import load_model
from ldm.models.autoencoder import Posterior
from ldm.models.discriminator import logits_for_generator
from ldm.models.perceptual import random_perceptual
from ldm.models.vq import AutoencoderVQ, Quantized
from ldm.training.adversary import AdversaryConfig, adaptive_weight, judge
from ldm.training.autoencoder import AutoencoderTask
from ldm.training.run import build, run
from ldm.training.statistics import misfit, track
from tests.conftest import tiny_config
from tests.training.launch import by_one_and_by_two
from tests.training.test_resume import files_of, train_in_two_parts

PLAYER = "{channels: 8, layers: 1, norm_groups: 4}"
GAN = [f"task.adversary={{weight: 0.5, model: {PLAYER}}}"]
EVERYTHING = [
    f"task.adversary={{weight: 0.5, r1: 0.1, lecam: 0.1, model: {PLAYER}}}",
    "task.perceptual=random",
    "task.learn_logvar=true",
    "task.normalisation=sum",
]
VQ = ["task.codebook={entries: 16, decay: 0.8, restart: 0.5}"]


def task_of(shards: Path, tmp_path: Path, *settings: str) -> AutoencoderTask:
    _, task = build(tiny_config("autoencoder", tmp_path / "unused", shards, *settings))
    assert isinstance(task, AutoencoderTask)
    return task


def batch_of(count: int = 4) -> Batch:
    image = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(7)) * 2 - 1
    return Batch(image, [""] * count, torch.arange(count), [str(i) for i in range(count)])


def reconstructed(task: AutoencoderTask, batch: Batch) -> tuple[Tensor, Any]:
    with torch.no_grad():
        return task._model(batch.image, task._noise(batch))


@pytest.mark.parametrize("normalisation", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_the_loss_by_hand(kind: str, normalisation: str, shards: Path, tmp_path: Path) -> None:
    settings = [f"task.reconstruction={kind}", f"task.normalisation={normalisation}", "task.kl_weight=0.01"]
    task = task_of(shards, tmp_path, *settings, "task.perceptual=random", "task.perceptual_weight=3")
    batch = batch_of()
    ((name, loss, metrics),) = list(task.losses(batch, 0))
    out, posterior = reconstructed(task, batch)
    assert isinstance(posterior, Posterior)
    total = 0.0
    for i in range(4):  # sums over values, as CompVis writes it: the perceptual distance counts at every value
        error = (out[i] - batch.image[i]).abs() if kind == "l1" else (out[i] - batch.image[i]) ** 2
        distance = random_perceptual()(out[i : i + 1], batch.image[i : i + 1])
        mean, logvar = posterior.mean[i], posterior.logvar[i]
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum()
        total += (error + 3 * distance).sum().item() + 0.01 * kl.item()
    expected = total / 4 / (3 * 16 * 16 if normalisation == "mean" else 1)
    assert name == "autoencoder" and loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_the_learned_variance_finds_the_mean_error(shards: Path, tmp_path: Path) -> None:
    """E / exp(s) + s is least at s = log E, where it is 1 + log E."""
    task = task_of(shards, tmp_path, "task.learn_logvar=true", "task.kl_weight=0")
    batch = batch_of()
    logvar = task.autoencoder.logvar
    error = (reconstructed(task, batch)[0] - batch.image).abs().mean().item()
    ((_, loss, _),) = list(task.losses(batch, 0))
    assert loss.item() == pytest.approx(error)  # s = 0
    loss.backward()
    assert logvar.grad.item() == pytest.approx(1 - error, rel=1e-5)
    torch.nn.init.constant_(logvar, math.log(error))
    logvar.grad = None
    ((_, loss, _),) = list(task.losses(batch, 0))
    loss.backward()
    assert loss.item() == pytest.approx(1 + math.log(error), rel=1e-5) and abs(logvar.grad.item()) < 1e-5


def test_the_adaptive_weight_by_hand_and_by_finite_differences(shards: Path, tmp_path: Path) -> None:
    task = task_of(shards, tmp_path, *GAN, "task.adversary.weight=0.5").double()
    batch = batch_of(2)
    image = batch.image.double()
    noise = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    last = task._model.decoder.conv_out.weight

    def both() -> tuple[Tensor, Tensor]:
        out = task._model(image, noise)[0]
        return (out - image).square().mean(), -logits_for_generator(task.discriminator, out).mean()  # type: ignore

    weight = adaptive_weight(*both(), last)
    norms = [0.0, 0.0]
    with torch.no_grad():
        for place in range(last.numel()):
            entry = last.view(-1)[place]
            entry += 1e-6
            up = both()
            entry -= 2e-6
            down = both()
            entry += 1e-6
            norms = [n + ((u - d).item() / 2e-6) ** 2 for n, u, d in zip(norms, up, down, strict=True)]
    assert weight.item() == pytest.approx(norms[0] ** 0.5 / (norms[1] ** 0.5 + 1e-4), rel=1e-5)
    assert not weight.requires_grad and last.grad is None
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    assert adaptive_weight(x.sum(), 0 * x.sum(), x).item() == 1e4  # 1.4 / 1e-4, clamped
    assert adaptive_weight((x * x).sum() / 2, 2 * x[0], x).item() == pytest.approx(5 / 2.0001)


def test_both_sides_get_their_own_gradients_and_the_second_yield_needs_no_second_forward(
    shards: Path, tmp_path: Path
) -> None:
    task = task_of(shards, tmp_path, *GAN, "task.adversary.adaptive=false", "task.kl_weight=0")
    batch, calls = batch_of(), []
    task.autoencoder.register_forward_hook(lambda *_: calls.append(1))
    stream = task.losses(batch, 0)
    name, loss, metrics = next(stream)
    loss.backward()
    assert task.trained == ("autoencoder", "discriminator") and name == "autoencoder"
    assert all(p.grad is None for p in task.discriminator.parameters())  # type: ignore[union-attr]
    out = reconstructed(task, batch)[0]
    calls.clear()
    (fake,) = task.discriminator(out)  # type: ignore[misc]
    assert loss.item() == pytest.approx((out - batch.image).abs().mean().item() - 0.5 * fake.mean().item(), rel=1e-5)
    assert metrics["fooling_weight"].item() == 0.5
    before = {n: p.grad.clone() for n, p in task.autoencoder.named_parameters()}
    name, loss, metrics = next(stream)
    (real,) = task.discriminator(batch.image)  # type: ignore[misc]
    hinge = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    assert name == "discriminator" and loss.item() == pytest.approx(hinge.item(), rel=1e-5)
    loss.backward()
    assert all(torch.equal(before[n], p.grad) for n, p in task.autoencoder.named_parameters())
    assert all(p.grad is not None for p in task.discriminator.parameters())  # type: ignore[union-attr]
    assert calls == [] and next(stream, None) is None


def test_the_game_begins_at_its_step(shards: Path, tmp_path: Path) -> None:
    task = task_of(shards, tmp_path, *GAN, "task.adversary.start_step=3")
    assert [[name for name, *_ in task.losses(batch_of(), step)] for step in (2, 3)] == [
        ["autoencoder"],
        ["autoencoder", "discriminator"],
    ]


def test_penalties_add_to_the_discriminators_loss_and_anchors_follow_the_logits(shards: Path, tmp_path: Path) -> None:
    task = task_of(shards, tmp_path, *GAN)
    player, batch = task.discriminator, batch_of()
    assert player is not None
    made = batch.image.flip(0) * 0.5
    plain, _ = judge(player, AdversaryConfig(weight=1), batch.image, made)
    both, said = judge(player, AdversaryConfig(weight=1, r1=4.0, lecam=0.5), batch.image, made)
    assert (both - plain).item() == pytest.approx(2 * said["r1"].item() + 0.5 * said["lecam"].item(), rel=1e-5)
    expected = [0.01 * said["real"].item(), 0.01 * said["fake"].item()]
    assert player.anchors.tolist() == pytest.approx(expected, rel=1e-4)  # type: ignore[operator]


def test_a_codebooks_loss_stands_in_for_the_kl(shards: Path, tmp_path: Path) -> None:
    task = task_of(shards, tmp_path, "task.codebook={entries: 16}", "task.kl_weight=5")
    batch = batch_of()
    ((_, loss, metrics),) = list(task.losses(batch, 0))
    out, latent = reconstructed(task, batch)
    assert isinstance(latent, Quantized)
    expected = (out - batch.image).abs().mean() + 1.25 * (latent.raw - latent.codes).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and "kl" not in metrics
    assert {"codebook", "perplexity", "psnr"} <= task.validate(batch).keys()
    assert not torch.equal(task._model.latent_std, torch.ones(2, 1, 1))  # those before the codebook are measured


def test_candidates_for_unused_codes_are_latents_of_every_sample(shards: Path, tmp_path: Path) -> None:
    task = task_of(shards, tmp_path, *VQ)
    raw = torch.randn(4, 2, 8, 8)
    found = task._candidates(raw, 5)
    for code, row in enumerate(found):
        places = raw[code % 4].flatten(1).T
        assert (places == row).all(1).any()
    assert torch.equal(found, task._candidates(raw, 5)) and not torch.equal(found, task._candidates(raw, 6))
    parts = []
    for rank in (0, 1):  # of two processes, each with half of the batch
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            patch.setattr(torch.distributed, "get_world_size", lambda: 2)
            patch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            patch.setattr("ldm.training.autoencoder.over_ranks", lambda tensor, operation: tensor)
            parts.append(task._candidates(raw[2 * rank : 2 * rank + 2], 5))
    assert torch.equal(parts[0] + parts[1], found)


def test_statistics_of_one_scalar_or_of_each_channel() -> None:
    mean = torch.tensor([1.0, -3.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    logvar = torch.tensor([0.0, math.log(4.0)]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    model = torch.nn.Module()
    for scalar, expected in ((False, ([1, -3], [1, 2])), (True, ([-1, -1], [math.sqrt(6.5)] * 2))):
        model.latent_mean, model.latent_std = torch.zeros(2, 1, 1), torch.ones(2, 1, 1)
        for step in range(2000):
            track(model, Posterior(mean, logvar), step, scalar=scalar)  # type: ignore[arg-type]
        assert model.latent_mean.flatten().tolist() == pytest.approx(expected[0], abs=1e-4)
        assert model.latent_std.flatten().tolist() == pytest.approx(expected[1], abs=1e-3)


def test_latents_of_the_wrong_scale_are_said_to_be() -> None:
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert misfit(latent, "here") is None
    assert "runs/a have mean" in str(misfit(latent / 0.18215, "runs/a")) and "--statistics" in str(
        misfit(latent * 0.3, "")
    )
    assert misfit(latent + 1, "") is not None


def test_decoder_only_leaves_the_latents_alone(shards: Path, models: dict[str, Path], tmp_path: Path) -> None:
    more = ["task.decoder_only=true", f"init={models['autoencoder']}", "task.learn_logvar=true", *GAN]
    run(tiny_config("autoencoder", tmp_path / "out", shards, *more))
    before, after = (
        load_model(path).require("autoencoder")[0].state_dict() for path in (models["autoencoder"], tmp_path / "out")
    )
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {n for n in before if n.startswith(("encoder.", "quant.", "latent_"))}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["task.reconstruction=l3"], "unknown task.reconstruction 'l3'"),
        (["task.normalisation=total"], "unknown task.normalisation 'total'"),
        (["task.statistics=all"], "unknown task.statistics 'all'"),
        (["task.adversary.loss=wgan"], "unknown adversary loss 'wgan'"),
        (["task.adversary.weight=-1"], "adversary.weight must be at least 0"),
        (
            ["task.adversary.weight=1"],
            "picture size 16 is too small for a discriminator of 3 layers, which needs 24 px",
        ),
        (["task.perceptual=nowhere"], "'nowhere' needs in that folder: vgg16-397923af.pth from https"),
        (["task.perceptual=random", "data.size=8"], "picture size 8: a perceptual loss needs at least 16 px"),
    ],
)
def test_mistakes_are_refused_before_any_work(settings: list[str], message: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(shards, tmp_path, *settings)


RESUMED = {
    "everything": EVERYTHING,
    "before the game": [*EVERYTHING, "task.adversary.start_step=3"],  # stops at 2: its optimizer is still empty
    "batch norm": [*GAN, "task.adversary.model.norm=batch"],
    "codebook": [*VQ, *GAN],
}


@pytest.mark.parametrize("name", RESUMED)
def test_two_halves_equal_the_whole(name: str, shards: Path, tmp_path: Path) -> None:
    more = ["accumulate=2", *RESUMED[name]]
    run(tiny_config("autoencoder", tmp_path / "whole", shards, "save_steps=100", *more))
    train_in_two_parts("autoencoder", tmp_path / "parts", shards, *more)
    whole, parts = files_of(tmp_path / "whole"), files_of(tmp_path / "parts")
    assert "train/optimizer-discriminator.safetensors" in whole and whole.keys() == parts.keys()
    assert [file for file in whole if whole[file] != parts[file]] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["everything", "codebook"])
def test_two_processes_equal_one(name: str, shards: Path, tmp_path: Path) -> None:
    # Steps in proportion to the gradient: Adam's own hide a wrong factor, and magnify rounding where there is none.
    # No restarts: on equal latents of a flat background codes are equal too, and rounding chooses between them.
    plain = [
        "task.codebook.restart=0",
        "optimizer.eps=1",
        "optimizer.lr=0.1",
        "optimizer.clip=0",
        "task.normalisation=mean",
    ]
    found = by_one_and_by_two(lambda out: tiny_config("autoencoder", out, shards, *RESUMED[name], *plain), tmp_path)
    assert any(k.startswith("discriminator.") for k in found[1])
    # While all latents choose one code the decoder's input is flat, and its norms magnify rounding a thousandfold.
    near = {"atol": 2e-3, "rtol": 1e-3} if name == "codebook" else {"atol": 1e-5, "rtol": 1e-4}
    for key, value in found[1].items():
        torch.testing.assert_close(found[2][key], value, **near)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gaussian", "codebook"])
def test_a_short_game_is_stable(name: str, shards: Path, tmp_path: Path) -> None:
    """200 steps: pictures get better and neither side wins: the hinge loss, 1 for a blind critic, stays off 0 and 2."""
    settings = ["task.perceptual=random", *GAN, "task.adversary.start_step=50", "optimizer.betas=[0.5,0.9]"]
    settings += ["samples=1600", "optimizer.lr=2e-3", "validate_steps=50", "save_steps=1000", "preview_steps=0"]
    settings += ["task.codebook={entries: 64, decay: 0.9, restart: 0.1}"] if name == "codebook" else []
    task = run(tiny_config("autoencoder", tmp_path / "out", shards, *settings)).task
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    psnr = [line["psnr"] for line in lines if line["kind"] == "validation"]
    critic = [line["discriminator"] for line in lines if "discriminator" in line]
    weights = [line["fooling_weight"] for line in lines if "fooling_weight" in line]
    assert psnr[-1] > psnr[0] + 1 and psnr[-1] > 17, psnr
    assert len(critic) == 150 and max(critic) < 2 and 0.05 < sum(critic[-30:]) / 30 < 1.05
    assert max(critic) - min(critic) > 0.02 and max(weights) < 1e4
    if name == "codebook":
        model = task.components()["autoencoder"]
        assert isinstance(model, AutoencoderVQ)
        assert [line["perplexity"] for line in lines if "perplexity" in line][-1] > 8
