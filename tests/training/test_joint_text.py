"""A text encoder that learns with the denoiser, and what a frozen one may come from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import Batch
from ldm.checkpoints import compvis, diffusers
from ldm.checkpoints.files import newest_valid, read_tensors, sha256
from ldm.checkpoints.load import load_model
from ldm.models.text import TextConfig, TextEncoder
from ldm.models.text_record import text_record
from ldm.pipeline import Pipeline, Request, pairs
from ldm.training.denoising import DenoisingTask
from ldm.training.joint_text import JointDenoiser
from ldm.training.posthoc import save_average, tracked
from ldm.training.run import RunConfig, run
from tests.checkpoints.families import make
from tests.conftest import frozen, tiny_config
from tests.training.launch import by_one_and_by_two
from tests.training.test_contrastive import waits
from tests.training.test_resume import files_of, train_in_two_parts

TOWER = "width: 16, layers: 3, heads: 2, context_length: 28, embedding_std: 1.0"
NEW = ["task.text=new", "task.train_text=true", f"task.text_model={{{TOWER}, embed_dim: 0, skip: 1}}"]


def words(models: dict[str, Path], *more: str) -> list[str]:
    return [f"task.autoencoder={models['autoencoder']}", *NEW, *more]


def task_of(config: RunConfig) -> DenoisingTask:
    torch.manual_seed(0)
    return DenoisingTask(config.task, size=16, seed=0)  # type: ignore[arg-type]


def batch_of(captions: list[str]) -> Batch:
    image = torch.rand(len(captions), 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(image, captions, torch.arange(len(captions)), captions)


def test_the_loss_falls_by_what_the_encoder_learned_to_tell(models: dict[str, Path], tmp_path: Path) -> None:
    """Four captions, a latent each: only who can tell the captions apart knows what is under the most noise.

    So after training other captions cost far more than the right ones, and so does what the encoder said at first.
    """
    unet = "task.unet={channels: 16, multipliers: [1], depths: [1], context_dim: 16}"
    schedule = ["task.diffusion={schedule: flow, prediction: flow, shift: 5.0}", "task.dropout=0"]
    config = tiny_config("denoising", tmp_path / "run", tmp_path, *words(models, *schedule, unet))
    task = task_of(config)
    captions = ["red", "green", "blue", "white"] * 8
    means = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).repeat(8, 1)
    moments = torch.cat([means, torch.full((32, 2), -30.0)], dim=1)[:, :, None, None].expand(-1, -1, 8, 8)

    def batch(positions: Tensor, captions: list[str] = captions) -> Batch:
        return Batch(torch.empty(32, 3, 0, 0), captions, positions, captions, moments=moments)

    before = {name: p.detach().clone() for name, p in task.text.named_parameters()}
    optimizer = torch.optim.Adam(task.joint.parameters(), lr=5e-3)
    losses = []
    for step in range(80):
        ((name, loss, _),) = task.losses(batch(torch.arange(32) + 32 * step), step)
        assert name == "joint"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    moved = {name for name, p in task.text.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "resblocks.2" not in name}  # skip = 1: nobody hears the last block

    with torch.no_grad():
        task.eval()
        right = task.validate(batch(torch.arange(32)))["loss"].item()
        other = task.validate(batch(torch.arange(32), captions[1:] + captions[:1]))["loss"].item()
        for name, p in task.text.named_parameters():
            p.copy_(before[name])
        forgotten = task.validate(batch(torch.arange(32)))["loss"].item()
    assert other > 2 * right and forgotten > 1.5 * right, (right, other, forgotten)


def test_a_run_draws_resumes_and_holds_both(models: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    """Byte for byte, with the averages of both; and `generate` finds the encoder that was trained."""
    more = words(models, "accumulate=2", "optimizer.groups=[{match: '^joint.text.', lr_scale: 0.5}]")
    run(tiny_config("denoising", tmp_path / "whole", shards, "save_steps=100", *more))
    train_in_two_parts("denoising", tmp_path / "parts", shards, *more)
    whole, parts = files_of(tmp_path / "whole"), files_of(tmp_path / "parts")
    assert whole.keys() == parts.keys() and [name for name in whole if whole[name] != parts[name]] == []

    folder = newest_valid(tmp_path / "whole" / "checkpoints")
    assert folder is not None
    averages, text = (read_tensors(folder / name)[0] for name in ("train/averages.safetensors", "text.safetensors"))
    name = "tower.token_embedding.weight"
    assert torch.equal(averages[f"joint.text.{name}"], text[name])
    own = read_tensors(folder / "train" / "weights.safetensors")[0][f"joint.text.{name}"]
    assert not torch.equal(own, text[name])

    pipeline = Pipeline.load(tmp_path / "whole")
    assert torch.equal(pipeline.text.tower.token_embedding.weight, text[name])
    images = pipeline(Request(*pairs(["a red circle", "a blue square"]), steps=2))
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()
    assert (tmp_path / "whole" / "previews" / "step-00000004.png").exists()


def test_other_averages_are_of_both(models: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    run(tiny_config("denoising", tmp_path / "run", shards, *words(models, "ema_decays=[0.0]")))
    save_average(tmp_path / "run", tracked(tmp_path / "run", 0.0), tmp_path / "last")
    folder = newest_valid(tmp_path / "run" / "checkpoints")
    assert folder is not None
    own = read_tensors(folder / "train" / "weights.safetensors")[0]
    for component, module in load_model(tmp_path / "last", ["text", "denoiser"]).components.items():
        assert all(torch.equal(p, own[f"joint.{component}.{name}"]) for name, p in module.named_parameters())


@pytest.mark.slow
def test_two_processes_equal_one(models: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    found = by_one_and_by_two(lambda out: tiny_config("denoising", out, shards, *words(models)), tmp_path)
    assert any(name.startswith("joint.text.") for name in found[1])
    for name, value in found[1].items():  # Adam divides by the gradient's size: see test_processes
        torch.testing.assert_close(found[2][name], value, atol=5e-5, rtol=1e-3)


def test_every_parameter_that_learns_has_a_gradient(models: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    """DDP waits for all of them. The pooled embedding is heard or not; a projection that nobody uses stays."""
    pooled = ["task.unet.pooled_dim=8", f"task.text_model={{{TOWER}, embed_dim: 8}}"]
    unheard = [f"task.text_model={{{TOWER}, embed_dim: 8, skip: 1, final_norm: false}}"]
    for change, idle in ((pooled, set()), (unheard, {"text_projection", "ln_final", "transformer.resblocks.2"})):
        task = task_of(tiny_config("denoising", tmp_path / "run", shards, *words(models), *change))
        ((_, loss, _),) = task.losses(batch_of(["a dog", "a cat"]), 0)
        loss.backward()
        assert [n for n, p in task.joint.named_parameters() if p.requires_grad != (p.grad is not None)] == []
        still = {n for n, p in task.text.tower.named_parameters() if not p.requires_grad}
        assert all(any(n.startswith(part) for part in idle) for n in still) and bool(still) == bool(idle)


def test_dropped_captions_teach_the_null_prompt(models: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    task = task_of(tiny_config("denoising", tmp_path / "run", shards, *words(models, "task.null_prompt=nothing")))
    batch, heard = batch_of(["a dog", "a cat", "two birds"]), []
    task.text.register_forward_hook(lambda module, args, output: heard.append(list(args[0])))
    told = task._told(batch, [True, False, True])
    assert told.context is None and heard == []  # nothing is remembered of prompts: it would be of an earlier step
    task.joint(torch.zeros(3, 2, 8, 8), torch.zeros(3), told)
    assert heard == [["nothing", "a cat", "nothing"]]


def test_a_joint_step_never_makes_the_host_wait(models: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    flow = ["task.diffusion.schedule=flow", "task.diffusion.prediction=flow"]
    sized = [*NEW, "task.unet.size_dim=4", "task.unet.pooled_dim=16", "task.unet.pooled_layers=2"]
    for change in (NEW, sized, [f"task.text={models['contrastive']}"]):
        where = f"task.autoencoder={models['autoencoder']}"
        task = task_of(tiny_config("denoising", tmp_path / "run", shards, where, *flow, *change))
        task._latents_checked = True  # in the first step alone
        assert waits(task, batch_of(["a dog", "a cat"])) == []


def test_cached_texts_step_without_waiting(models: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    """Of dropped and of empty captions the text is looked up; and joint training does not take what was said before."""
    flow = ["task.diffusion.schedule=flow", "task.diffusion.prediction=flow", "task.dropout=0.5"]
    config = tiny_config("denoising", tmp_path / "run", shards, *frozen(models["autoencoder"].parent), *flow)
    task, plain = task_of(config), batch_of(["a dog", "", "a cat", "two birds"])
    with torch.no_grad():
        told = task.text(plain.captions)
    batch = Batch(plain.image, plain.captions, plain.positions, plain.keys,
                  text={"context": told.context * (torch.arange(4) != 1).view(-1, 1, 1)})  # fmt: skip
    for dropped in ([False] * 4, [True, False, False, True]):
        torch.testing.assert_close(task._told(batch, dropped).context, task._told(plain, dropped).context)
    task.to("meta")._embeddings.clear()
    task._latents_checked = True
    assert waits(task, batch) == []
    joint = task_of(tiny_config("denoising", tmp_path / "run", shards, *words(models)))
    with pytest.raises(ValueError, match="without --text"):
        next(joint.losses(batch, 0))


def of_transformers(folder: Path) -> list[str]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import T5Config, T5EncoderModel

    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "circle", "blue", "square"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    words = dict(vocab_size=8, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, pad_token_id=0)
    T5EncoderModel(T5Config(**words)).save_pretrained(folder)
    return [f"task.text={folder}", "task.unet.context_dim=16"]


def of_open_clip(file: Path) -> list[str]:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from safetensors.torch import save_file

    torch.manual_seed(0)
    text = CLIPTextCfg(width=64, heads=1, layers=3, context_length=12)
    clip = CLIP(32, CLIPVisionCfg(layers=1, width=64, patch_size=8, image_size=16), text).eval()
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, file)
    return [f"task.text={file}", "task.unet.context_dim=64"]


def of_stable_diffusion(file: Path) -> list[str]:
    model = make("sd1")
    compvis.write(model, file)
    return [f"task.text={file}", f"task.unet.context_dim={model.components['text'].context_dim}"]


def of_diffusers(folder: Path) -> list[str]:
    model = make("sd2")
    diffusers.write(model, folder)
    return [f"task.text={folder}", f"task.unet.context_dim={model.components['text'].context_dim}"]


PRETRAINED = {
    "transformers": (of_transformers, 2),
    "open_clip.safetensors": (of_open_clip, 2),  # the layer before the last, as Stable Diffusion 2 hears it
    "sd.safetensors": (of_stable_diffusion, None),
    "diffusers": (of_diffusers, None),
}


@pytest.mark.parametrize("source", PRETRAINED)
def test_pretrained_encoders_stay_or_learn(source: str, models: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    """From each kind of file: frozen, it comes out bit for bit as it went in; trained, it starts there and moves."""
    make_it, layer = PRETRAINED[source]
    where = [f"task.autoencoder={models['autoencoder']}", *make_it(tmp_path / source)]
    (before,) = load_model(tmp_path / source, ["text"], dtype=torch.float32).require("text")
    for word in ("false", "true"):
        out = tmp_path / word
        run(tiny_config("denoising", out, shards, *where, f"task.train_text={word}", "optimizer.lr=0.01", "samples=16"))
        found = load_model(out)
        (text,) = found.require("text")
        same = {n: torch.equal(p, before.get_parameter(n)) for n, p in text.named_parameters()}
        assert all(same.values()) if word == "false" else not all(same.values())
        assert found.settings["text"] == text_record(before) == json.loads(json.dumps(text_record(text)))
        assert layer in (None, found.settings["text"]["layer"])
        if word == "true":  # where it starts: a step of nothing leaves it there
            task = task_of(tiny_config("denoising", out, shards, *where, "task.train_text=true"))
            assert isinstance(task.joint, JointDenoiser)
            for name, p in task.text.named_parameters():
                torch.testing.assert_close(p, before.get_parameter(name), rtol=0, atol=0)


def test_open_clips_own_tower_says_the_same(tmp_path: Path) -> None:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from safetensors.torch import load_file

    of_open_clip(tmp_path / "clip.safetensors")
    text = CLIPTextCfg(width=64, heads=1, layers=3, context_length=12)
    clip = CLIP(32, CLIPVisionCfg(layers=1, width=64, patch_size=8, image_size=16), text).eval()
    clip.load_state_dict(load_file(tmp_path / "clip.safetensors"))
    (encoder,) = load_model(tmp_path / "clip.safetensors").require("text")
    prompts = ["a dog", "a cat and a dog"]
    with torch.no_grad():
        pooled = clip.encode_text(encoder.tokenize(prompts))
        torch.testing.assert_close(encoder(prompts).pooled, pooled, rtol=1e-5, atol=1e-6)


def test_another_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one of as many entries, of which two have changed places."""
    from open_clip.tokenizer import SimpleTokenizer

    real = SimpleTokenizer.__init__

    def swapped(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        ranks = list(self.bpe_ranks)
        ranks[5], ranks[6] = ranks[6], ranks[5]
        self.bpe_ranks = {pair: i for i, pair in enumerate(ranks)}

    monkeypatch.setattr(SimpleTokenizer, "__init__", swapped)
    with pytest.raises(ValueError, match="is not CLIP's") as told:
        TextEncoder(TextConfig(width=16, layers=1, heads=2, embed_dim=0))
    assert "\n" not in str(told.value)


def altered(run_folder: Path, key: str, value: Any) -> None:
    """Change what a model's settings record of its text encoder, with the manifest that holds the file to its hash."""
    folder = newest_valid(run_folder / "checkpoints")
    assert folder is not None
    model, manifest = (json.loads((folder / name).read_text()) for name in ("model.json", "manifest.json"))
    model["settings"]["text"][key] = value
    (folder / "model.json").write_text(json.dumps(model))
    file = folder / "model.json"
    manifest["model.json"] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("key", "value"), [("tokenizer_sha256", "0" * 64), ("layer", 7), ("final_norm", False)])
def test_an_encoder_that_is_not_the_one_recorded_is_refused(
    key: str, value: Any, shards: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    run(tiny_config("contrastive", tmp_path / "text", shards, "samples=8"))
    altered(tmp_path / "text", key, value)
    where = [f"task.autoencoder={models['autoencoder']}", f"task.text={tmp_path / 'text'}"]
    with pytest.raises(ValueError, match=f"task.text=.*trained with {key} {value!r}") as told:
        run(tiny_config("denoising", tmp_path / "run", shards, *where))
    assert "\n" not in str(told.value) and not (tmp_path / "run").exists()


def test_a_layer_that_is_not_there_and_an_encoder_that_would_not_learn(shards: Path, tmp_path: Path) -> None:
    for changes, reason in (
        (["task.text_model={layers: 2, skip: 2}"], r"skip must be in 0\.\.1"),
        (["task.train_text=false"], "learned nothing"),
    ):
        with pytest.raises(ValueError, match=reason):
            tiny_config("denoising", tmp_path / "run", shards, "task.autoencoder=a", *NEW, *changes)


def test_records_of_every_encoder() -> None:
    assert text_record(make("sdxl").components["text"]).keys() == {"first", "second"}
    clip = text_record(TextEncoder(TextConfig(width=16, layers=3, heads=2, skip=1, final_norm=False)))
    assert clip["layer"] == 2 and clip["final_norm"] is False and len(clip["tokenizer_sha256"]) == 64
