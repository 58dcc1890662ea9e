"""What other parts make of the autoencoders that the first stage can train now, and of its settings."""

import logging
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ldm.checkpoints.convert import convert
from ldm.cli.main import application
from ldm.pipeline import Pipeline, Request, pairs
from ldm.training.run import run
from tests.conftest import frozen, tiny_config

VQ = "task.codebook={entries: 16, decay: 0.9, restart: 0.1}"


def test_a_denoiser_learns_the_latents_of_a_codebook(models: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    run(tiny_config("autoencoder", tmp_path / "vq", shards, VQ))
    words = [*frozen(models["denoising"].parent), f"task.autoencoder={tmp_path / 'vq'}"]
    run(tiny_config("denoising", tmp_path / "run", shards, *words))
    images = Pipeline.load(tmp_path / "run")(Request(*pairs(["a red circle"]), steps=2))
    assert images.shape == (1, 3, 16, 16) and torch.isfinite(images).all()
    with pytest.raises(ValueError, match="format compvis has no words for the autoencoder_vq"):
        convert(tmp_path / "run", tmp_path / "out.safetensors", "compvis")


def test_latents_of_another_size_are_warned_of(
    models: dict[str, Path], shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    from ldm.training import denoising

    words = frozen(models["denoising"].parent)
    real = denoising.load_model

    def wide(path, names, **options):
        model = real(path, names, **options)
        if "autoencoder" in names:
            model.components["autoencoder"].latent_std.mul_(0.01)
        return model

    monkeypatch.setattr(denoising, "load_model", wide)
    with caplog.at_level(logging.WARNING):
        run(tiny_config("denoising", tmp_path / "run", shards, *words))
    assert sum("latents" in line for line in caplog.messages) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.decoder_only=true"], "give the model to start from, init=MODEL"),
        (["task.adversary.weight=0.5", "task.adversary.model.layers=1", "precision=fp16"], "fp16"),
    ],
)
def test_settings_that_cannot_work_are_refused(words: list[str], message: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny_config("autoencoder", tmp_path / "run", shards, *words))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_ldm_average_makes_a_model_of_another_average(shards: Path, tmp_path: Path) -> None:
    run(tiny_config("autoencoder", tmp_path / "run", shards, "ema_decays=[0.5]", "snapshot_steps=1"))

    def average(*words: str) -> None:
        result = CliRunner().invoke(application(), ["average", str(tmp_path / "run"), *words])
        if result.exception:
            raise result.exception

    average(str(tmp_path / "quick"), "--decay", "0.5")
    average(str(tmp_path / "wide"), "--sigma-rel", "0.1")
    assert (tmp_path / "quick" / "model.json").is_file() and (tmp_path / "wide" / "model.json").is_file()
    for words in ([], ["--decay", "0.5", "--sigma-rel", "0.1"]):
        with pytest.raises(ValueError, match="give --sigma-rel or --decay"):
            average(str(tmp_path / "neither"), *words)
