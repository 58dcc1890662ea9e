"""The classifier's task: what it learns, what it leaves out, what it measures, and how it resumes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.batch import Batch
from ldm.checkpoints.load import load_model
from ldm.models.classifier import NoisyClassifier, NoisyClassifierConfig, log_prob
from ldm.training.classifier import ClassifierTask, ClassifierTaskConfig
from ldm.training.engine import VALIDATION_CHUNK
from ldm.training.run import run
from tests import conftest
from tests.conftest import tiny_config
from tests.training.test_resume import files_of, train_in_two_parts

SMALL = dict(in_channels=2, channels=16, multipliers=(1, 2), blocks=1, depths=(0, 1), head_dim=8, norm_groups=4)
TINY = [
    "task.kind=classifier",
    "task.model={classes: [circle, square], in_channels: 2, channels: 16, multipliers: [1, 2], blocks: 1, "
    "depths: [0, 1], head_dim: 8, norm_groups: 4}",
]


@pytest.fixture
def more(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the tiny config needs besides."""
    monkeypatch.setitem(conftest.TINY, "classifier", TINY)
    return [f"task.autoencoder={models['autoencoder']}"]


def make(models: dict[str, Path], classes: tuple[str, ...] = ("red", "blue")) -> ClassifierTask:
    torch.manual_seed(0)
    model = NoisyClassifierConfig(classes=classes, **SMALL)  # type: ignore[arg-type]
    config = ClassifierTaskConfig(autoencoder=str(models["autoencoder"]), model=model)
    return ClassifierTask(config, size=16, seed=0)


def batch_of(captions: list[str], start: int = 0) -> Batch:
    """A picture of one colour a caption, red if it says so, else blue."""
    colours = {True: torch.tensor([0.9, -0.9, -0.9]), False: torch.tensor([-0.9, -0.9, 0.9])}
    image = torch.stack([colours["red" in c].view(3, 1, 1).expand(3, 16, 16) for c in captions])
    return Batch(image, captions, torch.arange(start, start + len(captions)), [f"{i}" for i in range(len(captions))])


def gradients(task: ClassifierTask, batch: Batch) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    task.zero_grad()
    ((name, loss, metrics),) = task.losses(batch, 0)
    assert name == "classifier"
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in task.classifier.named_parameters()}, metrics


def scrambled(task: ClassifierTask) -> ClassifierTask:
    for parameter in task.classifier.parameters():  # the zero-initialised layers would hide everything else
        nn.init.normal_(parameter, std=0.1)
    return task


def test_two_halves_equal_the_whole(more: list[str], shards: Path, tmp_path: Path) -> None:
    extra = ["accumulate=2", "data.caption=random", *more]
    run(tiny_config("classifier", tmp_path / "whole", shards, "save_steps=100", *extra))
    train_in_two_parts("classifier", tmp_path / "parts", shards, *extra)
    whole, parts = files_of(tmp_path / "whole"), files_of(tmp_path / "parts")
    assert whole.keys() == parts.keys() and "classifier.safetensors" in whole
    assert [name for name in whole if whole[name] != parts[name]] == []


def test_a_finished_run_loads_and_says_what_it_is(more: list[str], shards: Path, tmp_path: Path) -> None:
    run(tiny_config("classifier", tmp_path / "run", shards, "task.diffusion.prediction=v", *more))
    model = load_model(tmp_path / "run", ["classifier"])
    (classifier,) = model.require("classifier")
    assert isinstance(classifier, NoisyClassifier) and classifier.config.classes == ("circle", "square")
    assert model.settings["diffusion"]["prediction"] == "v" and model.settings["size"] == 16
    assert log_prob(classifier, ["square"])(torch.zeros(1, 2, 8, 8), torch.tensor([3.0])).shape == (1,)
    assert set(load_model(tmp_path / "run").components) == {"autoencoder", "classifier"}
    start = run(
        tiny_config("classifier", tmp_path / "next", shards, f"init={tmp_path / 'run'}", "optimizer.lr=0", *more)
    )
    for name, value in start.task.classifier.state_dict().items():  # at a learning rate of nothing
        torch.testing.assert_close(value, classifier.state_dict()[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (["task.model.in_channels=4"], r"task\.model\.in_channels is 4; the frozen autoencoder needs 2"),
        (["task.model.classes=[circle]"], "two or more different classes"),
        (["data.size=18"], "picture size 18 must be a multiple of 4"),
        (["task.model.head_dim=12"], "head_dim 12 must divide"),
        (["task.diffusion.schedule=flow"], "'eps' cannot start"),
    ],
)
def test_what_does_not_fit_is_named(
    change: list[str], reason: str, more: list[str], shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        run(tiny_config("classifier", tmp_path / "run", shards, *more, *change))


def test_learns_to_tell_red_from_blue(models: dict[str, Path]) -> None:
    """Latents of one colour, which even much noise hides badly: chance is 0.5, and the seed is fixed."""
    task = make(models)
    # the fixture's autoencoder has not learned colours
    task.autoencoder.encode = lambda image, noise: F.avg_pool2d(image[:, ::2], 2)  # type: ignore[method-assign]
    optimizer = torch.optim.Adam(task.classifier.parameters(), lr=3e-3)
    held_out = batch_of(["a red thing", "a blue thing"] * 32, start=10_000)
    before = task.validate(held_out)
    for step in range(60):
        ((_, loss, _),) = task.losses(batch_of(["one red", "one blue, not green"] * 8, start=16 * step), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = task.validate(held_out)
    assert after["loss"] < before["loss"] / 2 and after["accuracy"] > 0.85
    assert min(after[f"accuracy_quarter{i}"] for i in (1, 2, 3)) > 0.95  # the last is all but noise


def test_a_caption_without_a_class_is_left_out(models: dict[str, Path]) -> None:
    task = scrambled(make(models))
    captions = ["red", "something", "blue", "blue and red", "reddish", "so blue"]
    loss, gradient, metrics = gradients(task, batch_of(captions))
    assert metrics["labelled"] == pytest.approx(4 / 6) and metrics["loss"] == loss

    with torch.no_grad():  # each by itself: its randomness depends on its position alone
        each = []
        for i, caption in enumerate(captions):
            image = batch_of(captions).image[i : i + 1]
            one = Batch(image, [caption], torch.tensor([i]), ["k"])
            each.append(next(task.losses(one, 0))[1])
    assert each[1] == 0 and each[4] == 0 and min(each[i] for i in (0, 2, 3, 5)) > 0
    torch.testing.assert_close(loss, sum(each) / 6)

    parts = [gradients(task, part)[1] for part in batch_of(captions).split(2)]  # as with accumulate=2
    for name, value in gradient.items():
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, value, rtol=1e-4, atol=1e-6)


def test_a_batch_without_any_class_changes_nothing(models: dict[str, Path]) -> None:
    task = scrambled(make(models))
    loss, gradient, metrics = gradients(task, batch_of(["a thing", "two things"]))
    assert loss == 0 and metrics["labelled"] == 0 and metrics["right"] == 0
    assert all(value.eq(0).all() for value in gradient.values())
    assert task.validate(batch_of(["a thing", "two things"])) == {"labelled": 0}


class Known(nn.Module):
    """Says class 0 where t is below `edge`, else class 1, with a certainty of 1 / (1 + e^-2); remembers its input."""

    def __init__(self, edge: float) -> None:
        super().__init__()
        self.edge = edge

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.x, self.t = x, t
        return torch.stack([2.0 * (t < self.edge), 2.0 * (t >= self.edge)], dim=1)


def test_validation_counts_by_quarters(models: dict[str, Path]) -> None:
    task = make(models)
    task.classifier = Known(edge=250.0)
    captions = ["red"] * 10 + ["none"] * 2 + ["blue"] * 8
    numbers = task.validate(batch_of(captions))
    # 20 samples, 5 a quarter, red ones told rightly in the first, blue ones in the others
    expected = {"": (5 + 8) / 18, "_quarter1": 1.0, "_quarter2": 0.0, "_quarter3": 1.0, "_quarter4": 1.0}
    sure, wrong = F.softplus(torch.tensor([-2.0, 2.0])).tolist()
    for name, accuracy in expected.items():
        assert numbers[f"accuracy{name}"].item() == pytest.approx(accuracy)
        assert numbers[f"loss{name}"].item() == pytest.approx(accuracy * sure + (1 - accuracy) * wrong)
    assert numbers["labelled"].item() == pytest.approx(18 / 20) and len(numbers) == 11
    assert task.classifier.t.tolist() == pytest.approx([25 + 50 * i for i in range(20)], abs=1)  # whole ones
    assert task.validate(batch_of(captions)) == numbers
    assert "accuracy_quarter1" not in task.validate(batch_of(["none", "red", "red", "red"]))
    assert len(captions) < VALIDATION_CHUNK


def test_the_latents_carry_the_noise_they_are_told_of(models: dict[str, Path]) -> None:
    """x - alpha x0 is sigma times standard normal: the mean square of 64 x 128 of them within 5 deviations of 1."""
    task = make(models)
    task.classifier = known = Known(edge=0.0)
    batch = batch_of(["red"] * 64)
    list(task.losses(batch, 0))
    level = task.diffusion.schedule.at(known.t)
    clean = task.autoencoder.encode(batch.image)[:1]
    shift = (known.x - level.like(known.x).alpha * clean) / level.like(known.x).sigma
    far = known.t > 500  # where what the posterior adds is nothing beside the noise
    assert 10 < far.sum() < 54 and known.t.unique().numel() > 50
    values = shift[far].double()
    spread = (values.square().mean() - 1).abs()
    assert spread < 5 * (2 / values.numel()) ** 0.5 + 0.01
