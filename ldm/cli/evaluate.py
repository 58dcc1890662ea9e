"""`ldm evaluate`: measure a model on tasks whose answer can be checked."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ldm.pipeline import Pipeline

app = typer.Typer(no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="A run folder or a model folder.")]
Seed = Annotated[int, typer.Option(help="Picture i has seed SEED + i.")]
Steps = Annotated[int | None, typer.Option(help="Sampling steps.")]
Sampler = Annotated[str | None, typer.Option(help="Sampler, such as ddim.")]
Guidance = Annotated[float | None, typer.Option(help="Strength of classifier-free guidance.")]
Out = Annotated[Path | None, typer.Option(help="Folder for scores.json and picture grids.")]


def load(model: str) -> "Pipeline":
    """The model on the GPU if there is one. Raises ValueError as `Pipeline.load` does."""
    import torch

    from ldm.pipeline import Pipeline

    return Pipeline.load(model, "cuda" if torch.cuda.is_available() else "cpu")


@app.command()
def shapes(
    model: Model,
    count: Annotated[int, typer.Option(help="Held-out prompts, and as many seen ones.")] = 128,
    glyph: Annotated[str, typer.Option(help="A shape, zorp, that the model was fine-tuned on: as many of it.")] = "",
    base: Annotated[str, typer.Option(help="With --glyph: the model before, measured beside it.")] = "",
    seed: Seed = 0,
    steps: Steps = None,
    sampler: Sampler = None,
    guidance: Guidance = None,
    out: Out = None,
) -> None:
    """Ask for drawn scenes and read back whether colours, shapes, sizes and places are as asked.

    The last two lines are ceilings: drawn scenes through the autoencoder, and as they are.
    """
    from ldm.evaluation.glyph import evaluate_glyph, glyph_table
    from ldm.evaluation.report import Sampling, evaluate_shapes, shapes_table

    sampling = Sampling(seed, steps, sampler, guidance)
    if base and not glyph:
        raise ValueError("--base goes with --glyph")
    if glyph:
        before = load(base) if base else None
        typer.echo(glyph_table(evaluate_glyph(load(model), glyph, sampling, count, before, out)))
        return
    typer.echo(shapes_table(evaluate_shapes(load(model), sampling, count, out)))


@app.command()
def edges(
    model: Model,
    control: Annotated[str, typer.Argument(help="A ControlNet or T2I-adapter trained on edges, or its run.")],
    count: Annotated[int, typer.Option(help="Held-out scenes, and as many seen ones.")] = 128,
    seed: Seed = 0,
    steps: Steps = None,
    sampler: Sampler = None,
    guidance: Guidance = None,
    out: Out = None,
) -> None:
    """Ask for drawn scenes without saying where things are, give their edges, and read back whether they are there.

    Beside it chance: the same without the edges.
    """
    import torch

    from ldm.checkpoints.load import load_model
    from ldm.evaluation.control import edges_table, evaluate_edges
    from ldm.evaluation.report import Sampling

    found = load_model(control, ["controlnet", "t2i_adapter"], dtype=torch.float32).components
    if not found:
        raise ValueError(f"{control} holds neither a ControlNet nor a T2I-adapter")
    pipeline = load(model)
    (network,) = found.values()
    network = network.to(next(pipeline.autoencoder.parameters()).device).eval()
    typer.echo(edges_table(evaluate_edges(pipeline, network, Sampling(seed, steps, sampler, guidance), count, out)))


@app.command()
def inpainting(
    model: Model,
    count: Annotated[int, typer.Option(help="Drawn scenes, each with one object cut out.")] = 128,
    base: Annotated[str, typer.Option(help="The model before: it keeps what is known while it draws.")] = "",
    seed: Seed = 0,
    steps: Steps = None,
    sampler: Sampler = None,
    guidance: Guidance = None,
    out: Out = None,
) -> None:
    """Cut an object out of drawn scenes, ask for another in its place, and read back whether it is there."""
    from ldm.evaluation.control import evaluate_inpainting, inpainting_table
    from ldm.evaluation.report import Sampling

    before = load(base) if base else None
    sampling = Sampling(seed, steps, sampler, guidance)
    typer.echo(inpainting_table(evaluate_inpainting(load(model), sampling, count, before, out)))


@app.command()
def emoji(  # one parameter an option: what a command line needs
    model: Model,
    data: Annotated[Path, typer.Argument(help="The shard folder that the model was trained on.")],
    heldout: Annotated[Path | None, typer.Option(help="A shard folder that it never saw.")] = None,
    count: Annotated[int, typer.Option(help="Names to ask for, from each folder.")] = 256,
    seed: Seed = 0,
    steps: Steps = None,
    sampler: Sampler = None,
    guidance: Guidance = None,
    out: Out = None,
) -> None:
    """Ask for emoji by name and see how often the nearest real picture carries that name."""
    from ldm.evaluation.report import Sampling, emoji_table, evaluate_emoji

    sampling = Sampling(seed, steps, sampler, guidance)
    typer.echo(emoji_table(evaluate_emoji(load(model), sampling, data, heldout, count, out)))


@app.command()
def nll(
    model: Model,
    data: Annotated[Path, typer.Argument(help="A shard folder that the model has not seen.")],
    count: Annotated[int, typer.Option(help="Pictures, the first of the folder.")] = 64,
    method: Annotated[str, typer.Option(help="vlb, the variational bound, or ode, the probability-flow ODE.")] = "vlb",
    steps: Annotated[int, typer.Option(help="vlb: evaluations an image; ode: Runge-Kutta steps of four.")] = 100,
    probes: Annotated[int, typer.Option(help="ode: backward passes an evaluation.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the noise and the probes.")] = 0,
) -> None:
    """Bits per dimension that the model needs for the latents of pictures, told their captions.

    Models on the same autoencoder compare; latents are not bytes, so the number may be negative.
    """
    from ldm.evaluation.likelihood import Counting, evaluate_nll

    counting = Counting(method, steps, probes, seed)
    for name, value in evaluate_nll(load(model), str(data), count, counting).items():
        typer.echo(f"{name:<16}{value:.5f}" if isinstance(value, float) else f"{name:<16}{value}")


@app.command()
def autoencoder(
    model: Annotated[str, typer.Argument(help="A run, a model folder or a file with an autoencoder.")],
    data: Annotated[Path, typer.Argument(help="A shard folder that it was not trained on.")],
    count: Annotated[int, typer.Option(help="Pictures; rFID compares only at the same count.")] = 256,
    perceptual: Annotated[str, typer.Option(help="LPIPS: a folder of its weights, or random.")] = "random",
    features: Annotated[
        str, typer.Option(help="rFID: a run with an image tower, LPIPS's weights, or random.")
    ] = "random",
    statistics: Annotated[str, typer.Option(help="channel or scalar: also write OUT/model with these latents.")] = "",
    out: Out = None,
) -> None:
    """Send pictures through an autoencoder and back: PSNR, SSIM, LPIPS, rFID, and how its latents lie."""
    import torch

    from ldm.checkpoints.files import commit
    from ldm.checkpoints.load import load_model, save_model
    from ldm.checkpoints.perceptual import load_perceptual
    from ldm.evaluation.autoencoder import Judges, evaluate_autoencoder, pictures, set_statistics, table
    from ldm.evaluation.report import keep
    from ldm.names import known

    if statistics:
        known("statistics", statistics, ("channel", "scalar"))
        if out is None:
            raise ValueError("--statistics writes a model: give --out FOLDER as well")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = load_model(model, ["autoencoder"])
    (network,) = found.require("autoencoder")
    judge = load_perceptual(perceptual).to(device)
    extractor, extractor_name = feature_extractor(features, device)
    name = "random_distance" if perceptual == "random" else "lpips"
    images = pictures(data, found.settings.get("size"), count)
    result = evaluate_autoencoder(network.to(device), images, Judges(judge, name, extractor, extractor_name))
    typer.echo(table(result.scores))
    if out:
        keep(out, result.scores, {"real": result.images, "reconstructed": result.rebuilt})
    if out and statistics:
        set_statistics(network, result, statistics)
        with commit(out / "model") as stage:
            save_model(stage, {"autoencoder": network.cpu()}, found.settings, found.name)


@app.command()
def retrieval(
    model: Annotated[str, typer.Argument(help="A run of the contrastive task, or its model folder.")],
    data: Annotated[Path, typer.Argument(help="A shard folder that it was not trained on.")],
    count: Annotated[int, typer.Option(help="Pictures, the first of the folder; 0 = all. Recall falls with it.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How often a picture's caption, among all of the folder, is within the 1, 5 and 10 nearest, and the other way.

    Equal captions are one: any picture that has it is right.
    """
    from json import dumps

    import torch

    from ldm.evaluation.retrieval import captioned, evaluate_retrieval
    from ldm.pipeline import Companions

    clip = Companions.load(clip=model, device="cuda" if torch.cuda.is_available() else "cpu").clip
    scores = evaluate_retrieval(clip, captioned(str(data), clip.image.config.size, count))
    typer.echo(dumps(scores) if json else "\n".join(f"{name:<26}{value:.4g}" for name, value in scores.items()))


def feature_extractor(source: str, device: str) -> "tuple[Callable[[Tensor], Tensor], str]":
    """What gives rFID its features, and its name: a CLIP image tower, VGG16, or random kernels. Raises ValueError."""
    import torch.nn.functional as F

    from ldm.checkpoints.load import load_model
    from ldm.checkpoints.model import config_of
    from ldm.checkpoints.perceptual import load_perceptual

    towers = Path(source, "model.json").is_file() or Path(source, "checkpoints").is_dir()
    tower = load_model(source, ["image"]).components.get("image") if towers else None
    if tower is None:
        vgg = load_perceptual(source).to(device)
        return vgg.pooled, "random kernels" if source == "random" else f"VGG16 of {source}, pooled"
    tower.to(device)
    size: int = config_of(tower).size

    def seen(image: "Tensor") -> "Tensor":
        return tower(F.interpolate(image, (size, size), mode="bilinear", antialias=True).clamp(-1, 1))

    return seen, f"image tower of {source}"
