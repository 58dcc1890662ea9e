"""Models of every family through every format and back, bit by bit; and what is refused."""

import json
import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.checkpoints import compvis, convert, describe, diffusers, textual_inversion
from ldm.checkpoints.files import commit, sha256
from ldm.checkpoints.layouts import scheduler, unet_config
from ldm.checkpoints.load import load_model, save_model
from ldm.checkpoints.model import LoadedModel, config_of
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline
from tests.checkpoints.families import OPEN_CLIP, SMALL, make, text_to_image

FAMILIES = ("sd1", "sd2", "sdxl", "refiner", "inpainting", "depth", "x4 upscaler")
ALONE = {"autoencoder": ("native", "compvis", "diffusers"), "controlnet": ("native", "compvis", "diffusers")}
ALONE |= {name: ("native", "compvis", "diffusers") for name in ("t2i_adapter", "t2i_adapter_xl")}
ALONE |= {"dit": ("native", "compvis"), "diffusers dit": ("native", "diffusers"), "mmdit": ("native", "diffusers")}
ROUTES = [(family, to) for family in FAMILIES for to in convert.FORMATS]
ROUTES += [(family, to) for family, formats in ALONE.items() for to in formats]


def same(a: LoadedModel, b: LoadedModel) -> None:
    """Every tensor and every setting the same."""
    assert a.components.keys() == b.components.keys()
    for name, module in a.components.items():
        theirs = b.components[name].state_dict()
        assert config_of(b.components[name]) == config_of(module), name
        for key, tensor in module.state_dict().items():
            if key == "latent_std":  # through a decimal in a JSON file
                torch.testing.assert_close(theirs[key], tensor, rtol=1e-6, atol=0)
            else:
                assert torch.equal(theirs[key], tensor), f"{name}.{key}"


def stored(model: LoadedModel, path: Path) -> Path:
    with commit(path) as stage:
        save_model(stage, model.components, model.settings, model.name)
    return path


def resave(path: Path, tensors: dict[str, torch.Tensor], to: Path | None = None) -> None:
    """Other tensors under the same metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({k: v.contiguous() for k, v in tensors.items()}, to or path, metadata=metadata)


def place(folder: Path, to: str, name: str = "model") -> Path:
    return folder / f"{name}-{to}{'.safetensors' if to == 'compvis' else ''}"


@pytest.mark.parametrize(("family", "to"), ROUTES)
def test_round_trip(family: str, to: str, tmp_path: Path) -> None:
    model = make(family)
    source = stored(model, tmp_path / "source")
    there = place(tmp_path, to)
    assert convert.convert(source, there, to) == ()
    same(model, load_model(there))
    convert.convert(there, tmp_path / "back", "native")
    back = load_model(tmp_path / "back")
    same(model, back)
    if "diffusion" in model.settings:
        assert {k: back.settings["diffusion"][k] for k in model.settings["diffusion"]} == model.settings["diffusion"]
        assert (back.settings["size"], back.settings["null_prompt"]) == (
            model.settings["size"],
            model.settings["null_prompt"],
        )
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_compvis_and_diffusers_are_each_others_inverse(family: str, tmp_path: Path) -> None:
    first = place(tmp_path, "compvis", "first")
    compvis.write(make(family), first)
    convert.convert(first, tmp_path / "folder", "diffusers")
    convert.convert(tmp_path / "folder", place(tmp_path, "compvis", "second"), "compvis")
    before, after = (load_file(place(tmp_path, "compvis", name)) for name in ("first", "second"))
    assert before.keys() == after.keys() and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize(
    "family",
    [
        "sd1",
        "sdxl",
        "refiner",
        "sd2",
        "controlnet",
        "t2i_adapter",
        "t2i_adapter_xl",
        "dit",
        "autoencoder",
        "x4 upscaler",
    ],
)
def test_a_file_that_says_nothing_of_itself(family: str, tmp_path: Path) -> None:
    """As the published ones: no metadata, half precision, tensors of training left in. Told from names and shapes."""
    path = place(tmp_path, "compvis")
    compvis.write(make(family, channels=64), path, dtype=torch.float16)
    tensors = load_file(path)
    if family != "dit":
        tensors |= {"loss.logvar": torch.zeros(()), "model_ema.num_updates": torch.zeros((), dtype=torch.int)}
    tensors |= {"cond_stage_model.model.logit_scale": torch.tensor(4.6)} if family == "sd2" else {}
    if family == "sd1":
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, path)
    model, expected = load_model(path), make(family, channels=64)
    assert model.notes or family in ("controlnet", "t2i_adapter", "t2i_adapter_xl")
    for name, module in expected.components.items():
        found, wanted = config_of(model.components[name]), config_of(module)
        if name == "denoiser" and family != "dit":  # heads leave no trace: the rule is for the published sizes
            found = replace(found, heads=wanted.heads, head_dim=wanted.head_dim)
        if family == "controlnet":
            found = replace(found, unet=replace(found.unet, heads=wanted.unet.heads, head_dim=wanted.unet.head_dim))
        if name == "text" and family != "sdxl":
            found = replace(found, heads=wanted.heads, activation=wanted.activation)
        if family == "sdxl" and name == "text":
            assert (found.first.skip, found.first.final_norm, found.second.embed_dim) == (1, False, 1280)
            continue
        assert found == wanted
        for key, tensor in module.state_dict().items():
            kept = tensor if key.startswith("latent_") else tensor.half()
            assert torch.equal(model.components[name].state_dict()[key], kept), key
    written = place(tmp_path, "compvis", "again")
    compvis.write(model, written)
    again, kept = load_file(written), {k for k in tensors if not compvis.DROPPED.fullmatch(k)}
    assert again.keys() == kept and all(torch.equal(again[k], tensors[k]) for k in kept)


def test_bare_components_and_old_names(tmp_path: Path) -> None:
    """An autoencoder alone in its file, and text keys without `text_model.`."""
    path, model = place(tmp_path, "compvis"), make("sd1")
    compvis.write(model, path)
    tensors = load_file(path)
    old = {k.replace("transformer.text_model.", "transformer."): v for k, v in tensors.items()}
    resave(path, old, tmp_path / "old.safetensors")
    assert torch.equal(
        load_model(tmp_path / "old.safetensors").components["text"].state_dict()["tower.ln_final.weight"],
        model.components["text"].state_dict()["tower.ln_final.weight"],
    )
    bare = {k.removeprefix("first_stage_model."): v for k, v in tensors.items() if k.startswith("first_stage_model.")}
    torch.save({"state_dict": bare | {"loss.logvar": torch.zeros(())}, "global_step": 3}, tmp_path / "vae.ckpt")
    found = load_model(tmp_path / "vae.ckpt")
    assert list(found.components) == ["autoencoder"] and "latent scale 0.18215" in found.notes[0]
    assert torch.equal(found.components["autoencoder"].encoder.conv_in.weight, bare["encoder.conv_in.weight"])


def test_averaged_weights_on_request(tmp_path: Path) -> None:
    path = place(tmp_path, "compvis")
    compvis.write(make("sd1"), path)
    tensors = load_file(path)
    start = "model.diffusion_model."
    raw = {k: v for k, v in tensors.items() if k.startswith(start)}
    average = {f"model_ema.{k.removeprefix('model.').replace('.', '')}": v + 1 for k, v in raw.items()}
    assert "model_ema.diffusion_modelinput_blocks00weight" in average
    resave(path, tensors | average)
    raw_weight, ema_weight = (load_model(path, ema=ema).components["denoiser"].conv_in.weight for ema in (False, True))
    assert torch.equal(ema_weight, raw_weight + 1)
    resave(path, tensors)
    with pytest.raises(ValueError, match="no averaged weights"):
        load_model(path, ema=True)


def test_the_last_block_of_open_clip_survives_diffusers(tmp_path: Path) -> None:
    convert.convert(stored(make("sd2"), tmp_path / "a"), tmp_path / "folder", "diffusers")
    words = json.loads((tmp_path / "folder/text_encoder/config.json").read_text())
    assert words["num_hidden_layers"] == OPEN_CLIP.layers - 1
    convert.convert(tmp_path / "folder", place(tmp_path, "compvis"), "compvis")
    assert f"cond_stage_model.model.transformer.resblocks.{OPEN_CLIP.layers - 1}.ln_1.weight" in load_file(
        place(tmp_path, "compvis")
    )
    # A folder of others has no such block; the single file then gets one of zeros, which nothing reads.
    (tmp_path / "folder/text_encoder/left_out.safetensors").unlink()
    notes = convert.convert(tmp_path / "folder", place(tmp_path, "compvis", "b"), "compvis")
    assert "block of zeros" in notes[0]


@pytest.mark.parametrize("to", ["compvis", "diffusers"])
def test_latent_statistics_of_our_own_training(to: str, tmp_path: Path) -> None:
    """A mean and a spread per channel, which nobody else's format knows, go into the weights around the latents."""
    model = make("sd1")
    autoencoder = model.components["autoencoder"]
    autoencoder.latent_mean.copy_(torch.tensor([0.3, -0.2, 0.0, 1.0]).view(4, 1, 1))
    autoencoder.latent_std.copy_(torch.tensor([2.0, 3.0, 0.5, 1.5]).view(4, 1, 1))
    image, latent = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 4, 8, 8)
    (note,) = convert.convert(stored(model, tmp_path / "source"), place(tmp_path, to), to)
    assert "statistics" in note
    again = load_model(place(tmp_path, to)).components["autoencoder"]
    torch.testing.assert_close(again.encode(image), autoencoder.encode(image), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.decode(latent), autoencoder.decode(latent), rtol=1e-4, atol=1e-4)
    noise = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(again.encode(image, noise), autoencoder.encode(image, noise), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "metadata", "expected"),
    [
        ({}, {}, ("v", "rule for Stable Diffusion 2")),
        ({}, {"modelspec.prediction_type": "epsilon"}, ("eps", "metadata")),
        ({}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, ("v", "metadata")),
        ({"v_pred": torch.zeros(0)}, {}, ("v", "mark")),
    ],
)
def test_what_a_file_predicts(changes: Any, metadata: Any, expected: Any) -> None:
    from ldm.checkpoints import facts
    from ldm.models.unet import UNetConfig

    config = UNetConfig(context_dim=1024, head_dim=64, linear_projection=True)
    settings, notes = facts.settings({"denoiser": config}, changes, metadata, None)
    assert settings["diffusion"]["prediction"] == expected[0] and expected[1] in notes[0]
    settings, notes = facts.settings({"denoiser": config}, changes, metadata, "eps")
    assert settings["diffusion"]["prediction"] == "eps" and "asked" in notes[0]
    old = facts.settings({"denoiser": config}, {}, {"global_step": 875_000}, None)[0]
    assert (old["diffusion"]["prediction"], old["size"]) == ("eps", 512)
    betas = {"betas": torch.linspace(1e-4, 0.02, 1000)}
    assert facts.settings({"denoiser": UNetConfig()}, betas, {}, None)[0]["diffusion"]["schedule"] == "linear"
    with pytest.raises(ValueError, match="noise schedule"):
        facts.settings({"denoiser": UNetConfig()}, {"betas": torch.linspace(1e-4, 0.02, 1000) ** 3}, {}, None)


def spoiled(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    key = "model.diffusion_model.out.2.weight"
    if how == "missing":
        return {k: v for k, v in tensors.items() if k != key}
    if how == "unknown":
        return tensors | {"model.diffusion_model.surprise": torch.ones(2)}
    if how == "shape":
        return tensors | {"model.diffusion_model.out.0.weight": torch.ones(7)}
    if how == "NaN":
        return tensors | {key: tensors[key] * float("nan")}
    if how == "mixes":
        return tensors | {key: tensors[key].half()}
    if how == "LoRA":
        return {"lora_unet_down_blocks_0_attentions_0.lora_down.weight": torch.ones(4, 8)}
    if how == "textual inversion":
        return {"emb_params": torch.ones(2, 16)}
    if how == "component of diffusers":
        return {
            "down_blocks.0.resnets.0.conv1.weight": torch.ones(4, 4, 3, 3),
            "conv_in.weight": torch.ones(4, 4, 3, 3),
        }
    assert how == "nothing known"
    return {f"layer.{i}.w": torch.ones(4, 4, 3, 3) for i in range(5)}


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "unknown",
        "shape",
        "NaN",
        "mixes",
        "LoRA",
        "textual inversion",
        "component of diffusers",
        "nothing known",
    ],
)
def test_a_file_that_is_no_model_or_a_spoiled_one(how: str, tmp_path: Path) -> None:
    path = place(tmp_path, "compvis")
    compvis.write(make("sd1"), path)
    resave(path, spoiled(load_file(path), how))
    word = "instead of" if how == "shape" else how
    with pytest.raises(ValueError, match=word) as told:
        load_model(path)
    assert str(path) in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(ValueError, match=word):
        convert.convert(path, tmp_path / "out", "native")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    described = describe.describe(path)
    assert ("does not load" in described) or how == "textual inversion"
    if how in ("missing", "unknown"):
        assert f"denoiser: {how} model.diffusion_model." in described


class Code:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("how", ["code", "old code", "truncated", "bomb", "list", "not a checkpoint"])
def test_pickles_that_are_refused(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.ckpt"
    state = {"encoder.conv_in.weight": torch.ones(4)}
    if how in ("code", "old code"):
        torch.save({"state_dict": state, "x": Code()}, path, _use_new_zipfile_serialization=how == "code")
    elif how == "list":
        torch.save([torch.ones(3)], path)
    elif how == "not a checkpoint":
        path.write_bytes(b"PK" + bytes(range(256)) * 10)
    else:
        torch.save({"state_dict": state}, path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    if how == "bomb":
        with zipfile.ZipFile(path) as archive:
            records = {n: archive.read(n) for n in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in records.items():
                archive.writestr(name, content)
            archive.writestr("archive/data/9", bytes(10_000_000))
    with pytest.raises(ValueError, match=r"model\.ckpt") as told:
        load_model(path)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "ran").exists()
    if "code" in how:
        assert "nothing in it was run" in str(told.value)


@pytest.mark.parametrize("how", ["truncated", "header", "empty"])
def test_safetensors_that_are_damaged(how: str, tmp_path: Path) -> None:
    path = place(tmp_path, "compvis")
    compvis.write(make("sd1"), path)
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[:-1000])
    elif how == "header":
        path.write_bytes(struct.pack("<Q", 2**40) + content[8:])
    else:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_model(path)


def test_nothing_is_overwritten_and_words_are_checked(tmp_path: Path) -> None:
    source = stored(make("autoencoder"), tmp_path / "source")
    for to, target, reason in (
        ("native", source, "exists"),
        ("compvis", tmp_path / "folder", "safetensors file"),
        ("native", tmp_path / "a.safetensors", "folder"),
        ("onnx", tmp_path / "x", "unknown format"),
    ):
        with pytest.raises(ValueError, match=reason):
            convert.convert(source, target, to)
    with pytest.raises(ValueError, match="averaged"):
        load_model(source, ema=True)


def test_a_conversion_that_changes_an_output_is_noticed(tmp_path: Path) -> None:
    """Planted: a weight altered on the way."""
    model = make("sd1")
    again = load_model(stored(model, tmp_path / "a"))
    convert.check(model, again, exact=True)
    again.components["denoiser"].up[0].layers[0].residual.conv1.weight.data[0, 0, 0, 0] += 0.1
    with pytest.raises(ValueError, match=r"changed denoiser\.up"):
        convert.check(model, again, exact=True)
    with pytest.raises(ValueError, match="changed what the denoiser says"):
        convert.check(model, again, exact=False)


def test_halved_and_described(tmp_path: Path) -> None:
    source = stored(make("sd1"), tmp_path / "source")
    convert.convert(source, place(tmp_path, "compvis"), "compvis", dtype=torch.float16)
    with safe_open(place(tmp_path, "compvis"), "pt") as file:
        assert all(file.get_tensor(k).dtype == torch.float16 for k in file.keys())  # noqa: SIM118
        assert file.metadata()["format"] == "pt"
    lines = describe.describe(place(tmp_path, "compvis"))
    for word in ("compvis", "denoiser: unet", "float16", "diffusion", "autoencoder: autoencoder"):
        assert word in lines
    assert "native" in describe.describe(source)


def test_reading_leaves_the_file_alone(tmp_path: Path) -> None:
    path = place(tmp_path, "compvis")
    compvis.write(make("sd1"), path)
    before = sha256(path)
    model = load_model(path)
    with torch.no_grad():
        model.components["denoiser"].conv_in.weight.add_(1)  # tensors may be mapped from the file
    assert sha256(path) == before


def test_folders_with_variants_and_parts(tmp_path: Path) -> None:
    """fp16 files, a component's folder alone, weights in several files."""
    model = make("sd1")
    folder = tmp_path / "folder"
    diffusers.write(model, folder)
    weights = folder / "unet" / f"{diffusers.WEIGHTS}.safetensors"
    tensors = load_file(weights)
    weights.rename(weights.with_name(f"{diffusers.WEIGHTS}.fp16.safetensors"))
    alone = load_model(folder / "unet")
    assert list(alone.components) == ["denoiser"] and alone.settings == {}
    weights.with_name(f"{diffusers.WEIGHTS}.fp16.safetensors").unlink()
    with pytest.raises(ValueError, match="has no diffusion_pytorch_model"):
        load_model(folder)
    half = dict(list(tensors.items())[: len(tensors) // 2])
    rest = {k: v for k, v in tensors.items() if k not in half}
    save_file(half, folder / "unet" / "a.safetensors")
    save_file(rest, folder / "unet" / "b.safetensors")
    index = {k: "a.safetensors" for k in half} | {k: "b.safetensors" for k in rest}
    (folder / "unet" / f"{diffusers.WEIGHTS}.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    same(model, load_model(folder))
    index = {k: "../../b.safetensors" for k in index}
    (folder / "unet" / f"{diffusers.WEIGHTS}.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ValueError, match="outside"):
        load_model(folder)


def test_a_folder_with_another_vocabulary(tmp_path: Path) -> None:
    diffusers.write(make("sd1"), tmp_path / "folder")
    (tmp_path / "folder/tokenizer/vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    with pytest.raises(ValueError, match="vocabulary"):
        load_model(tmp_path / "folder")


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    own = text_to_image(SMALL | dict(positions=True), TextEncoder(replace(OPEN_CLIP, skip=0)))
    for to in ("compvis", "diffusers"):
        with pytest.raises(ValueError, match="positions"):
            convert.convert(stored(own, tmp_path / f"own-{to}"), place(tmp_path, to), to)
        assert not place(tmp_path, to).exists()


@pytest.mark.parametrize("to", convert.FORMATS)
def test_textual_inversions(to: str, tmp_path: Path) -> None:
    vectors, other = torch.randn(2, 16), torch.randn(2, 24)
    parameter = torch.nn.Parameter(vectors)
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": parameter}, "name": "cat", "step": 9},
        tmp_path / "cat.pt",
    )
    save_file({"emb_params": vectors}, tmp_path / "kohya.safetensors")
    save_file({"<cat>": vectors[0]}, tmp_path / "learned_embeds.safetensors")
    save_file({"clip_l": vectors, "clip_g": other}, tmp_path / "xl.safetensors")
    save_file({"emb_params": vectors}, tmp_path / "v1.5.safetensors")  # as the name of a tensor a word without its dot
    expected = {
        "cat.pt": ("cat", [vectors]),
        "v1.5.safetensors": ("v1.5", [vectors]),
        "kohya.safetensors": ("kohya", [vectors]),
        "learned_embeds.safetensors": ("<cat>", [vectors[:1]]),
        "xl.safetensors": ("xl", [vectors, other]),
    }
    for name, (word, tensors) in expected.items():
        found = textual_inversion.read(tmp_path / name)
        assert found.word == word
        assert all(torch.equal(a, b) for a, b in zip(found.vectors, tensors, strict=True))
        assert f"textual inversion for the word {word!r}" in describe.describe(tmp_path / name)
        target = tmp_path / f"{word}-{to}.safetensors"
        convert.convert(tmp_path / name, target, to)
        again = textual_inversion.read(target)
        assert all(torch.equal(a, b) for a, b in zip(again.vectors, tensors, strict=True))
        assert again.word == word
    with pytest.raises(ValueError, match="no --dtype"):
        convert.convert(tmp_path / "cat.pt", tmp_path / "half.safetensors", to, dtype=torch.float16)
    with pytest.raises(ValueError, match="safetensors"):
        convert.convert(tmp_path / "cat.pt", tmp_path / "cat2.pt", to)
    save_file({"emb_params": vectors * float("nan")}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="NaN"):
        textual_inversion.read(tmp_path / "bad.safetensors")


def test_a_text_encoder_of_transformers(tmp_path: Path) -> None:
    """From its own folder into a model folder of ours, whole with its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import T5Config, T5EncoderModel

    words = ["<pad>", "</s>", "<unk>", "a", "red", "circle"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    reference = T5EncoderModel(
        T5Config(vocab_size=8, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, pad_token_id=0)
    )
    reference.save_pretrained(tmp_path)
    convert.convert(tmp_path, tmp_path / "native", "native")
    (text,) = load_model(tmp_path / "native").require("text")
    ids = torch.tensor([[3, 4, 5] + [0] * 74])
    expected = reference.eval()(ids, attention_mask=ids > 0).last_hidden_state
    torch.testing.assert_close(text(["a red circle"]).context, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="cannot hold"):
        convert.convert(tmp_path, tmp_path / "x.safetensors", "compvis")


def test_a_folder_without_a_scheduler_says_what_it_assumes(tmp_path: Path) -> None:
    diffusers.write(make("sd1"), tmp_path / "folder")
    (tmp_path / "folder/scheduler/scheduler_config.json").unlink()
    model = load_model(tmp_path / "folder")
    assert "rule" in model.notes[0] and model.settings["diffusion"]["beta_end"] == 0.012


@pytest.mark.parametrize("to", convert.FORMATS)
@torch.no_grad()
def test_the_latents_scale_is_exact_in_half_precision(to: str, tmp_path: Path) -> None:
    convert.convert(stored(make("sd1"), tmp_path / "source"), place(tmp_path, to), to, dtype=torch.bfloat16)
    autoencoder = load_model(place(tmp_path, to)).components["autoencoder"]
    assert autoencoder.encoder.conv_in.weight.dtype == torch.bfloat16
    torch.testing.assert_close(autoencoder.latent_std, torch.full((4, 1, 1), 1 / 0.18215), rtol=1e-6, atol=0)
    image = torch.rand(1, 3, 8, 8).bfloat16()
    assert autoencoder.decode(autoencoder.encode(image)).dtype == torch.bfloat16


def test_a_model_that_draws_into_pictures_says_so(tmp_path: Path) -> None:
    assert Pipeline.load(stored(make("inpainting"), tmp_path / "model")).kind == "inpainting"


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"_class_name": "UNet2DConditionModel", "block_out_channels": [0, 1]}', "{"]
)
def test_folders_whose_json_is_another(content: str, tmp_path: Path) -> None:
    diffusers.write(make("sd1"), tmp_path / "folder")
    for file in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        original = (tmp_path / "folder" / file).read_text()
        if content.endswith("}") and "scheduler" in file:
            continue  # the library's defaults
        (tmp_path / "folder" / file).write_text(content)
        with pytest.raises(ValueError, match="folder") as told:
            load_model(tmp_path / "folder")
        assert "\n" not in str(told.value)
        (tmp_path / "folder" / file).write_text(original)


def test_the_refiner_is_known_by_the_width_of_what_it_is_told(tmp_path: Path) -> None:
    """1280 + 5 x 256 against the base's 1280 + 6 x 256; by nothing else, so other widths cannot be written."""
    for family, scored, null in (("sdxl", False, None), ("refiner", True, "")):
        path = place(tmp_path, "compvis", family)
        compvis.write(make(family, channels=64), path)
        save_file(load_file(path), path)  # without metadata
        model = load_model(path)
        assert model.components["denoiser"].config.aesthetic is scored
        assert (model.settings["null_prompt"], model.settings["size"]) == (null, 1024)
    config = make("refiner").components["denoiser"].config
    for other in (replace(config, pooled_dim=64), replace(config, pooled_dim=1024, aesthetic=False)):
        with pytest.raises(ValueError, match="an aesthetic score by a width of 2560"):
            unet_config.to_diffusers(other, 32)
    with pytest.raises(ValueError, match="text encoders in its pipelines alone"):
        text = {"text": make("refiner").components["text"]}
        diffusers.write(LoadedModel(text, {}, "tiny", Path("tiny")), tmp_path / "text")
    diffusers.write(make("refiner"), tmp_path / "folder")
    index = json.loads((tmp_path / "folder/model_index.json").read_text())
    assert index["requires_aesthetics_score"] and index["text_encoder"] == [None, None]


@pytest.mark.parametrize(("family", "which"), [("refiner", "a lone text encoder"), ("sdxl", "a pair of text encoders")])
def test_sdxls_text_encoders_beside_a_unet_without_sizes_are_refused(family: str, which: str, tmp_path: Path) -> None:
    """diffusers opens such a folder as SDXL, and fails in the first drawing: it computes the sizes' embedding."""
    model = make(family)
    width = model.components["denoiser"].config.context_dim
    plain = make("sd1").components["denoiser"].config
    model.components["denoiser"] = UNet(replace(plain, context_dim=width))
    with pytest.raises(ValueError, match=f"cannot hold {which} .*beside a U-Net that is told no sizes"):
        diffusers.write(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_what_a_format_does_not_keep_is_said(tmp_path: Path) -> None:
    model = make("sd1")
    model.settings["null_prompt"] = "photo"
    notes = convert.convert(stored(model, tmp_path / "a"), tmp_path / "folder", "diffusers")
    assert notes == ("the format does not keep null_prompt: 'photo'",)
    flow = make("sd1")
    flow.settings["diffusion"] = {"schedule": "flow", "prediction": "flow", "shift": 2.0, "spacing": "trailing"}
    (note,) = convert.convert(stored(flow, tmp_path / "b"), place(tmp_path, "compvis"), "compvis")
    assert "would read this as eps" in note
    marked = make("sd2")
    marked.settings["diffusion"]["zero_snr"] = True
    convert.convert(stored(marked, tmp_path / "c"), place(tmp_path, "compvis", "c"), "compvis")
    assert {"v_pred", "ztsnr"} <= load_file(place(tmp_path, "compvis", "c")).keys()


def test_a_model_folder_that_was_tampered_with(tmp_path: Path) -> None:
    folder = stored(make("autoencoder"), tmp_path / "model")
    description = json.loads((folder / "model.json").read_text())
    for content, reason in (
        (description | {"components": ["../other/autoencoder"]}, "outside"),
        ({"format": 1}, "no model folder of ours"),
    ):
        with commit(tmp_path / "again") as stage:
            (stage / "model.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=reason):
            load_model(tmp_path / "again")
    (folder / "manifest.json").write_text('{"model.json": 5}')
    with pytest.raises(ValueError, match="damaged"):
        load_model(folder)


def test_small_pickles_that_grow_and_marks_of_others(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {"input_hint_block.0.weight": torch.zeros(1).expand(30_000, 30_000)}}, tmp_path / "a.ckpt"
    )
    with pytest.raises(ValueError, match="far larger"):
        load_model(tmp_path / "a.ckpt")
    path = place(tmp_path, "compvis")
    compvis.write(make("sdxl", channels=64), path)
    save_file(load_file(path) | {"edm_mean": torch.zeros(4)}, path)
    with pytest.raises(ValueError, match="EDM"):
        load_model(path)


def test_a_dynamic_shift_goes_there_and_back() -> None:
    words = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    found, _ = scheduler.from_diffusers(words, "here")
    assert found["dynamic_shift"] and found["schedule"] == "flow"
    assert scheduler.from_diffusers(scheduler.to_diffusers(found), "there")[0] == found


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 0.002}, "not known"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "max_shift": 1.0},
            "not known",
        ),
        ({"prediction_type": "nonsense"}, "not known"),
    ],
)
def test_schedulers_that_are_not_known(words: dict[str, Any], reason: str, tmp_path: Path) -> None:
    diffusers.write(make("sd1"), tmp_path / "folder")
    file = tmp_path / "folder/scheduler/scheduler_config.json"
    file.write_text(json.dumps(words))
    with pytest.raises(ValueError, match=reason):
        load_model(tmp_path / "folder")


def test_old_pytorch_files_in_a_folder(tmp_path: Path) -> None:
    model = make("sd1")
    diffusers.write(model, tmp_path / "folder")
    for place_, old in (("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")):
        (file,) = (tmp_path / "folder" / place_).glob("*.safetensors")
        torch.save(load_file(file), file.with_name(old))
        file.unlink()
    same(model, load_model(tmp_path / "folder"))


def test_a_lone_text_encoder_keeps_its_padding(tmp_path: Path) -> None:
    text = LoadedModel({"text": TextEncoder(replace(OPEN_CLIP, skip=0)).eval()}, {}, "text", Path("text"))
    convert.convert(stored(text, tmp_path / "a"), tmp_path / "folder", "diffusers")
    assert config_of(load_model(tmp_path / "folder").components["text"]).pad_id == 0
