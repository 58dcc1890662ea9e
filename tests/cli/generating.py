"""`ldm generate` on small random models in files."""

from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

import ldm.cli.generate
from ldm.checkpoints.files import commit
from ldm.checkpoints.load import save_model
from ldm.images import save_png, to_pil
from tests.pipeline.small import HINT, MASK, PICTURE, controlnet, small

SETTINGS = {"diffusion": {"prediction": "v"}, "size": 16, "null_prompt": ""}


def save(folder: Path, kind: str = "plain", seed: int = 0) -> Path:
    """A small model of a kind in a folder."""
    pipeline = small(kind, seed)
    parts = {"autoencoder": pipeline.autoencoder, "text": pipeline.text, "denoiser": pipeline.denoiser}
    with commit(folder) as stage:
        save_model(stage, parts, SETTINGS, kind)
    return folder


def save_pictures(folder: Path) -> None:
    """A picture, a mask, a hint and a ControlNet."""
    save_png(to_pil(PICTURE[0]), folder / "picture.png")
    save_png(to_pil(HINT[0] * 2 - 1), folder / "hint.png")
    Image.fromarray((MASK[0, 0].numpy() * 255).astype("uint8")).save(folder / "mask.png")
    with commit(folder / "canny") as stage:
        save_model(stage, {"controlnet": controlnet()}, {}, "canny")


def generate(*words):
    """Run it on the CPU; -> (files that it names, what it says on the side)."""
    app = ldm.cli.generate.typer.Typer()
    app.command()(ldm.cli.generate.generate)
    result = CliRunner().invoke(app, [*map(str, words), "--device", "cpu"])
    if result.exception:
        raise result.exception
    return [Path(line) for line in result.stdout.splitlines()], result.stderr
