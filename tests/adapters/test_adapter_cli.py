"""`ldm adapter`: every verb on tiny models, and what it says."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from ldm.adapters import files
from ldm.adapters.adapter import Adapter, product
from ldm.adapters.fused import sites
from ldm.adapters.lora import AdapterConfig, adapter_of, inject, merge
from ldm.checkpoints import diffusers
from ldm.checkpoints.load import load_model
from ldm.cli.adapter import app
from tests.checkpoints.families import make


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a LoRA of rank 4 for it."""
    folder = tmp_path_factory.mktemp("cli")
    model = make("sd1")
    diffusers.write(model, folder / "model")
    torch.manual_seed(0)
    one = {name: copy.deepcopy(model.components[name]) for name in ("denoiser", "text")}
    inject(one, AdapterConfig(rank=4, text=True))
    for module in one.values():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
    files.write(adapter_of(one), folder / "a.safetensors", "kohya")
    return folder


def ldm(*arguments: object) -> str:
    """What the command says."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def changes(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {f"{c}.{name}": product(f) for c, part in adapter.parts.items() for name, f in part.items()}


def test_merge_and_extract(home: Path, tmp_path: Path) -> None:
    """What was merged at two weights is extracted again, at their sum."""
    lora = home / "a.safetensors"
    said = ldm("merge", home / "model", f"{lora}:0.75", f"{lora}:-0.25", "--out", tmp_path / "merged")
    assert "merged" in said
    merged, expected = load_model(tmp_path / "merged").components, load_model(home / "model").components
    merge(expected, files.read(lora), 0.5)
    for name in ("denoiser", "text"):
        theirs = sites(expected[name])
        assert all(torch.allclose(w, theirs[n], atol=1e-6) for n, w in sites(merged[name]).items())
    said = ldm("extract", tmp_path / "merged", home / "model", tmp_path / "again.safetensors", "--rank", 4)
    assert "lora, rank 4" in said
    found, wanted = changes(files.read(tmp_path / "again.safetensors")), changes(files.read(lora))
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], 0.5 * wanted[name], atol=1e-5) for name in wanted)


def test_combine_resize_convert_inspect(home: Path, tmp_path: Path) -> None:
    lora = home / "a.safetensors"
    assert "rank 8" in ldm("combine", f"{lora}:0.5", lora, "--out", tmp_path / "two.safetensors")
    wanted = changes(files.read(lora))
    found = changes(files.read(tmp_path / "two.safetensors"))
    assert all(torch.allclose(found[name], 1.5 * wanted[name], atol=1e-5) for name in wanted)
    ldm("resize", tmp_path / "two.safetensors", tmp_path / "four.safetensors", "--rank", 4)  # two equal ones: no loss
    found = changes(files.read(tmp_path / "four.safetensors"))
    assert all(torch.allclose(found[name], 1.5 * wanted[name], atol=1e-5) for name in wanted)
    for to, name in (("diffusers", "d"), ("peft", "p"), ("native", "n.safetensors")):
        ldm("convert", lora, tmp_path / name, "--to", to)
        found = changes(files.read(tmp_path / name))
        assert all(torch.allclose(found[n], wanted[n], atol=1e-6) for n in wanted)
    ldm(
        "convert", lora, tmp_path / "half.safetensors", "--to", "kohya", "--dtype", "float16", "--model", home / "model"
    )
    types = {t.dtype for name, t in load_file(tmp_path / "half.safetensors").items() if not name.endswith("alpha")}
    assert types == {torch.float16}
    said = ldm("inspect", tmp_path / "half.safetensors")
    assert "lora for a model with text of width 16" in said and "rank 4; layers: " in said
    assert "ss_network_dim: 4" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("resize", "A", "A", "--rank", 2), "exists; nothing is overwritten"),
        (("resize", "A", "B.pt", "--rank", 2), "an adapter for kohya is a .safetensors file"),
        (("resize", "A", "B.safetensors", "--rank", 2, "--dtype", "int8"), "unknown dtype 'int8'"),
        (("convert", "A", "B", "--to", "khoya"), "did you mean 'kohya'"),
        (("combine", "A:much", "--out", "B.safetensors"), "'much' in "),
        (("merge", "M", "A", "--out", "B", "--to", "compvis"), "--to compvis writes a .safetensors file"),
        (("merge", "M", "absent.safetensors", "--out", "B"), "no adapter at"),
        (("extract", "M", "M", "B.safetensors"), "nothing to extract"),
    ],
)
def test_mistakes_are_one_line(home: Path, tmp_path: Path, arguments: tuple[object, ...], said: str) -> None:
    def meant(argument: object) -> str:
        text = str(argument).replace("A", str(home / "a.safetensors"), 1) if str(argument)[0] == "A" else str(argument)
        text = str(home / "model") if text == "M" else text
        return str(tmp_path / text) if text.startswith("B") else text

    with pytest.raises(ValueError) as error:
        ldm(*map(meant, arguments))
    assert said in str(error.value)
    assert not list(tmp_path.iterdir())
