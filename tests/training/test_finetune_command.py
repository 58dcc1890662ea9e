"""`ldm finetune` from a folder of pictures to files to share: every method, once more, and what cannot be."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from data_pipeline.sources.shapes import ShapesConfig, ShapesSource
from ldm.adapters import files
from ldm.adapters.textual_inversion import load_embeddings
from ldm.adapters.tuned import load_tuned
from ldm.checkpoints import textual_inversion
from ldm.checkpoints.load import load_model
from ldm.cli.main import application
from ldm.training.recipes import RECIPES
from ldm.training.run import run
from ldm.training.runs import read_record
from ldm.training.sharing import chosen
from tests.conftest import frozen, tiny_config

QUICK = ["samples=8", "batch_size=4", "data.size=16", "task.preview_steps=2"]
MORE = {
    "dreambooth": ["--class-prompt", "a circle", "--class-pictures", "3"],
    "textual-inversion": ["--word", "zorp"],
    "instruct": ["data.condition=edges"],
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six drawn scenes, without captions."""
    folder = tmp_path_factory.mktemp("pictures") / "shapes"
    folder.mkdir()
    source = ShapesSource(ShapesConfig(count=6, seed=5))
    for i in range(6):
        source[i].image.save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def few_pictures_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.training.preparing.KEPT", 2)


def finetune(method: str, model: Path | str, pictures: Path | str, *words: str) -> str:
    caption = [] if "--caption" in words or method == "textual-inversion" else ["--caption", "photo of sks shape"]
    unrelated = ["--unrelated", "a small red circle"]
    arguments = ["finetune", method, str(model), str(pictures), *words, *caption, *unrelated]
    result = CliRunner().invoke(application(), arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("method", RECIPES)
def test_every_method_goes_from_pictures_to_a_model(
    method: str, models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sks"
    words = ["--out", str(out), *QUICK, *MORE.get(method, [])]
    said = finetune(method, models["denoising"], pictures, *words)
    assert "draw with it: ldm generate" in said and f"chosen: {out}/checkpoints/step-0000000" in said
    again = finetune(method, models["denoising"], pictures, *words)  # resumes: nothing is left to do
    assert "at step 2" in again and read_record(out)["state"] == "finished"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    validation = [line for line in lines if line["kind"] == "validation"]
    assert [line["step"] for line in validation] == [1, 2] and "loss" in validation[0]
    assert ("kept/loss" in validation[0]) == (RECIPES[method][0][0] in ("method=full", "method=adapter"))
    assert (out / "previews" / "step-00000002.png").is_file()

    shared = {str(p.relative_to(out / "shared")) for p in (out / "shared").rglob("*") if p.is_file()}
    diffusers = {"diffusers/pytorch_lora_weights.safetensors"} if method in ("lora", "dora") else set()
    if method in ("lora", "dora", "loha", "lokr"):
        assert shared == {"sks.safetensors", *diffusers}
        adapter = files.read(out / "shared" / "sks.safetensors", load_model(models["denoising"]).components)
        assert adapter.kind == method
        with safe_open(out / "shared" / "sks.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata["ss_network_dim"] in ("16", "8", "0") and metadata["ss_learning_rate"] == "0.0001"
        assert metadata["ss_num_train_images"] == "5" and metadata["ss_resolution"] == "16x16"
        assert metadata["ss_sd_model_name"] == "denoising" and len(metadata["ss_new_sd_model_hash"]) == 64
    elif method == "textual-inversion":
        assert shared == {"zorp.safetensors", "diffusers/learned_embeds.safetensors"}
        found = textual_inversion.read(out / "shared" / "zorp.safetensors")
        assert found.word == "zorp" and found.vectors[0].shape == (4, 16)
    elif method == "controlnet":
        assert {"diffusers/config.json", "diffusers/diffusion_pytorch_model.safetensors"} <= shared
    else:
        assert not shared
    parts = load_tuned(out).components
    assert {"autoencoder", "text", "denoiser"} <= parts.keys()


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    said = finetune("lora", models["denoising"], pictures, "--out", str(tmp_path / "run"), "--dry-run", *QUICK)
    assert "memory: " in said and "time: " in said and "method: adapter" in said
    assert not list(tmp_path.iterdir())


def test_layers_that_no_other_program_has_are_shared_for_our_own(
    models: dict[str, Path], shards: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = models["denoising"].parent
    run(tiny_config("denoising", tmp_path / "base", shards, *frozen(root), "task.unet.pooled_dim=8"))
    words = ["--out", str(tmp_path / "sks"), *QUICK, "task.adapter.targets=[all]"]
    assert "to share: " in finetune("lora", tmp_path / "base", pictures, *words)
    assert "other programs cannot read this adapter" in caplog.text
    assert [p.name for p in (tmp_path / "sks" / "shared").iterdir()] == ["sks.safetensors"]
    adapter = files.read(tmp_path / "sks" / "shared" / "sks.safetensors")
    assert "pooled" in adapter.parts["denoiser"]


def test_three_pictures_and_one(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    """None is held out, so the newest checkpoint is chosen; a batch has each several times."""
    for count in (1, 3):
        folder, out = tmp_path / f"few-{count}", tmp_path / f"run-{count}"
        folder.mkdir()
        for i in range(count):
            (folder / f"{i}.png").write_bytes((pictures / f"{i}.png").read_bytes())
        said = finetune("lora", models["denoising"], folder, "--out", str(out), *QUICK)
        assert f"chosen: {out}/checkpoints/step-00000002" in said


def test_caches_are_made_where_they_save_work(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "run", [*QUICK, "samples=12"]
    finetune("lora", models["denoising"], pictures, "--out", str(out), *words)
    assert (out / "latents-0" / "index.json").is_file()
    finetune("lora", models["denoising"], pictures, "--out", str(tmp_path / "other"), *words, "data.crops=0")
    assert not (tmp_path / "other" / "latents-0").exists()


@pytest.mark.parametrize(
    ("method", "words", "reason"),
    [
        ("lroa", [], "did you mean 'lora'"),
        ("dreambooth", [], "needs --class-prompt"),
        ("textual-inversion", [], "--word is the word"),
        ("lora", ["--word", "zorp"], "--word is the word"),
        ("textual-inversion", ["--word", "zorp", "--caption", "a circle"], "no caption says 'zorp'"),
        ("instruct", [], "needs --conditions"),
        ("lora", ["--class-prompt", "a", "--class-pictures", "0"], "must be 1 or more"),
        ("lora", ["task.method=none"], "unknown task.method"),
        ("lora", ["rank=3"], "rank"),
        ("lora", ["--holdout", "9"], "leaves none to train on"),
    ],
)
def test_what_cannot_be_is_one_line(
    method: str, words: list[str], reason: str, models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        finetune(method, models["denoising"], pictures, "--out", str(tmp_path / "run"), *QUICK, *words)
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "checkpoints").exists()


def test_pictures_without_captions_are_refused(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has a caption"):
        finetune("lora", models["denoising"], pictures, "--out", str(tmp_path / "run"), *QUICK, "--caption", "")
    with pytest.raises(ValueError, match="no model at"):
        finetune("lora", tmp_path / "nothing", pictures, "--out", str(tmp_path / "run"), *QUICK)
    assert not (tmp_path / "run").exists()


def test_a_word_draws_what_it_learned(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    """The shared file, taught to the base, says what the run folder says."""
    out = tmp_path / "run"
    finetune("textual-inversion", models["denoising"], pictures, "--out", str(out), "--word", "zorp", *QUICK)
    (text,) = load_model(models["denoising"], ["text"]).components.values()
    assert load_embeddings(text, out / "shared" / "zorp.safetensors") == ["zorp"]
    (tuned,) = load_tuned(chosen(out), ["text"]).components.values()
    assert torch.equal(text(["a zorp"]).context, tuned(["a zorp"]).context)
