"""Bad input ends in one clear line and a non-zero status; nothing is lost or half-written."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from ldm.checkpoints.files import newest_valid
from ldm.cli.main import main
from tests.conftest import LOOP, TINY, frozen


def ldm(monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    """The message with which `ldm WORDS` ends; "" if all went well."""
    monkeypatch.setattr("sys.argv", ["ldm", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return "" if stop.value.code in (0, None) else str(stop.value.code)


@pytest.fixture
def config(tmp_path: Path, shards: Path) -> list[object]:
    """`train` and a config that would work."""
    (tmp_path / "c.yaml").write_text(f"out: {tmp_path / 'out'}\ndata: {{path: {shards}, size: 16}}\n")
    return ["train", tmp_path / "c.yaml", *TINY["autoencoder"], *LOOP]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["batch_sise=4"], "Did you mean: 'batch_size'"),
        (["task.kind=autoencodr"], "did you mean 'autoencoder'"),
        (["data.path=nowhere"], "nowhere"),
        (["batch_size=64"], "48 samples, fewer than one batch of 64"),
        (["data.size=15"], "must be a multiple of the latent factor 2"),
        (["attention=xformers"], "'xformers' does not work on cpu here"),
        (["no-such.yaml"], "no config file 'no-such.yaml'"),
    ],
)
def test_training(
    more: list[str], message: str, config: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ldm(monkeypatch, *config, *more)
    assert message in said and said.startswith("ldm: ") and "\n" not in said
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sampler", "dimm"], "unknown sampler 'dimm', did you mean 'ddim'?"),
        (["--steps", "0"], "steps and batch must be at least 1"),
        (["--size", "17"], "must be multiples of 4 px"),
        (["--size", "big"], "--size must be N or WxH"),
        (["--count", "0"], "count"),
    ],
)
def test_generating(
    words: list[str], message: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pictures"
    said = ldm(monkeypatch, "generate", models["denoising"], "a red circle", "--out", out, *words)
    assert message in said and "\n" not in said
    assert not out.exists()


def test_models_that_are_no_models(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(model: Path) -> str:
        return ldm(monkeypatch, "generate", model, "a red circle", "--out", tmp_path / "pictures")

    assert "no such file or folder" in generate(tmp_path / "nowhere")
    assert "this needs" in generate(models["autoencoder"])
    source = newest_valid(models["denoising"] / "checkpoints")
    assert source is not None
    for damage in ("altered", "truncated", "missing"):
        copy = tmp_path / damage
        shutil.copytree(source, copy)
        file = copy / "denoiser.safetensors"
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(bytes(data) if damage == "altered" else bytes(data[:-9]))
        said = generate(copy)
        assert "denoiser.safetensors" in said and damage in said and "\n" not in said
    assert not (tmp_path / "pictures").exists()


def test_a_model_of_another_shape_is_named(
    models: dict[str, Path], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_text(f"out: {tmp_path / 'out'}\ndata: {{path: {shards}, size: 16}}\n")
    words = ["train", tmp_path / "c.yaml", *TINY["denoising"], *LOOP, *frozen(models["autoencoder"].parent)]
    said = ldm(monkeypatch, *words, "task.unet.context_dim=24")
    assert "task.unet.context_dim is 24; the frozen models and captions need 16" in said
    said = ldm(monkeypatch, *words, "task.unet.channels=32", f"init={models['denoising']}")
    assert "does not fit this model" in said and "\n" not in said


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for source, message in (("shpaes", "did you mean 'shapes'"), (tmp_path / "empty", "empty")):
        assert message in ldm(monkeypatch, "data", "build", source, tmp_path / "out")
    assert "Did you mean: 'count'" in ldm(monkeypatch, "data", "build", "shapes", tmp_path / "out", "coutn=3")
    assert not (tmp_path / "out").exists()


def test_bad_pictures_are_counted_not_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, caption in (("good", b"a cat"), ("latin", b"caf\xe9"), ("none", None), ("torn", b"torn")):
        Image.new("RGB", (20, 20), "red").save(folder / f"{name}.png")
        if caption is not None:
            (folder / f"{name}.txt").write_bytes(caption)
    (folder / "torn.png").write_bytes((folder / "torn.png").read_bytes()[:40])
    assert ldm(monkeypatch, "data", "build", folder, tmp_path / "out", "--size", 16) == ""
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["delivered"] == 1
    rejected = {
        reason: entry if isinstance(entry, int) else entry["count"] for reason, entry in report["rejected"].items()
    }
    assert rejected == {"caption is not UTF-8": 1, "no caption": 1, "truncated image": 1}
