"""What the README shows works: commands, options, settings, links and code."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from ldm.checkpoints import compvis
from ldm.cli.main import application, main
from ldm.config import load_config
from ldm.training.run import RunConfig
from tests.checkpoints.families import make

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands(text: str = README) -> list[list[str]]:
    lines = [line for block in blocks("bash", text) for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if line.strip() and not line.startswith("#")]


def option_names(command: object, path: list[str]) -> set[str]:
    for word in path:
        command = command.commands[word]  # type: ignore[attr-defined]
    return {name for parameter in command.params for name in parameter.opts}  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    app = typer.main.get_command(application())
    for words in commands(page.read_text(encoding="utf-8")):
        if words[0] == "make":
            assert words[1] in targets, words
        if "ldm" in words:
            words = words[words.index("ldm") + 1 :]
            path = words[:2] if words[0] in ("data", "evaluate", "adapter") else words[:1]
            shown = {w for w in words if w.startswith("--")}
            assert shown <= option_names(app, path), words
            for word in words:
                assert not word.startswith("configs/") or (ROOT / word).is_file(), words
            if words[0] == "train":
                plain = [w for w in words[1:] if not w.startswith("--")]
                files = [ROOT / w for w in plain if "=" not in w]
                load_config(RunConfig, files, [w for w in plain if "=" in w])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_the_commands_run(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `ldm` line of the README but real training and the emoji font, with its folders moved here."""
    from PIL import Image

    (tmp_path / "my-pictures").mkdir()
    for name in ("cat", "dog"):
        Image.new("RGB", (300, 280), "orange").save(tmp_path / "my-pictures" / f"{name}.jpg")
        (tmp_path / "my-pictures" / f"{name}.txt").write_text(f"a {name}")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "denoiser").symlink_to(models["denoising"])
    compvis.write(make("sd1"), tmp_path / "v1-5-pruned-emaonly.safetensors")  # a tiny one
    monkeypatch.chdir(tmp_path)
    run = []
    for words in commands():
        if words[0] != "ldm" or "emoji" in words or (words[1] == "train" and "--dry-run" not in words):
            continue
        if words[1] == "evaluate":
            continue  # needs a model of 32 px; the end-to-end test runs it
        short = ["--workers", "0"] if "--workers" in words else ["samples=4"] if words[1] == "finetune" else []
        monkeypatch.setattr("sys.argv", [*words, *short])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code in (0, None), words
        run.append(words[1])
    steps = ["data", "data", "data", "train", "finetune", "generate", "generate", "generate", "generate"]
    assert run == [*steps, "inspect", "convert", "generate"]
    first, again = (tmp_path / name / "00000-0.png" for name in ("changed", "again"))
    assert first.read_bytes() == again.read_bytes()
    assert list((tmp_path / "lighthouse").glob("0*.png"))
    assert len(list((tmp_path / "pictures").glob("0*.png"))) == 8


def test_the_python_code_runs(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "denoiser").symlink_to(models["denoising"])
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "squares.png").exists()
