"""The contrastive losses, their gradients over processes and in parts, and what a run of the text stage records."""

import itertools
import json
import math
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.batch import Batch
from ldm.checkpoints.load import load_model
from ldm.models.clip import CLIP, ImageConfig
from ldm.models.text import TextConfig
from ldm.training.contrastive import ContrastiveTask, ContrastiveTaskConfig, clip_loss, siglip_loss
from ldm.training.engine import VALIDATION_CHUNK
from ldm.training.run import run
from ldm.training.tasks import Task
from tests.conftest import tiny_config
from tests.training.launch import two_processes

TEXT = TextConfig(width=16, layers=2, heads=2, embed_dim=8, context_length=12, embedding_std=1.0)
IMAGE = ImageConfig(size=16, patch=8, width=16, layers=1, heads=2, embed_dim=8)
LOSSES = ("clip", "siglip")


def task_of(loss: str, micro_batch: int = 0) -> ContrastiveTask:
    torch.manual_seed(0)
    return ContrastiveTask(
        ContrastiveTaskConfig(text=TEXT, image=IMAGE, loss=loss, micro_batch=micro_batch), size=16, seed=0
    )


def batch_of(count: int, dtype: torch.dtype = torch.float32) -> Batch:
    image = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype) * 2 - 1
    captions = [f"a picture of number {i % 5}" for i in range(count)]
    return Batch(image, captions, torch.arange(count), [str(i) for i in range(count)])


def gradients_of(task: ContrastiveTask, batch: Batch) -> dict[str, Tensor]:
    ((_, loss, _),) = task.losses(batch, 0)
    loss.backward()
    clip = getattr(task.clip, "module", task.clip)
    return {"loss": loss.detach()} | {name: p.grad for name, p in clip.named_parameters()}


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The relative error: in float64 of the worst parameter or loss, in float32 of all together."""
    if wanted["loss"].dtype == torch.float64:
        return max(float((found[name] - value).norm() / value.norm()) for name, value in wanted.items())
    a, b = (torch.cat([value.flatten() for _, value in sorted(each.items())]) for each in (found, wanted))
    return float((a - b).norm() / b.norm())


LIMIT = {torch.float32: 1e-6, torch.float64: 1e-13}


def written_out(loss: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Both losses pair by pair in float64, from the papers."""
    image, text, scale, bias = (v.double() for v in (image, text, scale, bias))
    count = len(image)
    logit = [[scale * (image[i] * text[j]).sum() + bias for j in range(count)] for i in range(count)]
    if loss == "siglip":
        return (
            sum(
                torch.log1p(torch.exp(-(1 if i == j else -1) * logit[i][j])) for i in range(count) for j in range(count)
            )
            / count
        )  # type: ignore[return-value]
    rows = sum(logit[i][i] - torch.stack(logit[i]).exp().sum().log() for i in range(count))
    columns = sum(logit[i][i] - torch.stack([row[i] for row in logit]).exp().sum().log() for i in range(count))
    return -(rows + columns) / (2 * count)  # type: ignore[return-value]


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_those_written_out_and_open_clips(loss: str) -> None:
    from open_clip.loss import ClipLoss, SigLipLoss

    torch.manual_seed(0)
    found = []
    drawn = [F.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1) for _ in range(2)]
    for which in ("ours", "written out", "open_clip"):
        image, text = (v.clone().requires_grad_() for v in drawn)
        scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
        bias = torch.tensor(-3.0 if loss == "siglip" else 0.0, dtype=torch.float64, requires_grad=loss == "siglip")
        if which == "written out":
            value = written_out(loss, image, text, scale, bias)
        elif which == "open_clip":
            value = SigLipLoss()(image, text, scale, bias) if loss == "siglip" else ClipLoss()(image, text, scale)
        else:
            logits = scale * image @ text.T
            own = torch.arange(6)
            value = siglip_loss(logits + bias, own) if loss == "siglip" else clip_loss(logits, logits.T, own)
        value.backward()
        found.append([value.detach(), image.grad, text.grad, scale.grad, *([bias.grad] if loss == "siglip" else [])])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_task_takes_the_loss_of_its_features(loss: str) -> None:
    task, batch = task_of(loss), batch_of(6)
    image, text, scale = task.clip(batch.image, task.tokenize(batch.captions))
    start = {"clip": (1 / 0.07, 0.0), "siglip": (10.0, -10.0)}[loss]  # as the papers begin
    assert scale.item() == pytest.approx(start[0], rel=1e-6)
    expected = written_out(loss, image, text, scale, torch.tensor(start[1]))
    ((name, value, metrics),) = task.losses(batch, 0)
    assert name == "clip" and value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert task.validate(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    nearest = (image @ text.T).argmax(1).tolist()
    right = sum(batch.captions[i] == batch.captions[j] for i, j in enumerate(nearest)) / 6
    assert metrics["accuracy"].item() == task.validate(batch)["accuracy"].item() == pytest.approx(right)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("micro_batch", [1, 3, 8])  # 11 samples: in parts of which the last is shorter
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_micro_batches_change_no_gradient(dtype: torch.dtype, loss: str, micro_batch: int) -> None:
    whole, parts = (gradients_of(task_of(loss, n).to(dtype), batch_of(11, dtype)) for n in (0, micro_batch))
    assert error(parts, whole) <= LIMIT[dtype]


def test_micro_batches_replay_random_numbers() -> None:
    """A tower with dropout: its second pass must draw what its first one drew, or the gradient is of another loss."""
    found = []
    for micro_batch in (0, 4):
        task = task_of("clip", micro_batch).double()
        task.clip.image.tower.ln_pre = torch.nn.Sequential(task.clip.image.tower.ln_pre, torch.nn.Dropout(0.5))
        parameter = task.clip.image.tower.conv1.weight

        def loss(task: ContrastiveTask = task) -> Tensor:
            torch.manual_seed(3)
            ((_, value, _),) = task.losses(batch_of(8, torch.float64), 0)
            return value

        loss().backward()
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            values = []
            for step in (1e-5, -2e-5):
                parameter.add_(step * direction)
                values.append(loss().item())
        slope = (values[0] - values[1]) / 2e-5
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-6)
        found.append(slope)


def test_micro_batches_remember_the_activations_of_one_part_at_a_time() -> None:
    """What the forward pass leaves for the backward pass grows with the batch, and not if it is read in parts."""

    def saved(micro_batch: int, count: int) -> int:
        kept: dict[int, int] = {}
        task = task_of("clip", micro_batch)
        own = {p.data_ptr() for p in task.parameters()}

        def pack(x: Tensor) -> Tensor:
            if x.data_ptr() not in own:
                kept[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            tuple(task.losses(batch_of(count), 0))
        return sum(kept.values())

    assert saved(0, 16) > 16 * 2000
    assert saved(2, 16) < 0.1 * saved(0, 16)


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_bfloat16_reads_in_parts_as_well(micro_batch: int) -> None:
    """Under autocast, where casts of the weights are kept from one part to the next."""
    task, exact = task_of("clip", micro_batch), gradients_of(task_of("clip"), batch_of(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ((_, loss, _),) = task.losses(batch_of(8), 0)
    loss.backward()
    every = torch.cat([p.grad.flatten() for p in task.clip.parameters()])
    wanted = torch.cat([exact[name].flatten() for name, _ in task.clip.named_parameters()])
    assert F.cosine_similarity(every, wanted, dim=0) > 0.99


def gradients_of_half(loss: str, micro_batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What each of two processes does: the gradients of its half, under DDP; and the mean of both losses."""
    task = task_of(loss, micro_batch).to(dtype)
    task.clip = torch.nn.parallel.DistributedDataParallel(task.clip)
    found = gradients_of(task, batch_of(10, dtype).split(2)[torch.distributed.get_rank()])
    torch.distributed.all_reduce(found["loss"])
    return found | {"loss": found["loss"] / 2}


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one() -> None:
    ended = two_processes(__file__)
    assert ended.returncode == 0, ended.stderr


def test_a_part_alone_has_another_loss() -> None:
    """Its negatives are fewer; so the loop is told not to split a batch, which for other tasks changes nothing."""
    task, batch = task_of("clip"), batch_of(10)
    of = [next(task.losses(part, 0))[1].item() for part in (batch, *batch.split(2))]
    assert task.whole and abs(of[0] - sum(of[1:]) / 2) > 0.1


def test_the_temperature_comes_back_from_its_bound() -> None:
    task = task_of("clip")
    clip: CLIP = task.clip
    clip.logit_scale.data.fill_(math.log(150))
    found = gradients_of(task, batch_of(10))
    assert clip.logit_scale.item() == pytest.approx(math.log(100), rel=1e-6)
    assert found["logit_scale"].item() > 0  # random features: less would be better


class Host(TorchDispatchMode):
    """Notes what makes the host wait: copies from the host that are not left to run beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        words = kwargs or {}
        crosses = words.get("device") not in (None, torch.device("cpu")) and "_to_copy" in str(function)
        if crosses and args[0].device.type == "cpu" and not words.get("non_blocking"):
            self.waits.append("".join(traceback.format_stack(limit=8)))
        return function(*args, **words)


def waits(task: Task, batch: Batch) -> list[str]:
    """Run a step on torch's device without data, on which reading a value, as a host does that waits, is an error."""
    task, batch = task.to("meta"), batch.to("meta", non_blocking=True)
    with Host() as host:
        for _, loss, _ in task.losses(batch, 0):
            loss.backward()
    return host.waits


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("micro_batch", [0, 2])
def test_a_step_never_makes_the_host_wait(loss: str, micro_batch: int) -> None:
    assert waits(task_of(loss, micro_batch), batch_of(5)) == []


def test_reading_a_value_in_a_step_is_noticed() -> None:
    class Reading(ContrastiveTask):
        def losses(self, batch: Batch, step: int) -> Any:
            for name, loss, metrics in super().losses(batch, step):
                metrics["loss"].item()
                yield name, loss, metrics

    task = Reading(ContrastiveTaskConfig(text=TEXT, image=IMAGE), size=16, seed=0)
    with pytest.raises(RuntimeError, match="meta"):
        waits(task, batch_of(5))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_learns_and_records_what_it_is(loss: str, shards: Path, tmp_path: Path) -> None:
    words = [
        "samples=800",
        "optimizer.lr=0.003",
        "task.text.embedding_std=1",
        f"task.loss={loss}",
        "task.micro_batch=3",
    ]
    words += ["validate_steps=1000", "save_steps=1000", "preview_steps=1000", "task.text.skip=1"]
    run(tiny_config("contrastive", tmp_path / "run", shards, *words))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    (validation,) = [line for line in lines if line["kind"] == "validation"]
    recalls = {f"{way}_recall@{k} of 8" for way in ("image_to_text", "text_to_image") for k in (1, 5)}
    assert recalls <= validation.keys() and VALIDATION_CHUNK >= 8
    settings = load_model(tmp_path / "run").settings
    assert settings["loss"] == loss and ("logit_bias" in settings) == (loss == "siglip")
    assert (
        settings["text"]["layer"] == 1 and settings["text"]["final_norm"] and settings["text"]["vocabulary"] == 49_408
    )


@pytest.mark.parametrize(
    ("word", "reason"), [("loss=sigclip", "did you mean 'siglip'"), ("micro_batch=-1", "micro_batch")]
)
def test_what_cannot_be_is_named(word: str, reason: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        tiny_config("contrastive", tmp_path / "run", shards, f"task.{word}")


if __name__ == "__main__":
    alone = {
        (loss, dtype): gradients_of(task_of(loss).to(dtype), batch_of(10, dtype)) for loss in LOSSES for dtype in LIMIT
    }
    torch.distributed.init_process_group("gloo")
    for loss, micro_batch, dtype in itertools.product(LOSSES, (0, 2), LIMIT):
        off = error(gradients_of_half(loss, micro_batch, dtype), alone[loss, dtype])
        assert off <= LIMIT[dtype], (loss, micro_batch, off)
    torch.distributed.destroy_process_group()
