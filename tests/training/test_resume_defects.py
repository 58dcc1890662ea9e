"""What a resume could forget, one thing at a time; and resumes at any place, with any workers, of a changed run."""

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from data_pipeline.build import BuildConfig, build
from data_pipeline.sources.shapes import ShapesConfig, ShapesSource
from ldm.checkpoints.files import steps
from ldm.training import engine, microbatch, randomness
from ldm.training import run as run_module
from ldm.training import state as state_module
from ldm.training.ema import EMA
from ldm.training.run import run
from tests.conftest import frozen, tiny_config
from tests.training.test_resume import files_of

Plant = Callable[[pytest.MonkeyPatch], None]

SETTINGS = [
    "accumulate=2",
    "ema_decays=[0.5]",
    "task.dropout=0.5",  # of captions
    "task.diffusion.timesteps=loss_second_moment",  # which remembers something
    "data.caption=random",
    "data.flip=true",
    "preview_steps=0",
    "validate_steps=0",
    "keep=9",
]


def complete(patch: pytest.MonkeyPatch) -> None:
    """Dropout in the network and a GradScaler, so that these can be forgotten too: on a CPU nothing brings them."""
    build, prepare = run_module.build, engine.prepare

    def with_dropout(config: Any) -> Any:
        data, task = build(config)
        task.denoiser.conv_in.register_forward_hook(lambda m, _, y: nn.functional.dropout(y, 0.2, m.training))
        return data, task

    def with_scaler(task: Any, config: Any, accelerator: Any) -> Any:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
        state = prepare(task, config, accelerator)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"  # so that it unscales
        return state

    patch.setattr(run_module, "build", with_dropout)
    patch.setattr(engine, "prepare", with_scaler)


def train(config: Any, plant: Plant | None = None) -> Any:
    """A run to its end, with a defect if one is given."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            complete(patch)
            if plant is not None:
                plant(patch)
            return run(config)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def half(shards: Path, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run of four steps, the files that it ended with, and its folder as it was after two."""
    out = tmp_path_factory.mktemp("half") / "run"
    config = tiny_config("denoising", out, shards, *frozen(models["autoencoder"].parent), *SETTINGS)
    assert train(config).step == 4
    return SimpleNamespace(config=config, whole=files_of(out), folder=out)


def resumed(half: SimpleNamespace, plant: Plant | None = None) -> dict[str, bytes]:
    """The files of the run that is resumed after two steps."""
    for folder in steps(half.folder / "checkpoints"):
        if folder.name > "step-00000002":
            shutil.rmtree(folder)
    assert train(half.config, plant).step == 4
    return files_of(half.folder)


def forget(owner: Any, name: str) -> Plant:
    """What that function would take up stays as a new run has it."""
    return lambda patch: patch.setattr(owner, name, lambda *_, **__: None)


def redraw(purpose: str) -> Plant:
    """The random numbers for that purpose are others."""
    real = randomness.generator

    def drawn(*words: int | str) -> torch.Generator:
        return real(*words, "another") if words[-1] == purpose else real(*words)

    return lambda patch: patch.setattr(randomness, "generator", drawn)


def rate_from_the_start(patch: pytest.MonkeyPatch) -> None:
    real = engine.learning_rate
    patch.setattr(engine, "learning_rate", lambda config, step, total: real(config, step - 2, total))


def first_batch_without_its_beginning(patch: pytest.MonkeyPatch) -> None:
    """As if the run had stopped between two micro-batches, and what the first one left were gone."""
    real = engine.update

    def update(state: Any, batch: Any, *more: Any) -> Any:
        return real(state, batch.split(2)[1] if state.step == 2 else batch, *more)

    patch.setattr(engine, "update", update)


def data_from_the_start(patch: pytest.MonkeyPatch) -> None:
    real = run_module.Loader
    patch.setattr(run_module, "Loader", lambda *data, **words: real(*data, **words | {"start": 0}))


def progress(**wrong: int) -> Plant:
    real = state_module.read_json
    return lambda patch: patch.setattr(state_module, "read_json", lambda path: real(path) | wrong)


def nothing_remembered(patch: pytest.MonkeyPatch) -> None:
    real = state_module.TrainState.resume

    def resume(self: Any, out: Path) -> bool:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(type(self), "_remembered", lambda self: {})
            return real(self, out)

    patch.setattr(state_module.TrainState, "resume", resume)


DEFECTS: dict[str, Plant] = {
    "optimizer": forget(torch.optim.Optimizer, "load_state_dict"),
    "averages": forget(EMA, "load"),
    "scaler": forget(torch.amp.GradScaler, "load_state_dict"),
    "learning rate": rate_from_the_start,
    "rest of a batch": first_batch_without_its_beginning,
    "place in the data": data_from_the_start,
    "dropout": forget(microbatch, "seed_torch"),
    "noise": redraw("noise"),
    "timestep": redraw("timestep"),
    "caption dropout": redraw("caption dropout"),
    "posterior": redraw("posterior"),
    "weights": forget(state_module, "load_tensors"),
    "what the task remembers": nothing_remembered,
    "step": progress(step=1),
}
"""What a resume may get wrong."""

ELSEWHERE = {
    "averages": "train/averages.safetensors",
    "scaler": "train/progress.json",  # the scale is a power of two, which changes no weight unless something overflows
    "what the task remembers": "train/remembered.safetensors",
}
"""Where a defect shows that changes no weight, at once."""


def test_a_resume_without_defect_gives_the_same_bytes(half: SimpleNamespace) -> None:
    again = resumed(half)
    assert [
        name for name in half.whole if half.whole[name] != again.get(name)
    ] == [] and again.keys() == half.whole.keys()


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_is_noticed(defect: str, half: SimpleNamespace) -> None:
    found = resumed(half, DEFECTS[defect])
    file = ELSEWHERE.get(defect, "train/weights.safetensors")
    assert found[file] != half.whole[file]


def train_until(config: Any, *stops: int) -> Any:
    """A run that is asked to stop after the first of those steps that it comes to."""
    real = engine.update

    def update(state: Any, *more: Any) -> Any:
        outcome = real(state, *more)
        if state.step + 1 in stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "update", update)
        return run(config)


PLAIN = ["save_steps=100", "validate_steps=0", "preview_steps=0", "data.caption=random", "data.flip=true"]


@pytest.fixture(scope="module")
def two_epochs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, bytes]]:
    """The files of runs of nearly two epochs (of 48 samples), by batch size."""
    found = {}
    for batch in (8, 10):
        out = tmp_path_factory.mktemp("epochs")
        run(tiny_config("autoencoder", out, shards, *PLAIN, f"batch_size={batch}", "samples=90"))
        found[batch] = files_of(out)
    return found


@pytest.mark.parametrize(
    ("batch", "stops"),
    [pytest.param(8, range(1, 12), marks=pytest.mark.slow), (8, [6]), (10, [2, 3, 4]), (10, [5])],
    ids=["after every step", "at the end of an epoch", "three times in an epoch", "in a batch of two epochs"],
)
def test_resumes_anywhere(
    batch: int, stops: Sequence[int], two_epochs: dict[int, dict[str, bytes]], shards: Path, tmp_path: Path
) -> None:
    config = tiny_config("autoencoder", tmp_path, shards, *PLAIN, f"batch_size={batch}", "samples=90")
    assert [train_until(config, step).step for step in stops] == list(stops)
    assert not run(config).stopped and files_of(tmp_path) == two_epochs[batch]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(0, 4), (1, 0), (2, 1), (4, 2)])
def test_workers_may_change(
    before: int, after: int, two_epochs: dict[int, dict[str, bytes]], shards: Path, tmp_path: Path
) -> None:
    words = [*PLAIN, "batch_size=8", "samples=90"]
    assert train_until(tiny_config("autoencoder", tmp_path, shards, *words, f"data.workers={before}"), 7).stopped
    run(tiny_config("autoencoder", tmp_path, shards, *words, f"data.workers={after}"))
    assert files_of(tmp_path) == two_epochs[8]


@pytest.mark.parametrize("samples", [32, 30, 8])
def test_a_finished_run_is_left_alone(
    samples: int, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it has become longer than it should be: no batch is loaded, nothing is saved or measured."""
    run(tiny_config("autoencoder", tmp_path, shards, *PLAIN, "validate_steps=4"))
    kept = [tmp_path / "metrics.jsonl", *(tmp_path / "checkpoints").rglob("*")]
    before = [(p, p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in kept]
    monkeypatch.setattr(engine.Meter, "next", None)
    state = run(tiny_config("autoencoder", tmp_path, shards, *PLAIN, "validate_steps=4", f"samples={samples}"))
    assert state.step == 4 and state.samples == 32 and not state.stopped
    assert [(p, p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in kept] == before
    assert len(list((tmp_path / "checkpoints").rglob("*"))) == len(kept) - 1


def test_a_run_made_longer_is_the_longer_run(shards: Path, tmp_path: Path) -> None:
    words = [*PLAIN, "optimizer.schedule=constant"]  # others know the length from the first step on
    run(tiny_config("autoencoder", tmp_path / "whole", shards, *words, "samples=48"))
    run(tiny_config("autoencoder", tmp_path / "parts", shards, *words, "samples=16"))
    assert run(tiny_config("autoencoder", tmp_path / "parts", shards, *words, "samples=48")).step == 6
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("seed=1", "seed was 0, now 1"),
        ("task.model.latent_channels=4", "task.model.latent_channels was 2, now 4"),
        ("batch_size=4", "batch_size was 8, now 4"),
        ("accumulate=4", "accumulate was 1, now 4"),
        ("ema_decays=[0.5]", r"ema_decays was \[\], now \[0.5\]"),
        ("data.caption=first", "data.caption was 'random', now 'first'"),
        ("data.path={other}", "data.path was '[^']*shapes', now '[^']*other'"),
    ],
)
def test_another_run_is_refused(word: str, reason: str, half_a_run: Path, shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    before = files_of(half_a_run)
    with pytest.raises(ValueError, match=f"other settings \\({reason}\\)"):
        run(tiny_config("autoencoder", half_a_run, shards, *PLAIN, word.format(other=other)))
    assert files_of(half_a_run) == before


@pytest.fixture(scope="module")
def half_a_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("refusing")
    assert train_until(tiny_config("autoencoder", out, shards, *PLAIN), 2).stopped
    return out


def test_other_data_in_the_same_place_are_refused(shards: Path, tmp_path: Path) -> None:
    """The place of a sample in the run depends on how many there are; what it is, on the folder."""
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    config = tiny_config("autoencoder", tmp_path / "out", data, *PLAIN)
    assert train_until(config, 2).stopped
    before = files_of(tmp_path / "out")
    shutil.rmtree(data)
    build(ShapesSource(ShapesConfig(count=48, seed=4)), BuildConfig(size=32), data)
    with pytest.raises(ValueError, match=f"{data} is not what it was when .* began"):
        run(config)
    assert files_of(tmp_path / "out") == before
    shutil.rmtree(data)
    shutil.copytree(shards, data)
    assert run(config).step == 4


def test_another_frozen_model_in_the_same_place_is_refused(
    shards: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    """Latents would mean something else all at once."""
    shutil.copytree(models["autoencoder"], tmp_path / "autoencoder")
    shutil.copytree(models["contrastive"], tmp_path / "contrastive")
    config = tiny_config("denoising", tmp_path / "out", shards, *PLAIN, *frozen(tmp_path))
    assert train_until(config, 2).stopped
    before = files_of(tmp_path / "out")
    run(tiny_config("autoencoder", tmp_path / "autoencoder", shards, "samples=40"))
    with pytest.raises(ValueError, match=r"frozen autoencoder is not what it was when .* began"):
        run(config)
    assert files_of(tmp_path / "out") == before


def test_a_run_that_was_moved_goes_on(shards: Path, tmp_path: Path) -> None:
    run(tiny_config("autoencoder", tmp_path / "whole", shards, *PLAIN))
    assert train_until(tiny_config("autoencoder", tmp_path / "before", shards, *PLAIN), 2).stopped
    (tmp_path / "before").rename(tmp_path / "after")
    assert run(tiny_config("autoencoder", tmp_path / "after", shards, *PLAIN)).step == 4
    assert files_of(tmp_path / "after") == files_of(tmp_path / "whole")


def test_a_start_from_a_model_survives_a_kill_in_the_first_save(
    shards: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    words = [*PLAIN, f"init={models['autoencoder']}"]
    run(tiny_config("autoencoder", tmp_path / "whole", shards, *words))
    (tmp_path / "killed" / "checkpoints" / ".tmp-step-00000002").mkdir(parents=True)
    text = (tmp_path / "whole" / "config.yaml").read_text().replace("whole", "killed")
    (tmp_path / "killed" / "config.yaml").write_text(text)
    run(tiny_config("autoencoder", tmp_path / "killed", shards, *words))
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
