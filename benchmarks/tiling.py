"""What tiles cost: memory and time against the whole picture, and the difference that they make.

    OMP_NUM_THREADS=1 python -m benchmarks.tiling [MODEL]

The model's autoencoder, or Stable Diffusion's with random weights, decodes and encodes pictures of --side and twice
--side: whole, in our tiles of --side, and in overlapping tiles that each normalise by themselves, as others do. The
seam is the mean step of that difference across the edges of tiles, over its mean step between all other pixels: 1 is
no seam.
"""

from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.instruments import instruments
from ldm.checkpoints.load import load_model
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.tiling import tile, untile


def picture(side: int) -> Tensor:
    """A picture [1, 3, side, side] in [-1, 1] whose spectrum falls as 1 / f, as those of photographs do."""
    noise = torch.fft.rfft2(torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)))
    down, across = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None]
    smooth = torch.fft.irfft2(noise / (down**2 + across**2).sqrt().clamp(min=1 / side), s=(side, side))
    return (smooth / (2 * smooth.std())).clamp(-1, 1)


def decode_alone(model: AutoencoderKL, latent: Tensor, side: int, overlap: int = 8) -> Tensor:
    """Tiles that overlap, each decoded as a picture of its own; side and overlap in latent pixels."""
    f, (height, width) = model.factor, latent.shape[-2:]
    out = latent.new_empty(1, 3, height * f, width * f)
    for top in range(0, height, side):
        for left in range(0, width, side):
            a, b = max(top - overlap, 0), max(left - overlap, 0)
            drawn = model.decode(latent[..., a : top + side + overlap, b : left + side + overlap])
            y, x = (top - a) * f, (left - b) * f
            place = out[..., top * f : (top + side) * f, left * f : (left + side) * f]
            place.copy_(drawn[..., y : y + place.shape[-2], x : x + place.shape[-1]])
    return out


def seam(difference: Tensor, side: int) -> float:
    """Mean step of a difference [1, C, H, W] across the edges of tiles, over that between all other pixels."""
    found = []
    for dim in (-1, -2):
        jumps = difference.diff(dim=dim).abs().mean(dim=(0, 1, -3 - dim))
        edges = torch.zeros(len(jumps), dtype=torch.bool)
        edges[side - 1 :: side] = True
        found.append((jumps[edges].mean() / jumps[~edges].mean()).item())
    return sum(found) / 2


def main(
    path: Annotated[str, typer.Argument(metavar="[MODEL]", help="A folder or file with an autoencoder.")] = "",
    side: Annotated[int, typer.Option(help="of a tile, px")] = 256,
) -> None:
    """Print a table of memory, and one of differences."""
    torch.manual_seed(0)
    tools = instruments("cpu")
    model = (
        AutoencoderKL(AutoencoderConfig()) if not path else load_model(path, ["autoencoder"]).require("autoencoder")[0]
    )
    model.float().eval()
    large, small = picture(2 * side), picture(side)
    with torch.inference_mode():
        latent, part = model.encode(large), model.encode(small)
        decoded = model.decode(latent)
        typer.echo(f"| of a picture of {side} px | memory, MB | ratio |\n|---|--:|--:|")
        for name, base, call in (
            ("decode", lambda: model.decode(part), lambda: model.decode(latent)),
            ("encode", lambda: model.encode(small), lambda: model.encode(large)),
        ):
            basis, whole = tools.peak_mb(base), tools.peak_mb(call)
            tile(model, side)
            tiled = tools.peak_mb(call)
            untile(model)
            typer.echo(f"| {name} | {basis:.0f} | 1.00 |")
            typer.echo(f"| {name} {2 * side} px whole | {whole:.0f} | {whole / basis:.2f} |")
            typer.echo(f"| {name} {2 * side} px in tiles of {side} | {tiled:.0f} | {tiled / basis:.2f} |")
        tile(model, side)
        ours, ours_latent = model.decode(latent), model.encode(large)
        untile(model)
        alone = decode_alone(model, latent, side // model.factor)
    scale = decoded.std()
    typer.echo("\n| against the whole | mean | largest | seam |\n|---|--:|--:|--:|")
    for name, difference, unit, edge in (
        ("decode, our tiles", ours - decoded, scale, side),
        ("decode, tiles by themselves", alone - decoded, scale, side),
        ("encode, our tiles", ours_latent - latent, latent.std(), side // model.factor),
    ):
        shares = (difference.abs().mean() / unit, difference.abs().max() / unit)
        typer.echo(f"| {name} | {shares[0]:.2%} | {shares[1]:.2%} | {seam(difference, edge):.2f} |")
    typer.echo("\nDifferences are shares of the standard deviation of the whole.")


if __name__ == "__main__":
    typer.run(main)
