"""Folders that appear whole or not at all, and say when they were altered."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from ldm.checkpoints import files
from ldm.checkpoints.files import commit, newest_valid, read_tensors, save_tensors, verify
from ldm.checkpoints.load import find_model, load_model, save_model
from ldm.checkpoints.model import load_tensors


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(folder: Path, text: str) -> None:
    with commit(folder) as stage:
        (stage / "a.txt").write_text(text)
        (stage / "sub").mkdir()
        (stage / "sub" / "b.txt").write_text(text * 2)


def test_a_failure_inside_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "x", "old")
    before = contents(tmp_path)
    with pytest.raises(RuntimeError), commit(tmp_path / "x") as stage:
        (stage / "a.txt").write_text("half")
        raise RuntimeError
    assert contents(tmp_path) == before


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_crash_at_any_moment_leaves_old_or_new(call: str, tmp_path: Path) -> None:
    """A child dies at its k-th fsync or rename, for every k; never is there a half under the final name."""
    seen = set()
    for k in range(1, 12):
        root = tmp_path / str(k)
        write(root / "x", "old")
        child = os.fork()
        if child == 0:
            owner = os if call == "fsync" else Path
            real, count = getattr(owner, call), [0]

            def dying(*args: object, real: object = real, count: list[int] = count, k: int = k) -> object:
                count[0] += 1
                if count[0] == k:
                    os._exit(9)
                return real(*args)  # type: ignore[operator]

            setattr(owner, call, dying)
            write(root / "x", "new")
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        if (root / "x").exists():
            verify(root / "x")
            seen.add((root / "x" / "a.txt").read_text())
        else:  # between the two renames; the old one is whole under its other name
            verify(root / ".del-x")
            seen.add("between")
        write(root / "x", "again")  # and a later save clears up
        assert [p.name for p in root.iterdir()] == ["x"]
        if not died:
            break
    assert "old" in seen and "new" in seen


def test_every_altered_bit_is_named(tmp_path: Path) -> None:
    write(tmp_path / "x", "good")
    for name in ("a.txt", "sub/b.txt"):
        for damage in ("flip", "cut", "gone"):
            copy = tmp_path / "copy"
            shutil.copytree(tmp_path / "x", copy)
            data = bytearray((copy / name).read_bytes())
            if damage == "gone":
                (copy / name).unlink()
            else:
                data[1] ^= 4
                (copy / name).write_bytes(bytes(data) if damage == "flip" else bytes(data[:-1]))
            with pytest.raises(ValueError, match=name):
                verify(copy)
            shutil.rmtree(copy)


def test_newest_valid_passes_over_damage(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path / f"step-{step:08d}", str(step))
    (tmp_path / "step-00000003" / "a.txt").write_text("4")
    (tmp_path / "step-00000002" / files.MANIFEST).unlink()
    found = newest_valid(tmp_path)
    assert found is not None and found.name == "step-00000001"
    assert newest_valid(tmp_path / "step-00000001") is None


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(4).reshape(2, 2).T}
    save_tensors(tmp_path / "t.safetensors", tensors, {"n": [1, 2]})
    back, metadata = read_tensors(tmp_path / "t.safetensors")
    assert metadata == {"n": [1, 2]} and all(torch.equal(back[k], tensors[k]) for k in tensors)


def test_every_component_loads_bit_for_bit_and_alone(models: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(models["denoising"])
    assert set(model.components) == {"autoencoder", "text", "denoiser"}
    assert model.settings["diffusion"]["schedule"] and model.settings["null_prompt"] == ""
    with commit(tmp_path / "copy") as stage:
        save_model(stage, model.components, model.settings, model.name)
    again = load_model(tmp_path / "copy")
    for name, module in model.components.items():
        assert not module.training
        state, other = module.state_dict(), again.components[name].state_dict()
        assert state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)
    assert list(load_model(models["denoising"], ["text"]).components) == ["text"]
    with pytest.raises(ValueError, match="this needs denoiser as well"):
        load_model(models["autoencoder"]).require("autoencoder", "denoiser")


def test_what_does_not_fit_is_listed() -> None:
    with pytest.raises(ValueError, match=r"f: missing bias; unknown other; weight is \(3, 2\)|does not fit") as error:
        wrong = {"weight": torch.zeros(3, 2), "other": torch.zeros(1)}
        load_tensors(torch.nn.Linear(2, 2), wrong, "f")
    text = str(error.value)
    assert "missing bias" in text and "unknown other" in text and "weight is (3, 2) instead of (2, 2)" in text


def test_finding_a_model_says_what_is_wrong(models: dict[str, Path], tmp_path: Path) -> None:
    assert find_model(models["denoising"]).name == "step-00000004"
    for path, message in (
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path, "give a run folder"),
    ):
        with pytest.raises(ValueError, match=message):
            find_model(path)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no usable checkpoint \(1 damaged\)"):
        find_model(tmp_path)
