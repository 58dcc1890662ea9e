"""`ldm finetune` from a folder of pictures to files to share: every method, once more, and what cannot be."""

import hashlib
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from data_pipeline.config import DataConfig
from data_pipeline.loader import fixed_batch, open_data
from data_pipeline.reader import ShardReader
from data_pipeline.sources.shapes import ShapesConfig, ShapesSource
from ldm.adapters import files
from ldm.adapters.adapter import Adapter
from ldm.adapters.library import adapters_in
from ldm.adapters.lora import merge
from ldm.adapters.textual_inversion import load_embeddings
from ldm.adapters.tuned import load_tuned
from ldm.checkpoints import textual_inversion
from ldm.checkpoints.convert import convert
from ldm.checkpoints.load import base_of, load_model
from ldm.cli.main import application
from ldm.config import load_config
from ldm.training import sharing
from ldm.training.recipes import RECIPES
from ldm.training.run import RunConfig, run
from ldm.training.runs import read_record
from ldm.training.sharing import chosen, share
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
        assert metadata["ss_sd_model_name"] == "denoising" and "ss_new_sd_model_hash" not in metadata  # a folder
    elif method == "textual-inversion":
        assert shared == {"embeddings/zorp.safetensors", "diffusers/learned_embeds.safetensors"}
        found = textual_inversion.read(out / "shared" / "embeddings" / "zorp.safetensors")
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


def test_a_folder_of_diffusers_is_a_base(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    convert(models["denoising"], tmp_path / "base", "diffusers")
    said = finetune("lora", tmp_path / "base", pictures, "--out", str(tmp_path / "run"), *QUICK)
    assert "to share: " in said


def test_caches_are_made_where_they_save_work(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "run", [*QUICK, "samples=12"]
    finetune("lora", models["denoising"], pictures, "--out", str(out), *words)
    assert len(list(out.glob("latents-*/index.json"))) == 1
    finetune("lora", models["denoising"], pictures, "--out", str(tmp_path / "other"), *words, "data.crops=0")
    assert not list((tmp_path / "other").glob("latents-*"))


def test_a_run_can_be_made_longer(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    for samples, step in ((8, 2), (12, 3)):
        words = ["--out", str(tmp_path / "run"), *QUICK, f"samples={samples}"]
        assert f"at step {step}" in finetune("lora", models["denoising"], pictures, *words)


def test_names_are_what_they_are(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    """Emoji, spaces and a hash sign in every name, $ in a caption; the hint is words of a shell that mean the run."""
    folder, base, out = tmp_path / "my 🐕 #1", tmp_path / "the base 🎨", tmp_path / "a #b 'c' 🚀"
    shutil.copytree(pictures, folder)
    convert(models["denoising"], base, "diffusers")
    for i in range(3):
        (folder / f"{i}.txt").write_text("a price of ${5}, 😀zorp", encoding="utf-8")
    words = ["--out", str(out), "--word", "😀zorp", *QUICK]
    for _ in range(2):  # resumes
        said = finetune("textual-inversion", base, folder, *words)
    config = load_config(RunConfig, [out / "config.yaml"], [])
    assert config.out == str(out) and config.task.word == "😀zorp" and config.task.model == str(base)
    assert config.task.previews == ("a photo of 😀zorp",)
    (hint,) = (line for line in said.splitlines() if line.startswith("draw with it: "))
    assert shlex.split(hint)[3:] == ["ldm", "generate", str(chosen(out)), "a photo of 😀zorp"]


def test_captions_that_say_the_word_are_pictured(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pictures, tmp_path / "in")
    for i in range(5):
        (folder / f"{i}.txt").write_text(f"scene {i}")
    words = ["--out", str(tmp_path / "run"), "--word", "zorp", "--holdout", "0", *QUICK]
    finetune("textual-inversion", models["denoising"], folder, *words)
    config = load_config(RunConfig, [tmp_path / "run" / "config.yaml"], [])
    assert config.task.previews[0] == "a photo of zorp" and len(config.task.previews) == 4


def test_an_editing_base_draws_nothing_beforehand(
    models: dict[str, Path], shards: Path, pictures: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    words = ["--out", str(base), *QUICK, "data.condition=edges"]
    finetune("instruct", models["denoising"], pictures, *words)
    for method in ("lora", "full"):
        out = tmp_path / method
        finetune(method, base, pictures, "--out", str(out), "--conditions", str(pictures), *QUICK)
        assert not list(out.glob("kept-*")) and load_config(RunConfig, [out / "config.yaml"], []).forgetting == ""
    with pytest.raises(ValueError, match="--class-prompt is drawn by the base"):
        more = ["--class-prompt", "a circle", "data.condition=edges"]
        finetune("lora", base, pictures, "--out", str(tmp_path / "no"), *QUICK, *more)
    with pytest.raises(ValueError, match="lora needs --conditions"):
        finetune("lora", base, pictures, "--out", str(tmp_path / "no"), *QUICK)


def test_other_pictures_to_validate_on_leave_all_to_train_on(
    models: dict[str, Path], shards: Path, pictures: Path, tmp_path: Path
) -> None:
    words = ["--out", str(tmp_path / "run"), *QUICK, f"validation={shards}"]
    finetune("lora", models["denoising"], pictures, *words)
    config = load_config(RunConfig, [tmp_path / "run" / "config.yaml"], [])
    assert config.validation == str(shards) and sum(len(ShardReader(path)) for path in config.data.paths) == 6


def test_a_corrected_command_goes_on(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    """A mistake is found before anything is drawn; what was drawn for other settings is in nobody's way."""
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="name no layer"):
        finetune("lora", models["denoising"], pictures, "--out", str(out), *QUICK, "task.adapter.targets=[nothing]")
    with pytest.raises(ValueError, match="multiple"):
        finetune("lora", models["denoising"], pictures, "--out", str(out), *QUICK, "data.size=18")
    assert {path.name for path in out.iterdir()} == {"data"}
    more = ["--class-prompt", "a circle", "--class-pictures"]
    with pytest.raises(ValueError, match="accumulate"):  # known only to the run itself
        finetune("lora", models["denoising"], pictures, "--out", str(out), *QUICK, *more, "2", "accumulate=8")
    finetune("lora", models["denoising"], pictures, "--out", str(out), *QUICK, *more, "3", "data.flip=true")
    assert len(list(out.glob("class-*"))) == 2


def test_what_is_shared_is_of_this_run(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    """The hash of a base that is one file is the file's; what stood in shared/ is gone; a dialect that has no words
    for the adapter takes nothing from the other."""
    file, out = tmp_path / "base.safetensors", tmp_path / "run"
    file.write_bytes(b"weights")
    finetune("lora", models["denoising"], pictures, "--out", str(out), *QUICK)
    (out / "shared" / "old.safetensors").touch()
    real = files.write
    base = base_of(chosen(out))
    assert base is not None

    def write(adapter: Adapter, path: Path, to: str, *more: Any) -> None:
        if to == "diffusers":
            raise ValueError("no words for it")
        real(adapter, path, to, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write", write)
        patch.setattr(sharing, "base_of", lambda _: {**base, "model": str(file)})
        assert share(out, {}) == [out / "shared" / "run.safetensors"]
    assert [path.name for path in (out / "shared").iterdir()] == ["run.safetensors"]
    with safe_open(out / "shared" / "run.safetensors", "pt") as shared:
        assert shared.metadata()["ss_new_sd_model_hash"] == hashlib.sha256(b"weights").hexdigest()


@pytest.mark.parametrize(
    ("method", "words", "reason"),
    [
        ("lroa", [], "did you mean 'lora'"),
        ("dreambooth", [], "needs --class-prompt"),
        ("textual-inversion", [], "needs --word"),
        ("inpainting", ["--word", "zorp"], "task.word goes with"),
        ("textual-inversion", ["--word", "zorp", "--class-prompt", "a"], "leaves the base as it is"),
        ("lora", ["--class-prompts", "nowhere.txt"], "nowhere.txt is no file of text"),
        ("lora", ["--class-prompt", "a", "--class-prompt", "b", "--class-pictures", "1"], "2 class pictures or more"),
        ("lora", ["--class-pictures", "5"], "give those, and no folder"),
        ("lora", ["--class-folder", "nowhere"], "nowhere is no folder"),
        ("lora", ["--word", "zorp", "--class-prompt", "a Zorp, red"], "leave it out there"),
        ("lora", ["--word", "zor", "--caption", "a zorp"], "no caption says 'zor'"),
        ("lora", ["task.initial=square"], "give task.word as well"),
        ("lora", ["task.prior_weight=2"], "there are none"),
        ("lora", ["data.prior=[true]"], "follow from PICTURES"),
        ("textual-inversion", ["--word", "zorp", "--caption", "a circle"], "no caption says 'zorp'"),
        ("instruct", [], "needs --conditions"),
        ("lora", ["--class-prompt", "a", "--class-pictures", "0"], "1 class pictures or more"),
        ("lora", ["task.method=none"], "unknown task.method"),
        ("lora", ["rank=3"], "rank"),
        ("lora", ["--conditions", "."], "--conditions are for controlnet, t2i-adapter, instruct and models for"),
        ("lora", ["data.path=elsewhere"], "follow from PICTURES"),
        ("lora", ["data.repeats=[3]"], "follow from PICTURES"),
        ("lora", ["--holdout", "2", "validation=elsewhere"], "give one of them"),
        ("lora", ["--unrelated", "cost ${5}"], "cannot be written into a config"),
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
    assert load_embeddings(text, out / "shared" / "embeddings" / "zorp.safetensors") == ["zorp"]
    (tuned,) = load_tuned(chosen(out), ["text"]).components.values()
    assert torch.equal(text(["a zorp"]).context, tuned(["a zorp"]).context)


def test_a_word_and_an_adapter_are_shared_together(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    """And what a plain base draws with both files is what the run folder draws."""
    out = tmp_path / "zorp"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle\n\n  a square \n")
    said_so = ["--caption", "a zorp"]
    words = [
        *said_so,
        "--word",
        "zorp",
        "task.initial=square",
        "--class-prompts",
        str(prompts),
        "--class-pictures",
        "4",
    ]
    said = finetune("lora", models["denoising"], pictures, "--out", str(out), *QUICK, *words)
    assert said.count("to share: ") == 4
    config = load_config(RunConfig, [out / "config.yaml"], [])
    assert config.task.prior == "prediction" and list(config.data.prior) == [False, True]  # type: ignore[attr-defined]
    (group,) = config.optimizer.groups
    assert (group.match, group.lr_scale, group.weight_decay) == ("vectors", 20, 0)
    drawn = DataConfig(config.data.paths[1], size=16)
    assert fixed_batch(open_data(drawn), drawn, 4).captions == ["a circle", "a square", "a circle", "a square"]
    components = load_model(models["denoising"]).components
    assert load_embeddings(components["text"], out / "shared" / "embeddings") == ["zorp"]
    assert adapters_in(out / "shared").keys() == {"zorp", "diffusers"}  # the word's own file, of the same name, is none
    shared = files.read(out / "shared" / "zorp.safetensors", components)
    assert torch.equal(shared.words["zorp"][0], components["text"].words.vectors["zorp"])  # type: ignore[union-attr, index]
    merge(components, shared)
    tuned = load_tuned(chosen(out)).components
    x, t = torch.randn(1, 2, 8, 8), torch.tensor([300.0])
    with torch.no_grad():
        mine, theirs = (c["denoiser"](x, t, c["text"](["a zorp"])) for c in (components, tuned))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    (before,) = load_model(models["denoising"], ["text"]).components.values()
    assert not torch.equal(components["text"](["a zorp"]).context, before(["a square"]).context)  # it has learned
