"""Fine-tuning through the one loop: every method runs, resumes to the byte, leaves the base alone and learns."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from data_pipeline.build import BuildConfig
from data_pipeline.build import build as build_shards
from data_pipeline.loader import Loader, fixed_batch, open_data
from data_pipeline.sources.shapes import ShapesConfig, ShapesSource
from ldm.adapters.lora import eject
from ldm.adapters.tuned import load_tuned
from ldm.checkpoints.convert import convert
from ldm.checkpoints.files import commit, newest_valid, read_json, read_tensors
from ldm.checkpoints.load import load_model, save_model
from ldm.config import load_config
from ldm.diffusion.process import Aim, Diffusion, DiffusionConfig
from ldm.models.controlnet import Controlled
from ldm.models.text import TextEncoder
from ldm.training import engine
from ldm.training.additions import begun
from ldm.training.finetuning import FinetuningTask
from ldm.training.preparing import Subject, with_class
from ldm.training.quantize import quantize
from ldm.training.randomness import SampleRandomness
from ldm.training.run import RunConfig, build, inspection, run
from ldm.training.state import TrainState, best_checkpoint
from ldm.types import Conditioning
from tests.conftest import LOOP, tiny_config
from tests.training.test_resume import files_of

METHODS: dict[str, list[str]] = {
    "full": ["task.method=full"],
    "with text": ["task.method=full", "task.train_text=true"],
    "lora": ["task.method=adapter", "task.adapter={rank: 2, alpha: 2, dropout: 0.1}"],
    "lora of text": ["task.method=adapter", "task.adapter={rank: 2, alpha: 2, text: true, targets: [all]}"],
    "dora": ["task.method=adapter", "task.adapter={kind: dora, rank: 2}"],
    "loha": ["task.method=adapter", "task.adapter={kind: loha, rank: 2}"],
    "lokr": ["task.method=adapter", "task.adapter={kind: lokr, rank: 2}"],
    "lora and a word": ["task.method=adapter", "task.adapter={rank: 2}", "task.word=red", "task.initial=circle"],
    "full, from what it says": ["task.method=full", "task.prior=prediction", "data.prior=[true]"],
    "full and a word": ["task.method=full", "task.word=red", "task.initial=circle"],
    "word": ["task.method=textual_inversion", "task.word=red", "task.vectors=2", "task.initial=a circle here"],
    "controlnet": ["task.method=controlnet", "data.condition=edges"],
    "t2i": ["task.method=t2i_adapter", "data.condition=edges"],
    "inpainting": ["task.method=inpainting"],
    "instruct": ["task.method=instruct", "data.condition=edges"],
}
PARTIAL = ("lora", "lora of text", "lora and a word", "dora", "loha", "lokr", "word", "controlnet", "t2i")


@pytest.fixture(scope="module")
def base(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as one that has learned something: no weight is zero any more."""
    found = load_model(models["denoising"])
    generator = torch.Generator().manual_seed(0)
    for parameter in found.components["denoiser"].parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
    out = tmp_path_factory.mktemp("base")
    with commit(out / "model") as stage:
        save_model(stage, found.components, found.settings, "base")
    return out / "model"


@pytest.fixture(scope="module")
def conditioned(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight scenes, each with itself beside it."""
    scenes = ShapesSource(ShapesConfig(count=8, seed=3))
    samples = [replace(scenes[i], condition=scenes[i].image) for i in range(8)]
    build_shards(samples, BuildConfig(size=32), out := tmp_path_factory.mktemp("conditioned") / "shards")
    return out


def config_of(base: Path, shards: Path, out: Path, *more: str) -> RunConfig:
    """Four steps from the base."""
    where = [f"out={out}", f"data.path={shards}", "data.size=16", f"validation={shards}", "validation_samples=8"]
    task = ["task.kind=finetuning", f"task.model={base}", "task.previews=[a red circle]", "task.preview_steps=2"]
    return load_config(RunConfig, [], [*task, *LOOP, *where, *more])


def task_of(base: Path, shards: Path, out: Path, *more: str) -> FinetuningTask:
    task = build(config_of(base, shards, out, *more))[1]
    assert isinstance(task, FinetuningTask)
    return task


def batch_of(shards: Path, count: int = 8, **given: Any) -> Batch:
    config = config_of(Path("none"), shards, Path("none"), "task.method=full").data
    return fixed_batch(open_data(config), replace(config, **given), count)


@pytest.mark.parametrize("method", METHODS)
def test_two_halves_equal_the_whole(method: str, base: Path, shards: Path, tmp_path: Path) -> None:
    def go(name: str) -> int:
        more = ["save_steps=100", "accumulate=2", "task.dropout=0.2", *METHODS[method]]
        return run(config_of(base, shards, tmp_path / name, *more)).step

    real, calls = engine.update, 0

    def update(*args: Any) -> object:
        nonlocal calls
        outcome = real(*args)
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return outcome

    assert go("whole") == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "update", update)
        assert go("parts") == 2
    assert go("parts") == 4
    whole, parts = files_of(tmp_path / "whole"), files_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert [name for name in whole if whole[name] != parts[name]] == []


# --- what was learned is what draws -----------------------------------------------------------------------------


def said(denoiser: nn.Module, text: nn.Module, control: tuple[Tensor, ...] = ()) -> Tensor:
    """What the networks say of fixed noise and two prompts, one with the learned word."""
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    cond = replace(text(["a red circle", "a blue square"]), control=control)
    with torch.no_grad():
        return denoiser(x, torch.tensor([300.0, 700.0]), cond)  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", PARTIAL)
def test_a_run_holds_what_was_put_on_the_base_and_draws_with_both(
    method: str, base: Path, shards: Path, tmp_path: Path
) -> None:
    state = run(config_of(base, shards, tmp_path / "run", "optimizer.lr=0.01", *METHODS[method]))
    task = state.task
    assert isinstance(task, FinetuningTask)
    found = load_tuned(tmp_path / "run")
    hint = (torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)),)
    with state.averaged():
        task.eval()
        if method in ("controlnet", "t2i"):
            (control,) = load_model(tmp_path / "run", ["controlnet"]).components.values()
            mine, theirs = (
                said(Controlled(d, c), t, hint)  # type: ignore[arg-type]
                for d, c, t in (
                    (task.denoiser, task.controlled_by(), task.text),
                    (found.components["denoiser"], control, found.components["text"]),
                )
            )
        else:
            mine = said(task.denoiser, task.text)
            theirs = said(found.components["denoiser"], found.components["text"])
    before = load_model(base)
    untouched = said(before.components["denoiser"], before.components["text"])
    assert (theirs - mine).abs().max() < 1e-4 * mine.abs().max()
    assert (mine - untouched).abs().max() > 1e-3 * mine.abs().max()  # the first would be true of nothing learned too

    folder = newest_valid(tmp_path / "run" / "checkpoints")
    assert folder is not None
    learned = sum(t.numel() for name in task.trained for t in task.kept(getattr(task, name)).values())
    tensors = [tensor for file in folder.rglob("*.safetensors") for tensor in read_tensors(file)[0].values()]
    numbers = sum(tensor.numel() for tensor in tensors if tensor.numel() > 1)  # besides counts of steps and alphas
    assert learned <= numbers <= (1 + 1 + 2 + 1) * learned  # own, average, two moments; and the model's
    if method not in ("controlnet", "t2i"):
        with pytest.raises(ValueError, match="holds no model of its own"):
            load_model(tmp_path / "run")


@pytest.mark.parametrize("method", PARTIAL)
def test_the_base_stays_as_it_is_to_the_byte(method: str, base: Path, shards: Path, tmp_path: Path) -> None:
    state = run(config_of(base, shards, tmp_path / "run", "optimizer.lr=0.01", *METHODS[method]))
    task = state.task
    assert isinstance(task, FinetuningTask)
    before = load_model(base, dtype=torch.float32).components
    parts = {"autoencoder": task.autoencoder, "text": task.text, "denoiser": task.denoiser}
    if method in METHODS and "adapter" in METHODS[method][0]:
        eject({"denoiser": task.denoiser, **({"text": task.text} if "of text" in method else {})})
    for name, module in parts.items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[name].state_dict()[key]), f"{name}.{key}"


def test_another_base_is_refused(base: Path, shards: Path, tmp_path: Path) -> None:
    found = load_model(base)

    def put(change: float) -> None:
        found.components["denoiser"].conv_in.bias.data += change  # type: ignore[union-attr, operator]
        with commit(tmp_path / "base") as stage:
            save_model(stage, found.components, found.settings, "base")

    put(0.0)
    words = ["save_steps=2", *METHODS["lora"]]
    run(config_of(tmp_path / "base", shards, tmp_path / "run", *words))
    put(1e-3)
    with pytest.raises(ValueError, match=r"the denoiser of .*base is not what it was"):
        run(config_of(tmp_path / "base", shards, tmp_path / "run", "samples=64", *words))
    with pytest.raises(ValueError, match=r"was trained on another model than is in .*base now: its denoiser"):
        load_tuned(tmp_path / "run")


# --- losses -----------------------------------------------------------------------------------------------------


def test_a_mask_weighs_the_pixels_of_the_loss() -> None:
    """Against the written-out weighted mean; a mask of ones is no mask; nothing counts, nothing is lost."""
    diffusion = Diffusion.from_config(DiffusionConfig())
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 2, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    mask, u = torch.rand(3, 1, 4, 4, generator=g), torch.tensor([0.1, 0.5, 0.9])
    mask[2] = 0
    answer = torch.randn(3, 2, 4, 4, generator=g, dtype=torch.float64)

    def loss(mask: Tensor | None) -> Tensor:
        return diffusion.loss(lambda x, t, cond: answer, x0, Conditioning(), noise=noise, u=u, aim=Aim(mask))

    errors = (answer - noise) ** 2
    for i in range(2):
        weights = mask[i].double().expand(2, 4, 4)
        assert loss(mask)[i].item() == pytest.approx(float((weights * errors[i]).sum() / weights.sum()), rel=1e-12)
    assert loss(mask)[2].item() == 0
    torch.testing.assert_close(loss(torch.ones(3, 1, 4, 4)), loss(None), rtol=1e-12, atol=0)
    vlb = Diffusion.from_config(DiffusionConfig(objective="hybrid", variance="learned_range"))
    with pytest.raises(ValueError, match="objective 'simple'"):
        vlb.loss(lambda x, t, cond: torch.cat([x, x], 1), x0, Conditioning(), noise=noise, u=u, aim=Aim(mask))


def test_a_masked_picture_teaches_only_where_it_counts(base: Path, shards: Path, tmp_path: Path) -> None:
    """A latent pixel of 2 x 2 pixels counts by their mean: by hand, from the network's own errors."""
    task = task_of(base, shards, tmp_path, "task.method=full", "task.dropout=0")
    batch = batch_of(shards)
    mask = torch.zeros(8, 1, 16, 16)
    mask[:, :, :5, :7] = 1
    found = next(task.losses(replace(batch, mask=mask), 0))[1].item()

    random = SampleRandomness(task.seed, batch.positions)
    latent, cond = task._encode(batch, random, 0.0)
    noise, u = random.normal("noise", (2, 8, 8)), random.uniform("timestep")
    levels = task.diffusion.levels(u)
    x = task.diffusion.add_noise(latent, noise, levels)
    with torch.no_grad():
        errors = (task.denoiser(x, levels.t.float(), cond) - noise) ** 2
    cells = torch.zeros(8, 8)  # 5 rows and 7 columns of pixels: two and a half, and three and a half cells
    cells[:2, :3], cells[2, :3], cells[:2, 3], cells[2, 3] = 1, 0.5, 0.5, 0.25
    by_hand = (errors * cells).sum((1, 2, 3)) / (2 * cells.sum())
    assert found == pytest.approx(float(by_hand.mean()), rel=1e-5)
    ones = next(task.losses(replace(batch, mask=torch.ones(8, 1, 16, 16)), 0))[1].item()
    assert ones == pytest.approx(next(task.losses(batch, 0))[1].item(), rel=1e-6)


def test_prior_preservation_is_the_sum_of_both_losses(base: Path, shards: Path, tmp_path: Path) -> None:
    """Ruiz et al. 2023, eq. 2, halved: in every even batch as many pictures of the class, at their weight."""
    config = config_of(base, shards, tmp_path / "run", "task.method=full", "task.dropout=0", "batch_size=6")
    subject = Subject("", class_prompts=("a circle", "a square"), class_pictures=5)
    data = with_class(subject, str(base), replace(config.data, repeats=(1.0,)), tmp_path, 1.5)
    readers = open_data(data)
    batches = iter(Loader(readers, data, batch_size=6, seed=0))
    task = task_of(base, shards, tmp_path, "task.method=full", "task.dropout=0", "task.prior_weight=0.3")
    for _ in range(4):
        batch = next(batches)
        prior = torch.tensor([key.startswith("drawn-") for key in batch.keys])
        assert prior.sum() == 3 and batch.prior is not None and torch.equal(batch.prior, prior)
        assert all(caption in subject.class_prompts for caption, p in zip(batch.captions, prior, strict=True) if p)
        each = task._loss(replace(batch, prior=None), 0)
        expected = 0.5 * (each[~prior].mean() + 0.3 * each[prior].mean())
        torch.testing.assert_close(next(task.losses(batch, 0))[1], expected)
    again = with_class(subject, str(base), replace(config.data, repeats=(1.0,)), tmp_path, 1.5)
    assert again.paths == data.paths  # drawn once


def test_class_pictures_of_ones_own(base: Path, shards: Path, tmp_path: Path) -> None:
    """Of a folder, those without captions as the first prompt; as often as the subject, whatever their repeats."""
    pictures = tmp_path / "pictures"
    for name, count in (("3_some", 2), ("1_more", 3)):
        (pictures / name).mkdir(parents=True)
        for i in range(count):
            ShapesSource(ShapesConfig(count=9))[i].image.save(pictures / name / f"{i}.png")
    (pictures / "3_some" / "0.txt").write_text("a red circle")
    config = config_of(base, shards, tmp_path / "run", "task.method=full")
    subject = Subject("", class_folder=str(pictures), class_prompts=("a shape",))
    data = with_class(subject, str(base), replace(config.data, repeats=(2.0,)), tmp_path, 1.5)
    assert [bool(p) for p in data.prior] == [False, True, True]
    readers = open_data(data)
    often = {len(r): times for r, times in zip(readers[1:], data.repeats[1:], strict=True)}
    assert often[2] == pytest.approx(3 * often[3]) and 2 * often[2] + 3 * often[3] == pytest.approx(2 * len(readers[0]))
    batch = next(iter(Loader(readers, data, batch_size=30, seed=0)))
    assert batch.prior is not None and int(batch.prior.sum()) == 15
    assert {c for c, p in zip(batch.captions, batch.prior.tolist(), strict=True) if p} == {"a red circle", "a shape"}
    finished = Subject("", class_folder=str(data.paths[1]))
    again = with_class(finished, str(base), replace(config.data, repeats=(2.0,)), tmp_path, 1.5)
    assert again.paths == (*config.data.paths, data.paths[1])
    with pytest.raises(ValueError, match="give one at most"):
        Subject("", class_folder=str(pictures), class_prompts=("a shape", "a circle"))


def test_a_whole_model_keeps_its_word_beside_it(base: Path, shards: Path, tmp_path: Path) -> None:
    state = run(config_of(base, shards, tmp_path / "run", "optimizer.lr=0.01", *METHODS["full and a word"]))
    task = state.task
    assert isinstance(task, FinetuningTask)
    found = load_tuned(tmp_path / "run").components
    with state.averaged():
        task.eval()
        mine = said(task.denoiser, task.text)
    theirs = said(found["denoiser"], found["text"])
    assert (theirs - mine).abs().max() < 1e-4 * mine.abs().max()
    without = load_model(tmp_path / "run").components
    assert (said(without["denoiser"], without["text"]) - mine).abs().max() > 1e-3 * mine.abs().max()
    for name, tensor in load_model(base).components["text"].state_dict().items():  # it alone was taught, by a word
        assert torch.equal(without["text"].state_dict()[name], tensor)
    notes = convert(tmp_path / "run", tmp_path / "converted", "native")
    assert any("word that it was taught stays a file" in note for note in notes)


LEARNERS = ("full", "full and a word", "with text", "lora", "lora of text", "lora and a word", "dora", "loha", "lokr")


@pytest.mark.parametrize("method", LEARNERS)
def test_what_the_base_says_is_the_aim(method: str, base: Path, shards: Path, tmp_path: Path) -> None:
    """Nothing is lost there at first; changed, the loss is the distance to what the base itself says, and that of the
    other samples the usual one. No gradient reaches what stands for the base."""
    words = [*METHODS[method], "task.dropout=0", "task.prior_weight=3", "task.prior=prediction"]
    task = task_of(base, shards, tmp_path, *words)
    batch = replace(batch_of(shards, 6), prior=torch.tensor([True, False, True, True, False, True]))
    prior = batch.prior
    task.eval()  # no dropout in adapters
    assert task._loss(batch, 0)[prior].abs().max() < 1e-9
    generator = torch.Generator().manual_seed(3)
    for parameter in getattr(task, task.trained[0]).parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    each, usual = task._loss(batch, 0), task._loss(replace(batch, prior=None), 0)
    torch.testing.assert_close(each[~prior], usual[~prior])

    components = load_model(base, dtype=torch.float32).components
    random = SampleRandomness(task.seed, batch.positions)
    dropped = [u < 0.1 and bool(p) for u, p in zip(random.fractions("caption dropout"), prior, strict=True)]
    latent, _ = task._encode(batch, random, 0.0)
    levels = task.diffusion.levels(random.uniform("timestep"))
    x = task.diffusion.add_noise(latent, random.normal("noise", (2, 8, 8)), levels)
    prompts = ["" if drop else caption for drop, caption in zip(dropped, batch.captions, strict=True)]
    with torch.no_grad():
        expected = components["denoiser"](x, levels.t.float(), components["text"](prompts))
        mine = task.denoiser(x, levels.t.float(), task.text(prompts))
    by_hand = 3 * (mine - expected).square().mean((1, 2, 3))
    torch.testing.assert_close(each[prior].detach(), by_hand[prior], rtol=1e-4, atol=1e-7)
    assert by_hand[prior].min() > 1e-6
    each.sum().backward()
    assert task.before is None or all(p.grad is None for p in task.before.parameters())


def test_captions_of_what_the_base_knows_are_dropped_all_the_same(base: Path, shards: Path, tmp_path: Path) -> None:
    """A tenth of them, and none of the subject's. Of 600 the count is within 4.5 deviations."""
    task = task_of(base, shards, tmp_path, "task.method=full", "task.dropout=0", "task.prior=prediction")
    random, prior = SampleRandomness(0, torch.arange(1200)), torch.arange(1200) % 2 == 0
    batch = Batch(torch.zeros(1200, 3, 2, 2), ["a"] * 1200, torch.arange(1200), ["k"] * 1200, prior=prior)
    dropped = torch.tensor(task._dropped(batch, random, 0.0))
    assert not dropped[~prior].any() and abs(int(dropped.sum()) - 60) < 4.5 * (600 * 0.1 * 0.9) ** 0.5
    assert not any(task._dropped(replace(batch, prior=None), random, 0.0))


def test_what_does_not_go_with_a_prior_is_refused(base: Path, shards: Path, tmp_path: Path) -> None:
    def refused(reason: str, *words: str) -> None:
        with pytest.raises(ValueError, match=reason):
            run(config_of(base, shards, tmp_path / "run", *words))

    refused("goes with task.method=full or adapter", "task.method=inpainting", "task.prior=prediction")
    refused("unknown task.prior", "task.method=full", "task.prior=other")
    refused("must be 0 or more", "task.method=full", "task.prior_weight=-1")
    refused("say yes or no of each of 1", "task.method=full", "data.prior=[true,false]")
    refused("task.word goes with", "task.method=inpainting", "task.word=red")
    hybrid = "task.diffusion={objective: hybrid, variance: learned_range}"
    refused("needs another objective", "task.method=full", "task.prior=prediction", "data.prior=[true]", hybrid)


# --- pictures to go by ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["inpainting", "instruct", "controlnet"])
def test_the_beginning_is_the_base(method: str, base: Path, shards: Path, tmp_path: Path) -> None:
    """New channels weigh nothing, and a ControlNet's maps are zero."""
    task = task_of(base, shards, tmp_path, *METHODS[method])
    batch = batch_of(shards, condition="edges")
    random = SampleRandomness(task.seed, batch.positions)
    _, cond = task._encode(batch, random, 0.0)
    (before,) = load_model(base, ["denoiser"]).components.values()
    x, t = random.normal("x", (2, 8, 8)), torch.linspace(1, 999, 8)
    with torch.no_grad():
        plain = before(x, t, replace(cond, concat=None, control=()))
        found = getattr(task, task.trained[0])(x, t, cond)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    assert (cond.concat is not None) == (method != "controlnet")


def test_holes_are_the_samples_own(base: Path, shards: Path, tmp_path: Path) -> None:
    """mask, then the latents of the picture that is grey in it; the same in any batch."""
    task, batch = task_of(base, shards, tmp_path, *METHODS["inpainting"]), batch_of(shards)
    holes = task._holes(batch)
    assert holes.shape == (8, 3, 8, 8) and set(holes[:, 0].unique().tolist()) <= {0.0, 1.0}
    assert len({tuple(mask.flatten().tolist()) for mask in holes[:, 0]}) > 2
    for one, expected in zip(batch.split(8), holes, strict=True):
        torch.testing.assert_close(task._holes(one)[0], expected, rtol=1e-5, atol=1e-5)
    whole = holes[:, 0].flatten(1).mean(1) == 1
    if whole.any():
        grey = task.autoencoder.encode(torch.zeros(1, 3, 16, 16))[0]
        torch.testing.assert_close(holes[whole][0, 1:], grey, rtol=1e-5, atol=1e-5)


def test_instructions_and_pictures_are_dropped_by_fives(base: Path, shards: Path, tmp_path: Path) -> None:
    """Caption alone, both, picture alone: a share p each. Of 600 samples at p = 0.1 each count is within 4.5
    deviations (false alarm below 3e-5)."""
    task = task_of(base, shards, tmp_path, *METHODS["instruct"])
    random = SampleRandomness(0, torch.arange(600))
    batch = Batch(
        torch.zeros(600, 3, 2, 2), ["a"] * 600, torch.arange(600), ["k"] * 600, condition=torch.rand(600, 3, 2, 2)
    )
    caption = torch.tensor(task._dropped(batch, random, 0.1))
    concat = task._shown(batch, Conditioning(), random, 0.1).concat
    assert concat is not None
    picture = (concat == 0).flatten(1).all(1)
    for count in (caption & ~picture, caption & picture, ~caption & picture):
        assert abs(int(count.sum()) - 60) < 4.5 * (600 * 0.1 * 0.9) ** 0.5
    raw = task.autoencoder.posterior(2 * batch.condition - 1).mean  # type: ignore[operator, union-attr]
    torch.testing.assert_close(concat[~picture], raw[~picture])
    assert not any(task._dropped(batch, random, 0.0))


def test_zeros_stand_for_no_prompt_where_the_base_knows_them(base: Path, shards: Path, tmp_path: Path) -> None:
    task, batch = task_of(base, shards, tmp_path, "task.method=full"), batch_of(shards, 3)
    task.null_prompt = None
    plain, dropped = task._told(batch, [False] * 3), task._told(batch, [False, True, False])
    assert plain.context is not None and dropped.context is not None and dropped.pooled is not None
    assert not dropped.context[1].any() and not dropped.pooled[1].any()
    assert torch.equal(dropped.context[::2], plain.context[::2])


def test_zeros_stand_for_no_prompt_where_prompts_are_read_in_the_pass(base: Path, shards: Path, tmp_path: Path) -> None:
    """And rows of what is not read yet keep them, as they keep their prompts."""
    task, batch = task_of(base, shards, tmp_path, *METHODS["lora of text"]), batch_of(shards, 3)
    task.eval()
    task.null_prompt = None
    told = task._told(batch, [False, True, False])
    x, t = torch.randn(3, 2, 8, 8), torch.tensor([100.0, 500.0, 900.0])
    plain = task.text([*batch.captions[:1], "", *batch.captions[2:]])
    told_nothing = plain.map(lambda v: v * torch.tensor([1, 0, 1]).view(-1, *[1] * (v.ndim - 1)).to(v))
    with torch.no_grad():
        expected = task.denoiser(x, t, told_nothing)
        torch.testing.assert_close(task.joint(x, t, told), expected)
        rows = torch.tensor([1, 2])
        torch.testing.assert_close(task.joint(x[rows], t[rows], told[rows]), expected[rows])


# --- guard rails ------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_the_lowest_loss_and_stays(
    base: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {2: 0.9, 4: 0.4, 5: 0.1, 6: 0.7, 8: 0.4, 10: 0.5}  # step 5 is not saved
    real = engine.inspect

    def planted(state: TrainState, inspection: engine.Inspection) -> dict[str, float]:
        return {**real(state, inspection), "loss": losses[state.step]}

    monkeypatch.setattr(engine, "inspect", planted)
    words = ["best=true", "keep=1", "save_steps=2", "validate_steps=5", "samples=80", *METHODS["lora"]]
    config = config_of(base, shards, tmp_path / "run", *words)
    config = replace(config, samples=48)
    run(config)  # up to step 6, where the third is not the best
    assert best_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step-00000004"
    (tmp_path / "run" / "checkpoints" / "best.json").unlink()  # as a kill between two renames leaves it
    run(replace(config, samples=80))
    found = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == ["best.json", "step-00000004", "step-00000010"]
    assert read_json(tmp_path / "run" / "checkpoints" / "best.json") == {"checkpoint": "step-00000004", "loss": 0.4}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [2, 4, 5, 6, 8, 10]


def test_what_is_forgotten_is_measured_on_the_bases_own_samples(base: Path, shards: Path, tmp_path: Path) -> None:
    config = config_of(base, shards, tmp_path / "run", f"forgetting={shards}", *METHODS["lora"])
    run(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["kind"] == "validation"]
    assert kept and all(line["kept/loss"] == line["loss"] for line in kept)  # here both are the same samples


def test_few_held_out_pictures_are_validated_at_many_levels(base: Path, shards: Path, tmp_path: Path) -> None:
    """Of 3: 66 rows, each picture at 22 levels spread over all, each with its own noise; in parts as at once."""
    config = config_of(base, shards, tmp_path, "validation_samples=3", f"forgetting={shards}", *METHODS["inpainting"])
    data, task = build(config)
    inspected = inspection(config, data)
    batch = inspected.validation
    assert batch is not None and inspected.forgetting is not None and len(inspected.forgetting) == 66
    assert batch.positions.tolist() == list(range(66)) and batch.keys == batch.keys[:3] * 22
    seen: list[Tensor] = []
    real = Diffusion.loss

    def loss(*given: Any, u: Tensor, **more: Any) -> Any:
        seen.append(u)
        return real(*given, u=u, **more)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Diffusion, "loss", loss)
        found = task.validate(batch)
        assert max(map(len, seen)) == 4
        torch.testing.assert_close(torch.cat(seen), (torch.arange(66) + 0.5) / 66)
        patch.setattr(task, "validated", None)
        whole = task.validate(batch)
    assert {k: float(v) for k, v in found.items()} == pytest.approx({k: float(v) for k, v in whole.items()}, rel=1e-5)


# --- learning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_one_picture_is_learned(method: str, base: Path, shards: Path, tmp_path: Path) -> None:
    """Thirty steps on the same pictures, noise and levels: the loss falls by a tenth; that of a word, it falls."""
    task = task_of(base, shards, tmp_path, "task.dropout=0", *METHODS[method])
    batch = batch_of(shards, 4, condition="edges")
    batch = replace(batch, captions=["a red circle"] * 4)
    module, few = getattr(task, task.trained[0]), "adapter" in METHODS[method][0] or method == "word"
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.02 if few else 0.003)
    losses = []
    for _ in range(30):
        loss = next(task.losses(batch, 0))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < losses[0] * (0.9 if method != "word" else 0.999), losses


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "share", "apart"), [("nf4", 0.15, 0.2), ("int8", 0.3, 0.03)])
def test_quantised_layers_say_nearly_the_same_in_less(form: str, share: float, apart: float) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64)).requires_grad_(False)
    x, before = torch.randn(4, 64, requires_grad=True), sum(p.numel() * p.element_size() for p in net.parameters())
    exact = net(x)
    quantize(net, form)
    assert sum(p.numel() * p.element_size() for p in net.parameters()) < share * before
    rounded = net(x)
    assert 0 < (rounded - exact).norm() < apart * exact.norm()
    rounded.sum().backward()
    assert x.grad is not None and x.grad.any()


def test_an_adapter_learns_on_a_quantised_base(base: Path, shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain = task_of(base, shards, tmp_path, *METHODS["lora"])
    words = ["task.quantize=int8", *METHODS["lora"]]
    task = task_of(base, shards, tmp_path, *words)
    batch = batch_of(shards)
    exact, rounded = (next(t.eval().losses(batch, 0))[1].item() for t in (plain, task))
    assert exact != rounded and rounded == pytest.approx(exact, rel=0.05)
    sizes = [sum(p.numel() * p.element_size() for p in t.denoiser.parameters()) for t in (plain, task)]
    assert sizes[1] < sizes[0]
    run(config_of(base, shards, tmp_path / "run", "optimizer.lr=0.01", *words))
    assert said(*load_tuned(tmp_path / "run", ["denoiser", "text"]).require("denoiser", "text")).isfinite().all()


@pytest.mark.parametrize("method", ["lora", "lora of text", "word", "controlnet"])
def test_a_base_held_in_16_bits_computes_the_same(method: str, base: Path, shards: Path, tmp_path: Path) -> None:
    """Autocast rounds float32 kernels in each pass; rounded once, they give the same bits, in less memory."""
    for held in ("float32", "bf16"):
        words = ["precision=bf16", f"task.held={held}", "optimizer.lr=0.01", "save_steps=100", *METHODS[method]]
        run(config_of(base, shards, tmp_path / held, *words))
    files = [files_of(tmp_path / held) for held in ("float32", "bf16")]
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []
    pictures = [(tmp_path / held / "previews" / "step-00000004.png").is_file() for held in ("float32", "bf16")]
    assert all(pictures)

    def size(held: str) -> int:
        task = task_of(base, shards, tmp_path, f"task.held={held}", *METHODS[method])
        return sum(p.numel() * p.element_size() for p in task.denoiser.parameters())

    assert size("bf16") < 0.65 * size("float32")


def test_previews_of_a_held_base_are_decoded_in_full_precision(base: Path, shards: Path, tmp_path: Path) -> None:
    task = task_of(base, shards, tmp_path, "task.held=bf16", *METHODS["lora"])
    seen: dict[str, set[bool]] = {}
    for name in ("denoiser", "text", "autoencoder"):
        layer = next(m for m in getattr(task, name).modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.LayerNorm))
        note = seen.setdefault(name, set())
        layer.register_forward_hook(lambda *_, note=note: note.add(torch.is_autocast_enabled("cpu")))
    decoder = next(m for m in task.autoencoder.decoder.modules() if isinstance(m, nn.Conv2d))
    decoder.register_forward_hook(lambda *_: seen["autoencoder"].add(torch.is_autocast_enabled("cpu")))
    with torch.no_grad():
        assert task.preview(batch_of(shards)) is not None
    assert seen == {"denoiser": {True}, "text": {False}, "autoencoder": {False}}
    assert not torch.is_autocast_enabled("cpu")


def test_a_quantised_base_needs_bitsandbytes(
    base: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"task.quantize=nf4 needs bitsandbytes: pip install 'ldm\[gpu\]'"):
        task_of(base, shards, tmp_path, "task.quantize=nf4", *METHODS["lora"])
    with pytest.raises(ValueError, match="of the kind lora"):
        task_of(base, shards, tmp_path, "task.quantize=nf4", *METHODS["dora"])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["task.method=fll"], "unknown task.method 'fll', did you mean 'full'"),
        (["task.method=adapter", "task.train_text=true"], "task.train_text goes with task.method=full"),
        (["task.method=textual_inversion"], "teaches a word: give it"),
        (["task.method=full", "task.held=bf16"], "trains it"),
        (["task.method=controlnet", "task.word=a"], "task.word goes with"),
        (["task.method=textual_inversion", "task.word=a", "task.vectors=0"], "task.vectors must be at least 1"),
        (["task.method=textual_inversion", "task.word=a", "task.initial="], "has no words to start from"),
        (["task.method=instruct", "task.dropout=0.4"], "at most 1/3"),
        (["task.method=full", "task.dropout=1"], r"must be in \[0, 1\)"),
        (["task.method=full", "task.unrelated=[a, b]"], "has 2 prompts and task.previews 1"),
        (["task.method=controlnet"], "needs another picture with each"),
        (["task.method=instruct"], "needs another picture with each"),
        (["task.method=full", "task.diffusion={wrong: 1}"], r"do not fit: .*wrong"),
        (["task.method=full", "task.diffusion={weighting: wrong}"], "unknown weighting"),
        (["task.method=adapter", "task.adapter.rank=0"], "rank must be 1 or more"),
        (["task.method=adapter", "task.adapter.targets=[nothing]"], "name no layer"),
        (["task.method=adapter", "task.held=bf16"], "needs precision=bf16"),
        (["task.method=full", "init=elsewhere"], "leave init= out"),
        (["task.method=controlnet", "data.condition=stored", "forgetting=DATA"], "no others beside them"),
        (["task.method=full", "data.size=15"], "must be a multiple of the latent factor 2"),
        (["task.method=full", "task.model=nowhere"], "no model at 'nowhere'"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: list[str], reason: str, base: Path, shards: Path, conditioned: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        run(config_of(base, conditioned, tmp_path / "run", *(w.replace("DATA", str(shards)) for w in words)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_base_that_takes_other_pictures_is_refused(base: Path, shards: Path, tmp_path: Path) -> None:
    run(config_of(base, shards, tmp_path / "run", *METHODS["inpainting"]))
    with pytest.raises(ValueError, match="takes 5 channels: give what it was made of"):
        task_of(tmp_path / "run", shards, tmp_path, *METHODS["instruct"])
    with pytest.raises(ValueError, match="steers a plain model"):
        task_of(tmp_path / "run", shards, tmp_path, *METHODS["controlnet"])
    task = task_of(tmp_path / "run", shards, tmp_path, *METHODS["lora"])  # an adapter on it hears of holes as it does
    assert task._encode(batch_of(shards), SampleRandomness(0, torch.arange(8)), 0.0)[1].concat is not None
    with pytest.raises(ValueError, match="no cache holds"):
        task.check_data(replace(config_of(base, shards, tmp_path, "task.method=full").data, cache="somewhere"))


def test_what_a_model_for_editing_asks_of_any_method(base: Path, shards: Path, tmp_path: Path) -> None:
    editing = [*METHODS["instruct"], f"out={tmp_path / 'edits'}"]
    run(config_of(base, shards, tmp_path, *editing))
    with pytest.raises(ValueError, match=r"three times dropped in editing: at most 1/3, not 0\.5"):
        task_of(tmp_path / "edits", shards, tmp_path, "task.dropout=0.5", *METHODS["lora"])
    run(tiny_config("autoencoder", tmp_path / "vq", shards, "task.codebook={entries: 16, decay: 0.9}"))
    parts = load_model(base).components | load_model(tmp_path / "vq", ["autoencoder"]).components
    with commit(tmp_path / "model") as stage:
        save_model(stage, parts, load_model(base).settings, "base")
    with pytest.raises(ValueError, match="told the means of a KL autoencoder"):
        task_of(tmp_path / "model", shards, tmp_path, *METHODS["instruct"])


def test_a_word_that_no_caption_says_has_no_gradient(base: Path, shards: Path, tmp_path: Path) -> None:
    task = task_of(base, shards, tmp_path, "task.dropout=0", *METHODS["word"])
    batch = replace(batch_of(shards, 2), captions=["a square", "a square"])
    next(task.losses(batch, 0))[1].backward()
    for vectors in task.joint.vectors:
        assert vectors.grad is not None and not vectors.grad.any()
    next(task.losses(replace(batch, captions=["a square", "Red square"]), 0))[1].backward()
    assert all(vectors.grad.any() for vectors in task.joint.vectors)


def test_a_word_begins_as_what_it_is_like(models: dict[str, Path]) -> None:
    """Fewer tokens come again; more are shared out, and each share is a mean."""
    (text,) = load_model(models["denoising"], ["text"]).components.values()
    assert isinstance(text, TextEncoder)
    table = text.tower.token_embedding.weight.detach()
    a, b, c = (table[text.tokenize.bpe.encode(word)] for word in ("red", "circle", "square"))
    assert [len(each) for each in (a, b, c)] == [1, 1, 1]
    for count, expected in (
        (1, [(a + b + c) / 3]),
        (2, [(a + b) / 2, c]),
        (3, [a, b, c]),
        (5, [a, b, c, a, b]),
    ):
        (found,) = begun(text, "red circle square", count)
        torch.testing.assert_close(found.detach(), torch.cat(expected))
        assert found.requires_grad
